"""Text files that say which class the images of a flat folder are of, or which split the images of class folders."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from pipelines.base import DataError, in_words
from pipelines.sources.archive import read_compressed
from pipelines.sources.names import is_image, order_is_certain, said_split
from pipelines.sources.tree import Tree, shown, some

_SUFFIXES = (".txt", ".csv", ".tsv")
_MAX_BYTES = 256 << 20
_TITLES = ("label", "labels", "class", "class_name", "classname", "category", "target", "breed", "species", "wnid")
_MAX_DIGITS = 9
_MAX_TEXTS = 5000
_BOXED = re.compile(r"(\S+)(?: \d+){4}(?: \S+(?: \d+){4})*\s*")  # Kaggle writes a class and its boxes
_CATEGORIES = "categories_places365.txt"
DEVKIT = "ILSVRC2012_devkit_t12"
META, TRUTH = "meta.mat", "ILSVRC2012_validation_ground_truth.txt"
_MAX_META = 16 << 20  # bytes; it has 150,000
_NUMBERED = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG", re.IGNORECASE)


@dataclass(frozen=True)
class Found:
    """The labels of a flat folder."""

    names: list[str]
    """The class of each image."""
    told: str
    """Where they come from, in words."""
    metadata: dict[str, str] = field(default_factory=dict)
    """The files that were used, and for what."""


@dataclass(frozen=True)
class Lists:
    """Which images are for training and which for validation."""

    split: Mapping[str, str]
    told: str
    metadata: dict[str, str]


def find(
    tree: Tree,
    images: Sequence[str],
    classes: tuple[str, ...],
    names: Sequence[str] | None = None,
    split: str | None = None,
    others: Collection[str] = (),
) -> Found | None:
    """The class of each of `images`; None where no file of the tree says it.

    Args:
        tree: the source.
        images: full names, sorted.
        classes: those of the training split in the order of their labels; empty if there is none.
        names: what the files call the images, where that is not the last part of their name.
        split: `train`, `val` or `test`, if it is known: files that are called like another one are not asked.
        others: the last parts of the names of all other images.

    Raises:
        DataError: a file labels some of them only, or several disagree, or labels are numbers of an unknown meaning.
    """
    last = [PurePosixPath(name).name for name in images] if names is None else list(names)
    if (devkit := _devkit_labels(tree, last)) is not None:
        return devkit
    tables = _tables(tree)
    words = {name: said_split(name) for name in tables}
    tables = {name: rows for name, rows in tables.items() if None in (words[name], split) or words[name] == split}
    twice = next((one for one in last if one in others), None)
    by_file: dict[str, list[str]] = {}
    partial: list[DataError] = []
    for name, rows in tables.items():
        sure = twice is None or (split is not None and words[name] == split)
        try:
            labels = _by_file(tree, name, rows, last, images if names is None else last, None if sure else twice)
        except DataError as error:
            partial.append(error)
            continue
        if labels is not None and not _is_numbering(labels):
            by_file[name] = labels
    by_line = {name: [row[0] for row in rows] for name, rows in tables.items() if _is_by_line(rows, last)}
    if partial and not by_file:
        raise partial[0]
    found = by_file or by_line
    if not found:
        return None
    resolved = {name: _resolve(tree, name, labels, classes, name in by_file, last) for name, labels in found.items()}
    first = next(iter(resolved))
    if disagree := [name for name in resolved if resolved[name] != resolved[first]]:
        raise DataError(
            f"{shown(tree.path(first))} and {shown(tree.path(disagree[0]))} label the images differently; leave one "
            "out with --ignore"
        )
    numbers = resolved[first] != found[first]
    metadata = dict.fromkeys(resolved, "labels")
    if numbers and (categories := _categories_file(tree)):
        return Found(
            resolved[first], f"{first}, named by {categories}", metadata | {categories: "names of the numbers"}
        )
    return Found(resolved[first], f"{first}{' (numbers of the classes, from 0)' if numbers else ''}", metadata)


def _tables(tree: Tree) -> dict[str, list[list[str]]]:
    """The text files of a tree; where there are a great many, without those that lie among images."""
    texts = [name for name in tree.files() if name.lower().endswith(_SUFFIXES) and not _is_example(name)]
    if len(texts) > _MAX_TEXTS:
        pictures = {folder for folder, names in tree.folders.items() if any(map(is_image, names))}
        texts = [name for name in texts if name.rpartition("/")[0] not in pictures][:_MAX_TEXTS]
    return {name: rows for name in texts if (rows := _read(tree, name)) is not None}


def _is_example(name: str) -> bool:
    """Whether it is Kaggle's example of what to hand in: it names the test images, with labels that mean nothing."""
    return "submission" in name.rpartition("/")[2].lower()


