"""The layouts of VOC, COCO, NUS-WIDE, CSV files and tables, made small on disk."""

import json

import numpy as np
import PIL.Image
import pytest
import torch

from edge_ood.datasets import (
    CocoMultiLabel,
    FolderMultiLabel,
    HFMultiLabel,
    MultiLabelImages,
    NUSWideMultiLabel,
    UnlabelledImages,
    VOCMultiLabel,
    eval_transform,
    train_transform,
)
from edge_ood.sources import load_id, load_outliers
from shared_core.errors import InputError


def image(path, value=0, size=(12, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", size, (value, value, value)).save(path)


def annotation(*objects):
    # A person has parts with names and boxes of their own.
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    inner = "".join(
        f"<object><name>{n}</name><difficult>{d}</difficult>{part}</object>" for n, d in objects
    )
    return f"<annotation>{inner}</annotation>"


def test_voc(tmp_path):
    base = tmp_path / "VOCdevkit/VOC2012"
    for part in ("ImageSets/Main", "Annotations"):
        (base / part).mkdir(parents=True)
    for name, objects in {
        "a": [("cat", 0), ("dog", 1), ("cat", 0)],
        "b": [("person", 1)],
    }.items():
        image(base / f"JPEGImages/{name}.jpg")
        (base / f"Annotations/{name}.xml").write_text(annotation(*objects))
    (base / "ImageSets/Main/val.txt").write_text("a\nb\n")
    data = VOCMultiLabel(tmp_path, "val")
    assert len(data) == 2
    assert len(data.class_names) == 20
    names = [[data.class_names[i] for i in row.nonzero().flatten()] for row in data.targets]
    assert names == [["cat", "dog"], ["person"]]
    easy = VOCMultiLabel(tmp_path, "val", difficult=False)
    assert easy.targets.sum(1).tolist() == [1, 0]
    assert load_id(f"voc:{tmp_path}", "test").targets.equal(data.targets)
    with pytest.raises(InputError, match=r"no file or folder .*train\.txt"):
        VOCMultiLabel(tmp_path, "train")
    (base / "Annotations/b.xml").write_text(annotation(("unicorn", 0)))
    with pytest.raises(InputError, match="unicorn"):
        VOCMultiLabel(tmp_path, "val")


def coco(tmp_path):
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in (5, 7, 9)],
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}],
        "annotations": [
            {"image_id": 5, "category_id": 90},
            {"image_id": 5, "category_id": 90},
            {"image_id": 9, "category_id": 1},
            {"image_id": 9, "category_id": 90},
        ],
    }
    for year in ("train2014", "val2014"):
        for i in (5, 7, 9):
            image(tmp_path / year / f"{i}.jpg", i)
        file = tmp_path / f"annotations/instances_{year}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content))
    return tmp_path


def test_coco_drops_images_without_annotation(tmp_path):
    coco(tmp_path)
    data = CocoMultiLabel(tmp_path / "train2014", tmp_path / "annotations/instances_train2014.json")
    assert data.class_names == ["person", "toothbrush"]
    assert data.targets.tolist() == [[0, 1], [1, 1]]
    assert data.dropped == 1
    assert data[1][0].getpixel((0, 0)) == (9, 9, 9)
    assert data.class_counts.tolist() == [1, 2]
    (tmp_path / "annotations/instances_train2014.json").write_text("{}")
    with pytest.raises(InputError, match="not a COCO instances file"):
        load_id(f"coco:{tmp_path}")


