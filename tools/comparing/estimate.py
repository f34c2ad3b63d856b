"""How long a comparison will take, from a few measured steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pss.config import Config
from pss.planning.doctor import measure_training
from pss.planning.plan import plan
from tools.comparing.arms import Arm, Layout
from tools.comparing.budget import Pace
from tools.comparing.turns import Run

START_SECONDS = 6.0
"""Of a process, until it trains, and from its last step to its end; measured on two cores."""


def epoch_seconds(
    run: Run,
    configured: Callable[[Run], Config],
    num_images: int,
    num_classes: int,
    maps: Callable[[Config], Tensor | None] = lambda config: None,
) -> float:
    """Of training, if data are always at hand: a few steps at each level of the plan, on random weights. A run that
    learns from label maps is given some of its `maps`.

    Weights that the run starts from are not read, as they need not be there yet, and neither is a teacher: where there
    is one, its forward pass is added by its share of the arithmetic.
    """
    planned = plan(configured(run), num_images=num_images, num_classes=num_classes)
    config, more = configured(run), 1.0
    if run.needs is not None:
        without = tuple(one for one in run.settings if str(run.needs.folder) not in one)
        config, whole = configured(replace(run, settings=without, needs=None)), planned
        planned = plan(config, num_images=num_images, num_classes=num_classes)
        more = whole.mean_cost / planned.mean_cost
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rates = measure_training(config, planned, num_classes, device, maps(config))
    per_image = sum(level.share / rates[level] for level in planned.levels)
    return more * per_image * planned.steps_per_epoch * planned.batch_size


def total_seconds(
    layout: Layout, runs: Iterable[tuple[Arm, int]], pace: Mapping[str, Pace], seeds: int, turn: int
) -> float:
    """Of training, the start of processes included.

    Args:
        layout: Which runs are one and the same.
        runs: Arm, and epochs in all.
        pace: By the arm's name.
        seeds: How many there are.
        turn: In epochs.
    """
    seconds, counted = 0.0, set()
    for arm, epochs in runs:
        run = layout.run(arm, 0, epochs)
        for part, each in ((run.needs, pace[arm.name].before), (run, pace[arm.name].own)):
            if part is not None and part.folder not in counted:
                counted.add(part.folder)
                seconds += seeds * (part.epochs * each + -(-part.epochs // turn) * START_SECONDS)
    return seconds
