"""Turn images of many sources into a data set the loaders read. All of it appears at the destination, or nothing."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipelines.base import DataError
from pipelines.conversion.beton import BetonFile, Piece, Store, encode_piece, plan_raw
from pipelines.conversion.companions import companion_files
from pipelines.conversion.engines import Engine, map_tasks
from pipelines.conversion.jpeg_warnings import turbojpeg_found
from pipelines.conversion.processes import Progress, WorkerLost
from pipelines.conversion.scan import ImageFile, Unreadable, check_chunk, checked_images
from pipelines.conversion.shards import Shard, plan_shards, write_file, write_shard
from pipelines.conversion.splits import SHUFFLE, divide, permuted
from pipelines.conversion.verify import LISTED, check_samples, listed
from pipelines.conversion.work import Busy, Crew, Finished, Workplace, chunks_of, write_whole
from pipelines.sources.listing import DIGITS, Listing, Sample, Spool, list_source
from pipelines.storage.beton import stored_path
from pipelines.storage.manifest import FORMAT_VERSION, MANIFEST, SAMPLE, FileEntry, Manifest, Split, hash_file

DIGITS_VAL_FRACTION = 0.2

Format = Literal["ffcv", "dali"]

PROFILES: Mapping[str, tuple[int, Store]] = {
    "jpg500": (500, "jpg"),
    "jpg400": (400, "jpg"),
    "mix500": (500, "mix"),
    "raw400": (400, "raw"),
    "raw256": (256, "raw"),
}
"""FFCV: longest side in pixels, and whether images are stored as JPEG, as pixels, or half of them each way."""

_HOW = ("jobs", "engine", "part", "restart")
"""Options that say how the work is done; the result does not depend on them."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a conversion can be told."""

    formats: tuple[Format, ...]
    """`dali`: tars with the original bytes, for DALI and torch. `ffcv`: .beton files, and tars for validation."""
    split: str | None = None
    """Of a source that names no split: the one all images belong to."""
    val_fraction: float | None = None
    """Share of every class held out for validation, where the source has no validation split."""
    max_size: int = 500
    """FFCV: longest side in pixels; larger images are scaled down."""
    quality: int = 90
    """FFCV: JPEG quality."""
    store: Store = "jpg"
    """FFCV: images as JPEG, as pixels (`raw`), or a random half of them each way (`mix`)."""
    on_error: Literal["fail", "skip"] = "fail"
    """What an unreadable image means. One that decodes with a warning of the JPEG library is kept in any case and
    listed under `warned` in the manifest: real collections hold such images, most of them without a visible flaw."""
    shard_size: int = 2000
    """Images per tar."""
    seed: int = 0
    """Of the one shuffle the training split gets, and of the choice of held-out images."""
    jobs: int = 1
    """Processes."""
    engine: Engine = "processes"
    """`processes` of this machine, or tasks of a `ray` cluster."""
    part: tuple[int, int] | None = None
    """(i, n): do the i-th of n shares of the work, from 1, in a folder that all n can reach."""
    restart: bool = False
    """Drop what an interrupted conversion to the same destination has left."""

    def __post_init__(self) -> None:
        if not self.formats or not set(self.formats) <= {"ffcv", "dali"}:
            raise ValueError(f"--format is {','.join(self.formats)!r}; use ffcv, dali or ffcv,dali")
        if self.val_fraction is not None and not 0 < self.val_fraction < 1:
            raise ValueError(f"--val-fraction is {self.val_fraction}; it must lie between 0 and 1")
        for name, allowed in (("on_error", ("fail", "skip")), ("engine", ("processes", "ray"))):
            if getattr(self, name) not in allowed:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} is {getattr(self, name)!r}; use {' or '.join(allowed)}")
        if not 16 <= self.max_size <= 16384:
            raise ValueError(f"--max-size is {self.max_size}; it must lie in 16 ... 16384 pixels")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"--quality is {self.quality}; it must lie in 1 ... 100")
        for name, least, most in (("jobs", 1, 4096), ("shard_size", 1, 10**9), ("seed", 0, (1 << 63) - 1)):
            if not least <= (value := getattr(self, name)) <= most:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it must lie in {least} ... {most}")
        if self.part is not None:
            if not 1 <= self.part[0] <= self.part[1]:
                raise ValueError(f"--part is {self.part[0]}/{self.part[1]}; use 1/n to n/n")
            if self.restart:
                raise ValueError("--restart would drop the work of the other parts; leave --part or --restart out")

    def purpose(self) -> dict[str, Any]:
        """The options that the result depends on."""
        return {name: value for name, value in asdict(self).items() if name not in _HOW}


