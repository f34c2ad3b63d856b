"""What the whole training loop reaches: images a second at each rho, what a cycle saves, how long steps wait for data.

    python -m tools.benchmarks.training --recipe deit-s-224 --batch 1024 --cycles 3 --json training.json
    python -m tools.benchmarks.training --data /data/imagenet --seconds 60 --json training.json

Trains a recipe, its augmentation, mixing and moving average included, by the loop of pss-train. Without `--data` the
images are random ones that lie on the device. The first cycle of the schedule compiles and is not counted; after it a
step lasts from one batch handed out to the next, by the GPU's clock where there is one. `--set` changes the recipe.

The saving is one minus the ratio of a cycle's mean step to its mean step at rho = 1. Data wait is the share of the time
that the loop waits for batches, without what a CPU does to make them ready itself. Utilisation is what nvidia-smi says:
the share of a short while during which the GPU did anything at all.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import os
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import pipelines
from pipelines import Batch
from pipelines.loaders.prefetch import Inputs
from pipelines.probe import probe
from pss import recipes
from pss.config import Config
from pss.methods import Stage, mean_tokens
from pss.runtime.processes import World
from pss.training.inputs import StepInputs
from pss.training.setup import position_of
from pss.training.trainer import Trainer
from tools.benchmarks.measure import Result, cells, conclude, parser, peak_tflops, spread, table, told

NUM_CLASSES = 1000


class Enough(Exception):
    """All that was to be measured has been."""


class Resident:
    """Random images on the device: a loader that costs nothing."""

    backend = "resident"
    delivered_hash = 0

    def __init__(
        self, batch_size: int, img_size: int, steps_per_epoch: int, device: torch.device, num_classes: int = NUM_CLASSES
    ) -> None:
        self.batch_size, self.steps_per_epoch = batch_size, steps_per_epoch
        self.num_classes, self.num_samples = num_classes, batch_size * steps_per_epoch
        shape = (batch_size, 3, img_size, img_size)
        self.images = torch.randint(256, shape, dtype=torch.uint8, device=device)
        self.labels = torch.randint(num_classes, (batch_size,), device=device)
        self.first = 0

    def planned_hash(self, epoch: int) -> int:
        return 0

    def set_parts(self, parts: int) -> None: ...

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        self.first = start_step

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.first, self.steps_per_epoch):
            yield Batch(self.images, self.labels, torch.arange(self.batch_size) + step * self.batch_size)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Handout:
    """One batch: which step and epoch of the run it is for, how long it was waited for, and when it was given."""

    step: int
    epoch: int
    waited: float
    given: float
    event: torch.cuda.Event | None


class Timed:
    """A run's inputs, noting when they are handed out; ends the run after `last_step`, or `seconds` after `warm`."""

    def __init__(
        self, inputs: Inputs[StepInputs], device: torch.device, warm: int, last_step: int | None, seconds: float
    ) -> None:
        self.inputs, self.device, self.warm, self.last_step, self.seconds = inputs, device, warm, last_step, seconds
        self.handouts: list[Handout] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inputs, name)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        self.epoch = epoch
        self.inputs.set_epoch(epoch, start_step)

    def __iter__(self) -> Iterator[StepInputs]:
        every = iter(self.inputs)
        while True:
            before = self.inputs.seconds_waited
            given_inputs = next(every, None)
            if given_inputs is None:
                return
            event = None
            if self.device.type == "cuda":
                event = torch.cuda.Event(enable_timing=True)
                event.record()
            given, step = time.perf_counter(), len(self.handouts)
            self.handouts.append(Handout(step, self.epoch, self.inputs.seconds_waited - before, given, event))
            if self.last_step is not None and step >= self.last_step:
                raise Enough
            if step > self.warm and given - self.handouts[self.warm].given > self.seconds:
                raise Enough
            yield given_inputs


