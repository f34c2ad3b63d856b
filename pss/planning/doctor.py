"""Whether the model or the loader bounds a run here, level by level: both are measured, each on its own."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from pipelines.base import View
from pss import methods
from pss.config import Config
from pss.methods import DenseTargets, Step
from pss.planning.plan import Level, Plan
from pss.planning.simulation import Machine, Simulated, prepared_batches, queue_batches, simulate
from pss.runtime.precision import autocast
from pss.runtime.seeds import seed_generator
from pss.training.optim import build_optimizer
from pss.training.setup import compile_levels, position_of

_CPU_BATCH = 32


@dataclass(frozen=True)
class Diagnosis:
    """What was measured, in images per second of one process, and what follows from it."""

    train_rates: dict[Level, float]
    """By level of the plan: forward, backward and optimizer step, data at hand."""
    loader_rate: float
    """The loader alone."""
    machine: Machine
    """This process, as `pss.planning.plan.remedies` wants it."""
    simulated: Simulated
    """The run at these rates, with its queue."""

    def bound(self, level: Level) -> str:
        """Which of the two is slower there."""
        return "loader" if self.loader_rate < self.train_rates[level] else "model"


def diagnose(
    config: Config, planned: Plan, train_rates: dict[Level, float], loader_rate: float, device: str = "cpu"
) -> Diagnosis:
    """Simulate the run from measured rates; see `Diagnosis`."""
    seconds = sum(level.share / train_rates[level] for level in planned.levels)  # per image, on average
    machine = Machine(
        processes=1,
        images_per_second=planned.mean_cost / seconds,
        loader_images_per_second=loader_rate,
        queue_bytes=config.data.prefetch_bytes(device),
        prepared_batches=prepared_batches(device),
    )
    seconds_of = [planned.batch_size / train_rates[level] for level in planned.levels]
    steps = [seconds_of[number] for number in planned.level_of_step]
    queue = queue_batches(planned, machine, config.data.img_size)
    return Diagnosis(train_rates, loader_rate, machine, simulate(steps, planned.batch_size / loader_rate, queue))


def measure_training(
    config: Config, planned: Plan, num_classes: int, device: torch.device, maps: Tensor | None = None
) -> dict[Level, float]:
    """Images per second of training steps at each level of the plan, on images that are already on the device.

    The median of interleaved rounds. A GPU gets the configured batch, a CPU at most 32 images. A method that learns
    from label maps is given some of these, (any number, ...); `ValueError` if there are none.
    """
    wants = methods.find(config.method).wants(config)
    if "maps" in wants and maps is None:
        raise ValueError(f"method {config.method} learns from label maps, which are not measured here; use --plan")
    batch = config.train.batch_size // config.train.accumulate
    if device.type == "cpu":
        batch = min(batch, _CPU_BATCH)
    seed_generator(config.train.seed)
    method = methods.build(config, num_classes, planned.steps_per_epoch).to(device).train()
    method.model.checkpoint_activations = config.train.checkpoint_activations
    for teacher in method.teachers.values():
        teacher.load(device)
    compile_levels(method, config.compile, device, planned.total_steps)
    phases, optimizers = method.phases(), dict[int, torch.optim.Optimizer]()
    sizes = {level.img_size for level in planned.levels}
    images = {size: torch.randn(batch, 3, size, size, device=device) for size in sizes}
    targets = torch.arange(batch, device=device) % num_classes
    half = autocast(config, device)

    window = torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=device).expand(batch, -1)
    whole = View(window, torch.zeros(batch, dtype=torch.bool, device=device))
    rows = None if maps is None else maps[torch.arange(batch) % len(maps)].to(device)
    dense = DenseTargets(whole if "view" in wants else None, rows if "maps" in wants else None)
    extra = (dense,) if wants else ()
    not_skipped = torch.zeros((), device=device)

    def seconds(level: Level) -> float:
        step = planned.level_of_step.index(planned.levels.index(level))
        at = position_of(method, step)
        method.begin_phase(phases[at.phase])
        if at.phase not in optimizers:
            made = build_optimizer(method, phases[at.phase], batch_size=batch, steps_per_epoch=planned.steps_per_epoch)
            optimizers[at.phase] = made[0]
        optimizer = optimizers[at.phase]
        method.train()
        method.begin_epoch(at)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        method.begin_step(at)
        with half:
            loss = method(images[level.img_size], targets, at, *extra)["loss"]
        loss.backward()
        method.mask_gradients(at)
        optimizer.step()
        taken = Step(optimizer, not_skipped)
        method.after_optimizer(at, taken)
        method.end_step(at, taken)
        method.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    levels = planned.levels
    for level in levels * 2:
        seconds(level)  # compiled, and caches filled
    rounds = [[seconds(level) for level in levels] for _ in range(7)]
    medians = map(statistics.median, zip(*rounds, strict=True))
    return {level: batch / median for level, median in zip(levels, medians, strict=True)}
