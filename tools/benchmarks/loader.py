"""What the loaders deliver, beside timm's, on the machine at hand.

    python -m tools.benchmarks.loader --data /data/imagenet --rounds 5 --json loader.json [--device cuda]

`--data` is a folder of images (train/<class>/*.jpg) or a data set converted with original bytes. FFCV files are written
to a temporary folder from a folder of images, and taken from a converted set where it has them. A round runs some
batches of every case in one process, so that whatever else the machine does falls on all of them; every other round
goes backwards. The table gives medians and quartiles over the rounds; ratios to timm are formed within a round first.
CPU time is that of this process and of its workers.

"timm, DeiT recipe" adds what that recipe has timm do on the host: RandAugment, and mixup while collating. Ours do it
on the device, whichever loader is used; the row "device part" is what that costs where the device is this CPU. The last
column compares the host's CPU time with that recipe's. With `--device cuda` DALI decodes on the GPU, with several loads
of its JPEG engines, several pipelines, and part of the images left to the CPU.
"""

import argparse
import importlib.metadata
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from os import sysconf
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import FastCollateMixup, create_loader
from torch.utils.data import Dataset

from pipelines import Batch, DataConfig, DataError, build, open_dataset
from pipelines.augment import Mixing, MixingConfig
from pipelines.augment.device import DeviceTransform
from pipelines.base import GpuDecoding
from pipelines.storage.source import Source, open_source
from tools.benchmarks.augment import SPEC, keep_a_bit
from tools.benchmarks.measure import environment, quartiles

TIMM = "timm"
RECIPE = "timm, DeiT recipe"
DEVICE_PART = "device part, DeiT recipe"
NUM_CLASSES = 1000
PROFILES = ("jpg500", "raw256")


class Pictures(Dataset[Any]):
    """The same images as timm wants them: `transform` is set by its `create_loader`."""

    transform: Callable[[Image.Image], Any]

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return self.source.num_samples

    def __getitem__(self, i: int) -> tuple[Any, int]:
        with Image.open(io.BytesIO(self.source.read(i).tobytes())) as image:
            return self.transform(image.convert("RGB")), int(self.source.labels[i])


def timm_batches(
    root: Path, config: DataConfig, arguments: argparse.Namespace, *, recipe: bool = False
) -> Callable[[], Iterator[Any]]:
    """timm's loader with the same crops, flips and filter, and uint8 images as ours; or all of its recipe."""
    further: dict[str, Any] = {}
    if recipe:
        keep_a_bit()
        mixing = FastCollateMixup(0.8, 1.0, label_smoothing=0.1, num_classes=NUM_CLASSES)
        further = {"auto_augment": SPEC, "collate_fn": mixing}
    loader = create_loader(
        Pictures(open_source(root, "train")),
        input_size=(3, config.img_size, config.img_size),
        batch_size=arguments.batch,
        is_training=True,
        color_jitter=None,
        interpolation=config.interpolation,
        num_workers=arguments.threads,
        device=torch.device("cpu"),
        **further,
    )
    return lambda: iter(loader.loader)  # what its normalisation on the device would be given


def our_batches(
    root: Path, config: DataConfig, backend: Any, arguments: argparse.Namespace
) -> Callable[[], Iterator[Any]]:
    """One of our loaders; each call begins another epoch."""
    batch = arguments.batch // config.decode_once * config.decode_once
    loader = build(
        root,
        "train",
        config=config,
        batch_size=batch,
        train=True,
        loader=backend,
        num_workers=arguments.threads,
        device=arguments.device,
    )
    epochs = iter(range(1 << 30))

    def batches() -> Iterator[Any]:
        loader.set_epoch(next(epochs))
        return iter(loader)

    return batches


def device_part(root: Path, config: DataConfig, arguments: argparse.Namespace) -> Callable[[], Iterator[Any]]:
    """What the recipe does to a batch after any of our loaders, over and over to one batch."""
    recipe = replace(config, rand_augment=SPEC, erasing=0.25)
    batch = next(our_batches(root, config, "torch", arguments)())
    transform = DeviceTransform(recipe, seed=0, train=True)
    mixing = Mixing(MixingConfig(mixup_alpha=0.8, cutmix_alpha=1.0), NUM_CLASSES, seed=0, rank=0, label_smoothing=0.1)

    def batches() -> Iterator[Batch]:
        for step in range(1 << 30):
            mixing(transform(batch, step), batch.labels, step)
            yield batch

    return batches


def gpu_decoders() -> list[tuple[str, GpuDecoding]]:
    """Ways to share the decoding between JPEG engines, other cores of the GPU, and the CPU."""
    ways = [(f", engines {load:g}", GpuDecoding(hardware_load=load)) for load in (0.0, 0.25, 0.5, 0.75, 1.0)]
    ways += [(f", {count} pipelines", GpuDecoding(pipelines=count)) for count in (1, 2, 3)]
    return ways + [(f", CPU {share:g}", GpuDecoding(cpu_share=share)) for share in (0.25, 0.5)]


