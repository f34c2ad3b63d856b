"""Patches that are classified, too: what methods have in common that train a backbone with a classifier of patches.

Jiang et al., NeurIPS 2021 (https://arxiv.org/abs/2104.10858): the loss is a cross entropy of the class token and one of
the patches, each against a label of its own. Without label maps all patches have the label of their image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from annotated_types import Ge, Le
from torch import Tensor

from pipelines.settings import AboveZero, NotNegative, ReadIf
from pss.methods.contract import Method
from pss.methods.parts.dense_loss import labels_of, leave_patches_out, with_truth
from pss.methods.parts.mix_token import draw_boxes, exchanged, own_share
from pss.methods.parts.token_labels import soft_labels
from pss.methods.vocabulary import DenseTargets, Progress
from pss.models.create import classifies_patches
from pss.models.sampling import num_kept_tokens, spread, step_generator
from pss.models.vit import VisionTransformer
from pss.sections import MethodSection, RunSettings

_Patches = ReadIf(
    lambda at: classifies_patches(at.run.model.name) is not False, "a model.name with a classifier of patches (lvvit_s)"
)
_Labels = ReadIf(lambda at: at.run.data.label_maps is not None, "data.label_maps")


@dataclass(frozen=True, kw_only=True)
class TokensSettings(MethodSection, section="tokens"):
    """Losses of a backbone that classifies patches, too (LV-ViT); the defaults are the published ones."""

    class_weight: Annotated[AboveZero, _Patches] = 1.0
    """Of the loss of the class token."""
    patch_weight: Annotated[NotNegative, _Patches] = 1.0
    """Of the loss of the patches, a mean over those that are seen; at 0 their classifier neither learns nor counts in a
    prediction."""
    mix: Annotated[bool | None, _Patches] = None
    """MixToken: images exchange a box of patches behind the stem, in the place of mixup and CutMix. None does so with
    LV-ViT, unless the patches have no weight."""
    ground_truth: Annotated[bool, _Patches, _Labels] = False
    """Let the true class count in the class token's label: half where the label map agrees with it, a tenth where it
    does not. Otherwise the label is the map's alone."""
    label_geometry: Annotated[Literal["whole", "reference"], _Patches, _Labels] = "whole"
    """Which part of a label map an image is shown: its own window of a map of the whole image, or what the authors'
    code takes for it."""
    label_floor: Annotated[float, Ge(-1e4), Le(1e4), _Patches, _Labels] = 0.0
    """The logit of classes that a label map leaves out."""

    def mixes(self, model_name: str) -> bool:
        """Whether tokens are mixed in the model of that name."""
        return bool(classifies_patches(model_name)) and self.patch_weight > 0 if self.mix is None else self.mix

    def check_run(self, config: Any) -> None:
        mixed = [name for name in ("mixup", "cutmix") if getattr(config.loss, name)]
        if config.data.label_maps is not None and mixed and not self.mixes(config.model.name):
            raise ValueError(
                f"loss.{mixed[0]} mixes images, and their label maps (data.label_maps) cannot follow; set "
                f"loss.{mixed[0]}=0, or tokens.mix=true"
            )


class Entered(NamedTuple):
    """What of a batch enters the blocks; K tokens, of which the prefix comes first."""

    tokens: Tensor  # (B, K, D)
    places: Tensor | None  # as `VisionTransformer.see` returns them
    grid: tuple[int, int]  # of the images, which may be smaller than the model's
    kept: Tensor | None = None  # which patches of that grid they are, (B, K - prefix); None for all
    box: Tensor | None = None  # where tokens of another image are, (patches of the grid,)


