"""Two processes end in what one ends in: metrics, features, training, and the command."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from openworld_auc import GatedPairwiseAUCLoss, GMoP, GMoPConfig, GMoPTrainer
from openworld_auc import _parallel as parallel
from openworld_auc.backbone import OpenClipBackbone
from openworld_auc.cli import main
from openworld_auc.train import TrainConfig, extract_features
from shared_core.contrastive import WordTokenizer
from shared_core.testing import run_gloo

BASE = ["red star", "blue bar", "green ring", "red ring", "blue star"]


def tiny_clip():
    from open_clip.model import CLIP

    tokenizer = WordTokenizer(["red", "star", "blue", "bar", "green", "ring", "a", "photo", "of"])
    torch.manual_seed(0)
    text = {"context_length": 16, "width": 32, "heads": 2, "layers": 2}
    text["vocab_size"] = tokenizer.vocab_size
    vision = {"layers": (1, 1, 1, 1), "width": 8, "image_size": 32}
    return OpenClipBackbone(CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text), tokenizer)


def tuned(backbone, **options):
    g = torch.Generator().manual_seed(1)
    features = F.normalize(torch.randn(23, 24, generator=g), dim=1), torch.arange(23) % 5
    model = GMoP(backbone, BASE, config=GMoPConfig(n_ctx_detector=3, **options))
    config = TrainConfig(lr=0.2, epochs=3, batch_size=8)
    history = GMoPTrainer(model, features, config=config).fit()
    return history, model.contexts()


def images(n):
    g = torch.Generator().manual_seed(2)
    return [(torch.randn(3, 32, 32, generator=g), i % 3) for i in range(n)]


def pairs():
    """Scores and gates that one weight each makes, as double precision."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(11, 2, generator=g, dtype=torch.float64)
    return x, torch.arange(11) % 3 == 0, torch.ones(2, dtype=torch.float64, requires_grad=True)


def joint_loss(x, positive, weights, surrogate, **options):
    s, w = (x * weights).unbind(1)
    return GatedPairwiseAUCLoss(surrogate, **options)(s, positive, w.sigmoid())


def in_processes(rank, world, folder, argv):
    sys.path.insert(0, str(Path(__file__).parent))
    from test_metric import check_shards

    check_shards(rank)  # unequal and empty shards of the torchmetrics classes
    rows = torch.arange(7.0)[:, None][parallel.share(7)].requires_grad_()
    assert parallel.gather(rows, 7).flatten().tolist() == list(range(7))
    # One row for two processes: both have it, and its gradient is not counted twice.
    alone = torch.ones(1, 2, requires_grad=True)
    (3 * parallel.gather(alone[parallel.share(1)], 1)).sum().backward()
    parallel.sum_gradients([alone])
    assert alone.grad.tolist() == [[3.0, 3.0]]
    # Pairs across processes, of which the second has no positive or nothing at all; the mean of
    # the gradients, as DistributedDataParallel takes it, is the gradient of the joint batch.
    x, positive, weights = pairs()
    for cut in (10, 11, 4):
        mine = slice(0, cut) if rank == 0 else slice(cut, 11)
        for surrogate in ("square", "logistic"):
            [expected] = torch.autograd.grad(joint_loss(x, positive, weights, surrogate), [weights])
            loss = joint_loss(x[mine], positive[mine], weights, surrogate, sync=True)
            assert loss.item() == pytest.approx(
                joint_loss(x, positive, weights, surrogate).item(), rel=1e-12
            )
            [gradient] = torch.autograd.grad(loss, [weights])
            dist.all_reduce(gradient)
            assert torch.allclose(gradient / world, expected, rtol=1e-12)
    backbone = tiny_clip()
    encoded = []
    encode = backbone.encode_prompt_embeds
    backbone.encode_prompt_embeds = lambda e, i: encoded.append(len(e)) or encode(e, i)
    history, contexts = tuned(backbone)
    assert set(encoded) == {5, 7 + rank}  # 5 zero-shot prompts once; of 15 a step its share
    # Each process computes the prefixes of its own share, and adds its part of their gradient.
    shared = tuned(backbone, prefix_cache=True, chunk=4)[1]
    assert all(torch.allclose(shared[name], contexts[name], atol=1e-5) for name in contexts)
    kept = extract_features(backbone, images(9), cache=Path(folder) / "cache", batch_size=4)
    again = extract_features(backbone, images(9), cache=Path(folder) / "cache")
    assert all(map(torch.equal, kept, again))
    assert len(list((Path(folder) / "cache").iterdir())) == 1
    if rank == 0:
        torch.save([history, contexts, kept], Path(folder) / "found.pt")
    os.chdir(folder)
    assert main(argv) == 0
    dist.barrier()


def test_two_processes_are_one(tmp_path, pets) -> None:
    argv = ["train", "--data", pets / "images", "--split-file", pets / "split.json", "--shots", 2]
    argv += ["--backbone", f"local-dir:{pets / 'clip'}", "--epochs", 2, "--k", 2, "--lr", 0.1]
    argv += ["--device", "cpu", "--json", "--out"]
    argv = [str(a) for a in argv]
    run_gloo(in_processes, tmp_path, str(tmp_path), [*argv, "two"])
    history, contexts, kept = torch.load(tmp_path / "found.pt", weights_only=True)
    backbone = tiny_clip()
    expected_history, expected = tuned(backbone)
    for one, other in zip(history, expected_history, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    start = GMoP(backbone, BASE, config=GMoPConfig(n_ctx_detector=3)).contexts()
    for name, tensor in expected.items():
        assert torch.allclose(contexts[name], tensor, atol=1e-5)
        assert not torch.allclose(start[name], tensor, atol=1e-3)
    features, labels = extract_features(backbone, images(9))
    assert torch.allclose(kept[0], features, atol=1e-5)
    assert torch.equal(kept[1], labels)
    assert main([*argv, str(tmp_path / "one")]) == 0
    results = [json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("one", "two")]
    assert results[0]["test"]["gmop"] == pytest.approx(results[1]["test"]["gmop"], abs=1e-6)
    assert len((tmp_path / "two" / "log.jsonl").read_text().splitlines()) == 2