def convert(
    source: str,
    dest: Path,
    options: Options,
    progress: Progress,
    tell: Callable[[str], None] = lambda message: None,
) -> Manifest | None:
    """Convert `source`, the word "digits", a file or a folder, to the new folder `dest`.

    Everything is written beside `dest` and renamed at the end. Raises `DataError` or `ValueError`, with nothing left
    behind, for what is wrong with source and options. Any other way out, Ctrl-C included, keeps what is finished: the
    same call continues it. None: the share of `options.part` is done, but others are not. `tell` hears sentences.
    """
    if dest.exists():
        raise DataError(f"{dest} already exists; remove it or choose another name")
    source = source if source == DIGITS else str(Path(source).resolve())
    purpose = {"source": source, **options.purpose()}
    place = Workplace(dest, purpose, restart=options.restart, shared=options.part is not None)
    if place.continued and options.part is None:
        tell(f"continuing the unfinished conversion to {dest}")
    try:
        manifest = _Conversion(place, source, options, progress).run()
    except (Busy, WorkerLost):
        place.leave()
        raise
    except ValueError:
        if options.part is None:
            place.remove()
        raise
    except BaseException as error:
        place.leave()
        if options.part is not None and isinstance(error, FileNotFoundError) and dest.exists():
            return None  # the last part has cleared up
        tell(f"what is finished is kept; the same command continues, and --restart drops it ({place.folder})")
        raise
    place.leave()
    return manifest


def merge(dest: Path, jobs: int, progress: Progress, tell: Callable[[str], None]) -> Manifest:
    """Finish a conversion that was begun in parts: do what is missing, put all together, verify."""
    journal = dest.with_name(f".{dest.name}.partial") / "journal.json"
    if not journal.exists():
        raise DataError(f"there is no unfinished conversion to {dest}; start one with --part")
    purpose = json.loads(journal.read_text())
    source = purpose.pop("source")
    options = Options(**{**purpose, "formats": tuple(purpose["formats"])}, jobs=jobs)
    manifest = convert(source, dest, options, progress, tell)
    assert manifest is not None
    return manifest


