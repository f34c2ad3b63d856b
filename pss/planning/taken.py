"""What the parts of a run take on a machine, as a rehearsal measured it."""

from __future__ import annotations

import json
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
