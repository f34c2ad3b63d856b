"""What a run will cost and what its loader must deliver, before anything is trained."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import torch

from pss import methods
from pss.config import Config
from pss.methods import Cost, Method, Stage, mean_tokens
from pss.models.flops import macs
from pss.training.optim import rates_at
from pss.training.setup import positions_of

IMAGENET_IMAGES = 1_281_167
IMAGENET_CLASSES = 1000
_MOST_STEPS = 20_000_000  # a minute or two
_RATES = 600  # learning rates over a run: more than a picture has columns


@dataclass(frozen=True)
class Level:
    """One stage of a run's steps, at one size of its images."""

    stage: Stage
    img_size: int  # in pixels
    share: float  # of the steps
    tokens: int | float  # per image, prefix included, in an average block
    cost: Cost  # of one image

    @property
    def rho(self) -> float:
        """The share of patches that the steps see."""
        return self.stage.rho


@dataclass(frozen=True)
class Rate:
    """The learning rates of a step."""

    step: int
    low: float  # of all parameter groups
    high: float  # what the log calls `lr`


@dataclass(frozen=True)
class Plan:
    """A run as its configuration and the size of its data decide it."""

    num_images: int
    steps_per_epoch: int
    total_steps: int
    batch_size: int
    dense: Cost  # of one image in dense training at full size
    levels: tuple[Level, ...]  # by ascending size and rho
    level_of_step: tuple[int, ...]  # for every step, which of `levels`
    course: str  # the method's words on which rho comes when

    @property
    def rhos(self) -> tuple[float, ...]:
        """Of every step."""
        return tuple(self.levels[number].rho for number in self.level_of_step)

    @property
    def saving(self) -> float:
        """The share of a dense run's arithmetic that is saved: the most time that can be."""
        return 1 - self.mean_cost

    @cached_property
    def mean_cost(self) -> float:
        """Arithmetic of an average step over that of one of dense training."""
        return sum(level.share * level.cost.training for level in self.levels) / self.dense.training

    @cached_property
    def cooldown_epochs(self) -> int:
        """Whole epochs at the end of the run whose steps all are at rho = 1, if there are others before them."""
        steps = 0
        for number in reversed(self.level_of_step):
            if self.levels[number].rho < 1:
                break
            steps += 1
        return steps // self.steps_per_epoch if steps < self.total_steps else 0

    @property
    def saving_before_cooldown(self) -> float:
        """As `saving`, of the steps before the last `cooldown_epochs`."""
        head = Counter(self.level_of_step[: self.total_steps - self.cooldown_epochs * self.steps_per_epoch])
        spent = sum(count * self.levels[number].cost.training for number, count in head.items())
        return 1 - spent / (head.total() * self.dense.training)

    @property
    def average_demand(self) -> float:
        """Images per second that training takes in over those of dense training, if time goes with arithmetic."""
        return 1 / self.mean_cost

    @property
    def peak_demand(self) -> float:
        """The same, while the cheapest steps run."""
        return self.dense.training / min(level.cost.training for level in self.levels)

    @property
    def epoch_macs(self) -> float:
        """Of an average epoch of training."""
        return self.mean_cost * self.dense.training * self.steps_per_epoch * self.batch_size

    def step_seconds(self, dense_images_per_second: float) -> list[float]:
        """How long each step takes where `dense_images_per_second` are trained densely, data always at hand."""
        dense = self.batch_size / dense_images_per_second
        seconds = [dense * level.cost.training / self.dense.training for level in self.levels]
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
    if total_steps > _MOST_STEPS:
        raise ValueError(
            f"the run has {total_steps:,} steps, and a plan goes through each of at most {_MOST_STEPS:,}; set "
            f"train.max_steps={_MOST_STEPS}, or lower train.epochs"
        )
    method = _of_shapes(config, num_classes, steps_per_epoch)
    sizes = [config.data.train_size(epoch) for epoch in range(config.train.epochs)]
    first_seen: dict[tuple[int, Stage], int] = {}
    # Numbers, as the garbage collector would go through a tuple for each of a run's steps again and again.
    seen = [
        first_seen.setdefault((sizes[at.epoch], method.stage(at)), len(first_seen))
        for at in positions_of(method, range(total_steps))
    ]
    counts = Counter(seen)
    levels = sorted(first_seen)
    number_of = {first_seen[level]: number for number, level in enumerate(levels)}
    return Plan(
        num_images=num_images,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        batch_size=config.train.batch_size,
        dense=Cost(macs(method.model)),
        levels=tuple(
            Level(
                stage,
                size,
                counts[first_seen[size, stage]] / total_steps,
                mean_tokens(method.training_tokens(stage, size)),
                method.training_cost(stage, size),
            )
            for size, stage in levels
        ),
        level_of_step=tuple(number_of[level] for level in seen),
        course=method.course(),
    )


def _of_shapes(config: Config, num_classes: int, steps_per_epoch: int) -> Method:
    with torch.device("meta"):  # shapes are all that costs are counted from
        return methods.build(config, num_classes, steps_per_epoch)


def learning_rates(config: Config, planned: Plan) -> tuple[Rate, ...]:
    """Of a run at steps evenly spread over it, the first epoch's closer to each other."""
    method = _of_shapes(config, 1, planned.steps_per_epoch)  # however many classes, the groups have the same rates
    first = min(planned.total_steps, planned.steps_per_epoch)
    evenly = {number * (end - 1) // _RATES for end in (first, planned.total_steps) for number in range(_RATES + 1)}
    steps = sorted(evenly)
    found = rates_at(method, list(positions_of(method, steps)), batch_size=planned.batch_size)
    return tuple(Rate(step, low, high) for step, (low, high) in zip(steps, found, strict=True))
