"""Saving and loading, and what is refused."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gmsa import GMSAModel
from gmsa._checkpoint import _swap_in, fingerprint


@pytest.fixture
def base(tiny_lm, tmp_path):
    folder = tmp_path / "base"
    tiny_lm().save_pretrained(folder)
    return folder


@pytest.fixture
def trained(base, tiny_gmsa):
    """A compressor on a base that lies on disk, every trained tensor moved."""
    from gmsa._backbone import load_causal_lm

    model = tiny_gmsa(lm=load_causal_lm(base))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    return model


@pytest.mark.smoke
def test_round_trip_is_exact_and_holds_no_base(trained, ragged, tmp_path) -> None:
    ids, mask = ragged([9, 5])
    trained.save_pretrained(tmp_path / "saved")
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == [
        "compressor.safetensors", "config.json"
    ]  # fmt: skip
    stored = load_file(tmp_path / "saved" / "compressor.safetensors")
    assert all("lora_" in k or k.startswith("lsa.layers.") for k in stored)
    again = GMSAModel.from_pretrained(tmp_path / "saved")
    expected = trained.compress(ids, mask, 4).embeds
    assert torch.equal(again.compress(ids, mask, 4).embeds, expected)
    assert fingerprint(again) == fingerprint(trained)


# Raised by peft's use of transformers.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_tuned_decoder_is_a_plain_checkpoint(tuning, trained, base, ragged, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    trained.freeze_for_stage("keft", tuning)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    ids, mask = ragged([9, 5])
    expected = trained(ids, mask, ids[:, :3], labels=ids, rate=4).loss
    trained.save_pretrained(tmp_path / "saved")
    again = GMSAModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(ids, mask, ids[:, :3], labels=ids, rate=4).loss, expected)
    folder = tmp_path / "saved" / "decoder"
    if tuning == "full":
        plain = AutoModelForCausalLM.from_pretrained(folder)
    else:
        from peft import PeftModel

        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    logits = plain(input_ids=ids).logits
    assert torch.equal(logits, again.decoder(input_ids=ids).logits)


def test_what_is_refused(trained, tiny_lm, tmp_path) -> None:
    saved = tmp_path / "saved"
    trained.save_pretrained(saved)
    settings = json.loads((saved / "config.json").read_text())

    def load(message, **options):
        with pytest.raises(ValueError, match=message):
            GMSAModel.from_pretrained(saved, **options)

    load("num_hidden_layers", base_model=tiny_lm(layers=2))
    load("other weights than the one", base_model=tiny_lm(seed=5))
    other = GMSAModel.from_pretrained(saved, base_model=tiny_lm(seed=5), check_base=False)
    assert other.config.encoder_layers == 2
    (saved / "config.json").write_text(json.dumps({**settings, "encoder_layers": 1}))
    load("unexpected encoder.layers.1")
    (saved / "config.json").write_text(json.dumps({**settings, "encoder_layers": 3}))
    load("lacks encoder.layers.2")
    (saved / "config.json").write_text(json.dumps({**settings, "lora_r": 8}))
    load("has shape")
    (saved / "config.json").write_text(json.dumps(settings))
    tensors = {k: v.clone() for k, v in load_file(saved / "compressor.safetensors").items()}
    (saved / "compressor.safetensors").write_bytes(b"half a file")
    load("cannot be read")
    save_file(tensors, saved / "compressor.safetensors")
    (saved / "config.json").write_text("{")
    load("is damaged")
    (saved / "config.json").unlink()
    load("no config.json")
    with pytest.raises(ValueError, match="it is not a folder"):
        GMSAModel.from_pretrained(tmp_path / "nowhere")


def test_the_fingerprint_sees_the_base(tiny_lm, tiny_gmsa) -> None:
    lm = tiny_lm()
    one = fingerprint(tiny_gmsa(lm=copy.deepcopy(lm)))
    assert one == fingerprint(tiny_gmsa(lm=copy.deepcopy(lm)))
    assert one != fingerprint(tiny_gmsa(lm=tiny_lm(seed=7)))
    assert one != fingerprint(tiny_gmsa(lm=copy.deepcopy(lm), encoder_final_norm=False))


def test_the_base_is_known_after_rounding_and_fine_tuning(trained, base, tmp_path) -> None:
    trained.freeze_for_stage("keft", "full")
    with torch.no_grad():
        for parameter in trained.decoder.parameters():
            parameter.add_(0.1)
    trained.save_pretrained(tmp_path / "saved")
    again = GMSAModel.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert again.decoder.dtype == torch.bfloat16
    assert again.config.base_fingerprint == trained.config.base_fingerprint is not None


def test_a_base_beside_the_checkpoint_is_found(trained, tmp_path) -> None:
    trained.config.base_model_name_or_path = "../base"
    trained.save_pretrained(tmp_path / "saved")
    again = GMSAModel.from_pretrained(tmp_path / "saved")
    assert again.config.base_model_name_or_path == str(tmp_path / "base")


def test_a_failed_rename_keeps_the_old_decoder(tmp_path, monkeypatch) -> None:
    new, final = tmp_path / "new", tmp_path / "decoder"
    for folder, text in ((new, "new"), (final, "old")):
        folder.mkdir()
        (folder / "file").write_text(text)
    rename = os.replace

    def fails(source, target):
        if Path(source) == new:
            raise OSError("no")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails)
        with pytest.raises(OSError, match="no"):
            _swap_in(new, final)
    assert (final / "file").read_text() == "old"
    _swap_in(new, final)
    assert (final / "file").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["decoder"]
