"""Text files as tables, read a bounded line at a time."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from pipelines.base import DataError, in_words
from pipelines.sources.columns.tree import Tree, shown
from pipelines.sources.names import is_image

_SUFFIXES = (".txt", ".csv", ".tsv")
_MAX_BYTES = 256 << 20
_MAX_LINE = 1 << 16
_MAX_LINES = 20_000_000
_MAX_FILES = 5000


class NoTable(DataError):
    """A text file cannot be read as a table; what it may say is not known."""


def text_files(tree: Tree) -> list[str]:
    """The text files of a tree that may label images; where there are a great many, without those among images."""
    texts = tree.called(lambda name: name.lower().endswith(_SUFFIXES) and not _is_example(name))
    if len(texts) > _MAX_FILES:
        pictures = {folder for folder, names in tree.folders.items() if any(map(is_image, names))}
        texts = [name for name in texts if name.rpartition("/")[0] not in pictures][:_MAX_FILES]
    return texts


def _is_example(name: str) -> bool:
    """Whether it is Kaggle's example of what to hand in: it names the test images, with labels that mean nothing."""
    return "submission" in name.lower()


def rows(path: Path) -> Iterator[list[str]]:
    """The fields of every line that is not empty: by commas or semicolons in a .csv, else by tabs or commas, else
    the first word and the others.

    Raises:
        NoTable: it cannot be read, is too large, or is no text in UTF-8.
    """
    what, remedy = shown(path), "save it as a plain table, or leave it out with --ignore"
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise NoTable(f"{what} has more than {_MAX_BYTES >> 20} MiB; {remedy}")
        with path.open(encoding="utf-8-sig") as file:
            mark, number = None, 0
            while line := file.readline(_MAX_LINE + 1):
                if len(line) > _MAX_LINE:
                    raise NoTable(f"{what} has a line of more than {_MAX_LINE} characters; {remedy}")
                if not line.strip():
                    continue
                if (number := number + 1) > _MAX_LINES:
                    raise NoTable(f"{what} has more than {_MAX_LINES} lines; {remedy}")
                if path.suffix.lower() == ".csv":
                    mark = mark or (";" if ";" in line and "," not in line else ",")
                    fields = next(csv.reader([line], delimiter=mark)) if '"' in line else line.split(mark)
                    yield [field.strip() for field in fields]
                else:
                    apart = next((mark for mark in "\t," if mark in line and (mark == "\t" or " " not in line)), None)
                    fields = line.strip().split(maxsplit=1) if apart is None else line.split(apart)
                    yield [field.strip() for field in fields]
    except UnicodeDecodeError as error:
        raise NoTable(f"{what} is not UTF-8; {remedy}") from error
    except (OSError, csv.Error) as error:
        raise NoTable(f"{what} cannot be read ({in_words(error)}); mend it, or leave it out with --ignore") from error
