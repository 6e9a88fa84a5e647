import copy
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from focal_sam.adaptformer import AdaptFormer, CLIPAdaptFormer, bottleneck_size, clip_adaptformer
from focal_sam.methods import FocalSAM
from shared_core.errors import InputError, MissingExtraError
from shared_core.run import load_state, save_state

NAMES = ["sea_eel", "newt", "toad", "common frog"]
PROMPTS = [f"a photo of a {name}." for name in ("sea eel", "newt", "toad", "common frog")]
WIDTH, BLOCKS, SHARED, SIDE = 16, 3, 12, 8


@pytest.fixture
def without_type_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let wrong arguments reach our own checks, as they do outside the tests."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@dataclass
class Clip:
    """A tiny CLIP with random weights, and what the tests need to know of its library."""

    model: nn.Module
    tokenizer: Callable[..., Any]
    encode_image: Callable[[nn.Module, Tensor], Tensor]
    encode_text: Callable[[nn.Module, list[str]], Tensor]
    projection: Callable[[nn.Module], Tensor]
    forward: Callable[[nn.Module, Tensor, list[nn.Module]], Tensor]


def open_clip_sizes() -> dict[str, Any]:
    vision = {
        "layers": BLOCKS,
        "width": WIDTH,
        "head_width": 8,
        "mlp_ratio": 2.0,
        "patch_size": 4,
        "image_size": SIDE,
    }
    text = {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1}
    return {"embed_dim": SHARED, "vision_cfg": vision, "text_cfg": text}


def open_clip_forward(model: nn.Module, images: Tensor, adapters: list[nn.Module]) -> Tensor:
    """The feature before the projection, written out."""
    v = model.visual
    x = v.conv1(images).flatten(2).transpose(1, 2)
    x = torch.cat([v.class_embedding.expand(len(x), 1, -1), x], dim=1) + v.positional_embedding
    x = v.ln_pre(x)
    for block, adapter in zip(v.transformer.resblocks, adapters, strict=True):
        y = block.ln_1(x)
        x = x + block.attn(y, y, y, need_weights=False)[0]
        y = block.mlp[2](block.mlp[1](block.mlp[0](block.ln_2(x))))
        x = x + y + adapted(adapter, x)
    return v.ln_post(x[:, 0])


def transformers_forward(model: nn.Module, images: Tensor, adapters: list[nn.Module]) -> Tensor:
    """The feature before the projection, written out."""
    v = model.vision_model
    x = v.pre_layrnorm(v.embeddings(images))
    for layer, adapter in zip(v.encoder.layers, adapters, strict=True):
        x = x + layer.self_attn(layer.layer_norm1(x), None)[0]
        y = layer.mlp.fc2(layer.mlp.activation_fn(layer.mlp.fc1(layer.layer_norm2(x))))
        x = x + y + adapted(adapter, x)
    return v.post_layernorm(x[:, 0])


def adapted(adapter: nn.Module, x: Tensor) -> Tensor:
    """``s * Up(ReLU(Down(LN(x))))`` from the adapter's parameters."""
    p = dict(adapter.named_parameters())
    centred = x - x.mean(-1, keepdim=True)
    x = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    x = x * p["norm.weight"] + p["norm.bias"]
    x = (x @ p["down.weight"].T + p["down.bias"]).clamp_min(0)
    return p["scale"] * (x @ p["up.weight"].T + p["up.bias"])


def make_open_clip() -> Clip:
    import open_clip

    tokenizer = open_clip.SimpleTokenizer(context_length=16)
    return Clip(
        model=open_clip.CLIP(**open_clip_sizes()),
        tokenizer=tokenizer,
        encode_image=lambda model, images: model.encode_image(images),
        encode_text=lambda model, prompts: model.encode_text(tokenizer(prompts)),
        projection=lambda model: model.visual.proj,
        forward=open_clip_forward,
    )


