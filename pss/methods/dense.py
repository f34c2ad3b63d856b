"""The plain model: every patch at every step. The baseline that all others are measured against."""

from __future__ import annotations

from torch import Tensor

from pss.methods.patches import PatchMethod
from pss.methods.vocabulary import DenseTargets, Progress


class Dense(PatchMethod):
    """Trains on all patches; `predict` samples like any other method's."""

    name = "dense"

    def forward(
        self, images: Tensor, targets: Tensor, at: Progress, dense: DenseTargets | None = None
    ) -> dict[str, Tensor]:
        entered = self.enter(images, at)
        tokens = self.model.compute(self.model.trunk, entered.tokens, entered.places)
        return self.losses(tokens, entered, targets, dense)
