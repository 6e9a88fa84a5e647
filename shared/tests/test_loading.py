import io
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("datasets")

import datasets
import huggingface_hub
import jaxtyping
import numpy as np
import PIL.Image

from shared_core.data.loading import ImageDataset, load_images, load_rows, load_texts
from shared_core.data.long_tail import class_counts
from shared_core.data.text import pydoc_documents
from shared_core.errors import InputError, MissingExtraError


@pytest.fixture(autouse=True)
def without_type_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let wrong arguments reach our own checks, as they do outside the tests."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def cache(tmp_path: Path) -> dict[str, str]:
    """Keeps what `datasets` converts out of the user's cache."""
    return {"cache_dir": str(tmp_path / "cache")}


def picture(level: int, mode: str = "RGB") -> PIL.Image.Image:
    return PIL.Image.new(mode, (5, 4), level if mode == "L" else (level, 0, 9))


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    picture(level).save(buffer, "PNG")
    return buffer.getvalue()


def table(**labels: object) -> datasets.Dataset:
    """Three RGB images with red levels 10, 20, 30 and the given label columns."""
    features = datasets.Features(
        {"image": datasets.Image(), **{name: kind for name, (kind, _) in labels.items()}}
    )
    columns = {name: values for name, (_, values) in labels.items()}
    images = [{"bytes": png(level), "path": None} for level in (10, 20, 30)]
    return datasets.Dataset.from_dict({"image": images, **columns}, features=features)


ANIMALS = (datasets.ClassLabel(names=["cat", "dog", "eel"]), [1, 0, 1])


def red_levels(data: ImageDataset) -> list[int]:
    return [data[i][0].getpixel((0, 0))[0] for i in range(len(data))]


@pytest.mark.smoke
def test_parquet_file(tmp_path: Path, cache: dict) -> None:
    path = tmp_path / "animals.parquet"
    table(label=ANIMALS, weight=(datasets.Value("float32"), [1.0, 2.0, 3.0])).to_parquet(path)
    data = load_images(path, **cache)
    assert isinstance(data, ImageDataset)
    assert (data.targets, data.class_names) == ([1, 0, 1], ["cat", "dog", "eel"])
    assert class_counts(data) == [1, 2, 0]
    image, label = data[1]
    assert (image.mode, image.size, label) == ("RGB", (5, 4), 0)
    assert red_levels(data) == [10, 20, 30]
    assert red_levels(pickle.loads(pickle.dumps(data))) == [10, 20, 30]  # noqa: S301
    part = load_images(str(path), split="test[1:]", transform=np.asarray, **cache)
    assert [item[0][0, 0].tolist() for item in (part[0], part[1])] == [[20, 0, 9], [30, 0, 9]]
    assert part.targets == [0, 1]


@pytest.mark.smoke
def test_image_folder_with_splits(tmp_path: Path, cache: dict) -> None:
    for split, levels in (("train", (10, 20)), ("test", (30,))):
        for name in ("cat", "dog"):
            folder = tmp_path / "animals" / split / name
            folder.mkdir(parents=True)
            for level in levels:
                picture(level, "L").save(folder / f"{level}.png")
    train = load_images(tmp_path / "animals", **cache)
    assert (train.targets, train.class_names) == ([0, 0, 1, 1], ["cat", "dog"])
    assert [train[i][0].getpixel((0, 0)) for i in (0, 1)] == [(10, 10, 10), (20, 20, 20)]
    assert len(load_images(tmp_path / "animals", split="test", **cache)) == 2
    with pytest.raises(InputError, match=r"'validation' .* one of \['train', 'test'\]"):
        load_images(tmp_path / "animals", split="validation", **cache)
    only_classes = load_images(tmp_path / "animals" / "train", **cache)
    assert only_classes.class_names == ["cat", "dog"]


def test_saved_data_sets_and_arrow_files(tmp_path: Path, cache: dict) -> None:
    animals = table(label=ANIMALS)
    animals.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": animals, "test": animals.select([2])}).save_to_disk(
        tmp_path / "several"
    )
    assert red_levels(load_images(tmp_path / "one")) == [10, 20, 30]
    assert red_levels(load_images(tmp_path / "several", split="test")) == [30]
    with pytest.raises(InputError, match="has no split 'valid'; available: train, test"):
        load_images(tmp_path / "several", split="valid")
    [arrow] = (tmp_path / "one").glob("*.arrow")
    assert red_levels(load_images(arrow, **cache)) == [10, 20, 30]


