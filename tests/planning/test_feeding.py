"""Which loaders keep a run fed: laws of the table, its agreement with the simulation, and the screens that show it."""

from __future__ import annotations

import sys
from itertools import pairwise

import pytest
import warm

import cli.feeding
from cli.plan import Wanted, show_plan
from pss import recipes
from pss.planning.feeding import (
    CORE_RATES,
    Feed,
    assumed_feeds,
    crops_at_once,
    estimated_feeds,
    keeping_up,
    sample,
)
from pss.planning.plan import plan
from pss.planning.simulation import simulate

BATCH_BYTES = 32 * 3 * 32**2


def config(*settings: str):
    usual = ["train.epochs=20", "schedule.cooldown_epochs=2", "train.batch_size=32"]
    return recipes.get("digits").with_settings([*usual, *settings])


def rows(feeds, depths=(1e-3,), *settings: str, rate: float = 1000.0, images: int = 3200):
    chosen = config(*settings)
    planned = plan(chosen, num_images=images)
    dense = planned.batch_size / rate
    seconds = [dense * level.cost.training / planned.dense.training for level in planned.levels]
    return (
        planned,
        seconds,
        keeping_up(chosen, planned, feeds, lambda _: seconds, 1, depths, own=chosen.data.prefetch_bytes("cpu") / 1e9),
    )


def feed(rate: float) -> Feed:
    return Feed("dali", rate, "given")


def test_a_deeper_queue_and_a_faster_loader_never_wait_longer() -> None:
    depths = [number * BATCH_BYTES / 1e9 for number in (1, 4, 16, 64)]
    _, _, found = rows([feed(rate) for rate in (500, 1000, 1700, 3000, 9000)], depths)
    for row in found:
        assert list(row.waits) == sorted(row.waits, reverse=True)
        assert row.seconds >= row.fed_seconds
    for slower, quicker in pairwise(found):
        assert all(b <= a + 1e-12 for a, b in zip(slower.waits, quicker.waits, strict=True))
        assert quicker.seconds <= slower.seconds
        assert quicker.images_per_second >= slower.images_per_second
    assert found[0].waits[-1] > 0.3  # no queue helps a loader that is slower than the average step


def test_a_short_run_is_simulated_whole() -> None:
    planned, seconds, (row,) = rows([feed(1500)], (0.0005,), "schedule.cooldown_epochs=0", "data.prefetch_gb=0.0005")
    steps = [seconds[number] for number in planned.level_of_step]
    whole = simulate(steps, 32 / 1500, 5)
    assert row.seconds == pytest.approx(whole.seconds)
    assert row.waits[0] == pytest.approx(whole.data_wait)
    assert row.fed_seconds == pytest.approx(sum(steps))


def test_a_long_run_is_judged_by_epochs_that_lie_evenly_in_it(monkeypatch) -> None:
    feeds = [feed(rate) for rate in (900, 1700)]
    _, _, whole = rows(feeds)
    monkeypatch.setattr("pss.planning.feeding._SHOWN_STEPS", 400)
    planned, _, part = rows(feeds)
    assert len(sample(planned)[0]) == 400
    for one, other in zip(whole, part, strict=True):
        assert other.seconds == pytest.approx(one.seconds, rel=0.02)
        assert other.fed_seconds == one.fed_seconds


def test_an_even_schedule_is_named_where_it_helps_and_only_there() -> None:
    settings = ("data.prefetch_gb=0.0002", "schedule.cooldown_epochs=0")
    _, _, found = rows([feed(rate) for rate in (1000, 1800, 9000)], (0.0002,), *settings)
    assert found[0].even is None
    assert found[2].even == "as set"
    named = found[1].even
    assert named is not None
    assert named.startswith("schedule.")
    assert found[1].even_gb == 0.0002
    single = ("data.prefetch_gb=0.0001", "schedule.cooldown_epochs=0")  # one batch
    _, _, (tight,) = rows([feed(1590)], (0.0001, 1.0), *single)
    assert (tight.even, tight.even_gb) == ("as set", 1.0)
    _, _, (evened,) = rows([feed(1800)], (0.0002,), *settings, named)
    assert evened.even == "as set"
    assert evened.seconds < found[1].seconds


