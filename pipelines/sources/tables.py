"""Tables of images as the Hugging Face hub and its library keep them: Parquet, and `save_to_disk` folders."""

from __future__ import annotations

import re
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.base import DataError, in_words
from pipelines.extras import require
from pipelines.sources.columns.samples import MAX_ENCODED, Samples
from pipelines.sources.columns.tree import Tree, shown, some
from pipelines.sources.features import ClassNames, named_by, saved_files, saved_splits
from pipelines.sources.names import WORDS, by_split, check_parts, order_classes
from pipelines.sources.sample import (
    UNSPLIT,
    Choice,
    Claim,
    Spool,
    check_class_names,
    number_classes,
    only_test,
)

if TYPE_CHECKING:
    import pyarrow

_IMAGES = ("image", "img", "jpg", "png", "picture", "photo", "pixel_values")
_LABELS = ("label", "labels", "class", "cls", "target", "category", "fine_label")
_ROWS, _LABEL_ROWS = 16, 1 << 16  # read at a time
_MAX_GROWTH = 32  # of the images' bytes against those of their files; images are compressed already
_FREE_GROWTH = 256 << 20
_MEMORY = 1 << 30  # bytes that reading a few rows may take


@dataclass(frozen=True)
class _Files:
    """The files of one split, and how rows are read from one of them."""

    names: list[str]
    batches: Callable[[Path, str, int], Iterator[Any]]
    """Of one column, so many rows at a time at most."""
    schema: Callable[[Path], pyarrow.Schema]


def claim_parquet(tree: Tree, choice: Choice) -> Claim | None:
    """The rows of all Parquet files, in order; None where no file has a column of images.

    Raises:
        DataError: a file is missing or damaged, or it is not certain which column is which.
    """
    names = tree.called(lambda name: name.lower().endswith(".parquet"))
    if not names:
        return None
    with _told(tree.root):
        holding = [name for name in names if _image_columns(_parquet_schema(tree.path(name)))]
    if not holding:
        return None
    if others := sorted(set(names) - set(holding)):
        raise DataError(
            f"{shown(tree.path(others[0]))} has no column of images, {shown(tree.path(holding[0]))} has; leave it out "
            "with --ignore"
        )
    if tree.single is None:
        check_parts(tree, holding)
    if len(configurations := sorted({_configuration(name) for name in holding})) > 1:
        raise DataError(
            f"{tree.root} holds {len(configurations)} configurations, {some(configurations)}; leave all but one out "
            "with --ignore"
        )
    splits = by_split(tree, holding)
    files = {split: _Files(own, _parquet_batches, _parquet_schema) for split, own in splits.items()}
    return _claim(tree, choice, "parquet", "Parquet", files)


def _configuration(name: str) -> str:
    """What a repository's folders say besides the split."""
    parts = [part for part in name.split("/")[:-1] if part.lower() not in WORDS and part != "data"]
    return "/".join(parts)


def claim_saved(tree: Tree, choice: Choice) -> Claim | None:
    """The rows of what `datasets` wrote with `save_to_disk`, of one split or of several; None where there is none."""
    at = saved_splits(tree)
    if at is None:
        return None
    found: dict[str | None, _Files] = {}
    for split, folder in at.folders.items():
        found[split] = _Files(saved_files(tree, folder), _stream_batches, _stream_schema)
    claim = _claim(tree, choice, "arrow", "a data set saved by Hugging Face's datasets", found)
    claim.metadata |= at.metadata
    caches = tree.called(re.compile(r"(cache-|tmp).*\.arrow$").match)
    if caches:
        claim.unused["a cache of the datasets library"] = caches
    return claim


def _claim(tree: Tree, choice: Choice, format: str, described: str, found: Mapping[str | None, _Files]) -> Claim:
    unused: dict[str, Sequence[str]] = {}
    notes: list[str] = []
    splits: dict[str, _Files]
    uses_test = False
    if None in found:
        splits = {UNSPLIT: found[None]}
    else:
        splits = {split: found[split] for split in ("train", "val") if split in found}
        if "test" in found and ("val" not in splits or choice.use_test) and not choice.held_out:
            if "val" in splits:
                unused["validation images, as --use-test asks for the test split"] = splits["val"].names
            else:
                notes.append(f"{found['test'].names[0]} becomes the validation split, as there is no other")
            splits["val"], uses_test = found["test"], True
        elif "test" in found:
            unused["test images"] = found["test"].names
    if not splits:
        raise only_test(shown(tree.root))
    first = next(iter(splits.values()))
    with _told(tree.root):
        example = tree.path(first.names[0])
        schema = first.schema(example)
        image, label, names = _columns(example, schema, choice)
        _compare(tree, [name for own in splits.values() for name in own.names], first.schema, image, label, names)
        values = {split: _labels(tree, own, label) for split, own in splits.items()}
    labels, classes = _numbered(tree.root, label, values, names)
    taken: dict[str, list[str]] = {}
    for name in (name for own in splits.values() for name in own.names):
        folder, _, last = name.rpartition("/")
        taken.setdefault(folder, []).append(last)

    def read(spool: Spool) -> dict[str, Samples]:
        return {split: _spooled(tree, own, image, labels[split], spool, split) for split, own in splits.items()}

    return Claim(
        format,
        described,
        classes,
        dict(labels),
        {split: some(own.names) for split, own in splits.items()},
        f"the column {label!r}, named by " + ("the table's features" if names else "its own values"),
        read,
        taken=dict(taken),
        unused=unused,
        notes=notes,
        uses_test=uses_test,
    )


