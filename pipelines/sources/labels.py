"""Text files that say which class the images of a flat folder are of, or which split the images of class folders."""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from pipelines.base import DataError, in_words
from pipelines.sources.archive import read_compressed
from pipelines.sources.columns.names import FullNames
from pipelines.sources.columns.tree import Tree, shown, some
from pipelines.sources.names import is_image, order_is_certain, said_split
from pipelines.sources.texts import NoTable, rows, text_files

_TITLES = ("label", "labels", "class", "class_name", "classname", "category", "target", "breed", "species", "wnid")
_MAX_DIGITS = 9
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

    def divided(self, classes: Mapping[str, Sequence[str]]) -> dict[str, dict[str, FullNames]]:
        """Images by split and class; `classes` has the images of each."""
        found: dict[str, dict[str, list[str]]] = {"train": {}, "val": {}}
        for name, images in classes.items():
            for image in images:
                found[self.split[image]].setdefault(name, []).append(image)
        return {split: {name: FullNames.of(own) for name, own in divided.items()} for split, divided in found.items()}


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
        others: the last parts of the names of other images, as far as some of `images` are called so.

    Raises:
        DataError: a file labels some of them only, or several disagree, or labels are numbers of an unknown meaning.
    """
    last = [PurePosixPath(name).name for name in images] if names is None else list(names)
    if (devkit := _devkit_labels(tree, last)) is not None:
        return devkit
    twice = next((one for one in last if one in others), None)
    images_of = _Images(last, last if names is not None else images)
    by_file: dict[str, list[str]] = {}
    by_line: dict[str, list[str]] = {}
    wrong: list[DataError] = []
    unread: list[DataError] = []
    for name in text_files(tree):
        said = said_split(name)
        if split is not None and said not in (None, split):
            continue
        try:
            labels, lines = images_of.labels(tree, name, None if split is not None and said == split else twice)
        except DataError as error:
            (unread if isinstance(error, NoTable) else wrong).append(error)
            continue
        if labels is not None and not _is_numbering(labels):
            by_file[name] = labels
        elif lines is not None and classes:  # else any text of so many lines would do
            by_line[name] = lines
    if wrong and not by_file:
        raise wrong[0]
    found = by_file or by_line
    if not found and unread:
        raise unread[0]
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


def _is_numbering(labels: Sequence[str]) -> bool:
    """Whether they only count the images, from 1, as those in ImageNet's lists of its splits do."""
    return len(labels) > 1 and labels == [str(number) for number in range(1, len(labels) + 1)]


def _class_in(row: list[str], header: list[str]) -> str | None:
    """The class in a line that begins with a file's name; None where it is not certain which entry that is."""
    called = [at for at, title in enumerate(header) if title.lower() in _TITLES]
    if len(row) > 2 and len(called) == 1 and called[0] < len(row):
        return row[called[0]]
    if boxed := _BOXED.fullmatch(" ".join(row[1:])):
        return boxed[1]
    numbers = [part.lstrip("-").replace(".", "", 1).isdecimal() for part in row[1].split()]
    return None if len(row) > 2 or (len(numbers) > 1 and all(numbers)) else row[1]


