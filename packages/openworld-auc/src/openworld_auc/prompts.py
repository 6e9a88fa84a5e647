"""Learnable prompts in CoOp's form: [start] v_1 .. v_n [class name] . [end].

Zhou et al., Learning to Prompt for Vision-Language Models (IJCV 2022): one context shared by all
classes, the class name at the end.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openworld_auc._parallel import gather, share
from shared_core.data.prompts import fill
from shared_core.errors import InputError

__all__ = ["Fixed", "PromptLearner", "clean_names", "encode_prompts", "fix", "template_features"]


def clean_names(names: Sequence[str], role: str = "class") -> list[str]:
    """Class names with underscores as spaces, refused where blank or repeated.

    Args:
        names: The names.
        role: Which classes they are, for the message.

    Raises:
        InputError: If a name is blank or comes twice.

    Examples:
        >>> clean_names(["sea_lion", "otter"])
        ['sea lion', 'otter']
    """
    cleaned = [" ".join(str(name).replace("_", " ").split()) for name in names]
    seen: dict[str, int] = {}
    for index, name in enumerate(cleaned):
        if not name:
            raise InputError(f"{role} name {index} is empty; every class needs a name")
        if name in seen:
            raise InputError(
                f"{role} names {seen[name]} and {index} are both {name!r} (underscores are "
                "spaces); give each class a name of its own"
            )
        seen[name] = index
    return cleaned


class PromptLearner(nn.Module):
    """A learnable context, and the sequences that it makes with class names.

    Args:
        backbone: A `openworld_auc.backbone.ClipBackbone`.
        n_ctx: Length n of the context.
        init: A phrase whose token embeddings are the context at first, such as ``a photo of a``;
            otherwise the context is drawn from N(0, 0.02²).
        generator: Of that draw, on the CPU.

    Attributes:
        ctx: The context, [n_ctx, W]; the only parameter.

    Raises:
        InputError: If `n_ctx` is below 1 or the phrase has another length.
    """

    def __init__(
        self,
        backbone: Any,
        n_ctx: int,
        *,
        init: str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if n_ctx < 1:
            raise InputError(f"n_ctx is {n_ctx}; a context has at least one vector")
        if init is None:
            ctx = 0.02 * torch.randn(n_ctx, backbone.text_width, generator=generator)
        else:
            ids = backbone.tokenize([init])
            start, end = int(backbone.has_start), int(backbone.end_index(ids)[0])
            ctx = backbone.embed_tokens(ids)[0, start:end].detach().float().clone()
            if len(ctx) != n_ctx:
                raise InputError(
                    f"{init!r} is {len(ctx)} tokens, n_ctx is {n_ctx}; make them agree"
                )
        self.ctx = nn.Parameter(ctx.to(backbone.scale.device))

    def forward(
        self, backbone: Any, names: Sequence[str]
    ) -> tuple[Float[Tensor, "classes length W"], Int[Tensor, " classes"]]:
        """Embedded sequences of all class names, and where each is read.

        Args:
            backbone: The backbone.
            names: Class names.

        Raises:
            InputError: If a sequence is longer than the context length of the backbone.
        """
        fixed = fix(backbone, names, len(self.ctx))
        prefix = self.prefix(fixed)
        embeds = torch.cat([prefix.expand(len(names), -1, -1), fixed.suffix], 1)
        return embeds, fixed.ends + len(prefix)

    def prefix(self, fixed: "Fixed") -> Float[Tensor, "n W"]:
        """What the sequences of all classes begin with: the start token, if any, and the context.

        Args:
            fixed: From `fix`.
        """
        return torch.cat([fixed.start, self.ctx.to(fixed.start.dtype)])


class Fixed(NamedTuple):
    """What no step of training changes in a prompt's sequences.

    Attributes:
        start: Embedding of the start token, [1, W], or [0, W] if there is none.
        suffix: Those of class names and ends, cut where padding begins, [classes, m, W].
        ends: Where in its suffix a sequence is read, [classes].
    """

    start: Tensor
    suffix: Tensor
    ends: Tensor


def fix(backbone: Any, names: Sequence[str], n_ctx: int) -> Fixed:
    """Tokenise and embed class names that follow a context.

    Args:
        backbone: The backbone.
        names: Class names.
        n_ctx: Length of the context.

    Raises:
        InputError: If a sequence is longer than the context length of the backbone.
    """
    ids = backbone.tokenize([f"{name}." for name in names])
    ends = backbone.end_index(ids) + n_ctx
    longest = int(ends.max()) + 1
    if longest > backbone.context_length:
        worst = int(ends.argmax())
        raise InputError(
            f"the prompt of class {names[worst]!r} has {int(ends[worst]) + 1} tokens with n_ctx="
            f"{n_ctx}, the model takes {backbone.context_length}; shorten the name or the context"
        )
    start = int(backbone.has_start)
    with torch.no_grad():
        # Attention looks back only: what comes after the last end token changes nothing.
        embedded = backbone.embed_tokens(ids[:, : longest - n_ctx])
    return Fixed(embedded[0, :start], embedded[:, start:], ends - n_ctx - start)


def encode_prompts(
    backbone: Any,
    prompts: Sequence[tuple[PromptLearner, Sequence[str]]],
    *,
    chunk: int | None = None,
    split: bool = False,
    prefix_cache: bool = False,
    fixed: Sequence[Fixed] | None = None,
    tower: Any = None,
) -> list[Float[Tensor, "classes D"]]:
    """Text features of several prompts in one call, padded to their common length.

    Args:
        backbone: The backbone.
        prompts: Pairs of a prompt and the class names that it is used with.
        chunk: Sequences at a time, with their activations computed anew in the backward pass; for
            a thousand classes and more. By default all at once.
        split: Whether the processes of torch.distributed encode a share each, and gather.
        prefix_cache: Compute what a prompt's sequences begin with once, not for each class.
        fixed: Of each prompt, what `fix` gave for it, so that nothing is tokenised again.
        tower: What has the backbone's ``encode_prompt_embeds`` and ``encode_with_prefix``, compiled
            perhaps; by default the backbone.
    """
    if not prompts:
        return []
    tower = backbone if tower is None else tower
    if fixed is None:
        fixed = [fix(backbone, names, len(learner.ctx)) for learner, names in prompts]
    sizes = [len(f.suffix) for f in fixed]
    total = sum(sizes)
    own = share(total) if split else slice(0, total)
    step = chunk if chunk is not None and chunk < own.stop - own.start else own.stop - own.start
    parts = [slice(s, min(s + step, own.stop)) for s in range(own.start, own.stop, step)]
    prefixes = [learner.prefix(f) for (learner, _), f in zip(prompts, fixed, strict=True)]
    encode = _after_prefixes if prefix_cache else _in_full
    calls = encode(tower, prefixes, fixed, sizes, parts)
    if len(parts) == 1:
        features = [call(*tensors) for call, tensors in calls]
    else:
        features = [checkpoint(call, *tensors, use_reentrant=False) for call, tensors in calls]
    whole = torch.cat(features)
    if split:
        whole = gather(whole, total)
    return list(torch.split(whole, sizes))


Call = tuple[Callable[..., Tensor], Sequence[Tensor]]


def _in_full(
    tower: Any,
    prefixes: Sequence[Tensor],
    fixed: Sequence[Fixed],
    sizes: Sequence[int],
    parts: Sequence[slice],
) -> list[Call]:
    """For each part of all sequences in a row: a function of tensors that gives its features."""
    made = [
        torch.cat([prefix.expand(size, -1, -1), f.suffix], 1)
        for prefix, f, size in zip(prefixes, fixed, sizes, strict=True)
    ]
    embeds = _stack(made)
    ends = torch.cat([f.ends + len(p) for p, f in zip(prefixes, fixed, strict=True)])
    return [(tower.encode_prompt_embeds, (embeds[part], ends[part])) for part in parts]


def _after_prefixes(
    tower: Any,
    prefixes: Sequence[Tensor],
    fixed: Sequence[Fixed],
    sizes: Sequence[int],
    parts: Sequence[slice],
) -> list[Call]:
    """As `_in_full`, with each prompt's prefix once in a part."""
    suffixes, ends = _stack([f.suffix for f in fixed]), torch.cat([f.ends for f in fixed])
    calls: list[Call] = []
    for part in parts:
        # How many of the part's sequences are of each prompt; prompts without any stay out.
        first, counts = 0, []
        for size in sizes:
            counts.append(max(0, min(part.stop, first + size) - max(part.start, first)))
            first += size
        used = [p for p, count in zip(prefixes, counts, strict=True) if count]
        lengths, counts = [len(p) for p in used], [count for count in counts if count]
        call = partial(tower.encode_with_prefix, lengths=lengths, counts=counts)
        calls.append((call, (_stack([p[None] for p in used]), suffixes[part], ends[part])))
    return calls


