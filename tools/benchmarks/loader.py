"""What the loaders deliver in steady state, beside timm's, on the machine at hand.

    python -m tools.benchmarks.loader --data /data/imagenet --rounds 5 --json loader.json [--device cuda]

`--data` is a folder of images (train/<class>/*.jpg) or a data set converted with original bytes. FFCV files are written
to a temporary folder from a folder of images (`--profiles`), and taken from a converted set where it has them. A round
times some batches of every case in one process, so that whatever else the machine does falls on all of them; every
other round goes backwards. The table gives medians and quartiles over the rounds; ratios to timm are formed within a
round first. CPU time is that of this process and of its workers.

What a loader has decoded ahead costs nothing when it is asked for, so that batches are counted only once all of it has
been taken, and as much is in work at the end as at the beginning: the timed batches lie within one epoch, away from its
ends, or are whole epochs, restarts included. A set may be of any size. `--batches` must be four times the deepest
queue. Checksums, which are compared when an image is first read, are left out: steady is what comes after.

"timm, DeiT recipe" adds what that recipe has timm do on the host: RandAugment, and mixup while collating. Ours do it
on the device, whichever loader is used; the row "device part" is what that costs where the device is this CPU. The last
column compares the host's CPU time with that recipe's. With `--device cuda` DALI decodes on the GPU, with several loads
of its JPEG engines, several pipelines, and part of the images left to the CPU.

With `--label-maps` the question is what our loaders lose by handing on a label map with every image, 18 x 18 x 5
of made-up numbers, beside the same loaders without.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from os import sysconf
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import FastCollateMixup, create_loader
from torch.utils.data import Dataset

from pipelines import Batch, DataConfig, DataError, build, open_dataset
from pipelines.augment import Mixing, MixingConfig
from pipelines.augment.device import DeviceTransform
from pipelines.base import GpuDecoding
from pipelines.conversion.options import PROFILES
from pipelines.storage.images import open_image
from pipelines.storage.manifest import MANIFEST
from pipelines.storage.source import Source, open_source
from tools.benchmarks.augment import SPEC, keep_a_bit
from tools.benchmarks.measure import Result, cells, conclude, in_turns, over, page, parser, wait_for

TIMM = "timm"
RECIPE = "timm, DeiT recipe"
DEVICE_PART = "device part, DeiT recipe"
NUM_CLASSES = 1000
LABEL_MAPS = ", label maps"
MANY = 4
"""How many times the depth of a loader's queue is to be timed."""


