"""The sections of a configuration, one dataclass each: what there is to set, and what it may be set to."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from annotated_types import Ge, Gt, Le

from pipelines.base import DataConfig
from pipelines.settings import (
    AboveZero,
    Always,
    Below1,
    Context,
    Json,
    Positive,
    Probability,
    ReadIf,
    Section,
    Share,
    Text,
    as_dict,
)
from pss.own_sections import MethodSection, OptionalSchedule, ScheduleConfig
from pss.plugins import is_plugin

__all__ = [
    "CompileConfig",
    "LossConfig",
    "MethodSection",
    "ModelConfig",
    "OptimConfig",
    "OptionalSchedule",
    "RunSettings",
    "ScheduleConfig",
    "TrainConfig",
    "model_of",
]

S = TypeVar("S", bound=Section)

LOGGERS = ("tensorboard", "wandb", "mlflow")
"""What shows the rows of a log (`pss.runs.loggers`)."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section, section="model"):
    """The Vision Transformer. A field left at None is what the named model has."""

    name: Always[Text] = "deit_small_patch16_224"
    """A timm ViT's name, or a preset of `pss.create_model`."""
    rel_pos: Always[Literal["none", "bias", "separable", "rope"] | None] = None
    """How attention knows relative positions: a learned bias, one that is the sum of rows and columns, or rotation."""
    sort: Always[Literal["magnitude", "random"]] = "magnitude"
    """How patches are ranked before the first ones are kept."""
    token_counts: Always[Literal["published", "aligned"]] = "published"
    """Kept tokens in whole numbers, as published, or in multiples of 8, which a GPU computes faster."""
    qkv_bias: Always[Literal["full", "qv"] | None] = None
    """Bias on queries, keys and values, or on queries and values only (BEiT)."""
    # Also where weights are given: they may lack a classifier, or bias tables, which then keep their initial values.
    init: Always[Literal["timm", "published"] | None] = None
    """Initial weights: timm's, or those of the published patch sampling runs."""
    patch_size: Always[Annotated[int, Ge(1), Le(4096)] | None] = None
    """Side of a patch, in pixels."""
    embed_dim: Always[Annotated[int, Ge(1), Le(1 << 17)] | None] = None
    """Width D."""
    depth: Always[Annotated[int, Ge(1), Le(4096)] | None] = None
    """Number of blocks."""
    num_heads: Always[Annotated[int, Ge(1), Le(4096)] | None] = None
    """Attention heads per block."""
    global_pool: Always[Literal["token", "avg"] | None] = None
    """What the classifier reads: the class token, or the mean of the kept patch tokens."""
    drop_path_rate: Always[Below1] = 0.0
    """Stochastic depth, rising linearly to this rate at the last block."""
    weights: Always[Text | None] = None
    """Where training starts: a weights file, the folder of a run or one that pss-eval pushed, or timm:NAME for a model
    of timm's with its pretrained weights; None starts from random ones. FILE#ema and RUN#ema take the moving average,
    and RUN#best the checkpoint of the best validation."""
    own_head: Annotated[bool, ReadIf(lambda at: at.own.weights is not None, "model.weights")] = False
    """Start with a new classifier, whatever the weights hold: for other classes, or weights without one."""

    def overrides(self) -> Json:
        """The keyword arguments for `pss.create_model` beside name, classes and image size."""
        own = as_dict(self)
        for name in ("name", "weights", "own_head"):
            del own[name]
        return {key: value for key, value in own.items() if value is not None}

    def check(self) -> None:
        if self.embed_dim is not None and self.num_heads is not None and self.embed_dim % self.num_heads:
            raise ValueError(
                f"model.embed_dim is {self.embed_dim}, which model.num_heads={self.num_heads} does not divide "
                f"evenly; set model.embed_dim={-(-self.embed_dim // self.num_heads) * self.num_heads}, or other heads"
            )


