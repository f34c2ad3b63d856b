"""What augmentation costs: a whole batch at once on its device, beside timm's transforms of one Pillow image at a time.

    python -m tools.benchmarks.augment --threads 2 --rounds 9 [--images imagenet-sample.tar] [--device cuda]
    python -m tools.benchmarks.augment --host 256 1024  # launches and interpreter time of a step on a GPU, without one

The DeiT chain is RandAugment (rand-m9-mstd0.5-inc1-n2, bicubic), flip, normalisation, random erasing (0.25, noise per
pixel), mixup 0.8 or CutMix 1.0. Both sides start from decoded 224 x 224 images in memory: one uint8 batch for ours,
Pillow images for timm's. Timm's run in a pool of threads (Pillow releases the interpreter lock), ours in torch's.

Everything runs in one process. A round times every chain once, every other round backwards, so that whatever else the
machine does falls on all of them. Prints a table of medians and quartiles over the rounds: images per second, and CPU
time of the process per image, which on a GPU is what is left on the host.

With --host it says instead what a step asks of the interpreter, for batches of these sizes: launches (operations on
fake CUDA tensors that are no views, with the kernels inside ours), and CPU time of the thread, with images of a few
pixels and everything as on a GPU but for the driver: neither the copies to pinned memory nor the calls that launch.
"""

from __future__ import annotations

import argparse
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from timm.data import auto_augment, mixup, random_erasing
from torch import Tensor
from torchvision.transforms import v2

from pipelines import Batch, DataConfig
from pipelines.augment import (
    Mixing,
    MixingConfig,
    RandAugment,
    RandAugmentSpec,
    ThreeAugment,
    operations,
)
from pipelines.augment import device as augment_device
from pipelines.augment import mixing as augment_mixing
from pipelines.augment.device import DeviceTransform
from pipelines.storage.images import open_image
from tools.benchmarks.fake_gpu import FakeGpu
from tools.benchmarks.measure import Result, cells, conclude, in_turns, page, parser, spread, wait_for

SPEC = "rand-m9-mstd0.5-inc1-n2"
FILL = (124, 116, 104)
CLASSES = 1000
SIDE = 224


RECIPES = {
    "RandAugment": DataConfig(rand_augment=SPEC, erasing=0.25),
    "3-Augment": DataConfig(three_augment=True),
}
"""What the host's cost is measured of, both with mixup or CutMix."""


def deit_mixing() -> Mixing:
    return Mixing(MixingConfig(mixup_alpha=0.8, cutmix_alpha=1.0), CLASSES, seed=0, rank=0, label_smoothing=0.1)


@contextmanager
def without_kernels(choice: bool = False) -> Iterator[None]:
    """Torch's operations everywhere; with `choice` the kernels everywhere."""

    def serve(_: Tensor) -> bool:
        return choice

    with ExitStack() as patches:
        for module in (augment_device, augment_mixing):
            patches.enter_context(mock.patch.object(module, "kernels_serve", serve))
        yield


def unpacked(archive: Path) -> Iterator[tuple[str, bytes]]:
    """`<class>/<name>` and content of every JPEG file in a tar."""
    with tarfile.open(archive) as tar:
        for member in tar:
            path = Path(member.name)
            if member.isfile() and path.suffix.lower() in (".jpg", ".jpeg"):
                file = tar.extractfile(member)
                assert file is not None
                yield f"{path.parent.name}/{path.name}", file.read()


def photographs(archive: Path, num: int) -> list[Image.Image]:
    pictures = (open_image(content).convert("RGB") for _, content in islice(unpacked(archive), num))
    return [ImageOps.fit(picture, (SIDE, SIDE), Image.Resampling.BICUBIC) for picture in pictures]