def _is_numbering(labels: Sequence[str]) -> bool:
    """Whether they only count the images, from 1, as those in ImageNet's lists of its splits do."""
    return len(labels) > 1 and labels == [str(number) for number in range(1, len(labels) + 1)]


def _read(tree: Tree, name: str) -> list[list[str]] | None:
    """The fields of every line that is not empty; None for what is no table of text."""
    path = tree.path(name)
    if path.stat().st_size > _MAX_BYTES:
        return None
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (UnicodeDecodeError, OSError):
        return None
    if name.lower().endswith(".csv"):
        try:
            first = text.partition("\n")[0]
            mark = ";" if ";" in first and "," not in first else ","
            rows = [row for row in csv.reader(io.StringIO(text), delimiter=mark) if row]
        except csv.Error:
            return None
        return [[field.strip() for field in row] for row in rows]
    lines = [line for line in text.splitlines() if line.strip()]
    return [[f.strip() for f in line.split("\t")] if "\t" in line else line.split(maxsplit=1) for line in lines]


def _class_in(row: list[str], header: list[str]) -> str | None:
    """The class in a line that begins with a file's name; None where it is not certain which entry that is."""
    called = [at for at, title in enumerate(header) if title.lower() in _TITLES]
    if len(row) > 2 and len(called) == 1 and called[0] < len(row):
        return row[called[0]]
    if boxed := _BOXED.fullmatch(" ".join(row[1:])):
        return boxed[1]
    numbers = [part.lstrip("-").replace(".", "", 1).isdecimal() for part in row[1].split()]
    return None if len(row) > 2 or (len(numbers) > 1 and all(numbers)) else row[1]


def _by_file(
    tree: Tree, name: str, rows: list[list[str]], images: Sequence[str], paths: Sequence[str], twice: str | None
) -> list[str] | None:
    """The labels in a file whose lines begin with a file's name, with or without its suffix; None if it is not one.
    `twice`: one of the names that images elsewhere have as well."""
    wanted = {image: i for i, image in enumerate(images)}
    stems = {PurePosixPath(image).stem: i for i, image in enumerate(images)}
    stems = stems if len(stems) == len(images) else {}
    labels: list[str | None] = [None] * len(images)
    for row in rows:
        if len(row) < 2 or not row[1].split():
            continue
        folder, _, last = row[0].removeprefix("./").rpartition("/")
        at = wanted.get(last, stems.get(PurePosixPath(last).stem if is_image(last) else last))
        if at is None:
            continue
        own, _, base = paths[at].rpartition("/")
        if folder and own and not f"/{own}/{base}".endswith(f"/{folder}/{base}"):
            continue  # it lies in another folder, and has the name of one of these
        if twice is not None and not folder:
            raise DataError(
                f"{shown(tree.path(name))} does not say the folder of its files, and there are several {twice}; write "
                "it before each name, or give the file the name of its split"
            )
        label = _class_in(row, rows[0])
        if label is None:
            raise DataError(
                f"{shown(tree.path(name))} has a line of {len(row[1].split()) + len(row) - 1} entries, and it is not "
                f"certain which is the class of {images[at]}; keep FILE and CLASS"
            )
        if labels[at] not in (None, label):
            raise DataError(f"{shown(tree.path(name))} labels {images[at]} twice, {labels[at]} and {label}; mend it")
        labels[at] = label
    number = sum(label is not None for label in labels)
    if not number:
        return None
    if number < len(images):
        missing = images[labels.index(None)]
        raise DataError(
            f"{shown(tree.path(name))} has no line for {missing}, one of {len(images) - number} without a label; "
            "download it again, or leave the images out with --ignore"
        )
    return [label for label in labels if label is not None]


def _is_by_line(rows: list[list[str]], images: Sequence[str]) -> bool:
    if len(rows) != len(images) or any(len(row) != 1 or is_image(row[0]) for row in rows):
        return False
    return len(rows) < 3 or len({row[0] for row in rows}) < len(rows)  # else it lists files, or the classes


