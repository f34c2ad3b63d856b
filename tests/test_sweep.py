"""The sweep: numbers that a reader can check, files in one piece, a picture that is one."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from memory_loader import MemoryLoader

from pss import recipes, sweep
from pss.dist import World
from pss.evaluate import rates
from pss.runs import load_run
from pss.train import Trainer

HERE = World(rank=0, size=1, device=torch.device("cpu"))
RHOS = [1.0, 0.6, 0.2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    output = tmp_path_factory.mktemp("runs")
    for method in ("sampled", "dense"):
        config = recipes.get("digits").with_settings(
            ["model.embed_dim=24", "model.depth=2", "train.epochs=2", "train.batch_size=8", "optim.warmup_epochs=0",
             f"method={method}"]
        )  # fmt: skip
        run = output / method
        run.mkdir()
        (run / "config.json").write_text(config.to_json(), encoding="utf-8")
        loaders = MemoryLoader(), MemoryLoader(train=False)
        Trainer(config, *loaders, classes=list("abcd"), output=run, world=HERE).fit()
    return output


def rows_of(folder, **options):
    paths = [folder / "sampled", folder / "dense"]
    return sweep.sweep(
        [load_run(path, HERE.device, **options) for path in paths],
        names=sweep.distinct_names(paths),
        rhos=RHOS,
        make_loader=lambda config: MemoryLoader(train=False, batch_size=16),
        batch_size=4,
        world=HERE,
    )


def test_rows_hold_what_one_can_recompute(folder):
    rows = rows_of(folder)
    assert [(row["run"], row["rho"]) for row in rows] == [(run, rho) for run in ("sampled", "dense") for rho in RHOS]
    run = load_run(folder / "sampled", HERE.device)
    loader = MemoryLoader(train=False, batch_size=40)
    (batch,) = loader
    images = (batch.images.float() / 255 - 0.3) / 0.35
    for row in rows[: len(RHOS)]:
        with torch.inference_mode():
            logits = run.method.predict(images, row["rho"])
        right = (logits.argmax(1) == batch.labels).float().mean().item()
        assert row["top1"] == pytest.approx(100 * right)
        assert row["top5"] == 100.0  # four classes
        assert row["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, batch.labels).item(), rel=1e-4)
        assert row["tokens"] == {1.0: 17, 0.6: 10, 0.2: 3}[row["rho"]]
        assert row["images_per_second_low"] <= row["images_per_second"] <= row["images_per_second_high"]
        assert row["num_images"] == 40
    assert rows[0]["gflops"] > rows[1]["gflops"] > rows[2]["gflops"]


def test_the_average_is_another_model(folder):
    assert [row["loss"] for row in rows_of(folder)] != [row["loss"] for row in rows_of(folder, ema=True)]


def test_files_agree_and_replace_older_ones(folder, tmp_path):
    rows = rows_of(folder)
    for _ in range(2):
        sweep.write(rows, tmp_path)
    assert json.loads((tmp_path / "rho.json").read_text()) == rows
    with (tmp_path / "rho.csv").open() as file:
        assert [float(row["top1"]) for row in csv.DictReader(file)] == [row["top1"] for row in rows]
    assert (tmp_path / "rho.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rho.csv", "rho.json", "rho.png"]


def test_runs_of_one_name_are_told_apart(tmp_path):
    paths = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "b" / "other"]
    assert sweep.distinct_names(paths) == ["a/run", "b/run", "b/other"]
    assert sweep.default_output(paths) == tmp_path.resolve()
    assert sweep.default_output(paths[:1]) == paths[0]
    with pytest.raises(ValueError, match="more than once"):
        sweep.distinct_names([tmp_path / "a", tmp_path / "a"])


def test_rates_call_everything_and_count_images():
    calls = [0, 0]

    def predict(number):
        calls[number] += 1
        return torch.zeros(1)

    first, second = rates([lambda: predict(0), lambda: predict(1)], num_images=8, device=HERE.device, rounds=3)
    assert min(calls) > 3
    assert 0 < first.low <= first.median <= first.high
    assert second.median > 0


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json not found"):
        load_run(tmp_path, HERE.device)
    (tmp_path / "config.json").write_text(recipes.get("digits").to_json(), encoding="utf-8")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        load_run(tmp_path, HERE.device)


def test_no_average_is_an_error_only_when_asked_for(folder, tmp_path):
    config = recipes.get("digits").with_settings(
        ["train.ema_decay=0", "train.max_steps=1", "model.depth=1", "train.batch_size=8"]
    )
    (tmp_path / "config.json").write_text(config.to_json(), encoding="utf-8")
    loaders = MemoryLoader(), MemoryLoader(train=False)
    Trainer(config, *loaders, classes=list("abcd"), output=tmp_path, world=HERE).fit()
    load_run(tmp_path, HERE.device)
    with pytest.raises(ValueError, match="no moving average"):
        load_run(tmp_path, HERE.device, ema=True)
