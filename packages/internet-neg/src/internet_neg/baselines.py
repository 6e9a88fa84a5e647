"""The methods that InterNeg is compared with, behind its own fit and predict.

MCM and NegLabel look at no image of the known classes: their `fit` accepts the same sources, so
that all methods can be run alike, and does not use them.
"""

from typing import Any

import torch
from torch import Tensor

from internet_neg._checks import normalize
from internet_neg.detector import InterNegDetector, NegativeText
from internet_neg.score import Score, mcm_score
from internet_neg.selection import neglabel_select

__all__ = ["MCMDetector", "NegLabelDetector"]


class NegLabelDetector(InterNegDetector):
    """NegLabel (Jiang et al., ICLR 2024): negatives far from the class texts; no stream.

    Its own settings are ``InterNegConfig(negatives=10_000, groups=100)``; the percentile is that of
    ``percentile_mode``.

    Examples:
        >>> from internet_neg import InterNegConfig
        >>> detector = NegLabelDetector.from_features(
        ...     torch.eye(3)[:1], torch.eye(3)[:1], torch.eye(3)[1:],
        ...     config=InterNegConfig(text_only=True, negatives=1, groups=1),
        ... )
        >>> detector.negatives[0].word
        'noun 0'
    """

    title = "NegLabel"

    def _choose(
        self, nouns: Tensor, adjectives: Tensor, T: Tensor, P: Tensor
    ) -> tuple[Tensor, Tensor]:
        return neglabel_select(
            nouns,
            adjectives,
            T,
            self.config.negatives,
            percentile_mode=self.config.percentile_mode,
            chunk=self.config.chunk_size,
        )

    def _proxies(self, source: Any, T: Tensor, unlabelled: Any, sync: bool = False) -> Tensor:
        return T

    def _gates(self, update: bool) -> bool:
        return False

    @property
    def negatives(self) -> list[NegativeText]:
        """The chosen words: adjectives, then nouns, each from the farthest on."""
        self._fitted()
        return [NegativeText(word, pos, None) for word, pos in self._words]


class MCMDetector(InterNegDetector):
    """Maximum concept matching (Ming et al., NeurIPS 2022): class names only.

    `config.temperature` divides the cosines; None is 1, the method's own.

    Examples:
        >>> detector = MCMDetector(None, ["a", "b"]).fit_texts(torch.eye(2))
        >>> detector.predict(features=torch.eye(2)).score.tolist()
        [0.7310585, 0.7310585]
    """

    title = "MCM"

    def fit(self, source: Any, *, unlabelled: Any = None, sync: bool = False) -> "MCMDetector":
        """Embed the class names.

        Args:
            source: Not used.
            unlabelled: Not used.
            sync: Not used: there are few class names.
        """
        return self.fit_texts(self._texts(self.config.class_prompt, self.classnames))

    def fit_texts(self, class_texts: Tensor) -> "MCMDetector":
        """Take text embeddings of the classes [K, D]."""
        T = normalize(self._checked("class texts", class_texts))
        self._scale = 1.0
        self._set(T, T, T[:0])
        return self

    def _gates(self, update: bool) -> bool:
        return False

    def _score(self, v: Tensor) -> Score:
        S = mcm_score(v, self._fitted(), self.config.temperature or 1.0)
        S = S if S.device.type == "mps" else S.double()
        return Score(S, torch.logit(S))

    @property
    def negatives(self) -> list[NegativeText]:
        """There are none."""
        return []
