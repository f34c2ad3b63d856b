"""The main job in a few minutes on a laptop: convert, train dense and under a schedule, sweep rho, draw the picture.

    python -m tools.demo            (or: make demo)

Real data: the 1,797 handwritten digits that scikit-learn carries (UCI, Optical Recognition of Handwritten Digits).
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import time
from pathlib import Path

from pss.runs.log import read_rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="where data, runs and pictures go")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change the recipe")
    args = parser.parse_args()

    began = time.perf_counter()
    output: Path = args.output
    if output.exists():
        shutil.rmtree(output)
    output.mkdir(parents=True)
    data = output / "data"
    loader = "dali" if importlib.util.find_spec("nvidia.dali") else "torch"
    settings = [word for setting in args.set for word in ("--set", setting)]

    command("convert", "digits", str(data), "--format", "dali")
    seconds = {}
    for name, method in (("pss", "sampled"), ("dense", "dense")):
        started = time.perf_counter()
        options = ["--data", str(data), "--output", str(output / name), "--loader", loader]
        command("train", "digits", *options, "--set", f"method={method}", *settings)
        seconds[name] = time.perf_counter() - started
    command("eval", str(output / "pss"), str(output / "dense"), "--data", str(data), "--output", str(output))

    training = {name: train_seconds(output / name) for name in seconds}
    print(
        f"\ntraining took {training['pss']:.0f} s under the schedule and {training['dense']:.0f} s dense; "
        f"all of it {time.perf_counter() - began:.0f} s\n"
        f"the picture: {output / 'rho.png'}"
    )
    return 0


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
