"""Training on a GPU: nothing waits, memory, mixed precision, and compiled text towers."""

import pytest
import torch
import torch.nn.functional as F

from openworld_auc import GMoP, GMoPConfig, GMoPTrainer
from openworld_auc.backbone import OpenClipBackbone
from openworld_auc.train import TrainConfig
from shared_core.contrastive import WordTokenizer
from shared_core.device import peak_memory

pytestmark = pytest.mark.cuda

COLORS = ["red", "green", "blue", "pink", "gray"]
SHAPES = ["star", "ring", "bar", "cross"]
NAMES = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
PREFIX = pytest.mark.parametrize("prefix_cache", [False, True])


def clip(device, width=64):
    from open_clip.model import CLIP

    tokenizer = WordTokenizer([*COLORS, *SHAPES, "a", "photo", "of"], context_length=77)
    torch.manual_seed(0)
    text = {"context_length": 77, "width": width, "heads": 4, "layers": 2}
    text["vocab_size"] = tokenizer.vocab_size
    vision = {"layers": (1, 1, 1, 1), "width": 8, "image_size": 32}
    model = CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text)
    return OpenClipBackbone(model.to(device), tokenizer)


def batch(device, n=40):
    g = torch.Generator().manual_seed(1)
    features = F.normalize(torch.randn(n, 24, generator=g), dim=1)
    return features.to(device), (torch.arange(n) % len(NAMES)).to(device)


def tuned(device, dtype="float32", **options):
    model = GMoP(clip(device), NAMES, config=GMoPConfig(**options))
    recipe = TrainConfig(lr=0.1, epochs=2, batch_size=16, dtype=dtype)
    GMoPTrainer(model, batch("cpu"), config=recipe).fit()
    return model


@PREFIX
def test_a_training_step_waits_for_nothing(prefix_cache) -> None:
    model = GMoP(clip("cuda"), NAMES, config=GMoPConfig(prefix_cache=prefix_cache))
    features, targets = batch("cuda")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.loss(features, targets)["total"].backward()  # tokenises names, once
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = model.loss(features, targets)["total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


@PREFIX
def test_contexts_are_the_cpus(prefix_cache) -> None:
    expected = tuned("cpu").contexts()
    for name, tensor in tuned("cuda", prefix_cache=prefix_cache).contexts().items():
        assert torch.allclose(tensor, expected[name], atol=1e-4)


# torch.compile looks at .grad of its arguments and hides the warning, but not as an error.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.usefixtures("without_type_checks")
@PREFIX
def test_contexts_of_a_compiled_tower_are_the_same(prefix_cache) -> None:
    expected = tuned("cuda").contexts()
    found = tuned("cuda", prefix_cache=prefix_cache, compile=True).contexts()
    for name, tensor in found.items():
        assert torch.allclose(tensor, expected[name], atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision(dtype) -> None:
    model = tuned("cuda", dtype)
    expected = tuned("cuda").contexts()
    for name, tensor in model.contexts().items():
        assert tensor.dtype == torch.float32
        assert torch.allclose(tensor, expected[name], atol=0.05)
    with torch.autocast("cuda", dtype=getattr(torch, dtype)):
        scores = model.eval().detect(batch("cuda")[0])
    assert scores.dtype == torch.float32
    assert len(scores.unique()) == len(scores)  # nothing saturates into ties


def test_a_step_takes_half_the_memory_of_full_sequences_at_most() -> None:
    backbone = clip("cuda", width=256)
    model = GMoP(backbone, NAMES, config=GMoPConfig())
    features, targets = batch("cuda")
    model.loss(features, targets)["total"].backward()
    with peak_memory(torch.device("cuda")) as ours:
        model.loss(features, targets)["total"].backward()

    def in_full(embeds, ends):
        return encode(F.pad(embeds, (0, 0, 0, 77 - embeds.shape[1])), ends)

    encode, backbone.encode_prompt_embeds = backbone.encode_prompt_embeds, in_full
    with peak_memory(torch.device("cuda")) as full:
        model.loss(features, targets)["total"].backward()
    assert ours.bytes < 0.5 * full.bytes
