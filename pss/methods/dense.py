"""The plain model: every patch at every step. The baseline that all others are measured against."""

from __future__ import annotations

from torch import Tensor

from pss.methods.contract import Method
from pss.methods.vocabulary import DenseTargets, Progress


class Dense(Method):
    """Trains on all patches; `predict` samples like any other method's."""

    name = "dense"

    def forward(
        self, images: Tensor, targets: Tensor, at: Progress, dense: DenseTargets | None = None
    ) -> dict[str, Tensor]:
        logits = self.model(images, low_resolution=True)
        return {"loss": self.classification_loss(logits, targets), "logits": logits}
