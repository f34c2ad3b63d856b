"""Turn a folder of images into a data set the loaders read: all of it appears at the destination, or nothing."""

from __future__ import annotations

import importlib.metadata
import io
import os
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import numpy as np

from pipelines.base import DataError
from pipelines.digits import write_digits
from pipelines.ffcv_file import write_betons
from pipelines.manifest import (
    MANIFEST,
    SAMPLE,
    SPLIT_ALIASES,
    FileEntry,
    Manifest,
    Split,
    canonical_split,
    read_manifest,
)
from pipelines.processes import map_processes
from pipelines.scan import ImageFile, Unreadable, check_images, list_split
from pipelines.shards import hash_file, write_file, write_shards
from pipelines.source import class_names, find_split_folder

DIGITS = "digits"
DIGITS_VAL_FRACTION = 0.2

Format = Literal["ffcv", "dali"]
T = TypeVar("T")
_LISTED = 10  # unreadable files named in a message
_SHUFFLE, _HOLD_OUT = 1, 2  # second Philox key, keeping the two uses of the seed apart


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a conversion can be told."""

    formats: tuple[Format, ...]
    """`dali`: tars with the original bytes, for DALI and torch. `ffcv`: .beton files, and tars for validation."""
    split: str | None = None
    """Of a `<class>/*.jpg` source: the one split all images belong to."""
    val_fraction: float | None = None
    """Share of every class held out for validation, where the source has no validation split."""
    max_size: int = 500
    """FFCV: longest side in pixels; larger images are scaled down."""
    quality: int = 90
    """FFCV: JPEG quality."""
    jobs: int = 1
    """Processes."""
    on_error: Literal["fail", "skip"] = "fail"
    """What an unreadable image means."""
    shard_size: int = 2000
    """Images per tar."""
    seed: int = 0
    """Of the one shuffle the training split gets, and of the choice of held-out images."""

    def __post_init__(self) -> None:
        if not self.formats or not set(self.formats) <= {"ffcv", "dali"}:
            raise ValueError(f"--format is {','.join(self.formats)!r}; use ffcv, dali or ffcv,dali")
        if self.val_fraction is not None and not 0 < self.val_fraction < 1:
            raise ValueError(f"--val-fraction is {self.val_fraction}; it must lie between 0 and 1")
        if self.on_error not in ("fail", "skip"):
            raise ValueError(f"--on-error is {self.on_error!r}; use fail or skip")
        if not 16 <= self.max_size <= 16384:
            raise ValueError(f"--max-size is {self.max_size}; it must lie in 16 ... 16384 pixels")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"--quality is {self.quality}; it must lie in 1 ... 100")
        if self.jobs < 1 or self.shard_size < 1 or self.seed < 0:
            raise ValueError("--jobs and --shard-size must be at least 1, --seed at least 0")


class Progress(Protocol):
    """Hears how a conversion is getting on."""

    def start(self, phase: str, total: int) -> None:
        """A phase of `total` images begins."""

    def advance(self, images: int) -> None:
        """So many more images are done."""


def convert(source: str, dest: Path, options: Options, progress: Progress) -> Manifest:
    """Convert `source`, the word "digits" or a folder, to the new folder `dest`.

    Everything is written beside `dest` and renamed at the end. Raises `DataError` or `ValueError` with nothing left
    behind; the same holds for any other way out, Ctrl-C included.
    """
    if dest.exists():
        raise DataError(f"{dest} already exists; remove it or choose another name")
    if not dest.parent.is_dir():
        raise DataError(f"there is no folder {dest.parent} to put {dest.name} in")
    partial = dest.with_name(f"{dest.name}.partial-{secrets.token_hex(4)}")
    partial.mkdir()
    try:
        manifest = _convert_into(partial, source, options, progress)
        _sync_folder(partial)
        partial.rename(dest)
        _sync_folder(dest.parent)
        return manifest
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _convert_into(folder: Path, source: str, options: Options, progress: Progress) -> Manifest:
    if source == DIGITS:
        if options.split is not None:
            raise DataError("--split is for a folder of classes; the digits are split by --val-fraction")
        scans = folder / "scans"
        write_digits(scans)
        fraction = DIGITS_VAL_FRACTION if options.val_fraction is None else options.val_fraction
        classes, listed = _list_classes(scans, None, fraction, options.seed)
    else:
        classes, listed = _list_folder(Path(source), options)
    images, skipped = _check(listed, classes, options, progress)
    splits: dict[str, Split] = {}
    files: dict[str, FileEntry] = {}
    betons: dict[Path, Sequence[ImageFile]] = {}
    for split, members in images.items():
        if split == "train":
            members = _permuted(members, options.seed, _SHUFFLE)
        splits[split], written = _write_split(folder, split, members, len(classes), options, progress)
        files.update(written)
        if beton := splits[split].beton:
            betons[folder / beton] = members
    if betons:
        progress.start("writing .beton files", sum(len(members) for members in betons.values()))
        write_betons(
            betons,
            max_size=options.max_size,
            quality=options.quality,
            jobs=options.jobs,
            progress=progress.advance,
        )
        files.update({path.name: hash_file(path) for path in betons})
    if source == DIGITS:
        shutil.rmtree(scans)
    manifest = Manifest(
        classes=classes,
        splits=splits,
        files=files,
        made={
            "source": source if source == DIGITS else str(Path(source).resolve()),
            "options": asdict(options),
            "versions": {name: importlib.metadata.version(name) for name in ("numpy", "pillow")},
        },
        skipped=tuple({"file": bad.path, "reason": bad.reason} for bad in skipped),
        transcoded=tuple(image.path for members in images.values() for image in members if image.transcode),
    )
    write_file(folder / MANIFEST, manifest.to_json().encode())
    return manifest


def verify(root: Path, jobs: int, progress: Progress) -> Manifest:
    """Compare every file of a converted data set with its manifest; `DataError` names those that differ.

    The loaders themselves look at sizes only: a checksum of every image would cost them more than 3 % of their time.
    """
    manifest, _ = read_manifest(root)
    names = sorted(manifest.files)
    progress.start("verifying files", len(names))
    paths = [root / name for name in names]
    found = map_processes(_hash_if_present, paths, jobs, lambda _: progress.advance(1))
    if bad := [name for name, entry in zip(names, found, strict=True) if entry != manifest.files[name]]:
        more = f" and {len(bad) - _LISTED} more" if len(bad) > _LISTED else ""
        raise DataError(
            f"{root}: {', '.join(bad[:_LISTED])}{more} are not as they were written; copy them again or convert anew"
        )
    return manifest


def _hash_if_present(path: Path) -> FileEntry | None:
    return hash_file(path) if path.exists() else None


Listing = dict[str, list[tuple[str, int]]]
"""Per split the (path, label) of its images."""


def _list_folder(source: Path, options: Options) -> tuple[tuple[str, ...], Listing]:
    if not source.is_dir():
        raise DataError(f"there is no folder {source}")
    folders = {split: found for split in SPLIT_ALIASES if (found := find_split_folder(source, split))}
    if not folders:
        return _list_classes(source, options.split, options.val_fraction, options.seed)
    if options.split is not None:
        raise DataError(f"--split is for a folder of classes; {source} has {', '.join(folders)} folders itself")
    if set(folders) == {"train"} and options.val_fraction is not None:
        return _list_classes(folders["train"], None, options.val_fraction, options.seed)
    if options.val_fraction is not None:
        raise DataError(f"{source} has a validation split of its own; leave --val-fraction out")
    classes = _classes(next(iter(folders.values())))
    return classes, {split: list_split(folder, classes) for split, folder in folders.items()}


def _list_classes(
    folder: Path, split: str | None, val_fraction: float | None, seed: int
) -> tuple[tuple[str, ...], Listing]:
    classes = _classes(folder)
    if (split is None) == (val_fraction is None):
        raise DataError(
            f"{folder} holds classes, not splits; give either --val-fraction, to hold some out for validation, "
            "or --split, to say which split they are"
        )
    files = list_split(folder, classes)
    if split is not None:
        return classes, {canonical_split(split): files}
    assert val_fraction is not None
    by_class: list[list[tuple[str, int]]] = [[] for _ in classes]
    for file in files:
        by_class[file[1]].append(file)
    train, val = [], []
    for label, (name, own) in enumerate(zip(classes, by_class, strict=True)):
        held_out = max(1, round(len(own) * val_fraction))
        if held_out >= len(own):
            raise DataError(f"class {name!r} has {len(own)} image(s), too few to hold out {held_out} for validation")
        chosen = _permuted(own, seed, _HOLD_OUT + label)
        val.extend(sorted(chosen[:held_out]))
        train.extend(sorted(chosen[held_out:]))
    return classes, {"train": train, "val": val}


def _classes(folder: Path) -> tuple[str, ...]:
    if classes := class_names(folder):
        return classes
    raise DataError(f"{folder} has no class folder; expected <class>/*.jpg or train|val/<class>/*.jpg in the source")


def _permuted(items: Sequence[T], seed: int, purpose: int) -> list[T]:
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, purpose], dtype=np.uint64)))
    return [items[i] for i in generator.permutation(len(items))]


def _check(
    listed: Listing, classes: tuple[str, ...], options: Options, progress: Progress
) -> tuple[dict[str, list[ImageFile]], list[Unreadable]]:
    images: dict[str, list[ImageFile]] = {}
    unreadable: list[Unreadable] = []
    for split, files in listed.items():
        progress.start(f"checking {split}", len(files))
        images[split], bad = check_images(files, options.jobs, progress.advance)
        unreadable.extend(bad)
        if options.on_error == "skip":
            left = {image.label for image in images[split]}
            if empty := [name for label, name in enumerate(classes) if label not in left]:
                raise DataError(f"class {empty[0]!r} has no readable image in the {split} split")
    if unreadable and options.on_error == "fail":
        names = "; ".join(f"{bad.path}: {bad.reason}" for bad in unreadable[:_LISTED])
        more = f"; and {len(unreadable) - _LISTED} more" if len(unreadable) > _LISTED else ""
        raise DataError(
            f"{len(unreadable)} image(s) cannot be read ({names}{more}); repair or remove them, "
            "or leave them out with --on-error skip"
        )
    return images, unreadable


def _write_split(
    folder: Path,
    split: str,
    images: Sequence[ImageFile],
    num_classes: int,
    options: Options,
    progress: Progress,
) -> tuple[Split, dict[str, FileEntry]]:
    files: dict[str, FileEntry] = {}
    rows = np.zeros(len(images), dtype=SAMPLE)
    for name in ("label", "height", "width", "crc32"):
        rows[name] = [getattr(image, name) for image in images]
    rows["shard"] = -1
    shards: tuple[str, ...] = ()
    if "dali" in options.formats or split == "val":  # accuracy is measured on the original bytes
        progress.start(f"writing {split} tars", len(images))
        written = write_shards(
            folder,
            split,
            images,
            shard_size=options.shard_size,
            jobs=options.jobs,
            progress=progress.advance,
        )
        rows = np.concatenate([shard.rows for shard in written])
        for shard in written:
            files.update(shard.files)
        shards = tuple(name for name in files if name.endswith(".tar"))
    beton = f"{split}.beton" if "ffcv" in options.formats else None
    table = f"{split}.samples.npy"
    content = io.BytesIO()
    np.save(content, rows)
    files[table] = write_file(folder / table, content.getvalue())
    per_class = np.bincount(rows["label"], minlength=num_classes)
    return Split(len(images), tuple(int(n) for n in per_class), table, shards, beton), files


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
