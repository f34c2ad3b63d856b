"""pss-convert: turn images into the files the training loaders read."""

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
from cli.common import VERSION, make_app

if TYPE_CHECKING:
    from rich.progress import TaskID

    from pipelines.conversion.options import Options
    from pipelines.labelling.making import MapOptions
    from pipelines.storage.manifest import Manifest

app = make_app()


_SOURCES = (
    "'digits'; or a path, or an address such as s3://bucket/photos: a folder of CLASS/*.jpg or "
    "train|val|test/CLASS/*.jpg; ImageNet's downloaded tars; Parquet; a saved Hugging Face data set; WebDataset tars; "
    "CIFAR's archive; tiny-imagenet-200, Food-101, CUB, Places365, Kaggle's ILSVRC"
)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help=_SOURCES)],
    dest: Annotated[
        str | None, typer.Argument(help="the new folder to write, or an address such as s3://bucket/photos")
    ] = None,
    format: Annotated[str, typer.Option(help="dali, ffcv or ffcv,dali")] = "",
    inspect: Annotated[bool, typer.Option("--inspect", help="say what SOURCE is and what would be read")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="with --inspect: as JSON")] = False,
    source_format: Annotated[
        str | None, typer.Option(help="SOURCE is folders, imagenet, webdataset, parquet, arrow or cifar")
    ] = None,
    images: Annotated[
        str | None, typer.Option(help="column of a table or suffix in a tar that is the image; or a pattern of files")
    ] = None,
    label: Annotated[str | None, typer.Option(help="column of a table or entry of a sample that is the label")] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="pattern of files or folders to leave out; may be repeated")
    ] = None,
    follow_links: Annotated[bool, typer.Option("--follow-links", help="read links that lead out of SOURCE")] = False,
    class_order: Annotated[
        str | None, typer.Option(help="labels of class folders by name, number, or a FILE with a class per line")
    ] = None,
    class_level: Annotated[
        int | None, typer.Option(help="class folders: how many folders below the split the class is")
    ] = None,
    use_test: Annotated[
        bool, typer.Option("--use-test", help="validate on test images though there are others")
    ] = False,
    split: Annotated[
        str | None,
        typer.Option(
            help="a source without splits: the one it is, train or val; with --token-labels: which one [default: train]"
        ),
    ] = None,
    val_fraction: Annotated[
        float | None, typer.Option(help="share of each class held out for validation (digits: 0.2)")
    ] = None,
    profile: Annotated[str | None, typer.Option(help="ffcv: jpg500, jpg400, mix500, raw400 or raw256")] = None,
    max_size: Annotated[int | None, typer.Option(help="ffcv: longest side in pixels [default: 500]")] = None,
    quality: Annotated[int, typer.Option(help="ffcv: JPEG quality")] = 90,
    jobs: Annotated[int | None, typer.Option(help="processes; default: all cores", min=1, max=4096)] = None,
    on_error: Annotated[
        str, typer.Option(help="unreadable images: fail, or skip and list them (doubtful ones are kept and listed)")
    ] = "fail",
    shard_size: Annotated[int, typer.Option(help="images per tar")] = 2000,
    seed: Annotated[int, typer.Option(help="of the shuffle and of the held-out choice")] = 0,
    engine: Annotated[str, typer.Option(help="processes, or ray: the nodes of a Ray cluster")] = "processes",
    patience: Annotated[
        float, typer.Option(help="seconds without a finished image after which the work is taken to be stuck")
    ] = 60.0,
    part: Annotated[str | None, typer.Option(help="i/n: do one of n shares; the last one merges")] = None,
    work_dir: Annotated[
        Path | None,
        typer.Option(help="with an address: where this machine keeps what it works on [default: ~/.cache/pss]"),
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="drop an unfinished conversion to DEST")] = False,
    merge: Annotated[bool, typer.Option("--merge", help="finish SOURCE, a folder begun with --part")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="check the files of SOURCE, a converted folder")] = False,
    full: Annotated[bool, typer.Option("--full", help="with --verify: every sample and checksum")] = False,
    token_labels: Annotated[
        str | None,
        typer.Option(
            metavar="TEACHER",
            help="add label maps to SOURCE, a converted folder: what a run of pss-train, timm:NAME or NAME=FILE finds "
            "at every place of its images",
        ),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="with --token-labels: classes told of each place [default: 5, or all]", min=1)
    ] = None,
    label_grid: Annotated[
        int | None,
        typer.Option(help="with --token-labels: places along a side [default: the teacher's, at most 18]", min=1),
    ] = None,
    label_square: Annotated[
        bool, typer.Option("--label-square", help="with --token-labels: show the central square, as LV-ViT's code")
    ] = False,
    device: Annotated[str, typer.Option(help="with --token-labels: cpu, cuda or cuda:N; auto takes a GPU")] = "auto",
    version: Annotated[bool, VERSION] = False,
) -> None:
    """Check every image of SOURCE and write it to DEST, for DALI (tars, original bytes) or FFCV (.beton).

    Interrupted, the same command continues. With --traceback, errors show where they arose.
    """
    from pipelines.conversion import convert as conversion
    from pipelines.conversion import verify as verification
    from pipelines.conversion.options import PROFILES, Options
    from pipelines.remote.store import is_url

    signal.signal(signal.SIGTERM, _terminate)
    jobs = len(os.sched_getaffinity(0)) if jobs is None else jobs
    if full and not verify:
        raise ValueError("--full is for --verify; add it, or leave --full out")
    if (verify or token_labels is not None) and is_url(source):
        option, why = ("--verify", "its tars are verified as they are fetched") if verify else (
            "--token-labels", "label a copy of it, and upload that"
        )  # fmt: skip
        raise ValueError(f"{option} is for a converted folder, and {source} is an address: {why}")
    if verify:
        with _Display("files") as display:
            manifest = verification.verify(Path(source), jobs, display, full=full, patience=patience)
        how = "every sample and checksum" if full else "sizes, tables and a sample of the images; --full checks all"
        print(f"{source}: {len(manifest.files)} files are as they were written ({how})")
        return
    if token_labels is not None:
        if dest is not None or format or inspect or merge or part is not None:
            raise ValueError(
                f"--token-labels adds to {source}, a converted folder; leave DEST, --format, --inspect, --merge and "
                "--part out"
            )
        from pipelines.labelling.making import MapOptions
        from pipelines.storage.manifest import canonical_split

        told = MapOptions(canonical_split(split or "train"), top_k, label_grid, label_square, jobs, restart)
        _label(Path(source), token_labels, device, told)
        return
    if top_k is not None or label_grid is not None or label_square or device != "auto":
        raise ValueError(
            "--top-k, --label-grid, --label-square and --device are for --token-labels; add it, or leave them out"
        )
    if merge:
        with _Display("images") as display:
            made = conversion.merge(source, jobs, display, _tell, patience, work_dir)
            _report(source, made, display)
        return
    if as_json and not inspect:
        raise ValueError("--json is for --inspect; add it, or leave --json out")
    if inspect and (dest is not None or format):
        raise ValueError("--inspect writes nothing; leave DEST and --format out")
    if not inspect and (dest is None or not format):
        raise ValueError("give a folder to write and --format dali, ffcv or ffcv,dali")
    if profile is not None and (profile not in PROFILES or max_size is not None):
        raise ValueError(f"--profile is {profile!r}; use {', '.join(PROFILES)}, and no --max-size with it")
    size, store = (500 if max_size is None else max_size, "jpg") if profile is None else PROFILES[profile]
    options = Options(
        formats=("dali",) if inspect else tuple(dict.fromkeys(format.split(","))),  # type: ignore[arg-type]  # checked there
        source_format=source_format,
        images=images,
        label=label,
        ignore=tuple(ignore or ()),
        follow_links=follow_links,
        class_order=class_order if class_order in (None, "name", "number") else str(Path(class_order).resolve()),
        class_level=class_level,
        use_test=use_test,
        split=split,
        val_fraction=val_fraction,
        max_size=size,
        quality=quality,
        store=store,  # type: ignore[arg-type]
        on_error=on_error,  # type: ignore[arg-type]
        shard_size=shard_size,
        seed=seed,
        jobs=jobs,
        engine=engine,  # type: ignore[arg-type]
        patience=patience,
        part=_part(part),
        restart=restart,
        work_dir=work_dir,
    )
    if inspect:
        _inspect(source, options, as_json)
        return
    assert dest is not None
    with _Display("images") as display:
        result = conversion.convert(source, dest, options, display, _tell)
    if result is None:
        print(f"part {part} of {dest} is done; the last part, or pss-convert --merge {dest}, puts all together")
    else:
        _report(dest, result, display)