class PatchMethod(Method):
    """Base of methods that train patches where the backbone classifies them, and the image alone where it does not."""

    sections: ClassVar[tuple[type[MethodSection], ...]] = (TokensSettings,)

    def __init__(self, model: VisionTransformer, config: RunSettings, steps_per_epoch: int) -> None:
        super().__init__(model, config, steps_per_epoch)
        self.tokens_settings = settings = config.section_of(TokensSettings)
        if model.patch_share is None and (settings != TokensSettings() or self.wants(config)):
            raise ValueError(
                f"model.name={config.model.name} has no classifier of patches, and settings of tokens or "
                "data.label_maps ask for one; leave them out, or name a model that has one, such as lvvit_s"
            )
        self.mixing = settings.mixes(config.model.name)
        if settings.patch_weight == 0:
            leave_patches_out(model)

    @classmethod
    def mixes(cls, settings: RunSettings) -> Literal["pixels", "tokens"]:
        return "tokens" if settings.section_of(TokensSettings).mixes(settings.model.name) else "pixels"

    @classmethod
    def wants(cls, settings: RunSettings) -> frozenset[Literal["view", "maps"]]:
        learns = classifies_patches(settings.model.name) is not False
        return frozenset({"view", "maps"}) if learns and settings.data.label_maps is not None else frozenset()

    def enter(self, images: Tensor, at: Progress, rho: float = 1.0) -> Entered:
        """Images to the share `rho` of their tokens, mixed before any are dropped.

        The box and what is dropped are functions of (seed, step, rank).
        """
        model, box = self.model, None
        grid = model.grid_of((images.shape[-2], images.shape[-1]))
        generator = step_generator(at.seed, at.step, at.rank, images.device) if rho < 1 or self.mixing else None
        if model.patch_share is None:
            return Entered(*model.see(images, rho, generator=generator, low_resolution=True), grid)
        places = None if grid == model.grid_size else spread(grid, model.grid_size, images.device)
        patches = model.embed_patches(images, None, places)
        if self.mixing:
            assert generator is not None
            box = draw_boxes(1, grid, generator)[0]
            patches = exchanged(patches, box)
        tokens = model.place(patches, None, places)
        count = num_kept_tokens(rho, len(patches[0]), model.num_prefix_tokens, model.token_counts)
        tokens, kept = model.take(tokens, count, None, generator)
        if kept is not None:
            places = kept if places is None else places[kept]
        return Entered(tokens, places, grid, kept, box)

    def losses(
        self, tokens: Tensor, entered: Entered, targets: Tensor, dense: DenseTargets | None
    ) -> dict[str, Tensor]:
        """What `forward` returns, of the trunk's tokens: a row for each that entered, (B, K, D)."""
        settings, box = self.tokens_settings, entered.box
        logits, patches = self.model.answers(tokens)
        image, labels = self._labels(targets, entered.grid, dense)
        of_image = self.classification_loss(logits, image)
        if box is not None:
            own = own_share(box)
            of_image = own * of_image + (1 - own) * self.classification_loss(logits, image.flip(0))
        out = {"loss": settings.class_weight * of_image, "logits": logits}
        if patches is None:
            return out
        if box is not None:
            labels = exchanged(labels, box)
        if entered.kept is not None:
            labels = labels_of(entered.kept, labels)
        of_patches = self.classification_loss(patches.flatten(0, 1), labels.flatten(0, 1))
        out["loss"] = out["loss"] + settings.patch_weight * of_patches
        return out | {"classification": of_image, "patches": of_patches}

    def _labels(self, targets: Tensor, grid: tuple[int, int], dense: DenseTargets | None) -> tuple[Tensor, Tensor]:
        """Of images, (B,) or (B, classes), and of the patches of their grid, (B, N) or (B, N, classes)."""
        if dense is None or dense.maps is None:
            return targets, targets.unsqueeze(1).expand(-1, grid[0] * grid[1], *targets.shape[1:])
        assert dense.view is not None, "it comes with the maps"
        smoothing, settings = self.config.loss.label_smoothing, self.tokens_settings
        patches, image = soft_labels(
            dense.maps,
            dense.view,
            grid=grid,
            num_classes=self.model.num_classes,
            smoothing=smoothing,
            geometry=settings.label_geometry,
            floor=settings.label_floor,
        )
        return with_truth(image, targets, smoothing) if settings.ground_truth else image, patches
