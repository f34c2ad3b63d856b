"""Runs for a given time: what scales with their length, how that is chosen, and that measuring leaves no trace."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from memory_loader import MemoryLoader, fit

import pss
from pipelines.settings import is_section
from pss import methods, recipes
from pss.api import budgeting
from pss.overrides import changes
from pss.planning.budget import Budget, Clock, check_settings, choose, dense_of, in_words, longest
from pss.planning.length import fewest_epochs, of_length
from pss.planning.plan import plan
from pss.planning.rehearsal import rehearse
from pss.planning.taken import Taken, key_of, whole_epoch
from pss.runs import checkpoint
from pss.runtime.processes import World
from pss.sections import RunSettings, ScheduleConfig

TINY = ["model.embed_dim=24", "model.depth=2", "train.batch_size=8", "train.num_workers=1", "optim.warmup_epochs=0"]
HERE = World(rank=0, size=1, device=torch.device("cpu"))
GROWING = ["data.progressive.start_size=16", "data.progressive.begin_epoch=10", "data.progressive.end_epoch=40"]


def digits(*extra: str) -> Any:
    return recipes.get("digits").with_settings([*TINY, *extra])


@pytest.mark.parametrize(("epochs", "steps"), [(2, 3), (7, 5000), (50, 44), (99, 1), (101, 1251), (400, 10)])
def test_what_is_counted_in_epochs_keeps_its_share(epochs: int, steps: int) -> None:
    config = recipes.get("deit-s-224").with_settings(
        ["train.epochs=100", "optim.warmup_epochs=5", "schedule.cooldown_epochs=10", "data.progressive.start_size=128",
         "data.progressive.begin_epoch=30", "data.progressive.end_epoch=75"]
    )  # fmt: skip
    made = of_length(config, epochs, steps)
    schedule = made.section_of(ScheduleConfig)
    assert made.train.epochs == epochs
    assert made.optim.warmup_epochs == pytest.approx(max(0.05 * epochs, 1 / steps), abs=1.01e-4)
    assert round(made.optim.warmup_epochs * steps) >= 1
    assert abs(schedule.cooldown_epochs - 0.1 * epochs) <= 1
    grow = made.data.progressive
    assert abs(grow.end_epoch - 0.75 * epochs) <= 1
    assert abs(grow.begin_epoch - 0.3 * epochs) <= 1
    assert grow.end_epoch < epochs
    assert of_length(config, 100, steps) == config


def test_what_was_set_by_hand_and_cycles_stay() -> None:
    config = digits("optim.warmup_epochs=3", "schedule.period_steps=20", "schedule.cooldown_epochs=5")
    made = of_length(config, 10, 44, kept={"optim.warmup_epochs"})
    assert changes(config.to_dict(), made.to_dict()) == ["train.epochs=10", "schedule.cooldown_epochs=1"]


def test_a_recipe_says_how_short_it_can_be() -> None:
    assert fewest_epochs(digits(), 44) == 1
    assert fewest_epochs(digits(*GROWING), 44) == 2  # the last must be at full size
    assert fewest_epochs(digits("optim.warmup_epochs=3"), 44, kept={"optim.warmup_epochs"}) == 3
    assert fewest_epochs(digits("schedule.period_steps=100"), 44) == 3
    staged = digits("method=toe", "toe.starts=0,10,20")
    assert of_length(staged, 25, 44).own[0].starts == (0, 5, 10)


def test_no_setting_that_counts_epochs_is_forgotten() -> None:
    """All but the length of the run itself."""
    sections: list[Any] = [kind for method in methods.METHODS.values() for kind in method.sections]
    sections += [type(value) for value in vars(RunSettings(recipe="any")).values() if is_section(type(value))]
    sections.append(type(RunSettings(recipe="any").data.progressive))
    for kind in sections:
        counting = {one.name for one in dataclasses.fields(kind) if one.name.endswith(("epochs", "epoch", "starts"))}
        assert counting - {"epochs"} == set(kind.in_epochs) & counting, kind
        assert set(kind.in_epochs) <= counting


def machine(seconds: float = 0.01, calls: list[Any] | None = None) -> Any:
    """A machine whose steps take `seconds` for each million multiply-accumulates."""

    def measure(config: Any, planned: Any, levels: Any) -> Taken:
        if calls is not None:
            calls.append({key_of(level) for level in levels})
        steps = {key_of(level): seconds * level.cost.training / 1e6 for level in levels}
        return Taken(3.0, 2.0, steps, dict.fromkeys(steps, 0.0), 0.1, 0.5, 0.05)

    return measure


def clock(config: Any, measure: Any, **more: Any) -> Clock:
    return Clock(config, num_images=400, num_classes=4, rehearse=measure, **more)


@pytest.mark.parametrize(
    ("seconds", "extra"), [(20.0, []), (200.0, GROWING), (777.7, ["schedule.name=linear"]), (100.0, ["method=dense"])]
)
def test_the_longest_run_that_fits_is_chosen(seconds: float, extra: list[str]) -> None:
    config = digits(*extra)
    own = clock(config, machine())
    found = choose(Budget(hours=seconds / 3600), own, clock(dense_of(config), machine()), lambda: 1.5)
    assert found.predicted.total <= seconds
    assert found.predicted.start == 3.5
    epochs = found.config.train.epochs
    assert own.predict(epochs + 1, 1.5).total > seconds
    assert found.predicted.validation == pytest.approx(0.5 * epochs)
    assert found.config == of_length(config, epochs, 50)


def test_a_share_of_dense_training_is_of_the_same_epochs() -> None:
    config = digits("train.epochs=30", *GROWING[:1], "data.progressive.end_epoch=20")
    dense = clock(dense_of(config), machine())
    found = choose(Budget(of_dense=0.5), clock(config, machine()), dense, lambda: 0.0)
    each = 50 * 0.01 * plan(config, num_images=400, num_classes=4).dense.training / 1e6
    assert found.dense_seconds == pytest.approx(3 + 30 * (each + 0.1 + 0.5 + 0.05), rel=1e-6)
    assert 0.9 < found.predicted.total / (0.5 * found.dense_seconds) <= 1
    assert "50% of the" in found.words()[0]


def test_sizes_that_come_up_at_another_length_are_measured_too() -> None:
    calls: list[Any] = []
    config = digits(
        "train.epochs=50", *GROWING, "data.progressive.multiple=8", "data.img_size=64", "model.patch_size=8"
    )
    found = choose(Budget(hours=400 / 3600), clock(config, machine(calls=calls)), clock(config, None), lambda: 0.0)
    measured = set().union(*calls)
    assert {key_of(level) for level in found.planned.levels} <= measured
    assert sum(map(len, calls)) == len(measured)  # each once


def test_what_cannot_be_met_is_refused_with_the_least_that_can() -> None:
    config = digits()
    with pytest.raises(ValueError, match=r"--budget-hours 0.001 is 3.6 s here, and the shortest run, 1 epoch") as told:
        choose(Budget(hours=0.001), clock(config, machine()), clock(config, machine()), lambda: 1.0)
    least = float(str(told.value).split("give --budget-hours ")[1].split()[0])
    assert choose(Budget(hours=least), clock(config, machine()), clock(config, None), lambda: 1.0)


def test_a_gpu_waits_for_a_loader_that_is_slower() -> None:
    """Where others decode, the queue evens out what steps ask for, and the loader's rate bounds the whole."""
    config = digits()
    fast, slow = (clock(config, machine(1e-5), loader_rate=rate) for rate in (1e9, 100.0))
    for one in (fast, slow):
        one.measured(10)
    seconds = {level: 1e-5 * level.cost.training / 1e6 for level in fast.planned(10)[1].levels}
    planned = fast.planned(10)[1]
    alone = sum(seconds[planned.levels[number]] for number in planned.level_of_step)
    assert fast.predict(10).training == pytest.approx(alone + 1.0, rel=1e-3)
    assert slow.predict(10).training == pytest.approx(10 * 400 / 100 + 1.0, rel=1e-3)


