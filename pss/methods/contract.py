"""The contract between the training loop and a training method.

The loop (`pss.training`) owns steps, epochs, devices, checkpoints and logs. A method owns what happens inside a step:
the forward pass, the losses, which parameters train with which settings, and what one image costs. A method is one
`nn.Module`: DDP wraps all of it, teachers included, and whatever it must remember lives in parameters and buffers (or
`get_extra_state`), so that a checkpoint of the module is a checkpoint of the method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn

from pss.config import Config, OptimConfig
from pss.models.flops import macs
from pss.models.vit import VisionTransformer


@dataclass(frozen=True)
class Progress:
    """Where the run is. Everything that varies over a run is a function of this, so a resumed run repeats it."""

    step: int  # optimizer steps taken before this one, over all phases
    total_steps: int  # of all phases
    epoch: int  # epochs completed before this one, over all phases
    epochs: int  # of all phases
    seed: int
    rank: int


@dataclass(frozen=True)
class Phase:
    """A stretch of epochs with one set of trainable parameters; it begins with a fresh optimizer and DDP wrapper."""

    name: str
    epochs: int
    optim: OptimConfig


class Method(nn.Module):
    """A model and the way it is trained. Subclasses implement `forward`; the other parts have ordinary defaults."""

    model: VisionTransformer

    def __init__(self, model: VisionTransformer, config: Config, steps_per_epoch: int) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.steps_per_epoch = steps_per_epoch

    def forward(self, images: Tensor, targets: Tensor, at: Progress) -> dict[str, Tensor]:
        """One training forward.

        Args:
            images: float, normalised, (B, 3, S, S); with progressive resizing smaller than the model's own at first.
            targets: class indices, int64 (B,), or class probabilities (B, classes) where images are mixed.
            at: the current position.

        Returns:
            `loss` (scalar, to be minimised), `logits` (B, classes), and any further scalars worth logging.
        """
        raise NotImplementedError

    def predict(self, images: Tensor, rho: float = 1.0) -> Tensor:
        """Logits (B, classes) as at inference, with the share `rho` of the patches."""
        logits: Tensor = self.model(images, rho=rho)
        return logits

    def rho(self, at: Progress) -> float:
        """The share of patches that training sees at this step."""
        return 1.0

    def rhos(self, total_steps: int) -> tuple[float, ...]:
        """All shares of patches that training sees in a run of `total_steps` steps."""
        return (1.0,)

    def num_tokens(self, rho: float, image_size: int | None = None) -> int:
        """Tokens per image that the blocks see at `rho`, prefix tokens included.

        `image_size` is the side of images with a lower resolution than the model's own.
        """
        return self.model.num_kept_tokens(rho, image_size)

    def cost(self, rho: float = 1.0, image_size: int | None = None) -> int:
        """Multiply-accumulates of the model for one image; `image_size` as in `num_tokens`."""
        return macs(self.model, rho, image_size)

    def phases(self) -> list[Phase]:
        """The phases of the run, in order; their epochs add up to the run's."""
        return [Phase(name="train", epochs=self.config.train.epochs, optim=self.config.optim)]

    def begin_phase(self, phase: Phase) -> None:
        """Called before the phase's optimizer is built, also when a run is resumed inside the phase."""

    def param_groups(self, phase: Phase) -> list[dict[str, Any]]:
        """Optimizer groups: decay on matrices, none on 1-D parameters, position embedding and class token.

        Learning rates fall towards the input where `layer_decay` says so.

        A group may carry `lr_scale`, a factor on the phase's learning rate.
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

    def after_optimizer(self, at: Progress) -> None:
        """Called right after the optimizer step, before the moving average (to re-apply weight masks, say).

        Also where the step was skipped because its gradients were not finite.
        """

    def end_step(self, at: Progress) -> None:
        """Called last in a step, while the averaged gradients are still there (to move masks, say)."""

    def classification_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy against class indices (smoothed as configured) or given probabilities (used as they are)."""
        smoothing = 0.0 if targets.is_floating_point() else self.config.loss.label_smoothing
        return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
