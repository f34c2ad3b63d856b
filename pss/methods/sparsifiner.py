"""Sparsifiner: each patch looks only at those few keys that a small predictor chooses, image by image and head by head.

A trained model is fine-tuned in two phases: predictors alone learn to tell the model's attention, then the model learns
to do with the keys that they choose. Wei et al., CVPR 2023, https://arxiv.org/abs/2303.13755
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import Tensor

from pipelines.settings import AboveZero, Always, Natural, NotNegative, Positive, ReadIf, Share, Text
from pss.methods.contract import Method
from pss.methods.parts.connectivity import Connected, Signs, Thresholds
from pss.methods.parts.policy import kl_loss
from pss.methods.parts.predictors import KeepRates, Predictors, Scale, usual_num_down
from pss.methods.teacher import Teacher
from pss.methods.vocabulary import Cost, DenseTargets, Phase, Point, Progress, Stage, Step
from pss.models.flops import macs
from pss.models.vit import VisionTransformer
from pss.sections import MethodSection, RunSettings

DENSE, PREDICTORS, SPARSE = "dense", "predictors", "sparse"  # phases, in their order

_PREDICTOR_EPOCHS, _EPOCHS = 5, 45
_DENSE_SHARE = 0.4  # of a run from random weights
_FALL, _WARM_UP = 2 / 3, 3 / 5  # of the predictors' learning rate, and of their epochs
_MANY = 0.5  # patches without scores for their keys

_log = logging.getLogger(__name__)

_Taught = ReadIf(lambda at: at.own.teacher is not None, "sparsifiner.teacher")
_L1 = ReadIf(lambda at: at.own.regularizer == "l1", "sparsifiner.regularizer=l1")


@dataclass(frozen=True, kw_only=True)
class SparsifinerSettings(MethodSection, section="sparsifiner"):
    """How many keys a patch sees, how they are predicted, and what is learnt from."""

    in_epochs = ("predictor_epochs", "dense_epochs")

    keep: Always[tuple[Share, ...]] = (0.25,)
    """Keys that each patch sees, as a share of the patches; one number, or one for each block."""
    budget_base: Always[Literal["patches", "all"]] = "patches"
    """What `keep` is a share of: the patches, as in the paper, or all tokens, as in the authors' code."""
    num_down: Always[Positive | None] = None
    """Rows of the basis K, to which keys are compressed; None is 32, or half the tokens where that is fewer."""
    scale: Always[Scale] = "heads"
    """Factor on the products of reduced queries and keys: one over the root of the number of heads, as published, or of
    the reduced width."""
    basis_threshold: Always[Annotated[float, Ge(0), Le(1)]] = 0.01
    """Entries of the basis up to this are zero once the predictors are trained."""
    coefficient_threshold: Annotated[
        Annotated[float, Ge(0), Le(1)] | None, ReadIf(lambda at: at.own.top is None, "sparsifiner.top=none")
    ] = None
    """As `basis_threshold`, of coefficients; None is 1.6 / K, the published 0.05 of 32."""
    top: Always[Positive | None] = None
    """Leave so many of the largest coefficients instead, as the authors' shipped settings do (8)."""
    signs: Always[Signs] = "magnitude"
    """Whether a negative entry of the basis counts as a positive one, as published, or as zero."""
    predictor_epochs: Always[Positive | None] = None
    """Epochs in which predictors learn alone; None is 5, or a ninth of what is left of the run after `dense_epochs`."""
    predictor_lr: Always[AboveZero] = 3e-4
    """Their peak learning rate, whatever the batch; it falls to two thirds."""
    dense_epochs: Always[Natural | None] = None
    """Epochs of plain training before them; None is 0, or two fifths of the run where model.weights is none, as there
    is no attention to learn from yet."""
    regularizer: Always[Literal["l2", "l1"]] = "l2"
    """What makes the basis sparse: weight decay, or a penalty on the sizes of its entries in its place."""
    l1_weight: Annotated[NotNegative, _L1] = 0.02
    """Of that penalty, at the beginning of the run. Not published."""
    l1_end: Annotated[NotNegative | None, _L1] = None
    """Where its cosine over the whole run ends; None is where it begins."""
    teacher: Always[Text | None] = None
    """A frozen dense model to learn from: the folder of a run, a weights file, or timm:NAME."""
    kl_weight: Annotated[NotNegative, _Taught] = 0.5
    """Of the divergence of the predictions from the teacher's."""
    token_weight: Annotated[NotNegative, _Taught] = 0.5
    """Of the squared distance of the patches' last features, or their logits where the model has them, from the
    teacher's."""
    gathered: Always[bool] = False
    """At inference, compute the keys of each query alone, instead of all and hiding the others: the same answers from
    less arithmetic, and slower wherever it was measured."""
    reference: Always[bool] = False
    """What the authors' code does where it is wrong; docs/rivals.md says what."""

    def check(self) -> None:
        if not self.keep or min(self.keep) > 0.999:
            raise ValueError(
                f"sparsifiner.keep is {','.join(f'{share:g}' for share in self.keep) or 'empty'}; name a share below "
                "1, such as 0.25, or set method=dense, where every patch sees every key"
            )
        if self.teacher is not None and self.kl_weight == self.token_weight == 0:
            raise ValueError(
                "sparsifiner.teacher is set and nothing is learnt from it; raise sparsifiner.kl_weight or "
                "sparsifiner.token_weight, or set sparsifiner.teacher=none"
            )

    def check_run(self, config: Any) -> None:
        dense, alone = self.epochs_before(config)
        if dense + alone >= config.train.epochs:
            raise ValueError(
                f"sparsifiner.dense_epochs ({dense}) and sparsifiner.predictor_epochs ({alone}) leave none of the "
                f"run's {config.train.epochs} epochs to train with few keys; raise train.epochs, or lower them"
            )

    def epochs_before(self, config: Any) -> tuple[int, int]:
        """Epochs of plain training, and those in which predictors learn alone."""
        epochs, dense = config.train.epochs, self.dense_epochs
        if dense is None:
            dense = math.floor(_DENSE_SHARE * epochs) if config.model.weights is None else 0
        if self.predictor_epochs is not None:
            return dense, self.predictor_epochs
        return dense, min(_PREDICTOR_EPOCHS, max(1, round((epochs - dense) * _PREDICTOR_EPOCHS / _EPOCHS)))

    def l1_at(self, progress: float) -> float:
        """The weight of the penalty on the basis, so far into the run."""
        end = self.l1_weight if self.l1_end is None else self.l1_end
        return end + (self.l1_weight - end) * (1 + math.cos(math.pi * progress)) / 2


