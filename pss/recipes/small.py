"""Small real data sets, for a first look on a laptop."""

from __future__ import annotations

from dataclasses import replace

from pipelines.base import DataConfig
from pss.sections import LossConfig, ModelConfig, OptimConfig, RunSettings, ScheduleConfig, TrainConfig


def digits() -> RunSettings:
    """Handwritten digits (1,797 scans, 32 px): a small ViT in about a minute on two cores."""
    return RunSettings(
        recipe="digits",
        model=ModelConfig(
            name="vit_tiny_patch16_224",
            rel_pos="bias",
            patch_size=8,
            embed_dim=96,
            depth=4,
            num_heads=3,
            global_pool="avg",
        ),
        own=(ScheduleConfig(name="cyclic", form="published"),),
        data=DataConfig(
            img_size=32,
            crop_scale=(0.7, 1.0),
            crop_ratio=(0.85, 1.18),
            flip=0.0,
            crop_pct=1.0,
            mean=(0.3, 0.3, 0.3),
            std=(0.35, 0.35, 0.35),
        ),
        optim=OptimConfig(lr=1e-3, lr_batch=None, warmup_epochs=3),
        loss=LossConfig(label_smoothing=0.1),
        train=TrainConfig(epochs=50, batch_size=32, ema_decay=0.998, log_every_steps=44),
    )


def mnist() -> RunSettings:
    """Digits of MNIST (at 24 px, 36 patches of 4x4), for a few thousand of them: minutes on two cores."""
    small = digits()
    return replace(
        small,
        recipe="mnist",
        model=replace(small.model, patch_size=4),
        own=(ScheduleConfig(name="stages", lengths=(80, 20)),),
        data=replace(small.data, img_size=24, mean=(0.1307, 0.1307, 0.1307), std=(0.3081, 0.3081, 0.3081)),
        optim=replace(small.optim, lr=2e-3, warmup_epochs=1),
        train=replace(small.train, epochs=15, batch_size=64, ema_decay=0.98, log_every_steps=31),
    )


def cifar10() -> RunSettings:
    """CIFAR-10 (32 px, 64 patches of 4x4): a ViT of width 192 and 6 blocks.

    The schedule is the best of eight that were tried on a fifth of CIFAR-10
    (docs/results/schedule_search_cifar10_cpu_2026-11-28.md).
    """
    return RunSettings(
        recipe="cifar10",
        model=ModelConfig(
            name="vit_tiny_patch16_224",
            rel_pos="bias",
            patch_size=4,
            embed_dim=192,
            depth=6,
            num_heads=3,
            global_pool="avg",
            drop_path_rate=0.05,
        ),
        own=(ScheduleConfig(name="stages", rhos=(0.4, 1.0), lengths=(85, 15)),),
        data=DataConfig(
            img_size=32,
            crop_scale=(0.5, 1.0),
            crop_pct=1.0,
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.247, 0.2435, 0.2616),
        ),
        optim=OptimConfig(lr=1e-3, lr_batch=256, warmup_epochs=3),
        loss=LossConfig(label_smoothing=0.1),
        train=TrainConfig(epochs=60, batch_size=256, ema_decay=0.999),
    )