def _stack(made: Sequence[Tensor]) -> Tensor:
    """Sequences of several lengths [t, m, W], padded to the longest, in a row."""
    longest = max(m.shape[1] for m in made)
    return torch.cat([nn.functional.pad(m, (0, 0, 0, longest - m.shape[1])) for m in made])


@torch.no_grad()
def template_features(
    backbone: Any, names: Sequence[str], template: str = "a photo of a {}."
) -> Float[Tensor, "classes D"]:
    """Text features of a hand-written template, as zero-shot CLIP has them.

    Args:
        backbone: The backbone.
        names: Class names.
        template: A sentence with one ``{}``.

    Raises:
        InputError: If the template does not hold ``{}`` once, or a prompt may have been cut off.
    """
    ids = backbone.tokenize(fill(template, names))
    if backbone.context_length < ids.shape[1]:
        ids = ids[:, : backbone.context_length]
    ends = backbone.end_index(ids)
    full = ends == ids.shape[1] - 1
    if full.any():
        raise InputError(
            f"the prompt of class {names[int(full.nonzero()[0])]!r} fills all {ids.shape[1]} tokens"
            " that the model takes, so it may have been cut; shorten the name or the template"
        )
    embeds = backbone.embed_tokens(ids[:, : int(ends.max()) + 1])
    return cast(Tensor, backbone.encode_prompt_embeds(embeds, ends))
