"""What a run is said to cost before it is trained, and how a loader is said to keep up with it."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import warm
from hypothesis import given
from hypothesis import strategies as st

from cli.train import train
from pss import recipes
from pss.planning.plan import plan
from pss.planning.simulation import Machine, queue_batches, remedies, run_on, simulate

durations = st.lists(st.integers(1, 50).map(float), min_size=1, max_size=60)


@pytest.mark.parametrize(
    ("settings", "saving"),
    [
        (("data.img_size=224", "model.name=deit_small_patch16_224"), 0.363),
        (("data.img_size=384", "model.name=deit_small_patch16_224"), 0.383),
        (("data.img_size=224", "model.name=vit_base_patch16_224"), 0.359),
    ],
)
def test_the_published_cycle_saves_what_was_published(settings: tuple[str, ...], saving: float) -> None:
    """methods/pss: table of FLOP-limited savings; the histogram is a ninth at 0.2 and two ninths at each other."""
    config = recipes.get("deit-s-224").with_settings(
        ["schedule.cooldown_epochs=0", "train.epochs=2", "optim.warmup_epochs=0", *settings]
    )
    planned = plan(config)
    assert planned.saving == pytest.approx(saving, abs=0.002)
    shares = {level.rho: level.share for level in planned.levels}
    assert shares == pytest.approx({0.2: 1 / 9, 0.4: 2 / 9, 0.6: 2 / 9, 0.8: 2 / 9, 1.0: 2 / 9}, abs=1e-3)
    assert planned.average_demand == pytest.approx(1 / (1 - planned.saving))
    assert planned.epoch_macs == pytest.approx(planned.dense.training * (1 - planned.saving) * 1251 * 1024)


def test_tokens_are_counted_as_the_model_counts_them() -> None:
    config = recipes.get("deit-s-224").with_settings(["train.epochs=10", "model.token_counts=aligned"])
    assert [level.tokens for level in plan(config).levels] == [197]  # all of it is the cooldown
    uncooled = config.with_settings(["schedule.cooldown_epochs=0"])
    assert [level.tokens for level in plan(uncooled).levels] == [40, 80, 120, 160, 197]


def test_a_dense_run_saves_nothing_and_demands_one() -> None:
    planned = plan(recipes.get("digits").with_settings(["method=dense"]), num_images=1440)
    assert (planned.saving, planned.average_demand, planned.peak_demand) == (0.0, 1.0, 1.0)
    assert (planned.steps_per_epoch, planned.total_steps) == (45, 45 * 50)
    with pytest.raises(ValueError, match="20 images do not fill one batch of 32"):
        plan(recipes.get("digits"), num_images=20)


@given(steps=durations, batch=st.integers(1, 50).map(float), capacity=st.integers(1, 70))
def test_laws_of_the_simulation(steps: list[float], batch: float, capacity: int) -> None:
    run = simulate(steps, batch, capacity)
    assert run.seconds == pytest.approx(sum(steps) + sum(run.waited))
    assert run.seconds >= max(sum(steps) + batch, batch * len(steps) + steps[-1]) - 1e-9
    assert simulate(steps, batch, capacity + 1).seconds <= run.seconds + 1e-9
    # with room for everything, a step begins when its batch is decoded and the step before has ended
    now = 0.0
    for number, seconds in enumerate(steps):
        now = max(now, batch * (number + 1)) + seconds
    assert simulate(steps, batch, len(steps)).seconds == pytest.approx(now)


@given(steps=durations, batch=st.integers(1, 50).map(float), capacity=st.integers(1, 10))
def test_the_simulation_is_a_queue_watched_tick_by_tick(steps: list[float], batch: float, capacity: int) -> None:
    """The same rules executed naively: all durations are whole ticks."""
    tick = decoded = taken = 0
    working = batch  # ticks left of the batch being decoded; 0 while it waits for room
    busy = 0.0  # ticks left of the step being trained
    queue = 0
    while taken < len(steps) or busy > 0:
        moved = True
        while moved:
            moved = False
            if working == 0 and queue < capacity and decoded < len(steps):
                queue, decoded, working, moved = queue + 1, decoded + 1, batch, True
            if busy == 0 and queue and taken < len(steps):
                queue, busy, taken, moved = queue - 1, steps[taken], taken + 1, True
        tick += 1
        working, busy = max(working - 1, 0), max(busy - 1, 0)
    assert simulate(steps, batch, capacity).seconds == tick


def machine(loader: float, queue_gb: float = 0.5) -> Machine:
    return Machine(
        processes=8, images_per_second=80_000, loader_images_per_second=loader, queue_bytes=round(queue_gb * 1e9)
    )


def test_remedies_are_tried_and_not_guessed() -> None:
    """Each one, applied, does away with the waiting; where the loader is slower than the average, only speed does."""
    config = recipes.get("deit-s-224").with_settings(
        ["schedule.cooldown_epochs=0", "train.epochs=16", "optim.warmup_epochs=0"]
    )
    planned = plan(config)
    starved = machine(140_000)  # the average step asks for 125,600, the fastest for 409,000
    assert run_on(planned, starved, 224).data_wait > 0.05
    found = remedies(config, planned, starved)
    assert [remedy.what.split("=")[0] for remedy in found[:3]] == [
        "--set schedule.shuffle",
        "--set schedule.period_steps",
        "--set data.prefetch_gb",
    ]
    for remedy in found[:2]:
        changed = config.with_settings([remedy.what.removeprefix("--set ")])
        assert run_on(plan(changed), starved, 224).data_wait <= 0.012
    gigabytes = int(found[2].what.split("=")[1])
    assert run_on(planned, machine(140_000, gigabytes), 224).data_wait <= 0.012
    assert queue_batches(planned, machine(1, gigabytes), 224) * 1024 * 3 * 224**2 <= gigabytes * 10**9 * 8
    slow = remedies(config, planned, machine(60_000))
    assert [remedy.what.split()[1] for remedy in slow] == ["loader"]


def test_the_command_shows_a_plan() -> None:
    arguments = ["deit-s-224", "--plan", "--gpus", "8", "--loader-rate", "150000", "--gpu-rate", "10500"]
    arguments += ["--set", "data.prefetch_gb=0.5"]
    done = warm.run(
        [sys.executable, "-m", "cli.train", *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    for words in ("35.1% (36.3% without the last 10", "1.54 times", "5.11 times", "ρ over the first epoch", "cure: "):
        assert words in done.stdout
    assert len(max(done.stdout.splitlines(), key=len)) < 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loader_rate": 5.0}, "are for --plan"),
        ({"plan": True, "gpus": 2}, "add --loader-rate"),
        ({"plan": True, "loader_rate": 0.0}, r"--loader-rate is 0\.0"),
        ({}, "give --data and --output"),
    ],
)
def test_what_planning_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train("digits", **options)


def test_growing_images_are_planned_by_size_and_rho() -> None:
    """Of 300 epochs 60 at 160 px, the growth to 224 px in steps of 32, then 60 at full size, the last 10 at rho = 1."""
    planned = plan(recipes.get("deit-s-224-lowres"))
    tokens: dict[int, list[int]] = {}
    for level in planned.levels:
        tokens.setdefault(level.img_size, []).append(level.tokens)
    assert tokens == {160: [20, 40, 61, 81, 101], 192: [29, 58, 87, 116, 145], 224: [39, 79, 118, 158, 197]}
    assert sum(level.share for level in planned.levels) == pytest.approx(1)
    alone = plan(recipes.get("deit-s-224"))
    assert planned.dense == alone.dense
    assert planned.saving > alone.saving + 0.1
    first, last = planned.levels[planned.level_of_step[0]], planned.levels[planned.level_of_step[-1]]
    assert (first.img_size, first.rho, last.img_size, last.rho) == (160, 0.2, 224, 1.0)
