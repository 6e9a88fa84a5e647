"""The code of the method card runs, on what the demo leaves behind."""

import re
from pathlib import Path

import pytest

from gmsa import GMSAConfig, GMSAModel
from gmsa.demo import save_tour
from gmsa.demo_base import load_base

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_code_of_the_readme_runs(tmp_path, monkeypatch, capsys) -> None:
    if not README.is_file():
        pytest.skip("the README lies beside the tests only in the repository")
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/gmsa/demo")
    save_tour(folder, 8)
    model = GMSAModel.from_backbone(load_base(), GMSAConfig(encoder_layers=1, lora_r=4))
    model.config.base_model_name_or_path = "../base"
    model.save_pretrained(folder / "compressor")
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    assert capsys.readouterr().out.startswith("b ")
