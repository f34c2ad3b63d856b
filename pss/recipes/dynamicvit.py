"""DynamicViT's runs on ImageNet-1k (NeurIPS 2021, table 1): DeiT fine-tuned to drop patches, taught by what it was.

`--set model.weights=RUN --set dynamicvit.teacher=RUN` begins with a run of one's own instead of the public weights.
"""

from __future__ import annotations

from dataclasses import replace

from pipelines.base import DataConfig
from pss.sections import LossConfig, ModelConfig, OptimConfig, RunSettings, TrainConfig


def dynamicvit_s() -> RunSettings:
    """DynamicViT on DeiT-S at 224 px, ρ = 0.7, 30 epochs from the public weights. Published: 79.3 % top-1."""
    from pss.methods.dynamicvit import DynamicViTSettings  # with torch behind it, which a list can do without

    dense = "timm:deit_small_patch16_224.fb_in1k"
    return RunSettings(
        recipe="dynamicvit-s",
        method="dynamicvit",
        model=ModelConfig(name="deit_small_patch16_224", weights=dense),
        own=(DynamicViTSettings(teacher=dense),),
        data=DataConfig(img_size=224, rand_augment="rand-m9-mstd0.5-inc1-n2", erasing=0.25),
        # The rate is the predictors'; the backbone's is a hundredth of it throughout.
        optim=OptimConfig(lr=1e-3, lr_batch=1024, min_lr=1e-6, warmup_lr=0.0, warmup_epochs=5, warmup_prefix=True),
        loss=LossConfig(label_smoothing=0.1, mixup=0.8, cutmix=1.0),
        train=TrainConfig(epochs=30, batch_size=1024, ema_decay=0.9999),
    )


def dynamicvit_b() -> RunSettings:
    """DynamicViT on DeiT-B at 224 px, ρ = 0.7, 30 epochs from the public weights. Published: 81.3 % top-1."""
    from pss.methods.dynamicvit import DynamicViTSettings  # with torch behind it, which a list can do without

    small, dense = dynamicvit_s(), "timm:deit_base_patch16_224.fb_in1k"
    return replace(
        small,
        recipe="dynamicvit-b",
        model=ModelConfig(name="deit_base_patch16_224", weights=dense, drop_path_rate=0.2),
        own=(DynamicViTSettings(teacher=dense, ratio_weight=5.0),),
    )