def _resolve(
    tree: Tree, name: str, labels: Sequence[str], classes: tuple[str, ...], by_file: bool, images: Sequence[str]
) -> list[str]:
    """Class names for labels that are names or numbers."""
    what = shown(tree.path(name))
    if not by_file and not order_is_certain(images):
        raise DataError(
            f"{what} has a label a line, but the names of the images ({some(images)}) do not say which line is whose; "
            "write FILE CLASS on each line"
        )
    if not all(label.isdecimal() for label in labels) or set(labels) <= set(classes):
        if classes and (unknown := [label for label in labels if label not in set(classes)]):
            raise DataError(f"{what} names the class {unknown[0]!r}, which is no training class; mend it")
        return list(labels)
    if (names := _categories(tree)) is not None:
        if missing := [label for label in labels if label not in names]:
            raise DataError(
                f"{what} has the label {missing[0]}, which {_CATEGORIES} does not name; download both again"
            )
        return [names[label] for label in labels]
    if not by_file:
        need = f"{DEVKIT}.tar.gz with its meta.mat" if name.endswith(TRUTH) else "the names of the classes"
        raise DataError(
            f"{what} holds numbers of ImageNet's devkit or of another list; add {need} to say what they mean"
        )
    if not classes:
        return list(labels)
    if bad := [label for label in labels if not _is_number(label) or int(label) >= len(classes)]:
        raise DataError(
            f"{what} has label {bad[0][:20]}, but there are {len(classes)} training classes, from 0; write class names "
            "in place of numbers"
        )
    return [classes[int(label)] for label in labels]


def _is_number(label: str) -> bool:
    return label.isascii() and label.isdecimal() and len(label) <= _MAX_DIGITS


def _categories_file(tree: Tree) -> str | None:
    found = [name for name in tree.files() if name.rpartition("/")[2] == _CATEGORIES]
    return found[0] if len(found) == 1 else None


def _categories(tree: Tree) -> dict[str, str] | None:
    """Places365's names of its numbers: `/a/airfield 0`."""
    name = _categories_file(tree)
    if name is None:
        return None
    return {row[1]: _place(row[0]) for row in _read(tree, name) or [] if len(row) == 2}


def _place(name: str) -> str:
    return name.strip("/")


def split_lists(tree: Tree, base: str, images: Sequence[str]) -> Lists | None:
    """The split of every image by the lists of Food-101 or CUB-200-2011; None where there are none.

    Raises:
        DataError: they do not name an image, or name it twice.
    """
    above = base.rpartition("/")[0]
    place = f"{above}/" if above else ""
    known = set(tree.folders.get(above, ()))
    if {"images.txt", "train_test_split.txt"} <= known:
        rows = _pairs(tree, f"{place}images.txt"), _pairs(tree, f"{place}train_test_split.txt")
        names, training = dict(rows[0]), dict(rows[1])
        listed = [(names.get(key, ""), "train" if flag == "1" else "val") for key, flag in training.items()]
        used = [f"{place}images.txt", f"{place}train_test_split.txt"]
    elif {"train.txt", "test.txt"} <= set(tree.folders.get(f"{place}meta", ())):
        used = [f"{place}meta/train.txt", f"{place}meta/test.txt"]
        listed = [
            (row[0], split)
            for name, split in zip(used, ("train", "val"), strict=True)
            for row in _read(tree, name) or []
            if len(row) == 1
        ]
    else:
        return None
    return Lists(_assigned(tree, base, images, listed, used[-1]), " and ".join(used), dict.fromkeys(used, "splits"))


def _pairs(tree: Tree, name: str) -> Iterator[tuple[str, str]]:
    for row in _read(tree, name) or []:
        if len(row) != 2:
            raise DataError(f"{shown(tree.path(name))} has a line without exactly two entries; download it again")
        yield row[0], row[1]


