"""Choosing negative texts: by their distance to images of the known classes, as CLIP was trained.

Notation of the paper (section 4.2): t_i is the text embedding of class i and p_i its image proxy;
a text e is at the inter-modal distance d_i(e) = 1 - <e, p_i> of class i, and the class's own name
at the base distance d_i^base = d_i(t_i). All embeddings have length one.
"""

import warnings
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from internet_neg._checks import check_same_width, widen
from internet_neg.errors import InterNegError, NoAdmissibleNegativesError

__all__ = ["admissible", "base_distance", "deviation", "neglabel_select", "select_negatives"]

Texts = Float[Tensor, "n D"]
Classes = Float[Tensor, "K D"]


def base_distance(T: Classes, P: Classes) -> Float[Tensor, " K"]:
    """Distance of each class's name from the class's images, d_i^base = 1 - <t_i, p_i>.

    Args:
        T: Text embeddings of the classes, of length one.
        P: Image proxies of the classes, of length one.

    Examples:
        >>> base_distance(torch.eye(2), torch.eye(2)).tolist()
        [0.0, 0.0]
    """
    _check(("class texts", T), ("proxies", P))
    return 1 - (widen(T) * widen(P)).sum(dim=-1)


def deviation(E: Texts, T: Classes, P: Classes) -> Float[Tensor, " n"]:
    """How much farther texts are from the classes than the names are, on average (Eq. 10).

    delta(e) = mean_i(d_i(e) - d_i^base) = mean_i <t_i, p_i> - <e, mean_i p_i>, one dot product.

    Args:
        E: Text embeddings, of length one.
        T: Text embeddings of the classes.
        P: Image proxies of the classes.

    Examples:
        >>> deviation(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]]), torch.eye(2)[:1])
        tensor([1.])
    """
    _check(("class texts", T), ("proxies", P), ("texts", E))
    own = (widen(T) * widen(P)).sum(dim=-1).mean()
    return own - widen(E) @ widen(P).mean(dim=0)


def admissible(E: Texts, T: Classes, P: Classes, chunk: int = 8192) -> Bool[Tensor, " n"]:
    """Whether texts are farther from every class than that class's own name (section 4.2.1).

    A(e) = [for all i: d_i(e) > d_i^base], strictly, so that no class name is admissible.

    Args:
        E: Text embeddings, of length one.
        T: Text embeddings of the classes.
        P: Image proxies of the classes.
        chunk: Texts compared at a time; the memory is chunk x K numbers. Does not change a result.

    Examples:
        >>> admissible(torch.eye(2), torch.eye(2)[:1], torch.eye(2)[:1]).tolist()
        [False, True]
    """
    _check(("class texts", T), ("proxies", P), ("texts", E))
    if chunk < 1:
        raise InterNegError(f"chunk={chunk}; it has to be at least 1")
    names, proxies = widen(T), widen(P)
    own = (names * proxies).sum(dim=-1)
    result = [_closest(part, names, proxies, own) < 0 for part in torch.split(E, chunk)]
    return torch.cat(result) if result else torch.zeros(0, dtype=torch.bool, device=E.device)


def _closest(part: Tensor, names: Tensor, proxies: Tensor, own: Tensor) -> Tensor:
    """max_i <e, p_i> - <t_i, p_i> of each text, zero where it is so up to rounding."""
    margin = (widen(part) @ proxies.T).sub_(own).amax(dim=1)
    # A matrix product sums in another order than the base distances do; without this, a text equal
    # to a class name could come out farther than itself.
    slack = 4 * torch.finfo(margin.dtype).eps
    return torch.where(margin.abs() <= slack, margin.new_zeros(()), margin)