def test_nuswide(tmp_path):
    (tmp_path / "TrainImagelist.txt").write_text("a\\1.jpg\na\\2.jpg\nb\\3.jpg\n")
    (tmp_path / "TrainLabels.txt").write_text("1 0 1\n0 0 0\n0 1 0\n")
    data = load_id(f"nuswide:{tmp_path}")
    assert [str(p.relative_to(tmp_path)) for p in data.images] == [
        "images/a/1.jpg",
        "images/b/3.jpg",
    ]
    assert data.targets.tolist() == [[1, 0, 1], [0, 1, 0]]
    assert data.dropped == 1
    for text, message in (("1 0\n", "3 images"), ("1 x\n" * 3, "no table"), ("2 0\n" * 3, "other")):
        (tmp_path / "TrainLabels.txt").write_text(text)
        with pytest.raises(InputError, match=message):
            NUSWideMultiLabel(
                tmp_path / "TrainImagelist.txt", tmp_path / "TrainLabels.txt", tmp_path
            )


def test_nuswide_as_published(tmp_path):
    labels = tmp_path / "Groundtruth/TrainTestLabels"
    for folder in (labels, tmp_path / "ImageList"):
        folder.mkdir(parents=True)
    for split in ("Train", "Test"):
        names = "actor\\0001_1.jpg\nadobehouses\\0002_2.jpg\n"
        (tmp_path / f"ImageList/{split}Imagelist.txt").write_text(names)
        (labels / f"Labels_airport_{split}.txt").write_text("1\n0\n")
        (labels / f"Labels_zebra_{split}.txt").write_text("1\n0\n" if split == "Test" else "0\n1\n")
    data = load_id(f"nuswide:{tmp_path}")
    assert data.class_names == ["airport", "zebra"]
    assert data.targets.tolist() == [[1, 0], [0, 1]]
    assert data.images[0] == tmp_path / "Flickr/actor/0001_1.jpg"
    test = load_id(f"nuswide:{tmp_path}", "test")
    assert test.targets.tolist() == [[1, 1]]
    assert test.dropped == 1
    (labels / "Labels_zebra_Train.txt").write_text("0 1\n1 0\n")
    with pytest.raises(InputError, match="more than one number"):
        load_id(f"nuswide:{tmp_path}")
    for file in labels.glob("*_Test.txt"):
        file.unlink()
    with pytest.raises(InputError, match=r"no Labels_<concept>_Test\.txt"):
        load_id(f"nuswide:{tmp_path}", "test")


@pytest.mark.smoke
def test_csv(tmp_path):
    image(tmp_path / "x.png", 7)
    image(tmp_path / "y.png")
    (tmp_path / "train.csv").write_text("path,labels\nx.png,cat; dog\ny.png,\n")
    data = FolderMultiLabel(tmp_path)
    assert data.class_names == ["cat", "dog"]
    assert data.targets.tolist() == [[1, 1], [0, 0]]
    assert data[0][0].getpixel((0, 0)) == (7, 7, 7)
    (tmp_path / "test.csv").write_text("path,dog,cat\nx.png,1,0\n")
    test = FolderMultiLabel(tmp_path, "test", class_names=["cat", "dog"])
    assert test.targets.tolist() == [[0, 1]]
    for text, message in (
        ("image,labels\nx,y\n", "has the columns"),
        ("path,labels\nx.png,bird\n", "'bird'"),
        ("path,cat\nx.png,yes\n", "'yes'"),
        ("path,labels\n", "has the columns none"),
    ):
        (tmp_path / "train.csv").write_text(text)
        with pytest.raises(InputError, match=message):
            FolderMultiLabel(tmp_path, class_names=["cat"])


