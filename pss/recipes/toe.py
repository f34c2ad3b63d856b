"""Token Expansion's runs on ImageNet-1k (Huang et al., CVPR 2024): plain DeiT, trained with fewer tokens at first.

Published settings: those of DeiT without a moving average. The "Hyper" schedule is
`--set optim.min_lr=2e-4 --set toe.starts=0,130,260`; the faster DeiT-B is `--set toe.rate=0.4`. The authors also name a
colour jitter of 0.3, which timm leaves out beside RandAugment.
"""

from __future__ import annotations

from dataclasses import replace

from pss.recipes.deit import deit_s_224_plain
from pss.sections import RunSettings


def toe_s() -> RunSettings:
    """Plain DeiT-S at 224 px under Token Expansion, r_1 = 0.5: 76 % of dense training's arithmetic.

    Published: 1,226.7 s an epoch on average, 1,488 s in the last stage, which sees all tokens.
    """
    plain = deit_s_224_plain()
    # The cooled-down schedule of `spare` is that of another method; this one has all patches unless told otherwise.
    return replace(plain, recipe="toe-s", method="toe", train=replace(plain.train, ema_decay=0.0))


def toe_ti() -> RunSettings:
    """Plain DeiT-Ti at 224 px under Token Expansion, r_1 = 0.5."""
    small = toe_s()
    return replace(small, recipe="toe-ti", model=replace(small.model, name="deit_tiny_patch16_224"))


def toe_b() -> RunSettings:
    """Plain DeiT-B at 224 px under Token Expansion, r_1 = 0.5; the faster published one is --set toe.rate=0.4."""
    small = toe_s()
    return replace(small, recipe="toe-b", model=replace(small.model, name="deit_base_patch16_224"))
