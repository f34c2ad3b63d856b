"""Labels of patches (Jiang et al., NeurIPS 2021): picked as patches are, and of images held against the true class."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pss.models.vit import VisionTransformer

_AGREEING, _DIFFERING = 0.5, 0.9  # a teacher's share where its class is the true one, and where it is not


def labels_of(kept: Tensor, labels: Tensor) -> Tensor:
    """Labels (B, N) or (B, N, classes) of all patches to those of the patches `kept` (B, K)."""
    return labels.gather(1, kept.view(*kept.shape, *[1] * (labels.ndim - 2)).expand(-1, -1, *labels.shape[2:]))


def with_truth(labels: Tensor, truth: Tensor, smoothing: float) -> Tensor:
    """A teacher's labels of images (B, classes), with a share of the true class: half where it is the likeliest one of
    the teacher's, a tenth where it is not.

    Args:
        labels: Class probabilities.
        truth: Class indices (B,), which are smoothed, or probabilities.
        smoothing: Share of an index that is spread evenly over all classes.
    """
    if not truth.is_floating_point():
        num_classes = labels.shape[1]
        truth = F.one_hot(truth, num_classes) * (1 - smoothing) + smoothing / num_classes
    agree = labels.argmax(1) == truth.argmax(1)
    share = torch.where(agree, _AGREEING, _DIFFERING).unsqueeze(1)
    return share * labels + (1 - share) * truth


def leave_patches_out(model: VisionTransformer) -> None:
    """Have the classifier of patches neither learn nor count in a prediction: nothing would tell it what is right."""
    model.patch_share = 0.0
    for name in model.own_heads:
        model.get_submodule(name).requires_grad_(False)
