"""What only a GPU shows: no synchronisation, no memory beyond the asked for, half precision."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch.nn import functional as F

from diffeat import FeatureExtractor, capture
from diffeat.presets import build_topology

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
LAYERS = "sd15-practical"


@pytest.fixture(scope="module")
def unet() -> Any:
    torch.manual_seed(0)
    widths = {"block_out_channels": (64, 128, 256, 256), "cross_attention_dim": 64}
    return build_topology("sd15", device="cuda", **widths)


@pytest.fixture
def given() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, text = torch.randn(2, 4, 32, 32, device="cuda"), torch.randn(2, 7, 64, device="cuda")
    return x, torch.tensor([50, 50], device="cuda"), text


@torch.no_grad()
def test_capture_does_not_synchronise(unet: Any, given: Any) -> None:
    with capture(unet, LAYERS):  # the first call chooses algorithms
        unet(*given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with capture(unet, LAYERS) as cap:
            unet(*given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(value.is_cuda for value in cap.features.values())


@torch.no_grad()
def test_only_what_was_asked_for_is_kept(unet: Any, given: Any) -> None:
    def peak(run: Any) -> tuple[int, Any]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, kept

    def captured() -> Any:
        with capture(unet, LAYERS, stop=False) as cap:
            unet(*given)
        return cap.features

    unet(*given)
    bare, _ = peak(lambda: unet(*given) and None)
    hooked, features = peak(captured)
    asked = sum(v.numel() * v.element_size() for v in features.values())
    assert hooked <= 1.05 * (bare + asked)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_and_autocast(unet: Any, given: Any, dtype: torch.dtype) -> None:
    with capture(unet, LAYERS) as full:
        unet(*given)
    with torch.autocast("cuda", dtype), capture(unet, LAYERS, dtype=torch.float32) as mixed:
        unet(*given)
    for name, value in full.features.items():
        near = F.cosine_similarity(value.flatten(), mixed.features[name].flatten(), dim=0)
        assert near > 0.999, name


def test_features_and_noise_are_those_of_the_cpu(unet: Any) -> None:
    latents, text = torch.randn(2, 4, 32, 32), torch.randn(1, 7, 64)
    fx = FeatureExtractor(unet, scheduler=DDIMScheduler(), layers=LAYERS)
    there = fx(latents=latents, prompt=text, seed=3).to("cpu")
    unet.to("cpu")
    here = fx(latents=latents, prompt=text, seed=3)
    unet.to("cuda")
    for name, value in here.items():
        near = F.cosine_similarity(value.flatten(), there[name].flatten(), dim=0)
        assert near > 0.999, name