def cases(data: Path, scratch: Path, arguments: argparse.Namespace) -> dict[str, Callable[[], Iterator[Any]]]:
    """Every case that can run here; the others are named on stderr."""
    config = DataConfig(img_size=arguments.img_size, interpolation=arguments.interpolation)
    once = replace(config, decode_once=3)
    made = {
        TIMM: partial(timm_batches, data, config, arguments),
        RECIPE: partial(timm_batches, data, config, arguments, recipe=True),
        DEVICE_PART: partial(device_part, data, config, arguments),
    }
    decoders = {"torch": ("torch", config)}
    if arguments.device == "cpu":
        decoders["DALI CPU"] = ("dali", config)
    else:
        decoders |= {f"DALI GPU{name}": ("dali", replace(config, gpu_decoding=how)) for name, how in gpu_decoders()}
    for name, (backend, settings) in decoders.items():
        made[name] = partial(our_batches, data, settings, backend, arguments)
    for name, backend in (("torch", "torch"), ("DALI", "dali")):
        made[f"{name}, decode_once 3"] = partial(our_batches, data, once, backend, arguments)
    manifest = open_dataset(data).manifest
    for profile in PROFILES if manifest is None else ("as converted",):
        root = data if manifest is not None else scratch / profile
        if manifest is None:
            command = [sys.executable, "-m", "cli.convert", str(data), str(root), "--format", "ffcv"]
            done = subprocess.run([*command, "--profile", profile], capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"no FFCV {profile}: {done.stderr.strip()}", file=sys.stderr)
                continue
        made[f"FFCV {profile}"] = partial(our_batches, root, config, "ffcv", arguments)
        made[f"FFCV {profile}, decode_once 3"] = partial(our_batches, root, once, "ffcv", arguments)
    ready = {}
    for name, make in made.items():
        try:
            ready[name] = make()
        except DataError as error:
            print(f"no {name}: {error}", file=sys.stderr)
    return ready


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


def run(batches: Callable[[], Iterator[Any]], num_batches: int) -> tuple[float, float]:
    """Images per second and CPU ms per image over `num_batches`, after two that start the workers."""
    iterator = batches()
    for _ in islice(iterator, 2):
        pass
    began, cpu, images = time.perf_counter(), cpu_seconds(), 0
    for batch in islice(iterator, num_batches):
        images += len(batch[0]) if isinstance(batch, list | tuple) else len(batch.labels)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds, spent = time.perf_counter() - began, cpu_seconds() - cpu
    if images == 0:
        raise SystemExit("too few images for three batches; lower --batch")
    return images / seconds, 1e3 * spent / images


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all cases; the result holds every round."""
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        ready = cases(arguments.data, Path(scratch), arguments)
        rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in ready}
        for number in range(arguments.rounds + 1):
            for name in list(ready)[:: 1 if number % 2 else -1]:
                measured = run(ready[name], arguments.batches)
                if number:  # the first round warms up
                    rounds[name].append(measured)
    versions = {}
    for package in ("torchvision", "pillow", "nvidia-dali-cuda130", "ffcv"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "none"
    settings = {key: str(value) for key, value in vars(arguments).items() if key != "json"}
    return {
        "settings": settings,
        "environment": environment(torch.device(arguments.device)) | versions,
        "rounds": rounds,
    }


def report(result: dict[str, Any]) -> str:
    """The result as markdown."""
    settings, rounds = result["settings"], result["rounds"]
    lines = [
        f"{settings['img_size']} pixels, {settings['interpolation']}, {settings['device']}, "
        f"batch {settings['batch']}, {settings['threads']} threads or workers, "
        f"{settings['rounds']} rounds of {settings['batches']} batches",
        ", ".join(f"{key} {value}" for key, value in result["environment"].items()),
        "",
        "| loader | images/s | quartiles | CPU ms/image | times timm | quartiles | CPU time over the recipe's |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, values in rounds.items():
        first, median, third = quartiles([rate for rate, _ in values])
        cpu = quartiles([spent for _, spent in values])[1]
        ratios = [rate / base for (rate, _), (base, _) in zip(values, rounds[TIMM], strict=True)]
        low, ratio, high = quartiles(ratios)
        rate = f"{median:.0f} | {first:.0f} to {third:.0f}"
        share = quartiles(
            [spent / all_of_it for (_, spent), (_, all_of_it) in zip(values, rounds[RECIPE], strict=True)]
        )[1]
        lines.append(f"| {name} | {rate} | {cpu:.2f} | {ratio:.2f} | {low:.2f} to {high:.2f} | {share:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder of images, or a converted data set")
    parser.add_argument("--img-size", type=int, default=224, help="pixels")
    parser.add_argument("--interpolation", choices=("bicubic", "bilinear"), default="bicubic")
    parser.add_argument("--device", default="cpu", help="where batches go, and DALI decodes: cpu or cuda")
    parser.add_argument("--batch", type=int, default=66, help="images per batch; even")
    parser.add_argument(
        "--batches", type=int, default=30, help="timed batches of a case in a round, many beside the few made ahead"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--threads", type=int, default=2, help="threads, or worker processes of timm")
    parser.add_argument("--json", type=Path, help="where to write every round")
    arguments = parser.parse_args()
    result = measure(arguments)
    print(report(result))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
