"""A method that uses all of the contract at once, loaded by name from outside the package: `everything:Everything`.

It makes no sense as a method. A small predictor scores patches, and from block 2 on only the best go on. The predictor
is trained alone in a first phase; in the second the backbone is frozen for an epoch more. A teacher's answers and label
maps are learnt from, weights of the MLPs are masked and the masks move, and an image that is easy leaves before the
last block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from pipelines.settings import Natural, NotNegative, Positive, Share
from pss.config import MethodSection
from pss.methods import Cost, DenseTargets, Method, Phase, Progress, Stage, Step, Teacher
from pss.models.create import create_plain
from pss.models.flops import block_macs, linear_macs, macs_of_tokens
from pss.models.maps import attention_maps
from pss.models.sampling import gather
from pss.models.vit import VisionTransformer
from pss.runtime.shards import part_like, whole


@dataclass(frozen=True, kw_only=True)
class EverythingSettings(MethodSection, section="everything"):
    keep: Share = 0.5
    """Of the patches that go on after block 2."""
    teacher: str | None = None
    alone_epochs: Natural = 1
    """Of the first phase, in which the predictor learns alone."""
    frozen_epochs: Natural = 1
    """Of the second phase, in which the backbone does not learn."""
    density: Share = 0.5
    """Of the masked weights."""
    move_every: Positive = 3
    """Steps between two moves of the masks."""
    easy_above: float = 0.6
    """An image whose likeliest class is likelier than this leaves before the last block."""
    dense_weight: NotNegative = 0.5

    def check_run(self, config: Any) -> None:
        if self.alone_epochs + self.frozen_epochs >= config.train.epochs:
            raise ValueError(f"everything.alone_epochs is {self.alone_epochs}; leave epochs for the backbone to learn")


class Stem(nn.Module):
    """Convolutions in the place of the patch embedding."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.grid_size, self.img_size, self.patch_size = source.grid_size, source.img_size, source.patch_size
        width, side = source.proj.out_channels, source.patch_size[0]
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.proj = nn.Conv2d(8, width, side // 2, stride=side // 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(F.relu(self.conv(images))).flatten(2).transpose(1, 2)


class Backbone(VisionTransformer):
    """A backbone that is not timm's: another stem, residual scaling, a head for every patch."""

    def __init__(self, plain: Any, **options: Any) -> None:
        super().__init__(plain, **options)
        self.patch_embed = Stem(plain.patch_embed)
        self.aux_head = nn.Linear(self.embed_dim, self.num_classes)
        for block in self.blocks:
            block.residual_divisor = 2.0

    def readout(self, tokens: Tensor) -> Tensor:
        """Class logits and, as in LV-ViT, half of the largest logits of a patch."""
        return super().readout(tokens) + 0.5 * self.aux_head(tokens[:, self.num_prefix_tokens :]).amax(1)

    def stem_macs(self, num_embedded: int) -> int:
        side = self.patch_embed.patch_size[0]
        return num_embedded * (self.patch_embed.proj.weight.numel() + (side // 2) ** 2 * 3 * 9 * 8)

    def readout_macs(self, num_tokens: int) -> int:
        return super().readout_macs(num_tokens) + num_tokens * self.aux_head.weight.numel()


def backbone(*, num_classes: int, img_size: int, rel_pos: str = "none", sort: Any, token_counts: Any, **settings: Any):
    """`--set model.name=everything:backbone`."""
    plain = create_plain("vit_tiny_patch16_224", num_classes=num_classes, img_size=img_size, **settings)
    return Backbone(plain, rel_pos=rel_pos, sort=sort, token_counts=token_counts)


class Everything(Method):
    name = "everything"
    sections = (EverythingSettings,)
    compiles = False
    costs_vary = True
    knob = "keep rate"

    def __init__(self, model: Any, config: Any, steps_per_epoch: int) -> None:
        super().__init__(model, config, steps_per_epoch)
        self.own = config.section_of(EverythingSettings)
        self.place = min(2, len(model.blocks) - 1)
        self.predictor = nn.Sequential(nn.LayerNorm(model.embed_dim), nn.Linear(model.embed_dim, 1))
        for number, weight in enumerate(self._masked()):
            kept = round(self.own.density * weight.numel())
            order = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(number), device="cpu")
            mask = torch.zeros(weight.numel(), dtype=torch.bool, device="cpu")
            mask[order[:kept]] = True
            self.register_buffer(f"mask{number}", mask.view(weight.shape))
            with torch.no_grad():
                weight.mul_(mask.view(weight.shape).to(weight.device))
        self.register_buffer("first_mean", torch.zeros(()))
        if self.own.teacher is not None:
            self.teachers["teacher"] = Teacher(self.own.teacher, config, model.num_classes)

    @classmethod
    def wants(cls, settings: Any) -> frozenset[str]:
        return frozenset({"view", "maps"})

    def _masked(self) -> list[nn.Parameter]:
        return [block.mlp.fc1.weight for block in self.model.blocks]

    def _masks(self) -> list[Tensor]:
        return [getattr(self, f"mask{number}") for number in range(len(self._masked()))]

    # A training step.

    def forward(
        self, images: Tensor, targets: Tensor, at: Progress, dense: DenseTargets | None = None
    ) -> dict[str, Tensor]:
        assert dense is not None
        assert dense.view is not None
        assert dense.maps is not None
        early, late, patches = self._tokens(images, self.own.keep)
        model = self.model
        logits = model.readout(late)
        loss = self.classification_loss(logits, targets) + self.classification_loss(model.readout(early), targets)
        out = {"logits": logits}
        aux = model.aux_head(patches).float()  # (B, N, classes), of all patches, before any is dropped
        out["dense"] = F.cross_entropy(aux.flatten(0, 1), self._patch_targets(dense).flatten())
        loss = loss + self.own.dense_weight * out["dense"]
        if self.teachers:
            answer = self.teachers["teacher"](images)
            out["kl"] = F.kl_div(
                logits.float().log_softmax(1), answer.logits.float().log_softmax(1), log_target=True,
                reduction="batchmean",
            )  # fmt: skip
            loss = loss + 0.5 * out["kl"]
        return {"loss": loss, **out}

    def _tokens(self, images: Tensor, keep: float) -> tuple[Tensor, Tensor, Tensor]:
        """Normed tokens before and after the last block, both (B, K, D), and the patches that were scored."""
        model, prefix = self.model, self.model.num_prefix_tokens
        tokens, positions = model.embed(images), model.positions(None)
        tokens = model.run_blocks(tokens, positions, stop=self.place)
        patches, kept, weight = self._choose(tokens, keep)
        tokens = gather(tokens, kept, prefix)
        # The share of the score that a patch goes on with: what the predictor learns from.
        tokens = torch.cat((tokens[:, :prefix], tokens[:, prefix:] * weight.gather(1, kept)[..., None]), dim=1)
        positions = model.positions(kept)
        before = model.run_blocks(tokens, positions, self.place, len(model.blocks) - 1)
        after = model.run_blocks(before, positions, len(model.blocks) - 1)
        return model.norm(before), model.norm(after), patches

    def begin_run(self, images: Tensor) -> None:
        self.first_mean.copy_(images.mean())

    def _choose(self, tokens: Tensor, keep: float) -> tuple[Tensor, Tensor, Tensor]:
        patches = tokens[:, self.model.num_prefix_tokens :]
        scores = self.predictor(patches + self.first_mean * patches[..., :1]).squeeze(-1)  # (B, N)
        order = scores.float().sort(dim=1, descending=True, stable=True).indices
        return patches, order[:, : self._count(keep)].sort(dim=1).values, scores.sigmoid()

    def _count(self, keep: float) -> int:
        return max(1, round(keep * self.model.num_patches))

    def _patch_targets(self, dense: DenseTargets) -> Tensor:
        """The class of the label map's cell at each patch's centre, (B, N)."""
        height, width = self.model.grid_size
        crop, maps = dense.view.crop, dense.maps
        rows = (torch.arange(height, device=crop.device) + 0.5) / height
        columns = (torch.arange(width, device=crop.device) + 0.5) / width
        columns = torch.where(dense.view.flipped[:, None], 1 - columns, columns)  # (B, w)
        y = ((crop[:, :1] + crop[:, 2:3] * rows) * maps.shape[1]).long().clamp(0, maps.shape[1] - 1)
        x = ((crop[:, 1:2] + crop[:, 3:] * columns) * maps.shape[2]).long().clamp(0, maps.shape[2] - 1)
        image = torch.arange(len(maps), device=maps.device)[:, None, None]
        return maps[image, y[:, :, None], x[:, None, :]].long().flatten(1)

    def mask_gradients(self, at: Progress) -> None:
        if self._moves(at):  # growth looks at gradients of weights that are not there
            self._growth = [None if w.grad is None else whole(w.grad).abs().clone() for w in self._masked()]
        for weight, mask in zip(self._masked(), self._masks(), strict=True):
            if weight.grad is not None:
                local = weight.grad.to_local() if hasattr(weight.grad, "to_local") else weight.grad
                local.mul_(part_like(mask, weight))

    def after_optimizer(self, at: Progress, step: Step) -> None:
        self._apply_masks()

    @torch.no_grad()
    def _apply_masks(self) -> None:
        for weight, mask in zip(self._masked(), self._masks(), strict=True):
            local = weight.to_local() if hasattr(weight, "to_local") else weight
            local.mul_(part_like(mask, weight))

    def after_average(self, at: Progress) -> None:
        self._apply_masks()

    def _moves(self, at: Progress) -> bool:
        learns = at.epoch >= self.own.alone_epochs + self.own.frozen_epochs
        return learns and at.step % self.own.move_every == self.own.move_every - 1

    @torch.no_grad()
    def end_step(self, at: Progress, step: Step) -> None:
        if not self._moves(at) or not step.taken:
            return
        for weight, mask, growth in zip(self._masked(), self._masks(), self._growth, strict=True):
            if growth is None:
                continue
            size = whole(weight).abs().flatten()
            flat = mask.flatten()
            count = int(flat.sum()) // 4
            drop = size.masked_fill(~flat, float("inf")).sort(stable=True).indices[:count]
            grow = growth.flatten().masked_fill(flat, -1.0).sort(descending=True, stable=True).indices[:count]
            moved = torch.zeros_like(flat)
            moved[drop] = moved[grow] = True
            flat[drop], flat[grow] = False, True
            mask.copy_(flat.view(mask.shape))
            step.reset_moments(weight, moved.view(mask.shape))
        self._apply_masks()

    # What is optimized.

    def phases(self) -> list[Phase]:
        alone, optim = self.own.alone_epochs, self.config.optim
        first = [Phase("alone", alone, replace(optim, warmup_epochs=0))] if alone else []
        return [*first, Phase("together", self.config.train.epochs - alone, optim)]

    def begin_phase(self, phase: Phase) -> None:
        self.model.requires_grad_(phase.name == "together")
        self.model.aux_head.requires_grad_(True)

    def param_groups(self, phase: Phase) -> list[dict[str, Any]]:
        decay, heads = phase.optim.weight_decay, [self.predictor, self.model.aux_head]
        own = [part for head in heads for part in head.parameters() if part.requires_grad]
        theirs = [
            group | {"name": "backbone"}
            for group in param_groups_weight_decay(self.model, decay, no_weight_decay_list=self.model.no_weight_decay())
        ]
        for group in theirs:
            group["params"] = [part for part in group["params"] if not any(part is one for one in own)]
        return [group for group in (*theirs, {"params": own, "weight_decay": 0.0}) if group["params"]]

    def lr_factors(self, at: Progress) -> dict[str, float]:
        first = self.own.alone_epochs
        return {} if at.epoch < first else {"backbone": float(at.epoch >= first + self.own.frozen_epochs)}

    # What it costs, and what it can do.

    def stage(self, at: Progress) -> Stage:
        return Stage(name="frozen" if at.epoch < self.own.alone_epochs + self.own.frozen_epochs else "")

    def training_tokens(self, stage: Stage, image_size: int | None = None) -> tuple[int, ...]:
        return self.tokens(self.own.keep)

    def training_cost(self, stage: Stage, image_size: int | None = None) -> Cost:
        cost = self.cost(self.own.keep)
        return replace(cost, teacher=self._teachers_macs(), backward=cost.forward if stage.name else None)

    def points(self) -> tuple[float, ...]:
        return (self.own.keep, 1.0)

    def fine_points(self) -> tuple[float, ...]:
        return tuple(number / 10 for number in range(1, 11))

    def predict(self, images: Tensor, point: float | None = None) -> Tensor:
        return self._answer(images, point)[0]

    def predict_with_cost(self, images: Tensor, point: float | None = None) -> tuple[Tensor, Tensor]:
        logits, easy = self._answer(images, point)
        saved = block_macs(self.model.blocks[-1], self.tokens(point)[-1])
        return logits, self.cost(point).forward - saved * easy.double()

    def _answer(self, images: Tensor, point: float | None) -> tuple[Tensor, Tensor]:
        early, late, _ = self._tokens(images, self.own.keep if point is None else point)
        first = self.model.readout(early)
        easy = first.float().softmax(1).amax(1) > self.own.easy_above
        return torch.where(easy[:, None], first, self.model.readout(late)), easy

    def tokens(self, point: float | None = None) -> tuple[int, ...]:
        fewer = self._count(self.own.keep if point is None else point) + self.model.num_prefix_tokens
        return tuple(self.model.num_tokens if n < self.place else fewer for n in range(len(self.model.blocks)))

    def cost(self, point: float | None = None) -> Cost:
        return Cost(
            macs_of_tokens(self.model, self.tokens(point)), extra=linear_macs(self.predictor, self.model.num_patches)
        )

    def depths(self, images: Tensor, point: float | None = None) -> Tensor:
        model = self.model
        tokens = model.run_blocks(model.embed(images), model.positions(None), stop=self.place)
        kept = self._choose(tokens, self.own.keep if point is None else point)[1]
        reached = torch.full((len(images), model.num_patches), self.place, device=images.device)
        return reached.scatter_(1, kept, len(model.blocks))

    def attention_maps(self, images: Tensor, point: float | None = None, blocks: Any = None) -> list[Tensor]:
        """Of the blocks before patches are dropped."""
        return attention_maps(self.model, self.model.embed(images), None, range(self.place))


class Whole(Method):
    """A method without a knob, which mixes for itself: its model is run as it was trained."""

    name = "whole"
    compiles = False
    shards = False

    def __init__(self, model: Any, config: Any, steps_per_epoch: int) -> None:
        super().__init__(model, config, steps_per_epoch)
        self.whiten = nn.BatchNorm2d(3)

    def param_groups(self, phase: Phase) -> list[dict[str, Any]]:
        """The class token stays as it began: it is in no group."""
        groups = super().param_groups(phase)
        for group in groups:
            group["params"] = [part for part in group["params"] if part is not self.model.cls_token]
        return groups

    def facts(self) -> dict[str, float]:
        return {"sparsity": 0.25}

    @classmethod
    def mixes(cls, settings: Any) -> str:
        return "tokens"

    def begin_epoch(self, at: Progress) -> None:
        self.began = [*getattr(self, "began", []), at.step]

    def forward(
        self, images: Tensor, targets: Tensor, at: Progress, dense: DenseTargets | None = None
    ) -> dict[str, Tensor]:
        assert dense is None
        self.targets = targets
        logits = self.model(self.whiten(images))
        return {"loss": self.classification_loss(logits, targets), "logits": logits}

    def points(self) -> tuple[None]:
        return (None,)

    def predict(self, images: Tensor, point: None = None) -> Tensor:
        return self.model(self.whiten(images))

    def tokens(self, point: None = None) -> tuple[int, ...]:
        return (self.model.num_tokens,) * len(self.model.blocks)

    def cost(self, point: None = None) -> Cost:
        return Cost(macs_of_tokens(self.model, self.tokens()))

    def depths(self, images: Tensor, point: None = None) -> Tensor:
        return torch.full((len(images), self.model.num_patches), len(self.model.blocks))

    def attention_maps(self, images: Tensor, point: None = None, blocks: Any = None) -> list[Tensor]:
        return attention_maps(self.model, self.model.embed(images), None, blocks)
