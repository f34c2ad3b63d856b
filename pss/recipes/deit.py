"""DeiT trained from scratch on ImageNet-1k, as in the patch sampling paper (section 4 and table 2)."""

from __future__ import annotations

from dataclasses import replace

from pipelines.base import DataConfig
from pss.config import Config, LossConfig, ModelConfig, OptimConfig, ScheduleConfig, TrainConfig


def deit_s_224() -> Config:
    """DeiT-S at 224 px from scratch, 300 epochs, relative position bias, Cyclic(0.2-1.0)."""
    return Config(
        recipe="deit-s-224",
        model=ModelConfig(
            name="deit_small_patch16_224",
            rel_pos="bias",
            qkv_bias="qv",
            init="published",
            global_pool="avg",
            drop_path_rate=0.1,
        ),
        # The published runs end with ten epochs at rho = 1, the trainer's default cool-down.
        schedule=ScheduleConfig(name="cyclic", form="published", cooldown_epochs=10),
        data=DataConfig(img_size=224, repeats=3, rand_augment="rand-m9-mstd0.5-inc1-n2", erasing=0.25),
        optim=OptimConfig(lr=5e-4, lr_batch=512, warmup_epochs=5),
        loss=LossConfig(label_smoothing=0.1, mixup=0.8, cutmix=1.0),
        train=TrainConfig(epochs=300, batch_size=1024, ema_decay=0.99996),
    )


def deit_ti_224() -> Config:
    """DeiT-Ti at 224 px from scratch: the recipe of deit-s-224 with the smaller model."""
    small = deit_s_224()
    return replace(small, recipe="deit-ti-224", model=replace(small.model, name="deit_tiny_patch16_224"))
