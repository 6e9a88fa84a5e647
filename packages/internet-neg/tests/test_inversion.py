"""Inversion: its gradient in float64, what it leaves alone, what it finds, and its draws."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from internet_neg import InterNegError, OpenClipEncoder, invert_images
from internet_neg.inversion import InversionTemplates, imagenet_templates
from internet_neg.mini_clip import build_mini_clip
from shared_core.contrastive import WordTokenizer

Unit = Callable[..., Tensor]
TEMPLATES = ["a photo of a {}", "the nice {}", "{}"]


def test_the_gradient_against_finite_differences(make_open_clip: Callable[..., Any]) -> None:
    encoder = make_open_clip()
    encoder.model.double()
    templates = InversionTemplates(encoder, ["a photo of a {}", "{}"])
    v = F.normalize(torch.randn(2, 24, generator=torch.Generator().manual_seed(0)).double(), dim=-1)
    w = 0.3 * torch.randn(2, 16, generator=torch.Generator().manual_seed(1)).double()

    def loss(tokens: Tensor) -> Tensor:
        features = templates.encode(encoder, tokens, torch.tensor([0, 1]))
        return (1 - (features * v).sum(-1)).mean()

    w.requires_grad_()
    [gradient] = torch.autograd.grad(loss(w), [w])
    for i in range(2):
        for j in range(0, 16, 3):
            step = torch.zeros_like(w)
            step[i, j] = 1e-5
            with torch.no_grad():
                slope = (loss(w + step) - loss(w - step)) / 2e-5
            assert gradient[i, j].item() == pytest.approx(slope.item(), rel=1e-5, abs=1e-9)


def restated(
    encoder: OpenClipEncoder, v: Tensor, w: Tensor, which: Tensor, lr: float, decay: float
) -> Tensor:
    """The published loop: the whole context, AdamW written out."""
    sentences = [t.format(" $ ") for t in TEMPLATES]
    ids = encoder.tokenize(sentences)
    _, token = encoder.placeholder
    model = encoder.model
    m, s = torch.zeros_like(w), torch.zeros_like(w)
    for step, chosen in enumerate(which, start=1):
        w = w.detach().requires_grad_()
        rows = ids[chosen]
        x = model.token_embedding(rows).clone()
        x[rows == token] = w
        x = model.transformer(x + model.positional_embedding, attn_mask=model.attn_mask)
        x = model.ln_final(x)[torch.arange(len(rows)), rows.argmax(1)] @ model.text_projection
        loss = (1 - F.cosine_similarity(x, v)).mean()
        [g] = torch.autograd.grad(loss, [w])
        m, s = 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g**2
        update = (m / (1 - 0.9**step)) / ((s / (1 - 0.999**step)).sqrt() + 1e-8)
        w = w.detach() * (1 - lr * decay) - lr * update
    return w


@pytest.mark.smoke
def test_it_is_the_published_loop(mini: OpenClipEncoder, unit: Unit) -> None:
    v = unit(5, 64)
    generator = torch.Generator().manual_seed(3)
    w = 0.02 * torch.randn(5, 64, generator=generator)
    which = torch.randint(3, (4, 5), generator=generator)
    found = invert_images(
        mini,
        v,
        steps=4,
        lr=0.05,
        weight_decay=0.1,
        templates=TEMPLATES,
        init_tokens=w,
        template_index=which,
        return_info=True,
    )
    expected = restated(mini, v, w, which, 0.05, 0.1)
    assert torch.allclose(found.tokens, expected, atol=2e-4)
    # The kept feature is that of the optimized word under the last template.
    templates = InversionTemplates(mini, TEMPLATES)
    again = templates.encode(mini, found.tokens, which[-1])
    assert torch.allclose(found.embeddings, again, atol=1e-6)
    assert torch.allclose(found.embeddings.norm(dim=1), torch.ones(5))
    assert found.losses[-1] < found.losses[0]


def test_weights_and_global_random_states_are_left_alone(mini: OpenClipEncoder, unit: Unit) -> None:
    before = mini.fingerprint()
    state = torch.get_rng_state()
    first = invert_images(mini, unit(3, 64), templates=TEMPLATES, steps=2)
    with torch.inference_mode():
        second = invert_images(mini, unit(3, 64), templates=TEMPLATES, steps=2)
    assert torch.equal(first, second)
    assert all(p.grad is None and p.requires_grad for p in mini.model.parameters())
    assert mini.fingerprint() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_words_own_image_stays(mini: OpenClipEncoder) -> None:
    target = mini.encode_text(["star"])
    ids = mini.tokenize(["star"])[0]
    own = mini.token_embedding(ids[1:2][None])[0].detach()
    found = invert_images(
        mini,
        target,
        steps=1,
        lr=1e-9,
        weight_decay=0.0,
        templates=["{}"],
        init_tokens=own,
        return_info=True,
    )
    assert found.losses.abs().max() < 1e-6
    assert torch.allclose(found.tokens, own, atol=1e-6)


def test_the_order_of_images_only_permutes(mini: OpenClipEncoder, unit: Unit) -> None:
    v, w = unit(4, 64), 0.02 * unit(4, 64, seed=1)
    which = torch.tensor([[0, 1, 2, 0], [1, 1, 0, 2]])
    order = torch.tensor([2, 0, 3, 1])
    options = {"steps": 2, "templates": TEMPLATES}
    one = invert_images(mini, v, init_tokens=w, template_index=which, **options)
    two = invert_images(
        mini, v[order], init_tokens=w[order], template_index=which[:, order], **options
    )
    assert torch.allclose(one[order], two, atol=1e-5)
    alone = invert_images(
        mini, v[:1], init_tokens=w[:1], template_index=which[:, :1], mean_over=4, **options
    )
    assert torch.allclose(alone, one[:1], atol=1e-5)


def test_final_templates(mini: OpenClipEncoder, unit: Unit) -> None:
    options: dict[str, Any] = {"steps": 2, "templates": TEMPLATES, "return_info": True}
    mean = invert_images(mini, unit(3, 64), final_template="mean", **options)
    templates = InversionTemplates(mini, TEMPLATES)
    each = [
        templates.encode(mini, mean.tokens, torch.full((3,), i, dtype=torch.long)) for i in range(3)
    ]
    assert torch.allclose(mean.embeddings, F.normalize(sum(each), dim=-1), atol=1e-6)
    own = invert_images(mini, unit(3, 64), final_template="the nice {}", **options)
    assert torch.allclose(own.embeddings, each[1], atol=1e-6)


def test_bfloat16_is_near(mini: OpenClipEncoder, unit: Unit) -> None:
    options: dict[str, Any] = {"steps": 3, "templates": TEMPLATES}
    full = invert_images(mini, unit(3, 64), **options)
    half = invert_images(mini, unit(3, 64), dtype=torch.bfloat16, **options)
    assert half.dtype == torch.float32
    assert F.cosine_similarity(full, half).min() > 0.99


def test_the_80_templates_are_cut_to_the_longest(unit: Unit) -> None:
    words = {w.strip(".,!").lower() for t in imagenet_templates() for w in t.split()} - {"{}"}
    tokenizer = WordTokenizer.from_texts([*words, "a"], context_length=77)
    from open_clip.model import CLIP

    text = {"context_length": 77, "vocab_size": tokenizer.vocab_size, "width": 16, "heads": 2}
    vision = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
    model = CLIP(8, vision, {**text, "layers": 1})
    templates = InversionTemplates(OpenClipEncoder(model, tokenizer, id), imagenet_templates())
    assert templates.ids.shape[0] == 80
    assert templates.ids.shape[1] <= 12


@pytest.mark.usefixtures("without_type_checks")
def test_errors(mini: OpenClipEncoder, unit: Unit) -> None:
    v = unit(2, 64)
    for options, message in (
        ({"steps": 0}, "at least one step"),
        ({"lr": 0.0}, "positive learning rate"),
        ({"templates": ["a photo"]}, "exactly once"),
        ({"templates": []}, "at least one inversion template"),
        ({"templates": ["$ and {}"]}, "is 2 tokens of the template"),
        ({"templates": ["photo " * 20 + "{}"]}, "is 0 tokens of the template"),
        ({"templates": TEMPLATES, "final_template": "first"}, "accepted: last, mean"),
        ({"templates": TEMPLATES, "init_tokens": torch.zeros(3, 64)}, "init_tokens has shape"),
        (
            {"templates": TEMPLATES, "template_index": torch.zeros(3, 2, dtype=torch.long)},
            "template_index has shape",
        ),
    ):
        with pytest.raises((InterNegError, ValueError), match=message):
            invert_images(mini, v, **options)  # type: ignore[arg-type]
    with pytest.raises(InterNegError, match="NaN or infinity, first in row 1"):
        invert_images(mini, torch.cat([v[:1], v[:1] / 0]), templates=TEMPLATES)


@pytest.mark.cuda
def test_on_a_gpu_it_is_the_same_and_bfloat16_is_near(unit: Unit) -> None:
    encoder = build_mini_clip(seed=1)
    v = unit(6, encoder.dim)
    options: dict[str, Any] = {
        "steps": 3,
        "templates": TEMPLATES,
        "init_tokens": 0.02 * unit(6, encoder.text_width, seed=1),
        "template_index": torch.arange(18).reshape(3, 6) % 3,
    }
    expected = invert_images(encoder, v, **options)
    encoder.model.cuda()
    found = invert_images(encoder, v.cuda(), **options)
    assert found.device.type == "cuda"
    assert torch.allclose(found.cpu(), expected, atol=1e-4)
    half = invert_images(encoder, v.cuda(), dtype=torch.bfloat16, **options)
    assert half.dtype == torch.float32
    assert F.cosine_similarity(half, found).min() > 0.99
