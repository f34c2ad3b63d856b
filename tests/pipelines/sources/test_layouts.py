"""Public layouts, made small, with what comes along with them: recognised as a person would, and said so."""

from __future__ import annotations

import csv
import functools
import io
import json
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import picture

from pipelines.base import DataError
from pipelines.sources.listing import Choice, Inspected, Spool, inspect

pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pyarrow_parquet = pytest.importorskip("pyarrow.parquet")

WNIDS = ("n01440764", "n01443537", "n01629819")


@functools.cache
def jpeg(seed: int = 0) -> bytes:
    out = io.BytesIO()
    picture(16, 16, seed).save(out, "JPEG")
    return out.getvalue()


def put(root: Path, files: dict[str, bytes | str]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def images(root: Path, names: Iterable[str]) -> None:
    put(root, {name: jpeg(seed) for seed, name in enumerate(names)})


def tar(path: Path, members: dict[str, bytes], mode: str = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as file:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))


def wds(first: int, count: int, **more: bytes) -> dict[str, bytes]:
    return {
        f"{number:06d}.{suffix}": content
        for number in range(first, first + count)
        for suffix, content in {"jpg": jpeg(number), "cls": b"%d" % (number % 3), **more}.items()
    }


def parquet(path: Path, rows: int, names: list[str] | None = None, column: str = "image") -> None:
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    encoded = pyarrow.array([{"bytes": jpeg(i), "path": None} for i in range(rows)], kind)
    table = pyarrow.table({column: encoded, "label": [i % 2 for i in range(rows)]})
    if names:
        features = {column: {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow_parquet.write_table(table, path)


@dataclass
class Expected:
    """What a person would say of a layout."""

    splits: dict[str, int]
    classes: tuple[str, ...]
    format: str = "folders"
    labels: str = ""
    unread: int = 0
    used: tuple[str, ...] = ()
    choice: Choice = field(default_factory=Choice)
    notes: int = 0


def tiny_imagenet(root: Path) -> Expected:
    images(root, [f"train/{w}/images/{w}_{i}.JPEG" for w in WNIDS for i in range(3)])
    put(root, {f"train/{w}/{w}_boxes.txt": f"{w}_0.JPEG\t0\t0\t9\t9\n" for w in WNIDS})
    images(root, [f"val/images/val_{i}.JPEG" for i in range(6)])
    rows = "".join(f"val_{i}.JPEG\t{WNIDS[i % 3]}\t0\t0\t9\t9\n" for i in range(6))
    images(root, [f"test/images/test_{i}.JPEG" for i in range(4)])
    put(root, {"val/val_annotations.txt": rows, "wnids.txt": "\n".join(WNIDS), "words.txt": "n01440764\ttench\n"})
    used = ("val/val_annotations.txt",)
    return Expected({"train": 9, "val": 6}, WNIDS, labels="val_annotations.txt", unread=4 + 3 + 2, used=used)


def food(root: Path) -> Expected:
    names = ("apple_pie", "waffles")
    images(root, [f"food-101/images/{name}/{i}.jpg" for name in names for i in range(4)])
    lists = {
        split: [f"{name}/{i}" for name in names for i in rows] for split, rows in (("train", (0, 2)), ("test", (1, 3)))
    }
    put(root, {f"food-101/meta/{split}.txt": "\n".join(own) + "\n" for split, own in lists.items()})
    put(root, {f"food-101/meta/{split}.json": "{}" for split in lists})
    put(root, {"food-101/meta/classes.txt": "apple_pie\nwaffles\n", "food-101/meta/labels.txt": "Apple pie\nWaffles\n"})
    put(root, {"food-101/README.txt": "x", "food-101/license_agreement.txt": "x"})
    used = ("food-101/meta/train.txt", "food-101/meta/test.txt")
    return Expected({"train": 4, "val": 4}, names, unread=6, used=used, notes=1)


def birds(root: Path) -> Expected:
    names = ("001.Black_footed_Albatross", "002.Laysan_Albatross")
    files = [f"{name}/{name[4:]}_{i:04d}.jpg" for name in names for i in range(3)]
    images(root, [f"CUB_200_2011/images/{file}" for file in files])
    put(root, {
        "CUB_200_2011/images.txt": "".join(f"{i} {file}\n" for i, file in enumerate(files, 1)),
        "CUB_200_2011/train_test_split.txt": "".join(f"{i} {i % 3 != 0:d}\n" for i in range(1, 7)),
        "CUB_200_2011/image_class_labels.txt": "".join(f"{i} {1 + (i > 3)}\n" for i in range(1, 7)),
        "CUB_200_2011/classes.txt": "1 001.Black_footed_Albatross\n2 002.Laysan_Albatross\n",
        "CUB_200_2011/bounding_boxes.txt": "1 60.0 27.0 325.0 304.0\n",
        "CUB_200_2011/attributes/certainties.txt": "1 not visible\n",
        "CUB_200_2011/parts/parts.txt": "1 back\n",
        "attributes.txt": "1 has_bill_shape::curved\n",
    })  # fmt: skip
    used = ("CUB_200_2011/images.txt", "CUB_200_2011/train_test_split.txt")
    return Expected({"train": 4, "val": 2}, names, unread=6, used=used, notes=1)


def places(root: Path) -> Expected:
    images(
        root, ["data_256/a/airfield/1.jpg", "data_256/a/airfield/2.jpg", "data_256/a/apartment_building/outdoor/1.jpg"]
    )
    images(root, ["data_256/b/bakery/shop/1.jpg", "data_256/b/beach/1.jpg"])
    images(root, [f"val_256/Places365_val_{i:08d}.jpg" for i in (1, 2, 3)])
    rows = ["/a/airfield 0", "/a/apartment_building/outdoor 1", "/b/bakery/shop 2", "/b/beach 3"]
    put(root, {"categories_places365.txt": "\n".join(rows) + "\n"})
    put(root, {"places365_val.txt": "".join(f"Places365_val_{i:08d}.jpg {i - 1}\n" for i in (1, 2, 3))})
    put(root, {"places365_train_standard.txt": "/a/airfield/1.jpg 0\n"})
    classes = ("a/airfield", "a/apartment_building/outdoor", "b/bakery/shop", "b/beach")
    return Expected(
        {"train": 5, "val": 3},
        classes,
        labels="places365_val.txt",
        unread=1,
        used=("places365_val.txt", "categories_places365.txt"),
        notes=1,
    )


def imagenette(root: Path) -> Expected:
    for split in ("train", "val"):
        images(root, [f"imagenette2-160/{split}/{w}/ILSVRC2012_{split}_{i}.JPEG" for w in WNIDS for i in range(2)])
    put(root, {"imagenette2-160/noisy_imagenette.csv": "path,noisy_labels_0\ntrain/x,n1\n", ".DS_Store": "x"})
    return Expected({"train": 6, "val": 6}, WNIDS, unread=2)


def kaggle(root: Path) -> Expected:
    base = "ILSVRC/Data/CLS-LOC"
    images(root, [f"{base}/train/{w}/{w}_{i}.JPEG" for w in WNIDS for i in range(2)])
    names = [f"ILSVRC2012_val_{i:08d}" for i in range(1, 5)]
    images(root, [f"{base}/val/{name}.JPEG" for name in names])
    images(root, [f"{base}/test/ILSVRC2012_test_{i:08d}.JPEG" for i in range(1, 4)])
    out = io.StringIO()
    table = csv.writer(out)
    table.writerow(["ImageId", "PredictionString"])
    for i, name in reversed(list(enumerate(names))):
        table.writerow([name, f"{WNIDS[i % 3]} 85 1 499 272 {WNIDS[i % 3]} 1 2 3 4"])
    put(root, {
        "LOC_val_solution.csv": out.getvalue(),
        "LOC_train_solution.csv": f"ImageId,PredictionString\n{WNIDS[0]}_0,{WNIDS[0]} 1 2 3 4\n",
        "LOC_sample_submission.csv": "ImageId,PredictionString\nILSVRC2012_test_00000001,1 0 0 9 9\n",
        "LOC_synset_mapping.txt": "".join(f"{w} some, words\n" for w in WNIDS),
        "ILSVRC/ImageSets/CLS-LOC/val.txt": "".join(f"{name} {i}\n" for i, name in enumerate(names, 1)),
        "ILSVRC/ImageSets/CLS-LOC/train_cls.txt": f"{WNIDS[0]}/{WNIDS[0]}_0 1\n",
        f"ILSVRC/Annotations/CLS-LOC/val/{names[0]}.xml": "<annotation/>",
        f"ILSVRC/Annotations/CLS-LOC/train/{WNIDS[0]}/{WNIDS[0]}_0.xml": "<annotation/>",
    })  # fmt: skip
    used = ("LOC_val_solution.csv",)
    return Expected({"train": 6, "val": 4}, WNIDS, labels="LOC_val_solution.csv", unread=3 + 7, used=used)


def hub_repository(root: Path) -> Expected:
    for split, count in (("train", 4), ("validation", 2), ("test", 2)):
        parquet(root / f"data/{split}-00000-of-00001.parquet", count, ["cat", "dog"])
    put(root, {"README.md": "---\nlicense: mit\n---\n", ".gitattributes": "*.parquet filter=lfs\n"})
    return Expected({"train": 4, "val": 2}, ("cat", "dog"), "parquet", "named by the table's features", unread=3)


def hub_configuration(root: Path) -> Expected:
    parquet(root / "plain_text/train-00000-of-00001.parquet", 4, ["cat", "dog"], "img")
    parquet(root / "plain_text/test-00000-of-00001.parquet", 2, ["cat", "dog"], "img")
    put(root, {"README.md": "x"})
    return Expected({"train": 4, "val": 2}, ("cat", "dog"), "parquet", unread=1, notes=1)


def timm_wds(root: Path) -> Expected:
    tar(root / "imagenet1k-train-0000.tar", wds(0, 4))
    tar(root / "imagenet1k-train-0001.tar", wds(4, 4))
    tar(root / "imagenet1k-validation-00.tar", wds(8, 3))
    shards = {
        "train": ["imagenet1k-train-0000.tar", "imagenet1k-train-0001.tar"],
        "validation": ["imagenet1k-validation-00.tar"],
    }
    put(root, {"_info.json": json.dumps({"splits": {name: {"filenames": own} for name, own in shards.items()}})})
    put(root, {"README.md": "x"})
    return Expected({"train": 8, "val": 3}, ("0", "1", "2"), "webdataset", unread=1, used=("_info.json",))


def imagenet_hundred(root: Path) -> Expected:
    images(root, [f"train.X{k}/{w}/{i}.JPEG" for k, w in enumerate(WNIDS, 1) for i in range(2)])
    images(root, [f"val.X/{w}/0.JPEG" for w in WNIDS])
    put(root, {"Labels.json": json.dumps(dict.fromkeys(WNIDS, "a word"))})
    return Expected({"train": 6, "val": 3}, WNIDS, unread=1)


def imagenet_v2(root: Path) -> Expected:
    images(
        root, [f"imagenetv2-matched-frequency-format-val/{number}/{i}.jpeg" for number in range(12) for i in range(2)]
    )
    return Expected({"val": 24}, tuple(map(str, range(12))), labels="numbers")


def roboflow(root: Path) -> Expected:
    for split in ("train", "valid", "test"):
        images(root, [f"{split}/{name}/{name}_{i}.rf.0a1b.jpg" for name in ("ace", "king") for i in range(2)])
    put(root, {"README.roboflow.txt": "x", "README.dataset.txt": "x"})
    return Expected({"train": 4, "val": 4}, ("ace", "king"), unread=4 + 2)


def kaggle_competition(root: Path) -> Expected:
    images(root, [f"train/{name}/{i}.png" for name in ("cat", "dog") for i in range(3)])
    images(root, [f"test/{i}.png" for i in range(5)])
    put(root, {"sample_submission.csv": "id,label\n0,cat\n"})
    return Expected({"train": 6}, ("cat", "dog"), unread=6, choice=Choice(held_out=True))


def img2dataset(root: Path) -> Expected:
    for shard in range(2):
        described: dict[str, bytes] = {}
        for i in range(3):
            about = json.dumps({"caption": "x", "genus": i}).encode()
            for suffix, content in (("jpg", jpeg(i)), ("txt", b"a caption"), ("json", about)):
                described[f"{shard}{i:04d}.{suffix}"] = content
        tar(root / f"{shard:05d}.tar", described)
        put(root, {f"{shard:05d}_stats.json": "{}"})
        pyarrow_parquet.write_table(
            pyarrow.table({"url": ["x"] * 3, "status": ["success"] * 3}), root / f"{shard:05d}.parquet"
        )
    used = tuple(f"{shard:05d}{end}" for shard in range(2) for end in (".parquet", "_stats.json"))
    return Expected({"all": 6}, ("0", "1", "2"), "webdataset", used=used, choice=Choice(label="genus", one_split=True))


def downloads(root: Path) -> Expected:
    from scipy.io import savemat

    def inner(names: list[str]) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as file:
            for i, name in enumerate(names):
                info = tarfile.TarInfo(name)
                info.size = len(jpeg(i))
                file.addfile(info, io.BytesIO(jpeg(i)))
        return out.getvalue()

    tar(root / "ILSVRC2012_img_train.tar", {f"{w}.tar": inner([f"{w}_{i}.JPEG" for i in range(2)]) for w in WNIDS})
    tar(root / "ILSVRC2012_img_val.tar", {f"ILSVRC2012_val_{i:08d}.JPEG": jpeg(i) for i in range(1, 5)})
    tar(root / "ILSVRC2012_bbox_train_v2.tar.gz", {"x.xml": b"x"}, "w:gz")
    rows = [(i, w, 0) for i, w in enumerate(reversed(WNIDS), 1)]
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array(rows, dtype=[("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("num_children", "f8")])})
    files = {"meta.mat": meta.getvalue(), "ILSVRC2012_validation_ground_truth.txt": b"3\n2\n1\n3\n"}
    tar(root / "ILSVRC2012_devkit_t12.tar.gz", {f"ILSVRC2012_devkit_t12/data/{n}": c for n, c in files.items()}, "w:gz")
    used = ("ILSVRC2012_devkit_t12.tar.gz",)
    return Expected({"train": 6, "val": 4}, WNIDS, "imagenet", "devkit", unread=1, used=used)


def caltech(root: Path) -> Expected:
    images(
        root,
        [
            f"101_ObjectCategories/{name}/image_{i:04d}.jpg"
            for name in ("accordion", "BACKGROUND_Google")
            for i in range(2)
        ],
    )
    return Expected({"all": 4}, ("BACKGROUND_Google", "accordion"), choice=Choice(one_split=True))


LAYOUTS: dict[str, Callable[[Path], Expected]] = {
    make.__name__: make
    for make in (
        tiny_imagenet, food, birds, places, imagenette, kaggle, hub_repository, hub_configuration, timm_wds,
        imagenet_hundred, imagenet_v2, roboflow, kaggle_competition, img2dataset, downloads, caltech,
    )
}  # fmt: skip


def looked_at(root: Path, choice: Choice, **more: Any) -> Inspected:
    return inspect(str(root), choice, **more)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_public_layout_is_read_as_a_person_would_say(name: str, tmp_path: Path) -> None:
    root = tmp_path / "src"
    root.mkdir()
    expected = LAYOUTS[name](root)
    found = looked_at(root, expected.choice)
    claim = found.claim
    assert {split: len(labels) for split, labels in claim.splits.items()} == expected.splits
    assert (claim.classes, claim.format) == (expected.classes, expected.format)
    assert expected.labels in claim.labels
    assert tuple(sorted(claim.metadata)) == tuple(sorted(expected.used))
    assert sum(map(len, found.rest.values())) == expected.unread, found.rest
    assert len(claim.notes) == expected.notes, claim.notes
    assert found.found == found.holding + len(claim.metadata) + expected.unread
    screen = "\n".join(found.in_words())
    for split, count in expected.splits.items():
        assert f"  {'images' if split == 'all' else split:<9}{count} in " in screen
    assert f"classes  {len(expected.classes)}: {expected.classes[0]}" in screen
    assert json.loads(json.dumps(found.as_dict()))["classes"] == list(expected.classes)
    (tmp_path / "spool").mkdir()
    listing = found.listing(Spool(tmp_path / "spool"))
    assert {split: [sample.label for sample in samples] for split, samples in listing.splits.items()} == {
        split: list(labels) for split, labels in claim.splits.items()
    }
    assert all(
        sample.read().startswith(b"\xff\xd8\xff") or b"PNG" in sample.read()[:8]
        for own in listing.splits.values()
        for sample in own
    )


def test_labels_of_flat_folders_go_to_their_images(tmp_path: Path) -> None:
    """By name, not by order: Kaggle's table is written backwards, the devkit counts in an order of its own."""
    for make, wanted in (
        (kaggle, [0, 1, 2, 0]),
        (downloads, [0, 1, 2, 0]),
        (places, [0, 1, 2]),
        (tiny_imagenet, [0, 1, 2] * 2),
    ):
        root = tmp_path / make.__name__
        root.mkdir()
        assert list(looked_at(root, make(root).choice).claim.splits["val"]) == wanted


def test_without_its_label_img2dataset_is_refused(tmp_path: Path) -> None:
    img2dataset(tmp_path)
    with pytest.raises(DataError, match=r"00000\.tar, .* holds no class number.*--label"):
        looked_at(tmp_path, Choice(one_split=True))


def test_segmentations_beside_the_images_of_birds_are_not_taken_for_classes(tmp_path: Path) -> None:
    birds(tmp_path)
    images(tmp_path, ["CUB_200_2011/segmentations/001.Black_footed_Albatross/x.png"])
    with pytest.raises(DataError, match=r"--class-level 1 or 2, or leave folders out with --ignore"):
        looked_at(tmp_path, Choice())
    found = looked_at(tmp_path, Choice(), ignore=("segmentations",))
    assert {split: len(own) for split, own in found.claim.splits.items()} == {"train": 4, "val": 2}


def test_the_cache_of_the_hub_is_links_out_of_the_source(tmp_path: Path) -> None:
    parquet(tmp_path / "blobs" / "0a1b", 4, ["cat", "dog"])
    place = tmp_path / "snapshots" / "c0ffee" / "data"
    place.mkdir(parents=True)
    (place / "train-00000-of-00001.parquet").symlink_to(tmp_path / "blobs" / "0a1b")
    with pytest.raises(DataError, match=r"train-00000-of-00001\.parquet: a link that leads out .*--follow-links"):
        looked_at(place.parent, Choice())
    assert len(looked_at(place.parent, Choice(), follow_links=True).claim.splits["train"]) == 4


def test_an_incomplete_set_of_timm_is_refused(tmp_path: Path) -> None:
    timm_wds(tmp_path)
    (tmp_path / "imagenet1k-train-0001.tar").unlink()
    with pytest.raises(DataError, match=r"lists the shard 'imagenet1k-train-0001\.tar'"):
        looked_at(tmp_path, Choice())
