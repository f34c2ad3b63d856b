"""Everything a run is made of, as nested frozen dataclasses.

A recipe (`pss.recipes`) is a function that returns a `Config`; `--set section.key=value` changes fields of it (see
`pss.overrides`); the result is saved with the run as `config.json`. Values are checked at construction, so a `Config`
that exists is valid. A method brings sections of its own, which stand beside the others.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.base import DataConfig
from pipelines.settings import Json, Section, Unread, as_dict, forget, hints_of, is_section, nearest, unread
from pss import methods, overrides
from pss.models.create import preset
from pss.runs import records
from pss.runtime.files import in_words
from pss.sections import (
    CompileConfig,
    LossConfig,
    MethodSection,
    ModelConfig,
    OptimConfig,
    RunSettings,
    ScheduleConfig,
    TrainConfig,
)

__all__ = [
    "CompileConfig",
    "Config",
    "DataConfig",
    "LossConfig",
    "MethodSection",
    "ModelConfig",
    "OptimConfig",
    "ScheduleConfig",
    "TrainConfig",
    "changes_of_run",
    "check_same_run",
    "differing_fields",
]

_MAY_DIFFER = (
    "compile.",
    "data.gpu_decoding.",
    "data.prefetch_gb",
    "train.max_steps",
    "train.num_workers",
    "train.log_every_steps",
    "train.loggers",
    "train.checkpoint_every_minutes",
    "train.keep_checkpoints",
    "train.max_skipped",
    "train.timeout_seconds",
    "train.accumulate",
    "train.parallel",
    "train.checkpoint_activations",
)
"""What a resumed run may change; everything else would make it another run."""

_HIDDEN = ("own", "spare")  # fields of `Config` that are no sections of its files


@dataclass(frozen=True, kw_only=True)
class Config(RunSettings):
    """One run, complete: its settings, held against its method."""

    def check(self) -> None:
        method = methods.find(self.method)
        self._complete_own(method.sections)
        if "maps" in method.wants(self) and self.data.label_maps is None:
            raise ValueError(f"method {self.method} learns from label maps; --set data.label_maps=FILE.npy names them")
        for found in unread_in(self):
            if found.value != found.default:
                raise found.error()
        super().check()

    @classmethod
    def of(cls, settings: RunSettings) -> Config:
        """The configuration that settings amount to. Raises `ValueError` where they do not suit their method."""
        return cls(**vars(settings))

    def _complete_own(self, kinds: tuple[type[Section], ...]) -> None:
        given = {type(section): section for section in self.own}
        if foreign := [kind.section for kind in given if kind not in kinds]:
            raise ValueError(f"method {self.method} has no settings called {', '.join(foreign)}; leave them out")
        object.__setattr__(self, "own", tuple(given[kind] if kind in given else kind() for kind in kinds))

    def with_method(self, name: str) -> Config:
        """A copy for another method, with those settings that it has use for, and defaults for its others.

        Raises:
            ValueError: there is no such method.
        """
        return self.with_settings([f"method={name}"])

    def _sections_for(self, method: str) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The sections that a method has, and those at hand that it does not have."""
        kinds = methods.find(method).sections
        at_hand = {type(section): section for section in (*self.spare, *self.own)}
        own = tuple(at_hand.pop(kind, None) or kind() for kind in kinds)
        return own, tuple(at_hand.values())

    def with_settings(self, settings: Sequence[str]) -> Config:
        """A copy with `section.key=value` settings applied, that of the method first.

        What else the configuration holds and nothing reads any more, such as the settings of another schedule, gets its
        default.

        Raises:
            ValueError: a setting that there is not, with the nearest one; one that belongs to another method; a value
                that is out of range, or does not go with another, or that nothing reads.
        """
        return self.with_pairs([overrides.split(setting) for setting in settings])

    def with_pairs(self, pairs: Sequence[tuple[str, str]], source: str = "--set ") -> Config:
        """`with_settings` of keys and values apart; `source` says where they are from, to begin a sentence with."""
        method = dict(pairs).get("method", self.method)
        # Whether its sections suit the run is known when all is set.
        own, spare = self._sections_for(method)
        plain = {name: value for name, value in vars(self).items() if name not in _HIDDEN} | {"method": method}
        tree = {name: as_dict(value) if isinstance(value, Section) else value for name, value in plain.items()}
        tree |= {one.section: as_dict(one) for one in own}
        kinds = {one.section: type(one) for one in (*plain.values(), *own) if isinstance(one, Section)}
        overrides.apply(tree, kinds, pairs, partial(_whose, method), source)
        draft = RunSettings.draft(
            {name: value for name, value in tree.items() if name in plain}
            | {"own": tuple(type(one).draft(tree[one.section]) for one in own)}
        )
        _forget_unread(draft, {key for key, _ in pairs})
        return dataclasses.replace(Config.from_dict(_tree(draft)), spare=spare)

    def to_dict(self) -> Json:
        """As in `config.json`: the method's sections stand beside the others, under their names."""
        return _tree(self)

    def to_json(self) -> str:
        """The text of a file that `from_json` reads; that of a run also says which format it has."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_dict(cls, raw: Any) -> Config:
        """What `to_dict` returned. Raises `ValueError`."""
        if not isinstance(raw, dict):
            raise ValueError(f"the configuration is {str(raw)[:40]!r}; it must be an object of sections")
        raw = _with_present_names(raw)
        method = raw.get("method", "sampled")
        kinds = {kind.section: kind for kind in methods.find(method).sections}
        names = [part.name for part in dataclasses.fields(cls) if part.name not in _HIDDEN]
        for key in raw:
            if key not in names and key not in kinds:
                raise ValueError(f"there is no section {key!r} with method {method}{nearest(key, [*names, *kinds])}")
        this: Any = cls
        parts = {name: hint for name, hint in hints_of(this).items() if is_section(hint)} | kinds
        values = {name: parts[name].from_dict(value) if name in parts else value for name, value in raw.items()}
        # All at once: sections are compared with each other, and defaults in the place of some might not suit the rest.
        own = tuple(values.pop(name) for name in kinds if name in raw)
        return cls(**values, own=own)

    @classmethod
    def from_json(cls, path: Path) -> Config:
        """Read a run's `config.json`. Raises `ValueError` naming the file where it cannot be read."""
        try:
            raw = records.read(path, records.Versioned, remedy="restore it, or begin a new run")
            return cls.from_dict({name: value for name, value in raw.items() if name not in records.STAMP})
        except FileNotFoundError:
            raise ValueError(f"{path} not found; name the --output folder of a pss-train run") from None
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({in_words(error)}); name the --output folder of a run") from None
        except records.LaterVersion:
            raise
        except ValueError as error:
            reason = str(error).removeprefix(f"{path} ")
            raise ValueError(
                f"{path} is no run configuration of this version of pss ({reason}); use the version that wrote it"
            ) from None