def test_settings_that_say_how_long_a_run_is_are_refused() -> None:
    for given_too, told in (("train.epochs=3", "train.epochs, and --set"), ("train.max_steps=9", "train.max_steps=9")):
        with pytest.raises(ValueError, match=told):
            check_settings(Budget(hours=1), digits(given_too), [given_too])
    with pytest.raises(ValueError, match="give one of them"):
        Budget(1.0, 0.5)
    for hours in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="give a number above 0"):
            Budget(hours=hours)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 300))
def test_the_largest_that_fits_is_found_from_any_guess(most: int, least: int, guess: int) -> None:
    assert longest(lambda number: number <= most, least, max(guess, least)) == max(most, least)


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.04, "0.0 s"), (9.9, "9.9 s"), (59.4, "59 s"), (61, "1 min 01 s"), (725, "12 min"),
                           (7200, "2 h 00 min")]
)  # fmt: skip
def test_times_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


def test_an_epoch_follows_from_its_beginning() -> None:
    """Of 20 steps of 1 s, or of any other length, the first four take twice as long: the loader decodes beside them."""
    ends = [2.0, 4.0, 6.0, 8.0, *(8.0 + number for number in range(1, 17))]
    ready = [*(5 * number for number in range(1, 4)), *range(16, -1, -1)]
    seen = list(zip(ends, ready, strict=True))
    for steps in ([1.0] * 20, [0.01] * 20):
        assert whole_epoch(seen, steps) == pytest.approx(24)
        assert whole_epoch(seen[:8], steps) == pytest.approx(24)  # goes on as since all is decoded
        assert whole_epoch(seen[:3], steps) == pytest.approx(40)  # it is not yet
    longer = [1.0] * 10 + [3.0] * 10
    assert whole_epoch(seen[:10], longer) == pytest.approx(14 + 30)
    bounded = [(end, min(2, waiting)) for end, waiting in seen]
    assert whole_epoch(bounded[:8], [1.0] * 20) == pytest.approx(12 * 20 / 8)  # a queue that never holds it all


