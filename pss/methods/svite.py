"""SViTE: a sparse Vision Transformer trained from scratch, whose weights are dropped and grown as it learns.

A random part of the weights is there from the first step. Every so often the smallest of them are dropped, and as many
of the others grow, where gradients are largest. With a token selector it is SViTE+. Chen et al., NeurIPS 2021,
https://arxiv.org/abs/2106.04533
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from pipelines.settings import Always, Positive, Probability, ReadIf, Share
from pss.methods.contract import Method
from pss.methods.dense import Dense
from pss.methods.parts.selector import Selector, num_selected, temperature
from pss.methods.parts.topology import Course, Distribution, Masks, densities, hide, move, random_mask
from pss.methods.vocabulary import Cost, DenseTargets, Phase, Point, Progress, Stage, Step
from pss.models.flops import linear_macs, macs, macs_of_tokens
from pss.models.maps import attention_maps
from pss.models.sampling import gather, step_generator
from pss.models.vit import VisionTransformer
from pss.runtime.processes import share
from pss.runtime.shards import whole
from pss.sections import MethodSection, RunSettings

_Sparse = ReadIf(lambda at: at.own.sparse, "a density below 1")
_Moving = ReadIf(lambda at: at.own.sparse and at.own.end > 0, "a density below 1, and an end above 0,")


@dataclass(frozen=True, kw_only=True)
class TopologySettings(MethodSection):
    """When the masks of a sparse model move, and the selector of tokens."""

    interval: Annotated[Positive | None, _Moving] = None
    """Steps from one update of the masks to the next; None is a hundredth of the run."""
    end: Annotated[Probability, _Sparse] = 0.8
    """Share of the run after which masks stay as they are; 0 leaves them as they were drawn."""
    drop: Annotated[Probability, _Moving] = 0.5
    """Share of the active units that an update replaces, at first."""
    min_drop: Annotated[Probability, _Moving] = 0.005
    """What that share falls to, along a cosine over the whole run."""
    keep: Always[Share | None] = None
    """Share of the tokens that a learnt selector lets into the first block; None has no selector."""

    @property
    def sparse(self) -> bool:
        """Whether anything is masked."""
        raise NotImplementedError

    def check(self) -> None:
        if self.min_drop > self.drop:
            raise ValueError(
                f"{self.section}.min_drop is {self.min_drop:g} and {self.section}.drop {self.drop:g}, which falls to "
                f"it; set {self.section}.min_drop to {self.drop:g} or less"
            )

    def course(self, total_steps: int) -> Course:
        return Course.of(total_steps, self.interval, self.end, self.drop, self.min_drop)

    def check_steps(self, config: Any, steps_per_epoch: int) -> None:
        course = self.course(config.train.epochs * steps_per_epoch)
        if self.interval is not None and self.sparse and self.end and not course.last_step:
            raise ValueError(
                f"{self.section}.interval is {self.interval:,} steps, and masks move in the first "
                f"{math.ceil(self.end * course.total_steps):,} of the run's {course.total_steps:,}, so that they never "
                f"would; leave {self.section}.interval out, or set {self.section}.end=0 for masks that stay"
            )


@dataclass(frozen=True, kw_only=True)
class SViTESettings(TopologySettings, section="svite"):
    """Sparsity of single weights; the defaults are the published ones of DeiT-S at half its weights."""

    density: Always[Share] = 0.5
    """Share of the weights that are there."""
    distribution: Annotated[Distribution, _Sparse] = "erk"
    """How it is spread over the matrices: more for small ones (Erdős-Rényi kernel), or the same for all."""
    weights: Annotated[Literal["blocks", "release"], _Sparse] = "blocks"
    """What is sparse: the matrices of the blocks, or, as in the authors' code, patch embedding and classifier too."""
    regrow: Annotated[bool, _Moving] = True
    """Whether what an update drops may grow again in the same one."""
    reference: Always[bool] = False
    """What the authors' code does where it is wrong; docs/rivals.md says what."""

    @property
    def sparse(self) -> bool:
        return self.density < 1