def test_several_crops_of_an_image_save_its_decoding() -> None:
    once = Feed("ffcv jpg500", 1000, "assumed")
    rates = [crops_at_once(once, crops).images_per_second for crops in (1, 2, 3, 1000)]
    assert rates == sorted(rates)
    assert rates[0] == pytest.approx(1000)
    assert rates[2] == pytest.approx(1610, rel=0.01)  # measured
    assert rates[3] < 1000 / (1 - 0.57)
    assert crops_at_once(Feed("ffcv (as stored)", 1000, "measured"), 3) is None


def test_rates_go_with_cores_and_cards() -> None:
    few, many = assumed_feeds(16, 1, 1, 7000), assumed_feeds(32, 2, 2, 7000)
    assert [feed.name for feed in few] == [feed.name for feed in many]
    assert [b.images_per_second / a.images_per_second for a, b in zip(few, many, strict=True)] == [4] * len(few)
    by_name = {feed.name: feed.images_per_second for feed in few}
    assert by_name["dali GPU+CPU"] == by_name["dali GPU"] + by_name["dali CPU"] == 17_000
    assert not any("GPU" in feed.name for feed in assumed_feeds(16, 1, 1, 0))
    assert {feed.name for feed in assumed_feeds(16, 1, 1, 0, crops=3)} == {
        f"{name}, 3 crops" for name in CORE_RATES if name != "dali"
    } | {"dali CPU, 3 crops"}


def test_what_is_not_at_hand_is_estimated_in_proportion() -> None:
    found = estimated_feeds([Feed("torch", 2 * CORE_RATES["torch"], "measured")])
    assert {feed.name: feed.images_per_second for feed in found} == {
        name: 2 * rate for name, rate in CORE_RATES.items() if name != "torch"
    }
    assert estimated_feeds([Feed("ffcv (as stored)", 5.0, "measured")]) == []


def test_the_table_marks_what_trains_and_fits_a_terminal(capsys) -> None:
    show_plan(recipes.get("deit-s-224").with_settings(["train.epochs=20"]), None, Wanted(gpu="h100", loader="ffcv"))
    told = capsys.readouterr().out
    assert "PREDICTION for one H100" in told
    assert max(map(len, told.splitlines())) <= 100
    (marked,) = [line for line in told.splitlines() if line.startswith("> ffcv")]
    assert "jpg500 " in marked
    assert "16,000" in marked
    for depth in (
        "2 GB",
        "4 GB",
        "8 GB",
        "21 GB",
        "35 GB",
        "assumed, and not measured:",
        "schedule.shuffle=true",
    ):
        assert depth in told


def test_the_queue_that_is_set_is_one_of_the_columns(capsys) -> None:
    chosen = config("data.prefetch_gb=5")
    planned = plan(chosen, num_images=3200)
    feeds = [feed(1000)]
    cli.feeding.show_feeding(chosen, planned, feeds, feeds[0], lambda _: [0.01] * len(planned.levels))
    told = capsys.readouterr().out
    assert "2 GB   5 GB   8 GB" in told
    assert "> dali " in told
    assert "dali, 3 crops" in told


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Wanted(gpu="h100", gpu_rate=1e4), "--gpu predicts what a GPU trains and --gpu-rate says it"),
        (Wanted(measured=("x.json",)), "add --gpu"),
        (Wanted(cores=4), "add --loader-rate, or --gpu"),
    ],
)
def test_what_describes_no_machine_is_refused(wanted: Wanted, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wanted.check()


@pytest.mark.exhaustive
def test_the_command_takes_a_card_and_cores() -> None:
    words = ["digits", "--plan", "--gpu", "a100", "--cores", "8", "--gpus", "2", "--loader", "torch"]
    done = warm.run(
        [sys.executable, "-m", "cli.train", *words], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "PREDICTION for 1 x 2 A100, 16 images a step on each, torch" in done.stdout
    assert "decoding on 8 cores a node" in done.stdout
