"""Features in parts: kept on disk, gone on with after a crash, shared out among processes."""

import json
from collections.abc import Callable
from pathlib import Path

import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from internet_neg import InterNegConfig, InterNegDetector, InterNegError, OpenClipEncoder
from internet_neg._features import features_in_parts, text_features
from internet_neg._parallel import own_share
from internet_neg.cli import main
from internet_neg.mini_clip import build_mini_clip, save_mini_clip
from internet_neg.proxies import embed_images
from shared_core.testing import run_gloo

Unit = Callable[..., Tensor]
Make = Callable[..., InterNegDetector]
WORDS = ["ring", "heart", "gear", "red bar", "pink", "drop", "cross", "arrow", "moon"]


@pytest.mark.smoke
def test_text_features_are_kept_on_disk(
    mini: OpenClipEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = text_features(mini, WORDS, tmp_path, part=4)
    assert torch.allclose(first, mini.encode_text(WORDS), atol=1e-6)
    files = sorted(tmp_path.glob("texts-*.safetensors"))
    assert len(files) == 3
    files[0].write_bytes(b"broken")
    assert torch.equal(text_features(mini, WORDS, tmp_path, part=4), first)
    with monkeypatch.context() as patch:
        patch.setattr(mini, "encode_text", lambda texts: pytest.fail("computed again"))
        assert torch.equal(text_features(mini, WORDS, tmp_path, part=4), first)
    text_features(mini, WORDS[::-1], tmp_path, part=4)
    assert len(list(tmp_path.glob("*.safetensors"))) == 6
    other = build_mini_clip(seed=2)  # other weights, other features
    assert not torch.allclose(text_features(other, WORDS, tmp_path, part=4), first, atol=1e-3)


def test_an_interrupted_extraction_goes_on(mini: OpenClipEncoder, tmp_path: Path) -> None:
    calls: list[slice] = []

    def compute(piece: slice) -> Tensor:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(piece)
        return torch.full((piece.stop - piece.start, mini.dim), float(piece.start))

    names = [str(i) for i in range(10)]
    with pytest.raises(KeyboardInterrupt):
        features_in_parts(mini, "images", names, compute, part=3, folder=tmp_path)
    calls[:] = [slice(0, 0)]  # one more, then it would stop again
    with pytest.raises(KeyboardInterrupt):
        features_in_parts(mini, "images", names, compute, part=3, folder=tmp_path)
    assert calls[1] == slice(6, 9)
    calls.clear()
    found = features_in_parts(mini, "images", names, compute, part=3, folder=tmp_path)
    assert calls == [slice(9, 10)]
    assert found[:, 0].tolist() == [0, 0, 0, 3, 3, 3, 6, 6, 6, 9]


def test_changed_images_are_embedded_anew(mini: OpenClipEncoder, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    PIL.Image.new("RGB", (32, 32), "red").save(path)
    kept = (tmp_path / "cache", "clip")
    first = embed_images(mini, [path], cache=kept)
    assert torch.equal(embed_images(mini, [path], cache=kept), first)
    embed_images(mini, [path], cache=(tmp_path / "cache", "openood"))
    PIL.Image.new("RGB", (40, 40), "blue").save(path)
    assert not torch.allclose(embed_images(mini, [path], cache=kept), first)
    assert len(list((tmp_path / "cache").iterdir())) == 3
    with pytest.raises(InterNegError, match=r"b.png is not there"):
        embed_images(mini, [tmp_path / "b.png"], cache=kept)


def test_embedded_words_serve_other_classes_too(
    mini: OpenClipEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = InterNegConfig(groups=1, negatives=20)
    T = mini.encode_text(["The nice red star.", "The nice blue bar."])

    def words_of(names: list[str]) -> set[str]:
        detector = InterNegDetector(mini, names, config, WORDS, tmp_path)
        monkeypatch.setattr("internet_neg.selection.admissible", lambda E, *_: E[:, 0] == E[:, 0])
        return {text.word for text in detector.fit(T).negatives}

    assert words_of(["red star", "blue bar"]) == set(WORDS)
    before = len(list(tmp_path.iterdir()))
    assert words_of(["ring", "moon"]) == set(WORDS) - {"ring", "moon"}
    assert len(list(tmp_path.iterdir())) == before + 1  # the class names


def _two_ranks(rank: int, world: int, folder: str) -> None:
    import warnings

    warnings.simplefilter("ignore")
    root = Path(folder)
    mini = build_mini_clip(seed=1)
    assert own_share(5) == ((0, 2), (2, 5))[rank]

    # Extraction: five images in batches of two, words in parts of two, on disk and not.
    pixels = torch.load(root / "pixels.pt", weights_only=True)
    expected = torch.load(root / "features.pt", weights_only=True)
    computed = []
    encode = mini.encode_image
    mini.encode_image = lambda x: computed.append(len(x)) or encode(x)  # type: ignore[method-assign]
    found = embed_images(mini, pixels, batch_size=2, sync=True)
    assert sum(computed) == (2 if rank == 0 else 3)  # each its share, and no more
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(embed_images(mini, pixels[:1], batch_size=2, sync=True), expected[:1])
    texts = torch.load(root / "texts.pt", weights_only=True)
    for cache in (None, root / "cache", root / "cache"):
        both = text_features(mini, WORDS, cache, sync=True, part=2)
        assert torch.allclose(both, texts, atol=1e-5)
    fitted = InterNegDetector(
        mini, ["red star", "blue bar"], InterNegConfig(groups=1, negatives=5, shots=2), WORDS
    )
    source = {"features": expected[:4], "labels": torch.tensor([0, 1, 0, 1])}
    proxies = fitted._proxies(source, texts[:2], None, sync=True)
    assert torch.allclose(proxies, torch.load(root / "proxies.pt", weights_only=True), atol=1e-5)

    # The stream: bank and scores are those of one process.
    detector = InterNegDetector.from_pretrained(folder, mini).reset()
    v = torch.load(root / "v.pt", weights_only=True)
    # The second batch is uneven, and in the third only one rank has gated images.
    cuts = [(0, 4, 8), (8, 9, 16), (16, 20, 24)]
    for number, (start, middle, end) in enumerate(cuts):
        mine = v[start:middle] if rank == 0 else v[middle:end]
        out = detector.predict(features=mine, sync=True)
        expected = torch.load(root / f"out{number}.pt", weights_only=True)
        part = expected[: middle - start] if rank == 0 else expected[middle - start :]
        assert torch.allclose(out.score, part, atol=1e-5)
    bank = torch.load(root / "bank.pt", weights_only=True)
    assert torch.allclose(detector.bank.embeddings, bank["embeddings"], atol=1e-4)
    assert torch.equal(detector.bank.source_index, bank["source_index"])

    # The command: one rank writes.
    code = main(
        [
            *["eval", "--model", f"{root}/model", "--id", f"{root}/id", "--id-images"],
            *[f"{root}/id", "--ood", f"x={root}/ood", "--vocab", f"{root}/words.txt", "-M", "2"],
            *["--methods", "mcm,neglabel", "--cache", f"{root}/kept{rank}"],
            *["--out", f"{root}/run{rank}", "--no-plots", "--device", "cpu"],
        ]
    )
    assert code == 0
    assert (root / f"run{rank}").exists() == (rank == 0)


def test_two_processes_are_one(
    make_detector: Make,
    mini: OpenClipEncoder,
    unit: Unit,
    tmp_path: Path,
    run_cli: Callable[..., object],
) -> None:
    pixels = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    features = embed_images(mini, pixels)
    torch.save(pixels, tmp_path / "pixels.pt")
    torch.save(features, tmp_path / "features.pt")
    torch.save(mini.encode_text(WORDS), tmp_path / "texts.pt")
    means = [F.normalize(features[i:4:2], dim=-1).mean(0) for i in (0, 1)]
    torch.save(F.normalize(torch.stack(means), dim=-1), tmp_path / "proxies.pt")

    detector = make_detector()
    N, T = detector._N, detector._T
    v = F.normalize(N[torch.arange(24) % len(N)] + 0.1 * unit(24, 64), dim=-1)
    # As known as can be: towards the class texts and away from the negatives.
    v[16:20] = F.normalize(T[:1] - N.mean(0) + 0.02 * v[16:20], dim=-1)
    detector.save_pretrained(tmp_path)
    torch.save(v, tmp_path / "v.pt")
    for number in range(3):
        out = detector.predict(features=v[8 * number : 8 * number + 8])
        torch.save(out.score, tmp_path / f"out{number}.pt")
        if number == 2:
            assert not out.gated[:4].any()
            assert out.gated[4:].any()
    torch.save(detector.bank.state_dict(), tmp_path / "bank.pt")

    save_mini_clip(tmp_path / "model", mini)
    (tmp_path / "words.txt").write_text("\n".join(WORDS))
    for folder in ("id/red star", "id/blue bar", "ood"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(3):
            shade = (60 * i, 80 * len(folder) % 256, 100)
            PIL.Image.new("RGB", (32, 32), shade).save(tmp_path / folder / f"{i}.png")
    run_gloo(_two_ranks, tmp_path, str(tmp_path))
    alone = run_cli(
        main,
        *["eval", "--model", tmp_path / "model", "--id", tmp_path / "id", "--id-images"],
        *[tmp_path / "id", "--ood", f"x={tmp_path}/ood", "--vocab", tmp_path / "words.txt"],
        *["-M", 2, "--methods", "mcm,neglabel", "--cache", tmp_path / "kept"],
        *["--out", tmp_path / "alone", "--no-plots", "--device", "cpu"],
    )
    assert alone.code == 0  # type: ignore[attr-defined]
    one, two = (json.loads((tmp_path / f"{x}/metrics.json").read_text()) for x in ("alone", "run0"))
    assert one["methods"] == two["methods"]
