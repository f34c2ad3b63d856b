"""Everything a run is made of, as nested frozen dataclasses.

A recipe (`pss.recipes`) is a function that returns a `Config`; `--set section.key=value` changes fields of it;
the result is saved with the run as `config.json`. Values are checked at construction, so a `Config` that exists
is valid.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pipelines.base import DataConfig

Json = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
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
        own = dataclasses.asdict(self)
        for name in ("name", "weights", "own_head"):
            del own[name]
        return {key: value for key, value in own.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The patch sampling schedule, rho as a function of the step. The dense method ignores it."""

    name: Literal["fixed", "linear", "cosine", "cyclic", "list"] = "cyclic"
    """The shape over time."""
    form: Literal["published", "cut", "symmetric"] = "published"
    """`published` overshoots to a drop of -0.1 before clamping, which gives rho = 1 a full share of the steps;
    `symmetric` stops at a drop of 0. The `published` climb of linear and cosine ends where the cooldown begins; `cut`
    is the same climb over the whole run, whose end the cooldown cuts off."""
    low: float = 0.2
    """Smallest rho of linear, cosine and cyclic."""
    high: float = 1.0
    """Largest rho of linear, cosine and cyclic."""
    rho: float = 0.6
    """The constant rho of `fixed`."""
    rhos: tuple[float, ...] = ()
    """The values of `list`, one a step, over and over."""
    period_steps: int | None = None
    """Length of a cycle, in steps; None is one epoch, as published."""
    shuffle: bool = False
    """Take the steps of each cycle (of each epoch, where there are no cycles) in random order: the same levels as
    often, so that a loader needs to keep up with their average only."""
    cooldown_epochs: int = 0
    """The last epochs, at rho = 1."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
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
    layer_decay: float | None = None
    """Factor on the learning rate from each layer to the one before it; None has all layers learn alike."""
    clip_grad: float | None = None
    """Largest gradient norm; None does not clip."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Cross entropy, with soft targets where images are mixed."""

    label_smoothing: float = 0.0
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
class CompileConfig:
    """`torch.compile` of the blocks, once for every token count; the rest is short and runs as it is."""

    mode: Literal["auto", "on", "off"] = "auto"
    """`auto` compiles on a GPU, where Triton is installed."""
    max_graphs: int = 8
    """Token counts that may be compiled, those of training and of validation; one more is an error."""
    cuda_graphs: bool = False
    """Replay what a graph launches on the GPU instead of launching it anew: for steps too short to keep it busy."""
    backend: Literal["inductor", "aot_eager"] = "inductor"
    """`aot_eager` traces and generates no code, to tell whether a fault is the compiler's."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run."""

    epochs: int = 300
    """Passes over the training images."""
    batch_size: int = 1024
    """Images per optimizer step over all processes."""
    seed: int = 0
    """Seed of weights, order, crops, mixing and random sampling."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the forward pass; `auto` is bf16 autocast on a GPU and fp32 on a CPU."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """What several processes do with the model: `ddp` gives each a whole one; `fsdp` gives each a share of every
    tensor, for models that do not fit one GPU, and does not compile."""
    accumulate: int = 1
    """Parts that each process computes its share of a batch in, one after the other, to save memory; what is learnt is
    what as many times the processes would learn."""
    checkpoint_activations: bool = False
    """Keep only what enters each block and compute the block once more in the backward pass: less memory, more time."""
    max_skipped: int = 10
    """Steps in a row with a loss or gradients that are not finite after which the run stops; each is skipped."""
    timeout_seconds: float = 600.0
    """How long a process waits for the others before the run fails."""
    ema_decay: float = 0.0
    """Decay of the moving average of the weights, per step; 0 keeps none."""
    num_workers: int | None = None
    """Decoding threads or processes of the loader per rank; None takes the cores at hand."""
    prefetch_mb: float = 512.0
    """Decoded batches kept ready per process, in MiB (on the GPU where there is one), so that short steps can draw on
    what long ones left time for; 0 keeps none."""
    log_every_steps: int = 50
    """Steps between two rows of `log.jsonl`."""
    checkpoint_every_minutes: float = 15.0
    """Longest time between two checkpoints; one is also written after every epoch."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints are kept; the best one, and the newest of an epoch's end, are kept as well."""
    max_steps: int | None = None
    """Stop after so many steps, with a checkpoint; learning rate and rho keep the course `epochs` gives them."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run, complete."""

    recipe: str
    """The recipe this began as."""
    method: str = "sampled"
    """How the model is trained: a name in `pss.methods`."""
    model: ModelConfig = field(default_factory=ModelConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        _check_choices(self, "")
        _require_positive(
            self.train,
            "train",
            *("epochs", "batch_size", "log_every_steps", "keep_checkpoints", "accumulate", "max_skipped"),
        )
        _require_positive(self.compile, "compile", "max_graphs")
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
        if self.compile.cuda_graphs and (self.compile.mode == "off" or self.compile.backend != "inductor"):
            raise ValueError(
                "compile.cuda_graphs records what compiled code launches; leave it false, or set compile.mode=auto and "
                "compile.backend=inductor"
            )
        for name in ("low", "high", "rho"):
            value = getattr(self.schedule, name)
            if not 0 < value <= 1:
                raise ValueError(f"schedule.{name} is {value}; rho is the kept share of patches and lies in (0, 1]")
        if (self.schedule.name == "list") != bool(self.schedule.rhos):
            raise ValueError(
                f"schedule.name is {self.schedule.name} and schedule.rhos holds {len(self.schedule.rhos)} values; "
                "a list of values goes with schedule.name=list, and with nothing else"
            )
        if not all(0 < rho <= 1 for rho in self.schedule.rhos):
            raise ValueError(f"schedule.rhos is {self.schedule.rhos}; kept shares lie in (0, 1]")
        if self.schedule.period_steps is not None and self.schedule.period_steps < 1:
            raise ValueError(f"schedule.period_steps is {self.schedule.period_steps}; a cycle has at least 1 step")
        if self.schedule.low > self.schedule.high:
            raise ValueError(f"schedule.low ({self.schedule.low}) is above schedule.high ({self.schedule.high})")
        if not 0 <= self.schedule.cooldown_epochs <= self.train.epochs:
            raise ValueError(
                f"schedule.cooldown_epochs is {self.schedule.cooldown_epochs}; "
                f"it must lie between 0 and the run's {self.train.epochs} epochs (--set schedule.cooldown_epochs=0)"
            )
        if not 0 < self.train.timeout_seconds < float("inf"):
            raise ValueError(f"train.timeout_seconds is {self.train.timeout_seconds}; it must be above 0")
        if self.train.prefetch_mb < 0:
            raise ValueError(f"train.prefetch_mb is {self.train.prefetch_mb}; it must be at least 0, which is off")
        if not 0 <= self.train.ema_decay < 1:
            raise ValueError(f"train.ema_decay is {self.train.ema_decay}; it must lie in [0, 1)")
        if not 0 <= self.loss.label_smoothing < 1:
            raise ValueError(f"loss.label_smoothing is {self.loss.label_smoothing}; it must lie in [0, 1)")
        if self.optim.layer_decay is not None and not 0 < self.optim.layer_decay <= 1:
            raise ValueError(f"optim.layer_decay is {self.optim.layer_decay}; it must lie in (0, 1], or be none")
        if self.optim.warmup_epochs > self.train.epochs:
            raise ValueError(
                f"optim.warmup_epochs ({self.optim.warmup_epochs}) is longer than the run "
                f"(train.epochs={self.train.epochs}); lower it, for example --set optim.warmup_epochs=0"
            )

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, path: Path) -> Config:
        """Read a run's `config.json`. Raises `ValueError` naming the file where it cannot be read."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            return _from_dict(Config, raw)
        except FileNotFoundError:
            raise ValueError(f"{path} not found; name the --output folder of a pss-train run") from None
        except (json.JSONDecodeError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is no run configuration of this version of pss ({error})") from None

    def with_settings(self, settings: Sequence[str]) -> Config:
        """A copy with `section.key=value` settings applied. Raises `ValueError` that suggests the nearest key."""
        tree = dataclasses.asdict(self)
        known = [key for key in _flatten(tree) if key != "recipe"]
        for setting in settings:
            key, separator, text = (part.strip() for part in setting.partition("="))
            if not separator:
                raise ValueError(f"--set {setting}: write section.key=value, for example train.epochs=10")
            if key not in known:
                raise ValueError(f"--set {setting}: there is no key {key!r}{_nearest(key, known)}")
            *sections, name = key.split(".")
            kind: Any = type(self)
            branch = tree
            for section in sections:
                kind, branch = get_type_hints(kind)[section], branch[section]
            hint = get_type_hints(kind)[name]
            try:
                branch[name] = _parse(text, hint)
            except ValueError:
                raise ValueError(f"--set {setting}: {text!r} is not {_describe(hint)}") from None
        return _from_dict(Config, tree)


def differing_fields(a: Config, b: Config) -> list[str]:
    """`section.key (a's value, b's value)` for every field in which two configurations differ."""
    flat_a, flat_b = _flatten(dataclasses.asdict(a)), _flatten(dataclasses.asdict(b))
    return [f"{key} ({flat_a[key]!r}, {flat_b[key]!r})" for key in flat_a if flat_a[key] != flat_b[key]]


def _flatten(tree: Json, prefix: str = "") -> Json:
    flat: Json = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _nearest(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not near:
        # People often leave the section out: compare the last part on its own as well.
        last = key.split(".")[-1]
        near = [k for k in known if difflib.get_close_matches(last, [k.split(".")[-1]], cutoff=0.6)]
    return f"; did you mean {near[0]}?" if near else f"; keys are {', '.join(known)}"


def _parse(text: str, hint: Any) -> Any:
    """`text` as a value of type `hint`; ValueError where it is none."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        inner = next(a for a in args if a is not type(None))
        is_choice = get_origin(inner) is Literal and text in get_args(inner)  # model.rel_pos has a choice named none
        if text.lower() in ("none", "null") and type(None) in args and not is_choice:
            return None
        return _parse(text, inner)
    if origin is Literal:
        if text not in args:
            raise ValueError
        return text
    if origin is tuple:
        parts = [part for part in text.strip("()[] ").split(",") if part.strip()]
        if args[-1] is Ellipsis:
            args = args[:1] * len(parts)
        if len(parts) != len(args):
            raise ValueError
        return tuple(_parse(part.strip(), arg) for part, arg in zip(parts, args, strict=True))
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError
        return text.lower() == "true"
    if hint in (int, float):
        return hint(text)
    assert hint is str
    return text


