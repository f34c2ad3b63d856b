"""The contract between a training method and everything else.

Training (`pss.training`) owns steps, epochs, devices, checkpoints and logs; planning and inference own tables, pictures
and files. A method owns what happens inside a step, what it costs, and at which operating points its model can be run.
None of them knows a method by name.

A method is one `nn.Module`: DDP or FSDP wraps all of it, and whatever it must remember lives in parameters and buffers,
so that a checkpoint of the module is a checkpoint of the method. Teachers stay outside. Modules of its own belong to
the method, not into its model, whose names and costs are those of the backbone; blocks are called whole, as shards
need it.
`docs/methods.md` builds one from nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn

from pss.methods.teacher import Teacher
from pss.methods.vocabulary import Cost, DenseTargets, Phase, Point, Progress, Stage, Step
from pss.models.flops import macs
from pss.models.maps import attention_maps
from pss.models.vit import VisionTransformer
from pss.sections import MethodSection, RunSettings


class Method(nn.Module):
    """A model and the way it is trained and run. Subclasses implement `forward`; the other parts have defaults, those
    of a model that takes any share ρ of its patches."""

    name: ClassVar[str]
    """What `--set method=NAME` asks for."""
    sections: ClassVar[tuple[type[MethodSection], ...]] = ()
    """Settings of its own, each reachable as `--set SECTION.KEY=VALUE`; read with `config.section_of(TYPE)`."""
    compiles: ClassVar[bool] = True
    """Whether what it does in a training step goes through `model.compute` with few shapes, as calling the model as a
    whole does: one for each stage, and one for validation. Then it may be compiled."""
    shards: ClassVar[bool] = True
    """Whether it can be trained with `train.parallel=fsdp`."""
    costs_vary: ClassVar[bool] = False
    """Whether what a prediction costs depends on the image; then `predict_with_cost` says what each did cost."""
    knob: ClassVar[str] = "ρ"
    """What an operating point is the value of, as tables call it."""

    model: VisionTransformer

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        missing = [name for name in _GO_WITH_PREDICT if getattr(cls, name) is getattr(Method, name)]
        if cls.predict is not Method.predict and missing:
            raise TypeError(
                f"{cls.__name__} has a predict of its own; it must say what that costs and keeps: {', '.join(missing)}"
            )

    def __init__(self, model: VisionTransformer, config: RunSettings, steps_per_epoch: int) -> None:
        """Nothing is read from files here: plans are made of methods on the `meta` device."""
        super().__init__()
        self.model = model
        self.config = config
        self.steps_per_epoch = steps_per_epoch
        self.teachers: dict[str, Teacher] = {}
        """By name; loaded before training begins, and checked by their hashes where a run is resumed."""

    @classmethod
    def mixes(cls, settings: RunSettings) -> Literal["pixels", "tokens"]:
        """Who mixes images: the loop, whose mixup and CutMix mix pixels, or the method, which is given none mixed."""
        return "pixels"

    @classmethod
    def wants(cls, settings: RunSettings) -> frozenset[Literal["view", "maps"]]:
        """What of `DenseTargets` its loss needs."""
        return frozenset()

    # A training step.

    def forward(
        self, images: Tensor, targets: Tensor, at: Progress, dense: DenseTargets | None = None
    ) -> dict[str, Tensor]:
        """One training forward.

        Args:
            images: float, normalised, (B, 3, S, S); with progressive resizing smaller than the model's own at first.
            targets: class indices, int64 (B,), or class probabilities (B, classes) where images are mixed.
            at: the current position.
            dense: what `wants` asks for; None if it asks for nothing.

        Returns:
            `loss` (scalar, to be minimised), `logits` (B, classes), and any further scalars worth logging.
        """
        raise NotImplementedError

    def begin_run(self, images: Tensor) -> None:
        """Called once in a run, before its first step, with images of its first batch as `forward` takes them: to set
        buffers by what the weights make of them. Every process, and the moving average, go on with the first one's."""

    def check_phase(self, phase: Phase) -> None:
        """Raise `ValueError` where the phase cannot follow what the run has learnt so far. Not asked where all that
        counts is time."""

    def begin_phase(self, phase: Phase) -> None:
        """Called before the phase's optimizer is built, also when a run is resumed inside the phase."""

    def begin_epoch(self, at: Progress) -> None:
        """Called before the first step of an epoch, or of what is left of it, after `train()`: to hold statistics of a
        frozen part in evaluation mode, say."""

    def begin_step(self, at: Progress) -> None:
        """Called before the forward pass of a step, whose parts may be several: to probe weights, say."""

    def mask_gradients(self, at: Progress) -> None:
        """Called when gradients are averaged over processes, before their norm is taken and clipped."""

    def after_optimizer(self, at: Progress, step: Step) -> None:
        """Called right after the optimizer step, before the moving average (to re-apply weight masks, say), also where
        the step was skipped."""

    def after_average(self, at: Progress) -> None:
        """Called on the moving average of the method, whenever it has moved (to mask its weights, say)."""

    def end_step(self, at: Progress, step: Step) -> None:
        """Called last in a step, while the averaged gradients are still there (to move masks, say)."""

    # What is optimized.

    def phases(self) -> list[Phase]:
        """The phases of the run, in order; their epochs add up to the run's."""
        return [Phase(name="train", epochs=self.config.train.epochs, optim=self.config.optim)]

    def param_groups(self, phase: Phase) -> list[dict[str, Any]]:
        """Optimizer groups: decay on matrices, none on 1-D parameters, position embedding and class token.

        A group may carry `lr_scale`, a factor on the phase's peak learning rate (minimum and warm-up rate are the same
        for all groups), and `name`, by which `lr_factors` knows it. By default rates fall towards the input where
        `optim.layer_decay` says so.
        """
        optim = phase.optim
        exempt = set(self.model.no_weight_decay())
        if not optim.decay_rel_pos:
            exempt |= {name for name, _ in self.model.named_parameters() if name.endswith("position_bias_table")}
        if optim.layer_decay is None:
            groups: list[dict[str, Any]] = param_groups_weight_decay(
                self, weight_decay=optim.weight_decay, no_weight_decay_list={f"model.{name}" for name in exempt}
            )
        else:
            groups = param_groups_layer_decay(
                self.model,
                weight_decay=optim.weight_decay,
                no_weight_decay_list=exempt,
                layer_decay=optim.layer_decay,
            )
            within = set(map(id, self.model.parameters()))
            others = [part for part in self.parameters() if id(part) not in within and part.requires_grad]
            groups.append({"params": others, "weight_decay": optim.weight_decay})
        return [group for group in groups if group["params"]]

    def lr_factors(self, at: Progress) -> Mapping[str, float]:
        """Factors on the learning rates of named groups at this step; 0 freezes a group, whose moments go on.

        They scale the whole course, warm-up and minimum too, where `lr_scale` of a group scales its peak alone.
        """
        return {}

    # What training costs.

    def stage(self, at: Progress) -> Stage:
        """The stage that a step belongs to."""
        return Stage()

    def course(self) -> str:
        """Which share of the patches comes when, in a line for the plan and for a run's first screen.

        By default it is read off the stages; a method with a schedule can say it better.
        """
        shares = {1.0}
        if type(self).stage is not Method.stage:
            train, per_epoch = self.config.train, self.steps_per_epoch
            phases = [number for number, phase in enumerate(self.phases()) for _ in range(phase.epochs)]
            total = len(phases) * per_epoch
            positions = (
                Progress(step, total, step // per_epoch, train.epochs, train.seed, 0, phases[step // per_epoch])
                for step in range(total)
            )
            shares = {self.stage(at).rho for at in positions}
        low, high = min(shares), max(shares)
        return f"ρ: {low:g} throughout" if low == high else f"ρ: {low:g} to {high:g}, {len(shares)} levels"

    def training_tokens(self, stage: Stage, image_size: int | None = None) -> tuple[int, ...]:
        """Tokens of an image that each block sees in steps of a stage, prefix tokens included.

        `image_size` is the side of images with a lower resolution than the model's own.
        """
        return (self.model.num_kept_tokens(stage.rho, image_size),) * len(self.model.blocks)

    def training_cost(self, stage: Stage, image_size: int | None = None) -> Cost:
        """Of a step of that stage; `image_size` as in `training_tokens`."""
        return Cost(macs(self.model, stage.rho, image_size), teacher=self._teachers_macs())

    def _teachers_macs(self) -> int:
        return sum(teacher.macs for teacher in self.teachers.values())

    def facts(self) -> dict[str, float]:
        """Figures of the method's own that belong beside accuracy and cost, by name: for each epoch's row of the log,
        and the sweep's. Where weights are zero and computed all the same, `active_params` and `theoretical_gflops` are
        what is left without them."""
        return {}

    # What the trained model can do.

    def deployed(self) -> Method:
        """What is evaluated and timed once training is over: another method around a smaller model, where weights that
        are masked can be taken out."""
        return self

    def points(self) -> tuple[Point, ...]:
        """The operating points that a sweep shows unless told otherwise; the first is the one that validation takes."""
        return (1.0, 0.8, 0.6, 0.4, 0.2)

    def fine_points(self) -> tuple[float, ...]:
        """All operating points that differ, ascending, for the choice of one: one ρ for every count of tokens.

        Raises:
            ValueError: there is nothing to choose.
        """
        if self.points() == (None,):
            raise ValueError(f"method {self.name} has no operating point to choose; evaluate it as trained")
        model = self.model
        return tuple(count / model.num_tokens for count in range(model.num_prefix_tokens + 1, model.num_tokens + 1))

    def cheaper_points(self, candidates: Iterable[float]) -> tuple[float, ...]:
        """1, and those of the candidates that cost less than every larger one, ascending."""
        found, least = [1.0], self.cost(1.0).forward
        for point in sorted(candidates, reverse=True):
            if (cost := self.cost(point).forward) < least:
                found, least = [point, *found], cost
        return tuple(found)

    def check_point(self, point: Point) -> None:
        """Raise `ValueError` for an operating point that the model cannot be run at."""
        if self.points() == (None,):
            if point is not None:
                raise ValueError(f"method {self.name} has no {self.knob} to set, got {point:g}; leave out --rho")
        elif point is None or not 0 < point <= 1:
            raise ValueError(f"{self.knob} is {point}; it lies in (0, 1]")

    def predict(self, images: Tensor, point: Point = 1.0) -> Tensor:
        """Logits (B, classes) as at inference; `point` is one that `check_point` lets pass."""
        assert point is not None
        logits: Tensor = self.model(images, rho=point)
        return logits

    def predict_with_cost(self, images: Tensor, point: Point = 1.0) -> tuple[Tensor, Tensor]:
        """Logits, and the multiply-accumulates of each image, float (B,)."""
        logits = self.predict(images, point)
        return logits, torch.full((len(images),), float(self.cost(point).forward), device=logits.device)

    def tokens(self, point: Point = 1.0) -> tuple[int, ...]:
        """Tokens of an image that each block sees at an operating point, at most."""
        assert point is not None
        return (self.model.num_kept_tokens(point),) * len(self.model.blocks)

    def cost(self, point: Point = 1.0) -> Cost:
        """Of a prediction at an operating point, at most."""
        assert point is not None
        return Cost(macs(self.model, point))

    def depths(self, images: Tensor, point: Point = 1.0) -> Tensor:
        """How many blocks each patch of the grid goes through, int64 (B, patches): all for one that is kept throughout,
        0 for one that no block sees."""
        assert point is not None
        return self.depths_of(images, self.model.sample(self.model.embed(images), point)[1])

    def depths_of(self, images: Tensor, kept: Tensor | None) -> Tensor:
        """`depths` where the patches `kept` (B, k) go through all blocks and the others through none; None for all."""
        shape, depth = (images.shape[0], self.model.num_patches), len(self.model.blocks)
        if kept is None:
            return torch.full(shape, depth, device=images.device)
        return torch.zeros(shape, dtype=torch.int64, device=images.device).scatter_(1, kept, depth)

    def attention_maps(self, images: Tensor, point: Point = 1.0, blocks: Sequence[int] | None = None) -> list[Tensor]:
        """Attention weights (B, H, K, K) of some blocks, of all by default; zero where a query must not see a key."""
        assert point is not None
        model = self.model
        tokens, kept = model.sample(model.embed(images), point)
        return attention_maps(model, tokens, kept, blocks)

    def export_module(self, point: Point) -> nn.Module:
        """A module of images (B, 3, S, S) to logits at one operating point, which `torch.export` can trace.

        Raises:
            ValueError: there can be none.
        """
        if type(self).predict is not Method.predict:
            return _AtPoint(self, point)
        assert point is not None
        if self.model.sort != "magnitude" and point != 1.0:
            raise ValueError("it keeps random patches, and a file must choose the same each time; add --sort magnitude")
        return _AtRho(self.model, point)

    def export_dynamic(self) -> nn.Module:
        """A module of images (B, 3, S, S) and `num_patches`, a scalar int64, to logits.

        Raises:
            ValueError: there can be none.
        """
        if type(self).predict is not Method.predict:
            raise ValueError(f"method {self.name} has no free number of patches; export one operating point")
        if self.model.sort != "magnitude":
            raise ValueError("it keeps random patches, and a file must choose the same each time; add --sort magnitude")
        return _AtNumPatches(self.model)

    # What losses share.

    def classification_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy against class indices (smoothed as configured) or given probabilities (used as they are)."""
        smoothing = 0.0 if targets.is_floating_point() else self.config.loss.label_smoothing
        return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)


_GO_WITH_PREDICT = ("tokens", "cost", "depths", "attention_maps", "points")
"""What describes the prediction that it stands beside, and is wrong where only that is replaced."""


class _AtPoint(nn.Module):
    """A method's own prediction at one operating point."""

    def __init__(self, method: Method, point: Point) -> None:
        super().__init__()
        self.method, self.point = method, point

    def forward(self, images: Tensor) -> Tensor:
        return self.method.predict(images, self.point)


class _AtRho(nn.Module):
    """A model at one share of its patches."""

    def __init__(self, model: VisionTransformer, rho: float) -> None:
        super().__init__()
        self.model, self.rho = model, rho

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images, rho=self.rho, sort="magnitude")
        return logits


class _AtNumPatches(nn.Module):
    """A model with any number of its patches; with all of them it takes the same way as with fewer."""

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, num_patches: Tensor) -> Tensor:
        count: Any = num_patches.item()
        torch._check(count >= 1)
        torch._check(count <= self.model.num_patches)
        return self.model.readout(self.model.trunk(*self.model.keep(self.model.embed(images), count)))
