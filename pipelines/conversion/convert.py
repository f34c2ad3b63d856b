"""Turn images of many sources into a data set the loaders read. All of it appears at the destination, or nothing."""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.base import DataError, in_words
from pipelines.conversion.beton import BetonFile, Piece, encode_piece, opencv, plan_raw, too_narrow
from pipelines.conversion.companions import companion_files
from pipelines.conversion.engines import map_tasks
from pipelines.conversion.jpeg_warnings import turbojpeg_found
from pipelines.conversion.options import DIGITS_VAL_FRACTION, Options
from pipelines.conversion.processes import PATIENCE, Kept, Progress, Spoilt
from pipelines.conversion.ray_tasks import need_ray
from pipelines.conversion.scan import Images, Unreadable, check_chunk, checked_images
from pipelines.conversion.shards import (
    Shard,
    plan_shards,
    rows_without_tars,
    tar_phase,
    write_file,
    write_rows,
    write_shard,
)
from pipelines.conversion.splits import SHUFFLE, account_of, check_splits, divide, permutation
from pipelines.conversion.verify import LISTED, check_samples, hashed, listed, write_checked
from pipelines.conversion.work import Busy, Crew, DepotPlace, Workplace, begun, chunks_of
from pipelines.remote.depot import Depot, made
from pipelines.remote.store import Missing, StoreError, usual_folder
from pipelines.sources.columns.samples import Samples
from pipelines.sources.elsewhere import by_its_path, called, check_apart
from pipelines.sources.listing import DIGITS, Listing, Spool
from pipelines.storage.beton import stored_path
from pipelines.storage.manifest import MANIFEST, SAMPLE, FileEntry, Manifest, Split


def convert(
    source: str,
    dest: Path | str,
    options: Options,
    progress: Progress,
    tell: Callable[[str], None] = lambda message: None,
) -> Manifest | None:
    """Convert `source`, the word "digits", a file or a folder, to `dest`, a new folder or an address.

    Everything is written beside `dest` and renamed at the end; at an address, `dataset.json` comes last. Raises
    `DataError` or `ValueError`, with nothing left behind, for what is wrong with source and options as it begins, and
    with images. Any other way out, Ctrl-C and `Kept` included, keeps what is finished: the same call continues it.
    None: the share of `options.part` is done, but others are not; if the others have finished all of it, it is told
    what they made. `tell` hears sentences.
    """
    dest = by_its_path(dest)
    if "ffcv" in options.formats:
        if isinstance(dest, str):
            raise ValueError(
                f"--format ffcv writes one file of all images, which no loader reads from {dest}; use dali, or name a "
                "folder"
            )
        opencv()
    if options.engine == "ray":
        need_ray()
    options.check_work_dir(source, dest)
    given, source = source, source if source == DIGITS else called(source)
    check_apart(source, dest)
    purpose = {"source": source, **options.purpose()}
    shared = options.part is not None
    if shared and (finished := made(dest, purpose)) is not None:
        tell(f"{options.who} finds {dest} finished by the others")
        return finished
    if isinstance(dest, Path) and os.path.lexists(dest):
        link = ", as a link to what is not there" if not dest.exists() else ""
        raise DataError(f"{dest} already exists{link}; remove it or choose another name")
    place: Workplace
    if isinstance(dest, Path):
        place = Workplace(dest, purpose, restart=options.restart, shared=shared)
    else:
        below = (options.work_dir or usual_folder()).absolute()
        place = DepotPlace(Depot(dest), below, purpose, restart=options.restart, shared=shared)
    if place.continued and not shared:
        tell(f"continuing the unfinished conversion to {place.shown}")
    if not place.locked:
        disk = place.folder.parent
        tell(f"{disk} lies on a file system without locks: see to it that nothing else writes {place.shown}")
    kept = f"what is finished is kept; the same command continues, and --restart drops it ({place.keeps})"
    try:
        manifest = _Conversion(place, given, source, options, progress, tell).run()
    except BaseException as error:
        overtaken = isinstance(error, FileNotFoundError) or isinstance(error.__cause__, Missing)
        if overtaken and (finished := made(dest, purpose)) is not None:  # the others have cleared up meanwhile
            place.leave(done=True)
            tell(f"{options.who} finds {dest} finished by the others")
            return finished
        if isinstance(error, ValueError) and not isinstance(error, Kept):
            if not shared and (not place.continued or isinstance(error, Spoilt)):
                place.remove()
                raise
            place.leave()
            if shared and not isinstance(error, StoreError):
                raise
            tell(kept)
            raise Kept(str(error)) from error
        place.leave()
        if isinstance(error, Busy):
            raise
        tell(kept)
        if isinstance(error, OSError) and error.errno in _DISK:
            at = error.filename if isinstance(error.filename, str) else place.folder.parent
            raise Kept(
                f"{at} cannot be written ({in_words(error)}); mend that, and the same command continues"
            ) from error
        raise
    place.leave(done=True)
    return manifest