def _assigned(
    tree: Tree, base: str, images: Sequence[str], listed: Sequence[tuple[str, str]], what: str
) -> dict[str, str]:
    start = len(base) + 1 if base else 0
    by_name = {image[start:]: image for image in images} | {image[start:].rpartition(".")[0]: image for image in images}
    split: dict[str, str] = {}
    for name, own in listed:
        if (image := by_name.get(name)) is None:
            raise DataError(f"{shown(tree.path(what))} names {name!r}, which is not there; download the images again")
        if split.setdefault(image, own) != own:
            raise DataError(f"{shown(tree.path(what))} has {name!r} in both splits; download it again")
    if missing := [image for image in images if image not in split]:
        raise DataError(
            f"{shown(tree.path(missing[0]))} is in no list of {shown(tree.path(what))}; leave it out with --ignore, or "
            "the lists, and give --split or --val-fraction"
        )
    return split


def _devkit_labels(tree: Tree, images: Sequence[str]) -> Found | None:
    """The WordNet ids of validation images, by their file names; None where there is no devkit.

    Raises:
        DataError: it is damaged, or does not fit the images.
    """
    found = _devkit_files(tree)
    if found is None:
        return None
    what, meta, truth = found
    name_of = _classes(meta, shown(tree.path(what)))
    lines = truth.decode("utf-8", "replace").split()
    numbers = [int(match[1]) for image in images if (match := _NUMBERED.fullmatch(image))]
    if len(numbers) != len(images):
        if len(lines) != len(images) or not order_is_certain(images):
            raise DataError(
                f"{shown(tree.path(what))} labels {len(lines)} images by number, and the names of these {len(images)} "
                f"({some(images)}) do not say which is which; restore the names ILSVRC2012_val_00000001.JPEG and so on"
            )
        numbers = list(range(1, len(images) + 1))
    if max(numbers) > len(lines) or min(numbers) < 1:
        raise DataError(
            f"{shown(tree.path(what))} labels {len(lines)} images, but there is one with the number {max(numbers)}; "
            "download it again"
        )
    chosen = [lines[number - 1] for number in numbers]
    if bad := [line for line in chosen if line not in name_of]:
        raise DataError(
            f"{shown(tree.path(what))} labels an image {bad[0][:20]!r}, which is no class of it; download it again"
        )
    return Found([name_of[line] for line in chosen], f"the labels of {what}", {what: "labels"})


def _devkit_files(tree: Tree) -> tuple[str, bytes, bytes] | None:
    """What to call it, and the contents of its two files."""
    packed = [name for name in tree.files() if name.rpartition("/")[2] == f"{DEVKIT}.tar.gz"]
    metas = [name for name in tree.files() if name.rpartition("/")[2] == META]
    metas = [name for name in metas if f"{name.rpartition('/')[0]}/{TRUTH}".lstrip("/") in set(tree.files())]
    if len(packed) + len(metas) > 1:
        raise DataError(
            f"{tree.root} holds two of ImageNet's devkits, {some([*packed, *metas])}; leave one out with --ignore"
        )
    if packed:
        files = read_compressed(tree.path(packed[0]), {META, TRUTH})
        if len(files) != 2:
            raise DataError(f"{shown(tree.path(packed[0]))} lacks data/{META} or data/{TRUTH}; download it again")
        return packed[0], files[META], files[TRUTH]
    if metas:
        truth = f"{metas[0].rpartition('/')[0]}/{TRUTH}".lstrip("/")
        return metas[0], *(_bytes(tree, name) for name in (metas[0], truth))  # type: ignore[return-value]
    return None


def _bytes(tree: Tree, name: str) -> bytes:
    path = tree.path(name)
    if path.stat().st_size > _MAX_META:
        raise DataError(
            f"{shown(path)} has more than {_MAX_META >> 20} MiB and is none of ImageNet's; download it again"
        )
    return path.read_bytes()


def _classes(meta: bytes, what: str) -> dict[str, str]:
    """The WordNet id of every leaf class, by the devkit's own number (from 1, in no useful order)."""
    from scipy.io import loadmat

    if len(meta) > _MAX_META:
        raise DataError(f"{what} holds more than {_MAX_META >> 20} MiB of classes; download it again")
    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        rows = zip(synsets["ILSVRC2012_ID"], synsets["WNID"], synsets["num_children"], strict=True)
        found = {str(int(number)): str(name) for number, name, children in rows if int(children) == 0}
    except Exception as error:  # a damaged file of Matlab's can fail in any way
        raise DataError(f"{what} holds no classes of ImageNet ({in_words(error)}); download it again") from error
    if not found or not all(re.fullmatch(r"n\d{8}", name) for name in found.values()):
        raise DataError(f"{what} holds no classes of ImageNet; download it again")
    return found