class SparseTraining(Method):
    """What the methods of the paper share: the course of their masks, and the selector of tokens.

    Without a selector the model takes any share ρ of its patches, as any other. With one, ρ is the share of the tokens
    that the selector lets in.
    """

    def __init__(
        self,
        model: VisionTransformer,
        config: RunSettings,
        steps_per_epoch: int,
        own: TopologySettings,
        reference: bool,
    ) -> None:
        super().__init__(model, config, steps_per_epoch)
        self.topology, self.keep, self.reference = own, own.keep, reference
        self.updates = own.course(config.train.epochs * steps_per_epoch)
        self.selector = None if own.keep is None else Selector(model.embed_dim)

    # A training step.

    def moves(self, at: Progress) -> bool:
        """Whether the masks move at the end of a step."""
        return self.topology.sparse and self.updates.moves(at.step)

    def forward(
        self, images: Tensor, targets: Tensor, at: Progress, dense: DenseTargets | None = None
    ) -> dict[str, Tensor]:
        tokens, places = self.model.see(images, 1.0, low_resolution=True)
        if self.selector is not None:
            tokens, places = self._draw(self.selector, tokens, places, at)
        logits = self.model.readout(self._through(tokens, places, at))
        return {"loss": self.classification_loss(logits, targets), "logits": logits}

    def _through(self, tokens: Tensor, places: Tensor | None, at: Progress) -> Tensor:
        """All blocks and the last norm."""
        normed: Tensor = self.model.compute(self.model.trunk, tokens, places)
        return normed

    def _draw(
        self, selector: Selector, tokens: Tensor, places: Tensor | None, at: Progress
    ) -> tuple[Tensor, Tensor | None]:
        prefix = self.model.num_prefix_tokens
        generator = step_generator(at.seed, at.step, at.rank, tokens.device)
        heat = temperature(at.step, at.total_steps)
        count = self.num_patches(self.keep, tokens.shape[1] - prefix)
        if self.reference:  # all tokens go on, those that are not chosen as zeros, and compete with the class token
            factors, kept = selector.draw(tokens, count + prefix, heat, generator)
            return self._zeroed(tokens, kept, factors), places
        factors, kept = selector.draw(tokens[:, prefix:], count, heat, generator)
        tokens = gather(tokens, kept, prefix)
        tokens = torch.cat((tokens[:, :prefix], tokens[:, prefix:] * factors.to(tokens.dtype)[..., None]), dim=1)
        return tokens, kept if places is None else places[kept]

    def _zeroed(self, tokens: Tensor, kept: Tensor, factors: Tensor) -> Tensor:
        """Published: tokens (B, N, D) times their factors, 0 for those that are not among the `kept` (B, k); the class
        token stays in any case."""
        masks = torch.zeros(tokens.shape[:2], dtype=factors.dtype, device=tokens.device).scatter(1, kept, factors)
        prefix = self.model.num_prefix_tokens
        masks = torch.cat((torch.ones_like(masks[:, :prefix]), masks[:, prefix:]), dim=1)
        return tokens * masks.to(tokens.dtype)[..., None]

    # What training costs.

    def num_patches(self, keep: float | None, available: int | None = None) -> int:
        """Patches that the selector lets in at a share of all tokens, of those that are there."""
        model = self.model
        patches = model.num_patches if available is None else available
        return num_selected(1.0 if keep is None else keep, patches, model.num_prefix_tokens, model.token_counts)

    def stage(self, at: Progress) -> Stage:
        return Stage(self.keep or 1.0)

    def course(self) -> str:
        told = "ρ: 1 throughout" if self.keep is None else f"ρ: {self.keep:g} throughout, as the selector chooses"
        if not self.topology.sparse:
            return told
        updates, last = self.updates, self.updates.last_step
        moves = f"moved every {updates.interval:,} steps until step {last:,}" if last else "which stays as it was drawn"
        return f"{told}; {self.sparsity()}, {moves}"

    def sparsity(self) -> str:
        """What is masked, in words."""
        raise NotImplementedError

    def training_tokens(self, stage: Stage, image_size: int | None = None) -> tuple[int, ...]:
        model = self.model
        if self.selector is None or self.reference:
            return (model.num_kept_tokens(1.0, image_size),) * len(model.blocks)
        prefix = model.num_prefix_tokens
        return (prefix + self.num_patches(self.keep, model.num_kept_tokens(1.0, image_size) - prefix),) * len(
            model.blocks
        )

    def training_cost(self, stage: Stage, image_size: int | None = None) -> Cost:
        """As computed, with dense kernels: what is masked saves nothing."""
        if self.selector is None:
            return Cost(macs(self.model, 1.0, image_size))
        embedded = self.model.num_kept_tokens(1.0, image_size) - self.model.num_prefix_tokens
        backbone = macs_of_tokens(self.model, self.training_tokens(stage, image_size), embedded)
        return Cost(backbone, extra=linear_macs(self.selector, embedded))

    # What the trained model can do.

    def points(self) -> tuple[Point, ...]:
        if self.selector is None or self.keep is None:
            return super().points()
        return (self.keep, *(point for point in (1.0, 0.95, 0.9, 0.7, 0.5) if point != self.keep))

    def predict(self, images: Tensor, point: Point = 1.0) -> Tensor:
        if self.selector is None:
            return super().predict(images, point)
        return self.model.readout(self.model.trunk(*self._select(images, point)))

    def _select(self, images: Tensor, point: Point) -> tuple[Tensor, Tensor | None]:
        """Tokens of the images and the indices of their patches, or None if all are there."""
        assert self.selector is not None
        tokens, prefix = self.model.embed(images), self.model.num_prefix_tokens
        count = self.num_patches(point)
        if count == self.model.num_patches:
            return tokens, None
        if self.reference:
            kept = self.selector.best(tokens, count + prefix)
            return self._zeroed(tokens, kept, torch.ones_like(kept, dtype=tokens.dtype)), None
        kept = self.selector.best(tokens[:, prefix:], count)
        return gather(tokens, kept, prefix), kept

    def tokens(self, point: Point = 1.0) -> tuple[int, ...]:
        if self.selector is None:
            return super().tokens(point)
        count = self.model.num_patches if self.reference else self.num_patches(point)
        return (self.model.num_prefix_tokens + count,) * len(self.model.blocks)

    def cost(self, point: Point = 1.0) -> Cost:
        if self.selector is None:
            return super().cost(point)
        chooses = self.num_patches(point) < self.model.num_patches
        extra = linear_macs(self.selector, self.model.num_patches) if chooses else 0
        return Cost(macs_of_tokens(self.model, self.tokens(point)), extra=extra)

    def depths(self, images: Tensor, point: Point = 1.0) -> Tensor:
        if self.selector is None:
            return super().depths(images, point)
        return self.depths_of(images, self._select(images, point)[1])

    def attention_maps(self, images: Tensor, point: Point = 1.0, blocks: Sequence[int] | None = None) -> list[Tensor]:
        if self.selector is None:
            return super().attention_maps(images, point, blocks)
        return attention_maps(self.model, *self._select(images, point), blocks)


