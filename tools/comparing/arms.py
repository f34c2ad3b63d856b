"""Arms of a comparison: what differs between the training methods, as data."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pss import recipes
from pss.config import Config
from tools.comparing.turns import Run

BUILT_IN = Path(__file__).with_name("arms.toml")
FEWEST = 2
"""Epochs that fine-tuning takes, where there are as many."""


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    name: str
    settings: tuple[str, ...]
    of_epochs: Mapping[str, float] = field(default_factory=dict)
    start: str | None = None
    fine_tuning: float = 1.0
    times: int = 1
    equal_time: bool = True
    note: str = ""

    def split(self, epochs: int) -> tuple[int, int]:
        """Epochs of the run that it starts from, and of its own: together `times` as many as `epochs`."""
        epochs *= self.times
        if self.start is None:
            return 0, epochs
        own = min(max(round(self.fine_tuning * epochs), min(FEWEST, epochs // 2)), epochs - 1)
        return epochs - own, own

    @property
    def fewest_epochs(self) -> int:
        """That it can be trained for."""
        return 1 if self.start is None else 2

    def as_dict(self) -> dict[str, Any]:
        """As a plan file holds it."""
        return asdict(self) | {"settings": list(self.settings), "of_epochs": dict(self.of_epochs)}


def read_all(*paths: Path) -> dict[str, Arm]:
    """The arms of all these files; one that is in several is that of the last. Raises `ValueError` as `read` does."""
    return {name: arm for path in paths for name, arm in read(path).items()}


def read(path: Path) -> dict[str, Arm]:
    """The arms of a file, by name; `arms.toml` beside this module says what there is to set.

    Raises:
        ValueError: the file cannot be read, or says what no arm has.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); name a file of arms") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no TOML ({error}); {BUILT_IN} shows what a file of arms looks like") from None
    return {name: _arm(f"{path}: [{name}]", name, values) for name, values in raw.items()}


def _arm(where: str, name: str, values: Any) -> Arm:
    if not isinstance(values, dict):
        raise ValueError(f"{where} is a value and not a table of settings; {BUILT_IN} shows what an arm looks like")
    if name != Path(name).name or not name.isprintable() or " " in name:
        raise ValueError(f"{where}: its runs' folders are called so; use letters, digits and dashes")
    known = [one.name for one in fields(Arm) if one.name != "name"]
    if unknown := [key for key in values if key not in known]:
        raise ValueError(f"{where} has {unknown[0]}, which no arm has; there are {', '.join(known)}")
    settings, shares = values.get("settings"), values.get("of_epochs", {})
    if not isinstance(settings, list) or not all(isinstance(one, str) and "=" in one for one in settings):
        raise ValueError(f'{where}: settings is a list of texts such as "method=dense"')
    if not isinstance(shares, dict) or not all(_is_share(share) for share in shares.values()):
        raise ValueError(f"{where}: of_epochs has shares of the epochs, above 0 and at most 1")
    start, fine_tuning = values.get("start"), values.get("fine_tuning")
    if (start is None) != (fine_tuning is None):
        raise ValueError(f"{where}: start and fine_tuning go together: whose weights, and the share of epochs after")
    if start is None and any("{start}" in one for one in settings):
        raise ValueError(f"{where}: {{start}} is the run that the arm starts from; name its arm, as in start = 'dense'")
    times, equal_time = values.get("times", 1), values.get("equal_time", True)
    if not isinstance(times, int) or isinstance(times, bool) or times < 1:
        raise ValueError(f"{where}: times is {times!r}; it is how many times the others' epochs it has, 1 or more")
    if not isinstance(equal_time, bool):
        raise ValueError(f"{where}: equal_time is {equal_time!r}; it is true or false")
    if fine_tuning is not None and (not _is_share(fine_tuning) or fine_tuning == 1):
        raise ValueError(f"{where}: fine_tuning is {fine_tuning}; it is a share of the epochs, between 0 and 1")
    note = str(values.get("note", ""))
    return Arm(name, tuple(settings), shares, start, fine_tuning or 1.0, times, equal_time, note)


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


def choose(known: Mapping[str, Arm], names: Sequence[str], reference: str) -> dict[str, Arm]:
    """The arms of these names, the reference among them.

    Raises:
        ValueError: there are none, or one starts from what is no arm, or from one that itself starts from another.
    """
    for name in names:
        if name not in known:
            raise ValueError(f"there is no arm {name}; there are {', '.join(known)}, and --arms-file adds others")
    if reference not in names:
        raise ValueError(f"{reference} is what the others are compared with; name it among --arms")
    if len(set(names)) < len(names):
        raise ValueError(f"--arms is {' '.join(names)}; name each arm once")
    for arm in (known[name] for name in names):
        if arm.start is not None and (arm.start not in known or known[arm.start].start is not None):
            raise ValueError(f"arm {arm.name} starts from {arm.start}; name an arm that starts from random weights")
    return {name: known[name] for name in names}


@dataclass(frozen=True)
class Layout:
    """Where the runs of a comparison lie, and what each is given."""

    recipe: str
    settings: tuple[str, ...]
    """Of all arms."""
    epochs: int
    """Of the column of equal epochs."""
    folder: Path
    arms: Mapping[str, Arm]
    num_images: int

    def run(self, arm: Arm, seed: int, epochs: int) -> Run:
        """The run of an arm with so many epochs in all. Runs of one arm, length and seed are one."""
        before, own = arm.split(epochs)
        needs = None if arm.start is None else self.run(self.arms[arm.start], seed, before)
        start = "" if needs is None else str(needs.folder)
        length = f"{before}+{own}" if before else f"{own}"
        settings = (
            *self.settings,
            *self._warm_up(own),
            *(one.replace("{start}", start) for one in arm.settings),
            *(f"{name}={max(1, round(share * own))}" for name, share in arm.of_epochs.items()),
            f"train.epochs={own}",
            f"train.seed={seed}",
        )
        return Run(self.folder / f"{arm.name}-{length}-s{seed}", own, settings, needs)

    def config(self, run: Run) -> Config:
        """Its configuration. Raises `ValueError` for settings that do not go together."""
        return recipes.get(self.recipe).with_settings(list(run.settings))

    def _warm_up(self, own: int) -> tuple[str, ...]:
        """As large a share of a run as the recipe has it of its epochs; none where that is not a step."""
        usual = recipes.get(self.recipe).with_settings(list(self.settings))
        if own == usual.train.epochs:
            return ()
        lengths = {"warmup_epochs": usual.optim.warmup_epochs, "cooldown_epochs": usual.optim.cooldown_epochs}
        shares = {name: value * own / usual.train.epochs for name, value in lengths.items() if value}
        shortest = usual.train.batch_size / self.num_images
        return tuple(f"optim.{name}={share if share >= shortest else 0:.4g}" for name, share in shares.items())


def with_starts(runs: Sequence[Run]) -> list[Run]:
    """These runs and those that they start from, each once, before those that start from it."""
    every: dict[Path, Run] = {}
    for run in runs:
        if run.needs is not None:
            every.setdefault(run.needs.folder, run.needs)
    for run in runs:
        every.setdefault(run.folder, run)
    return list(every.values())
