"""What a run will cost and what its loader must deliver, before anything is trained."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from pss.config import Config
from pss.methods.sampled import build_schedule
from pss.models.flops import macs
from pss.models.vit import create_model
from pss.schedules import Fixed, Schedule

IMAGENET_IMAGES = 1_281_167
IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Level:
    """One kept share of a run, at one size of its images."""

    rho: float
    img_size: int  # in pixels
    share: float  # of the steps
    tokens: int  # per image, prefix included
    macs: int  # of one image's forward pass


@dataclass(frozen=True)
class Plan:
    """A run as its configuration and the size of its data decide it."""

    num_images: int
    steps_per_epoch: int
    total_steps: int
    batch_size: int
    dense_macs: int  # of one image's forward pass at rho = 1 and full size
    levels: tuple[Level, ...]  # by ascending size and rho
    level_of_step: tuple[int, ...]  # for every step, which of `levels`

    @property
    def rhos(self) -> tuple[float, ...]:
        """Of every step."""
        return tuple(self.levels[number].rho for number in self.level_of_step)

    @property
    def saving(self) -> float:
        """The share of a dense run's arithmetic that the schedule saves: the most time it can save."""
        return 1 - self.mean_cost

    @cached_property
    def mean_cost(self) -> float:
        """Arithmetic of an average step over that of one at rho = 1."""
        return sum(level.share * level.macs for level in self.levels) / self.dense_macs

    @property
    def average_demand(self) -> float:
        """Images per second that training takes in over those at rho = 1, if time goes with arithmetic."""
        return 1 / self.mean_cost

    @property
    def peak_demand(self) -> float:
        """The same, while the cheapest steps run."""
        return self.dense_macs / min(level.macs for level in self.levels)

    @property
    def epoch_macs(self) -> float:
        """Of an average epoch of training; a backward pass costs twice its forward pass."""
        return 3 * self.mean_cost * self.dense_macs * self.steps_per_epoch * self.batch_size

    def step_seconds(self, dense_images_per_second: float) -> list[float]:
        """How long each step takes where `dense_images_per_second` are trained at rho = 1, data always at hand."""
        dense = self.batch_size / dense_images_per_second
        seconds = [dense * level.macs / self.dense_macs for level in self.levels]
        return [seconds[number] for number in self.level_of_step]


