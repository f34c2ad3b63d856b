"""The loop: it learns, it records, and a run that was stopped anywhere ends exactly like one that was not."""

from __future__ import annotations

import functools
import json
import os
import signal
import weakref

import pytest
import torch
from memory_loader import MemoryLoader
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines.base import DataError
from pss import recipes
from pss.attention import attend as attention
from pss.methods import Method
from pss.runs import checkpoint
from pss.runs.log import read_rows
from pss.runtime.processes import World
from pss.training import setup
from pss.training.setup import Interrupted, check_masks
from pss.training.trainer import Trainer

CLASSES = ["a", "b", "c", "d"]
HERE = World(rank=0, size=1, device=torch.device("cpu"))
# Everything that draws random numbers is on: drop path, mixing, random sampling.
SETTINGS = [
    "model.embed_dim=24", "model.depth=2", "model.drop_path_rate=0.2", "model.sort=random", "loss.mixup=0.8",
    "loss.cutmix=1.0", "train.epochs=4", "train.batch_size=8", "optim.warmup_epochs=1", "optim.clip_grad=1.0",
    "train.log_every_steps=2", "train.ema_decay=0.9", "data.flip=0.5", "data.prefetch_gb=0",
]  # fmt: skip


def trainer(output, *settings, on_batch=None, num_samples=40):
    config = recipes.get("digits").with_settings([*SETTINGS, *settings])
    growing = MemoryLoader(num_samples, on_batch=on_batch, size=config.data.train_size)
    loaders = growing, MemoryLoader(num_samples, train=False)
    return Trainer(config, *loaders, classes=CLASSES, output=output, world=HERE)


def final_state(output):
    state, _ = checkpoint.load_latest(output / "checkpoints")
    return state


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


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    output = tmp_path_factory.mktemp("uninterrupted")
    trainer(output).fit()
    return final_state(output)


@pytest.mark.parametrize("method", ["sampled", "dense"])
def test_it_learns(tmp_path, method):
    plain = ["loss.mixup=0", "loss.cutmix=0", "model.drop_path_rate=0", "data.flip=0", "model.sort=magnitude"]
    row = trainer(tmp_path, *plain, "train.epochs=25", "optim.lr=3e-3", f"method={method}").fit()
    assert row["top1"] == 100.0
    losses = [row["loss"] for row in read_rows(tmp_path, "epoch")]
    assert losses[-1] < 0.75 < losses[0]


def test_a_run_starts_from_another_runs_weights(tmp_path, uninterrupted):
    """Its own checkpoints come first: a resumed run does not start again, even where the weights are gone."""
    source = tmp_path / "source"
    (source / "checkpoints").mkdir(parents=True)
    checkpoint.save(source / "checkpoints", uninterrupted, step=uninterrupted["step"], keep=1)
    weights = f"model.weights={source}"
    begun = trainer(tmp_path / "run", weights)
    assert_same(dict(begun.method.state_dict()), dict(uninterrupted["method"]))
    assert_same(dict(begun.ema.module.state_dict()), dict(uninterrupted["method"]))
    assert str(begun.started_from).startswith("loaded ")
    with_own_head = trainer(tmp_path / "other", weights, "model.own_head=true").method.state_dict()
    assert not torch.equal(with_own_head["model.head.weight"], uninterrupted["method"]["model.head.weight"])
    with pytest.raises(ValueError, match="holds no checkpoint"):
        trainer(tmp_path / "third", f"model.weights={tmp_path}")
    with pytest.raises(ValueError, match=r"no weights file .*model\.weights=FILE"):
        trainer(tmp_path / "third", "model.weights=gone.pth")
    for change, remedy in (
        ({"model.head.weight": torch.zeros(9, 24), "model.head.bias": torch.zeros(9)}, "--set model.own_head=true"),
        ({"model.head.weight": None, "model.head.bias": None}, "--set model.own_head=true"),
        ({"model.blocks.1.norm1.weight": None}, "--set model.name="),
        (
            {"model.blocks.0.attn.separable_relative_position_bias_table": torch.zeros(17, 3)},
            "--set model.rel_pos=separable",
        ),
    ):
        path = tmp_path / "file.pth"
        state = {name: value for name, value in (uninterrupted["method"] | change).items() if value is not None}
        torch.save(state, path)
        with pytest.raises(ValueError, match=f"{path} .*; .*{remedy}") as raised:
            trainer(tmp_path / "third", f"model.weights={path}")
        assert "ignore_head" not in str(raised.value)

    (tmp_path / "run").mkdir()
    trainer(tmp_path / "run", weights, "train.max_steps=3").fit()
    (source / "checkpoints").rename(tmp_path / "gone")
    resumed = trainer(tmp_path / "run", weights)
    assert (resumed.step, resumed.started_from) == (3, None)


