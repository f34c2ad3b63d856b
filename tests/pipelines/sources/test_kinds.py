"""Kinds of sources that would be misread: each is read right, or refused with a sentence that says what to do."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_layouts import images, jpeg, parquet, put, pyarrow, pyarrow_parquet, tar, wds

from pipelines.base import DataError
from pipelines.sources.listing import Choice, Inspected, Spool, inspect

NONE = Choice()


def look(root: Path, choice: Choice = NONE, **more: Any) -> Inspected:
    return inspect(str(root), choice, **more)


def refused(root: Path, told: str, choice: Choice = NONE) -> None:
    with pytest.raises(DataError, match=told):
        look(root, choice).listing(Spool(_spool(root)))


def _spool(root: Path) -> Path:
    folder = root.parent / f"{root.name}-spool"
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    return folder


@pytest.fixture
def src(tmp_path: Path) -> Path:
    (tmp_path / "src").mkdir()
    return tmp_path / "src"


# --- splits


@pytest.mark.parametrize(
    ("train", "val"),
    [("training", "Validation"), ("TRAIN", "dev"), ("train-images", "val_images"), ("train2017", "val2017")],
)
def test_splits_as_people_call_them(train: str, val: str, src: Path) -> None:
    images(src, [f"{train}/a/1.jpg", f"{train}/b/1.jpg", f"{val}/a/1.jpg"])
    found = look(src).claim
    assert {split: len(own) for split, own in found.splits.items()} == {"train": 2, "val": 1}


@pytest.mark.parametrize("name", ["my-{}-000.tar", "{}.tar", "shards/{}/000.tar", "data.{}.000.tar"])
def test_splits_in_the_names_of_shards(name: str, src: Path) -> None:
    for number, split in enumerate(("train", "dev")):
        tar(src / name.format(split), wds(3 * number, 3))
    assert {split: len(own) for split, own in look(src).claim.splits.items()} == {"train": 3, "val": 3}


def test_names_that_say_two_splits_are_refused(src: Path) -> None:
    tar(src / "train" / "val-000.tar", wds(0, 3))
    refused(src, r"val-000\.tar is called like two splits, train and val")
    (src / "train" / "val-000.tar").rename(src / "train" / "000.tar")
    tar(src / "other.tar", wds(3, 3))
    refused(src, r"other\.tar is of no known split")


def test_two_folders_for_one_split_are_refused(src: Path) -> None:
    images(src, ["val/a/1.jpg", "valid/a/1.jpg", "train/a/1.jpg"])
    refused(src, "has two folders for val: val, valid")


def test_a_class_that_is_called_like_a_split(src: Path) -> None:
    images(src, ["bus/1.jpg", "train/1.jpg"])
    refused(src, "train is called like a split and .*bus beside it like a class; .*--class-level 1")
    assert look(src, Choice(class_level=1)).claim.classes == ("bus", "train")
    assert look(src, Choice(one_split=True)).claim.classes == ("bus", "train")


@pytest.mark.parametrize(("there", "lacking"), [((2, 3), 1), ((1, 3), 2), ((0, 2), 1), ((0, 1), 2)])
def test_missing_parts_are_named_from_whatever_they_count(there: tuple[int, ...], lacking: int, src: Path) -> None:
    for number in there:
        parquet(src / f"train-{number}-of-3.parquet", 2)
    refused(src, rf"train-{lacking}-of-3\.parquet is missing: 2 of 3 files")


# --- labels in text


FLAT = [f"val/im_{i:03d}.jpg" for i in range(4)]


@pytest.mark.parametrize(
    "text",
    [
        "im_000.jpg,a\nim_001.jpg,b\nim_002.jpg,a\nim_003.jpg,b\n",
        "\ufefffile,class\r\nim_003,b\r\nim_002,a\r\nim_001,b\r\nim_000,a\r\n",
        '"im_000.JPEG","a"\n"im_001.JPEG","b"\n"im_002.JPEG","a"\n"im_003.JPEG","b"\n',
        "val/im_000.jpg,a\nval/im_001.jpg,b\n./val/im_002.jpg,a\ntrain/im_002.jpg,b\nval/im_003.jpg,b\n",
    ],
)
def test_tables_of_labels(text: str, src: Path) -> None:
    images(src, ["train/a/1.jpg", "train/b/1.jpg", *FLAT])
    put(src, {"labels.csv": text})
    assert list(look(src).claim.splits["val"]) == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("x.csv", "im_000.jpg,a\nim_001.jpg,b\n", r"x\.csv has no line for im_002\.jpg, one of 2"),
        ("x.csv", "im_000.jpg,a\nim_000.jpg,b\nim_001.jpg,b\nim_002.jpg,a\nim_003.jpg,b\n", "labels im_000.jpg twice"),
        ("x.txt", "im_000.jpg 1\nim_001.jpg 2\nim_002.jpg 1\nim_003.jpg 2\n", "has label 2, but there are 2 training"),
        (
            "x.txt",
            "im_000.jpg c\nim_001.jpg b\nim_002.jpg a\nim_003.jpg b\n",
            "names the class 'c', which is no training",
        ),
        (
            "x.txt",
            "".join(f"im_00{i}.jpg great white shark\n" for i in range(4)),
            "the class 'great white shark'",
        ),
        ("x.txt", "0\n1\n0\n1\n", "holds numbers of ImageNet's devkit or of another list"),
        ("x.md", "im_000.jpg a\n", "4 images without class folders, and no text file labels them"),
    ],
)
def test_labels_that_are_not_certain_are_refused(name: str, text: str, told: str, src: Path) -> None:
    images(src, ["train/a/1.jpg", "train/b/1.jpg", *FLAT])
    put(src, {name: text})
    refused(src, told)


def test_two_files_that_label_differently_are_refused(src: Path) -> None:
    images(src, ["train/a/1.jpg", "train/b/1.jpg", *FLAT])
    put(src, {"one.txt": "a\nb\na\nb\n", "two.txt": "b\nb\na\nb\n"})
    refused(src, r"one\.txt and .*two\.txt label the images differently")


@pytest.mark.parametrize("names", [["9.jpg", "10.jpg"], ["a1.jpg", "a02.jpg", "a10.jpg"]])
def test_a_label_a_line_needs_an_order_that_is_certain(names: list[str], src: Path) -> None:
    images(src, ["train/a/1.jpg", "train/b/1.jpg", *(f"val/{name}" for name in names)])
    put(src, {"labels.txt": "a\n" * len(names)})
    refused(src, "do not say which line is whose; write FILE CLASS on each line")


# --- classes


def test_names_equal_but_for_their_unicode_form_are_refused(src: Path) -> None:
    images(src, ["train/caf\u00e9/1.jpg", "train/cafe\u0301/1.jpg"])
    refused(src, r"two names that differ in their Unicode form alone")


def test_class_folders_that_training_lacks_or_that_are_empty(src: Path) -> None:
    images(src, ["train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "val/B/1.jpg"])
    refused(src, "has the class 'B' in the val split, which is no training class")
    (src / "val/B").rename(src / "val/b")
    (src / "train/c").mkdir()
    refused(src, r"class folder .*train/c holds no image that is read")


@pytest.mark.parametrize("names", [("a/x/1.jpg", "b/y/1.jpg"), ("a/x/1.jpg", "a/y/1.jpg", "b/1.jpg")])
def test_nested_folders_that_may_be_classes_are_asked_about(names: tuple[str, ...], src: Path) -> None:
    images(src, [f"train/{name}" for name in names])
    refused(src, "Say --class-level 1 or 2")
    assert look(src, Choice(class_level=1)).claim.classes == ("a", "b")


# --- links, pipes, permissions


@pytest.mark.parametrize("kind", ["pipe", "socket", "nowhere", "circle", "outside", "above"])
def test_what_is_no_plain_file_is_named(kind: str, src: Path, tmp_path: Path) -> None:
    images(src, ["a/1.jpg", "b/1.jpg"])
    odd = src / "b" / "odd.jpg"
    if kind == "pipe":
        os.mkfifo(odd)
    elif kind == "socket":
        import socket

        here = Path.cwd()
        os.chdir(odd.parent)  # a socket's path is short
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(odd.name)
        os.chdir(here)
    else:
        targets = {"nowhere": tmp_path / "none", "circle": odd, "outside": Path("/etc/hostname"), "above": src}
        odd.symlink_to(targets[kind])
    told = {"pipe": "no plain file", "socket": "no plain file", "nowhere": "not there", "outside": "leads out"}
    refused(src, rf"odd\.jpg: .*{told.get(kind, 'in circles')}")
    assert look(src, ignore=("odd.jpg",)).holding == 2


def test_links_within_a_source_are_followed(src: Path) -> None:
    images(src, ["train/a/1.jpg", "train/b/1.jpg"])
    (src / "val").mkdir()
    (src / "val" / "a").symlink_to(src / "train" / "a")
    assert {split: len(own) for split, own in look(src).claim.splits.items()} == {"train": 2, "val": 1}


def test_a_pattern_that_fits_nothing_is_refused(src: Path) -> None:
    images(src, ["a/1.jpg", "b/1.jpg"])
    with pytest.raises(DataError, match=r"--ignore \*\.png fits nothing"):
        look(src, ignore=("*.png",))


# --- tars


def test_two_archives_that_were_joined_are_refused(src: Path, tmp_path: Path) -> None:
    for number in range(2):
        tar(tmp_path / f"{number}.tar", wds(3 * number, 3))
    (src / "train-0.tar").write_bytes((tmp_path / "0.tar").read_bytes() + (tmp_path / "1.tar").read_bytes())
    refused(src, r"train-0\.tar goes on behind its end")


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ({"1.jpg": jpeg(), "1.jpeg": jpeg(), "1.cls": b"0"}, "expected one image in a sample, found jpg, jpeg"),
        ({"1.a.jpg": jpeg(), "1.b.png": jpeg(), "1.cls": b"0"}, r"say which with --images a\.jpg"),
        ({"1.jpg": jpeg(), "1.a.cls": b"0", "1.b.cls": b"1"}, "two members may hold the class"),
        ({"1.jpg": jpeg(), "2.jpg": jpeg(), "1.cls": b"0"}, r"expected a \.cls"),
        ({"1.jpg": jpeg(), "1.cls": b"0", "2.jpg": jpeg(), "2.cls": b"0", "1.png": jpeg()}, "in two places"),
        ({"1.jpg": jpeg(), "1.cls": b"2000000000"}, "holds no class number"),
        ({"1.jpg": jpeg(), "1.cls": b"999999999"}, "has the label 999999999, and 1 samples"),
        ({"1.jpg": jpeg(), "1.cls": b"-1"}, "has the label -1"),
        ({"1.jpg": jpeg(), "1.cls": "٣".encode()}, "holds no class number"),
        ({"1.jpg": jpeg(), "1.cls": b"9" * 5000}, "holds no class number"),
        ({"1.jpg": jpeg(), "1.json": b'{"label": 1.5}'}, "holds no class number"),
        ({"1.jpg": jpeg(), "1.json": b'{"label": true}'}, "holds no class number"),
        ({"1.jpg": jpeg(), "1.json": b'{"label": [0]}'}, "holds no class number"),
        ({"1.jpg": jpeg(), "1.json": b"[" * 100_000}, "holds no class number"),
        ({"1.jpg": jpeg(), "1.lab": b"\0\0"}, "holds no class number"),
        ({"readme": b"x"}, "expected one image in a sample, found none"),
    ],
)
def test_samples_that_are_not_certain_are_refused(members: dict[str, bytes], told: str, src: Path) -> None:
    tar(src / "train-0.tar", members)
    refused(src, told)


def test_of_two_images_one_can_be_chosen(src: Path) -> None:
    tar(src / "train-0.tar", {"1.a.jpg": jpeg(1), "1.b.jpg": jpeg(2), "1.cls": b"0"})
    (sample,) = look(src, Choice(images="b.jpg")).listing(Spool(src)).splits["train"]
    assert sample.read() == jpeg(2)


def test_long_headers_and_odd_members_of_tars(src: Path) -> None:
    name = "x" * 200 + "/1"
    tar(src / "train-0.tar", {f"{name}.jpg": jpeg(), f"{name}.cls": b"0", "._1.jpg": b"fork"})
    claim = look(src).claim
    assert (len(claim.splits["train"]), claim.members["train"]["left by an operating system"]) == (1, 1)
    with tarfile.open(src / "train-0.tar", "w", format=tarfile.PAX_FORMAT) as file:
        info = tarfile.TarInfo("1.jpg")
        info.pax_headers = {"comment": "x" * (2 << 20)}
        file.addfile(info)
    refused(src, r"train-0\.tar is damaged or no tar \(a header of \d+ bytes\)")
    with tarfile.open(src / "train-0.tar", "w") as file:
        for kind in (tarfile.LNKTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo("1.jpg")
            info.type, info.linkname = kind, "etc/passwd"
            file.addfile(info)
    refused(src, "is no plain file")


# --- tables


def rows(path: Path, **columns: Any) -> None:
    pyarrow_parquet.write_table(pyarrow.table(columns), path)


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"image": [jpeg()] * 2, "id": [0, 1]}, "has no certain label column"),
        ({"image": [jpeg()] * 2, "label": [0.0, 1.0]}, "has no certain label column"),
        ({"image": [jpeg()] * 2, "label": [[0], [1]]}, "has no certain label column"),
        ({"image": [jpeg()] * 2, "label": [0, 1], "class": [1, 0]}, r"label, class may be it.*--label COLUMN"),
        ({"image": [jpeg()] * 2, "label": [0, None]}, "row 1 has no label"),
        ({"one": [jpeg()] * 2, "two": [jpeg()] * 2, "label": [0, 1]}, "several image columns, one, two; say --images"),
        ({"image": [jpeg(), None], "label": [0, 1]}, "row 1 names an image file instead of holding it"),
        ({"image": [jpeg()] * 2, "label": [0, 10**12]}, "has the label 1000000000000, and 2 samples"),
        ({"image": [jpeg()] * 2, "label": [1, 1]}, "class '0' has no image"),
    ],
)
def test_tables_that_are_not_certain_are_refused(columns: dict[str, Any], told: str, src: Path) -> None:
    rows(src / "train.parquet", **columns)
    refused(src, told)


def test_columns_can_be_named(src: Path) -> None:
    rows(src / "train.parquet", one=[jpeg(1)] * 2, two=[jpeg(2)] * 2, kind=["b", "a"], label=[0, 1])
    found = look(src, Choice(images="two", label="kind"))
    assert (found.claim.classes, list(found.claim.splits["train"])) == (("a", "b"), [1, 0])
    assert found.listing(Spool(_spool(src))).splits["train"][0].read() == jpeg(2)
    words = pyarrow.array(["b", "a"]).dictionary_encode()
    rows(src / "train.parquet", image=[jpeg()] * 2, label=words)
    assert look(src).claim.classes == ("a", "b")
    refused(src, "--label other is no column of it", Choice(label="other"))


def test_fewer_names_than_labels_are_refused(src: Path) -> None:
    parquet(src / "train.parquet", 4, ["only"])
    refused(src, "has the label 1, but there are 1 classes")


def test_configurations_and_files_without_images_are_refused(src: Path) -> None:
    for name in ("fine", "coarse"):
        parquet(src / name / "train-00000-of-00001.parquet", 2)
    refused(src, "holds 2 configurations, coarse, fine")
    parquet(src / "train.parquet", 2)
    for name in ("fine", "coarse"):
        (src / name / "train-00000-of-00001.parquet").unlink()
    rows(src / "train-more.parquet", url=["x"])
    refused(src, r"train-more\.parquet has no column of images")


# --- pickles


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({b"data": "no array"}, "does not hold images with a label each"),
        ({b"data": np.zeros((2, 3072), np.float32)}, "does not hold images with a label each"),
        ({b"fine_labels": [0, 10**9]}, "does not hold images with a label each"),
        ({b"fine_labels": None}, "does not hold images with a label each"),
        ([], "is not what CIFAR holds"),
    ],
)
def test_pickles_of_other_things_are_refused(change: Any, told: str, src: Path) -> None:
    good = {b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [0, 1]}
    files = {
        "train": good,
        "test": good | change if isinstance(change, dict) else change,
        "meta": {b"fine_label_names": [b"a", b"b"]},
    }
    for name, content in files.items():
        put(src, {f"cifar-100-python/{name}": pickle.dumps(content, protocol=2)})
    refused(src, told)
    put(src, {"cifar-100-python/test": pickle.dumps(good, protocol=2), "cifar-100-python/file.txt~": ""})
    assert look(src).claim.unused == {"its own description": ["cifar-100-python/file.txt~"]}
    put(src, {"cifar-100-python/meta": pickle.dumps({b"fine_label_names": "ab"}, protocol=2)})
    refused(src, "does not name the classes")


def test_an_archive_beside_its_folder_is_two_of_the_same(src: Path) -> None:
    put(src, {"cifar-10-batches-py/data_batch_1": b"", "cifar-10-python.tar.gz": b""})
    refused(src, "holds CIFAR twice")
    images(src, ["train/n1/1.jpg", "val/n1/1.jpg"])
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w"):
        pass
    put(src, {"ILSVRC2012_img_train.tar": out.getvalue()})
    refused(src, r"holds the train split twice, ILSVRC2012_img_train\.tar and the folder train/")


def test_hidden_and_large_numbers_of_files_do_no_harm(src: Path) -> None:
    images(src, ["a/1.jpg", "b/1.jpg"])
    for number in range(3000):
        (src / "a" / f".{number}").touch()
    found = look(src)
    assert (found.holding, len(found.rest["hidden"])) == (2, 3000)
    account = found.account()["files"]["not_read"]["hidden"]
    assert (account["count"], len(account["names"])) == (3000, 100)
    assert len(json.dumps(found.account())) < 10_000
