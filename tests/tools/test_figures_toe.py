"""The figures of Token Expansion are made of a comparison's runs."""

from __future__ import annotations

import json

import pytest
import torch
from memory_loader import fit

from pss import methods, recipes
from pss.inference.opening import load_run
from pss.runs.log import read_rows
from pss.runtime.processes import World
from tools.figures import toe
from tools.figures.figure import Source

HERE = World(rank=0, size=1, device=torch.device("cpu"))
TINY = ["model.embed_dim=24", "train.epochs=6", "train.batch_size=8", "optim.warmup_epochs=1", "data.prefetch_gb=0"]


@pytest.fixture(scope="module")
def source(tmp_path_factory, converted_root):
    """A comparison with a run under Token Expansion, and a dense one."""
    folder, runs = tmp_path_factory.mktemp("comparison"), []
    for method in ("toe", "dense"):
        config = recipes.get("digits").with_settings([*TINY, f"method={method}"])
        run = folder / "runs" / f"{method}-s0"
        fit(config, run)
        log = read_rows(run, "epoch")
        runs.append({"column": "epochs", "arm": method, "seed": 0, "run": run.name, "log": log})
    return Source(folder, {"runs": runs, "plan": {"data": str(converted_root)}})


def test_every_figure_is_a_picture_of_that_arm(source):
    for figure in toe.FIGURES:
        assert figure.can_be_made(source)
        assert figure.make(source).startswith(b"\x89PNG")
    without = Source(source.folder, source.result | {"runs": source.result["runs"][1:]})
    assert not any(figure.can_be_made(without) for figure in toe.FIGURES)


def test_the_shape_trace_is_that_of_the_contract():
    config = recipes.get("toe-s").with_settings(["model.weights=none"])
    with torch.device("meta"):
        method = methods.build(config, num_classes=1000, steps_per_epoch=50)
    rows = dict(toe.token_rows(method, config.train.epochs))
    assert list(rows) == [
        "ρ 1 stage 1, 224 px: 33% of the steps", "ρ 1 stage 2, 224 px: 33% of the steps",
        "ρ 1, 224 px: 33% of the steps", "evaluation",
    ]  # fmt: skip
    assert [row[1] for row in rows.values()] == [99, 148, 197, 197]
    assert {row[0] for row in rows.values()} == {197}


def test_merging_brings_features_together(source):
    method = load_run(source.folder / "runs" / "toe-s0", HERE.device).method
    with torch.inference_mode():
        sets = toe.token_sets(method, torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert {name: one.shape[1] for name, one in sets.items()} == {"all": 16, "selected": 8, "merged": 8}
    spread = {name: (one - one.mean(1, keepdim=True)).square().mean() for name, one in sets.items()}
    assert spread["merged"] < spread["selected"]


def test_seconds_are_told_by_stage_with_their_spread(source, tmp_path):
    runs = []
    for number, factor in enumerate((1.0, 3.0)):
        runs.append(tmp_path / f"run{number}")
        runs[-1].mkdir()
        spent = [
            ("1 stage 1", 90.0),
            ("1 stage 1", 5.0),
            ("1 stage 2", 8 * factor),
            ("1", 9.0),
            ("1", 11.0),
            ("1", 10.0),
        ]
        rows = [
            {"kind": "epoch", "epoch": n, "step": n, "complete": True, "train_seconds": seconds, "by_rho": {name: {}}}
            for n, (name, seconds) in enumerate(spent, start=1)
        ]
        (runs[-1] / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second, third = toe.stage_rows(runs)
    assert (first["seconds"], first["share"], first["share_sd"]) == (5.0, 0.5, 0.0)
    assert (second["seconds"], second["share"], second["share_sd"]) == (16.0, 1.6, pytest.approx(0.8 * 2**0.5))
    assert (third["seconds"], third["share"], third["published_share"]) == (10.0, 1.0, 1.0)
    assert first["published_share"] == 948 / 1488


def test_runs_without_stages_are_refused(source):
    with pytest.raises(ValueError, match="dense-s0 has no whole epoch in stage 1 after its first; compare more epochs"):
        toe.stage_rows([source.folder / "runs" / "dense-s0"])