@pytest.mark.parametrize(
    "extra",
    [
        ["train.ema_decay=0.9", "train.accumulate=2"],
        pytest.param([], marks=pytest.mark.exhaustive),
        pytest.param(
            ["method=dynamicvit", "dynamicvit.frozen_epochs=1", "model.depth=4"], marks=pytest.mark.exhaustive
        ),
    ],
)
def test_a_rehearsal_measures_every_level_and_leaves_no_trace(tmp_path: Any, extra: list[str]) -> None:
    config = digits("train.epochs=3", "data.progressive.start_size=16", "data.progressive.end_epoch=1",
                    "data.progressive.multiple=8", *extra)  # fmt: skip
    planned = plan(config, num_images=40, num_classes=4)
    made: list[MemoryLoader] = []

    def loaders(of: Any) -> Any:
        made.extend([MemoryLoader(40, size=of.data.train_size), MemoryLoader(40, train=False)])
        return made[-2:]

    (tmp_path / "scratch").mkdir()
    before = tmp_path / "before"
    fit(config.with_settings(["data.progressive.start_size=none"]), before)
    measure = partial(rehearse, make_loaders=loaders, classes=list("abcd"), world=HERE, seconds=0.05)
    taken = measure(config, planned, list(planned.levels), folder=tmp_path / "scratch")
    assert set(taken.steps) == {key_of(level) for level in planned.levels} == set(taken.waits)
    assert all(seconds > 0 for seconds in taken.steps.values())
    assert min(taken.build, taken.again, taken.validation, taken.checkpoint) > 0
    last = planned.level_of_step[-planned.steps_per_epoch :]
    assert sum(taken.steps[key_of(planned.levels[number])] for number in last) + taken.epoch > 0
    assert Taken.from_json(taken.to_json()) == taken
    after = tmp_path / "after"
    fit(config.with_settings(["data.progressive.start_size=none"]), after)
    same_weights(before, after)


