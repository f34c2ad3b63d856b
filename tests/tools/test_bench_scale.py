"""The benchmark of large sets, on small ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import convert_folder

from pipelines.loaders.order import train_plan
from pipelines.storage.source import TarSource
from tools.scale import sets, waiting
from tools.scale.__main__ import main

SMALL = [
    "--samples",
    "3000",
    "--classes",
    "7",
    "--shard-size",
    "100",
    "--batch",
    "8",
    "--epochs",
    "2",
    "--pause",
    "0.2",
]


@pytest.mark.exhaustive
def test_one_command_tells_what_a_set_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL, "--processes", "1", "2", "--tars", "90", "--limit", "60", "--folder", str(tmp_path)]
    main([*words, "--json", str(tmp_path / "scale.json")])
    result, told = json.loads((tmp_path / "scale.json").read_text()), capsys.readouterr().out
    alone, both = result["loading"]
    assert [len(row["hashes"]) for row in (alone, both)] == [1, 2]
    for row, ranks in ((alone, 1), (both, 2)):
        plans = [train_plan(3000, 0, 1, batch_size=8, rank=rank, world_size=ranks) for rank in range(ranks)]
        assert row["hashes"] == [plan.hash for plan in plans]
        assert min(row["open_seconds"] + row["fresh_seconds"] + row["later_seconds"] + row["compared_seconds"]) > 0
        assert all(peak >= kept for peak, kept in zip(row["peak_bytes"], row["kept_bytes"], strict=True))
    assert result["files"]["tars"] == 90
    assert 3 < result["files"]["most_open"] < 60
    (converting,) = result["converting"]
    assert converting["shards"] == 2
    assert min(converting["listing"] + converting["reading"] + converting["plan"]) > 0
    assert "| 3,000 | 2 |" in told
    assert f"90 tars under ulimit -n 60: {result['files']['most_open']} files open" in told
    assert not list(tmp_path.glob(".converted*")), "what is measured leaves nothing behind"


def test_a_made_up_set_is_one_that_can_be_read(tmp_path: Path) -> None:
    source = TarSource(sets.converted_set(tmp_path / "set", 250, 10, 3), "train")
    assert source.num_samples == sum(source.entry.per_class) == 250
    assert all(not source.read(i).any() for i in (0, 83, 84, 249))
    assert sum(path.stat().st_blocks for path in source.root.glob("*.tar")) == 0


def test_made_up_folders_are_made_once(tmp_path: Path) -> None:
    root = sets.class_folders(tmp_path / "folders", 50, 7)
    files = sorted(path.relative_to(root).parts for path in root.rglob("*.JPEG"))
    assert len(files) == 50
    assert {parts[1] for parts in files} == {f"n{label:08d}" for label in range(7)}
    assert all(parts[2].startswith(f"{parts[1]}_") for parts in files)
    assert sets.class_folders(tmp_path / "folders", 50, 7) == root


@pytest.mark.exhaustive
def test_training_from_a_store_is_compared_with_training_from_the_disk(
    tmp_path: Path, image_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert_folder(image_root, tmp_path / "set", "dali", shard_size=4)
    tiny = ("model.depth=1", "train.batch_size=8", "optim.warmup_epochs=0", "schedule.cooldown_epochs=0")
    settings = [word for setting in tiny for word in ("--set", setting)]
    result = waiting.main(["--data", str(tmp_path / "set"), "--epochs", "2", "--rounds", "1", *settings])
    for kind in waiting.KINDS:
        (run,) = result[kind]
        assert all(0 <= part["waited"] <= part["seconds"] for part in run.values())
        assert run["others"]["seconds"] > 0
    assert "| the first epoch | " in capsys.readouterr().out
