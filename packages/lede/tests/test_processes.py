"""Two gloo processes: training, a model whose layers are shared out, shares of the prompts.

All in one start, because a start takes longer than what is tested.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lede
from lede import SelfSpeculativeDecoder
from lede.cli import main
from lede.early_exit import EarlyExitConfig
from lede.testing import tiny_model
from lede.trainer import EarlyExitTrainer
from shared_core.testing import run_gloo

POLICIES = (
    lede.StaticPolicy(2, 4),
    lede.ConfidencePolicy(3, 0.3),
    lede.ConfidenceExitPolicy(0.5, 0.2),
    lede.DraftVerifyPolicy(1, 0.4),
    lede.DELPolicy(0.05),
)


def trainer(folder: Path, batch: int, **changes: Any) -> EarlyExitTrainer:
    from transformers import TrainingArguments, default_data_collator

    rows = torch.randint(64, (24, 10), generator=torch.Generator().manual_seed(0))
    args = TrainingArguments(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=batch,
        optim="sgd",
        learning_rate=0.05,
        max_grad_norm=0.0,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        dataloader_pin_memory=False,
        **changes,
    )
    return EarlyExitTrainer(
        tiny_model(),
        args,
        early_exit=EarlyExitConfig(p_max=0.0, rotation=2),
        train_dataset=[{"input_ids": r, "labels": r} for r in rows],
        data_collator=default_data_collator,
    )


def _two(rank: int, world: int, folder: str, command: list[str]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", ACCELERATE_USE_CPU="true")
    assert main([*command, "--out", f"{folder}/shares"]) == 0
    _decode(world, f"{folder}/model")
    t = trainer(Path(folder), 4, ddp_backend="gloo")
    assert t.accelerator.num_processes == world
    t.train()
    t.save_model(f"{folder}/trained")  # the first process writes


def _decode(world: int, folder: str) -> None:
    """A model whose layers are shared out decodes as the whole one, with every policy."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    whole = AutoModelForCausalLM.from_pretrained(folder)
    how: dict[str, Any] = {"tp_plan": "auto"}
    if "tp_plan" in vars(DistributedConfig()):  # newer versions want it there
        how = {"distributed_config": DistributedConfig(**how)}
    parts = AutoModelForCausalLM.from_pretrained(folder, **how)
    local = parts.model.layers[0].self_attn.q_proj.weight.to_local()
    assert local.numel() * world == whole.model.layers[0].self_attn.q_proj.weight.numel()
    ids = torch.randint(1, 64, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 10, "pad_token_id": 0}
    expected = whole.generate(ids, do_sample=False, **settings)
    for policy in POLICIES:
        decoder = SelfSpeculativeDecoder(parts, (1, 2, 3), policy=policy, max_draft=5)
        assert torch.equal(decoder.generate(ids, **settings).sequences, expected)
    found = []
    for model in (whole, parts):  # the same seed in all processes: the same draws
        decoder = SelfSpeculativeDecoder(model, (1, 2, 3), policy=POLICIES[1], max_draft=5)
        generator = torch.Generator().manual_seed(3)
        found.append(decoder.generate(ids, do_sample=True, generator=generator, **settings))
    assert torch.equal(found[0].sequences, found[1].sequences)


@pytest.fixture(scope="module")
def ran(
    tmp_path_factory: pytest.TempPathFactory, save_word_model: Callable[[Path], list[str]]
) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("processes")
    tiny_model().save_pretrained(folder / "model")
    words = save_word_model(folder / "words")
    text = folder / "prompts.txt"
    text.write_text("\n".join(" ".join(words[i : i + 4]) for i in range(5)))
    where = ("--model", folder / "words", "--exit-layers", "1,3", "--max-draft", 4)
    short = ("--max-new-tokens", 16, "--no-probe", "--device", "cpu")
    command = [str(a) for a in ("collect", text, *where, *short)]
    run_gloo(_two, folder, str(folder), command)  # decoding is asserted in the processes
    return folder, command


def test_training_in_two_processes_equals_one(ran: Any, tmp_path: Path) -> None:
    """The same global batch and the rotating exits; without dropout, which draws by process."""
    from safetensors.torch import load_file

    one = trainer(tmp_path, 8)
    start = {k: v.clone() for k, v in one.model.state_dict().items()}
    one.train()
    two = load_file(ran[0] / "trained/model.safetensors")
    for name, weight in one.model.state_dict().items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=2e-6)
    assert not torch.equal(two["lm_head.weight"], start["lm_head.weight"])


def test_collecting_in_two_processes_equals_one(ran: Any, tmp_path: Path) -> None:
    folder, command = ran
    assert main([*command, "--out", str(tmp_path)]) == 0
    names = ["config.json", "cost.json", "experience.safetensors", "metrics.json"]
    assert sorted(p.name for p in (folder / "shares").iterdir()) == names
    one, two = (
        lede.ExperienceTable.load(path / "experience.safetensors")
        for path in (tmp_path, folder / "shares")
    )
    assert len(two) == 5
    for name in ("lengths", "tokens", "top"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    np.testing.assert_allclose(one.features, two.features, atol=1e-5)
    # Continuations are numbered otherwise: a dynamic policy's rounds are the same.
    policy, cost = lede.ConfidencePolicy(3, 0.3), lede.CostModel.memory_bound(5)
    assert lede.simulate(one, policy, cost).log == lede.simulate(two, policy, cost).log
