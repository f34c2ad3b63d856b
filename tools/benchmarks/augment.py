"""What augmentation costs: a whole batch at once on its device, beside timm's transforms of one Pillow image at a time.

    python -m tools.benchmarks.augment --threads 2 --rounds 9 [--images imagenet-sample.tar] [--device cuda]

The DeiT chain is RandAugment (rand-m9-mstd0.5-inc1-n2, bicubic), flip, normalisation, random erasing (0.25, noise per
pixel), mixup 0.8 or CutMix 1.0. Both sides start from decoded 224 x 224 images in memory: one uint8 batch for ours,
Pillow images for timm's. Timm's run in a pool of threads (Pillow releases the interpreter lock), ours in torch's.

Everything runs in one process. A round times every chain once, every other round backwards, so that whatever else the
machine does falls on all of them. Prints a table of medians and quartiles over the rounds: images per second, and CPU
time of the process per image, which on a GPU is what is left on the host.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from timm.data import auto_augment, mixup, random_erasing
from torch import Tensor
from torchvision.transforms import v2

from pipelines import Batch, DataConfig
from pipelines.augment import Mixing, MixingConfig, RandAugment, RandAugmentSpec, RandomErasing, ThreeAugment
from pipelines.augment.device import DeviceTransform
from tools.benchmarks.measure import Result, cells, conclude, in_turns, page, parser, wait_for

SPEC = "rand-m9-mstd0.5-inc1-n2"
FILL = (124, 116, 104)
CLASSES = 1000
SIDE = 224


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
    pictures = (Image.open(io.BytesIO(content)).convert("RGB") for _, content in islice(unpacked(archive), num))
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
    device_index = index.to(device)
    rand_augment = RandAugment(RandAugmentSpec.parse(SPEC), seed=0, fill=FILL, interpolation="bicubic")
    three_augment = ThreeAugment(seed=0)
    normalise = DeviceTransform(DataConfig(), seed=0, train=True)
    erase = RandomErasing(0.25, seed=0)
    mixing = Mixing(MixingConfig(mixup_alpha=0.8, cutmix_alpha=1.0), CLASSES, seed=0, rank=0, label_smoothing=0.1)

    def chain(step: int) -> tuple[Tensor, Tensor]:
        augmented = Batch(rand_augment(images, index, step), labels, device_index)
        return mixing(erase(normalise(augmented, step), index, step), labels, step)

    return {
        "RandAugment, batch": lambda step: rand_augment(images, index, step),
        "3-Augment, batch": lambda step: three_augment(images, index, step),
        "DeiT chain, batch": chain,
    }


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
    return conclude(command.parse_args(argv), measured, report, "pillow")


if __name__ == "__main__":
    main()