def _numbered(
    source: Path, label: str, values: Mapping[str, list[Any]], names: ClassNames
) -> tuple[dict[str, list[int]], tuple[str, ...]]:
    """Labels as numbers, and the classes, from what a column holds."""
    words = {type(value) for own in values.values() for value in own}
    if len(words) > 1:
        raise DataError(
            f"{source}, column {label!r} is of {' and '.join(sorted(one.__name__ for one in words))} in different "
            "files; leave some out with --ignore"
        )
    if words == {str}:
        found = dict.fromkeys(value for own in values.values() for value in own)
        classes = names or order_classes(check_class_names(list(found), f"column {label!r} of {source}"), None, source)
        number = {name: at for at, name in enumerate(classes)}
        if unknown := [value for own in values.values() for value in own if value not in number]:
            raise DataError(f"{source}, column {label!r} has the value {unknown[0]!r}, which its features do not name")
        return {split: [number[value] for value in own] for split, own in values.items()}, check_class_names(
            classes, f"column {label!r} of {source}"
        )
    return dict(values), names or number_classes(source, values)


def _columns(path: Path, schema: pyarrow.Schema, choice: Choice) -> tuple[str, str, ClassNames]:
    """The image column, the label column, and the classes that the label's feature names."""
    what, columns = shown(path), ", ".join(schema.names)
    image = _chosen(what, "image", choice.images, _image_columns(schema), _IMAGES, schema.names)
    features = named_by(schema.metadata or {}, what)
    types = _pyarrow("pyarrow.types")
    kinds = (types.is_integer, types.is_string, types.is_large_string, types.is_string_view)
    fitting = [
        field.name
        for field in schema
        if any(is_kind(getattr(field.type, "value_type", field.type)) for is_kind in kinds)
        and not types.is_nested(field.type)
    ]
    usual = [name for name in fitting if name.lower() in _LABELS]
    classes = [name for name in fitting if name in features]
    labels = classes if len(classes) == 1 else usual
    if choice.label is None and len(labels) != 1:
        told = f"{some(labels)} may be it" if labels else "none is called like one"
        raise DataError(f"{what} has no certain label column ({told}); say --label COLUMN, one of {columns}")
    label = _chosen(what, "label", choice.label, fitting, tuple(labels), schema.names)
    return image, label, features.get(label, ())


def _chosen(
    what: str, kind: str, wanted: str | None, fitting: list[str], usual: Sequence[str], names: list[str]
) -> str:
    option, columns = f"--{kind}s" if kind == "image" else f"--{kind}", ", ".join(names)
    if wanted is not None:
        if wanted not in fitting:
            why = "is no column of it" if wanted not in names else f"holds no {kind}"
            raise DataError(f"{what}: {option} {wanted} {why}; its columns are {columns}")
        return wanted
    if names.count(fitting[0]) > 1:
        raise DataError(f"{what} has two columns called {fitting[0]!r}; rename one")
    found = fitting if len(fitting) == 1 else [name for name in fitting if name.lower() in usual or name in usual]
    if len(found) != 1:
        raise DataError(f"{what} has several {kind} columns, {some(fitting)}; say {option} COLUMN")
    return found[0]


def _image_columns(schema: pyarrow.Schema) -> list[str]:
    types = _pyarrow("pyarrow.types")

    def holds_images(kind: Any) -> bool:
        if types.is_struct(kind):
            at = kind.get_field_index("bytes")
            return at >= 0 and holds_images(kind.field(at).type)
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    return [field.name for field in schema if holds_images(field.type)]


def _compare(
    tree: Tree, files: Sequence[str], schema_of: Callable[[Path], Any], image: str, label: str, names: ClassNames
) -> None:
    """Raise `DataError` where a file lacks one of the columns, or numbers other classes than the first one."""
    for name in files:
        path = tree.path(name)
        schema = schema_of(path)
        if lacking := [column for column in (image, label) if column not in schema.names]:
            raise DataError(
                f"{shown(path)} has no column {lacking[0]!r}, as {shown(tree.path(files[0]))} has; leave one of them "
                "out with --ignore"
            )
        others = named_by(schema.metadata or {}, shown(path)).get(label, ())
        if others != names:
            raise DataError(
                f"{shown(path)} names the classes of {label!r} otherwise than {shown(tree.path(files[0]))} does "
                f"({_differ(names, others)}); leave one of them out with --ignore"
            )


