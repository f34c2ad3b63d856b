"""Tables of images as the Hugging Face hub and its library keep them: Parquet, and `save_to_disk` folders."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.base import DataError, in_words
from pipelines.sources.names import by_split
from pipelines.sources.sample import UNSPLIT, Listing
from pipelines.sources.spool import Spool
from pipelines.storage.manifest import SPLIT_ALIASES

if TYPE_CHECKING:
    import pyarrow

_IMAGES, _LABELS = ("image", "img", "jpg", "png"), ("label", "labels", "fine_label", "cls")
_ROWS = 64  # read at a time


def parquet_files(source: Path) -> list[Path]:
    """The Parquet files of a folder or of its `data` folder; a Parquet file itself."""
    if source.is_file():
        return [source] if source.suffix == ".parquet" else []
    return sorted([*source.glob("*.parquet"), *source.glob("data/*.parquet")])


def is_saved(source: Path) -> bool:
    """Whether `datasets` wrote this folder with `save_to_disk`."""
    return any((source / name).is_file() for name in ("dataset_dict.json", "state.json"))


def list_parquet(source: Path, spool: Spool) -> Listing:
    """The rows of all files, in order."""
    parquet = _pyarrow("pyarrow.parquet")
    splits = by_split(source, parquet_files(source))

    def batches(paths: Sequence[Path]) -> Iterator[tuple[Path, Any]]:
        for path in paths:
            with parquet.ParquetFile(path) as file:
                columns = list(_columns(path, file.schema_arrow))
                for batch in file.iter_batches(_ROWS, columns=columns):
                    yield path, batch

    first = next(iter(splits.values()))[0]
    return _list(source, splits, lambda paths: batches(paths), lambda: parquet.read_schema(first), spool)


def list_saved(source: Path, spool: Spool) -> Listing:
    """The rows of a saved data set, or of every split of a saved dictionary of them."""
    ipc = _pyarrow("pyarrow.ipc")
    if not (source / "dataset_dict.json").is_file():
        splits = {UNSPLIT: _saved_files(source)}
    else:
        names = json.loads((source / "dataset_dict.json").read_text())["splits"]
        splits = {
            split: _saved_files(source / alias)
            for split, aliases in SPLIT_ALIASES.items()
            if (alias := next((alias for alias in aliases if alias in names), None))
        }
        if not splits:
            raise DataError(f"{source} has the splits {', '.join(names)}; expected train, validation or test")

    def batches(paths: Sequence[Path]) -> Iterator[tuple[Path, Any]]:
        for path in paths:
            with path.open("rb") as file, ipc.open_stream(file) as stream:
                for batch in stream:
                    yield path, batch

    def schema() -> Any:
        with next(iter(splits.values()))[0].open("rb") as file, ipc.open_stream(file) as stream:
            return stream.schema

    return _list(source, splits, lambda paths: batches(paths), schema, spool)


def _saved_files(folder: Path) -> list[Path]:
    try:
        state = json.loads((folder / "state.json").read_text())
        paths = [folder / Path(entry["filename"]).name for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} is no complete save_to_disk folder ({in_words(error)}); save it again") from error
    if state.get("_indices_data_files"):
        raise DataError(f"{folder} was saved with an index over its rows; save flatten_indices() of it instead")
    return paths


def _list(source: Path, splits: dict[str, list[Path]], batches: Any, schema: Any, spool: Spool) -> Listing:
    pyarrow = _pyarrow("pyarrow")
    try:
        classes = _class_names(schema())
        samples = {
            split: spool.fill(split, _images(batches(paths)), sum(path.stat().st_size for path in paths))
            for split, paths in splits.items()
        }
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{source} cannot be read ({in_words(error)}); download it again") from error
    if not classes:
        count = 1 + max((sample.label for part in samples.values() for sample in part), default=-1)
        classes = tuple(str(label) for label in range(count))
    return Listing(classes, dict(samples))


def _images(batches: Iterator[tuple[Path, Any]]) -> Iterator[tuple[str, int, bytes]]:
    number: dict[Path, int] = {}
    for path, batch in batches:
        image, label = _columns(path, batch.schema)
        first = number.get(path, 0)
        number[path] = first + len(batch)
        for i, (content, value) in enumerate(
            zip(batch.column(image).to_pylist(), batch.column(label).to_pylist(), strict=True), first
        ):
            name = f"{path}, row {i}"
            encoded = content.get("bytes") if isinstance(content, dict) else content
            if encoded is None:
                raise DataError(f"{name} names an image file instead of holding it; embed the images first")
            if value is None:
                raise DataError(f"{name} has no label; give it one, or remove it")
            yield name, value, encoded


def _columns(path: Path, schema: pyarrow.Schema) -> tuple[str, str]:
    """The names of the image and of the label column."""
    types = _pyarrow("pyarrow.types")

    def holds_images(kind: Any) -> bool:
        if types.is_struct(kind):
            at = kind.get_field_index("bytes")
            return at >= 0 and holds_images(kind.field(at).type)
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    image = [field.name for field in schema if holds_images(field.type)]
    label = [field.name for field in schema if types.is_integer(field.type)]
    chosen = []
    for what, found, usual in (("image", image, _IMAGES), ("integer label", label, _LABELS)):
        names = found if len(found) == 1 else [name for name in usual if name in found]
        if not names:
            raise DataError(f"{path} has no {what} column; its columns are {', '.join(schema.names)}")
        chosen.append(names[0])
    return chosen[0], chosen[1]


def _class_names(schema: pyarrow.Schema) -> tuple[str, ...]:
    """From the `huggingface` entry of the schema's metadata; empty if it names none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError):
        return ()
    named = [features[name]["names"] for name in (*_LABELS, *features) if "names" in features.get(name, ())]
    return tuple(named[0]) if named else ()


def _pyarrow(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError("Parquet and Arrow files need pyarrow; install the parquet extra") from error
