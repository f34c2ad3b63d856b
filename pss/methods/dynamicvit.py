"""DynamicViT: predictors score patches on their way through the blocks, and the best go on.

Training keeps all tokens and hides the dropped ones as keys, so that predictors learn from what dropping would do;
inference gathers the kept ones. Rao et al., NeurIPS 2021, https://arxiv.org/abs/2106.02034
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor, nn

from pipelines.settings import Always, Natural, NotNegative, ReadIf, Share, Text
from pss.methods.contract import Method
from pss.methods.parts.dense_loss import leave_patches_out
from pss.methods.parts.policy import (
    KEEP,
    PolicyAttention,
    Predictor,
    check_hides,
    decide,
    gumbel,
    kl_loss,
    patch_loss,
    quarters,
    ratio_loss,
    token_loss,
    with_likeliest,
)
from pss.methods.teacher import Answer, Teacher
from pss.methods.vocabulary import Cost, DenseTargets, Phase, Point, Progress, Stage
from pss.models.flops import linear_macs, macs, macs_of_tokens
from pss.models.sampling import gather, highest, step_generator
from pss.models.vit import VisionTransformer
from pss.sections import MethodSection, RunSettings

_FROZEN_EPOCHS = 5
_BACKBONE_LR = 0.01
_ROUNDING = 1e-6  # must not cost a patch: 196 * 0.5 ** 2 may come out below 49

_Taught = ReadIf(lambda at: at.own.teacher is not None, "dynamicvit.teacher")


@dataclass(frozen=True, kw_only=True)
class DynamicViTSettings(MethodSection, section="dynamicvit"):
    """What is dropped where, what is learnt from, and how fast the backbone follows."""

    in_epochs = ("frozen_epochs",)

    rho: Annotated[float, Gt(0), Lt(1), ReadIf(lambda at: at.own.rates is None, "dynamicvit.rates=none")] = 0.7
    """Base keep rate: stage s keeps ρ ** s of all patches."""
    places: Always[tuple[Natural, ...] | None] = None
    """Blocks, from 0, before which patches are dropped; None is each quarter of the depth, 3, 6 and 9 of 12."""
    rates: Always[tuple[Share, ...] | None] = None
    """What is kept at each place, as a share of all patches; None is ρ, ρ², ρ³ and so on."""
    ratio_weight: Always[NotNegative] = 2.0
    """Of the loss that holds the kept share of each image to its target."""
    teacher: Always[Text | None] = None
    """A frozen dense model to learn from: the folder of a run, a weights file, or timm:NAME."""
    kl_weight: Annotated[NotNegative, _Taught] = 0.5
    """Of the divergence of the predictions from the teacher's."""
    distill_weight: Annotated[NotNegative, _Taught] = 0.5
    """Of the squared distance of the kept patches' last features from the teacher's; where both classify patches, of
    the divergence of what they say of the kept ones."""
    backbone_lr: Always[Annotated[float, Ge(0), Le(1)] | None] = None
    """Factor on the learning rate of all but the predictors; None is 0.01, or 1 where model.weights is none, as a
    backbone with random weights has everything to learn."""
    frozen_epochs: Always[Natural | None] = None
    """First epochs in which only the predictors learn; None is 5, at most half the run, or 0 where model.weights is
    none."""
    eps: Always[Annotated[float, Ge(0), Le(1e-2)]] = 1e-6
    """Added to the masked softmax, as published: hidden keys keep about this much weight between them."""
    reference: Always[bool] = False
    """What the authors' code does where it is wrong; docs/rivals.md says what."""

    def check(self) -> None:
        if self.places is not None and (not self.places or any(a >= b for a, b in pairwise(self.places))):
            raise ValueError(
                f"dynamicvit.places is {_listed(self.places)}; name blocks in ascending order, at least one, such as "
                "3,6,9"
            )
        if self.rates is not None and (not self.rates or any(a < b for a, b in pairwise(self.rates))):
            raise ValueError(
                f"dynamicvit.rates is {_listed(self.rates)}; name at least one share of all patches, none larger than "
                "the one before it, such as 0.7,0.49,0.343"
            )
        if self.rates is not None and self.rates[-1] > 0.999:
            raise ValueError("dynamicvit.rates keeps every patch; lower the last of them, or set method=dense")
        if self.places is not None and self.rates is not None and len(self.places) != len(self.rates):
            raise ValueError(
                f"dynamicvit.places names {len(self.places)} blocks and dynamicvit.rates {len(self.rates)} shares; "
                "name as many"
            )
        if self.teacher is not None and self.kl_weight == self.distill_weight == 0:
            raise ValueError(
                "dynamicvit.teacher is set and nothing is learnt from it; raise dynamicvit.kl_weight or "
                "dynamicvit.distill_weight, or set dynamicvit.teacher=none"
            )

    def check_run(self, config: Any) -> None:
        if self.frozen_epochs is not None and self.frozen_epochs > config.train.epochs:
            raise ValueError(
                f"dynamicvit.frozen_epochs is {self.frozen_epochs}; it must lie between 0 and the run's "
                f"{config.train.epochs} epochs (--set dynamicvit.frozen_epochs=none chooses)"
            )