def test_tables(tmp_path):
    datasets = pytest.importorskip("datasets")
    pictures = [PIL.Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(3)]
    named = datasets.List(datasets.ClassLabel(names=["cat", "dog"]))
    columns = {
        "image": datasets.Image(),
        "labels": named,
        "tags": datasets.List(datasets.Value("string")),
    }
    rows = {"image": pictures, "labels": [[0], [0, 1], []], "tags": [["b"], ["a", "b"], []]}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(columns))
    table.to_parquet(tmp_path / "t.parquet")
    data = HFMultiLabel(tmp_path / "t.parquet")
    assert data.class_names == ["cat", "dog"]
    assert data.targets.tolist() == [[1, 0], [1, 1], [0, 0]]
    assert data[2][0].getpixel((0, 0)) == (2, 0, 0)
    tags = HFMultiLabel(tmp_path / "t.parquet", label_column="tags")
    assert tags.class_names == ["a", "b"]
    assert tags.targets.tolist() == [[0, 1], [1, 1], [0, 0]]
    assert len(UnlabelledImages(tmp_path / "t.parquet")) == 3
    with pytest.raises(InputError, match="no column 'y'"):
        HFMultiLabel(tmp_path / "t.parquet", label_column="y")
    with pytest.raises(InputError, match="'a', which is not known"):
        HFMultiLabel(tmp_path / "t.parquet", label_column="tags", class_names=["b"])
    nested = {"objects": [{"category": [1, 0]}, {"category": []}], "image": pictures[:2]}
    datasets.Dataset.from_dict(nested).cast_column("image", datasets.Image()).to_parquet(
        tmp_path / "n.parquet"
    )
    data = HFMultiLabel(tmp_path / "n.parquet", label_column="objects.category")
    assert data.targets.tolist() == [[1, 1], [0, 0]]


def test_real_images_one_label_each(tenfold_data):
    pytest.importorskip("datasets")
    data = HFMultiLabel(tenfold_data / "cifar10-test.parquet", label_column="label")
    assert data.targets.shape == (4000, 10)
    assert data.class_counts.tolist() == [400] * 10
    assert data[0][0].size == (32, 32)


def test_outliers(tmp_path):
    image(tmp_path / "a/1.png")
    image(tmp_path / "b/2.jpg")
    (tmp_path / "b/notes.txt").write_text("")
    data = UnlabelledImages(tmp_path)
    assert len(data) == 2
    assert data[0].size == (12, 8)
    (tmp_path / "b/broken.png").write_bytes(b"no image")
    broken = load_outliers(str(tmp_path))
    with pytest.raises(InputError, match="cannot be decoded"):
        [broken[i] for i in range(3)]
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="no images in"):
        UnlabelledImages(empty)
    with pytest.raises(InputError, match="no images at"):
        load_outliers("nowhere")


def test_embedded_sets():
    train, test = load_id("shapes"), load_id("shapes", "test")
    assert train.class_names == test.class_names
    assert not {x.tobytes() for x in train.images} & {x.tobytes() for x in test.images}
    assert (train.targets.sum(1) > 0).all()
    counts = train.class_counts.sort(descending=True).values
    assert counts[0] > 10 * counts[-1]
    oe = load_outliers("shapes")
    unknown = [load_outliers(f"shapes:{n}", "test") for n in ("shapes", "colors", "textures")]
    assert [len(u) for u in unknown] == [500] * 3
    assert len(oe) == 2000
    with pytest.raises(InputError, match="accepted: objects, textures"):
        load_outliers("shapes:colors")
    for name, message in (("imagenet", "no ID set"), ("voc:", "no ID set")):
        with pytest.raises(InputError, match=message):
            load_id(name)


def test_transforms():
    pytest.importorskip("torchvision")
    picture = PIL.Image.fromarray(
        np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    )
    plain = eval_transform(24)
    assert torch.equal(plain(picture), plain(picture))
    assert plain(picture).shape == (3, 24, 24)
    for official in (False, True):
        torch.manual_seed(0)
        augment = train_transform(24, official=official)
        first, second = augment(picture), augment(picture)
        assert first.shape == (3, 24, 24)
        assert not torch.equal(first, second)


@pytest.mark.usefixtures("without_type_checks")
def test_errors():
    with pytest.raises(InputError, match="there are no images"):
        MultiLabelImages([], torch.zeros(0, 1), ["a"])
    with pytest.raises(InputError, match="do not fit targets"):
        MultiLabelImages([1], torch.zeros(1, 2), ["a"])