def _label(root: Path, teacher: str, device: str, options: MapOptions) -> None:
    from pipelines.labelling.making import make_label_maps
    from pipelines.storage.manifest import read_manifest

    read_manifest(root)  # what is no converted set is told before anything large is opened
    import torch

    from pss.inference.labelling import open_teacher

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:120]
        raise ValueError(f"--device is {device}, which cannot be used ({reason}); use cpu, cuda or cuda:N") from error
    opened = open_teacher(teacher, where)
    with _Display("images") as display:
        maps = make_label_maps(root, opened, options, display, _tell)
    rows, columns = maps.grid
    size = 4 * maps.top_k * rows * columns
    print(
        f"{root / maps.file}: the {maps.top_k} best of {maps.num_classes:,} classes at {rows} x {columns} places, "
        f"{size:,} bytes an image; the teacher's top-1 is {maps.top1:.1%}; train with --set data.label_maps=auto"
    )


def _inspect(source: str, options: Options, as_json: bool) -> None:
    import json

    from pipelines.remote.store import is_url
    from pipelines.sources.listing import DIGITS

    options.check_work_dir(source)
    if is_url(source):
        with _Display("files") as display:
            inspected = options.inspect(source, display, _tell)
    else:
        inspected = options.inspect(source if source == DIGITS else str(Path(source).absolute()))
    if as_json:
        print(json.dumps(inspected.as_dict(), indent=1))
    else:
        print("\n".join(inspected.in_words()))