def make_transformers() -> Clip:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    words = sorted({word for prompt in PROMPTS for word in prompt.replace(".", "").split()})
    vocabulary = {
        word: i for i, word in enumerate(["<pad>", "<unk>", ".", *words, "<bos>", "<eos>"])
    }
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(word, vocabulary[word]) for word in ("<bos>", "<eos>")]
    backend.post_processor = processors.TemplateProcessing("<bos> $A <eos>", special_tokens=ends)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    sizes = {"intermediate_size": 32, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={
            **sizes,
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "vocab_size": len(vocabulary),
            "max_position_embeddings": 12,
            "bos_token_id": vocabulary["<bos>"],
            "eos_token_id": vocabulary["<eos>"],
            "pad_token_id": 0,
        },
        vision_config={
            **sizes,
            "hidden_size": WIDTH,
            "num_hidden_layers": BLOCKS,
            "image_size": SIDE,
            "patch_size": 4,
        },
        projection_dim=SHARED,
    )

    def encode_text(model: nn.Module, prompts: list[str]) -> Tensor:
        # one prompt at a time, so without padding
        tokens = [torch.tensor([tokenizer(prompt).input_ids]) for prompt in prompts]
        pooled = [model.text_model(input_ids=ids).pooler_output for ids in tokens]
        return model.text_projection(torch.cat(pooled))

    return Clip(
        model=CLIPModel(config),
        tokenizer=tokenizer,
        encode_image=lambda model, images: model.visual_projection(
            model.vision_model(images).pooler_output
        ),
        encode_text=encode_text,
        projection=lambda model: model.visual_projection.weight.T,
        forward=transformers_forward,
    )


MAKERS = {"open_clip": make_open_clip, "transformers": make_transformers}


@pytest.fixture(params=MAKERS)
def clip(request: pytest.FixtureRequest) -> Clip:
    """In float64, with weights large enough that features differ."""
    torch.manual_seed(0)
    made = MAKERS[request.param]()
    made.model.double().eval()
    with torch.no_grad():
        for parameter in made.model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return made


@pytest.fixture
def images() -> Tensor:
    return torch.randn(5, 3, SIDE, SIDE, dtype=torch.float64, generator=generator(1))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shake(model: CLIPAdaptFormer) -> None:
    """Give adapters and head weights that are far from their start."""
    with torch.no_grad():
        for parameter in (*model.adapters.parameters(), *model.head.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator(parameter.numel())))


# The adapter


@pytest.mark.smoke
def test_bottleneck_sizes() -> None:
    assert [bottleneck_size(classes) for classes in (10, 100, 1000, 8142)] == [1, 4, 32, 256]
    assert bottleneck_size(1) == 1
    assert bottleneck_size(100, num_blocks=24) == 2


def test_bottleneck_size_is_the_formula() -> None:
    for blocks in (1, 3, 12, 24):
        for classes in range(1, 3000):
            exponent = max(0, math.floor(math.log2(classes / (2 * blocks))))
            assert bottleneck_size(classes, blocks) == 2**exponent


@pytest.mark.smoke
def test_adapter_formula() -> None:
    torch.manual_seed(0)
    adapter = AdaptFormer(6, bottleneck=3).double()
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    assert not adapter(x).any()
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    torch.testing.assert_close(adapter(x), adapted(adapter, x), rtol=1e-10, atol=1e-10)


def test_adapter_starts_at_zero_with_unit_scale() -> None:
    torch.manual_seed(0)
    adapter = AdaptFormer(64, bottleneck=50)
    assert adapter.scale.tolist() == [1.0]
    for zero in (adapter.up.weight, adapter.up.bias, adapter.down.bias):
        assert not zero.any()
    down = adapter.down.weight.detach()
    # uniform in +-1/8, the Kaiming bound for a leaky slope of sqrt(5)
    assert 0.99 / 8 < float(down.abs().max()) <= 1 / 8
    assert float(down.std()) == pytest.approx(1 / 8 / math.sqrt(3), rel=0.05)


# The model


def test_first_logits_are_the_scaled_cosines(clip: Clip, images: Tensor) -> None:
    original = copy.deepcopy(clip.model)
    model = clip_adaptformer(clip.model, NAMES, tokenizer=clip.tokenizer)
    with torch.no_grad():
        text = F.normalize(clip.encode_text(original, PROMPTS), dim=-1)
        assert float(text.std(dim=0).mean()) > 1e-3  # the prompts are told apart
        weights = torch.stack([clip.projection(original) @ t for t in text])
        weights = weights / weights.norm(dim=1, keepdim=True)
        no_adapters = [AdaptFormer(WIDTH, 1).double() for _ in range(BLOCKS)]
        f = clip.forward(original, images, no_adapters)
        expected = 25 * (f @ weights.T) / f.norm(dim=1, keepdim=True)
        logits = model(images)
        features = model.features(images)
        embeddings = clip.encode_image(original, images)
    assert logits.shape == (5, 4)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.head.weight.detach(), weights, rtol=1e-10, atol=1e-10)
    # and the feature is the one that CLIP projects
    projected = features @ clip.projection(original).detach()
    torch.testing.assert_close(projected, embeddings, rtol=1e-10, atol=1e-10)


