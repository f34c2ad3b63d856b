"""What the interpreter costs: per image in each loader, and per step in augmentation and in the training thread.

    python -m tools.benchmarks.host_cost --json host_cost.json [--data CONVERTED] [--batch 1024 256]

One thread at a time runs Python, however many cores there are: a process that needs 10 us of the interpreter's lock for
an image feeds at most 100,000 images a second, and training has to share that.

Measured is the processor time of the threads that run Python, and no other, over whole epochs, less what they spend in
calls that are known to work without the lock: decoders and kernels of torch, FFCV's compiled loop, checksums, the
search through a batch's first bytes, and asking for its pages. Waiting costs nothing, so that a busy machine changes
little. Of a call into torch, what it takes on the smallest input counts as the interpreter's. What is left is an upper
bound: numpy and DALI, too, leave the lock where they work for long. Libraries' own threads decode and do not count.

DALI is measured as it is fed on a GPU, with that graph's inputs and nothing behind them: on a GPU decoding is nobody's
time here. `us` is the back end's own share; beside it stands what any loader adds to a batch (labels, windows). The
first epoch compares checksums and finds out formats; the steady figure begins where files are no longer asked for ahead
of time, since they are in memory. The ceiling is that of one process which does nothing else.

Photographs are those of the tar of class folders that PSS_IMAGENET_SAMPLE names, else generated, several times over.
Launches of augmentation, mixing included, are counted on fake CUDA tensors. A step's milliseconds are those of the
training thread besides the model, as `tools.benchmarks.launches` finds them; augmentation's are those of the thread
that makes batches ready, as `tools.benchmarks.augment` does.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count as counting
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode

from pipelines import DataConfig, DataError, build
from pipelines.loaders import resize, torch_loader
from pipelines.loaders.planned import PlannedLoader
from pipelines.storage import unlocked
from pipelines.storage.source import open_source
from tools.benchmarks.augment import RECIPES, interpreter_ms
from tools.benchmarks.measure import Result, conclude, parser, table, told

RECIPE = "deit-s-224"
BACKENDS = ("dali", "ffcv", "torch")
SETTLED = 20
"""Batches after which a source has stopped asking for pages that are in memory; see `DiskWaits`."""
AUGMENTATION = ("augmentation", "mixing")
AHEAD = ("inputs", *AUGMENTATION)
"""What another thread does, ahead of the step."""


@dataclass
class Account:
    """Processor time of the threads that run Python, and what of it is not the interpreter's."""

    calls: Counter[tuple[str, int]] = field(default_factory=Counter)  # nanoseconds by kind and thread, which writes it
    before: dict[threading.Thread, int] = field(default_factory=dict)
    now: dict[threading.Thread, int] = field(default_factory=dict)

    def begin(self) -> None:
        """Count from here."""
        self.calls.clear()
        self.now.clear()
        self.look()
        self.before = dict(self.now)

    def look(self) -> None:
        """See what threads have spent by now; one that ends within `calls_apart` is seen when it does."""
        self.apart("looking", self._look)()

    def _look(self) -> None:
        for thread in threading.enumerate():
            with suppress(OSError):  # it has ended meanwhile
                spent = Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text(encoding="utf-8")
                self.now[thread] = int(spent.split()[0])

    def microseconds(self, kind: str) -> float:
        """Since `begin`, in calls of that kind."""
        return sum(spent for (of, _), spent in self.calls.items() if of == kind) / 1e3

    def rest(self) -> float:
        """Microseconds since `begin` in no such call."""
        whole = sum(spent - self.before.get(thread, 0) for thread, spent in self.now.items())
        return (whole - sum(self.calls.values())) / 1e3

    def apart(self, kind: str, function: Callable[..., Any], entry_ns: int = 0) -> Callable[..., Any]:
        """`function`, whose time less `entry_ns` a call is kept under `kind`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.thread_time_ns()
            try:
                return function(*args, **kwargs)
            finally:
                self.calls[kind, threading.get_ident()] += max(0, time.thread_time_ns() - began - entry_ns)

        return call


def entry_ns(call: Callable[[], Any]) -> int:
    """What `call`, into torch with the smallest input, takes."""
    taken = []
    for _ in range(200):
        began = time.thread_time_ns()
        call()
        taken.append(time.thread_time_ns() - began)
    return int(median(taken))


@contextmanager
def calls_apart(account: Account) -> Iterator[None]:
    """Within, calls that work without the interpreter's lock are accounted for as such, and `_batch` as it is."""
    encoded = io.BytesIO()
    Image.new("RGB", (1, 1)).save(encoded, "JPEG")
    tiny = torch.frombuffer(bytearray(encoded.getvalue()), dtype=torch.uint8)
    decode, rgb = torch_loader._JPEG_DECODER, ImageReadMode.RGB.value
    pixel = torch.zeros(1, 3, 1, 1, dtype=torch.uint8)
    kernels = {
        name: account.apart(
            "unlocked", kernel, entry_ns(lambda kernel=kernel: kernel(pixel, [1, 1], False, None, None, out=pixel))
        )
        for name, kernel in resize._KERNELS.items()
    }
    with ExitStack() as exits:

        def patch(place: Any, name: str, stand_in: Any) -> None:
            exits.enter_context(mock.patch.object(place, name, stand_in))

        apart = account.apart("unlocked", decode, entry_ns(lambda: decode(tiny, rgb, False)))
        patch(torch_loader, "_JPEG_DECODER", apart)
        exits.enter_context(mock.patch.dict(resize._KERNELS, kernels))
        patch(unlocked.zlib, "crc32", account.apart("unlocked", unlocked.zlib.crc32))
        if unlocked.knows_addresses():
            compiled = tuple(account.apart("unlocked", function) for function in unlocked._compiled())
            patch(unlocked, "_compiled", lambda: compiled)
        make_batch, live = account.apart("batch", PlannedLoader._batch), threading.Thread._bootstrap_inner

        def live_seen(thread: threading.Thread) -> None:
            live(thread)
            account.now[thread] = time.thread_time_ns()

        patch(PlannedLoader, "_batch", lambda loader, *args: make_batch(loader, *args))
        patch(threading.Thread, "_bootstrap_inner", live_seen)
        yield


