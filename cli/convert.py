"""pss-convert: turn a folder of images into the files the training loaders read."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from cli import errors

if TYPE_CHECKING:
    from rich.progress import TaskID

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="'digits', or a folder: CLASS/*.jpg or train|val|test/CLASS/*.jpg")],
    dest: Annotated[Path | None, typer.Argument(help="the new folder to write")] = None,
    format: Annotated[str, typer.Option(help="dali, ffcv or ffcv,dali")] = "",
    split: Annotated[str | None, typer.Option(help="CLASS/*.jpg source: the split it is, train or val")] = None,
    val_fraction: Annotated[
        float | None, typer.Option(help="share of each class held out for validation (digits: 0.2)")
    ] = None,
    max_size: Annotated[int, typer.Option(help="ffcv: longest side in pixels")] = 500,
    quality: Annotated[int, typer.Option(help="ffcv: JPEG quality")] = 90,
    jobs: Annotated[int | None, typer.Option(help="processes; default: all cores")] = None,
    on_error: Annotated[str, typer.Option(help="unreadable images: fail, or skip and list them")] = "fail",
    shard_size: Annotated[int, typer.Option(help="images per tar")] = 2000,
    seed: Annotated[int, typer.Option(help="of the shuffle and of the held-out choice")] = 0,
    verify: Annotated[bool, typer.Option("--verify", help="check the files of SOURCE, a converted folder")] = False,
) -> None:
    """Check every image of SOURCE and write it to DEST, for DALI (tars, original bytes) or FFCV (.beton).

    With --traceback, errors show where they arose.
    """
    from pipelines import convert as conversion

    signal.signal(signal.SIGTERM, _terminate)
    jobs = len(os.sched_getaffinity(0)) if jobs is None else jobs
    if verify:
        with _Display("files") as display:
            manifest = conversion.verify(Path(source), jobs, display)
        print(f"{source}: {len(manifest.files)} files are as they were written")
        return
    if dest is None or not format:
        raise ValueError("give a folder to write and --format dali, ffcv or ffcv,dali")
    options = conversion.Options(
        formats=tuple(dict.fromkeys(format.split(","))),  # type: ignore[arg-type]  # Options checks them
        split=split,
        val_fraction=val_fraction,
        max_size=max_size,
        quality=quality,
        jobs=jobs,
        on_error=on_error,  # type: ignore[arg-type]
        shard_size=shard_size,
        seed=seed,
    )
    with _Display("images") as display:
        manifest = conversion.convert(source, dest, options, display)
    counts = ", ".join(f"{part.num_samples} {name}" for name, part in manifest.splits.items())
    size = sum(file.bytes for file in manifest.files.values()) / 1e6
    print(f"{dest}: {len(manifest.classes)} classes, {counts} images, {size:.1f} MB")
    if manifest.skipped:
        print(f"{len(manifest.skipped)} unreadable image(s) left out; dataset.json lists them")


def _terminate(signum: int, frame: FrameType | None) -> None:
    sys.exit(128 + signum)  # an exception, so that unfinished files are removed


class _Display:
    """Progress on stderr: a live bar on a terminal, else a line every few seconds."""

    _EVERY = 10.0  # seconds between lines

    def __init__(self, unit: str) -> None:
        self._unit = unit

    def __enter__(self) -> _Display:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._live = console.is_terminal
        self._bar = Progress(
            TextColumn("{task.description:<20}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:>8} " + self._unit + "/s"),
            TimeRemainingColumn(),
            console=console,
            disable=not self._live,
        )
        self._bar.start()
        self._task: TaskID | None = None
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def start(self, phase: str, total: int) -> None:
        self._phase, self._total, self._done = phase, total, 0
        self._began = self._told = time.monotonic()
        self._task = self._bar.add_task(phase, total=total, rate="")

    def advance(self, images: int) -> None:
        assert self._task is not None
        self._done += images
        now = time.monotonic()
        rate = self._done / max(now - self._began, 1e-3)
        self._bar.update(self._task, advance=images, rate=f"{rate:.0f}")
        if not self._live and (now - self._told > self._EVERY or self._done == self._total):
            self._told = now
            left = (self._total - self._done) / rate
            line = f"{self._phase}: {self._done}/{self._total} {self._unit}, {rate:.0f}/s, {left:.0f} s left"
            print(line, file=sys.stderr, flush=True)


def main() -> None:
    """The console script."""
    errors.run(app)


if __name__ == "__main__":
    main()
