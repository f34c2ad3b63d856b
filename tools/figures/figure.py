"""What a figure is: what it shows, what it is made from, and where what was made came from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pipelines
from pipelines.augment.device import DeviceTransform
from pipelines.base import Loader
from pss.config import Config
from tools.comparing import arms as known_arms


@dataclass(frozen=True, eq=False)
class Source:
    """What figures are made from: the result of one run of `tools.compare_methods`."""

    folder: Path
    result: Mapping[str, Any]
    """What its comparison.json holds."""

    @property
    def runs(self) -> list[dict[str, Any]]:
        """The runs of equal epochs."""
        return [run for run in self.result["runs"] if run["column"] == "epochs"]

    @property
    def shown(self) -> list[str]:
        """Arms that are drawn in one picture: all, or where those could not be told apart the ones of arms.toml."""
        every = list(dict.fromkeys(run["arm"] for run in self.runs))
        usual = known_arms.read(known_arms.BUILT_IN)
        return every if len(every) <= len(usual) else [arm for arm in every if arm in usual]

    def folders(self, arm: str) -> list[Path]:
        """Of an arm's runs, one for each seed."""
        return [self.folder / "runs" / run["run"] for run in self.runs if run["arm"] == arm]

    @contextmanager
    def validation_split(self, config: Config) -> Iterator[Loader]:
        """What reads it, closed afterwards."""
        data = Path(self.result["plan"]["data"])
        with closing(
            pipelines.build(data, "val", config=config.data, batch_size=256, train=False, loader="torch")
        ) as loader:
            yield loader

    def validation_images(self, config: Config, count: int) -> Tensor:
        """Normalised images (B, 3, S, S), so many at most, spread over the validation split."""
        transform = DeviceTransform(config.data, seed=0, train=False)
        with self.validation_split(config) as loader:
            shown = torch.cat([transform(batch, 0) for batch in loader])
        return shown[torch.linspace(0, len(shown) - 1, min(count, len(shown))).long()]

    @property
    def command(self) -> str:
        """That made the runs."""
        plan = self.result["plan"]
        words = ["python -m tools.compare_methods", f"--data {plan['data']}", f"--output {self.folder}"]
        words += [f"--recipe {plan['recipe']}", f"--arms {' '.join(plan['arms'])}", f"--epochs {plan['epochs']}"]
        words += [f"--seeds {' '.join(map(str, plan['seeds']))}", *(f"--set {one}" for one in plan["settings"])]
        return " ".join(words)


@dataclass(frozen=True)
class Figure:
    """One figure or table of a paper, in kind."""

    numbers: tuple[int, ...]
    """Of the list of figures."""
    name: str
    """Of its file."""
    original: str
    """Which it is, in which paper."""
    shows: str
    spread: str
    """What of its spread is to be seen."""
    make: Callable[[Source], bytes | str]
    """A PNG, or a page of markdown."""
    arms: tuple[str, ...] = ()
    """That the comparison must have."""

    def can_be_made(self, source: Source) -> bool:
        """Whether the comparison has what it shows."""
        return set(self.arms) <= {run["arm"] for run in source.runs}
