"""LV-ViT's runs on ImageNet-1k (Jiang et al., NeurIPS 2021): from scratch, with a label for every patch.

They want label maps: `pss-convert DATA --token-labels TEACHER` makes them once, and `data.label_maps=auto` reads them.
Without (`--set data.label_maps=none`), all patches have the label of their image.

Other than published: images are cropped before RandAugment and not after it, with bicubic resampling throughout instead
of bicubic or bilinear by chance; learning rates fall every step, not every epoch; label maps are of whole images, and
follow crop, flip and RandAugment (`--set tokens.label_geometry=reference` has the published windows). Batch statistics
are each process's own, as published, and the first one's are saved.
"""

from __future__ import annotations

from dataclasses import replace

from pipelines.base import DataConfig
from pss.sections import LossConfig, ModelConfig, OptimConfig, RunSettings, TrainConfig


def lvvit_s() -> RunSettings:
    """LV-ViT-S at 224 px, 300 epochs and 10 at the lowest rate, MixToken and label maps. Published: 83.3 % top-1."""
    return RunSettings(
        recipe="lvvit-s",
        method="dense",
        model=ModelConfig(name="lvvit_s", drop_path_rate=0.1),
        data=DataConfig(
            img_size=224, crop_pct=0.9, rand_augment="rand-m9-mstd0.5-inc1", erasing=0.25, label_maps="auto"
        ),
        optim=OptimConfig(lr=1.6e-3, lr_batch=1024, min_lr=1e-5, warmup_lr=1e-6, warmup_epochs=5, cooldown_epochs=10),
        loss=LossConfig(label_smoothing=0.1),
        train=TrainConfig(epochs=310, batch_size=1024, ema_decay=0.99992),
    )


def lvvit_ti() -> RunSettings:
    """LV-ViT-T at 224 px: the recipe of lvvit-s with the smaller model. Published: 79.1 % top-1."""
    small = lvvit_s()
    return replace(small, recipe="lvvit-ti", model=replace(small.model, name="lvvit_t"))


def lvvit_m() -> RunSettings:
    """LV-ViT-M at 224 px: the recipe of lvvit-s with a larger model and more drop path. Published: 84.0 % top-1."""
    small = lvvit_s()
    return replace(
        small,
        recipe="lvvit-m",
        model=replace(small.model, name="lvvit_m", drop_path_rate=0.2),
        data=replace(small.data, crop_pct=1.0),
    )