@dataclass(frozen=True)
class Case:
    """A loader to be timed."""

    epoch: Callable[[], Iterator[Any]]
    """The batches of another epoch."""
    steps: int
    """How many there are."""
    ahead: int
    """How many may have been decoded before they are asked for."""

    def batches(self) -> Iterator[Any]:
        """Epoch after epoch."""
        while True:
            yield from self.epoch()

    def window(self, wanted: int) -> tuple[int, int]:
        """How many batches to take before the clock starts, and how many, at least `wanted`, until it stops.

        By then all that was decoded before anybody asked is gone. Near the end of an epoch nothing is left to work on
        ahead: the window ends before that, or at the place of an epoch where it began.
        """
        before = 2 * self.ahead + 2
        if before + wanted + self.ahead <= self.steps:
            return before, wanted
        return before, -(-wanted // self.steps) * self.steps


class Pictures(Dataset[Any]):
    """The same images as timm wants them: `transform` is set by its `create_loader`."""

    transform: Callable[[Image.Image], Any]

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return self.source.num_samples

    def __getitem__(self, i: int) -> tuple[Any, int]:
        with open_image(self.source.read(i).tobytes()) as image:
            return self.transform(image.convert("RGB")), int(self.source.labels[i])


def timm_case(root: Path, config: DataConfig, arguments: argparse.Namespace, *, recipe: bool = False) -> Case:
    """timm's loader with the same crops, flips and filter, and uint8 images as ours; or all of its recipe."""
    further: dict[str, Any] = {}
    if recipe:
        keep_a_bit()
        mixing = FastCollateMixup(0.8, 1.0, label_smoothing=0.1, num_classes=NUM_CLASSES)
        further = {"auto_augment": SPEC, "collate_fn": mixing}
    whole = create_loader(
        Pictures(open_source(root, "train", check_bytes=False)),
        input_size=(3, config.img_size, config.img_size),
        batch_size=arguments.batch,
        is_training=True,
        color_jitter=None,
        interpolation=config.interpolation,
        num_workers=arguments.threads,
        device=torch.device("cpu"),
        **further,
    )
    loader = whole.loader  # what its normalisation on the device would be given
    return Case(partial(iter, loader), len(loader), loader.num_workers * loader.prefetch_factor)


def our_case(
    root: Path, config: DataConfig, backend: Any, arguments: argparse.Namespace, label_maps: Path | None = None
) -> Case:
    """One of our loaders."""
    loader: Any = build(
        root,
        "train",
        config=config,
        batch_size=arguments.batch // config.decode_once * config.decode_once,
        train=True,
        loader=backend,
        num_workers=arguments.threads,
        device=arguments.device,
        check_bytes=False,
        label_maps=label_maps,
    )
    epochs = count()

    def epoch() -> Iterator[Batch]:
        loader.set_epoch(next(epochs))
        return iter(loader)

    return Case(epoch, loader.steps_per_epoch, loader.batches_ahead)


def ffcv_case(
    data: Path, root: Path, config: DataConfig, arguments: argparse.Namespace, label_maps: Path | None = None
) -> Case:
    """Our FFCV loader of `root`, which is written first, in the profile it is named after, unless it is there."""
    if not (root / MANIFEST).exists():
        command = [
            sys.executable,
            "-m",
            "cli.convert",
            str(data),
            str(root),
            "--format",
            "ffcv",
            "--profile",
            root.name,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise DataError(done.stderr.strip())
    return our_case(root, config, "ffcv", arguments, label_maps)


def device_case(root: Path, config: DataConfig, arguments: argparse.Namespace) -> Case:
    """What the recipe does to a batch after any of our loaders, over and over to one batch."""
    recipe = replace(config, rand_augment=SPEC, erasing=0.25)
    batch = next(our_case(root, config, "torch", arguments).batches()).to(torch.device(arguments.device))
    transform = DeviceTransform(recipe, seed=0, train=True)
    mixing = Mixing(MixingConfig(mixup_alpha=0.8, cutmix_alpha=1.0), NUM_CLASSES, seed=0, rank=0, label_smoothing=0.1)
    steps = count()

    def epoch() -> Iterator[Batch]:
        step = next(steps)
        mixing(transform(batch, step), batch.labels, step)
        yield batch

    return Case(epoch, steps=1, ahead=0)


def gpu_decoders() -> list[tuple[str, GpuDecoding]]:
    """Ways to share the decoding between JPEG engines, other cores of the GPU, and the CPU."""
    ways = [(f", engines {load:g}", GpuDecoding(hardware_load=load)) for load in (0.0, 0.25, 0.5, 0.75, 1.0)]
    ways += [(f", {count} pipelines", GpuDecoding(pipelines=count)) for count in (1, 2, 3)]
    return ways + [(f", CPU {share:g}", GpuDecoding(cpu_share=share)) for share in (0.25, 0.5)]


def cases(data: Path, scratch: Path, arguments: argparse.Namespace) -> dict[str, Case]:
    """Every case that can run here; the others are named on stderr."""
    config = DataConfig(img_size=arguments.img_size, interpolation=arguments.interpolation)
    once = replace(config, decode_once=3)
    made = {
        TIMM: partial(timm_case, data, config, arguments),
        RECIPE: partial(timm_case, data, config, arguments, recipe=True),
        DEVICE_PART: partial(device_case, data, config, arguments),
    }
    decoders = {"torch": ("torch", config)}
    if arguments.device == "cpu":
        decoders["DALI CPU"] = ("dali", config)
    else:
        decoders |= {f"DALI GPU{name}": ("dali", replace(config, gpu_decoding=how)) for name, how in gpu_decoders()}
    for name, (backend, settings) in decoders.items():
        made[name] = partial(our_case, data, settings, backend, arguments)
    for name, backend in (("torch", "torch"), ("DALI", "dali")):
        made[f"{name}, decode_once 3"] = partial(our_case, data, once, backend, arguments)
    manifest = open_dataset(data).manifest
    for profile in arguments.profiles if manifest is None else ("as converted",):
        root = data if manifest is not None else scratch / profile
        made[f"FFCV {profile}"] = partial(ffcv_case, data, root, config, arguments)
        made[f"FFCV {profile}, decode_once 3"] = partial(ffcv_case, data, root, once, arguments)
    if arguments.label_maps:
        file = made_up_maps(scratch / "maps.npy", open_source(data, "train", check_bytes=False).num_samples)
        own = {name: make for name, make in made.items() if make.func in (our_case, ffcv_case)}
        both = ({name: make, name + LABEL_MAPS: partial(make, label_maps=file)} for name, make in own.items())
        made = {name: make for pair in both for name, make in pair.items()}
    ready = {}
    for name, make in made.items():
        try:
            case = make()
        except DataError as error:
            print(f"no {name}: {error}", file=sys.stderr)
        else:
            refuse(name, case, arguments)
            ready[name] = case
    return ready


def made_up_maps(path: Path, count: int) -> Path:
    """Label maps as `pss-convert --token-labels` makes them of a teacher of 1,000 classes, 6,480 bytes each."""
    rng = np.random.default_rng(0)
    rows = np.lib.format.open_memmap(path, mode="w+", dtype="<i2", shape=(count, 2, 5, 18, 18))
    for row in rows:
        row[:] = rng.integers(0, NUM_CLASSES, row.shape)
    return path


def refuse(name: str, case: Case, arguments: argparse.Namespace) -> None:
    """Leave if what is wanted would not be steady."""
    if case.steps < 1:
        raise SystemExit(f"{name} has fewer images than one batch of {arguments.batch}; lower --batch")
    if arguments.batches < (least := max(1, MANY * case.ahead)):
        raise SystemExit(
            f"--batches is {arguments.batches}, but {name} decodes up to {case.ahead} batches ahead; "
            f"time at least {least}"
        )


def cpu_seconds() -> float:
    """Processor time of this process and of the children that live."""
    pids, found = ["self"], []
    while pids:
        pid = pids.pop()
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(FileNotFoundError):  # a thread that has ended since
                pids += (task / "children").read_text().split()
        found.append(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13])
    return sum(int(ticks) for both in found for ticks in both) / sysconf("SC_CLK_TCK")


def settle() -> None:
    """Wait, for two seconds at most, until what an earlier case has begun and left is done."""
    for _ in range(20):
        before = cpu_seconds()
        time.sleep(0.1)
        if cpu_seconds() - before < 0.03:
            return


def timed(
    case: Case,
    num_batches: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
    cpu_clock: Callable[[], float] = cpu_seconds,
) -> tuple[float, float]:
    """Images per second and CPU ms per image over at least `num_batches` batches in steady state."""
    before, num_batches = case.window(num_batches)
    batches, images = case.batches(), 0
    for _ in islice(batches, before):
        pass
    wait_for(device)
    began, cpu = clock(), cpu_clock()
    for batch in islice(batches, num_batches):
        images += len(batch[0]) if isinstance(batch, list | tuple) else len(batch.labels)
    wait_for(device)
    return images / (clock() - began), 1e3 * (cpu_clock() - cpu) / images


def measured(arguments: argparse.Namespace) -> Result:
    """Rate and CPU time of every case and round."""

    def turn(case: Case) -> tuple[float, float]:
        settle()
        return timed(case, arguments.batches, torch.device(arguments.device))

    with tempfile.TemporaryDirectory() as scratch:
        ready = cases(arguments.data, Path(scratch), arguments)
        rounds = in_turns({name: partial(turn, case) for name, case in ready.items()}, arguments.rounds)
    windows = {name: case.window(arguments.batches) for name, case in ready.items()}
    return {"rounds": rounds, "batches_before_and_timed": windows}


def report(result: Result) -> str:
    """The result as markdown."""
    settings, rows = result["settings"], []
    rates, cpu = ({name: [pair[i] for pair in pairs] for name, pairs in result["rounds"].items()} for i in range(2))
    # What each is compared with: its rate, and its CPU time.
    others, told = dict.fromkeys(rates, (TIMM, RECIPE)), "times timm | quartiles | CPU time over the recipe's"
    if settings["label_maps"]:
        others = {name: (name.removesuffix(LABEL_MAPS),) * 2 for name in rates}
        told = "times without maps | quartiles | CPU time over that without"
    for name, (other, recipe) in others.items():
        share, ratio = median(over(cpu[name], cpu[recipe])), cells(over(rates[name], rates[other]), ".3f")
        rows.append(f"{name} | {cells(rates[name], '.0f')} | {median(cpu[name]):.2f} | {ratio} | {share:.3f}")
    title = (
        f"{settings['img_size']} pixels, {settings['interpolation']}, {settings['device']}, "
        f"batch {settings['batch']}, {settings['threads']} threads or workers, "
        f"{settings['rounds']} rounds of at least {settings['batches']} batches in steady state"
    )
    return page(result, title, f"loader | images/s | quartiles | CPU ms/image | {told}", rows)


def main(argv: Sequence[str] | None = None) -> Result:
    """Run as the arguments say (the command line's if None), print and write the report, and return the result."""
    command = parser(__doc__, rounds=5, device="cpu", threads=2)
    command.add_argument("--data", type=Path, required=True, help="a folder of images, or a converted data set")
    command.add_argument("--label-maps", action="store_true", help="our loaders with label maps and without")
    command.add_argument("--img-size", type=int, default=224, help="pixels")
    command.add_argument("--interpolation", choices=("bicubic", "bilinear"), default="bicubic")
    command.add_argument("--batch", type=int, default=66, help="images per batch; even")
    command.add_argument("--batches", type=int, default=30, help="the fewest timed batches of a case in a round")
    command.add_argument("--profiles", nargs="*", choices=tuple(PROFILES), default=["jpg500", "raw256"], help="of FFCV")
    return conclude(command.parse_args(argv), measured, report, "torchvision", "pillow", "nvidia-dali-cuda130", "ffcv")


if __name__ == "__main__":
    main()