class _Images:
    """The images that want labels, by what text files call them."""

    def __init__(self, names: Sequence[str], paths: Sequence[str]) -> None:
        self.names = names
        self.folders = [path.rpartition("/")[0] for path in paths]
        self.at = {name: i for i, name in enumerate(names)}
        stems = {PurePosixPath(name).stem: i for i, name in enumerate(names)}
        if len(stems) == len(names):
            self.at = stems | self.at

    def find(self, called: str) -> tuple[int | None, str]:
        """Which image a file calls so, with or without its suffix, and in which folder it says the image is."""
        folder, _, last = called.removeprefix("./").rpartition("/")
        at = self.at.get(last)
        if at is None and is_image(last):
            at = self.at.get(PurePosixPath(last).stem)  # .JPEG for .jpg
        if at is not None and folder and (own := self.folders[at]) and not f"/{own}/".endswith(f"/{folder}/"):
            return None, folder  # it lies in another folder, and has the name of one of these
        return at, folder

    def labels(self, tree: Tree, name: str, twice: str | None) -> tuple[list[str] | None, list[str] | None]:
        """The labels in a file that names images, or in one with a label a line; None for what it is not.

        `twice` is one of the names that images elsewhere have as well; `DataError` as `find`.
        """
        what = shown(tree.path(name))
        labels: list[str | None] = [None] * len(self.names)
        lines: list[str] | None = []
        header: list[str] = []
        for row in rows(tree.path(name)):
            header = header or row
            if len(row) != 1 or is_image(row[0]) or (lines is not None and len(lines) == len(self.names)):
                lines = None
            elif lines is not None:
                lines.append(row[0])
            if len(row) < 2 or not row[1]:
                continue
            at, folder = self.find(row[0])
            if at is None:
                continue
            if twice is not None and not folder:
                raise DataError(
                    f"{what} does not say the folder of its files, and there are several {twice}; write it before each "
                    "name, or give the file the name of its split"
                )
            label = _class_in(row, header)
            if label is None:
                raise DataError(
                    f"{what} has a line of {len(row[1].split()) + len(row) - 1} entries, and it is not certain which "
                    f"is the class of {self.names[at]}; keep FILE and CLASS"
                )
            if labels[at] not in (None, label):
                raise DataError(f"{what} labels {self.names[at]} twice, {labels[at]} and {label}; mend it")
            labels[at] = label
        if not any(label is not None for label in labels):
            return None, lines if lines is not None and self._one_each(lines) else None
        if missing := [image for image, label in zip(self.names, labels, strict=True) if label is None]:
            raise DataError(
                f"{what} has no line for {missing[0]}, one of {len(missing)} without a label; download it again, or "
                "leave the images out with --ignore"
            )
        return [label for label in labels if label is not None], None

    def _one_each(self, lines: Sequence[str]) -> bool:
        """Whether they are a label for each image; as many different words are a list of files or of the classes."""
        return len(lines) == len(self.names) and (len(lines) < 3 or len(set(lines)) < len(lines))


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
    found = tree.called(_CATEGORIES.__eq__)
    return found[0] if len(found) == 1 else None


def _categories(tree: Tree) -> dict[str, str] | None:
    """Places365's names of its numbers: `/a/airfield 0`."""
    name = _categories_file(tree)
    if name is None:
        return None
    return {row[1]: _place(row[0]) for row in rows(tree.path(name)) if len(row) == 2}


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
        names, training = (dict(_pairs(tree, f"{place}{name}.txt")) for name in ("images", "train_test_split"))
        if wrong := [flag for flag in training.values() if flag not in ("0", "1")]:
            raise DataError(
                f"{shown(tree.path(place))}train_test_split.txt holds {wrong[0][:20]!r}; expected 1 for training and 0 "
                "for test, so download it again"
            )
        listed = [(names.get(key, ""), "train" if flag == "1" else "val") for key, flag in training.items()]
        used = [f"{place}images.txt", f"{place}train_test_split.txt"]
    elif {"train.txt", "test.txt"} <= set(tree.folders.get(f"{place}meta", ())):
        used = [f"{place}meta/train.txt", f"{place}meta/test.txt"]
        listed = [
            (row[0], split)
            for name, split in zip(used, ("train", "val"), strict=True)
            for row in rows(tree.path(name))
            if len(row) == 1
        ]
    else:
        return None
    return Lists(_assigned(tree, base, images, listed, used[-1]), " and ".join(used), dict.fromkeys(used, "splits"))


def _pairs(tree: Tree, name: str) -> Iterator[tuple[str, str]]:
    for row in rows(tree.path(name)):
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
    packed = tree.called(f"{DEVKIT}.tar.gz".__eq__)
    metas = [name for name in tree.called(META.__eq__) if TRUTH in tree.folders[name.rpartition("/")[0]]]
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
