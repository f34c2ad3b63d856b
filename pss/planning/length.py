"""The same run in more or fewer epochs: what is counted in epochs takes the same share of it."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from pipelines.settings import Section
from pss import overrides
from pss.config import Config

_MOST_TRIED = 1000


def of_length(config: Config, epochs: int, steps_per_epoch: int, kept: Collection[str] = ()) -> Config:
    """A copy with so many epochs.

    Warm-up, cool-downs, the stages of progressive resizing and the epochs that methods count take the share of the run
    that they had; climbing schedules follow from its length. A cycle stays as long as it is, an epoch by default: a
    shorter run has fewer of them.

    Args:
        config: Of the run.
        epochs: How many.
        steps_per_epoch: Nothing that there is becomes shorter than a step.
        kept: Names of settings that stay as they are, whatever the length.

    Raises:
        ValueError: the settings do not suit a run of that length.
    """
    if epochs == config.train.epochs:
        return _checked(config, steps_per_epoch)
    pairs, progressive = [("train.epochs", str(epochs))], config.data.progressive
    sections: list[Section] = [config.optim, *config.own]
    if progressive.start_size is not None:
        sections.append(progressive)
    for section in sections:
        for name in section.in_epochs:
            key, value = f"{section.section}.{name}", getattr(section, name)
            if value and key not in kept:
                pairs.append((key, overrides.written(_scaled(value, config.train.epochs, epochs, steps_per_epoch))))
    return _checked(config.with_pairs(pairs), steps_per_epoch)


def fewest_epochs(config: Config, steps_per_epoch: int, kept: Collection[str] = ()) -> int:
    """The fewest epochs that the settings suit. Raises `ValueError` where no number up to the run's own does."""
    most = min(config.train.epochs, _MOST_TRIED)
    for epochs in range(1, most):
        try:
            of_length(config, epochs, steps_per_epoch, kept)
        except ValueError:
            continue
        return epochs
    of_length(config, most, steps_per_epoch, kept)
    return most


def _checked(config: Config, steps_per_epoch: int) -> Config:
    for section in config.own:
        section.check_steps(config, steps_per_epoch)
    return config


def _scaled(value: Any, before: int, epochs: int, steps_per_epoch: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_scaled(one, before, epochs, steps_per_epoch) if one else one for one in value)
    if isinstance(value, float):
        return max(round(value * epochs / before, 4), math.ceil(1e4 / steps_per_epoch) / 1e4)
    return min(max(1, round(value * epochs / before)), epochs - 1)
