"""What the parts of a run take on a machine, as a rehearsal measured it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from pss.planning.plan import Level

Key = tuple[int, float, str]
"""Size of the images, and the stage: what `Level` is known by in plans of runs of other lengths."""


def key_of(level: Level) -> Key:
    return level.img_size, level.stage.rho, level.stage.name


@dataclass(frozen=True)
class Taken:
    """What the parts of a run take, in seconds."""

    build: float
    """Loaders, model and optimizer, and what the first steps take longer than others, to compile, say."""
    again: float
    """The same once more in the same process, as it is for a run that was rehearsed: what is compiled once is there."""
    steps: dict[Key, float]
    """A step, by level: on a GPU with the loader in its path and nothing kept ready, on a CPU with what the loader
    takes of its cores."""
    waits: dict[Key, float]
    """Of it, what was waited for the loader."""
    epoch: float
    """What an epoch takes besides its steps: until its first batch, or, of an epoch measured whole, the rest. Less than
    nothing where a loader that decodes far ahead is less in the way than one that keeps pace."""
    validation: float
    """After each epoch."""
    checkpoint: float

    def to_json(self) -> str:
        values = asdict(self)
        for name in ("steps", "waits"):
            values[name] = [[*key, seconds] for key, seconds in values[name].items()]
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str) -> Taken:
        values = json.loads(text)
        for name in ("steps", "waits"):
            values[name] = {(size, rho, stage): seconds for size, rho, stage, seconds in values[name]}
        return cls(**values)


def whole_epoch(ends: Sequence[tuple[float, int]], steps: Sequence[float]) -> float:
    """What an epoch takes, in seconds, from its first steps.

    A loader that is ahead decodes while these are trained, and no more once all of the epoch waits for its steps. So
    the rest is held to go on at the rate of those that nothing was decoded beside, if they are a quarter of them at
    least; or at the rate of all, where the queue has no room for a whole epoch.

    Args:
        ends: Seconds from its beginning to the end of each of its first steps, at least one, and how many batches
            waited then.
        steps: What all of its steps take by themselves, or in proportion.
    """
    done, first, before = len(ends), 0, 0.0
    decoded = next((number for number, (_, ready) in enumerate(ends, 1) if number + ready >= len(steps)), done)
    if decoded <= 0.75 * done:
        first, before = decoded, ends[decoded - 1][0]
    last = ends[-1][0]
    return last + (last - before) / sum(steps[first:done]) * sum(steps[done:])