def _differ(names: ClassNames, others: ClassNames) -> str:
    if not names or not others:
        return "only one of them names any"
    pairs = ((one, other) for one, other in zip(names, others, strict=False) if one != other)
    return next((f"{one!r} and {other!r}" for one, other in pairs), f"{len(names)} and {len(others)} classes")


def _labels(tree: Tree, files: _Files, label: str) -> list[Any]:
    """The label of every row, in order."""
    found: list[Any] = []
    known: dict[Any, Any] = {}
    for name in files.names:
        path = tree.path(name)
        for batch in files.batches(path, label, _LABEL_ROWS):
            values = batch.column(0).to_pylist()
            if None in values:
                row = len(found) + values.index(None)
                raise DataError(f"{shown(path)}, row {row} has no label; give it one, or remove it")
            found += [known.setdefault(value, value) for value in values]  # each word once in memory
    return found


def _spooled(tree: Tree, files: _Files, image: str, labels: Sequence[int], spool: Spool, split: str) -> Samples:
    size = sum(tree.path(name).stat().st_size for name in files.names)
    return spool.fill(split, _images(tree, files, image, labels, size), size)


def _images(
    tree: Tree, files: _Files, image: str, labels: Sequence[int], size: int
) -> Iterator[tuple[str, int, bytes]]:
    at, total = 0, 0
    with _told(tree.root):
        for name in files.names:
            path, first = tree.path(name), at
            for batch in files.batches(path, image, _ROWS):
                column = batch.column(0)
                for row in range(len(column)):
                    what = f"{shown(path)}, row {at - first}"
                    encoded = _encoded(column[row], what)
                    total += len(encoded)
                    if total > _MAX_GROWTH * size + _FREE_GROWTH:
                        raise DataError(
                            f"{what}: {total >> 20} MiB of images come out of {size >> 20} MiB of files, which no "
                            "images do; download them again"
                        )
                    yield what, labels[at], encoded
                    at += 1


def _encoded(value: Any, what: str) -> bytes:
    """The bytes of an image; their number is looked at before they are copied."""
    inner = value["bytes"] if hasattr(value, "keys") and value.is_valid else value
    if not inner.is_valid:
        raise DataError(f"{what} names an image file instead of holding it; embed the images first")
    buffer = inner.as_buffer()
    if buffer.size > MAX_ENCODED:
        raise DataError(f"{what} has {buffer.size} bytes; images have at most {MAX_ENCODED}, so remove it")
    encoded: bytes = buffer.to_pybytes()
    return encoded


def _parquet_schema(path: Path) -> Any:
    with path.open("rb") as file:  # what may not be read is named by Python, not by pyarrow
        return _pyarrow("pyarrow.parquet").read_schema(file)


def _parquet_batches(path: Path, column: str, rows: int) -> Iterator[Any]:
    with _pyarrow("pyarrow.parquet").ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
        yield from file.iter_batches(rows, columns=[column], use_threads=False)


def _stream_schema(path: Path) -> Any:
    with path.open("rb") as file, _pyarrow("pyarrow.ipc").open_stream(file) as stream:
        return stream.schema


def _stream_batches(path: Path, column: str, _: int) -> Iterator[Any]:
    memory_map = _pyarrow("pyarrow").memory_map
    with memory_map(str(path)) as file, _pyarrow("pyarrow.ipc").open_stream(file) as stream:
        for batch in stream:
            yield batch.select([column])


@contextmanager
def _told(source: Path) -> Iterator[None]:
    """Within, what pyarrow cannot read is said of the source, and it gets so much memory and no more: a page of a table
    may be of any size, and there is no other way to ask how large it will be."""
    pyarrow = _pyarrow("pyarrow")
    before = resource.getrlimit(resource.RLIMIT_DATA)
    pool = pyarrow.default_memory_pool()
    pyarrow.allocate_buffer(1, memory_pool=pool)  # at first mimalloc reserves 1 GiB, which would be all there is below
    if (used := _data_bytes()) is not None:
        pyarrow.set_memory_pool(pyarrow.system_memory_pool())  # the others reserve far more than they use
        limits = [limit for limit in (used + _MEMORY, *before) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_DATA, (min(limits), before[1]))
    try:
        yield
    except DataError:
        raise
    except MemoryError as error:
        raise DataError(
            f"{source}: a few rows of it take more than {_MEMORY >> 20} MiB of memory, which no images do; download it "
            "again, or write it with smaller images"
        ) from error
    except PermissionError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, IndexError, KeyError, OverflowError) as error:
        raise DataError(f"{source} cannot be read ({in_words(error)}); download it again") from error
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
        pyarrow.set_memory_pool(pool)


def _data_bytes() -> int | None:
    """Of this process, as RLIMIT_DATA counts them; None where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(r"^VmData:\s+(\d+) kB$", status, re.MULTILINE)
    return None if found is None else int(found[1]) << 10


def _pyarrow(module: str) -> Any:
    return require(module, "parquet", "reading Parquet and Arrow files")