@pytest.mark.parametrize("stop", [5, 10, 15, 2, 7, 13])
def test_a_stopped_run_ends_bit_identical(tmp_path, uninterrupted, stop):
    trainer(tmp_path, f"train.max_steps={stop}").fit()
    assert final_state(tmp_path)["step"] == stop
    torch.manual_seed(12345)  # whatever the process, or a loader, draws in between must not matter
    resumed = trainer(tmp_path, on_batch=lambda step: torch.rand(step + 1))
    assert resumed.step == stop
    resumed.fit()
    state = final_state(tmp_path)
    state["config"]["train"]["max_steps"] = None
    assert_same(state, uninterrupted)


def test_the_uninterrupted_run_depends_on_its_seed(tmp_path, uninterrupted):
    trainer(tmp_path, "train.seed=1").fit()
    other = final_state(tmp_path)["method"]
    assert not torch.equal(other["model.head.weight"], uninterrupted["method"]["model.head.weight"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_and_the_run_goes_on_identically(tmp_path, uninterrupted, number):
    def kill(step):
        if step == 7:
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted):
        trainer(tmp_path, on_batch=kill).fit()
    assert final_state(tmp_path)["step"] == 8
    assert signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)
    trainer(tmp_path).fit()
    assert_same(final_state(tmp_path)["method"], uninterrupted["method"])
    assert_same(final_state(tmp_path)["ema"], uninterrupted["ema"])


def test_the_log_has_each_step_once_also_after_a_crash(tmp_path):
    class Crash(Exception):
        pass

    def crash(step):
        if step == 13:
            raise Crash

    with pytest.raises(Crash):
        trainer(tmp_path, on_batch=crash).fit()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 1')  # the line a killed process was writing
    trainer(tmp_path).fit()
    assert [row["step"] for row in read_rows(tmp_path, "step")] == list(range(2, 21, 2))
    assert [row["epoch"] for row in read_rows(tmp_path, "epoch")] == [1, 2, 3, 4]
    row = read_rows(tmp_path, "step")[1]
    assert {"loss", "lr", "rho", "tokens", "images_per_second", "data_wait", "epoch"} <= row.keys()
    assert any((tmp_path / "tensorboard").iterdir())
    levels = read_rows(tmp_path, "epoch")[0]["by_rho"]
    assert {rho: level["steps"] for rho, level in levels.items()} == {"0.2": 1, "0.6": 2, "1": 2}
    assert all(0 <= level["data_wait"] <= 1 and level["ms_per_step"] > 0 for level in levels.values())


def test_a_checkpoint_of_other_data_is_refused(tmp_path):
    trainer(tmp_path, "train.max_steps=5").fit()
    with pytest.raises(DataError, match="num_samples"):
        trainer(tmp_path, num_samples=48)


def test_a_checkpoint_of_other_classes_is_refused(tmp_path):
    trainer(tmp_path, "train.max_steps=5").fit()
    config = recipes.get("digits").with_settings(SETTINGS)
    with pytest.raises(DataError, match="4 classes"):
        Trainer(config, MemoryLoader(), MemoryLoader(train=False), classes=["a", "b"], output=tmp_path, world=HERE)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_steps(tmp_path):
    with pytest.raises(ValueError, match=r"step 1 left weights that are not finite, .* lower optim.lr"):
        trainer(tmp_path, "optim.lr=1e30", "optim.warmup_epochs=0", "optim.clip_grad=none").fit()


def spoil(run, steps, how="nan"):
    """Have the loss be no number at `steps`; `inf` leaves its gradients as they are."""
    original = run.method.forward

    def forward(images, targets, at):
        out = original(images, targets, at)
        if at.step in steps:
            out["loss"] = out["loss"] * float("nan") if how == "nan" else out["loss"] + float("inf")
        return out

    run.method.forward = forward
    return run


