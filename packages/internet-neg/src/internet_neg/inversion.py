"""Modality inversion: a pseudo word whose text embedding matches an image (section 4.2.2).

For each image one token embedding w is optimized, with everything else frozen, so that templates
filled with w ("a photo of a w.") come near the image. The result is a *text* embedding for an image
that has no name, found by the inter-modal similarity that CLIP was trained for. This is the
optimization-based textual inversion of Baldrati et al. (ICCV 2023), with 10 steps.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from internet_neg._checks import check_embeddings, normalize, widen
from internet_neg.errors import InterNegError
from shared_core.data.prompts import check_template, fill
from shared_core.device import autocast

if TYPE_CHECKING:
    from internet_neg.encoders import DualEncoder

__all__ = ["Inversion", "InversionTemplates", "invert_images"]


class Inversion(NamedTuple):
    """What `invert_images` returns with ``return_info=True``.

    Attributes:
        embeddings: Text embeddings of length one, [b, D].
        tokens: The optimized token embeddings, [b, W].
        losses: Mean of 1 - cosine before each step and after the last, [steps + 1].
    """

    embeddings: Float[Tensor, "b D"]
    tokens: Float[Tensor, "b W"]
    losses: Float[Tensor, " n"]


class InversionTemplates:
    """Templates with a placeholder, tokenized once, cut to the length that the longest needs.

    Args:
        encoder: Whose tokens they become.
        templates: Sentences with one ``{}``.

    Attributes:
        ids: Token ids, [n, L].
        embeddings: Token embeddings, [n, L, W].
        at: Where the placeholder is, [n, L], one True a row.

    Raises:
        InterNegError: If the placeholder is not exactly one token of some template.

    Examples:
        >>> from internet_neg.mini_clip import build_mini_clip
        >>> InversionTemplates(build_mini_clip(), ["a photo of a {}", "{}"]).ids.shape
        torch.Size([2, 7])
    """

    def __init__(self, encoder: "DualEncoder", templates: Sequence[str]) -> None:
        if isinstance(templates, str) or not templates:
            raise InterNegError("give at least one inversion template, such as 'a photo of a {}.'")
        for template in templates:
            check_template(template)
        word, token = encoder.placeholder
        # Spaces on both sides, or a tokenizer may merge the placeholder with a full stop.
        sentences = [fill(t, [f" {word} "])[0] for t in templates]
        ids = encoder.tokenize(sentences)
        self.at = ids == token
        for template, count in zip(templates, self.at.sum(dim=1).tolist(), strict=True):
            if count != 1:
                raise InterNegError(
                    f"the placeholder {word!r} is {count} tokens of the template {template!r}; it "
                    "has to be one: shorten the template or choose another placeholder"
                )
        self.ids = ids[:, : encoder.useful_length(ids)]
        self.at = self.at[:, : self.ids.shape[1]].to(encoder.device)
        self.ids = self.ids.to(encoder.device)
        with torch.no_grad():
            self.embeddings = encoder.token_embedding(self.ids).detach()

    def __len__(self) -> int:
        return len(self.ids)

    def encode(
        self, encoder: "DualEncoder", tokens: Float[Tensor, "b W"], which: Int[Tensor, " b"]
    ) -> Float[Tensor, "b D"]:
        """Text features of length one of the templates `which`, with `tokens` in their place."""
        at = self.at[which][:, :, None]
        filled = torch.where(at, tokens[:, None].to(self.embeddings.dtype), self.embeddings[which])
        return normalize(encoder.encode_text_from_embeddings(filled, self.ids[which]))


def invert_images(
    encoder: "DualEncoder",
    v: Float[Tensor, "b D"],
    *,
    steps: int = 10,
    lr: float = 2e-2,
    weight_decay: float = 1e-2,
    init_std: float = 0.02,
    templates: Sequence[str] | InversionTemplates | None = None,
    final_template: str = "last",
    generator: torch.Generator | None = None,
    init_tokens: Float[Tensor, "b W"] | None = None,
    template_index: Int[Tensor, "s b"] | None = None,
    mean_over: int | None = None,
    dtype: torch.dtype = torch.float32,
    return_info: bool = False,
) -> Float[Tensor, "b D"] | Inversion:
    """Text embeddings that match images, by optimizing one pseudo word for each.

    AdamW on the pseudo words alone; each step draws one template per image. No weight of the
    encoder gets a gradient, and no global random state is read or changed.

    Args:
        encoder: The model's two towers.
        v: Image embeddings.
        steps: Optimizer steps, at least 1.
        lr: Learning rate.
        weight_decay: Of the pseudo words.
        init_std: Standard deviation of their start.
        templates: Sentences with ``{}``; by default the 80 that CLIP used for ImageNet.
        final_template: Under which template the result is read: ``last`` (the last drawn), ``mean``
            (the normalized mean over all), or a template.
        generator: Of the draws, on the CPU; by default a new one with seed 0.
        init_tokens: Starts instead of drawn ones, [b, W].
        template_index: Templates instead of drawn ones, [steps, b].
        mean_over: Number of images the loss is a mean over, if not b: that of the joint batch when
            processes share one.
        dtype: Of mixed precision in the text tower; pseudo words stay float32.
        return_info: Also return the pseudo words and the losses.

    Raises:
        InterNegError: If an argument is out of range or has the wrong shape.

    Examples:
        >>> from internet_neg.mini_clip import build_mini_clip
        >>> encoder = build_mini_clip()
        >>> images = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
        >>> found = invert_images(encoder, images, templates=["a photo of a {}"], return_info=True)
        >>> found.embeddings.shape, bool(found.losses[-1] < found.losses[0])
        (torch.Size([3, 64]), True)
    """
    if steps < 1 or not lr > 0 or weight_decay < 0 or init_std < 0:
        raise InterNegError(
            f"steps={steps}, lr={lr}, weight_decay={weight_decay}, init_std={init_std}; accepted: "
            "at least one step, a positive learning rate, and no negative number"
        )
    check_embeddings("images", v)
    if templates is None:
        templates = imagenet_templates()
    if not isinstance(templates, InversionTemplates):
        templates = InversionTemplates(encoder, templates)
    _check_final(final_template)
    generator = generator or torch.Generator().manual_seed(0)
    b = len(v)
    # Drawn on the CPU, so that all devices see the same numbers.
    tokens = torch.randn(b, encoder.text_width, generator=generator) * init_std
    which = torch.randint(len(templates), (steps, b), generator=generator)
    if init_tokens is not None:
        tokens = _same_shape("init_tokens", init_tokens, tokens).clone()
    if template_index is not None:
        which = _same_shape("template_index", template_index, which)
    with torch.inference_mode(False), torch.enable_grad():
        target = normalize(v).detach().clone().to(encoder.device)
        tokens = widen(tokens).to(encoder.device).clone().requires_grad_()
        which = which.to(encoder.device)
        optimizer = torch.optim.AdamW([tokens], lr=lr, weight_decay=weight_decay)
        losses = []
        for step in range(steps):
            with autocast(encoder.device, dtype):
                features = templates.encode(encoder, tokens, which[step])
            loss = (1 - (features * target).sum(dim=-1)).sum() / (mean_over or max(b, 1))
            # Only the pseudo words are asked for, so no weight gets a gradient.
            [tokens.grad] = torch.autograd.grad(loss, [tokens])
            optimizer.step()
            losses.append(loss.detach())
    with torch.no_grad(), autocast(encoder.device, dtype):
        tokens = tokens.detach()
        embeddings = _read(encoder, templates, tokens, final_template, which[-1])
        losses.append((1 - (embeddings * target).sum(dim=-1)).sum() / (mean_over or max(b, 1)))
    if return_info:
        return Inversion(embeddings, tokens, torch.stack(losses))
    return embeddings


def imagenet_templates() -> list[str]:
    """The 80 templates that CLIP was evaluated with on ImageNet, from open_clip.

    Examples:
        >>> templates = imagenet_templates()
        >>> len(templates), templates[0]
        (80, 'a bad photo of a {}.')
    """
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]


def _read(
    encoder: "DualEncoder",
    templates: InversionTemplates,
    tokens: Tensor,
    final_template: str,
    last: Tensor,
) -> Tensor:
    if final_template == "last":
        return templates.encode(encoder, tokens, last)
    if final_template != "mean":
        templates = InversionTemplates(encoder, [final_template])
    every = [
        templates.encode(encoder, tokens, torch.full_like(last, index))
        for index in range(len(templates))
    ]
    return normalize(torch.stack(every).mean(dim=0))


def _check_final(final_template: str) -> None:
    if final_template not in ("last", "mean") and final_template.count("{}") != 1:
        raise InterNegError(
            f"final_template={final_template!r}; accepted: last, mean, or a template with one {{}}"
        )


def _same_shape(name: str, given: Tensor, drawn: Tensor) -> Tensor:
    if given.shape != drawn.shape:
        raise InterNegError(f"{name} has shape {list(given.shape)}, not {list(drawn.shape)}")
    return given
