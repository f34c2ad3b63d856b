"""The figures of Token Expansion are made of runs, and say what they were made of."""

from __future__ import annotations

import json

import pytest
import torch
from memory_loader import MemoryLoader

from pss import recipes
from pss.runtime.processes import World
from pss.training.trainer import Trainer
from tools.figures import toe
from tools.figures.made import Options

HERE = World(rank=0, size=1, device=torch.device("cpu"))
TINY = ["model.embed_dim=24", "train.epochs=6", "train.batch_size=8", "optim.warmup_epochs=1", "data.prefetch_gb=0"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run under Token Expansion, and a dense one."""
    folder, runs = tmp_path_factory.mktemp("runs"), []
    for method in ("toe", "dense"):
        config = recipes.get("digits").with_settings([*TINY, f"method={method}"])
        run = folder / method
        run.mkdir()
        (run / "config.json").write_text(config.to_json(), encoding="utf-8")
        loaders = MemoryLoader(40), MemoryLoader(40, train=False)
        Trainer(config, *loaders, classes=list("abcd"), output=run, world=HERE).fit()
        runs.append(run)
    return runs


def read(made):
    assert made.picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads(made.table.read_text(encoding="utf-8"))
    assert found["command"]
    assert found["environment"]["torch"] == torch.__version__
    return found


def test_the_shape_trace_is_that_of_the_contract(tmp_path):
    found = read(toe.shape_trace(tmp_path, Options(recipe="toe-s")))
    counts = {row["stage"]: row["tokens"] for row in found["rows"]}
    assert list(counts) == ["ρ 1 stage 1, 224 px", "ρ 1 stage 2, 224 px", "ρ 1, 224 px", "evaluation"]
    assert [row[1] for row in counts.values()] == [99, 148, 197, 197]
    assert {row[0] for row in counts.values()} == {197}
    assert sum(row["share"] or 0 for row in found["rows"]) == pytest.approx(1)
    other = read(toe.shape_trace(tmp_path, Options(settings=("method=dense",))))
    assert [row["tokens"] for row in other["rows"]] == [[17] * 4] * 2


@pytest.mark.parametrize("number", [0, 1], ids=["toe", "dense"])
def test_features_are_of_all_selected_and_merged_tokens(trained, converted_root, tmp_path, number):
    options = Options(data=converted_root, runs=(trained[number],))
    found = read(toe.token_features(tmp_path, options))
    assert found["tokens"] == {"all": 16, "selected": 8, "merged": 8}
    assert found["images"] == 23
    assert 0 < found["explained"][1] < found["explained"][0] < 1
    assert found["spread"]["merged"]["mean"] < found["spread"]["selected"]["mean"]


def test_seconds_are_told_by_stage_with_their_spread(trained, tmp_path):
    found = read(toe.seconds_by_stage(tmp_path, Options(runs=(trained[0],) * 3)))
    assert [row["stage"] for row in found["rows"]] == ["stage 1", "stage 2", "stage 3"]
    assert [row["published_seconds"] for row in found["rows"]] == [948, 1244, 1488]
    assert all(row["n"] == 3 and row["seconds"] > 0 and row["seconds_sd"] == 0 for row in found["rows"])
    assert found["rows"][2]["share"] == 1


def test_runs_without_stages_are_refused(trained, tmp_path):
    with pytest.raises(
        ValueError, match="dense has no whole epoch in stage 1 after its first; name longer runs of method=toe"
    ):
        toe.seconds_by_stage(tmp_path, Options(runs=(trained[1],)))
