"""What a step's augmentation asks of a GPU's host: launches are counted on fake CUDA tensors."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tools.benchmarks.augment import RECIPES, host_report, launches

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@pytest.mark.parametrize(("recipe", "batch", "most"), [("RandAugment", 1024, 10), ("3-Augment", 256, 15)])
def test_augmentation_takes_few_launches(recipe: str, batch: int, most: int) -> None:
    """One copy of a table and the kernels: as many for any batch, and mixing three more."""
    assert launches(RECIPES[recipe], batch, kernels=True) == {"augmentation": most, "mixing": 3}


def test_torchs_form_takes_many() -> None:
    counted = launches(RECIPES["3-Augment"], 256, kernels=False)
    assert counted["augmentation"] > 200
    assert counted["mixing"] > 5


def test_the_report_has_a_row_for_every_case() -> None:
    times = {"augmentation": [1.0, 2.0, 3.0], "mixing": [0.5] * 3, "draws": [0.25] * 3}
    case = {"recipe": "RandAugment", "form": "kernels", "batch": 256, "launches": {"augmentation": 10, "mixing": 3}}
    result = {"host": [case | {"ms": times}], "settings": {"rounds": 3}, "environment": {"device": "cpu"}}
    assert host_report(result).splitlines()[-1] == (
        "| RandAugment, kernels | 256 | 10 | 3 | 2.00 (1.50–2.50) | 0.50 (0.50–0.50) | 0.25 (0.25–0.25) |"
    )