@pytest.mark.parametrize("how", ["nan", "inf"])
def test_a_step_without_a_finite_loss_changes_nothing_and_is_counted(tmp_path, how):
    for name in ("before", "after", "resumed"):
        (tmp_path / name).mkdir()
    trainer(tmp_path / "before", "train.max_steps=7").fit()
    spoil(trainer(tmp_path / "after", "train.max_steps=8"), {7}, how).fit()
    before, after = (final_state(tmp_path / name) for name in ("before", "after"))
    assert (before["step"], after["step"]) == (7, 8)
    for part in ("method", "ema"):
        assert_same(before[part], after[part])
    assert_same(before["optimizer"]["state"], after["optimizer"]["state"])
    assert after["skipped"].tolist()[:2] == [1, 1]
    rows = read_rows(tmp_path / "after", "step")
    assert [row["skipped"] for row in rows] == [0, 0, 0, 1]
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 for row in rows)

    spoil(trainer(tmp_path / "after"), {7, 12, 13}, how).fit()  # goes on, with the count
    assert final_state(tmp_path / "after")["skipped"].tolist()[:2] == [3, 0]
    assert [row["loss"] for row in read_rows(tmp_path / "after", "step")][6] is None  # steps 12 and 13
    assert json.loads((tmp_path / "after" / "summary.json").read_text())["skipped"] == 3
    spoil(trainer(tmp_path / "resumed"), {7, 12, 13}, how).fit()
    assert_same(final_state(tmp_path / "resumed")["method"], final_state(tmp_path / "after")["method"])


def test_steps_without_a_finite_loss_in_a_row_stop_the_run(tmp_path):
    for name in ("before", "broken", "spread"):
        (tmp_path / name).mkdir()
    trainer(tmp_path / "before", "train.max_steps=6").fit()
    with pytest.raises(ValueError, match=r"not finite in 6 steps in a row, up to step 12; .*model\.weights=RUN"):
        spoil(trainer(tmp_path / "broken", "train.max_skipped=5"), range(6, 20)).fit()
    broken = final_state(tmp_path / "broken")
    assert broken["step"] == 10
    assert_same(broken["method"], final_state(tmp_path / "before")["method"])
    # Over in between two rows of the log, it counts all the same; four and four are not five.
    with pytest.raises(ValueError, match=r"not finite in 3 steps in a row"):
        spoil(trainer(tmp_path / "spread", "train.max_skipped=3", "train.log_every_steps=20"), {1, 2, 3}).fit()
    few = spoil(trainer(tmp_path / "spread", "train.max_skipped=5"), {1, 2, 3, 4, 6, 7, 8, 9})
    few.fit()
    assert few.guard.check(20) == 8


def test_a_batch_in_parts_is_a_batch(tmp_path):
    still = ["loss.mixup=0", "loss.cutmix=0", "model.drop_path_rate=0", "data.flip=0", "model.sort=magnitude"]
    states = []
    for parts in (1, 2, 4):
        (tmp_path / str(parts)).mkdir()
        trainer(tmp_path / str(parts), *still, f"train.accumulate={parts}").fit()
        states.append(final_state(tmp_path / str(parts))["method"])
        rows = read_rows(tmp_path / str(parts), "step")
        assert rows[3]["loss"] == pytest.approx(read_rows(tmp_path / "1", "step")[3]["loss"], abs=1e-5)
    for other in states[1:]:
        for name, weight in states[0].items():
            torch.testing.assert_close(other[name], weight, atol=1e-5, rtol=1e-4)


def test_no_gradient_outlives_its_step(tmp_path, monkeypatch):
    gradients, left = [], []
    monkeypatch.setattr(
        Method, "end_step", lambda method, *_: gradients.extend(weakref.ref(part.grad) for part in method.parameters())
    )
    monkeypatch.setattr(
        Method, "begin_step", lambda method, at: left.append(sum(seen() is not None for seen in gradients))
    )
    trainer(tmp_path, "train.max_steps=3").fit()
    assert gradients
    assert left == [0, 0, 0]


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.exhaustive
def test_activations_computed_twice_train_to_the_bit(tmp_path, uninterrupted, compiling):
    settings = [*COMPILED, "train.epochs=1", "model.drop_path_rate=0"] if compiling else []
    expected = uninterrupted
    if compiling:
        (tmp_path / "once").mkdir()
        trainer(tmp_path / "once", *settings).fit()
        expected = final_state(tmp_path / "once")
    (tmp_path / "twice").mkdir()
    run = trainer(tmp_path / "twice", "train.checkpoint_activations=true", *settings)
    calls = []
    if not compiling:
        run.method.model.blocks[0].register_forward_pre_hook(lambda block, _: calls.append(block.training))
    run.fit()
    assert compiling or calls.count(True) == 2 * 20
    for name, weight in expected["method"].items():
        torch.testing.assert_close(final_state(tmp_path / "twice")["method"][name], weight, rtol=0, atol=0)