def plan(config: Config, *, num_images: int = IMAGENET_IMAGES, num_classes: int = IMAGENET_CLASSES) -> Plan:
    """The plan of a run on `num_images` training images.

    Raises:
        ValueError: fewer images than a batch holds, or a model that cannot be built.
    """
    steps_per_epoch = num_images // config.train.batch_size
    if not steps_per_epoch:
        raise ValueError(
            f"{num_images} images do not fill one batch of {config.train.batch_size}; lower train.batch_size"
        )
    total_steps = steps_per_epoch * config.train.epochs
    if config.train.max_steps is not None:
        total_steps = min(total_steps, config.train.max_steps)
    schedule: Schedule = build_schedule(config, steps_per_epoch) if config.method == "sampled" else Fixed(1.0)
    with torch.device("meta"):  # shapes are all that costs are counted from
        model = create_model(
            config.model.name, num_classes=num_classes, img_size=config.data.img_size, **config.model.overrides()
        )
    sizes = [config.data.train_size(epoch) for epoch in range(config.train.epochs)]
    seen = [(sizes[step // steps_per_epoch], schedule(step)) for step in range(total_steps)]
    counts = Counter(seen)
    number_of = {level: number for number, level in enumerate(sorted(counts))}
    return Plan(
        num_images=num_images,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        batch_size=config.train.batch_size,
        dense_macs=macs(model),
        levels=tuple(
            Level(rho, size, counts[size, rho] / total_steps, model.num_kept_tokens(rho, size), macs(model, rho, size))
            for size, rho in number_of
        ),
        level_of_step=tuple(number_of[level] for level in seen),
    )


@dataclass(frozen=True)
class Simulated:
    """A run with its loader, as `simulate` saw it."""

    seconds: float
    waited: tuple[float, ...]  # seconds before each step

    @property
    def data_wait(self) -> float:
        """The share of the time in which the step waits for data."""
        return sum(self.waited) / self.seconds


def simulate(step_seconds: Sequence[float], batch_seconds: float, capacity: int) -> Simulated:
    """A run as three events a step: a batch is decoded, finds room in the queue, is taken.

    The loader decodes one batch at a time, at a constant rate, and holds it while the queue, of `capacity` batches, is
    full; then it does nothing. Deterministic; time and memory go with the number of steps.

    Args:
        step_seconds: how long each step takes once it has its data.
        batch_seconds: how long the loader takes for a batch.
        capacity: batches that the queue holds, at least 1.
    """
    if capacity < 1:
        raise ValueError(f"a queue holds at least 1 batch, got {capacity}")
    taken: list[float] = []
    waited: list[float] = []
    now = placed = 0.0
    for number, seconds in enumerate(step_seconds):
        decoded = placed + batch_seconds
        placed = max(decoded, taken[number - capacity]) if number >= capacity else decoded
        begins = max(now, placed)
        waited.append(begins - now)
        taken.append(begins)
        now = begins + seconds
    return Simulated(now, tuple(waited))


_WAIT = 0.01  # the share of waiting that a remedy may leave
_SHOWN_STEPS = 20_000  # simulated for a remedy; more of the same cycles would not change the share


@dataclass(frozen=True)
class Machine:
    """What a run is to be simulated on."""

    processes: int
    """GPUs over all nodes."""
    images_per_second: float
    """Trained by all of them at rho = 1, data always at hand."""
    loader_images_per_second: float
    """Decoded by all nodes."""
    queue_bytes: int
    """Of decoded images kept ready, per process."""


@dataclass(frozen=True)
class Remedy:
    """A change after which the loader no longer holds training up, and the share of waiting that is left."""

    what: str
    data_wait: float


def run_on(planned: Plan, machine: Machine, img_size: int) -> Simulated:
    """The whole run, simulated."""
    return simulate(
        planned.step_seconds(machine.images_per_second),
        planned.batch_size / machine.loader_images_per_second,
        queue_batches(planned, machine, img_size),
    )


def queue_batches(planned: Plan, machine: Machine, img_size: int) -> int:
    """Global batches that the queues of all processes hold together; at least one, as each queue does."""
    return max(1, machine.queue_bytes * machine.processes // (planned.batch_size * 3 * img_size**2))


def remedies(config: Config, planned: Plan, machine: Machine) -> list[Remedy]:
    """What would let the loader keep up, the cheapest first: the schedule, then memory, then the loader itself.

    Each is tried on its own, by simulation, and returned only if it leaves at most 1 % of waiting. Where the loader is
    slower than the average step, only a faster one helps.
    """
    found = []
    side = config.data.img_size

    def shown(of: Config) -> Plan:
        limited = replace(of, train=replace(of.train, max_steps=min(planned.total_steps, _SHOWN_STEPS)))
        return plan(limited, num_images=planned.num_images)

    def wait(of: Plan, on: Machine) -> float:
        return run_on(of, on, side).data_wait

    unchanged = shown(config)
    demand = planned.average_demand * machine.images_per_second
    if machine.loader_images_per_second >= demand:
        if config.method == "sampled" and len(planned.levels) > 1:
            shuffled = replace(config, schedule=replace(config.schedule, shuffle=True))
            if (left := wait(shown(shuffled), machine)) <= _WAIT:
                found.append(Remedy("--set schedule.shuffle=true", left))
        if config.method == "sampled" and config.schedule.name == "cyclic":
            longest = config.schedule.period_steps or planned.steps_per_epoch
            for period in _shorter(longest):
                cycle = replace(config, schedule=replace(config.schedule, period_steps=period))
                if (left := wait(shown(cycle), machine)) <= _WAIT:
                    found.append(Remedy(f"--set schedule.period_steps={period}", left))
                    break
        for mebibytes in (2**power for power in range(9, 18)):
            larger = replace(machine, queue_bytes=mebibytes * 2**20)
            if larger.queue_bytes > machine.queue_bytes and (left := wait(unchanged, larger)) <= _WAIT:
                found.append(Remedy(f"--set train.prefetch_mb={mebibytes}", left))
                break
    for factor in (1.05**power for power in range(1, 60)):
        faster = replace(machine, loader_images_per_second=max(demand, machine.loader_images_per_second) * factor)
        if (left := wait(unchanged, faster)) <= _WAIT:
            rate = faster.loader_images_per_second
            found.append(
                Remedy(f"a loader of {rate:,.0f} images/s (another --format or more decoding on the GPU)", left)
            )
            break
    return found


def _shorter(longest: int) -> Iterable[int]:
    """Cycle lengths below `longest`, about halved each time, down to 10 steps."""
    return (longest // 2**power for power in range(1, max(1, int(math.log2(longest / 10)) + 1)))
