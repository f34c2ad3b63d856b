"""What is compared: arms, which are settings and where a run starts from, and nothing else."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

START = "{start}"
"""In a setting: the folder of the run that an arm starts from."""


@dataclass(frozen=True)
class Arm:
    """One way of training, for every seed and length."""

    name: str
    settings: tuple[str, ...] = ()
    """As after `--set`; `{start}` stands for the folder of the run that it starts from."""
    of_epochs: dict[str, float] = field(default_factory=dict)
    """Settings that count epochs, as shares of the run's own; rounded, and 1 at least."""
    starts_from: str | None = None
    """Another arm, whose run it goes on from; None trains from random weights."""
    share: float = 1.0
    """Of all epochs, those that it trains itself; the arm that it starts from has the others."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(
                f"arm {self.name}: share is {self.share}; it is the arm's own part of all epochs, in (0, 1]"
            )
        if (self.starts_from is None) != (self.share == 1):
            raise ValueError(f"arm {self.name}: an arm with a share below 1 says in starts_from what has the rest")

    def settings_of(self, epochs: int, start: Path | None) -> tuple[str, ...]:
        """Of a run of so many epochs, which goes on from the run in `start`."""
        lengths = [f"{key}={max(1, round(share * epochs))}" for key, share in self.of_epochs.items()]
        weights = [] if start is None else [f"model.weights={start}"]
        own = [setting.replace(START, str(start)) for setting in self.settings]
        return (*own, *lengths, *weights)


_FINE_TUNED = {"optim.warmup_epochs": 0.1}

ARMS = {
    arm.name: arm
    for arm in (
        Arm("dense", ("method=dense",)),
        Arm("pss", ("method=sampled", "schedule.cooldown_epochs=0")),
        # Ten of the published 300 epochs.
        Arm("pss-cooldown", ("method=sampled",), {"schedule.cooldown_epochs": 1 / 30}),
        # Of 30 published epochs after 300, and 100 after 300; here at the same number of epochs in all.
        Arm("dynamicvit", ("method=dynamicvit", f"dynamicvit.teacher={START}"), _FINE_TUNED, "dense", 1 / 10),
        Arm("avit", ("method=avit",), _FINE_TUNED, "dense", 1 / 4),
        Arm("toe", ("method=toe",)),
        Arm("toe-pss", ("method=toe", "schedule.name=cyclic")),
    )
}
"""Those that need no file."""


def read(path: Path) -> dict[str, Arm]:
    """Arms of a TOML file: a table `[arms.NAME]` for each, whose keys are the fields of `Arm`.

    Raises:
        ValueError: naming the file, what is wrong in it, and what could be there.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--arms-file {path} cannot be read ({error.strerror}); name a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--arms-file {path} is no TOML ({error}); it has a table [arms.NAME] for each arm") from None
    tables = raw.get("arms")
    if not isinstance(tables, dict) or not tables or raw.keys() != {"arms"}:
        raise ValueError(f"--arms-file {path} names no arms; it has a table [arms.NAME] for each of them, and no other")
    return {name: _arm(path, name, table) for name, table in tables.items()}


def _arm(path: Path, name: str, table: Any) -> Arm:
    known = {one.name for one in fields(Arm)} - {"name"}
    if not isinstance(table, dict) or table.keys() - known:
        odd = sorted(table.keys() - known)[0] if isinstance(table, dict) else "a value"
        raise ValueError(f"--arms-file {path}: arm {name} has {odd}; its keys are {', '.join(sorted(known))}")
    settings, lengths = table.get("settings", []), table.get("of_epochs", {})
    if not isinstance(settings, list) or not all(isinstance(one, str) and "=" in one for one in settings):
        raise ValueError(f'--arms-file {path}: settings of arm {name} are no list such as ["method=dense"]')
    if not isinstance(lengths, dict) or not all(isinstance(one, int | float) for one in lengths.values()):
        raise ValueError(f"--arms-file {path}: of_epochs of arm {name} has no share of the epochs for each setting")
    share = table.get("share", 1.0)
    if not isinstance(share, int | float) or not isinstance(table.get("starts_from", ""), str):
        raise ValueError(f"--arms-file {path}: share of arm {name} is a number, and starts_from the name of an arm")
    try:
        return Arm(name, tuple(settings), lengths, table.get("starts_from"), float(share))
    except ValueError as error:
        raise ValueError(f"--arms-file {path}: {error}") from None