def test_the_summary_says_how_it_ended(tmp_path):
    trainer(tmp_path, "train.max_steps=5").fit()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["finished"], summary["step"], summary["epoch"]) == (False, 5, 1)
    run = trainer(tmp_path)
    row = run.fit()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["finished"], summary["step"], summary["skipped"]) == (True, 20, 0)
    rows = read_rows(tmp_path, "epoch")
    assert summary["train_seconds"] == pytest.approx(sum(row["train_seconds"] for row in rows))
    assert summary["best"]["top1"] == max(max(row["top1"], row["ema_top1"]) for row in rows)
    assert summary["last"]["top1"] == row["top1"]
    low, middle, dense = (run.method.cost(rho).forward for rho in (0.2, 0.6, 1.0))
    assert row["saved_macs"] == pytest.approx(1 - (low + 2 * middle + 2 * dense) / (5 * dense))
    assert row["saved_share"] == pytest.approx(row["saved_time"] / row["saved_macs"])


def test_a_loader_that_ends_early_is_an_error(tmp_path):
    run = trainer(tmp_path)
    run.train_loader.steps_per_epoch = 3
    run.steps_per_epoch = 5
    with pytest.raises(DataError, match="ended at step 3"):
        run.fit()


def test_a_loader_that_delivers_other_samples_than_planned_is_an_error(tmp_path):
    run = trainer(tmp_path)
    run.train_loader.planned_hash = lambda epoch: 7
    with pytest.raises(DataError, match=r"hash 00000000, not 00000007"):
        run.fit()


def test_a_loader_that_loses_an_image_fails_validation(tmp_path):
    run = trainer(tmp_path)
    run.val_inputs.num_samples += 1
    with pytest.raises(DataError, match="saw 40 images of a split of 41"):
        run.fit()


def test_the_average_follows_the_weights(tmp_path):
    state = trainer(tmp_path).fit() and final_state(tmp_path)
    weights, average = state["method"]["model.head.weight"], state["ema"]["model.head.weight"]
    assert not torch.equal(weights, average)
    assert (weights - average).abs().mean() < 0.1 * weights.abs().mean() + 1e-3


COMPILED = ["compile.mode=on", "compile.backend=aot_eager", "model.depth=1"]


def test_a_compiled_run_has_a_graph_per_level_and_resumes_bit_identical(tmp_path):
    for name in ("straight", "resumed"):
        (tmp_path / name).mkdir()
    settings = [*COMPILED, "schedule.low=0.8", "train.epochs=2"]
    straight = trainer(tmp_path / "straight", *settings)
    straight.fit()
    assert straight.compiled
    # Two levels and validation, which is all that the average is used for.
    assert straight.method.model.graphs.num_graphs == 3
    assert straight.ema.module.model.graphs.num_graphs == 1
    trainer(tmp_path / "resumed", *settings, "train.max_steps=4").fit()
    resumed = trainer(tmp_path / "resumed", *settings)
    resumed.fit()
    states = [final_state(tmp_path / name) for name in ("straight", "resumed")]
    for part in ("method", "ema", "optimizer"):
        assert_same(states[0][part], states[1][part])
    assert not any("_orig_mod" in name for name in states[0]["method"])
    # What was trained compiled goes on, and is read, without.
    plain = trainer(tmp_path / "straight", *settings[-2:], "model.depth=1")
    assert not plain.compiled
    assert_same(plain.method.state_dict(), states[0]["method"])


def test_compiling_changes_rounding_only(tmp_path):
    exact = ["model.drop_path_rate=0", "train.max_steps=5"]  # the random numbers of a compiled block are others
    for name, settings in (("compiled", COMPILED), ("plain", ["model.depth=1"])):
        (tmp_path / name).mkdir()
        trainer(tmp_path / name, *settings, *exact).fit()
    compiled, plain = (final_state(tmp_path / name)["method"] for name in ("compiled", "plain"))
    for name, weight in plain.items():
        torch.testing.assert_close(compiled[name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["compile.max_graphs=3"], r"trains at 3 token counts \(3, 10, 17\) .* raise it to 4"),
        (["compile.cuda_graphs=true", "compile.backend=inductor"], "needs a GPU and this run is on the cpu"),
    ],
)
def test_what_cannot_be_compiled_is_told_before_training(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, *COMPILED, *settings)