def unread_in(run: RunSettings, **machine: Any) -> Iterator[Unread]:
    """The settings that nothing reads in a run; `machine` is what `pipelines.settings.Context` has of it."""
    return unread(run, method=methods.find(run.method), preset=preset(run.model.name), **machine)


def _forget_unread(draft: RunSettings, given: Collection[str]) -> None:
    """Give the settings of a draft that nothing reads their defaults. Raises `SettingError` for one that is `given`."""
    changed = True
    while changed:
        changed = False
        for found in unread_in(draft):
            if found.full_name in given and found.asks:
                raise found.error()
            if found.value != found.default:
                forget(found)
                changed = True


def _tree(run: RunSettings) -> Json:
    tree = {name: value for name, value in as_dict(run).items() if name not in _HIDDEN}
    return tree | {section.section: as_dict(section) for section in run.own}


def _with_present_names(raw: Json) -> Json:
    """What a file says, under the names that settings have now: `data.prefetch_gb` was `train.prefetch_mb`, in MiB."""
    train, data = raw.get("train"), raw.get("data", {})
    if not isinstance(train, dict) or not isinstance(data, dict) or "prefetch_mb" not in train:
        return raw
    mebibytes = train["prefetch_mb"]
    moved = {"prefetch_gb": mebibytes * 2**20 / 1e9} if isinstance(mebibytes, float | int) else {}
    return raw | {
        "train": {name: value for name, value in train.items() if name != "prefetch_mb"},
        "data": moved | data,
    }


def _whose(method: str, key: str) -> str | None:
    """What to say of a setting that `method` does not have: which one has it, or its name now; None if none has it."""
    if key == "train.prefetch_mb":
        return "; it is data.prefetch_gb now, in GB"
    owners = [
        name for name, one in methods.METHODS.items() if key.split(".")[0] in {kind.section for kind in one.sections}
    ]
    if not owners:
        return None
    have = "has" if len(owners) == 1 else "have"
    return f" with method {method}; {', '.join(owners)} {have} it: --set method={owners[0]}"


def differing_fields(a: Config, b: Config) -> list[str]:
    """`section.key (a's value, b's value)` for every setting in which two configurations differ."""
    flat_a, flat_b = overrides.flatten(a.to_dict()), overrides.flatten(b.to_dict())
    return [
        f"{key} ({flat_a.get(key)!r}, {flat_b.get(key)!r})"
        for key in {**flat_a, **flat_b}
        if flat_a.get(key) != flat_b.get(key)
    ]


def changes_of_run(a: Config, b: Config) -> list[str]:
    """Those of `differing_fields` that make two runs of what might be one, continued."""
    return [field for field in differing_fields(a, b) if not field.startswith(_MAY_DIFFER)]


def check_same_run(saved: Any, config: Config, path: Path) -> None:
    """Raise `ValueError` where `saved`, the settings in a checkpoint, are those of another run than `config`."""
    try:
        theirs = Config.from_dict(saved)
    except ValueError as error:
        raise ValueError(
            f"{path} has settings that this version of pss does not know ({error}); use the version that wrote it"
        ) from None
    if changed := changes_of_run(theirs, config):
        raise ValueError(
            f"{path} is of a run with other settings (there, here): {'; '.join(changed)}; put the checkpoints of this "
            "run back, repeat the settings of that one, or choose another --output"
        )