class _Conversion:
    """One run of a conversion in its workplace."""

    def __init__(self, place: Workplace, source: str, options: Options, progress: Progress) -> None:
        self.place, self.source, self.options, self.progress = place, source, options, progress
        self.crew = Crew(place.work, options.jobs, options.engine, options.part)

    def run(self) -> Manifest | None:
        listing = list_source(self.source, Spool(self.place.work))
        if self.source == DIGITS and self.options.split is not None:
            raise DataError("--split is for other sources; the digits are split by --val-fraction")
        self._compare_listing(listing)
        fraction = self.options.val_fraction
        if self.source == DIGITS and fraction is None:
            fraction = DIGITS_VAL_FRACTION
        samples = divide(listing, self.source, self.options.split, fraction, self.options.seed)
        images, skipped = self._check(samples, listing.classes)
        if "train" in images:
            images["train"] = permuted(images["train"], self.options.seed, SHUFFLE)
        for split, members in images.items():
            self._write_tars(split, members)
            self._write_beton(split, members)
        # only now: the part that finishes last must find all others finished
        tars = {split: self._tar_results(split, members) for split, members in images.items()}
        betons = [path for split, members in images.items() for path in self._beton_results(split, members)]
        if None in tars.values() or not all(path.exists() for path in betons):
            return None
        with self.place.merging() as ours:
            return self._merge(listing.classes, images, tars, skipped) if ours else None

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
        path = self.place.work / "listing.sha256"
        if path.exists() and path.read_text() != digest.hexdigest():
            raise Busy(
                f"{self.source} has changed since the conversion to {self.place.dest} began; give --restart to begin "
                "again"
            )
        write_whole(path, digest.hexdigest().encode())

    def _check(
        self, splits: Mapping[str, Sequence[Sample]], classes: Sequence[str]
    ) -> tuple[dict[str, list[ImageFile]], list[Unreadable]]:
        images: dict[str, list[ImageFile]] = {}
        unreadable: list[Unreadable] = []
        for split, samples in splits.items():
            self.progress.start(f"checking {split}", len(samples))
            chunks = [samples[chunk] for chunk in chunks_of(len(samples), 8, 1024)]
            # numbers in the split depend on every check, so parts do not leave any to each other
            self.crew.run(f"check-{split}", check_chunk, chunks, self.progress.advance, take_over=True)
            results = self.crew.results(f"check-{split}", len(chunks))
            assert results is not None
            images[split] = []
            for chunk, finished in zip(chunks, results, strict=True):
                good, bad = checked_images(chunk, finished)
                images[split].extend(good)
                unreadable.extend(bad)
            if self.options.on_error == "skip":
                left = {image.sample.label for image in images[split]}
                if empty := [name for label, name in enumerate(classes) if label not in left]:
                    raise DataError(
                        f"class {empty[0]!r} has no readable image in the {split} split; remove it, or repair one"
                    )
        if unreadable and self.options.on_error == "fail":
            names = "; ".join(f"{bad.name}: {bad.reason}" for bad in unreadable[:LISTED])
            more = f"; and {len(unreadable) - LISTED} more" if len(unreadable) > LISTED else ""
            raise DataError(
                f"{len(unreadable)} image(s) cannot be read ({names}{more}); repair or remove them, "
                "or leave them out with --on-error skip"
            )
        return images, unreadable

    def _shards(self, split: str, images: Sequence[ImageFile]) -> list[Shard]:
        if "dali" not in self.options.formats and split == "train":
            return []  # validation keeps the original bytes: accuracy is measured on them
        return plan_shards(self.place.set, self.place.work, split, images, self.options.shard_size)

    def _tar_results(self, split: str, images: Sequence[ImageFile]) -> list[Finished] | None:
        return self.crew.results(_tar_phase(split), len(self._shards(split, images)))

    def _write_tars(self, split: str, images: Sequence[ImageFile]) -> None:
        if shards := self._shards(split, images):
            self.progress.start(f"writing {split} tars", len(images))
            self.crew.run(_tar_phase(split), write_shard, shards, self.progress.advance)

    def _write_beton(self, split: str, images: Sequence[ImageFile]) -> None:
        if not self._ffcv:
            return
        options = self.options
        raw = plan_raw(len(images), options.store, options.seed).tolist()
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
    def _beton_chunks(images: Sequence[ImageFile]) -> list[slice]:
        return chunks_of(len(images), 8, 512)

    def _beton_results(self, split: str, images: Sequence[ImageFile]) -> list[Path]:
        return self.crew.paths(f"beton-{split}", len(self._beton_chunks(images)) if self._ffcv else 0)

    def _beton_file(self, split: str, images: Sequence[ImageFile]) -> BetonFile:
        results = self._beton_results(split, images)
        data = [path.with_name(f"{path.name}.data") for path in results]
        return BetonFile(self.place.set / f"{split}.beton", results, data, len(images), self.options.max_size)

    def _merge(
        self,
        classes: tuple[str, ...],
        images: Mapping[str, Sequence[ImageFile]],
        tars: Mapping[str, list[Finished] | None],
        skipped: Sequence[Unreadable],
    ) -> Manifest:
        """Everything that is written once all images are, then the look at what is on the disk."""
        folder = self.place.set
        splits: dict[str, Split] = {}
        files: dict[str, FileEntry] = {}
        for split, members in images.items():
            shards = tars[split] or []
            rows = np.concatenate([shard.rows for shard in shards]) if shards else _rows_without_tars(members)
            for shard in shards:
                files.update({name: FileEntry(**entry) for name, entry in shard.notes["files"].items()})
            table = f"{split}.samples.npy"
            content = io.BytesIO()
            np.save(content, rows)
            files[table] = write_file(folder / table, content.getvalue())
            if self._ffcv:
                beton = self._beton_file(split, members)
                files[stored_path(beton.path).name] = beton.finish(rows["label"].astype(np.int64))
            splits[split] = Split(
                num_samples=len(members),
                per_class=tuple(np.bincount(rows["label"], minlength=len(classes)).tolist()),
                table=table,
                shards=tuple(name for shard in shards for name in shard.notes["files"] if name.endswith(".tar")),
                beton=f"{split}.beton" if self._ffcv else None,
            )
        lengths = {split: [len(shard.rows) for shard in shards or []] for split, shards in tars.items()}
        for name, text in companion_files(classes, splits, lengths).items():
            files[name] = write_file(folder / name, text)
        options = self.options
        problems = check_samples(folder, splits, options.jobs, self.progress, options.max_size, engine=options.engine)
        if problems:
            raise DataError(f"{listed(problems)} cannot be read back as written; check the disk of {folder}")
        betons = [folder / entry.beton for entry in splits.values() if entry.beton]
        hashes = map_tasks(hash_file, betons, self.options.jobs, lambda _: None)
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
            transcoded=tuple(image.sample.name for members in images.values() for image in members if image.transcode),
            warned=tuple(
                {"file": image.sample.name, "warning": image.warning}
                for members in images.values()
                for image in members
                if image.warning
            ),
        )
        write_file(folder / MANIFEST, manifest.to_json().encode())
        self.place.finish()
        return manifest


def _tar_phase(split: str) -> str:
    """Tars that an older version of the program has begun differ in their members: none of them may be taken over."""
    return f"tar-{FORMAT_VERSION}-{split}"


def _rows_without_tars(images: Sequence[ImageFile]) -> Any:
    rows = np.zeros(len(images), dtype=SAMPLE)
    rows["shard"] = -1
    rows["label"] = [image.sample.label for image in images]
    for name in ("height", "width", "crc32"):
        rows[name] = [getattr(image, name) for image in images]
    return rows