def smooth_pictures(num: int) -> list[Image.Image]:
    coarse = np.random.default_rng(0).integers(0, 256, (num, SIDE // 8, SIDE // 8, 3), dtype=np.uint8)
    enlarged = (Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for pixels in coarse)
    return [picture.filter(ImageFilter.GaussianBlur(1)) for picture in enlarged]


def batch_chains(pictures: list[Image.Image], device: torch.device) -> dict[str, Callable[[int], object]]:
    """Ours, as functions of the step: each takes the batch on `device` through it."""
    pixels = np.stack([np.asarray(picture) for picture in pictures])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(device)
    labels = torch.arange(len(pictures), device=device) % CLASSES
    index = torch.arange(len(pictures))
    rand_augment = RandAugment(RandAugmentSpec.parse(SPEC), seed=0, fill=FILL, interpolation="bicubic")
    three_augment = ThreeAugment(seed=0)
    transform, mixing = DeviceTransform(RECIPES["RandAugment"], seed=0, train=True), deit_mixing()
    batch = Batch(images, labels, index)

    def chain(step: int) -> tuple[Tensor, Tensor]:
        return mixing(transform(batch, step), labels, step)

    def chain_of_torch(step: int) -> tuple[Tensor, Tensor]:
        with without_kernels():
            return chain(step)

    return {
        "RandAugment, torch": lambda step: rand_augment(images, index, step),
        "3-Augment, torch": lambda step: three_augment(images, index, step),
        "DeiT chain, torch": chain_of_torch,
    } | ({"DeiT chain, kernels": chain} if device.type == "cuda" else {})


def image_chains(pictures: list[Image.Image], pool: ThreadPoolExecutor) -> dict[str, Callable[[int], object]]:
    """timm's, and DeiT III's own 3-Augment: each takes every image through it."""
    keep_a_bit()
    hparams = {"translate_const": 100, "img_mean": FILL, "interpolation": Image.Resampling.BICUBIC}
    rand_augment = auto_augment.rand_augment_transform(SPEC, hparams)
    blur = v2.Lambda(lambda picture: picture.filter(ImageFilter.GaussianBlur(float(np.random.uniform(0.1, 2)))))  # noqa: NPY002
    three_augment = v2.Compose(
        [v2.RandomChoice([v2.Grayscale(3), v2.RandomSolarize(128, p=1), blur]), v2.ColorJitter(0.3, 0.3, 0.3)]
    )
    flip = v2.RandomHorizontalFlip()
    config = DataConfig()
    to_values = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(config.mean, config.std)])
    erase = random_erasing.RandomErasing(0.25, mode="pixel", max_count=1, device="cpu")
    mix = mixup.Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=CLASSES)
    labels = torch.arange(len(pictures)) % CLASSES

    def sample(picture: Image.Image) -> Tensor:
        values: Tensor = erase(to_values(rand_augment(flip(picture))))
        return values

    def chain(_: int) -> tuple[Tensor, Tensor]:
        mixed: tuple[Tensor, Tensor] = mix(torch.stack(list(pool.map(sample, pictures))), labels)
        return mixed

    return {
        "RandAugment, timm": lambda _: list(pool.map(rand_augment, pictures)),
        "3-Augment, Pillow": lambda _: list(pool.map(three_augment, pictures)),
        "DeiT chain, timm": chain,
    }


def keep_a_bit() -> None:
    """At full strength timm's posterising keeps 0 bits, which recent versions of Pillow refuse: let it keep 1."""
    to_bits = auto_augment.LEVEL_TO_ARG["PosterizeIncreasing"]
    auto_augment.LEVEL_TO_ARG["PosterizeIncreasing"] = lambda level, hparams: (max(1, to_bits(level, hparams)[0]),)


def timed(
    chain: Callable[[int], object], steps: Iterator[int], num_batches: int, batch: int, device: torch.device
) -> tuple[float, float]:
    """Images per second, and CPU ms per image."""
    num_images = num_batches * batch
    wait_for(device)
    wall, cpu = time.perf_counter(), time.process_time()
    for step in islice(steps, num_batches):
        chain(step)
    cpu = time.process_time() - cpu
    wait_for(device)
    return num_images / (time.perf_counter() - wall), 1e3 * cpu / num_images


def measured(arguments: argparse.Namespace) -> Result:
    """Rates and CPU time by chain and round."""
    batch, device = arguments.batch, torch.device(arguments.device)
    pictures = photographs(arguments.images, batch) if arguments.images else smooth_pictures(batch)
    with ThreadPoolExecutor(arguments.threads) as pool:
        chains = batch_chains(pictures, device) | image_chains(pictures, pool)
        cases = {
            name: partial(timed, chain, count(), arguments.batches, batch, device) for name, chain in chains.items()
        }
        return {"rounds": in_turns(cases, arguments.rounds)}


class NoDriver:
    """What Triton needs of a driver to compile for an H100; it launches nothing."""

    def __init__(self) -> None:
        self.utils = self

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    def load_binary(self, *_: object) -> tuple[int, int, int, int, int]:
        return 0, 0, 0, 0, 1024

    def launcher_cls(self, *_: object) -> Callable[..., None]:
        return lambda *_: None


def launches(config: DataConfig, batch: int, kernels: bool, step: int = 1) -> dict[str, int]:
    """Of a step by part: the copies of tables included, and what is allocated not; see `tools.benchmarks.fake_gpu`."""
    transform, mixing = DeviceTransform(config, seed=0, train=True), deit_mixing()
    with without_kernels(kernels), FakeGpu() as gpu:
        images = torch.empty((batch, 3, config.img_size, config.img_size), dtype=torch.uint8, device="cuda")
        labels = torch.empty(batch, dtype=torch.int64, device="cuda")
        there = Batch(images, labels, torch.arange(batch))
        with gpu.apart():
            values = transform(there, 0)  # what is copied once is copied now
        with gpu.part("augmentation"):
            transform(there, step)
        with gpu.part("mixing"):
            mixing(values, labels, step)
    return {part: gpu.work[part].launches for part in ("augmentation", "mixing")}


