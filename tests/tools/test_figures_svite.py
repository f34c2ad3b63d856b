"""The figures and tables of SViTE are made of a comparison's runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from memory_loader import fit

from pss import recipes
from pss.inference.opening import load_run
from pss.runtime.processes import World
from tools.comparing import arms
from tools.figures import svite
from tools.figures.figure import Source

HERE = World(rank=0, size=1, device=torch.device("cpu"))
TINY = ["model.embed_dim=24", "model.depth=2", "train.epochs=2", "train.batch_size=8", "optim.warmup_epochs=1",
        "data.prefetch_gb=0"]  # fmt: skip
KNOWN = arms.read(arms.BUILT_IN) | arms.read(Path(svite.__file__).with_suffix(".toml"))


@pytest.fixture(scope="module")
def source(tmp_path_factory, converted_root):
    """A comparison with a run of every arm that the figures are of."""
    folder, runs = tmp_path_factory.mktemp("comparison"), []
    for number, arm in enumerate(dict.fromkeys(name for one in svite.FIGURES for name in one.arms)):
        config = recipes.get("digits").with_settings([*TINY, *KNOWN[arm].settings])
        run = folder / "runs" / f"{arm}-s0"
        fit(config, run)
        point = {"top1": 80.0 + number, "gflops_total": 2.0, "gflops_theoretical": None if arm == "dense" else 1.25}
        runs.append({"column": "epochs", "arm": arm, "seed": 0, "run": run.name, "epochs": 1, "points": [point]})
    return Source(folder, {"runs": runs, "plan": {"data": str(converted_root)}})


def test_every_figure_is_made_of_its_arms(source):
    for figure in svite.FIGURES:
        assert figure.can_be_made(source)
        made = figure.make(source)
        assert made.startswith(b"\x89PNG") if figure.name.endswith(".png") else "| dense |" in made
    without = Source(source.folder, {"runs": []})
    assert not any(figure.can_be_made(without) for figure in svite.FIGURES)
    ablation = svite.ablation(source)
    assert "| dense | 82.00 | 2 | 2 | 79.90 |" in ablation
    assert "| svite-plus | 83.00 | 2 | 1.25 | 79.91 |" in ablation


def test_masks_are_those_of_the_seed_and_of_the_checkpoint(source):
    for arm in ("svite", "s2vite"):
        first, last = svite.masks_of(source.folder / "runs" / f"{arm}-s0")
        assert first.keys() == last.keys()
        assert all(mask.dtype == torch.bool and mask.sum() == last[name].sum() for name, mask in first.items())
        assert any(not torch.equal(mask, last[name]) for name, mask in first.items())


def test_faint_attention_is_counted(source):
    method = load_run(source.folder / "runs" / "dense-s0", HERE.device).method
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert svite.faint_shares(method, images) == [0.0, 0.0]  # nearly even, after so few steps
    with torch.no_grad():
        for block in method.model.blocks:
            block.attn.qkv.weight.mul_(100)
    shares = svite.faint_shares(method, images)
    assert all(0.3 < share < 1 for share in shares)