_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""What a disk says when it cannot be written to any more."""


def merge(
    dest: Path | str,
    jobs: int,
    progress: Progress,
    tell: Callable[[str], None],
    patience: float = PATIENCE,
    work_dir: Path | None = None,
) -> Manifest:
    """Finish a conversion that was begun in parts: do what is missing, put all together, verify."""
    dest = by_its_path(dest)
    if (purpose := begun(dest) if isinstance(dest, Path) else Depot(dest).journal()) is None:
        raise DataError(f"there is no unfinished conversion to {dest}; start one with --part")
    source = purpose.pop("source", "")
    try:
        options = Options.of_purpose(purpose, jobs=jobs, patience=patience, work_dir=work_dir)
    except LookupError as error:
        raise DataError(
            f"the journal of {dest} is of another version of pss or damaged ({error.args[0]}); begin again with "
            "--restart"
        ) from error
    manifest = convert(source, dest, options, progress, tell)
    assert manifest is not None
    return manifest


_BESIDE = 3000  # bytes in a tar besides an image: headers, label, number


class _Conversion:
    """One run of a conversion in its workplace."""

    def __init__(
        self,
        place: Workplace,
        given: str,
        source: str,
        options: Options,
        progress: Progress,
        tell: Callable[[str], None],
    ) -> None:
        """`given` may have a query, and `source` is what messages name."""
        self.place, self.given, self.source, self.options = place, given, source, options
        self.progress, self.tell = progress, tell
        self.crew = Crew(place.work, options.jobs, options.engine, options.part, options.patience, self._depot)
        self._planned: dict[str, list[Shard]] = {}

    @property
    def _depot(self) -> Depot | None:
        return self.place.depot if isinstance(self.place, DepotPlace) else None

    def run(self) -> Manifest | None:
        if self.source == DIGITS and self.options.split is not None:
            raise DataError("--split is for other sources; the digits are split by --val-fraction")
        self.inspected = self.options.inspect(self.given, self.progress, self.tell)
        fraction = self.options.val_fraction
        if self.source == DIGITS and fraction is None:
            fraction = DIGITS_VAL_FRACTION
        check_splits(self.inspected.claim.splits, self.source, self.options.split, fraction)
        self.tell("\n".join(self.inspected.in_words()))
        listing = self.inspected.listing(Spool(self.place.work))
        self._compare_listing(listing)
        samples = divide(listing, self.source, self.options.split, fraction, self.options.seed)
        images, skipped = self._check(samples, listing.classes)
        self._check_room(images)
        if "train" in images:
            order = permutation(len(images["train"]), self.options.seed, SHUFFLE)
            images["train"] = images["train"].take(order)
        for split, members in images.items():
            self._write_tars(split, members)
            self._write_beton(split, members)
        # only now: the part that finishes last must find all others finished
        for split, members in images.items():
            tars = self.crew.paths(tar_phase(split), len(self._shards(split, members)))
            self.crew.learn(tars)
            if not all(path.exists() for path in (*tars, *self._beton_results(split, members))):
                return None
        with self.place.merging() as ours:
            if not ours:
                return None
            manifest = self._merge(listing.classes, images, skipped)
        self.inspected.remove_copies()
        return manifest

    def _check_room(self, images: Mapping[str, Images]) -> None:
        """Raise `Kept` where the tars will not fit on the disk. How large FFCV's JPEG files become is not known."""
        tars = [members for split, members in images.items() if "dali" in self.options.formats or split == "val"]
        needed = sum(int(members.column("bytes").sum()) + _BESIDE * len(members) for members in tars)
        if self._depot is not None:  # tars leave as they are written
            of_one = needed // max(1, sum(map(len, tars))) * self.options.shard_size
            needed = min(needed, of_one * (self.options.jobs + 1))
        self.place.check_room(needed)

    @property
    def _ffcv(self) -> bool:
        return "ffcv" in self.options.formats

    def _compare_listing(self, listing: Listing) -> None:
        """Raise `Busy` if the source is not what it was when an interrupted conversion began."""
        digest = hashlib.sha256(repr(listing.classes).encode())
        for split, samples in listing.splits.items():
            digest.update(split.encode())
            for sample in samples:
                digest.update(f"{sample.name}\0{sample.label}\0{sample.offset}\0{sample.length}\n".encode())
        if not self.place.agree("listing.sha256", digest.hexdigest().encode()):
            raise Busy(
                f"{self.source} has changed since the conversion to {self.place.shown} began; give --restart to begin "
                "again"
            )

    def _check(
        self, splits: Mapping[str, Samples], classes: Sequence[str]
    ) -> tuple[dict[str, Images], list[Unreadable]]:
        images: dict[str, Images] = {}
        unreadable: list[Unreadable] = []
        for split, samples in splits.items():
            self.progress.start(f"checking {split}", len(samples))
            chunks = [samples[chunk] for chunk in chunks_of(len(samples), 8, 1024)]
            # numbers in the split depend on every check, so parts do not leave any to each other
            self.crew.run(f"check-{split}", check_chunk, chunks, self.progress.advance, take_over=True)
            results = self.crew.results(f"check-{split}", len(chunks))
            max_size = self.options.max_size
            unfit = partial(too_narrow, max_size=max_size) if self._ffcv else None
            why = f"too narrow to be scaled down to {max_size} pixels for FFCV"
            images[split], bad = checked_images(samples, results, unfit, why)
            unreadable.extend(bad)
            if self.options.on_error == "skip":
                left = set(np.unique(images[split].labels).tolist())
                if empty := [name for label, name in enumerate(classes) if label not in left]:
                    raise Spoilt(
                        f"class {empty[0]!r} has no readable image in the {split} split; remove it, or repair one"
                    )
        if unreadable and self.options.on_error == "fail":
            names = "; ".join(f"{bad.name}: {bad.reason}" for bad in unreadable[:LISTED])
            more = f"; and {len(unreadable) - LISTED} more" if len(unreadable) > LISTED else ""
            raise Spoilt(
                f"{len(unreadable)} image(s) cannot be used ({names}{more}); repair or remove them, "
                "or leave them out with --on-error skip"
            )
        return images, unreadable

    def _shards(self, split: str, images: Images) -> list[Shard]:
        if "dali" not in self.options.formats and split == "train":
            return []  # validation keeps the original bytes: accuracy is measured on them
        if split not in self._planned:
            planned = plan_shards(self.place.set, self.place.work, split, images, self.options.shard_size)
            self._planned[split] = planned
        return self._planned[split]

    def _write_tars(self, split: str, images: Images) -> None:
        if shards := self._shards(split, images):
            self.progress.start(f"writing {split} tars", len(images))
            write = write_shard if self._depot is None else write_checked  # what has left is not read back
            self.crew.run(tar_phase(split), write, shards, self.progress.advance)

    def _write_beton(self, split: str, images: Images) -> None:
        if not self._ffcv:
            return
        options = self.options
        raw = plan_raw(len(images), options.store, options.seed)
        pieces = [
            Piece(f"{path}.data", images[chunk], raw[chunk], options.max_size, options.quality)
            for chunk, path in zip(self._beton_chunks(images), self._beton_results(split, images), strict=True)
        ]
        self.progress.start(f"writing {split}.beton", len(images))
        beton = self._beton_file(split, images)

        def advance(count: int) -> None:
            self.progress.advance(count)
            if options.part is None:
                beton.advance()

        self.crew.run(f"beton-{split}", encode_piece, pieces, advance)

    @staticmethod
    def _beton_chunks(images: Images) -> list[slice]:
        return chunks_of(len(images), 8, 512)

    def _beton_results(self, split: str, images: Images) -> list[Path]:
        return self.crew.paths(f"beton-{split}", len(self._beton_chunks(images)) if self._ffcv else 0)

    def _beton_file(self, split: str, images: Images) -> BetonFile:
        results = self._beton_results(split, images)
        data = [path.with_name(f"{path.name}.data") for path in results]
        return BetonFile(self.place.set / f"{split}.beton", results, data, len(images), self.options.max_size)

    def _merge(self, classes: tuple[str, ...], images: Mapping[str, Images], skipped: Sequence[Unreadable]) -> Manifest:
        """Everything that is written once all images are, then the look at what is on the disk."""
        folder = self.place.set
        splits: dict[str, Split] = {}
        files: dict[str, FileEntry] = {}
        lengths: dict[str, list[int]] = {}
        for split, members in images.items():
            table = f"{split}.samples.npy"
            files[table], shards = self._write_table(folder / table, split, members)
            files.update({name: FileEntry(**entry) for found, _ in shards for name, entry in found.items()})
            lengths[split] = [length for _, length in shards]
            if self._ffcv:
                beton = self._beton_file(split, members)
                files[stored_path(beton.path).name] = beton.finish(members.labels)
            splits[split] = Split(
                num_samples=len(members),
                per_class=tuple(np.bincount(members.labels, minlength=len(classes)).tolist()),
                table=table,
                shards=tuple(name for found, _ in shards for name in found if name.endswith(".tar")),
                beton=f"{split}.beton" if self._ffcv else None,
            )
        for name, text in companion_files(classes, splits, lengths).items():
            files[name] = write_file(folder / name, text)
        options = self.options
        problems = self._depot is None and check_samples(
            folder,
            splits,
            options.jobs,
            self.progress,
            options.max_size,
            engine=options.engine,
            patience=options.patience,
        )
        if problems:
            raise Spoilt(f"{listed(problems)} cannot be read back as written; check the disk of {folder}")
        betons = [folder / entry.beton for entry in splits.values() if entry.beton]
        hashes = map_tasks(hashed, betons, options.jobs, lambda _: None, patience=options.patience)
        files.update({path.name: entry for path, entry in zip(betons, hashes, strict=True)})
        manifest = Manifest(
            classes=classes,
            splits=splits,
            files=dict(sorted(files.items())),
            made={
                "source": self.source,
                "options": self.options.purpose(),
                "versions": {name: importlib.metadata.version(name) for name in ("numpy", "pillow")},
                "warnings": turbojpeg_found(),
            },
            skipped=tuple({"file": bad.name, "reason": bad.reason} for bad in skipped),
            transcoded=tuple(name for members in images.values() for name in members.transcoded()),
            warned=tuple(
                {"file": name, "warning": warning}
                for members in images.values()
                for name, warning in members.warnings()
            ),
            account=account_of(self.inspected, splits, len(skipped)),
        )
        write_file(folder / MANIFEST, manifest.to_json().encode())
        self.place.finish(files)
        return manifest

    def _write_table(
        self, path: Path, split: str, images: Images
    ) -> tuple[FileEntry, list[tuple[dict[str, Any], int]]]:
        """Write a split's table; also, of each tar, its files and their number of samples."""
        shards: list[tuple[dict[str, Any], int]] = []

        def pieces() -> Iterator[NDArray[Any]]:
            for tar in self.crew.results(tar_phase(split), len(self._shards(split, images))):
                shards.append((tar.notes["files"], len(tar.rows)))
                yield tar.rows
            if not shards:
                yield rows_without_tars(images)

        return write_rows(path, SAMPLE, len(images), pieces()), shards
