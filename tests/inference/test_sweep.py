"""The sweep: numbers that a reader can check, files in one piece, a picture that is one."""

from __future__ import annotations

import contextlib
import csv
import json

import pytest
import timm
import torch
from memory_loader import MemoryLoader
from safetensors.torch import save_file

from pss import methods, recipes
from pss.inference import sweep, table
from pss.inference.accuracy import accuracy, evaluation_inputs
from pss.inference.exhibit import Curator
from pss.inference.opening import Run, checkpoint, load_run, open_run
from pss.inference.publishing import facts
from pss.inference.publishing.pushing import write_model
from pss.inference.timing import rates
from pss.runtime.processes import World
from pss.training.trainer import Trainer

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


def sweep_of(folder, names=("sampled", "dense"), **options):
    paths = [str(folder / name) for name in names]
    return sweep.sweep(
        [open_run(path, HERE.device, **options) for path in paths],
        names=sweep.distinct_names(paths),
        points=RHOS,
        make_loader=lambda config: MemoryLoader(train=False, batch_size=16),
        batch_size=4,
        world=HERE,
    )


@pytest.fixture(scope="module")
def swept(folder):
    return sweep_of(folder)


def test_rows_hold_what_one_can_recompute(folder, swept):
    rows = swept.rows
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
        for name in ("images_per_second", "images_per_second_with_loader", "latency_ms"):
            assert 0 < row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
        assert row["peak_memory_mib"] > sum(weight.nbytes for weight in run.method.parameters()) / 2**20
        assert row["num_images"] == 40
    assert rows[0]["gflops"] > rows[1]["gflops"] > rows[2]["gflops"]


@pytest.mark.exhaustive
def test_the_average_and_another_sort_are_other_models(folder, swept):
    averaged, random = (
        sweep_of(folder, ["sampled"], **options).rows for options in ({"ema": True}, {"sort": "random"})
    )
    assert averaged[0]["loss"] != swept.rows[0]["loss"] == random[0]["loss"]
    assert random[1]["loss"] != swept.rows[1]["loss"]
    assert [row["sort"] for row in (swept.rows[0], random[0])] == ["magnitude", "random"]


def test_a_random_choice_depends_on_the_sample_alone(folder):
    """Whatever else is asked for, however the split is divided into batches, and whatever torch's generator says."""

    def found(points, batch_size=16):
        torch.manual_seed(len(points) + batch_size)
        run = open_run(str(folder / "sampled"), HERE.device, sort="random")
        loader = MemoryLoader(train=False, batch_size=batch_size)
        swept = sweep._evaluate("sampled", run, points, loader, HERE)
        shown = {picture.index: [view.kept for view in picture.views] for picture in swept[2].pictures}
        return [
            (point, one.top1, round(one.loss, 5), shares, {index: kept[place] for index, kept in shown.items()})
            for place, (point, one, shares) in enumerate(zip(points, swept[0], swept[2].frequencies, strict=True))
        ]

    of = {row[0]: row for row in found([1.0, 0.6, 0.2])}
    for points, batch_size in (([0.2], 16), ([0.2, 0.6], 7), ([0.6, 0.5, 0.2, 1.0], 40)):
        for point, top1, loss, shares, kept in found(points, batch_size):
            if point not in of:
                continue
            assert (top1, loss) == (of[point][1], pytest.approx(of[point][2], abs=2e-5))
            assert shares == of[point][3]
            both = kept.keys() & of[point][4].keys()  # other points may choose other pictures
            assert both
            assert {index: kept[index] for index in both} == {index: of[point][4][index] for index in both}
    for index, kept in of[0.2][4].items():
        assert set(kept) <= set(of[0.6][4][index])
    assert len({tuple(kept) for kept in of[0.6][4].values()}) > 6  # each sample has its own


def test_validation_draws_as_evaluation_does(folder):
    run = open_run(str(folder / "sampled"), HERE.device, sort="random")
    seen = []

    def predict(images, point):
        logits = run.method.predict(images, point)
        seen.append(torch.rand(1).item())  # what a method draws for itself
        return logits

    options = {"points": [0.5], "autocast": contextlib.nullcontext()}
    for _ in range(2):
        torch.rand(7)
        inputs = evaluation_inputs(MemoryLoader(train=False, batch_size=16), run.config.data, HERE.device)
        accuracy(predict, inputs, HERE, **options)
    assert seen[:3] == seen[3:]
    assert len(set(seen)) == 3