def test_encoded_images_written_by_other_tools(tmp_path: Path, cache: dict) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = {
        "picture": [{"bytes": png(level), "path": "x.png"} for level in (10, 20)],
        "label": ["dog", "cat"],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "plain.parquet")
    data = load_images(tmp_path / "plain.parquet", **cache)
    assert (red_levels(data), data.targets, data.class_names) == ([10, 20], [1, 0], ["cat", "dog"])
    columns = {"raw": [png(30)], "label": [2]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "raw.parquet")
    data = load_images(tmp_path / "raw.parquet", **cache)
    assert (red_levels(data), data.targets, data.class_names) == ([30], [2], ["0", "1", "2"])


def serve(monkeypatch: pytest.MonkeyPatch, rows: datasets.Dataset) -> list:
    """Put `rows` in place of the hub and record how it is asked."""
    calls = []

    def load_dataset(*args: object, **kwargs: object) -> datasets.Dataset:
        calls.append((args, kwargs))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.smoke
def test_hub_ids_go_straight_to_the_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    calls = serve(monkeypatch, table(label=ANIMALS))
    assert red_levels(load_images("uoft-cs/cifar10", split="test[:3]")) == [10, 20, 30]
    load_images("mnist", name="default", revision="main")
    assert calls == [
        (("uoft-cs/cifar10",), {"split": "test[:3]"}),
        (("mnist",), {"split": "train", "name": "default", "revision": "main"}),
    ]


def test_hub_errors_say_what_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: object, **kwargs: object) -> None:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"the split 'train' of a/b: Dataset 'a/b' doesn't exist"):
        load_rows("a/b")


def test_hub_offline_is_an_input_error(monkeypatch: pytest.MonkeyPatch) -> None:
    # The libraries read their environment variables at import, which came before the test.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"cannot load the split 'train' of nobody/nothing: "):
        load_rows("nobody/nothing")


@pytest.mark.parametrize(
    "source",
    [
        "./digits", "/no/where", "~/no/where", "..", "a/b/c", "data/", "C:\\images",
        "cifar.parquet", "owner/gsm8k.jsonl", "here/cifar10", Path("cifar10"),
    ],
)  # fmt: skip
def test_paths_that_do_not_exist_never_reach_the_hub(
    source: str | Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "work" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    calls = serve(monkeypatch, table(label=ANIMALS))
    if source == "..":
        (tmp_path / "work" / "gone").mkdir()
        source = "../gone-too"
    for load in (load_images, load_texts, load_rows):
        with pytest.raises(InputError, match="there is no file or folder"):
            load(source)
    assert calls == []


def test_files_of_unknown_kind_are_refused(tmp_path: Path, cache: dict) -> None:
    (tmp_path / "notes.docx").write_text("words")
    with pytest.raises(InputError, match=r"of no known kind; accepted: \.arrow, \.csv"):
        load_texts(tmp_path / "notes.docx")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"cannot load the split 'train' of .*empty"):
        load_images(tmp_path / "empty", **cache)


@pytest.mark.parametrize(("name", "content"), [("a.parquet", "junk"), ("a.jsonl", "{junk")])
def test_broken_files_are_refused(tmp_path: Path, cache: dict, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=f"cannot load the split 'train' of .*{name}: ."):
        load_rows(tmp_path / name, **cache)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(InputError, match=r"a\.jsonl is empty; accepted"):
        load_rows(tmp_path / "a.jsonl")


