"""Label maps of a data set's own images, written piece by piece and entered into its manifest.

Every image is shown to the teacher as a whole, both sides scaled to its square. Of what it finds at every place, the k
largest logits and their classes are written, at the place of the sample in the file, and a note for each stretch of
samples that is on the disk: so the work can be interrupted at any moment, and goes on where it was.

DIR/.train.maps.partial/   journal, notes, and the file in the making; it goes when the manifest knows of the file
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.base import DataError, in_words
from pipelines.conversion.processes import Kept, Progress
from pipelines.conversion.work import Workplace, sync_folder, write_whole
from pipelines.labelling.images import SeenImages
from pipelines.storage.json_files import read_json
from pipelines.storage.manifest import MANIFEST, FileEntry, Manifest, MapsEntry, read_manifest, with_label_maps

BATCH = 32
"""Images shown to the teacher at a time. A constant, so that the same command always makes the same bytes."""
_PIECE = 256  # images between two notes
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
MOST_CLASSES = 1 << 16


class MapTeacher(Protocol):
    """Who looks at the images."""

    name: str
    digest: str
    """SHA-256 of its weights."""
    num_classes: int
    classes: tuple[str, ...] | None
    """Their names, in order; None where only their number is known."""
    side: int
    """Of the square images that it takes, in pixels."""
    resampling: int
    """Pillow's number of the filter that its images are scaled with."""

    def grid(self, most: int | None) -> tuple[int, int]:
        """Of the places that it tells of: its own, or `most` x `most` where its own is finer and `most` not None."""
        ...

    def __call__(
        self, images: NDArray[np.uint8], grid: tuple[int, int], top_k: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
        """Of images (B, side, side, 3): the largest logits (B, top_k, *grid), largest first, their classes, and the
        class of each image as a whole (B,)."""
        ...


@dataclass(frozen=True)
class MapOptions:
    """What making label maps can be told."""

    split: str = "train"
    top_k: int | None = None
    """Classes that are told of each place; None for 5, or all where there are fewer."""
    grid: int | None = None
    """Places along a side; None for the teacher's own, 18 where those are more."""
    square: bool = False
    """Show the central square only, the shorter side scaled, as the authors' code does."""
    jobs: int = 1
    """Threads that decode."""
    restart: bool = False


_USUAL_GRID, _USUAL_TOP = 18, 5


def make_label_maps(
    root: Path,
    teacher: MapTeacher,
    options: MapOptions,
    progress: Progress,
    tell: Callable[[str], None] = lambda message: None,
) -> MapsEntry:
    """Write the label maps of a split of the converted data set at `root`, and enter them into its manifest.

    The same call continues what was interrupted. `tell` hears sentences.

    Raises:
        DataError: there is no such set or split, the teacher's classes are others, or there are other maps already.
        Kept: the disk could not be written; what is finished stays.
    """
    manifest, _ = read_manifest(root)
    if options.split not in manifest.splits:
        raise DataError(f"{root} has no {options.split} split; it has {', '.join(manifest.splits)}")
    check_classes(teacher, manifest, root, tell)
    grid = teacher.grid(_USUAL_GRID if options.grid is None else options.grid)
    if options.grid is not None and grid != (options.grid, options.grid):
        raise ValueError(
            f"--label-grid is {options.grid}, and {teacher.name} tells {grid[0]} x {grid[1]} places apart; "
            f"name at most {min(grid)}, or leave it out"
        )
    top_k = min(_USUAL_TOP, teacher.num_classes) if options.top_k is None else options.top_k
    if not 1 <= top_k <= teacher.num_classes:
        raise ValueError(f"--top-k is {top_k}; it must lie in 1 ... {teacher.num_classes}, the teacher's classes")
    purpose = {
        "teacher_sha256": teacher.digest,
        "side": teacher.side,
        "covers": "square" if options.square else "whole",
        "grid": list(grid),
        "top_k": top_k,
    }
    there = manifest.label_maps.get(options.split)
    if there is not None:
        before = json.loads(json.dumps(asdict(there)))
        if all(before[name] == value for name, value in purpose.items()):
            tell(f"{root} has these label maps already, {there.file}")
            return there
        if not options.restart and not _begun(root, options.split, purpose):
            raise DataError(
                f"{root} has label maps of its {options.split} split already ({_told(there.teacher, before)}, not "
                f"{_told(teacher.name, purpose)}); --restart makes these in their place"
            )
    place = Workplace(_place(root, options.split), purpose, restart=options.restart, shared=False)
    if place.continued:
        tell(f"continuing the unfinished label maps of {root}")
    try:
        entry = _Making(root, manifest, teacher, options, grid, place, purpose).run(progress)
    except BaseException as error:
        place.leave()
        tell(f"what is finished is kept: the same command continues, and with --restart drops it ({place.folder})")
        if isinstance(error, OSError) and error.errno in _DISK:
            raise Kept(
                f"{root} cannot be written ({in_words(error)}); mend that, and the same command continues"
            ) from error
        raise
    place.remove()
    if there is not None and there.file != entry.file:
        (root / there.file).unlink(missing_ok=True)
    return entry


def _place(root: Path, split: str) -> Path:
    """What the folder of unfinished maps is named after."""
    return root / f"{split}.maps"


def _begun(root: Path, split: str, purpose: Mapping[str, Any]) -> bool:
    """Whether these very maps were begun, in the place of others."""
    place = _place(root, split)
    try:
        journal = (place.parent / f".{place.name}.partial" / "journal.json").read_bytes()
        return bool(json.loads(journal) == purpose)
    except (OSError, ValueError):
        return False


def _told(teacher: str, how: Mapping[str, Any]) -> str:
    grid = " x ".join(map(str, how["grid"]))
    return f"{teacher} at {how['side']} pixels, the {how['covers']} image, {grid}, top {how['top_k']}"


def check_classes(
    teacher: MapTeacher, manifest: Manifest, root: Path, tell: Callable[[str], None] = lambda message: None
) -> None:
    """Raise `DataError` unless the teacher's classes are those of the data set, in the same order."""
    ours, theirs = manifest.classes, teacher.classes
    if teacher.num_classes != len(ours):
        raise DataError(
            f"{teacher.name} knows {teacher.num_classes:,} classes and {root} has {len(ours):,}; name a teacher that "
            "was trained on these"
        )
    if len(ours) >= MOST_CLASSES:
        raise DataError(
            f"{root} has {len(ours):,} classes; label maps number them with 16 bits, up to {MOST_CLASSES:,}"
        )
    if theirs is None:
        tell(f"what {teacher.name} calls its classes is not known: taken to be those of {root}, in the same order")
    elif theirs != ours:
        label = next(i for i, (one, other) in enumerate(zip(theirs, ours, strict=True)) if one != other)
        raise DataError(
            f"class {label} is {theirs[label]!r} to {teacher.name} and {ours[label]!r} in {root}; name a teacher that "
            "was trained on these classes, in their order"
        )


class _Making:
    """One run of the work."""

    def __init__(
        self,
        root: Path,
        manifest: Manifest,
        teacher: MapTeacher,
        options: MapOptions,
        grid: tuple[int, int],
        place: Workplace,
        purpose: dict[str, Any],
    ) -> None:
        self.root, self.teacher, self.options, self.grid, self.place = root, teacher, options, grid, place
        self.purpose, self.top_k = purpose, purpose["top_k"]
        self.images = SeenImages(root, options.split, teacher.side, teacher.resampling, square=options.square)
        self.count = manifest.splits[options.split].num_samples
        self.shape = (2, self.top_k, *grid)
        digest = hashlib.sha256(json.dumps(purpose, sort_keys=True).encode()).hexdigest()
        self.name = f"{options.split}.maps.{digest[:8]}.npy"
        self.path = place.set / self.name
        self.pieces = [range(at, min(at + _PIECE, self.count)) for at in range(0, self.count, _PIECE)]

    def run(self, progress: Progress) -> MapsEntry:
        notes = [self.place.work / f"piece-{number:06d}" for number in range(len(self.pieces))]
        finished = self.root / self.name
        if not self.path.exists():
            if finished.exists() and all(note.exists() for note in notes):
                finished.rename(self.path)  # it had been moved, and the manifest was not told
            else:
                for note in notes:
                    note.unlink(missing_ok=True)
        todo = [number for number, note in enumerate(notes) if not note.exists()]
        header = self._open(fresh=len(todo) == len(notes))
        progress.start(f"labelling {self.options.split}", self.count)
        progress.advance(self.count - sum(len(self.pieces[number]) for number in todo))
        with self.path.open("r+b") as file:
            for number, rows, correct in self._labelled(todo, progress):
                content = rows.tobytes()
                file.seek(header + self.pieces[number].start * rows[0].nbytes)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                write_whole(notes[number], json.dumps({"crc32": zlib.crc32(content), "correct": correct}).encode())
        told = [read_json(note, dict[str, int], remedy="begin again with --restart") for note in notes]
        file_entry = self._checked(header, [note["crc32"] for note in told])
        entry = MapsEntry(
            file=self.name,
            teacher=self.teacher.name,
            **{**self.purpose, "grid": self.grid},
            num_classes=self.teacher.num_classes,
            top1=sum(note["correct"] for note in told) / self.count,
        )
        text = with_label_maps(self.root, self.options.split, entry, file_entry)
        write_whole(self.place.work / MANIFEST, text.encode())
        self.path.rename(finished)
        sync_folder(self.root)
        (self.place.work / MANIFEST).replace(self.root / MANIFEST)
        sync_folder(self.root)
        return entry

    def _open(self, *, fresh: bool) -> int:
        """Make the file in its full size if it is `fresh`; returns the bytes in front of its rows."""
        if fresh:
            size = self.count * int(np.prod(self.shape)) * 2
            if size > (free := shutil.disk_usage(self.place.folder).free):
                raise Kept(
                    f"{self.root} has {free / 1e6:,.1f} MB left, and its label maps need {size / 1e6:,.1f} MB; make "
                    "room, and the same command continues"
                )
            np.lib.format.open_memmap(self.path, mode="w+", dtype="<i2", shape=(self.count, *self.shape)).flush()
        mapped = np.lib.format.open_memmap(self.path, mode="r")
        if mapped.shape != (self.count, *self.shape) or mapped.dtype != np.dtype("<i2"):
            raise Kept(f"{self.path} is not as it was begun; begin again with --restart")
        return int(mapped.offset)

    def _labelled(self, todo: Sequence[int], progress: Progress) -> Iterator[tuple[int, NDArray[np.int16], int]]:
        """Rows of the pieces, and how many of their images the teacher classifies as they are labelled."""
        batches = [
            (number, self.pieces[number][at : at + BATCH])
            for number in todo
            for at in range(0, len(self.pieces[number]), BATCH)
        ]
        rows: list[NDArray[np.int16]] = []
        correct = 0
        for (number, batch), images in zip(
            batches, self.images.batches([batch for _, batch in batches], self.options.jobs), strict=True
        ):
            logits, classes, best = self.teacher(images, self.grid, self.top_k)
            self._check_finite(logits, batch)
            most = float(np.finfo(np.float16).max)
            bits = logits.clip(-most, most).astype("<f2").view("<i2")
            rows.append(np.stack([bits, classes.astype("<u2").view("<i2")], axis=1))
            correct += int((best == self.images.labels[batch.start : batch.stop]).sum())
            progress.advance(len(batch))
            if batch.stop == self.pieces[number].stop:
                yield number, np.concatenate(rows), correct
                rows, correct = [], 0

    def _check_finite(self, logits: NDArray[np.float32], batch: range) -> None:
        good = np.isfinite(logits).reshape(len(logits), -1).all(axis=1)
        if not good.all():
            name = self.images.name(batch[int(np.argmin(good))])
            raise DataError(f"{self.teacher.name} finds values that are no numbers in {name}; name another teacher")

    def _checked(self, header: int, sums: Sequence[int]) -> FileEntry:
        """Size and sha256 of the file, whose pieces are as they were written."""
        digest, row = hashlib.sha256(), int(np.prod(self.shape)) * 2
        with self.path.open("rb") as file:
            digest.update(file.read(header))
            for number, (piece, expected) in enumerate(zip(self.pieces, sums, strict=True)):
                content = file.read(len(piece) * row)
                if zlib.crc32(content) != expected:
                    (self.place.work / f"piece-{number:06d}").unlink()
                    raise Kept(
                        f"{self.path} is not as it was written (samples {piece.start} to {piece.stop - 1}); the same "
                        "command makes these again"
                    )
                digest.update(content)
        return FileEntry(header + self.count * row, digest.hexdigest())
