"""Everything a run is made of, as nested frozen dataclasses.

A recipe (`pss.recipes`) is a function that returns a `Config`; `--set section.key=value` changes fields of it (see
`pss.overrides`); the result is saved with the run as `config.json`. Values are checked at construction, so a `Config`
that exists is valid. A method brings sections of its own, which stand beside the others.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeVar

from pipelines.base import DataConfig
from pipelines.settings import (
    AboveZero,
    Below1,
    Json,
    Natural,
    NotNegative,
    Positive,
    Section,
    Share,
    nearest,
)
from pss import overrides

S = TypeVar("S", bound=Section)

_HIDDEN = ("own", "spare")  # fields of `Config` that are no sections of its files


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section, section="model"):
    """The Vision Transformer. A field left at None is what the named model has."""

    name: str = "deit_small_patch16_224"
    """A timm ViT's name, or a preset of `pss.create_model`."""
    rel_pos: Literal["none", "bias", "separable", "rope"] | None = None
    """How attention knows relative positions: a learned bias, one that is the sum of rows and columns, or rotation."""
    sort: Literal["magnitude", "random"] = "magnitude"
    """How patches are ranked before the first ones are kept."""
    token_counts: Literal["published", "aligned"] = "published"
    """Kept tokens in whole numbers, as published, or in multiples of 8, which a GPU computes faster."""
    qkv_bias: Literal["full", "qv"] | None = None
    """Bias on queries, keys and values, or on queries and values only (BEiT)."""
    init: Literal["timm", "published"] | None = None
    """Initial weights: timm's, or those of the published patch sampling runs."""
    patch_size: int | None = None
    """Side of a patch, in pixels."""
    embed_dim: int | None = None
    """Width D."""
    depth: int | None = None
    """Number of blocks."""
    num_heads: int | None = None
    """Attention heads per block."""
    global_pool: Literal["token", "avg"] | None = None
    """What the classifier reads: the class token, or the mean of the kept patch tokens."""
    drop_path_rate: float = 0.0
    """Stochastic depth, rising linearly to this rate at the last block."""
    weights: str | None = None
    """Where training starts: a weights file, the folder of a run, or timm:NAME for a model of timm's with its
    pretrained weights; None starts from random ones."""
    own_head: bool = False
    """Start with a new classifier, whatever the weights hold: for other classes, or weights without one."""

    def overrides(self) -> Json:
        """The keyword arguments for `pss.create_model` beside name, classes and image size."""
        own = _plain(self)
        for name in ("name", "weights", "own_head"):
            del own[name]
        return {key: value for key, value in own.items() if value is not None}


