"""Few shots, splits and presets as the benchmarks have them; the method card's code."""

import json
import random
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from openworld_auc.data import few_shots, load_openworld_data, read_split_file
from openworld_auc.presets import BENCHMARKS, METHODS, load_preset


@pytest.mark.smoke
def test_base_classes_are_the_first_half_but_for_two() -> None:
    assert len(BENCHMARKS) == 15
    odd = {"imagenet_a": 101, "imagenet_r": 134}
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.base == odd.get(name, (benchmark.classes + 1) // 2)
        assert benchmark.template.count("{}") == 1
    _, method = load_preset("imagenet")
    assert (method.model.alpha, method.train.epochs) == (1.0, 10)
    assert load_preset("dtd", "coop")[1].model.alpha == 0
    assert not METHODS["gmop-official"].model.detach_gate
    for arguments in (("mnist",), ("dtd", "sgd")):
        with pytest.raises(ValueError, match="accepted: "):
            load_preset(*arguments)


def test_shots_are_drawn_anew_for_each_class() -> None:
    targets = [0, 1, 0, 2, 0, 1, 0, 0]
    chosen = few_shots(targets, 2, 3, seed=7)
    assert chosen[0] == random.Random(7).sample([0, 2, 4, 6, 7], 3)
    assert set(chosen[1]) <= {1, 5}
    assert len(chosen[1]) == 3
    with pytest.raises(ValueError, match="shots is 0"):
        few_shots(targets, 2, 0, seed=7)
    with pytest.raises(ValueError, match="base class 3 has no training image"):
        few_shots(targets, 4, 1, seed=7)


def write_split(folder, labels=(0, 1, 2)):
    rows = []
    for label in labels:
        image = PIL.Image.fromarray(np.full((4, 4, 3), 50 * label, dtype=np.uint8))
        image.save(folder / f"{label}.png")
        rows.append([f"{label}.png", label, f"name_{label}"])
    (folder / "split.json").write_text(json.dumps({"train": rows, "test": rows}))
    return folder / "split.json"


def test_split_files(tmp_path) -> None:
    path = write_split(tmp_path)

    def transform(image):
        return torch.from_numpy(np.array(image))

    data = load_openworld_data(str(tmp_path), transform=transform, split_file=path, shots=2, base=1)
    assert (data.base_classes, data.new_classes) == (["name_0"], ["name_1", "name_2"])
    assert data.new.targets == [0, 1]
    assert int(data.new[1][0][0, 0, 0]) == 100
    assert data.manifest == {"name_0": [0, 0]}
    before = data.new.stamps()
    assert before is not None
    assert [Path(name).name for name, _, _ in before] == ["1.png", "2.png"]
    PIL.Image.new("RGB", (9, 9)).save(tmp_path / "2.png")
    after = data.new.stamps()
    assert after is not None
    assert (after[0], after[1] != before[1]) == (before[0], True)
    rows = [f"{i}.png,{i},name_{i},{part}" for part in ("train", "test") for i in range(3)]
    manifest = tmp_path / "split.csv"
    manifest.write_text("\n".join(["file,label,name,split", *rows]))
    same = load_openworld_data(
        str(tmp_path), transform=transform, split_file=manifest, shots=2, base=1
    )
    assert (same.base_classes, same.new_classes) == (data.base_classes, data.new_classes)
    assert (same.new.targets, same.manifest) == (data.new.targets, data.manifest)
    manifest.write_text("file,label\n0.png,0\n")
    with pytest.raises(ValueError, match="or csv with columns file, label, name and split"):
        read_split_file(manifest, tmp_path)
    with pytest.raises(ValueError, match="at least one base and one new"):
        load_openworld_data(str(tmp_path), transform=transform, split_file=path, base=3)
    (tmp_path / "0.png").unlink()
    with pytest.raises(ValueError, match=r"2 images of .* are not under"):
        read_split_file(path, tmp_path)
    with pytest.raises(ValueError, match="are not 0, 1, 2"):
        read_split_file(write_split(tmp_path, (0, 2)), tmp_path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="is not a split file"):
        read_split_file(path, tmp_path)


def test_the_code_on_the_method_card_runs(capsys) -> None:
    card = Path(__file__).parent.parent / "README.md"
    blocks = re.findall(r"^```python\n(.*?)^```", card.read_text("utf-8"), re.M | re.S)
    assert blocks
    for block in blocks:
        exec(block, {})
    assert "tensor(0.5000" in capsys.readouterr().out
