"""Sparse methods, and steps of theirs as the trainer takes them, one at a time."""

from __future__ import annotations

import copy

import torch
from torch import nn

from pss import methods, recipes
from pss.methods import Progress, Step
from pss.training.guard import skipping
from pss.training.optim import build_optimizer

TINY = ["model.embed_dim=24", "model.depth=2", "train.epochs=4", "optim.warmup_epochs=0", "data.prefetch_gb=0"]


def build(*settings, recipe="digits", classes=4, steps_per_epoch=5):
    torch.manual_seed(0)
    config = recipes.get(recipe).with_settings([*(TINY if recipe == "digits" else ()), *settings])
    return methods.build(config, classes, steps_per_epoch)


def on_paper(recipe, *settings, steps_per_epoch=2502):
    """A method whose tensors have shapes and nothing else."""
    with torch.device("meta"):
        return methods.build(recipes.get(recipe).with_settings(list(settings)), 1000, steps_per_epoch)


def stir(method):
    """Weights and biases as if it had been trained: nothing is zero but what is masked."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    method.apply_masks()
    return method


def images_of(method, count=6):
    return torch.randn(count, 3, *method.model.image_size, generator=torch.Generator().manual_seed(1))


class Steps:
    """Steps of a run of `total` on random images, with a moving average."""

    def __init__(self, method, total=20, lr=1e-2, decay=0.05):
        self.method, self.total = method.train(), total
        (phase,) = method.phases()
        method.begin_phase(phase)
        optimizer, _ = build_optimizer(method, phase, batch_size=8, steps_per_epoch=5)
        self.optimizer = optimizer
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = lr, decay
        self.average = copy.deepcopy(method)
        self.step = 0

    def at(self, step=None):
        step = self.step if step is None else step
        return Progress(step=step, total_steps=self.total, epoch=0, epochs=4, seed=3, rank=0)

    def take(self, *, skip=False, before_end=lambda: None):
        """One step; `before_end` is called before masks move."""
        method, at = self.method, self.at()
        generator = torch.Generator().manual_seed(self.step)
        images = torch.randn(8, 3, *method.model.image_size, generator=generator)
        targets = torch.randint(method.model.num_classes, (8,), generator=generator)
        method.begin_step(at)
        method(images, targets, at)["loss"].backward()
        method.mask_gradients(at)
        skipped = torch.tensor(float(skip))
        skipping(self.optimizer, skipped)
        self.optimizer.step()
        taken = Step(self.optimizer, skipped)
        method.after_optimizer(at, taken)
        self._average(skip)
        before_end()
        method.end_step(at, taken)
        method.zero_grad(set_to_none=True)
        self.step += 1

    @torch.no_grad()
    def _average(self, skip):
        for old, new in zip(self.average.parameters(), self.method.parameters(), strict=True):
            old.lerp_(new, 0.0 if skip else 0.1)
        for old, new in zip(self.average.buffers(), self.method.buffers(), strict=True):
            old.copy_(new)
        self.average.after_average(self.at())


def trained_head(method):
    """A classifier that tells something apart, as the one of a new model may not."""
    nn.init.normal_(method.model.head.weight, std=0.3)
    return method