def loader_of(backend: str, root: Path, batch: int, threads: int, account: Account) -> Any:
    """A training loader of the recipe's crops; DALI's without anything behind its inputs."""
    config = DataConfig(img_size=224)
    settings: dict[str, Any] = {"config": config, "batch_size": batch, "train": True, "num_workers": threads}
    if backend == "dali":
        return fed_dali(root, settings, account)
    loader: Any = build(root, "train", loader=backend, **settings)  # type: ignore[arg-type]
    if backend == "ffcv":
        stages, outputs = loader._beton.code
        loader._beton.code = [(account.apart("unlocked", code), made) for code, made in stages], outputs
    return loader


def fed_dali(root: Path, settings: dict[str, Any], account: Account) -> Any:
    """A DALI loader whose graph takes what that of a GPU takes, and looks at one byte of each image."""
    try:
        from nvidia.dali import fn, types

        from pipelines.loaders.dali_loader import DaliLoader, InGraph
    except ImportError as error:
        raise DataError(f"DALI cannot be imported: {error}") from error

    class Fed(InGraph):
        def _graph(self) -> list[Any]:
            encoded, pairs = self._external(3)
            sums = fn.cast(pairs[0] + pairs[1] + pairs[2], dtype=types.UINT8)
            byte = fn.slice(encoded, np.int32([0]), np.int32([1]), axes=[0])
            return [fn.reshape(fn.cat(byte, sums), shape=[1, 1, 3])]

    class FedLoader(DaliLoader):
        def _decodes_in_graph(self) -> bool:
            return True

    loader = FedLoader(open_source(root, "train"), **settings)
    fed = Fed(loader, settings["batch_size"], loader.device)
    loader._lanes = [[None, fed]]
    if fed._reader is not None:
        fed._reader.which = account.apart("unlocked", fed._reader.which)
    return loader


