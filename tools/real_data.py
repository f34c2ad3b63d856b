"""The three commands on real photographs: ImageNet JPEGs through every loader, and a short CIFAR-10 run that learns.

    python -m tools.real_data --imagenet imagenet-sample.tar --cifar10 cifar10-jpeg.tar --output runs/real

The archives hold `<wnid>/*.JPEG` and `train|test/<class>/*.jpg`. They are unpacked beside the runs.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
from pathlib import Path
from typing import Any

from pss.runs.log import read_rows
from tools.demo import command

LOADERS = ("torch", "dali", "ffcv")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--imagenet", type=Path, help="tar of ImageNet JPEGs in class folders")
    parser.add_argument("--cifar10", type=Path, help="tar of CIFAR-10 as train|test/<class>/*.jpg")
    parser.add_argument("--output", type=Path, default=Path("runs/real"), help="a new folder")
    parser.add_argument("--steps", type=int, default=6, help="steps of deit-s-224 with each loader")
    parser.add_argument("--cifar-steps", type=int, default=400, help="steps on CIFAR-10")
    args = parser.parse_args()
    if args.imagenet is None and args.cifar10 is None:
        parser.error("name at least one of --imagenet and --cifar10")
    if args.output.exists():
        parser.error(f"{args.output} exists; choose another --output")
    if args.imagenet is not None:
        imagenet(args.imagenet, args.output / "imagenet", args.steps)
    if args.cifar10 is not None:
        cifar10(args.cifar10, args.output / "cifar10", args.cifar_steps)
    return 0


def imagenet(archive: Path, output: Path, steps: int) -> None:
    """A few steps of the real recipe at its real size, with each loader, and a sweep."""
    # The sample has one photograph per class, so there is none to hold out: accuracy here says nothing.
    unpack(archive, output / "images" / "train")
    unpack(archive, output / "images" / "val")
    data = output / "data"
    command("convert", str(output / "images"), str(data), "--format", "dali,ffcv")
    # Nine steps a cycle visit every level of rho; the published cycle is one epoch.
    short = ["train.batch_size=16", f"train.max_steps={steps}", "train.log_every_steps=1", "schedule.period_steps=9"]
    short.append("train.ema_decay=0")
    runs = [output / loader for loader in LOADERS]
    for loader, run in zip(LOADERS, runs, strict=True):
        train("deit-s-224", data, run, loader, short)
    rhos = ["--rho", "1.0,0.2", "--batch-size", "16"]
    command("eval", *map(str, runs), "--data", str(data), "--output", str(output), *rhos)
    for run in runs:
        told = ", ".join(f"{row['rho']:g}: {row['loss']:.2f}" for row in read_rows(run, "step"))
        print(f"{run.name}: loss at each rho: {told}")


def cifar10(archive: Path, output: Path, steps: int) -> None:
    """A short run that must learn."""
    unpack(archive, output / "images")
    data = output / "data"
    command("convert", str(output / "images"), str(data), "--format", "dali")
    short = ["train.batch_size=64", f"train.max_steps={steps}", "schedule.period_steps=90", "optim.warmup_epochs=0.1"]
    train("cifar10", data, output / "run", "auto", short)
    command("eval", str(output / "run"), "--data", str(data))
    (last,) = read_rows(output / "run", "epoch")
    print(f"CIFAR-10 after {steps} steps: top-1 {last['top1']:.1f} % (guessing: 10 %)")
    if last["top1"] < 25:
        sys.exit("the CIFAR-10 run did not learn")


def train(recipe: str, data: Path, output: Path, loader: str, settings: list[str]) -> None:
    options = [word for setting in settings for word in ("--set", setting)]
    command("train", recipe, "--data", str(data), "--output", str(output), "--loader", loader, *options)


def unpack(archive: Path, folder: Path, every: int = 1) -> None:
    """A tar's files, or every so many of them."""
    folder.mkdir(parents=True)
    # Debian 12's Python, 3.11.2, is too old to be told that it is only data.
    options: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    with tarfile.open(archive) as tar:
        tar.extractall(folder, members=[member for member in tar if member.isfile()][::every], **options)


if __name__ == "__main__":
    sys.exit(main())