class MethodSection(Section):
    """Base of the settings that a training method brings along; see `pss.methods.contract.Method.sections`."""

    def check_run(self, config: Config) -> None:
        """Compare the settings with those of the run. Raises `ValueError`."""

    def evened(self, steps_per_epoch: int) -> Iterable[Iterable[tuple[str, MethodSection]]]:
        """Changes after which steps ask more evenly for data, at the same cost in all.

        Several kinds of them, the ones that change least first; of each kind the choices, in the order in which they
        are to be tried, as what to write (`schedule.shuffle=true`) and the changed settings.
        """
        return ()


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(MethodSection, section="schedule"):
    """The patch sampling schedule, rho as a function of the step; for methods that ask for one."""

    name: Literal["fixed", "linear", "cosine", "cyclic", "list"] = "cyclic"
    """The shape over time."""
    form: Literal["published", "cut", "symmetric"] = "published"
    """`published` overshoots to a drop of -0.1 before clamping, which gives rho = 1 a full share of the steps;
    `symmetric` stops at a drop of 0. The `published` climb of linear and cosine ends where the cooldown begins; `cut`
    is the same climb over the whole run, whose end the cooldown cuts off."""
    low: Share = 0.2
    """Smallest rho of linear, cosine and cyclic."""
    high: Share = 1.0
    """Largest rho of linear, cosine and cyclic."""
    rho: Share = 0.6
    """The constant rho of `fixed`."""
    rhos: tuple[Share, ...] = ()
    """The values of `list`, one a step, over and over."""
    period_steps: Positive | None = None
    """Length of a cycle, in steps; None is one epoch, as published."""
    shuffle: bool = False
    """Take the steps of each cycle (of each epoch, where there are no cycles) in random order: the same levels as
    often, so that a loader needs to keep up with their average only."""
    cooldown_epochs: Natural = 0
    """The last epochs, at rho = 1."""

    def check(self) -> None:
        if (self.name == "list") != bool(self.rhos):
            raise ValueError(
                f"schedule.name is {self.name} and schedule.rhos holds {len(self.rhos)} values; a list of values goes "
                "with schedule.name=list, and with nothing else"
            )
        if self.low > self.high:
            raise ValueError(f"schedule.low ({self.low}) is above schedule.high ({self.high})")

    def check_run(self, config: Config) -> None:
        if self.cooldown_epochs > config.train.epochs:
            raise ValueError(
                f"schedule.cooldown_epochs is {self.cooldown_epochs}; it must lie between 0 and the run's "
                f"{config.train.epochs} epochs (--set schedule.cooldown_epochs=0)"
            )

    def evened(self, steps_per_epoch: int) -> Iterable[Iterable[tuple[str, MethodSection]]]:
        yield [("schedule.shuffle=true", dataclasses.replace(self, shuffle=True))]
        if self.name == "cyclic":
            longest = self.period_steps or steps_per_epoch
            shorter = [longest // 2**power for power in range(1, max(1, int(math.log2(longest / 10)) + 1))]
            yield [
                (f"schedule.period_steps={steps}", dataclasses.replace(self, period_steps=steps)) for steps in shorter
            ]


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Section, section="optim"):
    """AdamW with linear warm-up and cosine decay, per step."""

    lr: float = 5e-4
    """Peak learning rate at a global batch of `lr_batch`; it scales linearly with the global batch."""
    lr_batch: int | None = 512
    """The global batch that `lr` is given for; None switches scaling off."""
    min_lr: float = 1e-5
    """Learning rate at the end, whatever the batch."""
    warmup_lr: float = 1e-6
    """Learning rate at step 0, whatever the batch."""
    warmup_epochs: float = 5.0
    """Length of the linear warm-up."""
    weight_decay: float = 0.05
    """Decoupled weight decay; none on 1-D parameters, position embedding and class token."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averaging coefficients."""
    decay_rel_pos: bool = True
    """Decay the tables of relative position biases too, as the published runs did."""
    layer_decay: Share | None = None
    """Factor on the learning rate from each layer to the one before it; None has all layers learn alike."""
    clip_grad: float | None = None
    """Largest gradient norm; None does not clip."""


@dataclass(frozen=True, kw_only=True)
class LossConfig(Section, section="loss"):
    """Cross entropy, with soft targets where images are mixed."""

    label_smoothing: Below1 = 0.0
    """Share of the target spread evenly over all classes."""
    mixup: float = 0.0
    """Alpha of mixup's Beta distribution; 0 is off."""
    cutmix: float = 0.0
    """Alpha of CutMix's Beta distribution; 0 is off."""
    mix_switch_prob: float = 0.5
    """How often CutMix takes mixup's place where both are on."""
    mix_mode: Literal["batch", "elem"] = "batch"
    """One draw for the whole batch, or one for each image."""


