"""All scorers on one trained model, each given what it reads: logits, features, or the images.

Detectors of features (Mahalanobis, kNN, ReAct, ViM) and those of scikit-learn learn from ID samples
first, ODIN reads the images once more. One table of scores comes out, for `edge_ood.evaluate`.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from edge_ood.loop import Outputs
from edge_ood.models import MultiLabelModel
from edge_ood.scorers import get_scorer, list_scorers
from shared_core.errors import InputError
from shared_core.run import progress

__all__ = ["FITTED", "choose_scorers", "make_scorers", "score_outputs"]

FITTED = ("lof", "iforest", "mahalanobis", "knn", "react", "vim")


def choose_scorers(names: Sequence[str], *, fitted: bool, images: bool) -> list[str]:
    """The names, with ``all`` spelled out as far as there is what they need.

    Args:
        names: Some of `edge_ood.list_scorers`, or ``all`` alone.
        fitted: Whether there are ID samples to fit on.
        images: Whether there are images and a model, not logits alone.

    Raises:
        InputError: If a name is unknown, or what it needs is not there.

    Examples:
        >>> "knn" in choose_scorers(["all"], fitted=True, images=True)
        True
        >>> choose_scorers(["all"], fitted=False, images=False)[-1]
        'logsumexp'
    """
    needs = {n: r for r in ("logits", "features", "inputs") for n in list_scorers(r)}
    known = [n for n, r in needs.items() if images or r == "logits"]
    known = [n for n in known if fitted or n not in FITTED]
    if list(names) == ["all"]:
        return known
    for name in names:
        if name not in needs:
            raise InputError(f"no scorer is called {name!r}; accepted: all, {', '.join(needs)}")
        if needs[name] != "logits" and not images:
            raise InputError(f"scorer {name} reads {needs[name]}: it needs images, not logits")
        if name in FITTED and not fitted:
            raise InputError(
                f"scorer {name} has to be fitted: give --fit FOLDER, where edge-ood score "
                "--features has written the ID training images"
            )
    if not names:
        raise InputError("no scorer is given")
    return list(dict.fromkeys(names))


def make_scorers(
    names: Sequence[str],
    model: nn.Module | None = None,
    fit: Outputs | None = None,
    *,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Make scorers, give them the model's head where they need it, and fit them.

    Args:
        names: What `choose_scorers` gave.
        model: For scorers of features and inputs.
        fit: Logits, features and labels of ID samples.
        options: Arguments by scorer.

    Raises:
        InputError: If `fit` lacks what a scorer needs, or comes from another model.

    Examples:
        >>> sorted(make_scorers(["msp", "max_logit"]))
        ['max_logit', 'msp']
    """
    made: dict[str, Any] = {}
    for name in names:
        scorer = made[name] = get_scorer(name, **(options or {}).get(name, {}))
        if name == "odin":
            scorer.model = model
        if name not in FITTED:
            continue
        assert fit is not None
        if scorer.requires == "logits":
            scorer.fit(fit.logits)
            continue
        head = _head(model)
        if fit.features.numel() == 0:
            raise InputError(f"scorer {name} is fitted on features, and there are none")
        _check_origin(head, fit)
        if name in ("react", "vim"):
            scorer.head = head[-1] if name == "vim" else head
        labelled = fit.targets if fit.targets.numel() else None
        scorer.fit(_read(name, head, fit.features), labelled)
    return made


@torch.no_grad()
def score_outputs(
    scorers: Mapping[str, Any],
    out: Outputs,
    model: nn.Module | None = None,
    loader: Iterable[Any] | None = None,
    device: torch.device | None = None,
) -> dict[str, Float[Tensor, " n"]]:
    """Scores of a data set by each scorer, on the CPU.

    Args:
        scorers: What `make_scorers` gave.
        out: What `edge_ood.loop.collect` made of the data set, with features if a scorer reads
            them.
        model: For scorers of features and inputs.
        loader: Gives the same data set again, for ODIN.
        device: Where batches of `loader` are sent.

    Raises:
        InputError: If `loader` gives another number of samples than `out` holds.

    Examples:
        >>> out = Outputs(torch.zeros(1, 2), torch.empty(0), torch.empty(0))
        >>> score_outputs(make_scorers(["sum_prob"]), out)
        {'sum_prob': tensor([1.])}
    """
    found = {}
    for name, scorer in scorers.items():
        if scorer.requires == "inputs":
            found[name] = _score_inputs(scorer, loader or [], device, len(out.logits))
        elif scorer.requires == "features":
            found[name] = scorer.score(_read(name, _head(model), out.features))
        else:
            found[name] = scorer.score(out.logits)
    return found


def _score_inputs(scorer: Any, loader: Iterable[Any], device: Any, n: int) -> Tensor:
    scorer.model.eval()
    parts = []
    for batch in progress(loader, description=scorer.name, unit="batch"):
        x = batch[0] if isinstance(batch, tuple | list) else batch
        parts.append(scorer.score(x.to(device)).cpu())
    scores = torch.cat(parts) if parts else torch.empty(0)
    if len(scores) != n:
        raise InputError(f"{scorer.name} read {len(scores)} inputs for {n} rows of logits")
    return scores


def _head(model: nn.Module | None) -> nn.Sequential:
    """A copy of the head on the CPU, where features are."""
    if not isinstance(model, MultiLabelModel):
        raise InputError("scorers of features need a model of edge_ood.create_model")
    return copy.deepcopy(model.head).cpu().eval()


@torch.no_grad()
def _read(name: str, head: nn.Sequential, features: Tensor) -> Tensor:
    """What the scorer reads: ViM the input of the last linear layer, the others the features."""
    if name == "vim":
        for layer in list(head)[:-1]:
            features = layer(features)
    return features


@torch.no_grad()
def _check_origin(head: nn.Sequential, fit: Outputs) -> None:
    """Refuse features that this head does not turn into the logits beside them."""
    features, logits = fit.features[:64], fit.logits[:64]
    first = next(m for m in head if isinstance(m, nn.Linear))
    fits = len(fit.features) == len(fit.logits) and features.shape[1] == first.in_features
    if not fits or not torch.allclose(head(features), logits, rtol=1e-2, atol=1e-2):
        raise InputError("the features to fit on come from another model than the one that scores")