def loader_cost(backend: str, root: Path, batch: int, threads: int, epochs: int) -> dict[str, dict[str, float]]:
    """Microseconds an image of the back end and of `_batch`, in the first epoch and steady."""
    account = Account()
    with calls_apart(account):
        loader = loader_of(backend, root, batch, threads, account)
        try:
            warm_up = -(-SETTLED // loader.steps_per_epoch)
            found = {"first": _epochs(loader, account, 0, 1)}
            _epochs(loader, account, 1, warm_up)
            rounds = [_epochs(loader, account, 1 + warm_up + i, 1) for i in range(epochs)]
        finally:
            loader.close()
    return found | {"steady": {name: median(row[name] for row in rounds) for name in rounds[0]}}


def _epochs(loader: Any, account: Account, first: int, count: int) -> dict[str, float]:
    images = 0
    account.begin()
    for epoch in range(first, first + count):
        loader.set_epoch(epoch)
        for batch in loader:
            images += len(batch.labels)
            account.look()
    account.look()
    return {
        "us": account.rest() / images,
        "batch_us": account.microseconds("batch") / images,
        "unlocked_us": account.microseconds("unlocked") / images,
    }


def steps_of(count: int, rounds: int) -> dict[str, float]:
    """What a step of `RECIPE` with a batch of so many images asks of a GPU and of the interpreter; see the module."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--recipe", RECIPE, "--batch", str(count), "--set", "optim.lr_batch=none", "--rounds", str(4 * rounds)]
        command = [sys.executable, "-m", "tools.benchmarks.launches", *words, "--json", f"{folder}/launches.json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise DataError(f"the launches of a step cannot be counted: {done.stderr.strip()[-500:]}")
        result = json.loads(Path(folder, "launches.json").read_text(encoding="utf-8"))
    parts, own = result["stages"][min(result["stages"])], result["host_ms"]
    return {
        "augment_launches": sum(parts[part]["launches"] for part in AUGMENTATION),
        "step_ms": sum(spent for part, spent in own.items() if part not in AHEAD and not _of_model(part)),
    }


def _of_model(part: str) -> bool:
    return part.startswith(("forward", "backward"))


def augment_ms(count: int, rounds: int) -> float:
    """Milliseconds of one thread for augmentation and mixing of a batch of so many images, by the kernels of a GPU.

    Afterwards Triton launches nothing in this process."""
    rows = [interpreter_ms(RECIPES["RandAugment"], count, True, counting(1), 8) for _ in range(1 + 4 * rounds)]
    return median(row["augmentation"] + row["mixing"] for row in rows[1:])  # the first one warms up


def photographs() -> Iterator[tuple[str, bytes]]:
    """Class and content of JPEGs: of the tar that PSS_IMAGENET_SAMPLE names, or generated."""
    if tar_name := os.environ.get("PSS_IMAGENET_SAMPLE"):
        with tarfile.open(tar_name) as tar:
            for member in tar:
                if member.isfile() and (content := tar.extractfile(member)) is not None:
                    yield Path(member.name).parent.name, content.read()
        return
    draw = np.random.default_rng(0)
    for number in range(200):
        coarse = Image.fromarray(draw.integers(0, 256, (48, 64, 3), dtype=np.uint8))
        written = io.BytesIO()
        coarse.resize((512, 384), Image.Resampling.BICUBIC).save(written, "JPEG", quality=95)
        yield f"class{number % 10}", written.getvalue()


def converted(folder: Path, samples: int) -> Path:
    """A data set of so many samples, for DALI and, where it is installed, FFCV (raw pixels of 256)."""
    pictures = list(photographs())
    for number in range(samples):
        name, content = pictures[number % len(pictures)]
        (folder / "images" / "train" / name).mkdir(parents=True, exist_ok=True)
        (folder / "images" / "train" / name / f"{number:06d}.jpg").write_bytes(content)
    formats = "dali,ffcv" if importlib.util.find_spec("ffcv") else "dali"
    words = [str(folder / "images"), str(folder / "set"), "--format", formats]
    words += ["--profile", "raw256"] if "ffcv" in formats else []
    done = subprocess.run([sys.executable, "-m", "cli.convert", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise DataError(f"the photographs cannot be converted: {done.stderr.strip()[-500:]}")
    shutil.rmtree(folder / "images")
    return folder / "set"


def measured(arguments: argparse.Namespace) -> Result:
    """The figures of the JSON file, at the first of the batch sizes, and `table`: all of them by batch size."""
    rows: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        root = arguments.data or converted(Path(scratch), max(arguments.samples, *arguments.batch))
        for count in arguments.batch:
            row = rows[count] = {"loaders": {}}
            for backend in BACKENDS:
                try:
                    row["loaders"][backend] = loader_cost(backend, root, count, arguments.threads, arguments.rounds)
                except DataError as error:
                    print(f"no {backend}: {error}", file=sys.stderr)
            row |= steps_of(count, arguments.rounds)
        for count in arguments.batch:  # at last: nothing is launched after it
            rows[count]["augment_ms_per_step"] = augment_ms(count, arguments.rounds)
    first = rows[arguments.batch[0]]
    steady = {
        f"{backend}_us_per_image": first["loaders"][backend]["steady"]["us"] if backend in first["loaders"] else None
        for backend in BACKENDS
    }
    figures = {name: first[name] for name in ("augment_launches", "augment_ms_per_step", "step_ms")}
    return {**steady, **figures, "table": rows}


def report(result: Result) -> str:
    """The result as markdown."""
    loaders, steps = [], []
    for count, row in result["table"].items():
        for backend, cost in row["loaders"].items():
            first, steady = cost["first"], cost["steady"]
            both = steady["us"] + steady["batch_us"]
            loaders.append(
                f"{backend} | {count} | {first['us']:.1f} | {steady['us']:.2f} | {steady['batch_us']:.2f} | "
                f"{steady['unlocked_us']:.1f} | {1e6 / max(steady['us'], 1e-3):,.0f} | {1e6 / max(both, 1e-3):,.0f}"
            )
        steps.append(f"{count} | {row['augment_launches']:,} | {row['augment_ms_per_step']:.2f} | {row['step_ms']:.2f}")
    head = (
        "loader | batch | us/image, first epoch | steady | a batch's labels and windows | outside the lock | "
        "images/s at most | with labels and windows"
    )
    title = "The interpreter's time per image, and per step of " + RECIPE
    lines = [title, told(result), "", *table(head, loaders), ""]
    return "\n".join(
        [
            *lines,
            *table("batch | launches of augmentation | its ms a step | ms of the rest", steps),
        ]
    )


def main(argv: Sequence[str] | None = None) -> Result:
    """Run as the arguments say (the command line's if None), print and write the report, and return the result."""
    command = parser(__doc__, rounds=5, threads=2)
    command.add_argument("--data", type=Path, help="a converted data set in place of photographs several times over")
    command.add_argument("--samples", type=int, default=3000, help="of what is made where --data is not given")
    command.add_argument("--batch", type=int, nargs="+", default=[1024, 256], help="images per batch")
    arguments = command.parse_args(argv)
    return conclude(arguments, measured, report, "nvidia-dali-cuda130", "ffcv", "numba")


if __name__ == "__main__":
    main()
