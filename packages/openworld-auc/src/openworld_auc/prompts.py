"""Learnable prompts in CoOp's form: [start] v_1 .. v_n [class name] . [end].

Zhou et al., Learning to Prompt for Vision-Language Models (IJCV 2022): one context shared by all
classes, the class name at the end.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openworld_auc._parallel import gather, share
from shared_core.data.prompts import fill
from shared_core.errors import InputError

__all__ = ["PromptLearner", "clean_names", "encode_prompts", "template_features"]


def clean_names(names: Sequence[str], role: str = "class") -> list[str]:
    """Class names with underscores as spaces, refused where blank or repeated.

    Args:
        names: The names.
        role: Which classes they are, for the message.

    Raises:
        InputError: If a name is blank or comes twice.

    Example:
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
        prefix, suffix, read_at = _constants(backbone, tuple(names), len(self.ctx))
        ctx = self.ctx.to(suffix.dtype).expand(len(names), -1, -1)
        return torch.cat([prefix, ctx, suffix], 1), read_at


def _constants(backbone: Any, names: tuple[str, ...], n_ctx: int) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings before and after the context, cut where padding begins, and reading positions."""
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
    return embedded[:, :start], embedded[:, start:], ends


def encode_prompts(
    backbone: Any,
    prompts: Sequence[tuple[PromptLearner, Sequence[str]]],
    *,
    chunk: int | None = None,
    split: bool = False,
) -> list[Float[Tensor, "classes D"]]:
    """Text features of several prompts in one call, padded to their common length.

    Args:
        backbone: The backbone.
        prompts: Pairs of a prompt and the class names that it is used with.
        chunk: Sequences at a time, with their activations computed anew in the backward pass; for
            a thousand classes and more. By default all at once.
        split: Whether the processes of torch.distributed encode a share each, and gather.
    """
    if not prompts:
        return []
    made = [learner(backbone, names) for learner, names in prompts]
    length = max(embeds.shape[1] for embeds, _ in made)
    padded = [nn.functional.pad(e, (0, 0, 0, length - e.shape[1])) for e, _ in made]
    embeds, ends = torch.cat(padded), torch.cat([read_at for _, read_at in made])
    total = len(embeds)
    if split:
        own = share(total)
        embeds, ends = embeds[own], ends[own]
    if chunk is None or chunk >= len(embeds):
        features = backbone.encode_prompt_embeds(embeds, ends)
    else:
        encode = cast(Callable[..., Tensor], backbone.encode_prompt_embeds)
        features = torch.cat(
            [
                checkpoint(encode, e, r, use_reentrant=False)
                for e, r in zip(torch.split(embeds, chunk), torch.split(ends, chunk), strict=True)
            ]
        )
    if split:
        features = gather(features, total)
    return list(torch.split(features, [len(names) for _, names in prompts]))


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