def test_adapters_are_parallel_to_every_mlp(clip: Clip, images: Tensor) -> None:
    original = copy.deepcopy(clip.model)
    model = clip_adaptformer(clip.model, NAMES, tokenizer=clip.tokenizer, bottleneck=2)
    before = model.features(images)
    shake(model)
    expected = clip.forward(original, images, list(model.adapters))
    assert len(model.adapters) == BLOCKS
    torch.testing.assert_close(model.features(images), expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(expected, before, rtol=0.1)


def test_only_adapters_and_head_are_trained(clip: Clip, images: Tensor) -> None:
    model = clip_adaptformer(clip.model, NAMES, tokenizer=clip.tokenizer)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(model.trainable_state_dict())
    assert trained == {"head.weight"} | {
        f"adapters.{i}.{name}"
        for i in range(BLOCKS)
        for name in (
            "norm.weight", "norm.bias", "down.weight", "down.bias", "up.weight", "up.bias", "scale",
        )
    }  # fmt: skip
    shake(model)
    model(images).logsumexp(1).sum().backward()
    for name, parameter in model.named_parameters():
        has_gradient = parameter.grad is not None and bool(parameter.grad.any())
        assert has_gradient == (name in trained), name


def test_training_leaves_the_tower_alone(clip: Clip, images: Tensor) -> None:
    model = clip_adaptformer(clip.model, NAMES, tokenizer=clip.tokenizer, bottleneck=4)
    target = torch.tensor([0, 1, 2, 3, 0])
    frozen = {k: v.clone() for k, v in model.state_dict().items() if k.startswith("tower.")}
    method = FocalSAM(model, [50, 20, 10, 5], rho=0.05, gamma=1.5, lam=0.7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    loss = nn.CrossEntropyLoss(reduction="none")
    losses = []
    for _ in range(12):
        losses.append(method.backward(lambda: loss(model(images), target), target).loss)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(model.state_dict()[k], v) for k, v in frozen.items())
    assert all(bool(adapter.up.weight.any()) for adapter in model.adapters)


def test_tower_stays_in_evaluation_mode(clip: Clip) -> None:
    model = clip_adaptformer(clip.model, NAMES, tokenizer=clip.tokenizer)
    assert model.training
    for mode in (True, False, True):
        assert model.train(mode) is model
        assert not any(module.training for module in model.tower.modules())
        own = [model, model.head, *model.adapters.modules()]
        assert all(module.training == mode for module in own)


def test_the_library_model_keeps_working(clip: Clip, images: Tensor) -> None:
    original = copy.deepcopy(clip.model)
    model = clip_adaptformer(clip.model, NAMES, tokenizer=clip.tokenizer)
    assert clip.model.state_dict().keys() == original.state_dict().keys()
    before = clip.encode_image(original, images)
    torch.testing.assert_close(clip.encode_image(clip.model, images), before)
    shake(model)
    adapted_embedding = model.features(images) @ clip.projection(clip.model)
    torch.testing.assert_close(clip.encode_image(clip.model, images), adapted_embedding)


def test_copies_have_adapters_of_their_own(clip: Clip, images: Tensor) -> None:
    model = clip_adaptformer(clip.model, NAMES, tokenizer=clip.tokenizer)
    before = model(images)
    copied = copy.deepcopy(model)
    shake(copied)
    assert torch.equal(model(images), before)
    own = copied(images)
    assert not torch.allclose(own, before)
    shake(model)
    torch.testing.assert_close(model(images), own)


def test_saved_adapters_load_into_another_model(clip: Clip, images: Tensor, tmp_path: Path) -> None:
    other = clip_adaptformer(copy.deepcopy(clip.model), NAMES, tokenizer=clip.tokenizer)
    model = clip_adaptformer(clip.model, NAMES, tokenizer=clip.tokenizer)
    shake(model)
    path = tmp_path / "adapters.safetensors"
    save_state(path, model.trainable_state_dict())
    assert path.stat().st_size < 10_000
    assert not torch.allclose(other(images), model(images))
    other.load_trainable_state_dict(load_state(path))
    assert torch.equal(other(images), model(images))
    assert other.head.weight.requires_grad


def test_head_and_bottleneck_options(clip: Clip, images: Tensor) -> None:
    names = [f"kind {i}" for i in range(50)]
    clone = copy.deepcopy(clip.model)
    default = clip_adaptformer(clip.model, names, tokenizer=clip.tokenizer)
    assert default.adapters[0].down.out_features == 8  # 50 / (2 * 3 blocks) = 8.3
    assert default.class_names == names
    model = clip_adaptformer(clone, names, tokenizer=clip.tokenizer, bottleneck=5, scale=2.0)
    assert [adapter.down.out_features for adapter in model.adapters] == [5] * BLOCKS
    torch.testing.assert_close(model(images) * 12.5, default(images))


def test_prompts(clip: Clip) -> None:
    seen: list[str] = []

    def tokenizer(prompts: list[str], **options: Any) -> Any:
        seen.extend(prompts)
        return clip.tokenizer(prompts, **options)

    clone, again = copy.deepcopy(clip.model), copy.deepcopy(clip.model)
    clip_adaptformer(clip.model, NAMES, tokenizer=tokenizer)
    assert seen == PROMPTS
    seen.clear()
    many = ["toad"] * 300 + ["newt"]
    model = clip_adaptformer(clone, many, tokenizer=tokenizer, template="one {} here")
    assert seen == ["one toad here"] * 300 + ["one newt here"]
    few = clip_adaptformer(again, ["toad", "newt"], tokenizer=tokenizer, template="one {} here")
    expected = few.head.weight[[0] * 300 + [1]]
    torch.testing.assert_close(model.head.weight, expected)


def test_long_prompts_are_cut(clip: Clip) -> None:
    model = clip_adaptformer(clip.model, ["toad " * 40, "newt"], tokenizer=clip.tokenizer)
    assert model.head.weight.isfinite().all()


@pytest.mark.parametrize("library", MAKERS)
def test_half_precision_tower_trains_float32_adapters(library: str) -> None:
    torch.manual_seed(0)
    made = MAKERS[library]()
    model = clip_adaptformer(made.model.bfloat16(), NAMES, tokenizer=made.tokenizer)
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    assert dtypes == {torch.float32}
    shake(model)
    logits = model(torch.randn(2, 3, SIDE, SIDE).bfloat16())
    assert logits.dtype == torch.float32
    logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("library", MAKERS)
def test_autocast(library: str) -> None:
    torch.manual_seed(0)
    made = MAKERS[library]()
    model = clip_adaptformer(made.model, NAMES, tokenizer=made.tokenizer)
    images = torch.randn(2, 3, SIDE, SIDE)
    exact = model(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(images)
    torch.testing.assert_close(logits.float(), exact, rtol=0, atol=0.05 * 25)


# Loading by name


@pytest.fixture
def registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Weights for an open_clip model that is known by the name ``tiny``."""
    import open_clip
    from open_clip import factory

    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", list(factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))
    (tmp_path / "tiny.json").write_text(json.dumps(open_clip_sizes()))
    open_clip.add_model_config(tmp_path / "tiny.json")
    torch.manual_seed(3)
    weights = tmp_path / "weights.safetensors"
    save_file(open_clip.CLIP(**open_clip_sizes()).state_dict(), weights)
    return weights


def test_open_clip_by_name(registered: Path) -> None:
    import open_clip

    model = clip_adaptformer("tiny", NAMES, pretrained=str(registered))
    loaded = open_clip.create_model("tiny", pretrained=str(registered)).eval()
    images = torch.randn(2, 3, SIDE, SIDE)
    torch.testing.assert_close(
        model.features(images) @ loaded.visual.proj, loaded.encode_image(images)
    )
    text = F.normalize(loaded.encode_text(open_clip.get_tokenizer("tiny")(PROMPTS)), dim=-1)
    expected = F.normalize(text @ loaded.visual.proj.T, dim=-1)
    torch.testing.assert_close(model.head.weight, expected)


@pytest.mark.parametrize(("tag", "quick"), [("openai", True), ("laion2b_s34b_b88k", False)])
def test_open_clip_gets_the_activation_of_its_weights(
    monkeypatch: pytest.MonkeyPatch, tag: str, quick: bool
) -> None:
    import open_clip

    calls = []

    def create(name: str, **options: Any) -> nn.Module:
        calls.append((name, options))
        return open_clip.CLIP(**open_clip_sizes())

    monkeypatch.setattr(open_clip, "create_model", create)
    clip_adaptformer(
        "ViT-B/16", NAMES, pretrained=tag, tokenizer=lambda p: torch.ones(len(p), 16).long()
    )
    assert calls == [("ViT-B/16", {"pretrained": tag, "force_quick_gelu": quick})]


def test_transformers_by_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = make_transformers()
    made.model.save_pretrained(tmp_path)
    made.tokenizer.save_pretrained(tmp_path)
    images = torch.randn(2, 3, SIDE, SIDE)
    expected = clip_adaptformer(made.model, NAMES, tokenizer=made.tokenizer)(images)
    torch.testing.assert_close(clip_adaptformer(str(tmp_path), NAMES)(images), expected)


# Errors


class _Stub(nn.Module):
    """Something that is no CLIP."""


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("model", "names", "options", "message"),
    [
        (_Stub(), [], {}, r"class_names is \[\]"),
        (_Stub(), "toad", {}, "class_names is 'toad'"),
        (_Stub(), NAMES, {"template": "a photo"}, "template is 'a photo'; it needs {}"),
        (_Stub(), NAMES, {}, "a loaded model needs its tokenizer"),
        (_Stub(), NAMES, {"tokenizer": len, "pretrained": "openai"}, "pretrained='openai' goes"),
        (_Stub(), NAMES, {"tokenizer": len}, "_Stub is not a CLIP that is known"),
        ("ViT-B-16", NAMES, {}, "an open_clip name needs pretrained="),
        ("no-such-name", NAMES, {"pretrained": "openai"}, "cannot load the CLIP model 'no-such"),
        ("/nowhere/at/all", NAMES, {}, "cannot load the CLIP model '/nowhere/at/all'"),
    ],
)
def test_bad_arguments(model: Any, names: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        clip_adaptformer(model, names, **options)


def test_resnet_tower_is_refused() -> None:
    import open_clip

    sizes = open_clip_sizes()
    sizes["vision_cfg"] |= {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}
    with pytest.raises(InputError, match="the vision tower is a ModifiedResNet"):
        clip_adaptformer(open_clip.CLIP(**sizes), NAMES, tokenizer=len)


def test_a_second_set_of_adapters_is_refused(clip: Clip) -> None:
    clip_adaptformer(clip.model, NAMES, tokenizer=clip.tokenizer)
    with pytest.raises(InputError, match="has adapters already"):
        clip_adaptformer(clip.model, NAMES, tokenizer=clip.tokenizer)


def test_widths_below_one(clip: Clip) -> None:
    with pytest.raises(InputError, match="bottleneck=0"):
        clip_adaptformer(clip.model, NAMES, tokenizer=clip.tokenizer, bottleneck=0)
    with pytest.raises(InputError, match="num_classes=0"):
        bottleneck_size(0)
    with pytest.raises(InputError, match="num_blocks=0"):
        bottleneck_size(10, 0)


def test_an_mlp_called_alone(clip: Clip) -> None:
    model = clip_adaptformer(clip.model, NAMES, tokenizer=clip.tokenizer)
    mlp = next(m for name, m in model.tower.named_modules() if name.endswith(".mlp"))
    with pytest.raises(RuntimeError, match=r"call .* whole blocks"):
        mlp(torch.zeros(1, 5, WIDTH, dtype=torch.float64))


def test_states_of_other_models(clip: Clip) -> None:
    model = clip_adaptformer(clip.model, NAMES, tokenizer=clip.tokenizer)
    state = model.trainable_state_dict()
    missing = {k: v for k, v in state.items() if k != "head.weight"}
    with pytest.raises(InputError, match=r"head.weight is missing \(1 such"):
        model.load_trainable_state_dict(missing)
    with pytest.raises(InputError, match=r"tower\.x is unknown"):
        model.load_trainable_state_dict({**state, "tower.x": torch.ones(1)})
    other = {k: torch.ones_like(v) for k, v in state.items()} | {"head.weight": torch.ones(2, 2)}
    with pytest.raises(InputError, match=r"head.weight has the shape \(2, 2\) .* \(4, 16\)"):
        model.load_trainable_state_dict(other)
    assert not model.adapters[0].up.weight.any()  # nothing was loaded


@pytest.mark.parametrize(
    ("module", "name", "options"),
    [
        ("open_clip", "ViT-B-16", {"pretrained": "openai"}),
        ("transformers", "openai/clip-vit-base-patch16", {}),
    ],
)
def test_library_missing(
    monkeypatch: pytest.MonkeyPatch, module: str, name: str, options: dict[str, Any]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"focal-sam\[clip\]"):
        clip_adaptformer(name, NAMES, **options)
