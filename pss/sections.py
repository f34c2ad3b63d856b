"""The sections of a configuration, one dataclass each: what there is to set, and what it may be set to."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pipelines.base import DataConfig
from pipelines.settings import AboveZero, Below1, Json, Natural, NotNegative, Positive, Section, Share, as_dict

S = TypeVar("S", bound=Section)


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
    """Where training starts: a weights file, the folder of a run or one that pss-eval pushed, or timm:NAME for a model
    of timm's with its pretrained weights; None starts from random ones. FILE#ema and RUN#ema take the moving average,
    and RUN#best the checkpoint of the best validation."""
    own_head: bool = False
    """Start with a new classifier, whatever the weights hold: for other classes, or weights without one."""

    def overrides(self) -> Json:
        """The keyword arguments for `pss.create_model` beside name, classes and image size."""
        own = as_dict(self)
        for name in ("name", "weights", "own_head"):
            del own[name]
        return {key: value for key, value in own.items() if value is not None}


class MethodSection(Section):
    """Base of the settings that a training method brings along; see `pss.methods.contract.Method.sections`."""

    def check_run(self, config: Any) -> None:
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

    def check_run(self, config: Any) -> None:
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
    warmup_epochs: NotNegative = 5.0
    """Length of the linear warm-up."""
    cooldown_epochs: NotNegative = 0.0
    """The last epochs, at `min_lr`: the cosine ends where they begin."""
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
class RunSettings(Section):
    """All settings of one run, as a method is given them; `pss.config.Config` holds them against the method."""

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
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no run configuration of this version of pss ({error})") from None
