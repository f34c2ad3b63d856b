"""What one training step asks of a GPU and of the host, part by part, on a machine without a GPU.

    python -m tools.benchmarks.launches --recipe deit-s-224 --batch 1024 [--set model.sort=random] [--json FILE]

The trainer itself runs its step on fake CUDA tensors of full size (`tools.benchmarks.fake_gpu`, which says what counts
as a launch), once to settle what the first step of a run prepares, and once counted, for the smallest share of the
patches and for all of them. Blocks are counted as they run uncompiled. A step that waits for the device ends the count
with an error.

Milliseconds of the host are measured apart, those of the thread that makes inputs ready (inputs, augmentation, mixing)
beside those of the training thread, with what it takes to get inputs that are ready: the trainer on the CPU with the
same settings, but with narrow blocks and batches of four small images, so that what is left is the interpreter and
torch's dispatch; CPU time of the training thread, as a median over the steps. Operations on lists of tensors, which a
GPU does at once and a CPU one by one, are left out but for the new tensors that they return; whatever else is small is
computed, so that it is an upper bound. What autograd recorded is freed when a step lets go of its loss: that is time of
the model, and told apart.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from pipelines.augment.device import DeviceTransform
from pipelines.augment.mixing import Mixing
from pipelines.base import Batch, View
from pipelines.loaders.prefetch import Inputs
from pss import recipes
from pss.config import Config
from pss.inference.accuracy import accuracy
from pss.methods import Point
from pss.models.vit import VisionTransformer
from pss.runtime.processes import Vote, World
from pss.training import trainer as training
from pss.training.guard import Guard, Statistics
from pss.training.optim import AdamW
from pss.training.reporting import Reporter
from pss.training.setup import positions_of
from tools.benchmarks.fake_gpu import OTHER, FakeGpu
from tools.benchmarks.measure import Result, ThreadTime, conclude, page, parser

Enter = Callable[[str], AbstractContextManager[None]]

BLOCKS = "forward: blocks"
FREED = "backward: graph freed"
TAKEN = "taking inputs"
SMALL = ("data.img_size=64", "train.batch_size=4", "optim.lr_batch=none")
"""What keeps arithmetic out of the measurement of the host, with heads 8 wide besides."""
STEPS_PER_EPOCH = 50


class _Over(Exception):
    """The steps that were wanted are done."""


class _Batches:
    """Stands for a loader: `steps` batches of zeros on the device, then `_Over`.

    This is all that depends on what the trainer is given for a step.
    """

    backend, delivered_hash = "fake", 0

    def __init__(self, config: Config, device: torch.device, num_classes: int, before: Callable[[int], None]) -> None:
        """`before` is called with the number of each batch, from 0, before it is handed out."""
        self.config, self.device, self.num_classes, self.before = config, device, num_classes, before
        self.batch_size, self.steps_per_epoch, self.epoch = config.train.batch_size, STEPS_PER_EPOCH, 0
        self.num_samples, self.steps = self.batch_size * self.steps_per_epoch, 2
        self.side: int | None = None
        """Of the images; that of the epoch if None."""
        self._batches: dict[int, Batch] = {}

    def set_parts(self, parts: int) -> None:
        pass

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        self.epoch = epoch

    def planned_hash(self, epoch: int) -> int:
        return 0

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass

    def __len__(self) -> int:
        return self.steps_per_epoch

    def batch(self) -> Batch:
        side = self.side or self.config.data.train_size(self.epoch)
        if side not in self._batches:
            self._batches[side] = self._made(side)
        return self._batches[side]

    def _made(self, side: int) -> Batch:
        count = self.batch_size
        view = View(torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(count, 1), torch.zeros(count, dtype=torch.bool))
        maps = None
        if self.config.data.label_maps is not None:  # as RELABEL's: the best five classes of each place
            maps = torch.zeros(count, 2, 5, 15, 15, device=self.device, dtype=torch.float16)
        return Batch(
            torch.zeros(count, 3, side, side, dtype=torch.uint8, device=self.device),
            torch.zeros(count, dtype=torch.int64, device=self.device),
            torch.arange(count),
            view=view,
            maps=maps,
        )

    def __iter__(self) -> Iterator[Batch]:
        for number in range(self.steps):
            self.before(number)
            yield self.batch()
        self.before(self.steps)
        raise _Over


@contextmanager
def in_parts(enter: Enter, method: type[nn.Module]) -> Iterator[None]:
    """Within, the trainer's step enters `enter(part)` for each of its parts; of parts in parts the innermost counts."""

    def marked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with enter(name):
                return function(*args, **kwargs)

        return call

    def then(function: Callable[..., Any], act: Callable[[Any], object]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            act(result)
            return result

        return call

    places: list[tuple[str, Any, str]] = [
        ("inputs", Inputs, "_make"),
        ("augmentation", DeviceTransform, "__call__"),
        ("augmentation", DeviceTransform, "with_view"),
        ("mixing", Mixing, "__call__"),
        ("rates", training, "set_rates"),
        ("forward: the rest", method, "forward"),
        ("forward: patches", VisionTransformer, "see"),
        (BLOCKS, VisionTransformer, "compute"),
        ("backward", Guard, "backward"),
        ("guard", Statistics, "__init__"),
        ("guard", Statistics, "settle"),
        ("guard", Guard, "judge"),
        ("clipping", training, "total_norm"),
        ("clipping", training, "clip_gradients"),
        ("optimizer", AdamW, "advance"),
        ("average", training, "update_average"),
        ("meter", Reporter, "add"),
    ]
    with ExitStack() as exits:
        for name, place, attribute in places:
            function = marked(name, getattr(place, attribute))
            exits.enter_context(mock.patch.object(place, attribute, function))
        # What the method returns holds autograd's graph: it is kept until the step has let go of it.
        graphs: list[Any] = []
        free = marked(FREED, lambda _: graphs.clear())
        for place, attribute, act in ((method, "forward", graphs.append), (training.Trainer, "_gradients", free)):
            exits.enter_context(mock.patch.object(place, attribute, then(getattr(place, attribute), act)))
        yield


def uncompiled(config: Config) -> Config:
    """The same run without `torch.compile`, and with no row of the log within the steps that are looked at."""
    return config.with_settings(["compile.mode=off", f"train.log_every_steps={10**9}", "data.prefetch_gb=0"])


class Run:
    """A trainer whose steps can be run one by one, on `device`."""

    def __init__(self, config: Config, device: torch.device, output: Path, num_classes: int) -> None:
        self.before: Callable[[int], None] = lambda number: None
        world = World(0, 1, device)
        self.batches = _Batches(config, device, num_classes, lambda number: self.before(number))
        names = [str(number) for number in range(num_classes)]
        self.trainer = training.Trainer(config, self.batches, self.batches, classes=names, output=output, world=world)
        for inputs in (self.trainer.inputs, self.trainer.val_inputs):
            inputs.overlap = False  # in this thread, so that all of it is counted
        self.trainer.vote = Vote(world, num_questions=3)

    def first_steps(self) -> dict[str, int]:
        """By stage: its first step that another one of the same stage and image size follows."""
        method, found = self.trainer.method, dict[str, int]()
        size = self.trainer.config.data.train_size
        positions = list(positions_of(method, range(self.trainer.total_steps)))
        for at, then in pairwise(positions):
            here = method.stage(at), size(at.epoch)
            if here == (method.stage(then), size(then.epoch)) and at.epoch == then.epoch:
                name = f"{here[0]}" + (f", {here[1]} px" if self.trainer.config.data.progressive else "")
                found.setdefault(name, at.step)
        return found

    def steps(self, start: int, count: int, before: Callable[[int], None]) -> None:
        """`count` steps from number `start` on; `before` is called with the number of each, from 0, and at the end."""
        trainer = self.trainer
        trainer.step, trainer.epoch = start, start // self.batches.steps_per_epoch
        self.batches.steps, self.before, first_epoch = count, before, 0
        for number, phase in enumerate(trainer.method.phases()):
            if trainer.epoch < first_epoch + phase.epochs:
                try:
                    trainer._run_phase(number, phase, first_epoch, [])
                except _Over:
                    return
            first_epoch += phase.epochs


@contextmanager
def without_kernels_of_a_gpu() -> Iterator[None]:
    """Within, operations on lists of tensors compute nothing, and return new tensors where those of torch do; nor does
    anything seed a GPU."""

    def idle(name: str) -> Callable[..., Any]:
        if name.endswith("_"):
            return lambda *_, **__: None
        return lambda tensors, *_, **__: list(tensors[0].new_zeros(len(tensors)).unbind())

    with ExitStack() as exits:
        for name in dir(torch):
            if name.startswith(("_foreach_", "_fused_adam")):
                exits.enter_context(mock.patch.object(torch, name, idle(name)))
        for name, stand_in in {
            "is_initialized": lambda: True,
            "current_device": lambda: 0,
            "default_generators": (torch.Generator(),),
        }.items():
            exits.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        yield


@contextmanager
def fake_run(config: Config, num_classes: int = 1000) -> Iterator[tuple[FakeGpu, Run]]:
    """The trainer of `config` on a fake GPU, its parts marked; nothing is counted but what `count` runs."""
    gpu = FakeGpu()
    build = training.methods.build

    def on_device(*args: Any) -> Any:  # there, initial weights cost nothing
        with torch.device("cuda", 0):
            return build(*args)

    with tempfile.TemporaryDirectory() as folder, gpu:
        with (
            gpu.apart(),
            warnings.catch_warnings(),
            mock.patch.object(training.methods, "build", on_device),
            mock.patch.object(nn.Module, "to", lambda module, *_, **__: module),  # torch cannot swap fake weights
        ):
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # by copy.deepcopy
            run = Run(config, torch.device("cuda", 0), Path(folder), num_classes)
        with in_parts(gpu.part, type(run.trainer.method)):
            yield gpu, run


def _second_alone(gpu: FakeGpu) -> Callable[[int], None]:
    """To be called before each batch: nothing is counted of the first, which settles what a first one prepares."""
    exits = ExitStack()

    def before(number: int) -> None:
        if number == 0:
            exits.enter_context(gpu.apart())
        elif number == 1:
            exits.close()
            gpu.reset()

    return before


def count(gpu: FakeGpu, run: Run, start: int) -> dict[str, dict[str, int]]:
    """Launches and bytes by part of the step after number `start`."""
    run.steps(start, 2, _second_alone(gpu))
    return {part: {"launches": work.launches, "bytes": work.moved} for part, work in gpu.work.items()}


def count_prediction(gpu: FakeGpu, run: Run, point: Point) -> dict[str, dict[str, int]]:
    """Launches and bytes of a batch of validation at an operating point, of the second one."""
    trainer = run.trainer
    run.batches.steps, run.batches.side, run.before = 2, trainer.config.data.img_size, _second_alone(gpu)
    trainer.method.eval()
    with suppress(_Over):
        accuracy(
            trainer.method.predict,
            trainer.val_inputs,
            trainer.world,
            points=[point],
            autocast=trainer.autocast,
        )
    return {part: {"launches": work.launches, "bytes": work.moved} for part, work in gpu.work.items()}


def host_milliseconds(config: Config, rounds: int, num_heads: int) -> dict[str, float]:
    """Of the training thread by part, the median over `rounds` steps of a model with `num_heads`; see the module."""
    narrow = config.with_settings([*SMALL, f"model.embed_dim={8 * num_heads}"])
    steps: list[dict[str, float]] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            run, clock = Run(narrow, torch.device("cpu"), Path(folder), num_classes=10), ThreadTime(OTHER)
            with without_kernels_of_a_gpu(), in_parts(clock.part, type(run.trainer.method)):
                run.steps(0, min(rounds + 3, STEPS_PER_EPOCH), lambda number: steps.append(clock.taken()))
            taking = _taking_milliseconds(run, rounds)
    finally:
        torch.set_num_threads(threads)
    kept = steps[4:]  # the first is what came before the first step, and three warm up
    return {part: 1e3 * statistics.median(step.get(part, 0.0) for step in kept) for part in kept[0]} | {TAKEN: taking}


def _taking_milliseconds(run: Run, rounds: int) -> float:
    """Of the training thread, for inputs that another one has made ready; the median."""
    inputs, spent = run.trainer.inputs, list[float]()
    run.batches.steps, run.before, inputs.overlap = rounds + 1, lambda number: None, True
    inputs.set_epoch(0)
    try:
        ready = iter(inputs)
        for _ in range(rounds):
            while not inputs.buffered_batches:
                time.sleep(0.001)
            began = time.thread_time()
            next(ready)
            spent.append(time.thread_time() - began)
    finally:
        inputs.rest()
        inputs.overlap = False
    return 1e3 * statistics.median(spent)


def measured(arguments: argparse.Namespace) -> Result:
    """Counts by stage and part, and the host's time by part."""
    settings = [f"train.batch_size={arguments.batch}", *arguments.set]
    config = uncompiled(recipes.get(arguments.recipe).with_settings(settings))
    with fake_run(config) as (gpu, run):
        stages = run.first_steps()
        chosen = {name: step for name, step in stages.items() if name in (min(stages), max(stages))}
        counted = {name: count(gpu, run, step) for name, step in chosen.items()}
        num_heads = run.trainer.method.model.blocks[0].attn.num_heads
    return {"stages": counted, "host_ms": host_milliseconds(config, arguments.rounds, num_heads)}


def report(result: Result) -> str:
    """The result as markdown."""
    stages, host, settings = result["stages"], result["host_ms"], result["settings"]
    parts = list(dict.fromkeys([*(part for parts in stages.values() for part in parts), *host]))
    head = "part | " + " | ".join(f"launches at {name} | MB moved" for name in stages) + " | host ms"
    rows = []
    for part in parts:
        cells = [
            f"{of[part]['launches']:,} | {of[part]['bytes'] / 1e6:,.1f}" if part in of else "0 | 0"
            for of in stages.values()
        ]
        rows.append(f"{part} | {' | '.join(cells)} | {host.get(part, 0.0):.2f}")
    sums = [
        f"{sum(of[part]['launches'] for part in of):,} | {sum(of[part]['bytes'] for part in of) / 1e6:,.1f}"
        for of in stages.values()
    ]
    rows.append(f"all | {' | '.join(sums)} | {sum(host.values()):.2f}")
    title = f"One step of {settings['recipe']} with {settings['batch']} images on a fake GPU"
    return page(result, title, head, rows)


def main(argv: Sequence[str] | None = None) -> Result:
    """Run as the arguments say (the command line's if None), print and write the report, and return the result."""
    command = parser(__doc__)
    command.add_argument("--recipe", default="deit-s-224", help="whose step")
    command.add_argument("--batch", type=int, default=1024, help="images per step")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of pss-train")
    command.add_argument("--rounds", type=int, default=30, help="steps that the host is timed over")
    return conclude(command.parse_args(argv), measured, report)


if __name__ == "__main__":
    main()