class Sparsifiner(Method):
    """Attention to few keys, chosen by what predictors say of them."""

    name = "sparsifiner"
    sections = (SparsifinerSettings,)
    knob = "keep rate"

    predictor_steps: Tensor

    def __init__(self, model: VisionTransformer, config: RunSettings, steps_per_epoch: int) -> None:
        super().__init__(model, config, steps_per_epoch)
        self.own = own = config.section_of(SparsifinerSettings)
        depth = len(model.blocks)
        if len(own.keep) not in (1, depth):
            raise ValueError(
                f"sparsifiner.keep names {len(own.keep)} shares, and the model has {depth} blocks; name one, or one "
                "for each block"
            )
        self.rates = KeepRates.of(own.keep if len(own.keep) == depth else own.keep * depth, own.budget_base == "all")
        self.keep = self.rates.keep
        num_down = own.num_down or usual_num_down(model.num_tokens)
        if num_down > model.num_tokens:
            raise ValueError(
                f"sparsifiner.num_down is {num_down}, and images have {model.num_tokens} tokens; set it to no more, "
                "or to none"
            )
        thresholds = Thresholds.of(own.basis_threshold, own.coefficient_threshold, own.top, own.signs, num_down)
        self.predictors = Predictors(model, num_down, own.scale, thresholds)
        self.register_buffer("predictor_steps", torch.zeros((), dtype=torch.int64))
        # By name, as sharding puts other tensors in their place.
        self._trained = {name for name, part in model.named_parameters() if part.requires_grad}
        self._seen: Tensor | None = None
        self._warned: set[str] = set()
        if own.teacher is not None:
            self.teachers["teacher"] = Teacher(own.teacher, config, model.num_classes)

    # Phases.

    def phases(self) -> list[Phase]:
        """Where model.weights is none a `dense` one comes first."""
        dense, alone = self.own.epochs_before(self.config)
        last = self.config.train.epochs - dense - alone
        lr = self.own.predictor_lr
        predictors = replace(
            self.config.optim,
            lr=lr, lr_batch=None, min_lr=_FALL * lr, warmup_lr=0.0, warmup_epochs=_WARM_UP * alone, cooldown_epochs=0.0,
        )  # fmt: skip
        first = [Phase(DENSE, dense, self._fitted(dense, cooldown_epochs=0.0))] if dense else []
        return [*first, Phase(PREDICTORS, alone, predictors), Phase(SPARSE, last, self._fitted(last))]

    def _fitted(self, epochs: int, **changes: Any) -> Any:
        """The run's rates for a phase, whose warm-up and cool-down take half of it each at most."""
        optim = replace(self.config.optim, **changes)
        warmup, cooldown = min(optim.warmup_epochs, epochs / 2), min(optim.cooldown_epochs, epochs / 2)
        return replace(optim, warmup_epochs=warmup, cooldown_epochs=cooldown)

    def phase_of(self, epoch: int) -> str:
        """The name of the phase that an epoch, from 0, belongs to."""
        dense, alone = self.own.epochs_before(self.config)
        return DENSE if epoch < dense else PREDICTORS if epoch < dense + alone else SPARSE

    def check_phase(self, phase: Phase) -> None:
        if phase.name != SPARSE:
            return
        if not int(self.predictor_steps):
            raise ValueError(
                "the predictors have taken no step, so that patches would see keys for no reason; have them learn "
                "first (sparsifiner.predictor_epochs), or lower sparsifiner.predictor_lr if all steps were skipped"
            )
        for number, share in enumerate(self.predictors.shares()[0]):
            if share == 0:
                raise ValueError(
                    f"no entry of the basis of block {number} is above sparsifiner.basis_threshold="
                    f"{self.own.basis_threshold:g}, so that its patches would all see the same keys; lower it, or "
                    "sparsifiner.l1_weight, or let predictors learn longer (sparsifiner.predictor_epochs)"
                )

    def begin_phase(self, phase: Phase) -> None:
        for name, part in self.model.named_parameters():
            part.requires_grad_(phase.name != PREDICTORS and name in self._trained)
        self.predictors.requires_grad_(phase.name == PREDICTORS)

    def begin_epoch(self, at: Progress) -> None:
        """A frozen backbone is in evaluation mode: nothing drops, and running statistics stay as they are."""
        if self.phase_of(at.epoch) == PREDICTORS and not self.own.reference:
            self.model.eval()

    def end_step(self, at: Progress, step: Step) -> None:
        if self.phase_of(at.epoch) == PREDICTORS:
            self.predictor_steps += 1 - step.skipped.to(torch.int64)

    def param_groups(self, phase: Phase) -> list[dict[str, Any]]:
        """Those of every method; a basis that is penalised instead is not decayed."""
        groups = super().param_groups(phase)
        if self.own.regularizer == "l2" or phase.name != PREDICTORS:
            return groups
        bases = [predictor.up for predictor in self.predictors.each()]
        for group in groups:
            group["params"] = [part for part in group["params"] if all(part is not one for one in bases)]
        return [group for group in (*groups, {"params": bases, "weight_decay": 0.0}) if group["params"]]

    # A training step.

    def forward(
        self, images: Tensor, targets: Tensor, at: Progress, dense: DenseTargets | None = None
    ) -> dict[str, Tensor]:
        model, phase = self.model, self.phase_of(at.epoch)
        tokens, places = model.see(images, 1.0, low_resolution=True)
        if phase == PREDICTORS:
            tokens, errors = model.compute(self._observed, tokens, places)
            return self._learn_attention(tokens, errors, at)
        if phase == DENSE:
            logits = model.readout(model.compute(model.trunk, tokens, places))
            return {"loss": self.classification_loss(logits, targets), "logits": logits}
        budgets = self.budgets(self.keep, tokens.shape[1] - model.num_prefix_tokens)
        tokens, figures = model.compute(self._connected, tokens, places, *budgets)
        logits, patches = model.answers(tokens)
        taught = self.own.teacher is not None
        if patches is not None and not (taught and self.own.token_weight):
            logits = model.readout(tokens)  # or nothing would train the classifier of patches, which it reads
        loss = self.classification_loss(logits, targets)
        out = {"classification": loss}
        if taught:
            own_patches = tokens[:, model.num_prefix_tokens :] if patches is None else patches
            their_logits, their_patches = self._taught(images, patches is not None)
            if self.own.kl_weight:
                out["kl"] = kl_loss(logits, their_logits)
                loss = loss + self.own.kl_weight * out["kl"]
            if self.own.token_weight:
                self._check_alike(own_patches, their_patches)
                out["tokens_distance"] = F.mse_loss(own_patches.float(), their_patches.float())
                loss = loss + self.own.token_weight * out["tokens_distance"]
        coefficient_sparsity, short_rows = figures.mean(0).unbind()
        out |= {"coefficient_sparsity": coefficient_sparsity, "short_rows": short_rows}
        return {"loss": loss, "logits": logits, **out}

    def _learn_attention(self, tokens: Tensor, errors: Tensor, at: Progress) -> dict[str, Tensor]:
        """The authors' code adds up a batch, and takes a hundredth."""
        out = {"attention_error": 0.01 * errors.sum() if self.own.reference else errors.mean()}
        loss = out["attention_error"]
        if self.own.regularizer == "l1":
            out["l1"] = torch.stack([predictor.up.abs().sum() for predictor in self.predictors.each()]).sum()
            loss = loss + self.own.l1_at(at.step / at.total_steps) * out["l1"]
        return {"loss": loss, "logits": self.model.readout(tokens), **out}

    def _taught(self, images: Tensor, of_patches: bool) -> tuple[Tensor, Tensor]:
        """The teacher's logits, and its patches' logits or last features."""
        teacher = self.teachers["teacher"]
        answer = teacher(images)
        features = answer.tokens[:, teacher.blank.num_prefix_tokens :]
        return answer.logits, answer.patches if of_patches and answer.patches is not None else features

    def _check_alike(self, own: Tensor, taught: Tensor) -> None:
        if own.shape != taught.shape:
            raise ValueError(
                f"sparsifiner.teacher {self.own.teacher} has {taught.shape[1]} patches of {taught.shape[2]} features, "
                f"and the model {own.shape[1]} of {own.shape[2]}; name a teacher with as many, or set "
                "sparsifiner.token_weight=0"
            )

    def _observed(self, tokens: Tensor, places: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.predictors.observe(self.model, tokens, places)

    def _connected(self, tokens: Tensor, places: Tensor | None, *budgets: int) -> tuple[Tensor, Tensor]:
        gathered = self.own.gathered and not self.training
        return self.predictors.connect(self.model, tokens, places, budgets, gathered=gathered)

    # What training costs.

    def stage(self, at: Progress) -> Stage:
        return Stage(name=self.phase_of(at.epoch))

    def course(self) -> str:
        dense, alone = self.own.epochs_before(self.config)
        budgets = list(dict.fromkeys(self.budgets(self.keep)))
        told = f"{budgets[0]}" if len(budgets) == 1 else f"{min(budgets)} to {max(budgets)}"
        begin = f"{dense} epochs of plain training, then " if dense else ""
        return (
            f"keep rate: {self.keep:g}, with which a patch looks at {told} of {self.model.num_tokens} tokens; "
            f"{begin}{alone} epoch{'s' * (alone != 1)} of predictors alone, and the rest with few keys"
        )

    def training_tokens(self, stage: Stage, image_size: int | None = None) -> tuple[int, ...]:
        return (self.model.num_kept_tokens(1.0, image_size),) * len(self.model.blocks)

    def training_cost(self, stage: Stage, image_size: int | None = None) -> Cost:
        backbone = macs(self.model, 1.0, image_size)
        if stage.name == DENSE:
            return Cost(backbone)
        count = self.model.num_kept_tokens(1.0, image_size)
        budgets = self.budgets(self.keep, count - self.model.num_prefix_tokens)
        extra = self.predictors.macs(count, [1] * len(budgets) if stage.name == PREDICTORS else budgets)
        if stage.name == PREDICTORS:
            return Cost(backbone, extra=extra, backward=2 * extra)
        return Cost(backbone, extra=extra, teacher=self._teachers_macs(), backward=2 * backbone)

    # What the trained model can do.

    def budgets(self, point: float, num_patches: int | None = None) -> tuple[int, ...]:
        """Keys of a patch in each block at an operating point, for so many patches, all by default."""
        model = self.model
        return self.rates.budgets(point, num_patches or model.num_patches, model.num_prefix_tokens)

    def points(self) -> tuple[float, ...]:
        return (self.keep, *(point for point in (1.0, 0.75, 0.5, 0.25, 0.1) if point != self.keep))

    def fine_points(self) -> tuple[float, ...]:
        """Those that cost less than every larger one; 1 alone where hidden keys are computed all the same."""
        return self.cheaper_points(self.rates.steps(self.model.num_patches))

    def predict(self, images: Tensor, point: Point = None) -> Tensor:
        point = self.keep if point is None else point
        tokens, figures = self.model.compute(self._connected, self.model.embed(images), None, *self.budgets(point))
        if point == self.keep and not self.training and not torch.compiler.is_exporting():
            found = torch.cat((figures.double().sum(0), figures.new_tensor([len(figures)], dtype=torch.float64)))
            self._seen = found if self._seen is None else self._seen + found
        return self.model.readout(tokens)

    def train(self, mode: bool = True) -> Sparsifiner:
        """As of every module; figures of predictions are those since the last training step."""
        if mode:
            self._seen = None
        super().train(mode)
        return self

    def tokens(self, point: Point = None) -> tuple[int, ...]:
        return (self.model.num_tokens,) * len(self.model.blocks)

    def cost(self, point: Point = None) -> Cost:
        """Of what is computed: without `gathered`, hidden keys too. `facts` tells what is needed of attention."""
        point = self.keep if point is None else point
        budgets, gathered = self.budgets(point), self.own.gathered
        saved = self.predictors.hidden_macs(self.model, budgets) if gathered else 0
        return Cost(macs(self.model) - saved, extra=self.predictors.macs(self.model.num_tokens, budgets))

    def facts(self) -> dict[str, float]:
        """`Predictors.figures`, of the last predictions at the trained keep rate on this process; and `predictor_steps`
        where there were none."""
        found = self.predictors.figures(self.model.num_tokens, self.budgets(self.keep), self._seen)
        if not int(self.predictor_steps):
            found["predictor_steps"] = 0.0
            self._warn("the predictors are not trained yet: below keep rate 1, patches see keys for no reason")
        elif found.get("short_rows", 0.0) > _MANY:
            self._warn(
                "most patches have fewer positive scores than keys, and see the first tokens instead; have predictors "
                "learn more (sparsifiner.predictor_epochs, sparsifiner.predictor_lr), or lower thresholds"
            )
        return found

    def _warn(self, told: str) -> None:
        if told not in self._warned:
            _log.warning(told)
            self._warned.add(told)

    def depths(self, images: Tensor, point: Point = None) -> Tensor:
        return self.depths_of(images, None)

    def connected(self, images: Tensor, point: Point = None, blocks: Sequence[int] | None = None) -> list[Connected]:
        """Masks, scores, and attention weights with and without the masks, of some blocks, by default of all."""
        budgets = self.budgets(self.keep if point is None else point)
        return self.predictors.connected(self.model, self.model.embed(images), budgets, blocks)

    def attention_maps(self, images: Tensor, point: Point = None, blocks: Sequence[int] | None = None) -> list[Tensor]:
        """Under the masks."""
        return [connected.sparse for connected in self.connected(images, point, blocks)]