def _describe(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        inner = next(a for a in args if a is not type(None))
        return f"{_describe(inner)}{' or none' if type(None) in args else ''}"
    if origin is Literal:
        return "one of " + ", ".join(args)
    if origin is tuple:
        return f"{'' if args[-1] is Ellipsis else f'{len(args)} '}numbers with commas between them"
    return {int: "a whole number", float: "a number", bool: "true or false"}.get(hint, "a text")


def _from_dict(kind: type[T], raw: Json) -> T:
    hints = get_type_hints(kind)
    unknown = set(raw) - set(hints)
    if unknown:
        raise KeyError(f"unknown keys {sorted(unknown)}")
    values: Json = {}
    for name, value in raw.items():
        section = hints[name]
        if isinstance(section, type) and dataclasses.is_dataclass(section):
            values[name] = _from_dict(section, value)
        else:
            values[name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def _check_choices(section: Any, prefix: str) -> None:
    hints = get_type_hints(type(section))
    for f in dataclasses.fields(section):
        value, hint = getattr(section, f.name), hints[f.name]
        if dataclasses.is_dataclass(value):
            _check_choices(value, f"{prefix}{f.name}.")
            continue
        choices = [hint, *get_args(hint)] if get_origin(hint) in (Union, types.UnionType) else [hint]
        for choice in choices:
            if get_origin(choice) is Literal and value is not None and value not in get_args(choice):
                raise ValueError(f"{prefix}{f.name} is {value!r}; use one of {', '.join(map(str, get_args(choice)))}")


def _require_positive(section: Any, prefix: str, *names: str) -> None:
    for name in names:
        if getattr(section, name) < 1:
            raise ValueError(f"{prefix}.{name} is {getattr(section, name)}; it must be at least 1")
