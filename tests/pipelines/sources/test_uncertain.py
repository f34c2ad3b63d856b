"""What only looks like labels, splits or classes is asked about; what an option says is done, or refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_kinds import look, refused, rows
from test_layouts import LAYOUTS, WNIDS, images, jpeg, parquet, put, pyarrow, pyarrow_parquet, tar, wds

from pipelines.base import DataError
from pipelines.sources import texts
from pipelines.sources.columns import tree
from pipelines.sources.listing import Choice

ROOT = Path(__file__).parents[3]
CLASSES = ["train/a/1.jpg", "train/b/1.jpg"]
FLAT = ["val/x1.jpg", "val/x2.jpg"]


@pytest.fixture
def src(tmp_path: Path) -> Path:
    (tmp_path / "src").mkdir()
    return tmp_path / "src"


def sizes(root: Path, choice: Choice | None = None, **more: Any) -> dict[str, int]:
    found = look(root, choice or Choice(), **more)
    assert found.found == found.holding + len(found.claim.metadata) + sum(map(len, found.rest.values()))
    if found.claim.format == "folders":
        assert found.holding == sum(map(len, found.claim.splits.values()))
    return {split: len(labels) for split, labels in found.claim.splits.items()}


# --- whose labels a text file holds


@pytest.mark.parametrize("name", ["sample_submission.csv", "sampleSubmission.csv", "gender_submission.csv"])
def test_an_example_of_what_to_hand_in_labels_nothing(name: str, src: Path) -> None:
    images(src, [*CLASSES, "test/7.jpg", "test/8.jpg"])
    put(src, {name: "id,label\n7,a\n8,a\n"})
    assert sizes(src) == {"train": 2}
    assert look(src).rest == {
        "test images without labels": ["test/7.jpg", "test/8.jpg"],
        "neither images nor labels": [name],
    }


@pytest.mark.parametrize(
    "text",
    [
        "file,width,class\nx1.jpg,0,b\nx2.jpg,1,a\n",
        "id;breed;age\nx1;b;0\nx2;a;1\n",
        "file;class\nx1.jpg;b\nx2.jpg;a\n",
        "x1.jpg,b 0 0 9 9\nx2.jpg,a 0 0 9 9 b 1 1 2 2\n",
        "x1.jpg,b,0,0,9,9\nx2.jpg,a,0,0,9,9\n",
    ],
)
def test_of_several_columns_the_class_is_the_one_called_so(text: str, src: Path) -> None:
    images(src, CLASSES + FLAT)
    put(src, {"labels.csv": text})
    assert list(look(src).claim.splits["val"]) == [1, 0]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        (
            "l.csv",
            "file,width,kind\nx1.jpg,0,b\nx2.jpg,1,a\n",
            "a line of 3 entries, and it is not certain which is the",
        ),
        ("l.csv", "file,label,class\nx1.jpg,a,b\nx2.jpg,b,a\n", "a line of 3 entries"),
        ("l.txt", "x1 1 2 1\nx2 5 1 2\n", r"a line of 4 entries, .* keep FILE and CLASS"),
        ("l.csv", b"x1.jpg,\xe9\nx2.jpg,a\n", r"l\.csv is not UTF-8; save it"),
        ("l.txt", b"\0" * 100_000, r"l\.txt has a line of more than 65536 characters"),
        ("classes.txt", "a\nb\n", "val/x1.jpg"),
    ],
)
def test_text_that_is_not_certain_is_refused(name: str, text: Any, told: str, src: Path) -> None:
    images(src, CLASSES + FLAT + (["val/x3.jpg"] if name == "classes.txt" else []))
    if name == "classes.txt":  # a list of three classes beside three images
        images(src, ["train/c/1.jpg"])
        text, told = text + "c\n", "3 images without class folders, and no text file labels them"
    put(src, {name: text})
    refused(src, told)


def test_text_is_read_up_to_a_bound(src: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images(src, CLASSES + FLAT)
    put(src, {"l.csv": "a,b\n" * 9 + "x1.jpg,a\nx2.jpg,b\n"})
    assert list(look(src).claim.splits["val"]) == [0, 1]
    monkeypatch.setattr(texts, "_MAX_LINES", 10)
    refused(src, r"l\.csv has more than 10 lines")
    monkeypatch.setattr(texts, "_MAX_BYTES", 1)
    refused(src, r"l\.csv has more than 0 MiB")


@pytest.mark.parametrize("labels", ["labels.csv", "train_labels.csv", "train/labels.csv"])
def test_labels_of_training_images_are_not_those_of_others_with_the_same_name(labels: str, src: Path) -> None:
    images(src, [*(f"train/{i}.jpg" for i in range(4)), "test/0.jpg", "test/1.jpg"])
    put(src, {labels: "0.jpg,a\n1.jpg,b\n2.jpg,a\n3.jpg,b\n"})
    if labels == "labels.csv":
        refused(src, r"labels\.csv does not say the folder of its files, and there are several 0\.jpg")
    else:
        assert sizes(src) == {"train": 4}
        assert list(look(src).claim.splits["train"]) == [0, 1, 0, 1]
    put(src, {labels: "".join(f"train/{i}.jpg,{'ab'[i % 2]}\n" for i in range(4)) + "test/0.jpg,b\ntest/1.jpg,b\n"})
    found = look(src).claim
    assert list(found.splits["train"]) == [0, 1, 0, 1]
    assert list(found.splits.get("val", ())) == ([1, 1] if labels == "labels.csv" else [])


def test_labels_beside_the_images_of_each_split(src: Path) -> None:
    images(src, ["train/0.jpg", "train/1.jpg", "train/2.jpg", "validation/0.jpg", "validation/1.jpg"])
    put(src, {"train/metadata.csv": "file_name,label\n0.jpg,cat\n1.jpg,dog\n2.jpg,cat\n"})
    put(src, {"validation/metadata.csv": "file_name,label\n0.jpg,dog\n1.jpg,cat\n"})
    found = look(src).claim
    assert found.labels == "train/metadata.csv, and validation/metadata.csv, in the order of their names"
    assert {split: list(labels) for split, labels in found.splits.items()} == {"train": [0, 1, 0], "val": [1, 0]}
    put(src, {"validation/metadata.csv": "file_name,label\n0.jpg,dog\n1.jpg,emu\n"})
    refused(src, "names the class 'emu', which is no training class")
    put(src, {"train/metadata.csv": "file_name,text\n0.jpg,a cat\n1.jpg,a dog\n2.jpg,an emu\n"})
    refused(src, "gives each of the 3 images in .*train a class of its own, so it names something else")


# --- what is a class


@pytest.mark.parametrize("folder", ["jpg", "images", "Images", "train/images", "train/train", "data/images"])
def test_a_folder_that_only_holds_the_images_is_no_class(folder: str, src: Path) -> None:
    images(src, [f"{folder}/image_{i}.jpg" for i in range(4)])
    put(src, {"setid.mat": "x"})
    refused(src, rf"{folder} holds 4 images without class folders, and no text file labels them")
    put(src, {"labels.csv": "id,label\n" + "".join(f"image_{i},{i % 2}\n" for i in range(4))})
    found = look(src).claim
    assert (found.classes, list(*found.splits.values())) == (("0", "1"), [0, 1, 0, 1])


def test_one_class_only_is_said_and_a_table_goes_before_it(src: Path) -> None:
    images(src, [f"flowers/{i}.jpg" for i in range(3)])
    assert look(src).claim.notes == ["there is one class only, flowers"]
    put(src, {"labels.csv": "0.jpg,rose\n1.jpg,lily\n2.jpg,rose\n"})
    assert look(src).claim.classes == ("lily", "rose")
    assert look(src, Choice(class_level=1)).claim.classes == ("flowers",)


def test_classes_that_are_all_called_like_splits(src: Path) -> None:
    images(src, ["bullet train/1.jpg", "freight train/1.jpg"])
    refused(src, "two folders for train: bullet train, freight train; .*--class-level 1")
    assert look(src, Choice(class_level=1)).claim.classes == ("bullet train", "freight train")


def test_a_split_without_an_image_is_said(src: Path) -> None:
    images(src, CLASSES)
    (src / "val").mkdir()
    assert look(src).claim.notes == ["val is called like a split and holds no image"]


# --- nothing is lost beside what is read


@pytest.mark.parametrize("stray", ["1.jpg", "overview.png"])
def test_an_image_beside_the_splits_is_refused(stray: str, src: Path) -> None:
    images(src, [*CLASSES, "val/a/1.jpg", stray])
    refused(src, rf"{stray} lies beside the folders of the splits; move it, or leave it out with --ignore '\./{stray}'")
    assert sizes(src, ignore=(f"./{stray}",)) == {"train": 2, "val": 1}  # and not those of the same name elsewhere


@pytest.mark.parametrize(
    ("pattern", "left"), [("1.jpg", 2), ("./1.jpg", 5), ("*/[[]x].jpg", 5), ("a/[x].jpg", 5), ("./a", 4)]
)
def test_patterns_of_what_is_left_out(pattern: str, left: int, src: Path) -> None:
    images(src, ["1.jpg", "a/1.jpg", "a/[x].jpg", "b/1.jpg", "b/a/1.jpg", "b/2.jpg"])
    assert len(list(tree.list_tree(src, (pattern,)).files())) == left


@pytest.mark.parametrize("stray", ["overview.png", "more/a/1.png"])
def test_an_image_beside_the_archives_of_imagenet_is_refused(stray: str, src: Path) -> None:
    LAYOUTS["downloads"](src)
    images(src, [stray])
    refused(src, rf"{stray} is an image; move it away, or leave it out with --ignore '(\./)?{stray}'")
    assert sizes(src, ignore=(stray,)) == {"train": 6, "val": 4}


def test_shards_that_are_empty_or_missing(src: Path) -> None:
    for number in (0, 1, 3):
        tar(src / f"train-{number:06d}.tar", wds(3 * number, 3))
    assert look(src).claim.notes == ["train-000002.tar is not there: 3 shards from 0 to 3"]
    tar(src / "train-000002.tar", {})
    refused(src, r"train-000002\.tar holds no sample; download it again")


@pytest.mark.parametrize("lists", ["2", "yes"])
def test_lists_of_splits_say_nothing_else(lists: str, src: Path) -> None:
    LAYOUTS["birds"](src)
    put(src, {"CUB_200_2011/train_test_split.txt": "".join(f"{i} {lists if i == 2 else 1}\n" for i in range(1, 7))})
    refused(src, rf"train_test_split\.txt holds '{lists}'; expected 1 for training and 0 for test")


# --- several words for one label


@pytest.mark.parametrize("label", [{"label": 0, "class": 1}, {"cls": 1, "label": "0"}])
def test_entries_that_contradict_each_other_are_refused(label: dict[str, Any], src: Path) -> None:
    tar(src / "train-0.tar", {"1.jpg": jpeg(), "1.json": json.dumps(label).encode()})
    if all(type(value) is int for value in label.values()):
        refused(src, r"1\.json has several entries that may be the label, and they differ")
    assert list(look(src, Choice(label="label"), ignore=()).claim.splits["train"]) == [0]


def test_the_name_of_a_class_is_no_contradiction_to_its_number(src: Path) -> None:
    tar(src / "train-0.tar", {"1.jpg": jpeg(), "1.json": b'{"label": 0, "class": "cat"}'})
    found = look(src).claim
    assert (list(found.splits["train"]), found.labels) == (
        [0],
        ".json in each sample, classes in its order, named by .json",
    )


def test_an_entry_that_is_asked_for_must_be_there(src: Path) -> None:
    tar(src / "train-0.tar", wds(0, 3))
    refused(
        src, r"--label genus names an entry of a \.json member, and its sample has 0 of them", Choice(label="genus")
    )
    refused(src, "--label  names an entry", Choice(label=""))


@pytest.mark.parametrize("content", [b"\xef\xbb\xbfa\r\nb\r\nc\r\n", b"a\nb\nc"])
def test_names_of_classes_beside_shards(content: bytes, src: Path) -> None:
    tar(src / "train-0.tar", wds(0, 3))
    (src / "classes.txt").write_bytes(content)
    assert look(src).claim.classes == ("a", "b", "c")


# --- tables that do not agree with each other


@pytest.mark.parametrize(("one", "other"), [("train-0-of-2", "train-1-of-2"), ("train", "validation")])
def test_files_that_number_their_classes_otherwise_are_refused(one: str, other: str, src: Path) -> None:
    parquet(src / f"{one}.parquet", 2, ["a", "b"])
    for names, told in (
        (["b", "a"], r"\('a' and 'b'\)"),
        (["a", "b", "c"], "2 and 3 classes"),
        (None, "only one of them"),
    ):
        parquet(src / f"{other}.parquet", 2, names)
        refused(src, rf"{other}\.parquet names the classes of 'label' otherwise than .*{one}\.parquet does.*{told}")
    parquet(src / f"{other}.parquet", 2, ["a", "b"], column="img")
    refused(src, rf"{other}\.parquet has no column 'image', as .*{one}\.parquet has")


@pytest.mark.parametrize("labels", [["0", "1"], ["cat", "dog"]])
def test_words_in_one_file_and_numbers_in_another_are_refused(labels: list[str], src: Path) -> None:
    rows(src / "train-0-of-2.parquet", image=[jpeg()] * 2, label=[0, 1])
    rows(src / "train-1-of-2.parquet", image=[jpeg()] * 2, label=labels)
    refused(src, "column 'label' is of int and str in different files")


def test_words_that_are_numbers_are_ordered_as_numbers(src: Path) -> None:
    rows(src / "train.parquet", image=[jpeg()] * 3, label=["10", "9", "2"])
    found = look(src).claim
    assert (found.classes, list(found.splits["train"])) == (("2", "9", "10"), [2, 1, 0])
    rows(src / "train.parquet", image=[jpeg()] * 3, label=["1", "01", "2"])
    refused(src, "'01' and '1' .* are one number")


def test_a_file_that_a_saved_set_lists_twice_is_refused(src: Path) -> None:
    table = pyarrow.table({"image": [jpeg()] * 2, "label": [0, 1]})
    with pyarrow.ipc.new_stream(str(src / "data.arrow"), table.schema) as stream:
        stream.write_table(table)
    put(src, {"state.json": json.dumps({"_data_files": [{"filename": "data.arrow"}]})})
    assert sizes(src) == {"all": 2}
    put(src, {"state.json": json.dumps({"_data_files": [{"filename": "data.arrow"}] * 2})})
    refused(src, r"state\.json lists a file twice")


# --- options that decide nothing


@pytest.mark.parametrize("layout", ["imagenette", "timm_wds", "caltech"])
def test_test_images_that_are_not_there_cannot_be_asked_for(layout: str, src: Path) -> None:
    LAYOUTS[layout](src)
    refused(src, "--use-test asks for test images, and .* has none", Choice(use_test=True))


@pytest.mark.parametrize("layout", ["hub_repository", "roboflow", "food", "hub_configuration"])
def test_test_images_can_be_asked_for(layout: str, src: Path) -> None:
    LAYOUTS[layout](src)
    assert set(sizes(src, Choice(use_test=True))) == {"train", "val"}


@pytest.mark.parametrize("kind", ["folders", "tars", "tables", "images"])
def test_nothing_is_held_out_of_test_images(kind: str, src: Path) -> None:
    if kind == "folders":
        images(src, ["test/a/1.jpg", "test/b/1.jpg"])
    elif kind == "tars":
        tar(src / "test-0.tar", wds(0, 3))
    elif kind == "tables":
        parquet(src / "test.parquet", 4)
    else:
        images(src, ["test/1.jpg", "test/2.jpg"])
        return refused(src, "2 images without class folders, and no text file labels them", Choice(held_out=True))
    refused(src, "has test images only, and --val-fraction takes validation images from others", Choice(held_out=True))
    assert set(sizes(src)) == {"val"}


@pytest.mark.parametrize("option", [{"class_order": "name"}, {"class_level": 1}, {"images": "*.x"}])
def test_the_archives_of_imagenet_leave_nothing_to_decide(option: dict[str, Any], src: Path) -> None:
    LAYOUTS["downloads"](src)
    refused(src, rf"--{next(iter(option)).replace('_', '-')} means nothing for .*img_train\.tar", Choice(**option))


@pytest.mark.parametrize("pattern", ["*.jpg", "*.nothing", "[", ""])
def test_a_pattern_of_images_that_names_no_further_one_is_refused(pattern: str, src: Path) -> None:
    images(src, CLASSES)
    refused(src, "--images .* fits no file of .* but images that are read anyway", Choice(images=pattern))


@pytest.mark.parametrize("order", ["/dev/zero", ".", "/dev/null"])
def test_an_order_that_is_no_file_is_refused(order: str, src: Path) -> None:
    images(src, CLASSES)
    refused(src, "--class-order", Choice(class_order=order))


# --- what ends, and what may be read


def test_links_to_links_do_not_make_a_listing_endless(src: Path) -> None:
    images(src, ["d0/1.jpg"])
    for level in range(1, 30):  # 2^29 ways to one image
        (src / f"d{level}").mkdir()
        for name in "xy":
            (src / f"d{level}" / name).symlink_to(f"../d{level - 1}")
    refused(src, f"is reached in more than {tree._MAX_VISITS} ways, through links")


PRIVATE = {
    "folder": ["b"],
    "stray file": ["a/x"],
    "tar": ["train-0.tar"],
    "table": ["train.parquet"],
    "text": ["val/labels.csv"],
    "archive": ["cifar-10-python.tar.gz"],
}


@pytest.mark.parametrize("kind", PRIVATE)
def test_what_may_not_be_read_is_named_with_its_remedy(kind: str, src: Path) -> None:
    (name,) = PRIVATE[kind]
    {
        "folder": lambda: images(src, ["a/1.jpg", "b/1.jpg"]),
        "stray file": lambda: (images(src, ["a/1.jpg", "b/1.jpg"]), put(src, {name: jpeg()})),
        "tar": lambda: tar(src / name, wds(0, 3)),
        "table": lambda: parquet(src / name, 4),
        "text": lambda: (images(src, CLASSES + FLAT), put(src, {name: "x1.jpg,a\nx2.jpg,b\n"})),
        "archive": lambda: put(src, {name: "x"}),
    }[kind]()
    (src / name).chmod(0)
    caps = "-dac_override,-dac_read_search"
    command = ["setpriv", f"--bounding-set={caps}", f"--inh-caps={caps}"] if os.geteuid() == 0 else []
    command += [sys.executable, "-m", "cli.convert", str(src), "--inspect"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    (src / name).chmod(0o755)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert re.search(rf"{name}.*permission denied.*; (change who may read|mend it)", done.stderr), done.stderr


def test_what_vanishes_after_the_listing_is_named(src: Path) -> None:
    for layout, name in (
        ("imagenette", f"imagenette2-160/train/{WNIDS[0]}/ILSVRC2012_train_0.JPEG"),
        ("timm_wds", "imagenet1k-train-0000.tar"),
    ):
        LAYOUTS[layout](src / layout)
        found = look(src / layout)
        (src / layout / name).unlink()
        sample = found.listing(None).splits["train"][0]  # type: ignore[arg-type]  # nothing is to be kept
        with pytest.raises(FileNotFoundError, match=name):
            sample.read()


def test_a_class_folder_cut_off_by_a_hidden_name_is_listed(src: Path) -> None:
    images(src, ["a/1.jpg", "b/1.jpg", "..c/1.jpg"])
    assert look(src).rest == {"hidden": ["..c/"]}


def test_what_holds_nothing_of_the_format_asked_for(src: Path) -> None:
    images(src, CLASSES)
    with pytest.raises(DataError, match="holds nothing that --source-format imagenet reads"):
        look(src, Choice(format="imagenet"))
    pyarrow_parquet.write_table(pyarrow.table({"image": [jpeg()], "label": [0]}), src / "train.parquet")
    assert sizes(src, Choice(format="parquet")) == {"train": 1}