class Utilisation:
    """Reads nvidia-smi ten times a second in the background."""

    def __init__(self, device: torch.device) -> None:
        self.samples: list[tuple[float, float]] = []  # when, percent
        self.missing = None
        if device.type != "cuda":
            self.missing = "there is no GPU"
        elif shutil.which("nvidia-smi") is None:
            self.missing = "nvidia-smi is not installed"

    def __enter__(self) -> Utilisation:
        if self.missing is None:
            index = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
            query = ["--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "100", "-i", index]
            self._process = subprocess.Popen(["nvidia-smi", *query], stdout=subprocess.PIPE, text=True)
            self._thread = threading.Thread(target=self._read, daemon=True)
            self._thread.start()
        return self

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip().isdigit():
                self.samples.append((time.perf_counter(), float(line)))

    def __exit__(self, *exc: object) -> None:
        if self.missing is None:
            self._process.terminate()
            self._process.communicate()
            self._thread.join()
            if not self.samples:
                self.missing = "nvidia-smi tells no utilisation here"


def step_seconds(handouts: Sequence[Handout], warm: int) -> list[tuple[Handout, float]]:
    """How long each step took, from `warm` on; the last of an epoch is left out, as validation follows it."""
    steps = []
    for this, following in zip(handouts[warm:], handouts[warm + 1 :], strict=False):
        if this.epoch == following.epoch:
            if this.event is not None and following.event is not None:
                steps.append((this, this.event.elapsed_time(following.event) / 1e3))
            else:
                steps.append((this, following.given - this.given))
    return steps


def build_loaders(
    arguments: argparse.Namespace, config: Config, device: torch.device
) -> tuple[list[Any], list[str], int | None]:
    """Loaders of training and validation, the names of the classes, and the last step if there is one."""
    cycle = arguments.cycle_steps
    if arguments.data is None:
        last_step = cycle * (arguments.cycles + 1)
        sizes = arguments.batch, config.data.img_size
        made: list[Any] = [Resident(*sizes, steps, device) for steps in (last_step + 1, 1)]
        return made, [str(number) for number in range(NUM_CLASSES)], last_step
    backend = probe(arguments.data, "train", config=config.data, device=str(device)).backend
    options: dict[str, Any] = {"config": config.data, "batch_size": arguments.batch, "device": str(device)}
    train, val = (
        pipelines.build(arguments.data, split, train=split == "train", loader=backend, **options)
        for split in ("train", "val")
    )
    return [train, val], list(pipelines.open_dataset(arguments.data).classes), None


def measured(arguments: argparse.Namespace) -> Result:
    """Train, and tell what was noted; the result holds every single step."""
    device = torch.device(arguments.device)
    usual = [
        f"train.batch_size={arguments.batch}",
        f"data.prefetch_gb={arguments.prefetch_gb}",
        f"schedule.period_steps={arguments.cycle_steps}",
        "schedule.cooldown_epochs=0",
        "model.weights=none",  # which weights it starts from is nothing to the speed
        "optim.lr_batch=none",  # nor are rates, which may not suit the batch
    ]
    config = recipes.get(arguments.recipe).with_settings(usual).with_settings(arguments.set)
    loaders, classes, last_step = build_loaders(arguments, config, device)
    try:
        with tempfile.TemporaryDirectory() as folder, Utilisation(device) as utilisation:
            world = World(rank=0, size=1, device=device)
            options: dict[str, Any] = {"classes": classes, "output": Path(folder), "world": world}
            trainer = Trainer(config, loaders[0], loaders[1], **options)
            timed = Timed(trainer.inputs, device, arguments.cycle_steps, last_step, arguments.seconds)
            trainer.inputs = timed  # type: ignore[assignment]
            with contextlib.suppress(Enough):
                trainer.fit()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    finally:
        for loader in loaders:
            loader.close()
    settings = {
        "model": config.model.name,
        "rel_pos": trainer.method.model.rel_pos,
        "img_size": config.data.img_size,
        "loader": loaders[0].backend,
        "compiled": trainer.compiled,
    }
    return {"settings": settings, **summarise(trainer, timed, utilisation, arguments.cycle_steps)}


def summarise(trainer: Trainer, timed: Timed, utilisation: Utilisation, cycle: int) -> Result:
    """Times by stage and by cycle, from the second cycle on."""
    method = trainer.method

    def stage_of(step: int) -> Stage:
        return method.stage(position_of(method, step))

    seconds: dict[Stage, list[float]] = defaultdict(list)
    waits: dict[Stage, list[float]] = defaultdict(list)
    by_cycle: dict[int, list[tuple[Stage, float]]] = defaultdict(list)  # stage and seconds of every step
    for handout, duration in step_seconds(timed.handouts, cycle):
        stage = stage_of(handout.step)
        seconds[stage].append(duration)
        waits[stage].append(handout.waited)
        by_cycle[handout.step // cycle].append((stage, duration))
    savings = []
    for steps in by_cycle.values():
        dense = [duration for stage, duration in steps if stage == Stage()]
        if dense and len(steps) >= cycle - 1:  # the last step of an epoch is not counted
            savings.append(1 - statistics.mean(duration for _, duration in steps) / statistics.mean(dense))
    used: dict[Stage, list[float]] = defaultdict(list)
    moments = [handout.given for handout in timed.handouts]
    for when, percent in utilisation.samples:
        step = bisect.bisect(moments, when) - 1
        if cycle <= step < len(moments) - 1:
            used[stage_of(step)].append(percent)
    total = sum(map(sum, seconds.values()))
    costs = [method.training_cost(stage_of(step)).training for step in range(cycle)]
    return {
        "levels": {
            str(stage): {
                "tokens": mean_tokens(method.training_tokens(stage)),
                "train_gflops_per_image": 2 * method.training_cost(stage).training / 1e9,
                "seconds": seconds[stage],
                "waits": waits[stage],
                "utilisation_percent": statistics.mean(used[stage]) if used[stage] else None,
            }
            for stage in sorted(seconds)
        },
        "savings": savings,
        "arithmetic_saving": 1 - statistics.mean(costs) / method.training_cost(Stage()).training,
        "images_per_second": timed.batch_size * sum(map(len, seconds.values())) / total if total else None,
        "data_wait": sum(map(sum, waits.values())) / total if total else None,
        "utilisation_missing": utilisation.missing,
    }


def report(result: Result) -> str:
    """The result as markdown."""
    settings, levels = result["settings"], result["levels"]
    batch, peak = settings["batch"], peak_tflops(result["environment"]["device"])
    lines = [
        f"{settings['model']}, {settings['img_size']} pixels, rel_pos {settings['rel_pos']}, batch {batch}, "
        f"{settings['loader']} images, {'compiled' if settings['compiled'] else 'not compiled'}",
        told(result),
        "",
    ]
    if not levels:
        return "\n".join([*lines, "Compiled only."])
    rows = []
    for rho, level in levels.items():
        rate = batch / statistics.median(level["seconds"])
        delivered = rate * level["train_gflops_per_image"] / 1e3
        utilisation = level["utilisation_percent"]
        wait = sum(level["waits"]) / sum(level["seconds"])
        milliseconds = cells([1e3 * value for value in level["seconds"]], ".2f")
        rows.append(
            f"{rho} | {level['tokens']} | {len(level['seconds'])} | {milliseconds} | {rate:,.0f} | {delivered:.3g} | "
            f"{'–' if peak is None else f'{delivered / peak:.1%}'} | {wait:.1%} | "
            f"{'–' if utilisation is None else f'{utilisation:.0f} %'}"
        )
    head = "rho | tokens | steps | ms | quartiles | images/s | TFLOP/s | MFU | data wait | GPU utilisation"
    lines += table(head, rows)
    if result["savings"]:
        lines.append(
            f"\nA cycle saves {spread(result['savings'], '.1%')} of a dense one; arithmetic alone allows "
            f"{result['arithmetic_saving']:.1%}."
        )
    lines.append(f"\nAll steps: {result['images_per_second']:,.0f} images/s, data wait {result['data_wait']:.1%}.")
    if result["utilisation_missing"] is not None:
        lines.append(f"\nNo utilisation: {result['utilisation_missing']}.")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> Result:
    """Run as the arguments say (the command line's if None), print and write the report, and return the result."""
    command = parser(__doc__, device="auto", threads=0)
    command.add_argument("--recipe", default="deit-s-224", help="what to train")
    command.add_argument("--batch", type=int, default=1024, help="images per step")
    command.add_argument("--cycle-steps", type=int, default=45, help="steps of a cycle of the schedule")
    command.add_argument("--cycles", type=int, default=3, help="cycles to count, without --data; 0 only compiles")
    command.add_argument("--data", type=Path, help="a folder of images, or a converted data set, to train on")
    command.add_argument("--seconds", type=float, default=60.0, help="how long to count, with --data")
    command.add_argument("--prefetch-gb", type=float, default=8.0, help="decoded batches kept ready, with --data")
    command.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change the recipe")
    return conclude(command.parse_args(argv), measured, report)


if __name__ == "__main__":
    main()
