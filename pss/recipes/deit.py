"""The patch sampling paper's runs on ImageNet-1k (section 4, table 2): DeiT from scratch, ViT-B fine-tuned.

`--set method=dense` trains the same model on all patches; the paper's DeiT baselines are timm's plain models instead
(`deit_s_224_plain`). Fixed(0.6) is `--set schedule.name=fixed`, Linear `--set schedule.name=linear`.
"""

from __future__ import annotations

from dataclasses import replace

from pipelines.base import DataConfig, Progressive
from pss.sections import CompileConfig, LossConfig, ModelConfig, OptimConfig, RunSettings, ScheduleConfig, TrainConfig


def deit_s_224() -> RunSettings:
    """DeiT-S at 224 px from scratch, 300 epochs, relative position bias, Cyclic(0.2-1.0).

    Published: 80.4 % top-1. With `--set method=dense` it is the paper's ablation with position bias (81.1 %), and not
    plain DeiT-S (80.1 %), which also has another readout, biases and initialisation: `deit_s_224_plain`.
    """
    return RunSettings(
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
        own=(ScheduleConfig(name="cyclic", form="published", cooldown_epochs=10),),
        data=DataConfig(img_size=224, repeats=3, rand_augment="rand-m9-mstd0.5-inc1-n2", erasing=0.25),
        optim=OptimConfig(lr=5e-4, lr_batch=512, warmup_epochs=5),
        loss=LossConfig(label_smoothing=0.1, mixup=0.8, cutmix=1.0),
        train=TrainConfig(epochs=300, batch_size=1024, ema_decay=0.99996),
    )


def deit_s_224_plain() -> RunSettings:
    """Plain DeiT-S at 224 px, as timm builds it, on all patches: class token, no position bias.

    The paper's baseline of 80.1 % top-1; with `--set method=sampled`, its ablation without position bias (78.2 %).
    """
    small = deit_s_224()
    model = replace(small.model, rel_pos="none", qkv_bias="full", init="timm", global_pool="token")
    return replace(small, recipe="deit-s-224-plain", method="dense", model=model, own=(), spare=small.own)


def deit_ti_224() -> RunSettings:
    """DeiT-Ti at 224 px from scratch: the recipe of deit-s-224 with the smaller model."""
    small = deit_s_224()
    return replace(small, recipe="deit-ti-224", model=replace(small.model, name="deit_tiny_patch16_224"))


def deit_s_384() -> RunSettings:
    """DeiT-S at 384 px from scratch, 300 epochs, relative position bias, Cyclic(0.2-1.0)."""
    small = deit_s_224()
    return replace(
        small,
        recipe="deit-s-384",
        data=replace(small.data, img_size=384),
        train=replace(small.train, batch_size=512),
    )


def deit_s_224_lowres() -> RunSettings:
    """DeiT-S from scratch on images that grow from 160 to 224 px, under Cyclic(0.2-1.0) at every size."""
    small = deit_s_224()
    return replace(
        small,
        recipe="deit-s-224-lowres",
        data=replace(small.data, progressive=Progressive(start_size=160, begin_epoch=60, end_epoch=240)),
        # Five token counts at each of 160, 192 and 224 px, and validation.
        compile=CompileConfig(max_graphs=16),
    )


def vit_b_simmim() -> RunSettings:
    """ViT-B at 224 px, 100 epochs of fine-tuning from SimMIM (--set model.weights=FILE), Cyclic(0.2-1.0)."""
    return RunSettings(
        recipe="vit-b-simmim",
        model=ModelConfig(
            name="simmim_base_patch16", drop_path_rate=0.1, weights="simmim_pretrain_vit_base.pth", own_head=True
        ),
        own=(ScheduleConfig(name="cyclic", form="published"),),
        data=DataConfig(img_size=224, rand_augment="rand-m9-mstd0.5-inc1-n2", erasing=0.25),
        optim=OptimConfig(
            lr=1.25e-3, lr_batch=512, min_lr=2.5e-7, warmup_lr=2.5e-7, warmup_epochs=20, layer_decay=0.65, clip_grad=5.0
        ),
        loss=LossConfig(label_smoothing=0.1, mixup=0.8, cutmix=1.0),
        # 128 on each of four GPUs, so that the peak is `lr` itself.
        train=TrainConfig(epochs=100, batch_size=512),
    )
