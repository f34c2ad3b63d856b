"""Token Expansion (Huang et al., CVPR 2024): early epochs run most blocks on a subset of the tokens, which grows.

After the first block some patches are selected, spread over the image and over what their features say; each of the
others is averaged into the selected one that it resembles most. Three stages, by the epoch, select more and more, the
last one all. The module has no parameters, and evaluation is that of the plain model on all patches.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.settings import Always, Natural, Positive, Remedy, Share
from pss.methods.patches import PatchMethod
from pss.methods.sampled import build_schedule, course
from pss.methods.vocabulary import Cost, DenseTargets, Progress, Stage
from pss.models.flops import macs, macs_of_tokens
from pss.models.sampling import num_kept_tokens
from pss.models.vit import VisionTransformer
from pss.sections import MethodSection, OptionalSchedule, RunSettings

Distance = Literal["cosine", "euclidean", "manhattan"]

_NAMES = ("", "stage 1", "stage 2", "")
"""Of the stages, for `Stage.name`: before the first and in the last all tokens go on, as in the plain model."""


@dataclass(frozen=True, kw_only=True)
class ToESettings(MethodSection, section="toe"):
    """Token Expansion; the defaults are the published ones."""

    in_epochs = ("starts",)

    rate: Always[Share] = 0.5
    """r_1, the share of the patches that stage 1 selects. Half of it are seeds; stage 2 selects (1 + r_1) / 2."""
    starts: Always[Annotated[tuple[Natural, Natural, Natural] | None, Remedy("three epochs: 0,100,200")]] = None
    """Epochs, from 0, at which stages 1, 2 and 3 begin; all tokens go on before. None: thirds of the run."""
    repeats: Always[Positive] = 2
    """k, the steps in which a stage finds its new patches; with as many as there are new patches, one by one."""
    distance: Always[Distance] = "cosine"
    """What tells features apart: the angle, or how far they lie from each other as they are."""
    after: Always[Positive] = 1
    """Blocks that see all tokens."""
    reference: Always[bool] = False
    """Seeds and counts of the authors' code: a whole number of patches from one seed to the next, which may leave the
    lower rows without, and each stage's increment rounded down on its own."""

    def check(self) -> None:
        if self.starts is not None and list(self.starts) != sorted(self.starts):
            raise ValueError(
                f"toe.starts is {_listed(self.starts)}; each stage begins with the one before it or later: "
                f"--set toe.starts={_listed(sorted(self.starts))}"
            )

    def check_run(self, config: Any) -> None:
        epochs = config.train.epochs
        if self.starts is not None and self.starts[-1] >= epochs:
            raise ValueError(
                f"toe.starts is {_listed(self.starts)} and train.epochs {epochs}; the last stage, which sees all "
                f"tokens, would never begin: --set toe.starts={_listed(thirds(epochs))}, or none for the same"
            )
        if self.reference and config.model.token_counts != "published":
            raise ValueError(
                f"toe.reference has the published token counts, and model.token_counts={config.model.token_counts} "
                "others; leave one of them out"
            )