_Rate = Annotated[float, Ge(0), Le(1e30)]
_Epochs = Annotated[float, Ge(0), Le(1e6)]
_Warming = ReadIf(lambda at: at.own.warmup_epochs > 0, "optim.warmup_epochs above 0")


def _has_bias_tables(at: Context) -> bool:
    """A backbone of one's own may have them unless told otherwise."""
    model = at.run.model
    if model.rel_pos is None and is_plugin(model.name):
        return True
    return (model.rel_pos or at.preset.get("rel_pos")) in ("bias", "separable")


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Section, section="optim"):
    """AdamW with linear warm-up and cosine decay, per step."""

    in_epochs = ("warmup_epochs", "cooldown_epochs")

    lr: Always[AboveZero] = 5e-4
    """Peak learning rate at a global batch of `lr_batch`; it scales linearly with the global batch."""
    lr_batch: Always[Positive | None] = 512
    """The global batch that `lr` is given for; None switches scaling off."""
    min_lr: Always[_Rate] = 1e-5
    """Learning rate at the end, whatever the batch."""
    warmup_lr: Annotated[_Rate, _Warming] = 1e-6
    """Learning rate at step 0, whatever the batch."""
    warmup_epochs: Always[_Epochs] = 5.0
    """Length of the linear warm-up."""
    warmup_prefix: Annotated[bool, _Warming] = False
    """Begin the cosine where the warm-up ends, at the peak; otherwise it begins at step 0, as in DeiT's runs, and is
    past its peak when the warm-up ends."""
    cooldown_epochs: Always[_Epochs] = 0.0
    """The last epochs, at `min_lr`: the cosine ends where they begin."""
    weight_decay: Always[Annotated[float, Ge(0), Le(1e4)]] = 0.05
    """Decoupled weight decay; none on 1-D parameters, position embedding and class token."""
    betas: Always[tuple[Below1, Below1]] = (0.9, 0.999)
    """AdamW's averaging coefficients."""
    decay_rel_pos: Annotated[bool, ReadIf(_has_bias_tables, "model.rel_pos=bias or separable")] = True
    """Decay the tables of relative position biases too, as the published runs did."""
    layer_decay: Always[Share | None] = None
    """Factor on the learning rate from each layer to the one before it; None has all layers learn alike."""
    clip_grad: Always[AboveZero | None] = None
    """Largest gradient norm; None does not clip."""

    def peak_lr(self, batch_size: int) -> float:
        """The peak learning rate at a global batch of `batch_size` images."""
        return self.lr if self.lr_batch is None else self.lr * batch_size / self.lr_batch

    def check_rates(self, batch_size: int) -> None:
        """Raise `ValueError` where the rate would fall as it warms up, or rise as it decays."""
        peak = self.peak_lr(batch_size)
        above = [] if self.min_lr <= peak else ["min_lr"]
        if self.warmup_epochs and self.warmup_lr > peak:
            above.append("warmup_lr")
        if above:
            scaled = "" if self.lr_batch is None else f", given for a batch of {self.lr_batch}, at {batch_size} images"
            lower = " ".join(f"--set optim.{name}={peak / 100:.1e}" for name in above)
            raise ValueError(
                f"optim.lr ({self.lr:g}{scaled}) comes to {peak:.3g} at its peak, below "
                f"{' and '.join(f'optim.{name} ({getattr(self, name):g})' for name in above)}, so that it would "
                f"{'rise in its decay' if 'min_lr' in above else 'fall in its warm-up'}; raise optim.lr, or {lower}"
            )


_Alpha = Annotated[float, Ge(0), Le(1e6)]
_MixesPixels = ReadIf(lambda at: at.method.mixes(at.run) == "pixels", "a method that does not mix tokens instead")
_MixesEither = ReadIf(lambda at: at.own.mixup or at.own.cutmix, "loss.mixup or loss.cutmix above 0")
_MixesBoth = ReadIf(lambda at: at.own.mixup and at.own.cutmix, "loss.mixup and loss.cutmix above 0")