def same_weights(one: Any, other: Any) -> None:
    states = [checkpoint.load_latest(folder / "checkpoints") for folder in (one, other)]
    left, right = (state[0]["method"] for state in states if state is not None)
    assert left.keys() == right.keys()
    assert all(torch.equal(value, right[name]) for name, value in left.items())


def slower(*arguments: Any, **options: Any) -> Taken:
    found = rehearse(*arguments, **options)
    return dataclasses.replace(found, validation=found.validation + 100)


@pytest.fixture(scope="module")
def budgeted(image_root: Any, tmp_path_factory: Any) -> Any:
    """Measured as ever, but for validation, of which it is said that it takes long: few epochs fill much time."""
    folder = tmp_path_factory.mktemp("budget") / "run"
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budgeting, "rehearse", slower)
        patch.setattr(budgeting, "_MOST_SECONDS", 0.1)
        run = pss.train("digits", image_root, folder, settings=[*TINY, "train.log_every_steps=1"], loader="torch",
                        budget_hours=0.1, quiet=True, say=said.append)  # fmt: skip
    return run, said


def test_a_run_for_a_time_is_plain_settings_and_says_what_it_took(budgeted: Any, image_root: Any) -> None:
    run, said = budgeted
    epochs = run.config.train.epochs
    assert run.config == of_length(digits("train.log_every_steps=1"), epochs, 53 // 8)
    assert [row["epoch"] for row in run.rows()] == list(range(1, epochs + 1))
    told = run.summary["budget"]
    assert (told["given_seconds"], told["epochs"], told["starts"]) == (360.0, epochs, 1)
    assert told["predicted"]["seconds"] <= 360
    assert sum(value for name, value in told["predicted"].items() if name != "seconds") == pytest.approx(
        told["predicted"]["seconds"], abs=0.01
    )
    assert told["actual_seconds"] >= run.summary["train_seconds"]
    assert said[0].startswith("budget: 6 min 00 s; ")
    assert said[-1].startswith("budget: 6 min 00 s given, ")
    assert not list(run.folder.glob(".rehearsal*"))


def test_it_is_resumed_at_its_length_and_equals_the_run_by_hand(budgeted: Any, image_root: Any, tmp_path: Any) -> None:
    run, _ = budgeted
    epochs, options = run.config.train.epochs, {"loader": "torch", "quiet": True}
    own = [*TINY, "train.log_every_steps=1"]
    by_hand = pss.train("digits", image_root, tmp_path / "hand", settings=[*own, f"train.epochs={epochs}"], **options)
    same_weights(run.folder, by_hand.folder)
    again = pss.train("digits", image_root, run.folder, settings=own, budget_hours=5, resume=True, **options)
    assert again.config == run.config
    assert json.loads((run.folder / "budget.json").read_text())["epochs"] == epochs


@pytest.mark.exhaustive
def test_a_run_for_a_share_of_dense_training_is_planned_from_rehearsals_of_both(
    image_root: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budgeting, "rehearse", slower)
    monkeypatch.setattr(budgeting, "_USUAL_SECONDS", 0.1)
    run = pss.train(
        "digits", image_root, tmp_path / "run", settings=TINY, loader="torch", budget_of_dense=0.1, quiet=True
    )
    told = run.summary["budget"]
    assert (told["option"], told["value"]) == ("--budget-of-dense", 0.1)
    assert told["given_seconds"] == pytest.approx(0.1 * told["dense_seconds"], abs=0.01)
    assert told["predicted"]["seconds"] <= told["given_seconds"]
    assert 1 <= run.config.train.epochs < 50
    assert run.summary["finished"]
    assert not list(run.folder.glob(".rehearsal*"))