def select_negatives(
    E_noun: Float[Tensor, "nouns D"],
    E_adj: Float[Tensor, "adjectives D"],
    T: Classes,
    P: Classes,
    M: int,
    chunk: int = 8192,
) -> tuple[Int[Tensor, " a"], Int[Tensor, " b"]]:
    """The M admissible texts that deviate most, shared out between adjectives and nouns.

    Adjectives get floor(M n_adj / (n_adj + n_noun)) places, where n counts admissible words, and
    nouns the rest. Ties are decided by the order of the vocabulary. A part with fewer words than
    places gives all it has, with a warning.

    Args:
        E_noun: Embeddings of nouns, of length one.
        E_adj: Embeddings of adjectives.
        T: Text embeddings of the classes.
        P: Image proxies of the classes.
        M: How many to choose, at least 1.
        chunk: See `admissible`.

    Returns:
        Indices into `E_adj` and into `E_noun`, each from the largest deviation down.

    Raises:
        NoAdmissibleNegativesError: If no text is admissible.

    Examples:
        >>> nouns = torch.nn.functional.normalize(torch.tensor([[1.0, 0.1], [0.0, 1.0]]), dim=1)
        >>> adjectives, nouns = select_negatives(
        ...     nouns, torch.zeros(0, 2), torch.eye(2)[:1], torch.eye(2)[:1], M=1
        ... )
        >>> nouns.tolist()
        [1]
    """
    if M < 1:
        raise InterNegError(f"M={M} negative texts; it has to be at least 1")
    parts = (E_adj, E_noun)
    masks = [admissible(part, T, P, chunk) for part in parts]
    n_adj, n_noun = (int(mask.sum()) for mask in masks)
    if n_adj + n_noun == 0:
        raise NoAdmissibleNegativesError(
            f"none of {len(E_adj) + len(E_noun)} words is farther from every class than the "
            "class's own name; take another vocabulary, other prompts, or more images per class"
        )
    for_adjectives = M * n_adj // (n_adj + n_noun)
    quotas = (for_adjectives, M - for_adjectives)
    if n_adj + n_noun < M:
        warnings.warn(
            f"only {n_adj + n_noun} admissible words for M={M} negative texts; taking all",
            stacklevel=2,
        )
    chosen = []
    for part, mask, quota in zip(parts, masks, quotas, strict=True):
        where = mask.nonzero().flatten()
        order = deviation(part[where], T, P).argsort(descending=True, stable=True)
        chosen.append(where[order[:quota]])
    return chosen[0], chosen[1]


def neglabel_select(
    E_noun: Float[Tensor, "nouns D"],
    E_adj: Float[Tensor, "adjectives D"],
    T: Classes,
    M: int,
    percentile: float = 0.95,
    percentile_mode: Literal["linear", "index"] = "linear",
    chunk: int = 8192,
) -> tuple[Int[Tensor, " a"], Int[Tensor, " b"]]:
    """NegLabel's choice (Jiang et al., ICLR 2024): texts far from the class *texts*.

    Each text is rated by a high percentile of its cosines to the class texts, and the lowest are
    kept, shared out between adjectives and nouns by their numbers.

    Args:
        E_noun: Embeddings of nouns, of length one.
        E_adj: Embeddings of adjectives.
        T: Text embeddings of the classes.
        M: How many to choose.
        percentile: Which percentile, from 0 to 1.
        percentile_mode: ``linear`` interpolates, as NegLabel's code; ``index`` takes the element
            floor(percentile x K) in ascending order, as OpenOOD-VLM and InterNeg's code do for
            K = 1000 classes.
        chunk: Texts compared at a time.

    Returns:
        Indices into `E_adj` and into `E_noun`, each from the farthest on.

    Examples:
        >>> names = torch.eye(3)[:1]
        >>> adjectives, nouns = neglabel_select(torch.eye(3), torch.zeros(0, 3), names, 2)
        >>> nouns.tolist()
        [1, 2]
    """
    if M < 1:
        raise InterNegError(f"M={M} negative texts; it has to be at least 1")
    if percentile_mode not in ("linear", "index"):
        raise InterNegError(f"percentile_mode {percentile_mode!r}; accepted: linear, index")
    if not 0 <= percentile <= 1:
        raise InterNegError(f"percentile={percentile}; it has to lie in [0, 1]")
    _check(("class texts", T), ("nouns", E_noun), ("adjectives", E_adj))
    names = widen(T)

    def rate(part: Tensor) -> Tensor:
        cosines = widen(part) @ names.T
        if percentile_mode == "linear":
            return torch.quantile(cosines, percentile, dim=1)
        index = min(int(percentile * len(names)), len(names) - 1)
        return cosines.kthvalue(index + 1, dim=1).values

    total = len(E_adj) + len(E_noun)
    for_adjectives = min(M, total) * len(E_adj) // max(total, 1)
    chosen = []
    for part, quota in ((E_adj, for_adjectives), (E_noun, min(M, total) - for_adjectives)):
        rating = names.new_zeros(0)
        if len(part):
            rating = torch.cat([rate(piece) for piece in torch.split(part, chunk)])
        chosen.append(rating.argsort(stable=True)[:quota])
    return chosen[0], chosen[1]


def _check(*named: tuple[str, Tensor]) -> None:
    check_same_width(named)
    shapes = dict(named)
    if "proxies" in shapes and shapes["proxies"].shape != shapes["class texts"].shape:
        raise InterNegError(
            f"proxies have shape {list(shapes['proxies'].shape)}, class texts "
            f"{list(shapes['class texts'].shape)}; there is one proxy per class"
        )
