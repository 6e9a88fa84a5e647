"""Contrastive training: the loss against its definition, and that a small model learns."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared_core.contrastive import (
    WordTokenizer,
    captioned_shapes,
    contrastive_loss,
    train_contrastive,
)
from shared_core.errors import InputError


class Towers(nn.Module):
    def __init__(self, words: int, size: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(
            nn.Flatten(), nn.Linear(3 * size * size, 32), nn.ReLU(), nn.Dropout(dropout)
        )
        self.project = nn.Linear(32, 16)
        self.text = nn.EmbeddingBag(words, 16, padding_idx=0)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_image(self, image: Tensor) -> Tensor:
        return self.project(self.image(image))

    def encode_text(self, text: Tensor) -> Tensor:
        return self.text(text)


def test_the_loss_is_its_definition_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    v, t = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (6, 3))
    targets = torch.tensor([0, 1, 2, 1, 0, 1])
    total = 0.0
    cos = [[float(F.cosine_similarity(a, b, dim=0)) * 7 for b in t] for a in v]
    for i, row in enumerate(cos):
        total += (math.log(sum(map(math.exp, row))) - row[targets[i]]) / 6
    for j in range(3):
        column = [row[j] for row in cos]
        normaliser = math.log(sum(map(math.exp, column)))
        mine = [i for i in range(6) if targets[i] == j]
        total += sum(normaliser - column[i] for i in mine) / len(mine) / 3
    found = contrastive_loss(v.float(), t.float(), torch.tensor(7.0), targets)
    assert found.item() == pytest.approx(total / 2, rel=1e-5)


def test_with_different_captions_it_is_clips_loss() -> None:
    v, t = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(1))
    logits = 10 * F.normalize(v, dim=-1) @ F.normalize(t, dim=-1).T
    own = torch.arange(8)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    assert contrastive_loss(v, t, torch.tensor(10.0), own).item() == pytest.approx(expected.item())


@pytest.mark.smoke
def test_a_small_model_learns_and_repeats_itself() -> None:
    images, captions = captioned_shapes(400, seed=3, size=16)
    tokenizer = WordTokenizer.from_texts(captions)

    def once(seed: int) -> tuple[list[float], Tensor]:
        model = Towers(tokenizer.vocab_size, dropout=0.1)
        trained = train_contrastive(
            model, images, captions, tokenizer=tokenizer, steps=100, batch_size=64, seed=seed
        )
        assert not trained.model.training
        return [r["loss"] for r in trained.history], model.project.weight.detach().clone()

    losses, weight = once(0)
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])
    again, same = once(0)
    assert again == losses
    assert torch.equal(same, weight)
    assert once(1)[0] != losses


def test_the_global_random_state_is_left_alone() -> None:
    images, captions = captioned_shapes(8, size=16)
    tokenizer = WordTokenizer.from_texts(captions)
    model = Towers(tokenizer.vocab_size, dropout=0.5)
    state = torch.get_rng_state()
    train_contrastive(model, images, captions, tokenizer=tokenizer, steps=2, batch_size=4)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_transform_sees_one_image_and_gives_the_same_result() -> None:
    images, captions = captioned_shapes(12, size=16)
    tokenizer = WordTokenizer.from_texts(captions)
    weights = []
    for given, transform in (
        (images, None),
        ([(image / 2, 0) for image in images], lambda image: 2 * image),
    ):
        model = Towers(tokenizer.vocab_size)
        train_contrastive(
            model,
            given,
            captions,
            tokenizer=tokenizer,
            transform=transform,
            steps=3,
            batch_size=4,
            max_scale=10.0,
        )
        weights.append(model.project.weight)
        assert model.logit_scale.exp().item() <= 10.0 + 1e-4
    assert torch.equal(*weights)


def test_the_tokenizer_keeps_the_end_and_knows_unknown_words() -> None:
    tokenizer = WordTokenizer(["a", "red", "star"], context_length=5)
    rows = tokenizer(["a red star a a a", "", "blue $"])
    assert rows.tolist() == [[1, 4, 5, 6, 7], [1, 7, 0, 0, 0], [1, 2, 3, 7, 0]]
    assert rows.argmax(1).tolist() == [4, 1, 3]
    assert tokenizer("Red, star!").tolist() == tokenizer(["red star"]).tolist()
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (8, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"captions": ["a"]}, "3 images but 1 captions"),
        ({"images": torch.zeros(1, 3, 16, 16), "captions": ["a"]}, "needs two images"),
        ({"images": [1, 2, 3]}, "without a transform"),
        ({"steps": 0}, "steps=0"),
        ({"batch_size": 1}, "batch_size=1"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"images": torch.full((3, 3, 16, 16), math.nan)}, "lower the learning rate"),
    ],
)
def test_bad_input(changes: dict[str, object], message: str) -> None:
    arguments = {"images": torch.zeros(3, 3, 16, 16), "captions": ["a", "b", "c"], **changes}
    tokenizer = WordTokenizer(["a", "b", "c"])
    with pytest.raises(InputError, match=message):
        train_contrastive(Towers(tokenizer.vocab_size), tokenizer=tokenizer, **arguments)


@pytest.mark.parametrize(
    ("words", "context", "message"),
    [
        (["a", "a"], 8, "comes twice"),
        (["two words"], 8, "not one lower-case word"),
        (["a"], 2, "context_length=2"),
    ],
)
def test_bad_vocabularies(words: list[str], context: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        WordTokenizer(words, context)