def interpreter_ms(config: DataConfig, batch: int, kernels: bool, steps: Iterator[int], num_steps: int) -> Result:
    """CPU time of this thread, by part, in milliseconds a step; "draws" is a part of "augmentation"."""
    config = replace(config, img_size=4)
    images = torch.zeros((batch, 3, 4, 4), dtype=torch.uint8)
    labels, index, numbers = torch.zeros(batch, dtype=torch.int64), torch.arange(batch), np.arange(batch)
    transform, mixing, here = DeviceTransform(config, seed=0, train=True), deit_mixing(), Batch(images, labels, index)
    values = torch.zeros(images.shape)

    def draws(step: int) -> None:
        transform._flips(here, step)
        assert transform._augment is not None
        transform._augment.draw(numbers, step, 224)
        if transform._erase is not None:
            transform._erase.draw(numbers, step, 224)

    parts = {
        "draws": draws,
        "augmentation": lambda step: transform(here, step),
        "mixing": lambda step: mixing(values, labels, step),
    }
    found = {}
    with ExitStack() as stack:
        stack.enter_context(without_kernels(kernels))
        stack.enter_context(mock.patch.object(operations, "_CPU_IMAGES", operations._GPU_IMAGES))
        if kernels:
            from triton.runtime import driver

            from pipelines.augment import fused

            driver.set_active(NoDriver())
            stack.enter_context(mock.patch.object(fused, "COUNTS", 1))  # on a GPU, clearing them is no work of the CPU
        for part, work in parts.items():
            work(0)
            begun = time.thread_time()
            for step in islice(steps, num_steps):
                work(step)
            found[part] = 1e3 * (time.thread_time() - begun) / num_steps
    return found


def host_costs(batches: Sequence[int], rounds: int, num_steps: int = 8) -> Result:
    """Launches and interpreter time of a step by recipe, batch size and form."""
    shapes = [(name, batch, kernels) for name in RECIPES for batch in batches for kernels in (False, True)]
    cases = {
        (name, batch, kernels): partial(interpreter_ms, RECIPES[name], batch, kernels, count(1), num_steps)
        for name, batch, kernels in shapes
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = in_turns(cases, rounds)
    finally:
        torch.set_num_threads(threads)
    return {
        "host": [
            {
                "recipe": name,
                "batch": batch,
                "form": "kernels" if kernels else "torch",
                "launches": launches(RECIPES[name], batch, kernels),
                "ms": {
                    part: [one[part] for one in times[name, batch, kernels]] for part in times[name, batch, kernels][0]
                },
            }
            for name, batch, kernels in shapes
        ]
    }


def host_report(result: Result) -> str:
    """The result of `host_costs` as markdown."""
    parts = ("augmentation", "mixing", "draws")
    rows = [
        " | ".join(
            (
                f"{case['recipe']}, {case['form']} | {case['batch']}",
                *(str(case["launches"][part]) for part in parts[:2]),
                *(spread(case["ms"][part], ".2f") for part in parts),
            )
        )
        for case in result["host"]
    ]
    head = "recipe | batch | launches: augmentation | mixing | CPU ms a step: augmentation | mixing | of it, draws"
    return page(result, f"What a step asks of the interpreter; {result['settings']['rounds']} rounds", head, rows)


def report(result: Result) -> str:
    """The result as markdown."""
    settings, rows = result["settings"], []
    for name, values in result["rounds"].items():
        rates, costs = zip(*values, strict=True)
        rows.append(f"{name} | {cells(rates, '.0f')} | {cells(costs, '.3f')}")
    title = f"{settings['batch']} images of {SIDE} x {SIDE}; {settings['rounds']} rounds"
    return page(result, title, "chain | images/s | quartiles | CPU ms/image | quartiles", rows)


def main(argv: Sequence[str] | None = None) -> Result:
    """Run as the arguments say (the command line's if None), print and write the report, and return the result."""
    command = parser(__doc__, rounds=9, device="cpu", threads=0)
    command.add_argument("--images", type=Path, help="tar of JPEGs; smooth random images where it is left out")
    command.add_argument("--batch", type=int, default=64)
    command.add_argument("--batches", type=int, default=4, help="batches per chain and round")
    command.add_argument("--host", type=int, nargs="+", metavar="BATCH", help="what a GPU's step asks of the host")
    arguments = command.parse_args(argv)
    if arguments.host:
        return conclude(arguments, lambda given: host_costs(given.host, given.rounds), host_report, "pillow")
    return conclude(arguments, measured, report, "pillow")


if __name__ == "__main__":
    main()