def test_a_broken_file_is_told_of_once(
    tmp_path: Path, cache: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_bytes(bytes(range(256)))
    before = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    with pytest.raises(InputError, match=r"cannot load the split 'train' of .*a\.jsonl"):
        load_rows(tmp_path / "a.jsonl", **cache)
    assert capsys.readouterr() == ("", "")
    assert (datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()) == before


def test_streaming_is_refused() -> None:
    with pytest.raises(InputError, match="streaming=True gives no data set with a length"):
        load_images("uoft-cs/cifar10", streaming=True)


def test_columns_are_inferred_or_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    fine, coarse = ANIMALS, (datasets.ClassLabel(names=["land", "sea"]), [0, 0, 1])
    serve(monkeypatch, table(fine_label=fine, coarse_label=coarse))
    with pytest.raises(
        InputError,
        match="which column holds the label; name it with label_column=; "
        "available: image, fine_label, coarse_label",
    ):
        load_images("a/b")
    assert load_images("a/b", label_column="coarse_label").class_names == ["land", "sea"]
    with pytest.raises(InputError, match="no column 'label'; available: image, fine_label"):
        load_images("a/b", label_column="label")
    with pytest.raises(InputError, match=r"column 'fine_label' holds .*, not images; available"):
        load_images("a/b", image_column="fine_label", label_column="fine_label")

    masks = [{"bytes": png(1), "path": None}] * 3
    serve(monkeypatch, table(label=ANIMALS, mask=(datasets.Image(), masks)))
    assert red_levels(load_images("a/b")) == [10, 20, 30]  # "image" is the usual name

    serve(monkeypatch, table(topic=(datasets.Value("string"), ["x", "y", "x"])))
    with pytest.raises(InputError, match="which column holds the label"):
        load_images("a/b")
    assert load_images("a/b", label_column="topic").class_names == ["x", "y"]

    serve(monkeypatch, table(label=ANIMALS).remove_columns("image"))
    with pytest.raises(InputError, match=r"which column holds the image; .* available: label"):
        load_images("a/b")


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("int64", [0, -1, -1], "2 of 3 rows have no label in column 'label'"),
        ("int64", [0, None, 1], "1 of 3 rows have no label"),
        ("string", ["a", None, "b"], "1 of 3 rows have no label"),
        (
            "float32",
            [0.0, 1.0, 2.0],
            "not one class index or name per row; available: image, label",
        ),
    ],
)
def test_samples_without_labels_are_refused(
    monkeypatch: pytest.MonkeyPatch, kind: str, values: list, message: str
) -> None:
    serve(monkeypatch, table(label=(datasets.Value(kind), values)))
    with pytest.raises(InputError, match=message):
        load_images("a/b")


def test_images_that_cannot_be_decoded_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [{"bytes": content, "path": None} for content in (png(10), b"junk", png(30)[:40])]
    features = datasets.Features({"image": datasets.Image(), "label": ANIMALS[0]})
    rows = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 2]}, features=features)
    serve(monkeypatch, rows)
    data = load_images("a/b")
    assert data[0][1] == 0
    for index in (1, 2):
        with pytest.raises(InputError, match=f"image {index} cannot be decoded: "):
            data[index]


def test_image_dataset_takes_arrays() -> None:
    pixels = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    data = ImageDataset(pixels, np.array([1, 0]), ("cat", "dog"), transform=np.asarray)
    image, label = data[-1]
    assert (image == pixels[1]).all()
    assert (label, data.targets) == (0, [1, 0])
    with pytest.raises(IndexError):
        data[2]
    with pytest.raises(InputError, match="there are 2 images but 1 targets"):
        ImageDataset(pixels, [0], ["cat"])


@pytest.mark.smoke
def test_pydoc_text() -> None:
    assert load_texts("pydoc", split="test") == [d.text for d in pydoc_documents("test")]
    code = load_texts("pydoc", split="validation", kind="code")
    assert code == [d.text for d in pydoc_documents("validation", kind="code")]
    with pytest.raises(InputError, match="split 'valid' is not known"):
        load_texts("pydoc", split="valid")


def test_embedded_names_of_the_other_kind_are_refused() -> None:
    with pytest.raises(InputError, match="pydoc holds text; load it with load_texts"):
        load_images("pydoc")
    for name in ("shapes", "digits"):
        with pytest.raises(InputError, match=f"{name} holds images; load it with load_images"):
            load_texts(name)