class ToE(PatchMethod):
    """Fewer tokens after the first block, in the first two stages of training. Under a patch sampling schedule, those
    that the schedule keeps are what is selected from."""

    name = "toe"
    sections = (ToESettings, OptionalSchedule, *PatchMethod.sections)

    def __init__(self, model: VisionTransformer, config: RunSettings, steps_per_epoch: int) -> None:
        super().__init__(model, config, steps_per_epoch)
        self.own = config.section_of(ToESettings)
        self.schedule = build_schedule(config, config.section_of(OptionalSchedule), steps_per_epoch)
        self.starts = thirds(config.train.epochs) if self.own.starts is None else self.own.starts
        if self.own.after >= len(model.blocks):
            raise ValueError(
                f"toe.after is {self.own.after} and the model has {len(model.blocks)} blocks (model.depth), so that "
                "none would see fewer tokens; set a lower toe.after, or a model of more blocks"
            )

    @property
    def stride(self) -> int | None:
        """From seed to seed in the authors' code, whose floating-point division makes 4 of 1 / 0.2; None for ours."""
        return int(1 // (self.own.rate / 2)) if self.own.reference else None

    # A training step.

    def forward(
        self, images: Tensor, targets: Tensor, at: Progress, dense: DenseTargets | None = None
    ) -> dict[str, Tensor]:
        entered = self.enter(images, at, self.schedule(at.step))
        tokens = self.model.compute(self._trunk, entered.tokens, self.stage_number(at), entered.places)
        return self.losses(tokens, entered, targets, dense)

    def _trunk(self, tokens: Tensor, number: int, kept: Tensor | None) -> Tensor:
        """`VisionTransformer.trunk`, with what stage `number` does on the way.

        Where patches are classified, those that were merged come back as zeros: all that their classifier says of them
        is its bias.
        """
        model, entered = self.model, tokens.shape[1] - self.model.num_prefix_tokens
        tokens = model.run_blocks(tokens, model.positions(kept), stop=self.own.after)
        tokens, kept, chosen = self.expand(tokens, kept, number)
        normed: Tensor = model.norm(model.run_blocks(tokens, model.positions(kept), start=self.own.after))
        if chosen is None or not model.patch_share:
            return normed
        prefix, patches = normed[:, : model.num_prefix_tokens], normed[:, model.num_prefix_tokens :]
        canvas = patches.new_zeros(patches.shape[0], entered, patches.shape[2])
        return torch.cat((prefix, canvas.scatter(1, chosen.unsqueeze(2).expand_as(patches), patches)), dim=1)

    def expand(self, tokens: Tensor, kept: Tensor | None, number: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Token Expansion between two blocks.

        Args:
            tokens: (B, K, D), prefix first, which is left as it is.
            kept: Places of the patches on the model's grid, as `VisionTransformer.see` returns them.
            number: Of the stage.

        Returns:
            The prefix and the selected patches (B, S, D), the others averaged into them; the places of the selected
            ones (B, S - prefix); and which of the given patches they are (B, S - prefix). In a stage that selects all,
            what it was given, and None.
        """
        prefix = self.model.num_prefix_tokens
        patches = tokens[:, prefix:]
        counts = self.counts(number, patches.shape[1])
        if counts[-1] == patches.shape[1]:
            return tokens, kept, None
        seeds = uniform_seeds(patches.shape[1], counts[0], self.stride, tokens.device)
        chosen, nearest = select(patches, seeds, self.steps(counts), self.own.distance)
        merged = torch.cat((tokens[:, :prefix], merge(patches, chosen, nearest)), dim=1)
        if kept is None:
            return merged, chosen, chosen
        return merged, kept[chosen] if kept.ndim == 1 else kept.gather(1, chosen), chosen

    # Stages and what they cost.

    def stage_number(self, at: Progress) -> int:
        """0 before the first stage, then 1, 2 and 3."""
        return sum(start <= at.epoch for start in self.starts)

    def rates(self, number: int) -> tuple[float, ...]:
        """Shares of the patches: the seeds, and what each stage selects, up to stage `number`."""
        rate = self.own.rate
        return (rate / 2, rate, (1 + rate) / 2, 1.0)[: number + 1] if number else (1.0,)

    def counts(self, number: int, num_patches: int) -> tuple[int, ...]:
        """Patches of an image with `num_patches`: the seeds, and what each stage selects, up to stage `number`. There
        is one seed at least."""
        rates = self.rates(number)
        if rates[-1] == 1:
            return (num_patches,)
        if self.own.reference:
            increments = [many - few for few, many in itertools.pairwise(rates)]
            sizes = [max(1, _floor(rates[0] * num_patches)), *(_floor(share * num_patches) for share in increments)]
            return tuple(itertools.accumulate(sizes))
        counts = [max(1, _floor(rate * num_patches)) for rate in rates]
        if self.model.token_counts == "aligned":
            prefix = self.model.num_prefix_tokens
            counts[1:] = [num_kept_tokens(rate, num_patches, prefix, "aligned") - prefix for rate in rates[1:]]
            counts[0] = min(counts)
        return tuple(counts)

    def steps(self, counts: Sequence[int]) -> list[int]:
        """How many patches each step of the expansion finds, from one of `counts` to the next: k equal parts, of which
        the last one has the rest; as many as there are patches, where they are fewer."""
        sizes = []
        for new in (many - few for few, many in itertools.pairwise(counts)):
            repeats = min(self.own.repeats, new)
            sizes += [new // repeats] * (repeats - 1) + [new - new // repeats * (repeats - 1)] if new else []
        return sizes

    def stage(self, at: Progress) -> Stage:
        number = self.stage_number(at)
        return Stage(self.schedule(at.step), _NAMES[number] if self.rates(number)[-1] < 1 else "")

    def course(self) -> str:
        entering = course(self.config, self.config.section_of(OptionalSchedule), self.steps_per_epoch)
        lengths = [end - begin for begin, end in itertools.pairwise((0, *self.starts, self.config.train.epochs))]
        shares = [
            f"{_share(self.rates(number)[-1])} for {length:,} epoch{'s' * (length != 1)}"
            for number, length in enumerate(lengths)
            if length
        ]
        return f"ρ: {entering}; of these go on after block {self.own.after}: {', '.join(shares)}"

    def training_tokens(self, stage: Stage, image_size: int | None = None) -> tuple[int, ...]:
        before = self.model.num_kept_tokens(stage.rho, image_size)
        prefix, after = self.model.num_prefix_tokens, self.own.after
        behind = prefix + self.counts(_NAMES.index(stage.name), before - prefix)[-1]
        return (before,) * after + (behind,) * (len(self.model.blocks) - after)

    def training_cost(self, stage: Stage, image_size: int | None = None) -> Cost:
        """Extra are the distances of all patches from those that are selected, through which nothing is learnt, and the
        sums of those that are merged, through which gradients go back to what is summed."""
        model, tokens = self.model, self.training_tokens(stage, image_size)
        before, behind = tokens[0], tokens[-1]
        whole = macs_of_tokens(model, [before] * len(tokens))
        backbone = macs(model, stage.rho, image_size) - whole + macs_of_tokens(model, tokens)
        backbone += model.readout_macs(before) - model.readout_macs(behind)  # merged patches are classified, too
        if before == behind:
            return Cost(backbone)
        prefix = model.num_prefix_tokens
        product = (before - prefix) * (behind - prefix) * model.embed_dim
        return Cost(backbone, extra=2 * product, backward=2 * backbone + product)


def thirds(epochs: int) -> tuple[int, int, int]:
    """Where the three stages of a run of so many epochs begin; the last one always does."""
    return 0, min(round(epochs / 3), epochs - 1), min(round(2 * epochs / 3), epochs - 1)


def uniform_seeds(
    num_patches: int, num_seeds: int, stride: int | None = None, device: torch.device | None = None
) -> Tensor:
    """Patch indices at equal distances in raster order, int64 (num_seeds,): seed j is floor(j * patches / seeds), or
    j * `stride` where one is given."""
    places = torch.arange(num_seeds, device=device)
    return places * num_patches // num_seeds if stride is None else places * stride


@torch.no_grad()
def select(
    patches: Tensor, seeds: Tensor, steps: Sequence[int], distance: Distance = "cosine"
) -> tuple[Tensor, Tensor]:
    """Widest feature expansion (Huang et al., 2024, step 2): in each step the patches join whose nearest selected one
    is farthest. Of equally far ones the lower index goes first.

    Args:
        patches: Features, (B, n, D); compared in single precision at least.
        seeds: Indices of the patches that are selected to begin with, different ones, (a,).
        steps: How many join in each step.
        distance: Between features.

    Returns:
        Indices of the selected patches (B, S), the seeds first, then in the order in which they joined; and for every
        patch the place, in that order, of the selected one that is nearest to it, (B, n): its own if it is selected.
    """
    num_images = patches.shape[0]
    with torch.autocast(patches.device.type, enabled=False):
        features = patches.to(torch.promote_types(patches.dtype, torch.float32))
        if distance == "cosine":
            features = F.normalize(features, dim=-1, eps=1e-6)
        chosen = seeds.expand(num_images, -1)
        near, nearest = _nearness(features, features[:, seeds], distance).max(dim=2)  # (B, n); the first of equals
        for size in steps:
            # Comparing with the newest alone is enough, as the nearest of the others are known.
            taken = near.scatter(1, chosen, torch.inf)
            new = taken.sort(dim=1, stable=True).indices[:, :size]  # (B, size)
            which = new.unsqueeze(2).expand(-1, -1, features.shape[2])
            closest, place = _nearness(features, features.gather(1, which), distance).max(dim=2)
            nearest = torch.where(closest > near, place + chosen.shape[1], nearest)
            near = torch.maximum(near, closest)
            chosen = torch.cat((chosen, new), dim=1)
    ranks = torch.arange(chosen.shape[1], device=chosen.device).expand(num_images, -1)
    return chosen, nearest.scatter(1, chosen, ranks)


def _nearness(features: Tensor, others: Tensor, distance: Distance) -> Tensor:
    """How near features (B, n, D) are to others (B, m, D), larger the nearer: (B, n, m)."""
    if distance == "cosine":
        return features @ others.transpose(1, 2)
    exact = "donot_use_mm_for_euclid_dist"  # differences of large squares would decide who is farthest
    return -torch.cdist(features, others, p=2.0 if distance == "euclidean" else 1.0, compute_mode=exact)


def merge(patches: Tensor, chosen: Tensor, nearest: Tensor) -> Tensor:
    """Selected patches, each the mean of itself and of those that are merged into it: the matrix form, which adds up in
    the same order on every device, unlike a scatter.

    Args:
        patches: (B, n, D).
        chosen: Indices of the selected ones, (B, S).
        nearest: For each patch, which of the selected ones it goes to, (B, n): the selected ones to themselves.

    Returns:
        (B, S, D). Gradients reach every patch, a merged one through its share of the mean.
    """
    num_selected, width = chosen.shape[1], patches.shape[2]
    goes_to = nearest.unsqueeze(1) == torch.arange(num_selected, device=nearest.device).unsqueeze(1)  # (B, S, n)
    merged = goes_to.scatter(2, chosen.unsqueeze(2), False)  # the selected themselves are added as they are
    with torch.autocast(patches.device.type, enabled=False):
        values = patches.to(torch.promote_types(patches.dtype, torch.float32))
        selected = values.gather(1, chosen.unsqueeze(2).expand(-1, -1, width))
        sums = selected + merged.to(values.dtype) @ values
        return (sums / goes_to.sum(dim=2, keepdim=True)).to(patches.dtype)


def _share(rate: float) -> str:
    return "all" if rate == 1 else f"{rate:g}"


def _floor(count: float) -> int:
    return int(count + 1e-9)  # without the noise of the product


def _listed(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))
