"""What Hugging Face's datasets library writes beside its tables: names of classes, splits, and files of a saved set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from pipelines.base import DataError
from pipelines.sources.columns.tree import Tree, join, shown
from pipelines.sources.names import split_of
from pipelines.sources.sample import check_class_names
from pipelines.storage.json_files import parse_json, read_json

ClassNames = tuple[str, ...]

_STATE, _SPLITS = "state.json", "dataset_dict.json"
_BESIDE = "dataset_info.json"


class _DataFile(TypedDict):
    filename: str


class _State(TypedDict):
    _data_files: list[_DataFile]


class _Splits(TypedDict):
    splits: list[str]


class _Info(TypedDict):
    features: dict[str, Any]


class _Schema(TypedDict):
    info: _Info


@dataclass(frozen=True)
class Saved:
    """A `save_to_disk` folder."""

    folders: dict[str | None, str]
    """By `train`, `val` and `test`, or None for a set of no split."""
    metadata: dict[str, str]


def named_by(metadata: Mapping[bytes, bytes], what: str) -> dict[str, ClassNames]:
    """The class names of every column that has some, from the `huggingface` entry of a schema's metadata.

    Raises:
        DataError: the entry is there and is damaged.
    """
    entry = metadata.get(b"huggingface")
    if entry is None:
        return {}
    told = f"the features in {what}"
    features = parse_json(entry, _Schema, told, remedy="download it again")["info"]["features"]
    found: dict[str, ClassNames] = {}
    for column, feature in features.items():
        if not isinstance(feature, dict | list):
            raise DataError(f"{told} describe {column!r} by something else than an object; download it again")
        if not isinstance(feature, dict) or "names" not in feature:
            continue
        names = feature["names"]
        if isinstance(names, dict):  # as older versions wrote them: by number
            names = [names.get(str(number)) for number in range(len(names))]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f"{told} name the classes of {column!r} by something else than words; download it again")
        found[column] = check_class_names(names, f"column {column!r} of {what}")
    return found


def saved_splits(tree: Tree) -> Saved | None:
    """The folders of a saved set; None if `tree` is none.

    Raises:
        DataError: what lists the splits is damaged, names other folders, or two for one split.
    """
    top = tree.folders.get("", [])
    if _SPLITS not in top:
        if _STATE not in top:
            return None
        return Saved({None: ""}, _metadata(tree, ""))
    path = tree.path(_SPLITS)
    names = read_json(path, _Splits, remedy="save it again")["splits"]
    folders: dict[str | None, str] = {}
    metadata = {_SPLITS: "the list of the splits"}
    for name in names:
        if name not in tree.folders or "/" in name:
            raise DataError(
                f"{shown(path)} names the split {name!r}, and there is no folder of that name; save it again"
            )
        split = split_of(name)
        if split is None:
            raise DataError(
                f"{shown(path)} names the split {name!r}; expected train, validation or test: rename it, or --ignore it"
            )
        if split in folders:
            raise DataError(
                f"{shown(path)} names two splits for {split}, {folders[split]} and {name}; --ignore one of them"
            )
        folders[split] = name
        metadata |= _metadata(tree, name)
    if not folders:
        raise DataError(f"{shown(path)} names no split; save it again")
    return Saved(folders, metadata)


def _metadata(tree: Tree, folder: str) -> dict[str, str]:
    names = tree.folders[folder]
    return {join(folder, name): "what datasets keeps of a set" for name in (_STATE, _BESIDE) if name in names}


def saved_files(tree: Tree, folder: str) -> list[str]:
    """The Arrow files of one saved split, in order.

    Raises:
        DataError: its list is damaged or empty, or names a file that is not there.
    """
    path = tree.path(join(folder, _STATE))
    if not path.is_file():
        raise DataError(f"{shown(path)} is missing, so that the set is not complete; save it again")
    state = read_json(path, _State, remedy="save it again")
    if state.get("_indices_data_files"):
        raise DataError(
            f"{shown(path.parent)} was saved with an index over its rows; save flatten_indices() of it instead"
        )
    names = [entry["filename"] for entry in state["_data_files"]]
    if not names:
        raise DataError(f"{shown(path)} lists no file; save it again")
    if len(set(names)) < len(names):
        raise DataError(f"{shown(path)} lists a file twice; save it again")
    for name in names:
        if name not in tree.folders[folder]:
            raise DataError(
                f"{shown(path)} lists {Path(name).name!r}, and there is no such file beside it; save it again"
            )
    return [join(folder, name) for name in names]
