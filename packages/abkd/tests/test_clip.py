"""CLIP towers: the prompts in the blocks, the loss, and a real run with tiny open_clip models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("open_clip")

from abkd.cli import main
from abkd.clip import CLIPDistiller, DeepPrompts
from shared_core.testing import CliResult

Run = Callable[..., CliResult]
pytestmark = pytest.mark.usefixtures("without_type_checks")


def sizes(width: int, embed: int) -> dict[str, Any]:
    return {
        "embed_dim": embed,
        "vision_cfg": {"layers": 3, "width": width, "head_width": 8, "patch_size": 8,
                       "image_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2,
                     "layers": 1},
    }  # fmt: skip


def model(width: int, embed: int) -> Any:
    from open_clip.model import CLIP

    torch.manual_seed(width)
    return CLIP(**sizes(width, embed)).eval()


def distiller(**options: Any) -> CLIPDistiller:
    torch.manual_seed(0)
    texts = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    return CLIPDistiller(model(16, 8).visual, model(24, 12).visual, texts, depth=2, **options)


IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_prompts_are_what_the_blocks_see() -> None:
    tower = model(16, 8).visual
    prompts = DeepPrompts(tower, count=2, depth=2)
    with prompts.inserted(tower):
        found = tower(IMAGES)
    x = tower._embeds(IMAGES)
    own = x.shape[1]
    for i, block in enumerate(tower.transformer.resblocks):
        if i < 2:
            x = torch.cat([x[:, :own], prompts.tokens[i].expand(4, -1, -1)], 1)
        x = block(x)
    expected = tower._pool(x[:, :own])[0] @ tower.proj
    torch.testing.assert_close(found, expected)
    assert (found - tower(IMAGES)).abs().max() > 1e-4  # and without them it is the tower's own
    torch.testing.assert_close(tower(IMAGES), model(16, 8).visual(IMAGES))


def test_the_loss_is_the_divergence_of_the_scores_and_trains_only_what_is_learned() -> None:
    one = distiller(alpha=1.0, beta=0.0, kd_weight=3.0)
    loss = one(IMAGES)
    teacher = F.normalize(one.teacher(IMAGES), dim=-1) @ one.texts.T * 100
    kl = F.kl_div(one.student_logits(IMAGES).log_softmax(-1), teacher.softmax(-1),
                  reduction="batchmean")  # fmt: skip
    torch.testing.assert_close(loss, 3 * kl)
    loss.backward()
    learned = dict(one.learned.named_parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learned.values())
    rest = [p for n, p in one.named_parameters() if not n.startswith("learned.")]
    assert rest
    assert all(p.grad is None for p in rest)
    one.train()
    assert one.learned.training
    assert not one.student.training
    assert not one.teacher.training


def test_it_learns_to_score_like_the_teacher() -> None:
    one = distiller(kd_weight=1.0, logit_scale=10.0)
    optimizer = torch.optim.Adam(one.learned.parameters(), lr=2e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = one(IMAGES)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tiny models of open_clip and a folder of images, two classes of base and one new."""
    pytest.importorskip("datasets")
    import PIL.Image
    from safetensors.torch import save_file

    for name, width, embed in (("student", 16, 8), ("teacher", 24, 12)):
        (tmp_path / name).mkdir()
        config = {"model_cfg": sizes(width, embed), "preprocess_cfg": {}}
        (tmp_path / name / "open_clip_config.json").write_text(json.dumps(config))
        save_file(model(width, embed).state_dict(), tmp_path / name / "open_clip_model.safetensors")
    g = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        for label, name in enumerate(("cat", "dog", "fox")):
            place = tmp_path / "images" / split / name
            place.mkdir(parents=True)
            for i in range(4):
                pixels = torch.randint(0, 80, (16, 16, 3), generator=g) + 80 * label
                PIL.Image.fromarray(pixels.byte().numpy()).save(place / f"{i}.png")
    return tmp_path


def test_the_command_trains_and_resumes(folder: Path, run_cli: Run) -> None:
    argv = ["train", "--task", "clip", "--student", f"local-dir:{folder}/student", "--teacher",
            f"local-dir:{folder}/teacher", "--data", folder / "images", "--device", "cpu",
            "--epochs", 3, "--batch-size", 4, "--json"]  # fmt: skip
    refused = run_cli(main, *argv)  # the tiny tower has three blocks
    assert refused.code == 2
    assert "accepted: 1 prompt or more, in 1 to 3 blocks" in refused.stderr
    argv += ["--depth", 2]
    shown = run_cli(main, *argv, "--out", "run")
    assert shown.code == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert {"base", "new", "harmonic"} <= set(found)
    assert len(found["history"]) == 3
    again = run_cli(main, *argv, "--out", "run", "--resume")
    assert json.loads(again.stdout) == found
    from safetensors.torch import load_file

    state = load_file("run/student.safetensors")
    assert state["texts"].shape == (3, 12)
    assert state["prompts.tokens"].shape == (2, 4, 16)


def test_errors(run_cli: Run) -> None:
    with pytest.raises(ValueError, match="encode the texts with the teacher's"):
        CLIPDistiller(model(16, 8).visual, model(24, 12).visual, torch.randn(5, 8))
    with pytest.raises(ValueError, match="takes no prompts"):
        DeepPrompts(torch.nn.Linear(2, 2))
    shown = run_cli(main, "train", "--task", "clip", "--student", "ViT-X", "--teacher", "ViT-X",
                    "--data", "digits", "--device", "cpu")  # fmt: skip
    assert shown.code == 2
    assert "open_clip cannot load 'ViT-X'" in shown.stderr
    shown = run_cli(main, "train", "--preset", "clip-base-to-new", "--dry-run")
    assert shown.code == 2
    assert "pass --data with one of the 11 data sets" in shown.stderr
    shown = run_cli(main, "train", "--preset", "clip-base-to-new", "--data", "x", "--dry-run")
    assert shown.code == 0
