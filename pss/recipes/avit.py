"""A-ViT's runs on ImageNet-1k (Yin et al. 2022): public DeiT weights fine-tuned until tokens halt on their own.

As in the published commands, but for mixup and CutMix, which are off: the paper leaves them out as unfit for halting,
while the code's own defaults leave them on (`--set loss.mixup=0.8 --set loss.cutmix=1.0`). Learning rates fall every
step, not every epoch.
"""

from __future__ import annotations

from dataclasses import replace

from pipelines.base import DataConfig
from pss.sections import LossConfig, MethodSection, ModelConfig, OptimConfig, RunSettings, TrainConfig


def avit_s() -> RunSettings:
    """A-ViT-S: DeiT-S at 224 px whose tokens learn to halt, 100 epochs from public weights.

    Published: 78.8 % top-1 at 3.6 G; users who ran the published commands report 79.8 % at 4.3 G.
    """
    from pss.methods.avit import AvitSettings  # with torch behind it, which a list of recipes can do without

    own: MethodSection = AvitSettings(gate_scale=10.0, gate_center=75.0, alpha_ponder=5e-4, alpha_prior=1e-3)
    return RunSettings(
        recipe="avit-s",
        method="avit",
        model=ModelConfig(
            name="deit_small_patch16_224", weights="timm:deit_small_patch16_224.fb_in1k", drop_path_rate=0.1
        ),
        own=(own,),
        data=DataConfig(img_size=224, repeats=3, rand_augment="rand-m9-mstd0.5-inc1-n2", erasing=0.25),
        optim=OptimConfig(lr=3e-4, lr_batch=512, warmup_epochs=5),
        loss=LossConfig(label_smoothing=0.1),
        # 96 on each of four GPUs.
        train=TrainConfig(epochs=100, batch_size=384, ema_decay=0.99996),
    )


def avit_ti() -> RunSettings:
    """A-ViT-T: DeiT-Ti at 224 px whose tokens learn to halt, 100 epochs from public weights.

    Published: 71.4 % top-1 at 0.8 G; users who ran the published commands report 68.2 %, and 72.1 % with the settings
    of the larger model.
    """
    small = avit_s()
    (own,) = small.own
    return replace(
        small,
        recipe="avit-ti",
        model=replace(small.model, name="deit_tiny_patch16_224", weights="timm:deit_tiny_patch16_224.fb_in1k"),
        own=(replace(own, gate_center=30.0),),
        optim=replace(small.optim, lr=5e-4),
        train=replace(small.train, batch_size=512),
    )
