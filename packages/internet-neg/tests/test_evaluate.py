"""The protocol: orders, metrics, tables, lists, and a comparison on image files."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from torch import Tensor

from internet_neg import (
    InterNegDetector,
    InterNegError,
    MCMDetector,
    OODMetrics,
    OpenClipEncoder,
    Vocabulary,
    ood_metrics,
)
from internet_neg._inputs import labelled_images, unlabelled_images
from internet_neg.adapters import InterNegOOD
from internet_neg.benchmark import METHODS, Settings, prepare_benchmark, run_benchmark
from internet_neg.evaluate import compare, read_imglist, run_stream, stream_metrics
from internet_neg.plots import plot_bank, plot_margins, plot_roc
from internet_neg.presets import BENCHMARKS, ImageList
from internet_neg.proxies import embed_images
from shared_core.data.loading import load_images
from shared_core.metrics import fpr_at_recall

Unit = Callable[..., Tensor]
Make = Callable[..., InterNegDetector]


def test_a_stream_is_shuffled_by_its_seed_alone(make_detector: Make, unit: Unit) -> None:
    detector = make_detector()
    v = unit(30, 64)
    one, two = (run_stream(detector, v, batch_size=8, seed=3) for _ in range(2))
    assert torch.equal(one.output.margin, two.output.margin)
    assert torch.equal(one.order.sort().values, torch.arange(30))
    assert not torch.equal(one.order, run_stream(detector, v, seed=4).order)
    plain = run_stream(detector, v, batch_size=8, seed=None, update=False)
    assert plain.order.tolist() == list(range(30))
    assert torch.equal(plain.output.margin, detector.predict(features=v, update=False).margin)
    last = one.growth[-1]
    assert last["seen"] == 30
    assert last["bank"] == min(8, last["accepted"])
    with pytest.raises(InterNegError, match="0 images"):
        run_stream(detector, v[:0])


@pytest.mark.usefixtures("without_type_checks")
def test_metrics_take_each_image_to_its_side(make_detector: Make, unit: Unit) -> None:
    detector = make_detector(text_only=True)
    T = detector._T
    known = torch.cat([T, T])
    result = run_stream(detector, torch.cat([known, detector._N]), batch_size=3, seed=1)
    labels = torch.tensor([0, 1, 0, 1])
    found = stream_metrics(result, 4, labels)
    margins = detector.predict(features=torch.cat([known, detector._N])).margin
    assert found["fpr95"] == fpr_at_recall(margins[:4], margins[4:])
    swapped = fpr_at_recall(-margins[4:], -margins[:4])
    assert found["fpr95_ood_positive"] == swapped
    assert found["id_accuracy"] == 1.0
    assert (found["n_id"], found["n_ood"]) == (4, 12)
    assert stream_metrics(result, 4, rank_by="score")["id_accuracy"] is None
    with pytest.raises(ValueError, match="margin"):
        stream_metrics(result, 4, rank_by="rank")  # type: ignore[arg-type]


def test_id_accuracy_is_that_of_plain_zero_shot(make_detector: Make, unit: Unit) -> None:
    known, unknown = unit(20, 64), {"a": unit(10, 64, seed=1), "b": unit(12, 64, seed=2)}
    labels = torch.arange(20) % 2
    detectors = {"mcm": make_detector(MCMDetector, temperature=None), "ours": make_detector()}
    table, streams = compare(detectors, known, unknown, labels=labels, batch_size=7, seeds=[0, 1])
    plain = ((known @ detectors["mcm"]._T.T).argmax(1) == labels).double().mean().item()
    for method in detectors:
        assert table[method]["average"]["id_accuracy"] == pytest.approx(plain)
        values = [table[method][name]["auroc"] for name in unknown]
        assert table[method]["average"]["auroc"] == pytest.approx(sum(values) / 2)
        runs = table[method]["a"]["by_seed"]
        assert table[method]["a"]["fpr95"] == pytest.approx(
            (runs[0]["fpr95"] + runs[1]["fpr95"]) / 2
        )
    # Without a stream to learn from, the order does not matter.
    first, second = table["mcm"]["a"]["by_seed"]
    assert first == second
    assert len(plot_roc(streams, 20).axes) == 2
    assert len(plot_margins(streams, 20).axes) == 4
    assert plot_bank({k: s for k, s in streams.items() if k[0] == "mcm"}) is None
    growth = plot_bank({("ours", "a"): run_stream(detectors["ours"], known, batch_size=20)})
    assert [line.get_xdata().tolist() for line in growth.axes[0].lines] == [[0, 20]] * 3
    with pytest.raises(InterNegError, match="at least one set"):
        compare(detectors, known, {})


def test_lists(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("a/b c.png 3\n\nd.png -1\n")
    images, labels = read_imglist(path, tmp_path)
    assert images == [tmp_path / "a/b c.png", tmp_path / "d.png"]
    assert labels == [3, -1]
    for text, message in (("a.png\n", "line 1"), ("a.png x\n", "line 1"), ("\n", "is empty")):
        path.write_text(text)
        with pytest.raises(InterNegError, match=message):
            read_imglist(path, tmp_path)
    with pytest.raises(InterNegError, match="cannot read the image list"):
        read_imglist(tmp_path / "absent.txt", tmp_path)


@pytest.fixture
def image_folders(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for folder in ("id/red star", "id/blue bar", "shots/red star", "shots/blue bar", "ood"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(3):
            pixels = torch.randint(256, (20, 24, 3), generator=generator, dtype=torch.uint8)
            PIL.Image.fromarray(pixels.numpy()).save(tmp_path / folder / f"{i}.png")
    return tmp_path


def test_a_comparison_on_files(
    mini: OpenClipEncoder, image_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = image_folders
    settings = Settings.from_sources(
        ["red star", "blue bar"],
        str(root / "id"),
        str(root / "shots"),
        [f"noise={root / 'ood'}"],
        negatives=5,
        groups=1,
    ).with_changes(batch_size=4, seed=1, templates=("a {}",), beta=0.0)
    assert settings.describe()["unknown"] == {"noise": 3}
    shapes = Vocabulary(
        tuple(f"{c} gear" for c in ("red", "blue", "pink", "gray", "cyan", "white"))
    )
    # The untrained model admits no word; what is tested is the way from files to a table.
    monkeypatch.setattr("internet_neg.selection.admissible", _all_admissible)
    prepared = prepare_benchmark(mini, settings, METHODS, shapes, root / "cache")
    table, streams = run_benchmark(prepared)
    assert len(prepared.known) == 6
    assert list(table) == list(METHODS)
    assert len(streams) == 4
    monkeypatch.setattr(mini, "encode_image", lambda pixels: pytest.fail("computed again"))
    again = run_benchmark(prepare_benchmark(mini, settings, METHODS, shapes, root / "cache"))[0]
    assert again == table
    for methods, message in (((), "are missing"), (("odin",), "methods odin; accepted: mcm")):
        with pytest.raises(InterNegError, match=message):
            prepare_benchmark(mini, settings, methods, shapes)
    strange = dataclasses.replace(settings, known=(settings.known[0], [0, 1, 2, 0, 1, -1]))
    with pytest.raises(InterNegError, match="has label 2; accepted: 0 to 1"):
        prepare_benchmark(mini, strange, METHODS, shapes)


def _all_admissible(E: Tensor, *_: Any) -> Tensor:
    return torch.ones(len(E), dtype=torch.bool)


def test_presets_read_openoods_lists_and_count_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InterNegError, match="give --data-root"):
        Settings.from_preset("imagenet-near", None)
    folder = tmp_path / "benchmark_imglist" / "imagenet"
    folder.mkdir(parents=True)
    (folder / "train_imagenet.txt").write_text("".join(f"a{i}.JPEG 7\n" for i in range(20)))
    for name in ("test_imagenet", "test_ssb_hard", "test_ninco"):
        (folder / f"{name}.txt").write_text(f"b/{name}.JPEG {7 if 'imagenet' in name else -1}\n")
    with pytest.raises(InterNegError, match=r"lists 20 images; the benchmark has 1281167"):
        Settings.from_preset("imagenet-near", tmp_path)
    near = BENCHMARKS["imagenet-near"]

    def small(part: ImageList, count: int) -> ImageList:
        return dataclasses.replace(part, count=count)

    shrunk = dataclasses.replace(
        near,
        known=small(near.known, 1),
        train=small(near.train, 20),
        unknown={name: small(part, 1) for name, part in near.unknown.items()},
    )
    monkeypatch.setitem(BENCHMARKS, "imagenet-near", shrunk)
    with pytest.raises(InterNegError, match=r"neither in images_largescale/ nor in .*: a0.JPEG"):
        Settings.from_preset("imagenet-near", tmp_path)
    images, others = tmp_path / "images_largescale", tmp_path / "images_classic"
    # As OpenOOD's textures, one of the sets is in the other folder.
    for file in (images / "a0.JPEG", images / "b/test_imagenet.JPEG", images / "b/test_ninco.JPEG",
                 others / "b/test_ssb_hard.JPEG"):  # fmt: skip
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    found = Settings.from_preset("imagenet-near", tmp_path)
    assert found.known == ([images / "b/test_imagenet.JPEG"], [7])
    assert len(found.shots[0]) == 16
    assert found.unknown["ninco"] == [images / "b/test_ninco.JPEG"]
    assert found.unknown["ssb-hard"] == [others / "b/test_ssb_hard.JPEG"]
    assert (found.config.transform, found.config.groups, found.batch_size) == ("openood", 1, 256)
    assert (found.neglabel.negatives, found.neglabel.groups) == (10_000, 100)
    assert len(found.classnames) == 1000


def test_metrics_over_batches_and_their_refusals(unit: Unit) -> None:
    known, unknown = unit(1, 40)[0] + 0.1, unit(1, 30, seed=1)[0]
    expected = ood_metrics(known, unknown)
    metric = OODMetrics()
    for part in (slice(0, 7), slice(7, 70)):
        scores = torch.cat([known, unknown])[part]
        metric.update(scores, (torch.arange(70) >= 40)[part])
    found = {key: value.item() for key, value in metric.compute().items()}
    assert found == pytest.approx(expected)
    assert {"fpr95", "fpr95_ood_positive"} <= set(found)
    broken = known.clone()
    broken[3] = float("nan")
    for one, two, message in (
        (broken, unknown, "1 of 40 ID scores are NaN"),
        (known, unknown[:0], "no OOD scores"),
        (known[:0], unknown, "no ID scores"),
    ):
        with pytest.raises(ValueError, match=message):
            ood_metrics(one, two)
    only_known = OODMetrics()
    only_known.update(known, torch.zeros(40, dtype=torch.bool))
    with pytest.raises(ValueError, match="no OOD scores"):
        only_known.compute()


def test_pytorch_ood_gives_the_same_mcm_and_metrics(unit: Unit) -> None:
    detectors = pytest.importorskip("pytorch_ood.detector", reason="pytorch-ood is not installed")
    from pytorch_ood.metrics import OODMetrics as TheirMetrics

    v, T = unit(60, 16), unit(7, 16, seed=1)
    ours = MCMDetector(None, [f"class {i}" for i in range(7)]).fit_texts(T)
    S = InterNegOOD(ours).predict_features(v)
    theirs = detectors.MCM(None, T).predict_features(v)
    assert torch.allclose(S.float(), theirs, atol=1e-6)
    is_ood = torch.arange(60) >= 35
    metrics = TheirMetrics()
    metrics.update(S, torch.where(is_ood, -1, 0))
    found, own = metrics.compute(), ood_metrics(-S[~is_ood], -S[is_ood])
    assert own["auroc"] == pytest.approx(float(found["AUROC"]), abs=1e-6)
    assert own["fpr95_ood_positive"] == pytest.approx(float(found["FPR95TPR"]), abs=1e-6)


def test_sources_that_are_not_there(image_folders: Path) -> None:
    root, names = str(image_folders), ["red star", "blue bar"]
    options: dict[str, Any] = {"negatives": 5, "groups": 1}
    ood = [f"a={root}/ood"]
    for args, message in (
        ((names, f"{root}/id", f"{root}/shots", ["noise"]), "accepted: NAME=FOLDER"),
        ((names, f"{root}/id", f"{root}/absent", ood), "there is no folder"),
        ((names, f"{root}/id", f"{root}/ood", ood), "no subfolder of images"),
        ((["red star"], f"{root}/id", f"{root}/shots", ood), "'blue bar' in .* is none of the cl"),
        ((names, f"{root}/id", f"{root}/shots", [f"a={root}/absent"]), "no folder or list"),
        ((names, f"{root}/id", f"{root}/shots", ["a=digits@nowhere"]), "nowhere"),
    ):
        with pytest.raises(ValueError, match=message):
            Settings.from_sources(*args, **options)


def test_data_sets_are_images_too(mini: OpenClipEncoder, tmp_path: Path) -> None:
    settings = Settings.from_sources(
        None, "digits@test[:5]", "digits@train", ["x=digits@test[:3]"], negatives=5, groups=None
    )
    assert len(settings.classnames) == 10
    assert len(settings.shots[0]) == 160
    images, labels = settings.known
    features = embed_images(mini, images, cache=(tmp_path, "clip"))
    pictures = [load_images("digits", split="test")[i] for i in range(5)]
    assert labels == [label for _, label in pictures]
    assert torch.allclose(features, embed_images(mini, [image for image, _ in pictures]))
    again = embed_images(mini, settings.unknown["x"], cache=(tmp_path, "clip"))
    assert torch.allclose(again, features[:3], atol=1e-6)
    names = settings.classnames[::-1]  # numbers are those of the class names that were given
    turned = labelled_images("digits@test[:5]", "test", names)
    assert turned[1] == [9 - label for label in labels]


def test_parquet_files_are_images_too(tenfold_data: Path) -> None:
    pytest.importorskip("datasets", reason="needs internet-neg[data]")
    source = str(tenfold_data / "cifar10-test.parquet")
    images, labels, names = labelled_images(source, "test")
    assert (len(images), len(set(labels)), names[0]) == (4000, 10, "airplane")
    assert images[7].read().size == (32, 32)
    assert len(unlabelled_images(source, "test")) == 4000
    with pytest.raises(InterNegError, match=r"'bird' in .* is none of the class names"):
        labelled_images(source, "test", ["airplane", "automobile"])