class SViTE(SparseTraining):
    """Single weights are masked; what is computed is dense."""

    name = "svite"
    sections = (SViTESettings,)

    def __init__(self, model: VisionTransformer, config: RunSettings, steps_per_epoch: int) -> None:
        own = config.section_of(SViTESettings)
        super().__init__(model, config, steps_per_epoch, own, own.reference)
        self.own = own
        names = [name for name in prunable(model, own.weights) if own.density < 1]
        shapes = [tuple(model.get_parameter(name).shape) for name in names]
        self.counts: dict[str, int] = {}
        """Active weights of each masked parameter of the model, which stay as many."""
        masks: dict[str, Tensor] = {}
        for number, (name, shape, density) in enumerate(
            zip(names, shapes, densities(shapes, own.density, own.distribution), strict=True)
        ):
            size = math.prod(shape)
            count = round(density * size)
            if count < size:
                self.counts[name] = count
                device = model.get_parameter(name).device
                generator = step_generator(config.train.seed, -1, number)
                planned = device.type == "meta"
                masks[name] = torch.empty(shape, dtype=torch.bool) if planned else random_mask(shape, count, generator)
        self.masks = Masks(masks)
        # They are the same on all processes; DDP would send them round at every step.
        self._ddp_params_and_buffers_to_ignore = [f"masks.{name}" for name in masks]
        self._growth: dict[str, Tensor] = {}

    def masked(self) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """The parameters that have masks, by name."""
        for name in self.counts:
            yield name, self.model.get_parameter(name), self.masks.get_buffer(name)

    @torch.no_grad()
    def apply_masks(self) -> None:
        for _, weight, mask in self.masked():
            hide(weight, mask)

    def begin_phase(self, phase: Phase) -> None:
        self.apply_masks()  # whatever weights training starts from

    def mask_gradients(self, at: Progress) -> None:
        moves = self.moves(at)
        for name, weight, mask in self.masked():
            if weight.grad is None:
                continue
            if moves:
                self._growth[name] = whole(weight.grad).abs()
            if not self.own.reference:  # else AdamW's averages of hidden weights go on
                hide(weight.grad, mask)

    def after_optimizer(self, at: Progress, step: Step) -> None:
        self.apply_masks()

    def after_average(self, at: Progress) -> None:
        if not self.own.reference:
            self.apply_masks()

    @torch.no_grad()
    def end_step(self, at: Progress, step: Step) -> None:
        """Move the masks (section 3.1: magnitude drops, the gradient grows), unless the step was skipped."""
        if not self.moves(at):
            return
        if step.taken:
            part = self.updates.share(at.step + 1)
            for name, weight, mask in self.masked():
                if name in self._growth:
                    self._move(name, weight, mask, part, step)
            self.apply_masks()
        self._growth = {}

    def _move(self, name: str, weight: nn.Parameter, mask: Tensor, part: float, step: Step) -> None:
        active, size = self.counts[name], mask.numel()
        count = math.ceil(part * active)
        count = count if self.own.regrow else min(count, size - active)
        moved = move(mask, whole(weight.detach()).abs(), self._growth[name], count, regrow=self.own.regrow)
        mask.copy_(moved.mask)
        share(mask)
        if not self.own.reference:
            step.reset_moments(weight, moved.touched)

    # What it costs.

    def sparsity(self) -> str:
        where = "of the blocks' weights" if self.own.weights == "blocks" else "of all weights"
        return f"{self.own.density:.0%} {where}"

    @property
    def num_active(self) -> int:
        """Parameters that are not masked."""
        hidden = sum(self.masks.get_buffer(name).numel() - count for name, count in self.counts.items())
        return sum(part.numel() for part in self.parameters()) - hidden

    def theoretical_macs(self, point: Point = None) -> int:
        """Multiply-accumulates of a prediction if what is masked cost nothing; dense kernels save none of it."""
        at = self.points()[0] if point is None else point
        saved, seen = 0, self.tokens(at)
        for name, count in self.counts.items():
            parts = name.split(".")
            times = 1
            if parts[0] == "blocks":
                times = seen[int(parts[1])]
            elif parts[0] == "patch_embed":
                times = self.model.num_patches
            saved += times * (self.masks.get_buffer(name).numel() - count)
        return self.cost(at).forward - saved

    def facts(self) -> dict[str, float]:
        """`active_params`, and `theoretical_gflops` at the first operating point: neither makes it faster."""
        return {"active_params": float(self.num_active), "theoretical_gflops": self.theoretical_macs() / 1e9}

    def deployed(self) -> Method:
        """A plain model, unless there is a selector: its weights are zero where they are masked."""
        if self.selector is not None:
            return self
        return Deployed(self.model, self.config, self.steps_per_epoch, self.facts())


class Deployed(Dense):
    """A trained sparse model as a plain one, with the figures of what trained it."""

    def __init__(
        self, model: VisionTransformer, config: RunSettings, steps_per_epoch: int, facts: dict[str, float]
    ) -> None:
        plain = {"method": Dense.name, "own": tuple(kind() for kind in Dense.sections), "spare": ()}
        super().__init__(model, RunSettings(**(vars(config) | plain)), steps_per_epoch)
        self._facts = facts

    def facts(self) -> dict[str, float]:
        return self._facts


def prunable(model: VisionTransformer, weights: str) -> list[str]:
    """Names of the matrices that may be sparse: those of the blocks, or (`release`) every one of a linear layer or a
    convolution."""
    return [
        f"{name}.weight"
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear | nn.Conv2d) and (weights == "release" or name.startswith("blocks."))
    ]