def _part(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    numbers = text.split("/")
    if len(numbers) != 2 or not all(number.isdigit() for number in numbers):
        raise ValueError(f"--part is {text!r}; use i/n, for instance 2/8")
    return int(numbers[0]), int(numbers[1])


def _tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _report(dest: str, manifest: Manifest, display: _Display) -> None:
    counts = ", ".join(f"{part.num_samples} {name}" for name, part in manifest.splits.items())
    size = sum(file.bytes for file in manifest.files.values()) / 1e6
    print(f"{dest}: {len(manifest.classes)} classes, {counts} images, {size:.1f} MB")
    if rates := display.rates():
        print(f"images/s: {rates}")
    if (files := manifest.account.get("files")) and files["found"]:  # a built-in set has none
        rest = sum(rule["count"] for rule in files["not_read"].values())
        print(
            f"files of the source: {files['found']:,} found = {files['with_samples']:,} with samples + "
            f"{len(files['metadata']):,} used otherwise + {rest:,} not read (dataset.json says which and why)"
        )
    samples = manifest.account["samples"]
    told = " + ".join(f"{count:,} {name}" for name, count in samples.items() if name != "found")
    print(f"samples: {samples['found']:,} found = {told}")
    if manifest.skipped:
        print(f"{len(manifest.skipped)} unreadable image(s) left out; dataset.json lists them")
    if warned := manifest.warned:
        example = f"{warned[0]['file']}: {warned[0]['warning']}"
        print(f"{len(warned)} image(s) kept that decode but may be damaged ({example}); dataset.json lists them")


def _terminate(signum: int, frame: FrameType | None) -> None:
    sys.exit(128 + signum)  # an exception, so that what is finished is kept in order


class _Display:
    """Progress on stderr: a live bar on a terminal, else a line every few seconds."""

    _EVERY = 10.0  # seconds between lines

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._phases: list[tuple[str, int, float, float]] = []  # name, images, start, end

    def __enter__(self) -> _Display:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True, markup=False, emoji=False)
        self._live = console.is_terminal
        self._bar = Progress(
            TextColumn("{task.description:<20}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:>8} " + self._unit + "/s", markup=False),
            TimeRemainingColumn(),
            console=console,
            disable=not self._live,
        )
        self._bar.start()
        self._task: TaskID | None = None
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        self._bar.stop()

    def _close(self) -> None:
        if self._task is not None:
            self._phases.append((self._phase.split()[0], self._done, self._began, time.monotonic()))
        self._task = None

    def rates(self) -> str:
        """How fast each kind of work went, over all its phases."""
        told = []
        for kind in dict.fromkeys(phase[0] for phase in self._phases):
            own = [phase for phase in self._phases if phase[0] == kind]
            told.append(f"{kind} {sum(p[1] for p in own) / max(sum(p[3] - p[2] for p in own), 1e-3):.0f}")
        return ", ".join(told)

    def start(self, phase: str, total: int) -> None:
        self._close()
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
