"""One contract for every method: those of `pss.methods`, and one from outside that uses all of it (`everything.py`)."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from memory_loader import MemoryLoader
from ranks import assert_same_to_rounding, launch
from torch._dynamo.testing import CompileCounterWithBackend

from pss import methods, recipes
from pss.config import Config
from pss.inference import choose, export, report, sweep, table
from pss.inference.accuracy import MacsOfImages
from pss.inference.opening import load_run
from pss.methods import METHODS, DenseTargets, Phase, Progress, Stage
from pss.models.compiled import Graphs
from pss.models.create import create_model
from pss.planning.doctor import measure_training
from pss.planning.plan import plan
from pss.runs import checkpoint
from pss.runs.log import read_rows
from pss.runtime.processes import World
from pss.training.optim import build_optimizer, set_rates
from pss.training.setup import Interrupted
from pss.training.trainer import Trainer

HERE = World(rank=0, size=1, device=torch.device("cpu"))
CLASSES = ["a", "b", "c", "d"]
EVERYTHING = "everything:Everything"
APART = {"avit", "dynamicvit", "s2vite", "svite", EVERYTHING}
"""Methods whose loss is not a mean over images, which draw random numbers, which look at the first images, or which
rank gradients: two processes learn what one does that computes a batch in two parts."""
ON_LVVIT = " on lvvit_s"
LABELLED = [f"{name}{ON_LVVIT}" for name in ("dense", "sampled", "toe", "dynamicvit", "sparsifiner")]
"""Methods on a backbone that classifies patches, too, and has running statistics."""
TINY = [
    "model.embed_dim=24", "model.depth=4", "train.epochs=4", "train.batch_size=8", "optim.warmup_epochs=1",
    "data.prefetch_gb=0",
]  # fmt: skip
LOUD = [
    "model.drop_path_rate=0.2", "loss.mixup=0.8", "loss.cutmix=1.0", "optim.clip_grad=1.0", "train.ema_decay=0.9",
    "train.log_every_steps=1",
]  # fmt: skip


@pytest.fixture(scope="session")
def ingredients(tmp_path_factory):
    """Label maps for 40 samples of four classes and for the 53 of the image folder, and weights for a teacher."""
    folder = tmp_path_factory.mktemp("ingredients")
    for name, num_samples in (("memory", 40), ("folder", 53)):
        maps = np.random.default_rng(0).integers(0, 3, (num_samples, 4, 4), dtype=np.int64)
        np.save(folder / f"{name}.npy", maps)
    torch.manual_seed(5)
    for classes in (3, 4):
        config = recipes.get("digits").with_settings([*TINY, "model.name=everything:backbone"])
        model = create_model(config.model.name, num_classes=classes, img_size=32, **config.model.overrides())
        torch.nn.init.normal_(model.head.weight)
        torch.save(model.state_dict(), folder / f"teacher{classes}.pt")
    return folder


def settings_of(name, ingredients, maps="memory", classes=4):
    if name.endswith(ON_LVVIT):
        small = ["model.name=lvvit_s", "model.global_pool=token"]
        return [*TINY, *small, f"method={name.removesuffix(ON_LVVIT)}"]
    if name != EVERYTHING:
        return [*TINY, f"method={name}"]
    return [
        *TINY, f"method={name}", "model.name=everything:backbone", f"data.label_maps={ingredients / maps}.npy",
        f"everything.teacher={ingredients}/teacher{classes}.pt",
    ]  # fmt: skip


def loud_of(config):
    mixes_tokens = methods.find(config.method).mixes(config) == "tokens"
    return [setting for setting in LOUD if not (mixes_tokens and setting.startswith("loss."))]


QUICK = ("sampled", EVERYTHING)
"""The method that pss is for, and one that uses all that there is."""


@pytest.fixture(
    params=[
        *QUICK,
        *(pytest.param(one, marks=pytest.mark.exhaustive) for one in [*METHODS, *LABELLED] if one not in QUICK),
    ]
)
def name(request):
    return request.param


@pytest.fixture
def config(name, ingredients):
    return recipes.get("digits").with_settings(settings_of(name, ingredients))


@pytest.fixture
def method(config):
    torch.manual_seed(0)
    method = methods.build(config, num_classes=4, steps_per_epoch=5)
    for teacher in method.teachers.values():
        teacher.load(HERE.device)
    for head in (method.model.head, getattr(method.model, "aux_head", None)):
        if head is not None:  # at first they tell nothing apart
            torch.nn.init.normal_(head.weight, std=0.3)
    return method


def trainer(config, output, *, on_batch=None):
    output.mkdir(exist_ok=True)
    (output / "config.json").write_text(config.to_json(), encoding="utf-8")
    maps = None if config.data.label_maps is None else np.load(config.data.label_maps)
    loaders = MemoryLoader(40, on_batch=on_batch, maps=maps), MemoryLoader(40, train=False)
    return Trainer(config, *loaders, classes=CLASSES, output=output, world=HERE)


def at(step):
    return Progress(step=step, total_steps=20, epoch=step // 5, epochs=4, seed=0, rank=0)


def a_batch(method, count=6):
    """Images, labels, and what the method wants beside them."""
    loader = MemoryLoader(40, batch_size=count, maps=np.zeros((40, 4, 4), dtype=np.int64))
    batch = next(iter(loader))
    images = (batch.images / 255 - 0.3) / 0.35
    dense = [DenseTargets(batch.view, batch.maps)] if method.wants(method.config) else []
    return images, batch.labels, dense


def gradients(method, images, labels, *dense):
    """Of a step whose random numbers are the same each time, by name."""
    method.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    method(images, labels, at(13), *dense)["loss"].backward()
    return {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}


def images_of(method, count=5):
    return torch.randn(count, 3, *method.model.image_size, generator=torch.Generator().manual_seed(1))


def assert_same(a, b, path=""):
    """Equal to the bit, all the way down."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a.keys() - {"measured"}:  # times, and sums that start anew with a process
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}[{number}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


# Training.


def test_it_learns(config, tmp_path):
    plain = ["data.flip=0", "train.epochs=30", "optim.lr=3e-3", "model.depth=2", "train.log_every_steps=5"]
    if config.method == EVERYTHING:
        plain = ["data.flip=0", "train.epochs=40", "optim.lr=3e-3", "train.log_every_steps=5"]
    if config.model.name == "lvvit_s":
        plain += ["train.epochs=45"]
    row = trainer(config.with_settings(plain), tmp_path).fit()
    assert row["top1"] >= 95.0
    losses = [row["loss"] for row in read_rows(tmp_path, "epoch")]
    assert losses[-1] < 0.75 * losses[0]


def test_what_it_returns_and_that_gradients_reach_all_that_trains(method):
    images, labels, dense = a_batch(method)
    epoch = 0
    for phase in method.phases():
        method.begin_phase(phase)
        method.zero_grad(set_to_none=True)
        position = at(5 * epoch + 3)
        method.begin_epoch(position)
        out = method(images, labels, position, *dense)
        assert out["logits"].shape == (6, 4)
        assert all(value.ndim == 0 for name, value in out.items() if name != "logits")
        out["loss"].backward()
        for name, parameter in method.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
            assert parameter.grad is None or parameter.grad.isfinite().all(), name
        epoch += phase.epochs
    assert epoch == method.config.train.epochs


def test_soft_targets_equal_labels_where_they_say_the_same(method):
    method.eval()
    images, labels, dense = a_batch(method)
    smooth = method.config.loss.label_smoothing
    soft = torch.nn.functional.one_hot(labels, 4) * (1 - smooth) + smooth / 4
    losses = [method(images, targets, at(13), *dense)["loss"] for targets in (labels, soft)]
    torch.testing.assert_close(*losses)


def test_every_parameter_that_trains_is_in_exactly_one_group(method):
    for phase in method.phases():
        method.begin_phase(phase)
        grouped = [parameter for group in method.param_groups(phase) for parameter in group["params"]]
        assert len(grouped) == len(set(map(id, grouped)))
        assert set(map(id, grouped)) == {id(p) for p in method.parameters() if p.requires_grad}
        optimizer, schedule = build_optimizer(method, phase, batch_size=8, steps_per_epoch=5)
        for step in range(20):
            set_rates(optimizer, schedule, step, method.lr_factors(at(step)) if phase is method.phases()[-1] else {})


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The final states of whole runs, by method; each is made when it is first asked for."""
    made = {}

    def state(config):
        key = config.method, config.model.name
        if key not in made:
            output = tmp_path_factory.mktemp("whole")
            trainer(config.with_settings(loud_of(config)), output).fit()
            made[key] = checkpoint.load_latest(output / "checkpoints")[0]
        return made[key]

    return state


@pytest.mark.parametrize("stop", [3, 5, 8, 13])
def test_a_stopped_run_ends_bit_identical(config, tmp_path, uninterrupted, stop):
    loud = config.with_settings(loud_of(config))
    with pytest.raises(Interrupted):
        trainer(loud, tmp_path, on_batch=lambda step: step == stop and os.kill(os.getpid(), 15)).fit()
    torch.manual_seed(12345)  # whatever is drawn in between must not matter
    resumed = trainer(loud, tmp_path, on_batch=lambda step: torch.rand(step + 1))
    assert stop <= resumed.step <= stop + 1
    resumed.fit()
    assert_same(checkpoint.load_latest(tmp_path / "checkpoints")[0], uninterrupted(config))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_equal_one(name, ingredients, image_root, tmp_path, parallel):
    own = settings_of(name, ingredients, maps="folder", classes=3)
    settings = [*own, "train.max_steps=10", "train.batch_size=16", "train.ema_decay=0.9", "model.qkv_bias=qv"]
    if name == EVERYTHING:
        settings.remove("model.qkv_bias=qv")
    here = str(Path(__file__).parent)
    parts = 2 if name in APART or name in LABELLED else 1
    (one,) = launch(1, image_root, tmp_path / "one", *settings, f"train.accumulate={parts}", path=here)
    two = launch(2, image_root, tmp_path / "two", *settings, f"train.parallel={parallel}", path=here)
    assert_same_to_rounding(tmp_path / "one", tmp_path / "two")
    assert two[0]["digest"] == two[1]["digest"]
    for key in ("loss", "val_loss", "ema_val_loss"):
        assert two[0]["row"][key] == pytest.approx(one["row"][key], abs=1e-5)


def test_half_precision_stays_finite(method):
    images, labels, dense = a_batch(method)
    method.begin_phase(method.phases()[-1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = method(images, labels, at(13), *dense)
    out["loss"].backward()
    assert out["loss"].isfinite()
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


def test_activations_may_be_computed_twice(method):
    images, labels, dense = a_batch(method)
    method.begin_phase(method.phases()[-1])
    found = []
    for again in (False, True):
        method.model.checkpoint_activations = again
        found.append(gradients(method, images, labels, *dense))
    for parameter in found[0]:
        torch.testing.assert_close(found[0][parameter], found[1][parameter])


def test_compiled_it_learns_the_same(method):
    if not method.compiles:
        pytest.skip("it is not compiled")
    images, labels, dense = a_batch(method)
    found, counter = [], CompileCounterWithBackend("aot_eager")
    for graphs in (None, Graphs(backend=counter)):
        method.model.graphs = graphs
        found.append(gradients(method, images, labels, *dense))
    for parameter in found[0]:
        torch.testing.assert_close(found[0][parameter], found[1][parameter], rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


# Costs, operating points, pictures.


def test_it_is_planned(config):
    planned = plan(config, num_images=80, num_classes=4)
    assert sum(level.share for level in planned.levels) == pytest.approx(1)
    assert all(0 < level.cost.forward < level.cost.training for level in planned.levels)
    assert planned.total_steps == 40
    assert len(planned.level_of_step) == 40


def test_operating_points(method):
    method.eval()
    images = images_of(method)
    with torch.inference_mode():
        for point in method.points():
            method.check_point(point)
            logits, macs = method.predict_with_cost(images, point)
            torch.testing.assert_close(logits, method.predict(images, point))
            assert macs.shape == (5,)
            assert (macs <= method.cost(point).forward).all()
            tokens, depths = method.tokens(point), method.depths(images, point)
            assert depths.shape == (5, method.model.num_patches)
            alive = [(depths > number).sum(1) + method.model.num_prefix_tokens for number in range(len(tokens))]
            for count, seen in zip(tokens, alive, strict=True):
                assert (seen <= count).all()
                if not method.costs_vary:
                    assert (seen == count).all()
            for weights in method.attention_maps(images, point):
                torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    if method.points() == (None,):
        with pytest.raises(ValueError, match="no operating point to choose"):
            method.fine_points()
        with pytest.raises(ValueError, match="leave out --rho"):
            method.check_point(0.5)
        return
    costs = [method.cost(point).forward for point in method.fine_points()]
    assert costs == sorted(costs)
    assert len(costs) == 1 or costs[0] < costs[-1]  # one where no other point saves arithmetic
    for wrong in (0.0, 1.5, None):
        with pytest.raises(ValueError, match=r"ρ|rho|keep rate"):
            method.check_point(wrong)


def test_it_is_evaluated(config, tmp_path):
    trainer(config.with_settings(["train.max_steps=5"]), tmp_path).fit()
    run = load_run(tmp_path, HERE.device)
    found = sweep.sweep(
        [run], names=["run"], points=None, batch_size=4, world=HERE,
        make_loader=lambda data: MemoryLoader(40, train=False),
    )  # fmt: skip
    assert [row["rho"] for row in found.rows] == list(run.method.points())
    for row in found.rows:
        cost = run.method.cost(row["rho"]).forward / 1e9
        if run.method.costs_vary:
            assert row["gflops_low"] <= row["gflops"] <= row["gflops_high"] <= cost
        else:
            assert (row["gflops"], row["gflops_low"]) == (cost, None)
    (exhibit,) = found.exhibits
    assert exhibit.points == list(run.method.points())
    assert len(exhibit.pictures[0].views) == len(exhibit.points)
    for point, shares, view in zip(exhibit.points, exhibit.frequencies, exhibit.pictures[0].views, strict=True):
        tokens = run.method.tokens(point)
        kept = tokens[-1] - run.method.model.num_prefix_tokens
        if run.method.costs_vary:
            assert sum(shares) <= kept
            assert len(view.kept) <= kept
            continue
        assert sum(shares) == pytest.approx(kept)
        assert len(view.kept) == kept
        assert (view.depths is None) == (len(set(tokens)) == 1)
    json.dumps(found.rows, allow_nan=False)


@pytest.mark.parametrize("suffix", ["pt2", pytest.param("onnx", marks=pytest.mark.exhaustive)])
def test_it_is_exported(config, tmp_path, suffix):
    trainer(config.with_settings(["train.max_steps=5"]), tmp_path).fit()
    run = load_run(tmp_path, HERE.device)
    path = tmp_path / f"model.{suffix}"
    assert export.export(run, path, point=run.method.points()[0]) < 1e-4
    assert path.stat().st_size > 1000


def test_what_images_cost_is_told_by_mean_and_percentiles():
    told = MacsOfImages.of(torch.arange(101, dtype=torch.float64))
    assert (told.mean, told.low, told.high) == pytest.approx((50, 5, 95))


# Settings.


def test_its_settings_are_in_the_file_and_those_of_others_are_not(config, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(config.to_json(), encoding="utf-8")
    assert Config.from_json(path) == config
    sections = {kind.section for kind in methods.find(config.method).sections}
    assert set(json.loads(config.to_json())) == sections | {
        "recipe", "method", "model", "data", "optim", "loss", "compile", "train",
    }  # fmt: skip


def test_sections_are_compared_with_what_is_set_and_not_with_defaults(ingredients):
    """A run of two epochs has no room for the default stretches, and none are asked for."""
    short = ["train.epochs=2", "everything.alone_epochs=0", "everything.frozen_epochs=0"]
    config = recipes.get("digits").with_settings([*settings_of(EVERYTHING, ingredients), *short])
    assert Config.from_dict(json.loads(config.to_json())) == config


def test_a_setting_of_another_method_is_refused_with_its_name(ingredients):
    with pytest.raises(ValueError, match=r"no key 'schedule.rho' with method dense; sampled, toe have it"):
        recipes.get("digits").with_settings(["method=dense", "schedule.rho=0.5"])
    everything = settings_of(EVERYTHING, ingredients)
    for wrong, message in {
        "everything.kep=0.5": r"did you mean everything.keep\?",
        "everything.keep=0": r"everything.keep is '0'; it must be above 0",
        "everything.move_every=none": "must be a whole number",
        "everything.alone_epochs=4": "leave epochs for the backbone",
        "schedule.rho=0.5": "sampled, toe have it",
    }.items():
        with pytest.raises(ValueError, match=message):
            recipes.get("digits").with_settings([*everything, wrong])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sparse", "use one of .*dense, .*sampled.*, or package.module:Class"),
        ("nowhere:Method", "the module nowhere cannot be imported"),
        ("everything:Nothing", "has nothing called 'Nothing'"),
        ("everything:Backbone", "no subclass of pss.methods.Method"),
    ],
)
def test_what_is_no_method_is_named(name, message):
    with pytest.raises(ValueError, match=message):
        recipes.get("digits").with_settings([f"method={name}"])


# What the method from outside does with what it is given.


@pytest.fixture(scope="module")
def everything(ingredients, tmp_path_factory):
    """A run of it, and the states at the ends of its epochs."""
    output = tmp_path_factory.mktemp("everything")
    quiet = ["train.log_every_steps=1", "train.keep_checkpoints=20"]
    config = recipes.get("digits").with_settings([*settings_of(EVERYTHING, ingredients), *quiet])
    began = trainer(config, output)
    first = {name: value.clone() for name, value in began.method.state_dict().items()}
    began.fit()
    states = {
        checkpoint.step_of(path): checkpoint.load(path) for path in checkpoint.list_checkpoints(output / "checkpoints")
    }
    return output, first, states


def test_the_backbone_is_frozen_for_a_stretch_and_learns_then(everything):
    _, first, states = everything
    for step in (5, 10):  # alone, and frozen
        for name, value in states[step]["method"].items():
            heads = name.startswith("predictor") or "aux_head" in name
            assert torch.equal(value, first[name]) != heads or name.startswith(("mask", "first")), (step, name)
    changed = [name for name, value in states[15]["method"].items() if not torch.equal(value, first[name])]
    assert "model.cls_token" in changed
    assert "model.blocks.0.attn.qkv.weight" in changed


def test_moments_of_the_frozen_stretch_go_on(everything):
    _, _, states = everything
    steps = {float(values["step"]) for values in states[15]["optimizer"]["state"].values()}
    assert steps == {10.0}  # of the second phase, the frozen epoch included


def test_masks_move_at_constant_size_and_what_they_hide_is_gone(everything):
    _, first, states = everything
    last = states[20]["method"]
    for number in range(4):
        mask, name = last[f"mask{number}"], f"model.blocks.{number}.mlp.fc1.weight"
        assert not torch.equal(mask, first[f"mask{number}"])
        assert int(mask.sum()) == int(first[f"mask{number}"].sum())
        average = states[20]["ema"][name]
        assert (last[name][~mask] == 0).all()
        assert (average[~states[20]["ema"][f"mask{number}"]] == 0).all()
        assert (last[name][mask] != 0).any()


def test_moments_are_reset_where_masks_moved(ingredients, tmp_path):
    config = recipes.get("digits").with_settings([*settings_of(EVERYTHING, ingredients), "train.max_steps=18"])
    run = trainer(config, tmp_path)
    before = {}

    def note(batch):
        if batch == 17:
            before.update({name: mask.clone() for name, mask in run.method.named_buffers() if name.startswith("mask")})

    run.train_loader.on_batch = note
    run.fit()
    for number, weight in enumerate(run.method._masked()):
        moved = before[f"mask{number}"] != getattr(run.method, f"mask{number}")
        assert moved.any()
        moments = run.optimizer.state[weight]
        assert (moments["exp_avg"][moved] == 0).all()
        assert (moments["exp_avg_sq"][moved] == 0).all()
        assert (moments["exp_avg"][~moved] != 0).any()


def test_skipped_steps_move_nothing(ingredients, tmp_path):
    config = recipes.get("digits").with_settings([*settings_of(EVERYTHING, ingredients), "train.max_steps=18"])
    run = trainer(config, tmp_path)
    forward, masks = run.method.forward, {}

    def spoiled(images, targets, position, *dense):
        out = forward(images, targets, position, *dense)
        if position.step == 17:
            masks.update({name: mask.clone() for name, mask in run.method.named_buffers()})
            out["loss"] = out["loss"] * float("nan")
        return out

    run.method.forward = spoiled
    run.fit()
    assert run.guard.check(18) == 1
    for name, mask in run.method.named_buffers():
        assert torch.equal(mask, masks[name])
    moments = run.optimizer.state[run.method._masked()[0]]["exp_avg"]
    assert (moments[run.method.mask0] != 0).any()


def test_losses_and_stages_are_in_the_log_by_name(everything):
    output, _, _ = everything
    rows = read_rows(output, "step")
    assert all(row["kl"] >= 0 and row["dense"] > 0 for row in rows)
    assert [row.get("stage") for row in rows] == ["frozen"] * 10 + [None] * 10
    assert set(read_rows(output, "epoch")[0]["by_rho"]) == {"1 frozen"}


def test_the_teacher_stays_outside_and_is_known_by_its_weights(everything, ingredients, tmp_path):
    output, _, states = everything
    assert not any("teacher" in name for name in states[20]["method"])
    config = Config.from_json(output / "config.json")
    teacher = trainer(config, tmp_path / "new").method.teachers["teacher"]
    assert states[20]["teachers"] == {"teacher": teacher.digest}
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    other = torch.load(ingredients / "teacher4.pt", weights_only=True)
    other["head.bias"] += 1
    mine = tmp_path / "teacher4.pt"
    shutil.copytree(output, tmp_path / "run")
    state, _ = checkpoint.load_latest(output / "checkpoints")
    state["config"]["everything"]["teacher"] = str(mine)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    checkpoint.save(tmp_path / "run" / "checkpoints", state, step=20, keep=1)
    torch.save(other, mine)
    moved = config.with_settings([f"everything.teacher={mine}"])
    with pytest.raises(
        ValueError, match=r"the teacher .*teacher4.pt does not hold the weights that the run .* began with"
    ):
        trainer(moved, tmp_path / "run")


def test_a_teacher_answers_as_its_model_does(ingredients):
    config = recipes.get("digits").with_settings(settings_of(EVERYTHING, ingredients))
    method = methods.build(config, 4, 5)
    teacher = method.teachers["teacher"]
    teacher.load(HERE.device)
    alone = create_model(config.model.name, num_classes=4, img_size=32, **config.model.overrides()).eval()
    alone.load_state_dict(torch.load(ingredients / "teacher4.pt", weights_only=True))
    images = images_of(method)
    method.train()
    answer = teacher(images)
    torch.testing.assert_close(answer.logits, alone(images))
    assert answer.tokens.shape == (5, alone.num_tokens, alone.embed_dim)
    assert not answer.logits.requires_grad
    assert method.training_cost(method.stage(at(13))).teacher == teacher.macs > 0


def test_it_is_a_file_that_the_command_finds(ingredients, converted_root, tmp_path):
    """Adding a method touches no file of pss: the class is named, and found in the working folder."""
    maps = settings_of(EVERYTHING, ingredients, maps="folder", classes=3)
    words = [word for setting in [*maps, "train.max_steps=2"] for word in ("--set", setting)]
    command = [
        sys.executable,
        "-m",
        "cli.train",
        "digits",
        "--data",
        str(converted_root),
        "--output",
        str(tmp_path / "run"),
    ]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [*command, *words], cwd=Path(__file__).parent, env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert math.isfinite(read_rows(tmp_path / "run", "epoch")[0]["loss"])
    with contextlib.chdir(Path(__file__).parent):
        assert load_run(tmp_path / "run", HERE.device).method.name == "everything"


# A method that is run as it was trained.


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    output = tmp_path_factory.mktemp("whole")
    config = recipes.get("digits").with_settings([*TINY, "method=everything:Whole"])
    run = trainer(config, output)
    run.fit()
    return output, run


def test_who_mixes_is_given_nothing_mixed_and_every_epoch_is_told(whole):
    _, run = whole
    assert run.inputs._prepare._mixing is None
    assert run.method.targets.dtype == torch.int64
    assert run.method.began == [0, 5, 10, 15]


def test_a_method_without_a_knob_has_one_row(whole, tmp_path, capsys):
    run = load_run(whole[0], HERE.device)
    assert sweep.operating_points(run, [0.5, 0.2]) == (None,)  # beside methods that have a knob
    found = sweep.sweep(
        [run], names=["run"], points=None, batch_size=4, world=HERE,
        make_loader=lambda data: MemoryLoader(40, train=False),
    )  # fmt: skip
    (row,) = found.rows
    assert row["rho"] is None
    assert row["sparsity"] == read_rows(whole[0], "epoch")[-1]["sparsity"] == 0.25
    sweep.write(found.rows, tmp_path)
    report.write(found, [run], ["run"], tmp_path / "report.html")
    table.show(found.rows)
    assert "as trained" in capsys.readouterr().out
    assert json.loads((tmp_path / "rho.json").read_text())[0]["rho"] is None
    assert export.export(run, tmp_path / "model.pt2", point=None) < 1e-4
    with pytest.raises(ValueError, match="has no operating point to choose"):
        choose.levels(run)
    with pytest.raises(ValueError, match="has no ρ to set"):
        choose.levels(run, [0.5])
    with pytest.raises(ValueError, match="predicts in the way of method whole, which no published folder tells"):
        run.published()
    with pytest.raises(ValueError, match=r"has no ρ to set, got 0.5; leave out --rho"):
        run.method.check_point(0.5)
    with pytest.raises(ValueError, match="has no free number of patches"):
        export.export(run, tmp_path / "free.pt2", point=None, dynamic=True)


def test_a_skipped_step_leaves_no_trace(whole, tmp_path):
    """Neither in running statistics nor in the gradients of what no optimizer has, nor in the average."""
    run = trainer(whole[1].config.with_settings(["train.max_steps=8", "train.ema_decay=0.9"]), tmp_path)
    forward = run.method.forward

    def spoiled(images, targets, position, *dense):
        return forward(images * float("inf") if position.step == 2 else images, targets, position, *dense)

    run.method.forward = spoiled
    row = run.fit()
    assert run.guard.check(8) == 1
    assert math.isfinite(row["val_loss"])
    assert math.isfinite(row["ema_val_loss"])
    assert run.method.whiten.running_mean.isfinite().all()
    assert run.method.model.cls_token.grad is None


def test_what_a_method_returns_wrong_is_said(whole, tmp_path, monkeypatch):
    config = whole[1].config.with_settings(["train.max_steps=2", "train.log_every_steps=1"])
    run = trainer(config, tmp_path / "names")
    forward = run.method.forward
    run.method.forward = lambda *given: forward(*given) | {"tokens": torch.tensor(1.0)}
    with pytest.raises(ValueError, match="method whole returns tokens, which means something else in the log"):
        run.fit()
    kind = type(run.method)
    monkeypatch.setattr(kind, "phases", lambda method: [Phase("half", 2, method.config.optim)])
    with pytest.raises(ValueError, match=r"phases of method whole have 2 epochs, and train.epochs is 4"):
        trainer(config, tmp_path / "short")
    slow = config.with_settings(["optim.warmup_epochs=1.5"])
    monkeypatch.setattr(kind, "phases", lambda method: [Phase("a", 1, slow.optim), Phase("b", 3, slow.optim)])
    with pytest.raises(ValueError, match=r"phase a of method whole has 1 epochs, too few for a warm-up of 1.5"):
        trainer(slow, tmp_path / "warm")


def test_the_doctor_measures_each_phase_as_it_is_trained(whole, ingredients, monkeypatch):
    """Also one in which nothing but the head learns: its optimizer has no other parameters."""
    config, kind = whole[1].config, type(whole[1].method)
    trained = []

    def begin(method, phase):
        method.requires_grad_(phase.name == "all")
        method.model.head.requires_grad_(True)

    monkeypatch.setattr(kind, "phases", lambda method: [Phase("head", 1, config.optim), Phase("all", 3, config.optim)])
    monkeypatch.setattr(kind, "begin_phase", begin)
    monkeypatch.setattr(kind, "stage", lambda method, at: Stage(name="head" if at.phase == 0 else ""))
    monkeypatch.setattr(kind, "end_step", lambda method, at, step: trained.append(at.phase))
    planned = plan(config, num_images=40, num_classes=4)
    assert [(level.stage.name, level.share) for level in planned.levels] == [("", 0.75), ("head", 0.25)]
    rates = measure_training(config, planned, 4, HERE.device)
    assert set(rates) == set(planned.levels)
    assert set(trained) == {0, 1}
    everything = recipes.get("digits").with_settings(settings_of(EVERYTHING, ingredients))
    with pytest.raises(ValueError, match="learns from label maps, which are not measured here"):
        measure_training(everything, planned, 4, HERE.device)
    planned = plan(everything, num_images=40, num_classes=4)
    maps = torch.from_numpy(np.load(everything.data.label_maps))[:3]  # fewer than a batch
    assert set(measure_training(everything, planned, 4, HERE.device, maps)) == set(planned.levels)


def test_what_a_method_cannot_do_is_said(whole, ingredients, tmp_path):
    config = whole[1].config
    with pytest.raises(ValueError, match=r"compile.mode is on, and method whole has no part of constant shapes"):
        trainer(config.with_settings(["compile.mode=on"]), tmp_path / "compiled")
    loaders = MemoryLoader(40), MemoryLoader(40, train=False)
    options = {"classes": CLASSES, "output": tmp_path, "world": World(rank=0, size=2, device=torch.device("cpu"))}
    with pytest.raises(ValueError, match=r"method whole cannot be sharded; set train.parallel=ddp"):
        Trainer(config.with_settings(["train.parallel=fsdp"]), *loaders, **options)
    with pytest.raises(ValueError, match=r"loss.cutmix is 1.0, which nothing reads .* method that does not mix tokens"):
        config.with_settings(["loss.cutmix=1"])
    with pytest.raises(ValueError, match=r"data.label_maps is .* a method that learns from label maps would read it"):
        config.with_settings([f"data.label_maps={ingredients}/memory.npy"])
    with pytest.raises(ValueError, match=r"method everything:Everything learns from label maps; --set data.label_maps"):
        config.with_settings(["method=everything:Everything"])
