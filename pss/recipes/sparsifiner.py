"""Sparsifiner's runs on ImageNet-1k (CVPR 2023, supplement): DeiT-S fine-tuned to attend to few keys, taught by what it
was.

`--set model.weights=RUN --set sparsifiner.teacher=RUN` begins with a run of one's own instead of the public weights.
"""

from __future__ import annotations

from dataclasses import replace

from pipelines.base import DataConfig
from pss.sections import LossConfig, ModelConfig, OptimConfig, RunSettings, TrainConfig


def sparsifiner_s() -> RunSettings:
    """Sparsifiner on DeiT-S at 224 px, 49 keys a patch, 45 epochs from the public weights. Published: 79.79 % top-1."""
    from pss.methods.sparsifiner import SparsifinerSettings  # with torch behind it, which a list can do without

    dense = "timm:deit_small_patch16_224.fb_in1k"
    return RunSettings(
        recipe="sparsifiner-s",
        method="sparsifiner",
        model=ModelConfig(name="deit_small_patch16_224", weights=dense),
        own=(SparsifinerSettings(keep=(0.25,), predictor_epochs=5, teacher=dense),),
        data=DataConfig(img_size=224, rand_augment="rand-m9-mstd0.5-inc1-n2", erasing=0.25),
        # Of the second phase; as in the authors' code, rates do not depend on the batch (168 on each of eight GPUs).
        optim=OptimConfig(lr=8e-5, lr_batch=None, min_lr=2e-6, warmup_lr=0.0, warmup_epochs=3),
        loss=LossConfig(label_smoothing=0.1, mixup=0.8, cutmix=1.0),
        train=TrainConfig(epochs=45, batch_size=1344, ema_decay=0.9999),
    )


def sparsifiner_s_release() -> RunSettings:
    """The same with the authors' shipped settings: 50 keys, the 8 largest coefficients, 50 epochs. No figure of it."""
    from pss.methods.sparsifiner import SparsifinerSettings

    paper = sparsifiner_s()
    own = SparsifinerSettings(
        keep=(0.25,), budget_base="all", basis_threshold=0.02, top=8, predictor_epochs=5,
        teacher="timm:deit_small_patch16_224.fb_in1k", reference=True,
    )  # fmt: skip
    return replace(paper, recipe="sparsifiner-s-release", own=(own,), train=replace(paper.train, epochs=50))
