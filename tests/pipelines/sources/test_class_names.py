"""Names of classes that a source tells in words: in the .json of WebDataset's samples, and in the columns of tables as
pyarrow and Hugging Face's datasets write them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import convert_folder
from PIL import Image
from test_kinds import look
from test_layouts import jpeg, put, pyarrow, pyarrow_parquet, tar

from pipelines.storage.manifest import read_manifest

KINDS = ["class_name", "label_name", "classname", "class"]


@pytest.fixture
def src(tmp_path: Path) -> Path:
    (tmp_path / "src").mkdir()
    return tmp_path / "src"


def shard(path: Path, described: list[dict[str, Any]], **others: bytes) -> None:
    members: dict[str, bytes] = {}
    for number, entry in enumerate(described):
        members[f"{number:03d}.jpg"] = jpeg(number)
        members |= {f"{number:03d}.{name}": content for name, content in others.items()}
        members[f"{number:03d}.json"] = json.dumps(entry).encode()
    tar(path, members)


@pytest.mark.parametrize("key", KINDS)
def test_webdataset_names_its_classes_beside_their_numbers(src: Path, key: str) -> None:
    shard(src / "train-0.tar", [{"label": 1, key: "tabby cat"}, {"label": 0, key: "dog"}])
    shard(src / "val-0.tar", [{"label": 0, key: "dog"}])
    found = look(src).claim
    assert found.classes == ("dog", "tabby cat")
    assert {split: list(labels) for split, labels in found.splits.items()} == {"train": [1, 0], "val": [0]}
    assert found.labels == ".json in each sample, classes in its order, named by .json"
    assert found.notes == ["1 of 2 classes have no validation image: tabby cat"]


def test_a_json_beside_the_class_file_names_it(src: Path) -> None:
    shard(src / "train-0.tar", [{"class_name": "cat", "caption": "on a mat"}], cls=b"0")
    assert look(src).claim.classes == ("cat",)


def test_namesakes_are_told_apart_by_their_numbers(src: Path) -> None:
    shard(src / "train-0.tar", [{"label": n, "class_name": name} for n, name in enumerate(("crane", "emu", "crane"))])
    assert look(src).claim.classes == ("crane (0)", "emu", "crane (2)")


@pytest.mark.parametrize(
    ("described", "why"),
    [
        ([{"label": 0, "class": "a cat"}, {"label": 0, "class": "my cat"}], "name class 0 both 'a cat' and 'my cat'"),
        ([{"label": 0, "class_name": "cat"}, {"label": 1}], "name 1 of 2 classes, not 1"),
        ([{"label": 0, "class_name": "c" * 5000}], "has a class name of 5000 characters"),
    ],
)
def test_names_that_are_not_certain_are_left_out_and_that_is_said(
    src: Path, described: list[dict[str, Any]], why: str
) -> None:
    shard(src / "train-0.tar", described)
    found = look(src).claim
    assert found.classes == tuple(str(number) for number in range(len({one["label"] for one in described})))
    (note,) = found.notes
    assert note.startswith("classes are named by their numbers, as the .json members ")
    assert why in note


def test_a_list_of_classes_has_the_last_word_and_numbers_are_no_names(src: Path) -> None:
    shard(src / "train-0.tar", [{"label": 0, "class_name": "cat"}])
    put(src, {"classes.txt": "Katze\n"})
    assert look(src).claim.classes == ("Katze",)
    (src / "classes.txt").unlink()
    shard(src / "train-0.tar", [{"label": 0, "class": "0"}])
    found = look(src).claim
    assert (found.classes, found.notes) == (("0",), [])


def test_names_are_kept_by_a_conversion(src: Path, tmp_path: Path) -> None:
    shard(src / "train-0.tar", [{"label": 1, "class_name": "cat"}, {"label": 0, "class_name": "dog"}])
    convert_folder(src, tmp_path / "set", "dali")
    manifest, _ = read_manifest(tmp_path / "set")
    assert manifest.classes == ("dog", "cat")
    assert (tmp_path / "set" / "classes.txt").read_text() == "dog\ncat\n"


# --- tables


WORDS = ["tabby cat", "dog", "tabby cat", "emu"]


def columns(kind: str) -> Any:
    """A column of words as pyarrow may hold it."""
    plain = pyarrow.array(WORDS)
    return {
        "string": plain,
        "large_string": plain.cast(pyarrow.large_string()),
        "string_view": plain.cast(pyarrow.string_view()),
        "dictionary": plain.dictionary_encode(),
        "large dictionary": plain.cast(pyarrow.large_string()).dictionary_encode(),
        "small indices": plain.cast(pyarrow.dictionary(pyarrow.int8(), pyarrow.string())),
    }[kind]


@pytest.mark.parametrize(
    "kind", ["string", "large_string", "string_view", "dictionary", "large dictionary", "small indices"]
)
def test_words_of_a_parquet_column_are_classes(src: Path, kind: str) -> None:
    rows = pyarrow.table({"image": [jpeg(number) for number in range(4)], "label": columns(kind)})
    pyarrow_parquet.write_table(rows, src / "train.parquet", row_group_size=2)
    found = look(src).claim
    assert found.classes == ("dog", "emu", "tabby cat")
    assert list(found.splits["train"]) == [2, 0, 2, 1]
    assert found.labels == "the column 'label', named by its own values"


def test_what_two_files_call_by_other_numbers_is_one_class(src: Path) -> None:
    """Each file has a dictionary of its own."""
    for number, words in enumerate((["b", "a"], ["a", "b"])):
        rows = {"image": [jpeg(number)] * 2, "label": pyarrow.array(words).dictionary_encode()}
        pyarrow_parquet.write_table(pyarrow.table(rows), src / f"train-{number:05d}-of-00002.parquet")
    found = look(src).claim
    assert (found.classes, list(found.splits["train"])) == (("a", "b"), [1, 0, 0, 1])


@pytest.fixture
def datasets() -> Any:
    return pytest.importorskip("datasets", reason="datasets is not installed")


def of_datasets(datasets: Any, label: Any, values: list[Any]) -> Any:
    features = datasets.Features({"image": datasets.Image(), "label": label})
    pictures = []
    for number in range(len(values)):
        image = Image.open(io.BytesIO(jpeg(number)))
        image.load()
        pictures.append(image)
    return datasets.Dataset.from_dict({"image": pictures, "label": values}, features=features)


@pytest.mark.parametrize("way", ["to_parquet", "save_to_disk"])
@pytest.mark.parametrize("kind", ["ClassLabel", "string"])
def test_what_datasets_writes_is_read(src: Path, datasets: Any, way: str, kind: str) -> None:
    names = ["emu", "tabby cat", "dog"]
    values = [1, 2, 1, 0] if kind == "ClassLabel" else ["tabby cat", "dog", "tabby cat", "emu"]
    label = datasets.ClassLabel(names=names) if kind == "ClassLabel" else datasets.Value("string")
    made = of_datasets(datasets, label, values)
    if way == "to_parquet":
        made.to_parquet(str(src / "train.parquet"))
    else:
        datasets.DatasetDict({"train": made}).save_to_disk(str(src))
    found = look(src).claim
    assert found.classes == (tuple(names) if kind == "ClassLabel" else ("dog", "emu", "tabby cat"))
    assert [found.classes[label] for label in found.splits["train"]] == ["tabby cat", "dog", "tabby cat", "emu"]