@dataclass(frozen=True, kw_only=True)
class LossConfig(Section, section="loss"):
    """Cross entropy, with soft targets where images are mixed."""

    label_smoothing: Always[Below1] = 0.0
    """Share of the target spread evenly over all classes."""
    mixup: Annotated[_Alpha, _MixesPixels] = 0.0
    """Alpha of mixup's Beta distribution; 0 is off."""
    cutmix: Annotated[_Alpha, _MixesPixels] = 0.0
    """Alpha of CutMix's Beta distribution; 0 is off."""
    mix_switch_prob: Annotated[Probability, _MixesPixels, _MixesBoth] = 0.5
    """How often CutMix takes mixup's place where both are on."""
    mix_mode: Annotated[Literal["batch", "elem"], _MixesPixels, _MixesEither] = "batch"
    """One draw for the whole batch, or one for each image."""


def _compiles(at: Context) -> bool:
    """While the device is not known, `auto` may yet compile."""
    if at.own.mode == "off" or not at.method.compiles:
        return False
    return at.own.mode == "on" or at.device in (None, "cuda")


_Compiled = ReadIf(_compiles, "compile.mode=on, or auto on a GPU, with a method whose model is compiled,")


@dataclass(frozen=True, kw_only=True)
class CompileConfig(Section, section="compile"):
    """`torch.compile` of the blocks, once for every token count; the rest is short and runs as it is."""

    mode: Always[Literal["auto", "on", "off"]] = "auto"
    """`auto` compiles on a GPU, where Triton is installed."""
    max_graphs: Annotated[int, Ge(1), Le(4096), _Compiled] = 8
    """Token counts that may be compiled, those of training and of validation; one more is an error."""
    cuda_graphs: Annotated[bool, _Compiled] = False
    """Replay what a graph launches on the GPU instead of launching it anew: for steps too short to keep it busy."""
    backend: Annotated[Literal["inductor", "aot_eager"], _Compiled] = "inductor"
    """`aot_eager` traces and generates no code, to tell whether a fault is the compiler's."""

    def check(self) -> None:
        if self.cuda_graphs and self.backend != "inductor":
            raise ValueError(
                f"compile.cuda_graphs records what compiled code launches, and compile.backend={self.backend} "
                "generates none; leave it false, or set compile.backend=inductor"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section, section="train"):
    """The run."""

    epochs: Always[Annotated[int, Ge(1), Le(10**6)]] = 300
    """Passes over the training images."""
    batch_size: Always[Annotated[int, Ge(1), Le(10**8)]] = 1024
    """Images per optimizer step over all processes."""
    seed: Always[Annotated[int, Ge(0), Le((1 << 63) - 1)]] = 0
    """Seed of weights, order, crops, mixing and random sampling."""
    precision: Always[Literal["auto", "fp32", "bf16"]] = "auto"
    """Arithmetic of the forward pass; `auto` is bf16 autocast on a GPU and fp32 on a CPU."""
    # Read where there are several processes, which a job may lose and come back without: never refused.
    parallel: Always[Literal["ddp", "fsdp"]] = "ddp"
    """What several processes do with the model: `ddp` gives each a whole one; `fsdp` gives each a share of every
    tensor, for models that do not fit one GPU, and does not compile."""
    accumulate: Always[Annotated[int, Ge(1), Le(10**6)]] = 1
    """Parts that each process computes its share of a batch in, one after the other, to save memory; what is learnt is
    what as many times the processes would learn."""
    checkpoint_activations: Always[bool] = False
    """Keep only what enters each block and compute the block once more in the backward pass: less memory, more time."""
    max_skipped: Always[Positive] = 10
    """Steps in a row with a loss or gradients that are not finite after which the run stops; each is skipped."""
    # As `parallel`.
    timeout_seconds: Always[Annotated[float, Gt(0), Le(1e7)]] = 600.0
    """How long a process waits for the others before the run fails."""
    ema_decay: Always[Below1] = 0.0
    """Decay of the moving average of the weights, per step; 0 keeps none."""
    num_workers: Always[Annotated[int, Ge(0), Le(1024)] | None] = None
    """Decoding threads or processes of the loader per rank; None takes the cores at hand."""
    log_every_steps: Always[Positive] = 50
    """Steps between two rows of `log.jsonl`."""
    loggers: Always[tuple[Text, ...]] = ("tensorboard",)
    """What shows the rows of `log.jsonl`: tensorboard, wandb, mlflow, or `package.module:Class` for one of your own."""
    checkpoint_every_minutes: Always[Annotated[float, Gt(0), Le(1e6)]] = 15.0
    """Longest time between two checkpoints; one is also written after every epoch."""
    keep_checkpoints: Always[Positive] = 2
    """How many of the newest checkpoints are kept; the best one, and the newest of an epoch's end, are kept as well."""
    max_steps: Always[Annotated[int, Ge(1), Le(10**12)] | None] = None
    """Stop after so many steps, with a checkpoint; learning rate and rho keep the course `epochs` gives them."""

    def check(self) -> None:
        for name in self.loggers:
            if name not in LOGGERS and not is_plugin(name):
                raise ValueError(
                    f"train.loggers: there is no logger {name!r}; name {', '.join(LOGGERS)}, or package.module:Class"
                )