class Reads(TorchDispatchMode):
    """Counts what would make a GPU's host wait: values of tensors that are read, and shapes that depend on them."""

    WAITING = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.overloadpacket.__name__ in self.WAITING:
            self.found.append(str(function))
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("settings", [[], ["model.sort=magnitude", "loss.mix_mode=elem"], ["method=dense"]])
def test_nothing_is_read_from_the_device_between_two_rows_of_the_log(tmp_path, monkeypatch, settings):
    reads, counts = Reads(), {}
    for name in ("tolist", "cpu", "__bool__", "__float__", "__int__"):
        original = getattr(torch.Tensor, name)

        def noted(tensor, *arguments, original=original, name=name):
            reads.found.append(name)
            return original(tensor, *arguments)

        monkeypatch.setattr(torch.Tensor, name, noted)
    everything = ["train.epochs=1", "train.log_every_steps=4", "data.erasing=0.25", "data.rand_augment=rand-m9-inc1"]
    run = trainer(
        tmp_path, *everything, *settings, num_samples=80, on_batch=lambda step: counts.update({step: len(reads.found)})
    )
    with reads:
        run.fit()
    new = {step: counts[step] - counts[step - 1] for step in range(1, 10)}
    # After the first step its images are drawn on a sheet; then only after the steps that are logged.
    assert {step for step, count in new.items() if count} == {1, 4, 8}, reads.found


class OnGpu(torch.Tensor):
    """A tensor that claims to be on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("right", [True, False])
def test_masks_go_around_cudnn_where_it_fails_its_self_test(monkeypatch, right):
    tried, said, allowed = [], [], []

    @functools.cache
    def self_test(*what):
        tried.append(what)
        return right

    monkeypatch.setattr(attention, "gets_masks_right", self_test)
    monkeypatch.setattr(setup, "gets_masks_right", self_test)
    check_masks(torch.device("cpu"), said.append)
    assert tried == []
    check_masks(torch.device("cuda"), said.append)
    assert [line[:22] for line in said] == ([] if right else ["cuDNN fails a self-tes"])

    def attend(q, k, v, *_, **__):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return v

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    q = torch.zeros(1, 1, 3, 8).as_subclass(OnGpu)
    for mask in (None, torch.zeros(3, 3)):
        attention.attend(q, q, q, attn_mask=mask)
    assert allowed == [True, right]
    assert len(tried) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", ["off", "on"])
def test_the_host_waits_for_the_gpu_at_the_log_only(tmp_path, mode):
    """The second epoch's steps, compiled in the first, run with an error on every synchronisation."""

    def forbid(step):
        torch.cuda.set_sync_debug_mode("error" if 6 <= step < 8 else "default")

    config = recipes.get("digits").with_settings(
        [*SETTINGS, f"compile.mode={mode}", "model.depth=1", "train.epochs=2", "train.log_every_steps=5"]
    )
    world = World(rank=0, size=1, device=torch.device("cuda", 0))
    loaders = [MemoryLoader(train=split == "train") for split in ("train", "val")]
    run = Trainer(config, *loaders, classes=CLASSES, output=tmp_path, world=world)
    begin_step = run.method.begin_step

    def watched(at):
        forbid(run.step)
        begin_step(at)

    run.method.begin_step = watched
    try:
        assert run.fit()["step"] == 10
    finally:
        torch.cuda.set_sync_debug_mode("default")


GROWING = ["data.progressive.start_size=16", "data.progressive.begin_epoch=2", "data.progressive.end_epoch=2"]


def test_images_of_growing_size_train_and_a_stopped_run_ends_bit_identical(tmp_path):
    """Two epochs of 16 px, 4 patches, then 32 px, 16 patches; validation is at 32 px throughout."""
    settings = [
        *GROWING,
        "schedule.name=list",
        "schedule.rhos=0.6,1",
        "train.log_every_steps=1",
        "model.sort=magnitude",
    ]
    (tmp_path / "whole").mkdir()
    trainer(tmp_path / "whole", *settings).fit()
    rows = read_rows(tmp_path / "whole", "step")
    assert [row["img_size"] for row in rows] == [16] * 10 + [32] * 10
    assert [row["tokens"] for row in rows] == [3, 5] * 5 + [10, 17] * 5
    for stop in (7, 10):
        (output := tmp_path / str(stop)).mkdir()
        trainer(output, *settings, f"train.max_steps={stop}").fit()
        trainer(output, *settings).fit()
        for part in ("method", "ema", "optimizer"):
            assert_same(final_state(output)[part], final_state(tmp_path / "whole")[part])


def test_sizes_of_other_than_whole_patches_are_refused(tmp_path):
    with pytest.raises(ValueError, match="images of 20 x 20 pixels do not suit this model: it takes whole patches"):
        trainer(tmp_path, "data.progressive.start_size=20", "data.progressive.end_epoch=2")
