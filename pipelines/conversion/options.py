"""What a conversion can be told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pipelines.base import DataError
from pipelines.conversion.beton import Store
from pipelines.conversion.engines import Engine
from pipelines.conversion.processes import PATIENCE, Progress, check_patience
from pipelines.remote.mirror import Reach
from pipelines.remote.store import is_url
from pipelines.sources.elsewhere import called
from pipelines.sources.listing import FORMATS, Choice, Inspected, inspect

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

_HOW = ("jobs", "engine", "part", "patience", "restart", "work_dir")
"""Options that say how the work is done; the result does not depend on them."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a conversion can be told."""

    formats: tuple[Format, ...]
    """`dali`: tars with the original bytes, for DALI and torch. `ffcv`: .beton files, and tars for validation."""
    source_format: str | None = None
    """The only reader that is asked, a name of `FORMATS`; all are if None."""
    images: str | None = None
    """Which column or which member of a sample is the image; of folders, a pattern of further files that are images."""
    label: str | None = None
    """Which column or entry is the label."""
    ignore: tuple[str, ...] = ()
    """Patterns of files and folders that are left out."""
    follow_links: bool = False
    """Whether links may lead out of the source."""
    class_order: str | None = None
    """Of class folders: `name`, `number`, or a text file with a class per line."""
    class_level: int | None = None
    """Of class folders: how many folders below the split the class is, from 1."""
    use_test: bool = False
    """Whether test images are the validation split though there are others."""
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
    patience: float = PATIENCE
    """Seconds in which some image must be done; after them the work is taken to be stuck."""
    part: tuple[int, int] | None = None
    """(i, n): do the i-th of n shares of the work, from 1, in a folder that all n can reach."""
    restart: bool = False
    """Drop what an interrupted conversion to the same destination has left."""
    work_dir: Path | None = None
    """Where source or destination are addresses: the folder of this machine for copies of what is no image, and for
    what is being written; `pss` in the user's cache folder if None."""

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
        if self.source_format not in (None, *FORMATS):
            raise ValueError(f"--source-format is {self.source_format!r}; use {', '.join(FORMATS)}")
        if self.class_level is not None and not 1 <= self.class_level <= 32:
            raise ValueError(f"--class-level is {self.class_level}; it must lie in 1 ... 32")
        if self.use_test and self.val_fraction is not None:
            raise ValueError("--use-test and --val-fraction both say where validation comes from; leave one out")
        for name, least, most in (("jobs", 1, 4096), ("shard_size", 1, 10**9), ("seed", 0, (1 << 63) - 1)):
            if not least <= (value := getattr(self, name)) <= most:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it must lie in {least} ... {most}")
        check_patience(self.patience)
        if self.engine == "ray" and self.patience != PATIENCE:
            raise ValueError("--patience is for --engine processes; Ray has its own, so leave it out")
        if self.part is not None:
            if not 1 <= self.part[0] <= self.part[1]:
                raise ValueError(f"--part is {self.part[0]}/{self.part[1]}; use 1/n to n/n")
            if self.restart:
                raise ValueError("--restart would drop the work of the other parts; leave --part or --restart out")

    def check_work_dir(self, *places: object) -> None:
        """Raise `DataError` where a folder is named that none of these places needs."""
        if self.work_dir is not None and not any(is_url(place) and is_url(called(str(place))) for place in places):
            raise DataError(
                f"--work-dir is for a place at an address, such as s3://bucket/photos, and {places[0]} is none; leave "
                "it out"
            )

    def inspect(
        self, source: str, progress: Progress | None = None, tell: Callable[[str], None] = lambda message: None
    ) -> Inspected:
        """What there is in a source, as these options have it; `DataError` if it cannot be used. `progress` and `tell`
        hear how one that lies elsewhere is listed and fetched."""
        reach = Reach(self.work_dir, tell=tell)
        if progress is not None:
            reach = Reach(self.work_dir, progress.start, progress.advance, tell)
        choice = Choice(
            self.source_format,
            self.images,
            self.label,
            self.class_order,
            self.class_level,
            self.use_test,
            one_split=self.split is not None,
            held_out=self.val_fraction is not None,
        )
        return inspect(source, choice, self.ignore, self.follow_links, reach)

    @property
    def who(self) -> str:
        """Who does the work, for messages."""
        return "this machine" if self.part is None else f"part {self.part[0]}/{self.part[1]}"

    def purpose(self) -> dict[str, Any]:
        """The options that the result depends on."""
        return {name: value for name, value in asdict(self).items() if name not in _HOW}

    @classmethod
    def of_purpose(cls, purpose: Mapping[str, Any], **how: Any) -> Options:
        """Those with that purpose; `LookupError` for one of another version."""
        if unknown := purpose.keys() ^ cls(formats=("dali",)).purpose().keys():
            raise LookupError(min(unknown))
        return cls(**{**purpose, **{name: tuple(purpose[name]) for name in ("formats", "ignore")}}, **how)