@dataclass(frozen=True, kw_only=True)
class RunSettings(Section):
    """All settings of one run, as a method is given them; `pss.config.Config` holds them against the method."""

    recipe: Always[str]
    """The recipe this began as."""
    method: Always[Text] = "sampled"
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
        grow = self.data.progressive
        if grow.start_size is not None and grow.end_epoch >= self.train.epochs:
            raise ValueError(
                f"data.progressive.end_epoch is {grow.end_epoch} and train.epochs {self.train.epochs}; the run would "
                f"never see images of full size: --set data.progressive.end_epoch={self.train.epochs * 4 // 5} "
                f"--set data.progressive.begin_epoch={self.train.epochs // 5}"
            )
        if self.data.window is not None and self.train.batch_size % self.data.groups:
            raise ValueError(
                f"data.groups is {self.data.groups}, which does not divide train.batch_size={self.train.batch_size} "
                f"into equal parts; set data.groups={math.gcd(self.data.groups, self.train.batch_size)}"
            )
        if self.train.parallel == "fsdp" and self.compile.mode == "on":
            raise ValueError(
                "train.parallel is fsdp, whose sharded blocks are not compiled; set compile.mode=auto, or "
                "train.parallel=ddp"
            )
        self.optim.check_rates(self.train.batch_size)
        if self.optim.warmup_epochs + self.optim.cooldown_epochs > self.train.epochs:
            raise ValueError(
                f"optim.warmup_epochs ({self.optim.warmup_epochs}) and optim.cooldown_epochs "
                f"({self.optim.cooldown_epochs}) are longer than the run (train.epochs={self.train.epochs}); lower "
                "them, for example --set optim.warmup_epochs=0"
            )
        for section in self.own:
            section.check_run(self)

    def section_of(self, kind: type[S]) -> S:
        """The section of that type, one of the method's own. Raises `KeyError` where the method has none."""
        for section in self.own:
            if isinstance(section, kind):
                return section
        raise KeyError(f"method {self.method} has no settings called {kind.section}")

    def having(self, *sections: Section) -> Self:
        """A copy with these sections of the method's own in the place of those of the same type."""
        kinds = tuple(map(type, sections))
        return dataclasses.replace(self, own=(*(one for one in self.own if not isinstance(one, kinds)), *sections))


def model_of(run: Path) -> ModelConfig:
    """What the run in a folder is a model of. Raises `ValueError` where the folder holds no run."""
    path = run / "config.json"
    try:
        return ModelConfig.from_dict(json.loads(path.read_text(encoding="utf-8"))["model"])
    except FileNotFoundError:
        raise ValueError(f"{path} not found; name the --output folder of a pss-train run") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is no run configuration of this version of pss ({error}); use the version that wrote it"
        ) from None
