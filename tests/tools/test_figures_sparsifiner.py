"""The figures of Sparsifiner are made of a comparison's runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from memory_loader import fit

from pss import recipes
from tools.benchmarks import sparse_attention
from tools.comparing import arms as known_arms
from tools.figures import sparsifiner
from tools.figures.figure import Source

TINY = [
    "model.embed_dim=24", "model.depth=3", "train.epochs=3", "train.batch_size=8", "optim.warmup_epochs=1",
    "data.prefetch_gb=0", "method=sparsifiner", "sparsifiner.predictor_lr=0.03",
]  # fmt: skip
ARMS = {
    "sparsifiner": [],
    "basis-l2": ["sparsifiner.basis_threshold=0.1"],
    "basis-l1": ["sparsifiner.regularizer=l1", "sparsifiner.l1_weight=1"],
}


@pytest.fixture(scope="module")
def source(tmp_path_factory, converted_root):
    """A comparison with all three arms."""
    folder, runs = tmp_path_factory.mktemp("comparison"), []
    for arm, settings in ARMS.items():
        config = recipes.get("digits").with_settings([*TINY, *settings])
        run = folder / "runs" / f"{arm}-s0"
        row = fit(config, run)
        runs.append({"column": "epochs", "arm": arm, "seed": 0, "run": run.name, "points": [row]})
    return Source(folder, {"runs": runs, "plan": {"data": str(converted_root)}})


def test_every_figure_is_made_of_its_arms(source):
    for figure in sparsifiner.FIGURES:
        assert figure.can_be_made(source)
        made = figure.make(source)
        if figure.name.endswith(".png"):
            assert made.startswith(b"\x89PNG")
    without = Source(source.folder, source.result | {"runs": source.result["runs"][:2]})
    assert [one.numbers for one in sparsifiner.FIGURES if one.can_be_made(without)] == [(6,), (7,)]
    known = known_arms.read(Path(sparsifiner.__file__).with_suffix(".toml"))
    assert set(known) == set(sparsifiner.REGULARIZERS)
    assert sparsifiner.ARM in known_arms.read(known_arms.BUILT_IN)


def test_what_the_patch_in_the_middle_looks_at(source):
    """The class token is not among the patches, and may take one of the keys."""
    method = sparsifiner._opened(source.folders("sparsifiner")[0])
    with torch.inference_mode():
        shown = sparsifiner.looks(method, torch.randn(1, 3, 32, 32), 0.25, [0, 2])
    assert shown.shape == (2, 3, 3, 16)
    mask, sparse, full = shown.unbind(2)
    assert set(mask.sum(-1).flatten().tolist()) <= {3.0, 4.0}
    assert (sparse[mask == 0] == 0).all()
    assert (full > 0).all()
    assert (sparse[mask == 1] >= full[mask == 1]).all()


def test_bases_before_and_after(source):
    method = sparsifiner._opened(source.folders("basis-l2")[0])
    before, after = sparsifiner.basis_images(method, 2)
    assert before.shape == after.shape == (9, 4, 4)
    assert torch.equal(after, torch.where(before.abs() > 0.1, before.abs(), 0))
    mosaic = sparsifiner._mosaic(before)
    assert mosaic.shape == (14, 14)
    assert torch.equal(mosaic[5:9, 10:14], before[5])
    assert mosaic[4].isnan().all()


def test_the_table_has_published_numbers_apart(source):
    told = sparsifiner.regularizers(source).splitlines()
    for line, (arm, (sparsity, top1)) in zip(told[2:], sparsifiner.REGULARIZERS.items(), strict=True):
        (run,) = [run for run in source.runs if run["arm"] == arm]
        row = run["points"][0]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[0] == arm
        assert cells[1].startswith(f"{100 * row['basis_sparsity']:.1f}")
        assert cells[4].startswith(f"{row['top1']:.2f}")
        assert cells[5:] == [f"{sparsity:g}", f"{top1:g}"]


def test_the_benchmark_has_a_line_for_every_case(capsys):
    words = ["--model", "deit_tiny_patch16_224", "--img-size", "96", "--batch-size", "1", "--rounds", "2"]
    result = sparse_attention.main(words)
    (size,) = result["sizes"]
    assert (size["tokens"], size["budget"]) == (37, 9)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()[-6:]]
    assert [row[2] for row in rows[:3]] == ["dense", "hidden", "gathered"]
    assert rows[0][4:] == ["1.00 (1.00–1.00)", "1.00", "1.00"]
    assert float(rows[1][5]) > 1 > float(rows[2][5]) - float(rows[1][5]) + 1
