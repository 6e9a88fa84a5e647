"""Small real models: a mini-CLIP as it comes, and random ones of both libraries."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from internet_neg import InterNegConfig, InterNegDetector, OpenClipEncoder
from internet_neg.mini_clip import build_mini_clip
from shared_core.contrastive import WordTokenizer

pytest_plugins = ["shared_core.testing"]

TEMPLATES = ("a photo of a {}", "the nice {}", "{}")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """The models are tiny: a second thread would only get in the way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(x, dim=-1).to(dtype)


@pytest.fixture(name="unit")
def unit_fixture() -> Callable[..., Tensor]:
    """Random rows of length one."""
    return unit


@pytest.fixture(scope="session")
def mini() -> OpenClipEncoder:
    """An untrained mini-CLIP; tests never change it."""
    return build_mini_clip(seed=1)


@pytest.fixture
def make_open_clip() -> Callable[..., OpenClipEncoder]:
    """Random open_clip models: ``CLIP`` or ``CustomTextCLIP``, causal or not."""

    def make(custom: bool = False, tokenizer: Any = None, **text: Any) -> OpenClipEncoder:
        from open_clip.model import CLIP, CustomTextCLIP

        tokenizer = tokenizer or WordTokenizer(["a", "photo", "red", "star", "of"], 12)
        config = {
            "context_length": 12,
            "vocab_size": 64,
            "width": 16,
            "heads": 2,
            "layers": 2,
            **text,
        }
        vision = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = (CustomTextCLIP if custom else CLIP)(24, vision, config)
        for parameter in model.parameters():  # larger than at initialization, to be told apart
            parameter.data.mul_(2.0)
        model.logit_scale.data.fill_(2.0)
        return OpenClipEncoder(model, tokenizer, lambda image: image)

    return make


@pytest.fixture
def make_detector(mini: OpenClipEncoder) -> Callable[..., InterNegDetector]:
    """A detector on the untrained mini-CLIP, with proxies that leave words admissible."""

    def make(cls: type[InterNegDetector] = InterNegDetector, **changes: Any) -> InterNegDetector:
        config = {
            "groups": 2,
            "negatives": 12,
            "extra": 8,
            "beta": 0.6,
            "templates": TEMPLATES,
            "inversion_steps": 2,
            "max_gate_rate": 1.0,
            "temperature": 0.05,
            **changes,
        }
        words = [f"{color} {shape}" for color in ("red", "blue", "pink") for shape in SHAPES]
        detector = cls(mini, ["red star", "blue bar"], InterNegConfig(**config), words)
        names = torch.nn.functional.normalize(
            mini.encode_text(["The nice red star.", "The nice blue bar."]), dim=-1
        )
        # Near the class texts, so that some words are admissible.
        return detector.fit(torch.nn.functional.normalize(names + 0.01 * unit(2, 64), dim=-1))

    return make


SHAPES = ("circle", "square", "star", "ring", "heart", "bar", "gear", "drop")