def test_the_exhibit_shows_what_the_model_keeps(folder, swept):
    run, exhibit = open_run(str(folder / "sampled"), HERE.device), swept.exhibits[0]
    (batch,) = MemoryLoader(train=False, batch_size=40)
    images = (batch.images.float() / 255 - 0.3) / 0.35
    model = run.method.model
    with torch.inference_mode():
        kept = [model.sample(model.embed(images), rho)[1] for rho in RHOS]
        chances = [model(images, rho).softmax(1).max(1).values for rho in RHOS]
    assert kept[0] is None
    assert exhibit.frequencies[0] == [1.0] * 16
    for one, shares in zip(kept[1:], exhibit.frequencies[1:], strict=True):
        assert shares == pytest.approx((torch.bincount(one.flatten(), minlength=16) / 40).tolist())
    assert len(exhibit.pictures) == 12
    assert sorted(picture.index * 12 // 40 for picture in exhibit.pictures) == list(range(12))
    for picture in exhibit.pictures:
        assert picture.label == picture.index % 4
        assert torch.equal(picture.pixels, batch.images[picture.index])
        assert picture.views[0].kept == list(range(16))
        for place in (1, 2):
            assert picture.views[place].kept == kept[place][picture.index].tolist()
            assert picture.views[place].top[0][1] == pytest.approx(chances[place][picture.index].item(), abs=1e-5)


def test_pictures_whose_prediction_changes_come_first(folder):
    run = open_run(str(folder / "sampled"), HERE.device)
    curator = Curator(
        run.method, points=[0.5, 1.0], num_samples=40, world=HERE, autocast=contextlib.nullcontext, size=4
    )
    (batch,) = MemoryLoader(train=False, batch_size=40)
    images = batch.images.float() / 255
    at_one, at_half = batch.labels.clone(), batch.labels.clone()
    at_half[[3, 5, 15, 33]] += 1  # right at rho 1 and not at 0.5
    at_one[22] = at_half[22] = 3 - batch.labels[22]  # wrong at both
    with torch.inference_mode():
        curator(batch, images, [torch.nn.functional.one_hot(one, 5).float() for one in (at_half, at_one)])
    assert [picture.index for picture in curator.exhibit().pictures] == [3, 15, 20, 33]


@pytest.mark.parametrize("rel_pos", ["none", "bias"])
def test_what_is_pushed_comes_back(folder, swept, tmp_path, monkeypatch, rel_pos):
    config = recipes.get("digits").with_settings(["model.depth=2", f"model.rel_pos={rel_pos}"])
    method = methods.build(config, 4, steps_per_epoch=1).eval()
    run = Run("mine", config, list("abcd"), 7, method)
    write_model(tmp_path / "mine", run, "mine", swept.rows, facts.of(run))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(tmp_path / name.split("/")[1]))
    images = torch.randn(2, 3, 32, 32)
    for source in (str(tmp_path / "mine"), "hf-hub:me/mine"):
        again = open_run(source, HERE.device)
        assert (again.classes, again.step, again.config.data.mean) == (list("abcd"), 7, (0.3, 0.3, 0.3))
        assert torch.equal(again.method.predict(images, 0.6), method.predict(images, 0.6))
    assert again.published().settings == run.published().settings
    assert "| 0.6 | 10 |" in (tmp_path / "mine" / "README.md").read_text(encoding="utf-8")
    if rel_pos == "none":
        theirs = timm.create_model(f"local-dir:{tmp_path / 'mine'}", pretrained=True).eval()
        torch.testing.assert_close(theirs(images), method.predict(images))


def test_weights_of_timm_get_the_sampling_block(tmp_path):
    plain = timm.create_model("deit_tiny_patch16_224", num_classes=5).eval()
    save_file(plain.state_dict(), tmp_path / "tiny.safetensors")
    run = open_run(f"deit_tiny_patch16_224={tmp_path / 'tiny.safetensors'}", HERE.device)
    assert (run.num_classes, run.classes, run.config.data.crop_pct) == (5, None, 0.9)
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(run.method.predict(images), plain(images))
        assert not torch.allclose(run.method.predict(images, 0.5), plain(images))
    with pytest.raises(ValueError, match="leave out --ema"):
        open_run(f"deit_tiny_patch16_224={tmp_path / 'tiny.safetensors'}", HERE.device, ema=True)


def test_one_checkpoint_of_a_run_can_be_named(folder):
    newest, older = checkpoint.list_checkpoints(folder / "sampled" / "checkpoints")
    runs = [open_run(str(path), HERE.device) for path in (folder / "sampled", newest, older)]
    assert [run.step for run in runs] == [10, 10, 5]


def test_files_agree_and_replace_older_ones(swept, tmp_path):
    rows = swept.rows
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
    runs = [Run("", recipes.get("digits"), [], 0, torch.nn.Module(), path) for path in paths]
    assert sweep.default_output(runs) == tmp_path.resolve()
    assert sweep.default_output(runs[:1]) == paths[0].resolve()
    with pytest.raises(ValueError, match="more than once"):
        sweep.distinct_names([tmp_path / "a", tmp_path / "a"])


def test_points_that_are_slower_over_one_image_are_told():
    """Beyond the spread of both; a run without a knob, or of one row, has nothing to compare."""

    def row(run, rho, low, high, knob="ρ"):
        return {"run": run, "rho": rho, "knob": knob, "latency_ms_low": low, "latency_ms_high": high}

    rows = [
        row("a", 0.7, 3.4, 3.6), row("a", 1.0, 2.2, 2.4), row("a", 0.9, 2.3, 3.9), row("a", 0.5, 2.5, 2.6),
        row("b", None, 1, 2), row("c", 0.5, 1, 2), row("d", 0.5, 1, 2, "depth"), row("d", 1.0, 2.5, 3, "depth"),
    ]  # fmt: skip
    assert table.slower_alone(rows) == ["a: a single image takes longer at ρ 0.7, 0.5 than at ρ 1; run it at ρ 1"]


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