@dataclass(frozen=True, kw_only=True)
class CompileConfig(Section, section="compile"):
    """`torch.compile` of the blocks, once for every token count; the rest is short and runs as it is."""

    mode: Literal["auto", "on", "off"] = "auto"
    """`auto` compiles on a GPU, where Triton is installed."""
    max_graphs: Positive = 8
    """Token counts that may be compiled, those of training and of validation; one more is an error."""
    cuda_graphs: bool = False
    """Replay what a graph launches on the GPU instead of launching it anew: for steps too short to keep it busy."""
    backend: Literal["inductor", "aot_eager"] = "inductor"
    """`aot_eager` traces and generates no code, to tell whether a fault is the compiler's."""

    def check(self) -> None:
        if self.cuda_graphs and (self.mode == "off" or self.backend != "inductor"):
            raise ValueError(
                "compile.cuda_graphs records what compiled code launches; leave it false, or set compile.mode=auto and "
                "compile.backend=inductor"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section, section="train"):
    """The run."""

    epochs: Positive = 300
    """Passes over the training images."""
    batch_size: Positive = 1024
    """Images per optimizer step over all processes."""
    seed: int = 0
    """Seed of weights, order, crops, mixing and random sampling."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the forward pass; `auto` is bf16 autocast on a GPU and fp32 on a CPU."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """What several processes do with the model: `ddp` gives each a whole one; `fsdp` gives each a share of every
    tensor, for models that do not fit one GPU, and does not compile."""
    accumulate: Positive = 1
    """Parts that each process computes its share of a batch in, one after the other, to save memory; what is learnt is
    what as many times the processes would learn."""
    checkpoint_activations: bool = False
    """Keep only what enters each block and compute the block once more in the backward pass: less memory, more time."""
    max_skipped: Positive = 10
    """Steps in a row with a loss or gradients that are not finite after which the run stops; each is skipped."""
    timeout_seconds: AboveZero = 600.0
    """How long a process waits for the others before the run fails."""
    ema_decay: Below1 = 0.0
    """Decay of the moving average of the weights, per step; 0 keeps none."""
    num_workers: int | None = None
    """Decoding threads or processes of the loader per rank; None takes the cores at hand."""
    prefetch_mb: NotNegative = 512.0
    """Decoded batches kept ready per process, in MiB (on the GPU where there is one), so that short steps can draw on
    what long ones left time for; 0 keeps none."""
    log_every_steps: Positive = 50
    """Steps between two rows of `log.jsonl`."""
    checkpoint_every_minutes: float = 15.0
    """Longest time between two checkpoints; one is also written after every epoch."""
    keep_checkpoints: Positive = 2
    """How many of the newest checkpoints are kept; the best one, and the newest of an epoch's end, are kept as well."""
    max_steps: int | None = None
    """Stop after so many steps, with a checkpoint; learning rate and rho keep the course `epochs` gives them."""