def write_texts(folder: Path, name: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"text": "one\n\ntwo", "n": 1}, {"text": "three", "n": 2}]
    if path.suffix in (".jsonl", ".json"):
        lines = [json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) if path.suffix == ".jsonl" else f"[{','.join(lines)}]")
    elif path.suffix in (".csv", ".tsv"):
        separator = "," if path.suffix == ".csv" else "\t"
        path.write_text(
            "\n".join(
                separator.join(r) for r in (("text", "n"), ('"one\n\ntwo"', "1"), ("three", "2"))
            )
        )
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet"])
def test_text_files(tmp_path: Path, cache: dict, name: str) -> None:
    path = write_texts(tmp_path, name)
    texts = load_texts(path, split="validation", **cache)
    assert list(texts) == [texts[0], texts[1]] == ["one\n\ntwo", "three"]
    assert (len(texts), texts[-1], texts[:1]) == (2, "three", ["one\n\ntwo"])
    assert load_rows(path, **cache)[1] == {"text": "three", "n": 2}


def test_a_folder_of_tables_has_the_splits_of_its_file_names(tmp_path: Path, cache: dict) -> None:
    write_texts(tmp_path / "data", "train.jsonl")
    (tmp_path / "data" / "test.jsonl").write_text('{"text": "held out", "n": 3}\n')
    assert len(load_texts(tmp_path / "data", **cache)) == 2
    assert list(load_texts(tmp_path / "data", split="test", **cache)) == ["held out"]


def test_a_txt_file_is_one_text(tmp_path: Path, cache: dict) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("one\ntwo\n\nthree\n", encoding="utf-8")
    (tmp_path / "notes" / "b.txt").write_text("Ünïcode", encoding="utf-8")
    assert list(load_texts(tmp_path / "notes" / "a.txt", **cache)) == ["one\ntwo\n\nthree\n"]
    lines = load_texts(tmp_path / "notes" / "a.txt", sample_by="line", **cache)
    assert list(lines) == ["one", "two", "", "three"]
    assert list(load_texts(tmp_path / "notes", **cache)) == ["one\ntwo\n\nthree\n", "Ünïcode"]


def test_text_columns_are_inferred_or_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"question": "1 + 1", "answer": "2", "level": 3}]
    serve(monkeypatch, datasets.Dataset.from_list(rows))
    with pytest.raises(
        InputError,
        match="which column holds the text; name it with text_column=; "
        "available: question, answer, level",
    ):
        load_texts("a/b")
    assert list(load_texts("a/b", text_column="answer")) == ["2"]
    with pytest.raises(InputError, match=r"column 'level' holds Value\(.*\), not text; available"):
        load_texts("a/b", text_column="level")
    serve(monkeypatch, datasets.Dataset.from_list(rows).remove_columns("answer"))
    assert list(load_texts("a/b")) == ["1 + 1"]


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    path = tmp_path / "a.jsonl"
    path.write_text("{}")
    for load in (load_images, load_texts, load_rows):
        with pytest.raises(MissingExtraError, match=r"datasets .* 'shared-core\[data\]'"):
            load(path)
    assert load_texts("pydoc", split="test")
    assert len(load_images("digits", split="test"))


@pytest.mark.smoke
def test_import_does_not_load_the_library() -> None:
    code = (
        "import sys, shared_core.data.loading; "
        "assert not {'datasets', 'pyarrow', 'tokenizers', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_real_images(tenfold_data: Path, cache: dict) -> None:
    data = load_images(tenfold_data / "cifar10-test.parquet", split="test", **cache)
    assert (len(data), len(data.class_names)) == (4000, 10)
    assert class_counts(data) == [400] * 10
    assert data.class_names[0] == "airplane"
    image, label = data[17]
    assert (image.mode, image.size, label) == ("RGB", (32, 32), data.targets[17])


def test_real_texts(tenfold_data: Path, cache: dict) -> None:
    questions = load_texts(
        tenfold_data / "gsm8k-test.jsonl", split="test", text_column="question", **cache
    )
    assert len(questions) == 1319
    assert questions[0].startswith("Janet")
    rows = load_rows(tenfold_data / "gsm8k-test.jsonl", split="test", **cache)
    assert all("####" in row["answer"] for row in rows.select(range(100)))