def _listed(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values) or "empty"


class DynamicViT(Method):
    """Tokens are dropped in stages, by what predictors say of them."""

    name = "dynamicvit"
    sections = (DynamicViTSettings,)

    targets: Tensor

    def __init__(self, model: VisionTransformer, config: RunSettings, steps_per_epoch: int) -> None:
        super().__init__(model, config, steps_per_epoch)
        self.own = own = config.section_of(DynamicViTSettings)
        self.places = own.places if own.places is not None else quarters(len(model.blocks))
        self._check_places()
        check_hides(model, self.name)
        self.rho, self.exponents = _base_of(own, len(self.places))
        self.averages = model.head_dist is None and model.global_pool == "avg"
        for block in model.blocks:
            block.attn = PolicyAttention(block.attn, own.eps, own.reference)
        self.predictors = nn.ModuleList(Predictor(model.embed_dim, reference=own.reference) for _ in self.places)
        self.register_buffer("targets", torch.tensor(self.rates(self.rho)), persistent=False)
        self.fine_tunes = config.model.weights is not None
        if self.fine_tunes:
            for token in (model.cls_token, model.dist_token, model.reg_token, model.pos_embed):
                if token is not None:
                    token.requires_grad_(False)  # published: in no group of the optimizer
        if own.teacher is not None:
            self.teachers["teacher"] = Teacher(own.teacher, config, model.num_classes)
        if model.patch_share is not None and not (
            self.teachers and own.distill_weight and self.teachers["teacher"].blank.patch_share
        ):
            leave_patches_out(model)

    def _check_places(self) -> None:
        depth, rates = len(self.model.blocks), self.own.rates
        if self.places[-1] >= depth:
            raise ValueError(
                f"dynamicvit.places names block {self.places[-1]}, and the model's blocks are 0 to {depth - 1}; "
                "name others, or none for those of its depth"
            )
        if rates is not None and len(rates) != len(self.places):
            raise ValueError(
                f"dynamicvit.rates names {len(rates)} shares, and a model of {depth} blocks drops patches at "
                f"{len(self.places)} places; name as many, or set dynamicvit.places too"
            )

    # A training step.

    def forward(
        self, images: Tensor, targets: Tensor, at: Progress, dense: DenseTargets | None = None
    ) -> dict[str, Tensor]:
        model, own, prefix = self.model, self.own, self.model.num_prefix_tokens
        tokens, places = model.see(images, 1.0, low_resolution=True)
        generator = step_generator(at.seed, at.step, at.rank, images.device)
        shape = tokens.shape[0], len(self.places), tokens.shape[1] - prefix, 2
        noise = gumbel(shape, generator, images.device)
        tokens, kept = model.compute(self._masked_at, tokens, noise, places)
        logits, patches = self.masked_answers(tokens, kept[:, -1])
        out = {"classification": self.classification_loss(logits, targets), "ratio": ratio_loss(kept, self.targets)}
        loss = out["classification"] + own.ratio_weight * out["ratio"]
        if own.teacher is not None:
            answer = self.teachers["teacher"](images)
            if own.kl_weight:
                out["kl"] = kl_loss(logits, answer.logits)
                loss = loss + own.kl_weight * out["kl"]
            if own.distill_weight:
                out["distill"] = self._distill(answer, tokens, patches, kept[:, -1])
                loss = loss + own.distill_weight * out["distill"]
        shares = kept.detach().mean((0, 2))  # held against `targets`: a gap means that inference sees other patches
        out |= {f"kept_{number}": share for number, share in enumerate(shares.unbind(), 1)}
        return {"loss": loss, "logits": logits, **out}

    def masked(self, tokens: Tensor, noise: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens through all blocks, those that were dropped hidden from the others.

        Args:
            tokens: As `VisionTransformer.see` returns them, (B, T, D).
            noise: Gumbel noise that decides with the predictors, (B, S, N, 2).
            positions: Those of the tokens.

        Returns:
            All tokens after the last norm, (B, T, D), and what was kept after each stage, 0 or 1, (B, S, N).
        """
        model, prefix = self.model, self.model.num_prefix_tokens
        # Where nothing is hidden yet, a policy would change nothing but by `eps`, and cost the fast kernels.
        policy: Tensor | None = tokens.new_ones(tokens.shape[:2]) if self.own.reference else None
        tokens = model.run_blocks(tokens, positions, stop=self.places[0], policy=policy)
        kept: list[Tensor] = []
        stretches = pairwise((*self.places, len(model.blocks)))
        for predictor, drawn, (start, stop) in zip(self.predictors, noise.unbind(1), stretches, strict=True):
            patches = tokens[:, prefix:]
            before = kept[-1] if kept else patches.new_ones(patches.shape[:2])
            likely = predictor(patches, before)
            kept.append(decide(likely, drawn) * before)  # what is dropped does not come back
            if not self.own.reference:  # inference keeps one at least; without any there is no mean to learn from
                kept[-1] = with_likeliest(kept[-1], before, likely)
            policy = torch.cat((kept[-1].new_ones(kept[-1].shape[0], prefix), kept[-1]), dim=1)
            tokens = model.run_blocks(tokens, positions, start, stop, policy=policy)
        return model.norm(tokens), torch.stack(kept, dim=1)

    def _masked_at(self, tokens: Tensor, noise: Tensor, places: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.masked(tokens, noise, self.model.positions(places))

    def masked_answers(self, tokens: Tensor, kept: Tensor) -> tuple[Tensor, Tensor | None]:
        """What `VisionTransformer.answers` would return if of the tokens (B, T, D) only the kept patches, 1 in (B, N),
        were there; logits of patches are those of all."""
        if not self.averages:
            return self.model.answers(tokens)
        prefix = self.model.num_prefix_tokens
        seen = torch.cat((kept.new_ones(kept.shape[0], prefix), kept), dim=1)
        averaged = seen[:, 0 if self.model.pool_include_prefix else prefix :]
        scale = averaged.shape[1] / averaged.sum(1, keepdim=True).clamp(min=1)  # the model divides by all there are
        return self.model.answers(tokens * (seen * scale).unsqueeze(-1))

    def _distill(self, answer: Answer, tokens: Tensor, patches: Tensor | None, kept: Tensor) -> Tensor:
        theirs = answer.tokens[:, self.teachers["teacher"].blank.num_prefix_tokens :]
        own = tokens[:, self.model.num_prefix_tokens :]
        classified = patches is not None and answer.patches is not None
        if theirs.shape[1] != own.shape[1] or (not classified and theirs.shape != own.shape):
            raise ValueError(
                f"dynamicvit.teacher {self.own.teacher} has {theirs.shape[1]} patches of {theirs.shape[2]} features, "
                f"and the model {own.shape[1]} of {own.shape[2]}; name a teacher with as many, or set "
                "dynamicvit.distill_weight=0"
            )
        if patches is None or answer.patches is None:
            return token_loss(own, theirs, kept)
        return patch_loss(patches, answer.patches, kept)

    # What is optimized.

    def frozen_epochs(self) -> int:
        """First epochs in which the backbone is left as it is."""
        if self.own.frozen_epochs is not None:
            return self.own.frozen_epochs
        return min(_FROZEN_EPOCHS, self.config.train.epochs // 2) if self.fine_tunes else 0

    def begin_epoch(self, at: Progress) -> None:
        """While the backbone is frozen, its running statistics are too, as the authors' are not."""
        if at.epoch < self.frozen_epochs() and not self.own.reference:
            for part in self.model.modules():
                if isinstance(part, nn.modules.batchnorm._BatchNorm):
                    part.eval()

    def param_groups(self, phase: Phase) -> list[dict[str, Any]]:
        """The groups of every method, those of the `predictors` apart from those of the `backbone`."""
        own = set(map(id, self.predictors.parameters()))
        groups = []
        for group in super().param_groups(phase):
            for name in ("predictors", "backbone"):
                parts = [part for part in group["params"] if (id(part) in own) == (name == "predictors")]
                groups.append(group | {"params": parts, "name": name})
        return [group for group in groups if group["params"]]

    def lr_factors(self, at: Progress) -> Mapping[str, float]:
        if at.epoch < self.frozen_epochs():
            return {"backbone": 0.0}
        usual = _BACKBONE_LR if self.fine_tunes else 1.0
        return {"backbone": usual if self.own.backbone_lr is None else self.own.backbone_lr}

    # What training costs.

    def course(self) -> str:
        numbers = [str(count) for count in self.counts(self.rho)]
        frozen, epochs = self.frozen_epochs(), self.config.train.epochs
        return (
            f"ρ: {self.rho:g} at inference, where {_and(numbers)} of {self.model.num_patches} patches go on into "
            f"block{'s' * (len(self.places) > 1)} {_and(list(map(str, self.places)))}; all patches in training"
            + (f", the backbone frozen in the first {frozen} of {epochs} epochs" if frozen else "")
        )

    def training_tokens(self, stage: Stage, image_size: int | None = None) -> tuple[int, ...]:
        return (self.model.num_kept_tokens(1.0, image_size),) * len(self.model.blocks)

    def training_cost(self, stage: Stage, image_size: int | None = None) -> Cost:
        num_patches = self.model.num_kept_tokens(1.0, image_size) - self.model.num_prefix_tokens
        return Cost(
            macs(self.model, 1.0, image_size),
            extra=linear_macs(self.predictors, num_patches),
            teacher=self._teachers_macs(),
        )

    # What the trained model can do.

    def rates(self, point: float) -> tuple[float, ...]:
        """What each stage keeps of all patches at an operating point: ρ ** s, or as far from 1 as given rates are."""
        return tuple(point**exponent for exponent in self.exponents)

    def counts(self, point: float) -> tuple[int, ...]:
        """Patches that each stage keeps at an operating point, one at least."""
        rounding = 0.0 if self.own.reference else _ROUNDING
        total = self.model.num_patches
        return tuple(max(1, min(total, math.floor(total * rate + rounding))) for rate in self.rates(point))

    def points(self) -> tuple[float, ...]:
        return (self.rho, *(point for point in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5) if point != self.rho))

    def fine_points(self) -> tuple[float, ...]:
        """Those that cost less than every larger one: predictors that drop few patches cost more than they save."""
        total = self.model.num_patches
        steps = {(count / total) ** (1 / power) for count in range(1, total) for power in self.exponents if power}
        return self.cheaper_points(steps)

    def predict(self, images: Tensor, point: Point = None) -> Tensor:
        ((tokens, _, _),) = deque(self._course(images, point), maxlen=1)  # lets go of those before the last
        return self.model.readout(self.model.norm(tokens))

    def _course(self, images: Tensor, point: Point) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
        """Tokens, their positions and the indices of their patches, as they enter each block and leave the last.

        A stage that drops nothing asks no predictor: at ρ = 1 this is the dense model.
        """
        model, prefix = self.model, self.model.num_prefix_tokens
        tokens, kept, positions = model.embed(images), None, model.positions(None)
        stages = dict(zip(self.places, zip(self.predictors, self.counts(self._at(point)), strict=True), strict=True))
        for number in range(len(model.blocks)):
            if number in stages and (count := stages[number][1]) < tokens.shape[1] - prefix:
                scores = stages[number][0](tokens[:, prefix:])[..., KEEP]
                best = highest(scores, count, never_negative=False)
                tokens, kept = gather(tokens, best, prefix), best if kept is None else kept.gather(1, best)
                positions = model.positions(kept)
            yield tokens, positions, kept
            tokens = model.run_blocks(tokens, positions, number, number + 1)
        yield tokens, positions, kept

    def _at(self, point: Point) -> float:
        return self.rho if point is None else point

    def tokens(self, point: Point = None) -> tuple[int, ...]:
        counts, total = self.counts(self._at(point)), self.model.num_patches
        left = [([total, *counts][sum(place <= number for place in self.places)]) for number in range(self._depth)]
        return tuple(self.model.num_prefix_tokens + count for count in left)

    def cost(self, point: Point = None) -> Cost:
        counts, total = self.counts(self._at(point)), self.model.num_patches
        scored = [before if after < before else 0 for before, after in pairwise((total, *counts))]
        extra = sum(linear_macs(part, count) for part, count in zip(self.predictors, scored, strict=True))
        return Cost(macs_of_tokens(self.model, self.tokens(point)), extra=extra)

    def depths(self, images: Tensor, point: Point = None) -> Tensor:
        reached = torch.zeros((images.shape[0], self.model.num_patches), dtype=torch.int64, device=images.device)
        for through, (_, _, kept) in zip(range(1, self._depth + 1), self._course(images, point), strict=False):
            reached = torch.full_like(reached, through) if kept is None else reached.scatter(1, kept, through)
        return reached

    def attention_maps(self, images: Tensor, point: Point = None, blocks: Sequence[int] | None = None) -> list[Tensor]:
        """Of each block's own tokens, fewer from stage to stage."""
        found = {}
        for number, (tokens, positions, _) in zip(range(self._depth), self._course(images, point), strict=False):
            if blocks is None or number in blocks:
                block: Any = self.model.blocks[number]
                found[number] = block.attn.weights(block.norm1(tokens), positions)
        return [found[number] for number in (found if blocks is None else blocks)]

    @property
    def _depth(self) -> int:
        return len(self.model.blocks)


def _base_of(own: DynamicViTSettings, num_stages: int) -> tuple[float, tuple[float, ...]]:
    """The trained ρ, and the powers of ρ that the stages keep.

    Rates that are given are such powers too: ρ is then what stages that all keep the same share of what they get would
    keep, so that another ρ moves all of them, and 1 drops nothing.
    """
    if own.rates is None:
        return own.rho, tuple(float(stage) for stage in range(1, num_stages + 1))
    rho = round(own.rates[-1] ** (1 / num_stages), 6)
    return rho, tuple(math.log(rate) / math.log(rho) for rate in own.rates)


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