@dataclass(frozen=True, kw_only=True)
class Config(Section):
    """One run, complete."""

    recipe: str
    """The recipe this began as."""
    method: str = "sampled"
    """How the model is trained: the name of one of `pss.methods`, or `package.module:Class` for one of your own."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    own: tuple[Any, ...] = ()
    """The method's sections. One that is left out has its defaults; one that the method does not have is refused."""
    spare: tuple[Any, ...] = field(default=(), compare=False, repr=False)
    """Sections of other methods, as the recipe would have them: taken up where the method is changed, and not saved."""

    def check(self) -> None:
        method = method_class(self.method)
        self._complete_own(method.sections)
        if "maps" in method.wants and self.data.label_maps is None:
            raise ValueError(f"method {self.method} learns from label maps; --set data.label_maps=FILE.npy names them")
        if "maps" not in method.wants and self.data.label_maps is not None:
            raise ValueError(f"data.label_maps is set, and method {self.method} learns from none; leave it out")
        grow = self.data.progressive
        if grow.start_size is not None and grow.end_epoch >= self.train.epochs:
            raise ValueError(
                f"data.progressive.end_epoch is {grow.end_epoch} and train.epochs {self.train.epochs}; the run would "
                f"never see images of full size: --set data.progressive.end_epoch={self.train.epochs * 4 // 5} "
                f"--set data.progressive.begin_epoch={self.train.epochs // 5}"
            )
        if self.train.parallel == "fsdp" and self.compile.mode == "on":
            raise ValueError(
                "train.parallel is fsdp, whose sharded blocks are not compiled; set compile.mode=auto, or "
                "train.parallel=ddp"
            )
        if self.optim.warmup_epochs > self.train.epochs:
            raise ValueError(
                f"optim.warmup_epochs ({self.optim.warmup_epochs}) is longer than the run "
                f"(train.epochs={self.train.epochs}); lower it, for example --set optim.warmup_epochs=0"
            )
        for section in self.own:
            section.check_run(self)

    def _complete_own(self, kinds: tuple[type[Section], ...]) -> None:
        given = {type(section): section for section in self.own}
        if foreign := [kind.section for kind in given if kind not in kinds]:
            raise ValueError(f"method {self.method} has no settings called {', '.join(foreign)}; leave them out")
        object.__setattr__(self, "own", tuple(given[kind] if kind in given else kind() for kind in kinds))

    def section_of(self, kind: type[S]) -> S:
        """The section of that type, one of the method's own. Raises `KeyError` where the method has none."""
        for section in self.own:
            if isinstance(section, kind):
                return section
        raise KeyError(f"method {self.method} has no settings called {kind.section}")

    def having(self, *sections: Section) -> Config:
        """A copy with these sections of the method's own in the place of those of the same type."""
        kinds = tuple(map(type, sections))
        return dataclasses.replace(self, own=(*(one for one in self.own if not isinstance(one, kinds)), *sections))

    def with_method(self, name: str) -> Config:
        """A copy for another method, with those sections that it has as well, and defaults for its others.

        Raises:
            ValueError: there is no such method.
        """
        own, spare = self._sections_for(name)
        return dataclasses.replace(self, method=name, own=own, spare=spare)

    def _sections_for(self, method: str) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The sections that a method has, and those at hand that it does not have."""
        kinds = method_class(method).sections
        at_hand = {type(section): section for section in (*self.spare, *self.own)}
        own = tuple(at_hand.pop(kind, None) or kind() for kind in kinds)
        return own, tuple(at_hand.values())

    def with_settings(self, settings: Sequence[str]) -> Config:
        """A copy with `section.key=value` settings applied, that of the method first.

        Raises:
            ValueError: a setting that there is not, with the nearest one; one that belongs to another method; a value
                that is out of range, or does not go with another.
        """
        pairs = [overrides.split(setting) for setting in settings]
        method = dict(pairs).get("method", self.method)
        # Not with_method: whether its sections suit the run is known when all is set.
        own, spare = self._sections_for(method)
        plain = {name: value for name, value in vars(self).items() if name not in _HIDDEN} | {"method": method}
        tree = {name: _plain(value) if isinstance(value, Section) else value for name, value in plain.items()}
        tree |= {one.section: _plain(one) for one in own}
        kinds = {one.section: type(one) for one in (*plain.values(), *own) if isinstance(one, Section)}
        overrides.apply(tree, kinds, pairs, partial(_whose, method))
        return dataclasses.replace(Config.from_dict(tree), spare=spare)

    def to_dict(self) -> Json:
        """As in `config.json`: the method's sections stand beside the others, under their names."""
        tree = {name: value for name, value in _plain(self).items() if name not in _HIDDEN}
        return tree | {section.section: _plain(section) for section in self.own}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_dict(cls, raw: Any) -> Config:
        """What `to_dict` returned. Raises `ValueError`."""
        if not isinstance(raw, dict):
            raise ValueError("a configuration is an object of sections")
        method = raw.get("method", "sampled")
        kinds = {kind.section: kind for kind in method_class(method).sections}
        names = [part.name for part in dataclasses.fields(cls) if part.name not in _HIDDEN]
        for key in raw:
            if key not in names and key not in kinds:
                raise ValueError(f"there is no section {key!r} with method {method}{nearest(key, [*names, *kinds])}")
        own = tuple(kind.from_dict(raw[name]) for name, kind in kinds.items() if name in raw)
        plain = super().from_dict({key: value for key, value in raw.items() if key not in kinds})
        return dataclasses.replace(plain, own=own)

    @classmethod
    def from_json(cls, path: Path) -> Config:
        """Read a run's `config.json`. Raises `ValueError` naming the file where it cannot be read."""
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise ValueError(f"{path} not found; name the --output folder of a pss-train run") from None
        except (json.JSONDecodeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no run configuration of this version of pss ({error})") from None


def method_class(name: str) -> Any:
    """The class of a method, found by name when it is asked for: methods are plug-ins, this module knows none.

    Raises:
        ValueError: there is no such method.
    """
    return import_module("pss.methods").find(name)


def _whose(method: str, key: str) -> str | None:
    """What to say of a setting that `method` does not have and another one has; None if none has it."""
    methods = import_module("pss.methods").METHODS
    owners = [name for name, one in methods.items() if key.split(".")[0] in {kind.section for kind in one.sections}]
    if not owners:
        return None
    return f" with method {method}; {', '.join(owners)} has it: --set method={owners[0]}"


def differing_fields(a: Config, b: Config) -> list[str]:
    """`section.key (a's value, b's value)` for every setting in which two configurations differ."""
    flat_a, flat_b = overrides.flatten(a.to_dict()), overrides.flatten(b.to_dict())
    return [
        f"{key} ({flat_a.get(key)!r}, {flat_b.get(key)!r})"
        for key in {**flat_a, **flat_b}
        if flat_a.get(key) != flat_b.get(key)
    ]


def _plain(section: Any) -> Json:
    """A section as dictionaries; `dataclasses.asdict` would copy the method's sections, too."""
    values = {part.name: getattr(section, part.name) for part in dataclasses.fields(section)}
    return {name: _plain(value) if isinstance(value, Section) else value for name, value in values.items()}
