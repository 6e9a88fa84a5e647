"""Pairing loaders, sampling for ever, disjoint sets."""

import PIL.Image
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from edge_ood import PairedLoader, check_disjoint
from edge_ood.train import CyclingSampler
from shared_core.errors import InputError


def loader(n, batch_size, shuffle=False):
    values = torch.arange(n)
    return DataLoader(TensorDataset(values, values), batch_size=batch_size, shuffle=shuffle)


@pytest.mark.smoke
def test_an_epoch_is_one_pass_over_the_id_set():
    pairs = PairedLoader(loader(10, 4), loader(3, 2))
    assert len(pairs) == 3
    seen = [(x.tolist(), y.tolist(), o.tolist()) for x, y, o in pairs]
    assert [x for x, _, _ in seen] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [o for *_, o in seen] == [[0, 1], [2], [0, 1]]
    short = PairedLoader(loader(10, 4), loader(3, 2), sampling="truncate")
    assert len(short) == len(list(short)) == 2


def test_a_large_oe_set_is_seen_whole_over_the_epochs():
    pairs = PairedLoader(loader(4, 2), loader(9, 2, shuffle=True))
    torch.manual_seed(0)
    seen = torch.cat([o for _ in range(3) for *_, o in pairs])
    assert set(seen[:9].tolist()) == set(range(9))
    pairs.restart()
    assert len(next(iter(pairs))[2]) == 2


def test_the_sampler_is_an_endless_stream_cut_into_epochs():
    whole = []
    for epoch in range(6):
        sampler = CyclingSampler(7, 5, seed=3)
        sampler.set_epoch(epoch)
        part = list(sampler)
        assert len(part) == len(sampler) == 5
        whole += part
    for turn in range(4):
        assert sorted(whole[7 * turn : 7 * turn + 7]) == list(range(7))
    assert whole[:7] != whole[7:14]
    assert sorted(list(CyclingSampler(3, 7, seed=0))[:6]) == [0, 0, 1, 1, 2, 2]


def test_disjoint_sets(tmp_path):
    files = []
    for index in range(3):
        files.append(tmp_path / f"{index}.bin")
        files[-1].write_bytes(bytes([index]))
    (tmp_path / "copy.bin").write_bytes(bytes([0]))
    assert check_disjoint(files[:1], files[1:]) == 0
    assert check_disjoint(files[:1], [tmp_path / "copy.bin"]) == 0
    with pytest.raises(InputError, match="share 1 samples by sha1, the first at index 0 of the ID"):
        check_disjoint(files, [tmp_path / "copy.bin"], "sha1", names=("the ID set", "the OE set"))
    with pytest.raises(InputError, match="share 1 samples by path"):
        check_disjoint([str(tmp_path / "." / "1.bin")], files)
    with pytest.warns(UserWarning, match="share 3"):
        assert check_disjoint(files, files, on_overlap="warn") == 3
    with pytest.raises(InputError, match="cannot be read"):
        check_disjoint(files, [tmp_path / "none.bin"], "sha1")
    image = PIL.Image.new("RGB", (2, 2))
    other = PIL.Image.new("RGB", (4, 1))
    assert check_disjoint([image], [other], "sha1") == 0
    with pytest.raises(InputError, match="share 1"):
        check_disjoint([image], [image.copy()], "sha1")
    x = torch.zeros(2, dtype=torch.bfloat16)
    with pytest.raises(InputError, match="share 1"):
        check_disjoint([x], [x.clone()], "sha1")
    with pytest.raises(InputError, match="has no path"):
        check_disjoint([image], [image])


@pytest.mark.usefixtures("without_type_checks")
def test_errors():
    with pytest.raises(InputError, match="sampling is 'zip'"):
        PairedLoader([1], [1], sampling="zip")
    with pytest.raises(InputError, match="the OE loader is empty"):
        PairedLoader([1], [])
    with pytest.raises(InputError, match="how is 'name'"):
        check_disjoint([], [], how="name")
