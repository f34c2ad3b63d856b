"""A few steps of a run before the run, to learn what its parts take on this machine.

They are taken by the trainer itself, with its loader, its guard, its moving average and its processes, from steps all
over the run, and leave nothing behind.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.base import DataError, Loader
from pss.config import Config
from pss.methods import Phase, Progress
from pss.planning.plan import Level, Plan
from pss.planning.taken import Key, Taken, key_of, whole_epoch
from pss.runtime.processes import Vote, World
from pss.training import setup
from pss.training.inputs import StepInputs
from pss.training.optim import build_optimizer
from pss.training.setup import Interrupted, position_of
from pss.training.trainer import Trainer

_STRETCH_SECONDS = 0.1  # of steps that are timed together: on a GPU they overlap
_FEWEST_ROUNDS, _MOST_ROUNDS, _MOST_STEPS = 3, 25, 100
_WARM_SHARE = 3  # the first rounds, one in so many, do not count: caches, clocks and allocators still settle
_QUEUED_BATCHES = 4

MakeLoaders = Callable[[Config], tuple[Loader, Loader | None]]
"""Makes the loaders of the training images and of the validation images, if there are any."""


def rehearse(
    config: Config,
    planned: Plan,
    wanted: Iterable[Level],
    *,
    make_loaders: MakeLoaders,
    classes: Sequence[str],
    folder: Path,
    world: World,
    seconds: float,
) -> Taken:
    """Measure what a run takes at some levels of its plan, and besides.

    Args:
        config: Of the run.
        planned: Its plan.
        wanted: Levels of it, at least one.
        make_loaders: For a configuration.
        classes: Their names.
        folder: Where a checkpoint is written to; on the run's own disk.
        world: The processes: all must call this, and the main one's clock counts.
        seconds: How long to measure, about; it takes longer where few steps do.
    """

    def rehearsed(name: str, queue_bytes: int, measure: Callable[[_Rehearsal, float], Taken]) -> Taken:
        began = time.perf_counter()
        own = replace(config, data=replace(config.data, prefetch_gb=queue_bytes / 1e9))
        if world.is_main:
            (folder / name).mkdir()
        with opened(make_loaders, own) as (train_loader, val_loader):
            options: dict[str, Any] = {"classes": list(classes), "output": folder / name, "world": world, "quiet": True}
            run = _Rehearsal(own, train_loader, val_loader, **options)
            return measure(run, time.perf_counter() - began)

    levels = list(wanted)
    found = rehearsed(
        "first", _short_queue(config, world), lambda run, took: run.measure(planned, levels, took, seconds)
    )
    gc.collect()  # there may not be room for two
    usual = config.data.prefetch_bytes(world.device.type)
    found = rehearsed("again", usual, lambda run, took: run.repeat(planned, levels, found, took, seconds))
    gc.collect()
    told = world.broadcast(found.to_json() if world.is_main else None)
    assert told is not None
    return Taken.from_json(told)


def _short_queue(config: Config, world: World) -> int:
    """Bytes of the loader's queue while steps are timed.

    The run's own would fill while little is trained, and would be paid for by steps that never come; a short one
    overlaps decoding with the steps as the run does. On a GPU there is none: the run's is simulated.
    """
    if world.device.type != "cpu":
        return 0
    batch_bytes = config.train.batch_size // world.size * 3 * config.data.img_size**2
    return min(config.data.prefetch_bytes("cpu"), _QUEUED_BATCHES * batch_bytes)


@contextmanager
def opened(make_loaders: MakeLoaders, config: Config) -> Iterator[tuple[Loader, Loader | None]]:
    """The loaders of a configuration, closed afterwards."""
    made = make_loaders(config)
    try:
        yield made
    finally:
        for loader in filter(None, made):
            loader.close()


@dataclass(frozen=True)
class _Stretch:
    """Steps in a row at one level."""

    level: Level
    step: int
    """Where in the run there is such a step."""
    count: int
    kept: bool
    """Whether it counts, or warms up."""


class _Rehearsal(Trainer):
    """The trainer, at steps of its run that are chosen one by one, and then in whole epochs. It saves once, and reports
    nothing."""

    _stretch: _Stretch | None
    """None in an epoch that is trained as the run will."""
    _ends: list[tuple[float, int]]
    """Seconds from its beginning to the end of each step, and how many batches waited then."""

    def measure(self, planned: Plan, levels: list[Level], build: float, seconds: float) -> Taken:
        """Everything, `build` being what it took to make this object."""
        groups = self._groups(planned, levels)
        with self._resting():
            for number, places in groups:
                self._run(*self._begin(number, places), self._chosen(places, seconds / len(groups)))
            epoch = self._begin_epoch_seconds()
            checkpoint = self._checkpoint_seconds()
            self.inputs.rest()
            validation = self._validation_seconds(seconds / 4)
        settled = {key: found[len(found) // _WARM_SHARE :] for key, found in self._kept.items()}
        steps = {key: statistics.median(total for total, _ in found) for key, found in settled.items()}
        waits = {key: statistics.median(waited for _, waited in found) for key, found in settled.items()}
        build += self._excess(steps)
        return Taken(build, build, steps, waits, epoch, validation, checkpoint)

    def repeat(self, planned: Plan, levels: list[Level], taken: Taken, build: float, seconds: float) -> Taken:
        """What was measured, and what beginning once more takes. On a CPU, whose cores decode, too, also epochs as the
        run will train them, or as much of one as there is time for."""
        epoch, steps = self._known_epoch(planned, taken)
        found: list[float] = []
        with self._resting():
            for number, places in self._groups(planned, levels):
                engine, phase = self._begin(number, places)
                self._run(engine, phase, self._warming(places))
                if not steps or found or self._at(epoch * self.steps_per_epoch).phase != number:
                    continue
                began, whole = time.perf_counter(), True
                while whole and (not found or self.world.agreed(time.perf_counter() - began) < seconds / 2):
                    taken_seconds, whole = self._epoch_seconds(engine, phase, epoch, steps, seconds / 2)
                    found.append(taken_seconds)
        if found:
            taken = replace(taken, epoch=statistics.median(found[1:] or found) - sum(steps))
        return replace(taken, again=build + self._excess(taken.steps))

    def _groups(self, planned: Plan, levels: list[Level]) -> list[tuple[int, dict[Level, int]]]:
        """Of one phase and size, which may follow each other: the phase, and where in the run there is such a step."""
        places = {level: planned.level_of_step.index(planned.levels.index(level)) for level in levels}
        groups: dict[tuple[int, int], dict[Level, int]] = {}
        for level, step in places.items():
            groups.setdefault((self._at(step).phase, level.img_size), {})[level] = step
        return [(phase, group) for (phase, _), group in groups.items()]

    def _known_epoch(self, planned: Plan, taken: Taken) -> tuple[int, list[float]]:
        """One from the middle of those whose steps are all known, and what these take; none if there is none."""
        levels = enumerate(planned.levels)
        known = {number: taken.steps[key] for number, level in levels if (key := key_of(level)) in taken.steps}

        def of(epoch: int) -> Sequence[int]:
            return planned.level_of_step[epoch * self.steps_per_epoch : (epoch + 1) * self.steps_per_epoch]

        # The first epoch begins the run besides.
        whole = [epoch for epoch in range(1, self.epochs) if known.keys() >= set(of(epoch))]
        if self.world.device.type != "cpu" or not whole:
            return 0, []
        chosen = whole[len(whole) // 2]
        return chosen, [known[number] for number in of(chosen)]

    @contextmanager
    def _resting(self) -> Iterator[None]:
        self._kept: dict[Key, list[tuple[float, float]]] = {}
        self._warm: dict[Key, list[float]] = {}
        try:
            yield
        finally:
            self.inputs.rest()
            if self.val_inputs is not None:
                self.val_inputs.rest()

    def _excess(self, steps: dict[Key, float]) -> float:
        return sum(max(0.0, sum(warm) - len(warm) * steps[key]) for key, warm in self._warm.items())

    def _at(self, step: int) -> Progress:
        return position_of(self.method, step)._replace(rank=self.world.rank)

    def _begin(self, number: int, places: dict[Level, int]) -> tuple[nn.Module, Phase]:
        phase = self.method.phases()[number]
        self.phase, self.epoch = number, min(places.values()) // self.steps_per_epoch
        self.method.begin_phase(phase)
        self.optimizer, self.lr_schedule = build_optimizer(
            self.method, phase, batch_size=self.config.train.batch_size, steps_per_epoch=self.steps_per_epoch
        )
        return (self.method if self.sharded else setup.wrap(self.method, self.world)), phase

    def _run(self, engine: nn.Module, phase: Phase, stretches: Iterator[_Stretch]) -> None:
        self._stretches = stretches
        self._stretch, self._done, self._waited = next(stretches), 0, 0.0
        self._stream: Iterator[StepInputs] | None = None
        self.step = self.epoch * self.steps_per_epoch
        self._clock = time.perf_counter()
        self._run_epoch(engine, phase, self.step, [])

    def _epoch_seconds(
        self, engine: nn.Module, phase: Phase, epoch: int, steps: list[float], seconds: float
    ) -> tuple[float, bool]:
        """What an epoch takes whose steps alone take `steps`, trained as the run will, and whether all of it was. It
        ends after `seconds`."""
        self._stretch, self._limit, self._ends = None, seconds, []
        self.epoch, self.step = epoch, epoch * self.steps_per_epoch
        self._clock = time.perf_counter()
        self._run_epoch(engine, phase, self.step, [])
        return whole_epoch(self._ends, steps), len(self._ends) == len(steps)

    def _warming(self, places: dict[Level, int]) -> Iterator[_Stretch]:
        for _ in range(2):
            for level, step in places.items():
                yield _Stretch(level, step, 1, kept=False)

    def _chosen(self, places: dict[Level, int], seconds: float) -> Iterator[_Stretch]:
        """Each level warms up; then rounds of all, as many as there is time for."""
        yield from self._warming(places)
        last = {level: self._warm[key_of(level)][-1] for level in places}
        counts = {level: min(_MOST_STEPS, max(1, round(_STRETCH_SECONDS / last[level]))) for level in places}
        rounds = int(seconds / sum(counts[level] * last[level] for level in places))
        plan = [min(_MOST_ROUNDS, max(_FEWEST_ROUNDS, rounds)), *counts.values()]
        told = self.world.broadcast(json.dumps(plan))
        assert told is not None
        rounds, *lengths = json.loads(told)
        for _ in range(rounds):
            for (level, step), count in zip(places.items(), lengths, strict=True):
                yield _Stretch(level, step, count, kept=True)

    def _run_epoch(self, engine: nn.Module, phase: Phase, first_step: int, stop: list[int]) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        super()._run_epoch(engine, phase, first_step, stop)

    def _position(self) -> Progress:
        return super()._position() if self._stretch is None else self._at(self._stretch.step)

    def _next(self, every_inputs: Iterator[StepInputs]) -> tuple[StepInputs, float]:
        if self._stretch is None:
            return super()._next(every_inputs)
        before = self.inputs.seconds_waited
        if self._stream is None:
            self._stream = every_inputs
        inputs = next(self._stream, None)
        if inputs is None:  # the epoch is over before enough was measured
            self.inputs.set_epoch(self.epoch)
            self._stream = iter(self.inputs)
            inputs = next(self._stream, None)
        if inputs is None:
            raise DataError(
                f"the {self.inputs.backend} loader delivers nothing of epoch {self.epoch}; look at the data"
            )
        return inputs, self.inputs.seconds_waited - before

    def _report_step(
        self, images: Tensor, measured: Tensor, waited: float, at: Progress, out: dict[str, Tensor]
    ) -> None:
        stretch = self._stretch
        if stretch is None:
            self._end_step()
            return
        # Whatever is chosen, the epoch goes on until all is measured; step 0 comes once only.
        self.step = self.epoch * self.steps_per_epoch + min(1, self.steps_per_epoch - 1)
        self._done, self._waited = self._done + 1, self._waited + waited
        if self._done < stretch.count:
            return
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        now = time.perf_counter()
        taken, key = (now - self._clock) / stretch.count, key_of(stretch.level)
        if stretch.kept:
            self._kept.setdefault(key, []).append((taken, self._waited / stretch.count))
        else:
            self._warm.setdefault(key, []).append(taken)
        chosen = next(self._stretches, None)
        if chosen is None:
            self.step = (self.epoch + 1) * self.steps_per_epoch
            return
        self._stretch, self._done, self._waited, self._clock = chosen, 0, 0.0, time.perf_counter()

    def _end_step(self) -> None:
        """Of an epoch that is trained as the run will."""
        self._ends.append((time.perf_counter() - self._clock, self.inputs.waiting_batches))
        if self.world.agreed(self._ends[-1][0]) > self._limit:
            self.step = (self.epoch + 1) * self.steps_per_epoch

    def _stop_or_save(self, stop: list[int]) -> None:
        pass

    def _end_epoch(self, stop: list[int]) -> None:
        pass

    def _finish(self) -> None:
        pass

    def _begin_epoch_seconds(self) -> float:
        found = []
        for _ in range(2):
            began = time.perf_counter()
            self.inputs.set_epoch(self.epoch)
            next(iter(self.inputs), None)
            found.append(time.perf_counter() - began)
        return min(found)

    def _checkpoint_seconds(self) -> float:
        """On a GPU, what the steps wait for it: it is written while they go on. A CPU's time goes into that, too."""
        self.saver.open()
        try:
            began = time.perf_counter()
            self._save()
            if self.world.device.type == "cpu":
                self.saver.wait()
            taken = time.perf_counter() - began
            self.saver.wait()
        finally:
            self.saver.close()
        return taken

    def _validation_seconds(self, seconds: float) -> float:
        """Of a whole validation: measured, again and again while there is time, or what it comes to from a part of its
        batches; 0 where there is none."""
        if self.val_inputs is None:
            return 0.0
        found: list[float] = []
        began = time.perf_counter()
        while not found or self.world.agreed(time.perf_counter() - began + max(found)) < seconds:
            found.append(self._one_validation(len(self.val_inputs), seconds))
        return statistics.median(found[1:] or found)

    def _one_validation(self, num_batches: int, seconds: float) -> float:
        self.vote = clock = _Clock(self.world, seconds)
        began = time.perf_counter()
        with suppress(Interrupted):
            self._validate([])
            return time.perf_counter() - began
        passes = 1 + (self.ema is not None)
        first, last = clock.times[0], clock.times[-1]
        each = (last - first) / max(1, len(clock.times) - 1)
        return passes * (first - began + each * (num_batches - 1))


class _Clock(Vote):
    """Notes when each batch was over, and wants no more when the time is up."""

    def __init__(self, world: World, seconds: float) -> None:
        super().__init__(world, num_questions=3)
        self._main, self._seconds = world.is_main, seconds
        self.times: list[float] = []

    def cast(self, *wanted: bool) -> tuple[bool, ...]:
        self.times.append(time.perf_counter())
        enough = self._main and len(self.times) > _FEWEST_ROUNDS and self.times[-1] - self.times[0] > self._seconds
        return super().cast(wanted[0] or enough, *wanted[1:])
