"""What a figure is: what it shows, what it is made from, and where what was made came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
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
