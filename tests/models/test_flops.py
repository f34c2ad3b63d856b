"""Closed-form cost against torch's own counter and the published figures."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pss.models.create import create_model
from pss.models.flops import attention_macs, block_macs, linear_macs, macs, macs_of_tokens, training_saving
from pss.models.vit import VisionTransformer
from pss.schedules import Cyclic, Fixed, Linear

TINY: dict[str, Any] = {"num_classes": 7, "img_size": (16, 24), "patch_size": 4, "embed_dim": 24, "num_heads": 3}


@pytest.fixture(scope="module")
def published() -> dict[str, VisionTransformer]:
    """The three models of the paper; only their shapes matter here."""
    with torch.device("meta"):
        return {
            "DeiT-S-224": create_model("deit_small_patch16_224"),
            "DeiT-S-384": create_model("deit_small_patch16_224", img_size=384),
            "ViT-B-224": create_model("simmim_base_patch16"),
        }


@pytest.mark.parametrize("rho", [0.2, 0.6, 1.0])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"depth": 2}),
        ("vit_tiny_patch16_224", {"depth": 3, "reg_tokens": 2, "mlp_ratio": 3.0}),
        ("vit_tiny_patch16_224", {"depth": 2, "rel_pos": "bias", "qkv_bias": "qv", "global_pool": "avg"}),
        ("vit_tiny_patch16_224", {"depth": 2, "rel_pos": "separable"}),
        ("vit_tiny_patch16_224", {"depth": 1, "rel_pos": "separable", "patch_size": 8, "sort": "random"}),
        ("vit_tiny_patch16_224", {"depth": 2, "rel_pos": "rope"}),
        ("deit_tiny_distilled_patch16_224", {"depth": 2}),
        ("vit_tiny_patch16_224", {"depth": 1, "num_classes": 0}),
        ("vit_tiny_patch16_224", {"depth": 1, "token_counts": "aligned"}),
        ("vit_tiny_patch16_224", {"depth": 1, "sort": "random", "reg_tokens": 2}),
    ],
)
def test_cost_is_what_torch_counts(name: str, options: dict[str, Any], rho: float) -> None:
    model = create_model(name, **(TINY | options)).eval()
    # Not every version of torch counts its fused attention on a CPU; plain matrix products they all do.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.randn(3, 3, 16, 24), rho)
    assert 2 * 3 * macs(model, rho) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "rho", "giga"),
    [
        ("DeiT-S-224", 1.0, 4.60),
        ("DeiT-S-224", 0.7, 3.16),
        ("DeiT-S-224", 0.5, 2.23),
        ("DeiT-S-384", 1.0, 15.49),
        ("DeiT-S-384", 0.7, 10.25),
        ("DeiT-S-384", 0.5, 7.05),
        ("ViT-B-224", 1.0, 17.56),
    ],
)
def test_published_costs(published: dict[str, VisionTransformer], name: str, rho: float, giga: float) -> None:
    assert macs(published[name], rho) / 1e9 == pytest.approx(giga, rel=0.002)


@pytest.mark.parametrize(
    ("name", "cyclic", "fixed"),
    [("DeiT-S-224", 36.3, 41.5), ("DeiT-S-384", 38.3, 44.3), ("ViT-B-224", 35.9, 40.8)],
)
def test_published_savings(published: dict[str, VisionTransformer], name: str, cyclic: float, fixed: float) -> None:
    steps = 1251
    model = published[name]
    cycle = Cyclic.published(steps_per_epoch=steps, epochs=1)
    assert 100 * training_saving(model, cycle, steps) == pytest.approx(cyclic, abs=0.1)
    assert 100 * training_saving(model, Linear.published(steps_per_epoch=steps, epochs=1), steps) == pytest.approx(
        cyclic, abs=0.2
    )
    assert 100 * training_saving(model, Fixed(0.6), steps) == pytest.approx(fixed, abs=0.1)
    assert training_saving(model, Fixed(1.0), steps) == 0


def test_a_separable_bias_widens_both_products() -> None:
    with torch.device("meta"):
        plain, separable = (create_model("deit_small_patch16_224", rel_pos=kind) for kind in ("bias", "separable"))
    # 14 rows, 14 columns and one for the class token, in 32 features more on heads 64 wide.
    assert macs(separable) - macs(plain) == 12 * attention_macs(197, 197, 6 * 32)
    assert macs(separable) / macs(plain) == pytest.approx(1.039, abs=1e-3)


def test_pieces_add_up() -> None:
    model = create_model("vit_tiny_patch16_224", **TINY, depth=2)
    block = model.blocks[0]
    assert linear_macs(block, 5) == 5 * 12 * 24**2
    assert attention_macs(4, 5, 24) == 2 * 4 * 5 * 24
    assert block_macs(block, 5) == linear_macs(block, 5) + attention_macs(5, 5, 24)  # type: ignore[arg-type]
    assert macs_of_tokens(model, [25, 25]) == macs(model)
    assert macs_of_tokens(model, [25, 5]) == macs(model) - block_macs(block, 25) + block_macs(block, 5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected 2 token counts"):
        macs_of_tokens(model, [25])
