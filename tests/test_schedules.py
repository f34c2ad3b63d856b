"""The kept share at every step, against exact fractions and the published distributions."""

import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pss.schedules import Cosine, Cyclic, Fixed, Linear, Listed, Schedule, Shuffled, Stages, histogram, levels, mean_rho

STEPS_PER_EPOCH = 1251  # ImageNet in batches of 1024
GRID = (0.2, 0.4, 0.6, 0.8, 1.0)
NINTHS = {0.2: 1 / 9, 0.4: 2 / 9, 0.6: 2 / 9, 0.8: 2 / 9, 1.0: 2 / 9}
EIGHTHS = {0.2: 1 / 8, 0.4: 1 / 4, 0.6: 1 / 4, 0.8: 1 / 4, 1.0: 1 / 8}


def exact_rho(share: Fraction, form: str) -> float:
    """The definition: interpolate the drop, clamp, round 5 * drop half to even."""
    end = Fraction(-1, 10) if form == "published" else Fraction(0)
    drop = Fraction(8, 10) + (end - Fraction(8, 10)) * share
    return float(1 - Fraction(round(5 * min(max(drop, Fraction(0)), Fraction(1))), 5))


@given(steps=st.integers(1, 3000), form=st.sampled_from(["published", "symmetric"]), data=st.data())
def test_ramps_follow_their_definition_exactly(steps: int, form: str, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, steps))
    options: dict[str, Any] = {"steps_per_epoch": steps, "epochs": 1}
    linear = Linear.published(**options) if form == "published" else Linear.symmetric(**options)
    assert linear(step) == exact_rho(Fraction(step, steps), form)

    cyclic = Cyclic.published(**options) if form == "published" else Cyclic.symmetric(**options)
    phase = Fraction(step % steps, steps)
    assert cyclic(step) == exact_rho(1 - abs(2 * phase - 1), form)


@pytest.mark.parametrize("share", [Fraction(0), Fraction(1, 3), Fraction(1, 2), Fraction(2, 3), Fraction(1)])
def test_cosine_meets_the_rational_points_of_the_cosine_exactly(share: Fraction) -> None:
    climbed = {Fraction(1, 3): Fraction(1, 4), Fraction(2, 3): Fraction(3, 4)}.get(share, share)
    for form in ("published", "symmetric"):
        cosine = Cosine(form=form, ramp_steps=600)
        assert cosine(int(600 * share)) == exact_rho(climbed, form)
    # From 0.2 to 0.6 those points lie exactly between two levels: 5 * drop is 3.5 and 2.5.
    for steps in (3, 600):  # the floating-point cosine errs to either side
        narrow = Cosine(form="symmetric", ramp_steps=steps, high=0.6)
        assert (narrow(steps // 3), narrow(2 * steps // 3)) == (0.2, 0.6)


@pytest.mark.parametrize(
    ("schedule", "total_steps", "expected"),
    [
        (Cyclic.published(steps_per_epoch=STEPS_PER_EPOCH, epochs=300), STEPS_PER_EPOCH, NINTHS),
        (Linear.published(steps_per_epoch=STEPS_PER_EPOCH, epochs=1), STEPS_PER_EPOCH, NINTHS),
        (Cyclic.symmetric(steps_per_epoch=STEPS_PER_EPOCH, epochs=300), STEPS_PER_EPOCH, EIGHTHS),
        (Linear.symmetric(steps_per_epoch=STEPS_PER_EPOCH, epochs=1), STEPS_PER_EPOCH, EIGHTHS),
        (Fixed(0.7), 10, {0.7: 1.0}),
    ],
)
def test_distribution_over_one_epoch(schedule: Schedule, total_steps: int, expected: dict[float, float]) -> None:
    shares = histogram(schedule, total_steps)
    assert shares == pytest.approx(expected, abs=2 / total_steps)
    assert levels(schedule, total_steps) == tuple(expected)
    assert mean_rho(schedule, total_steps) == pytest.approx(
        sum(r * s for r, s in expected.items()), abs=1 / total_steps
    )


def test_published_cycle_has_the_quoted_distribution_and_mean() -> None:
    schedule = Cyclic.published(steps_per_epoch=1251, epochs=1)
    assert histogram(schedule, 1251) == pytest.approx(NINTHS, abs=1 / 1251)
    assert mean_rho(schedule, 1251) == pytest.approx(0.6444, abs=1e-3)


def test_linear_climbs_once_and_stays() -> None:
    schedule = Linear.published(steps_per_epoch=100, epochs=3)
    course = [schedule(step) for step in range(310)]
    assert course == sorted(course)
    assert (course[0], course[299], course[309]) == (0.2, 1.0, 1.0)


def test_cyclic_repeats_and_is_its_own_mirror_image() -> None:
    schedule = Cyclic.published(steps_per_epoch=1000, epochs=2, period_steps=90)
    course = [schedule(step) for step in range(90)]
    assert [schedule(step) for step in range(900, 990)] == course
    assert course[1:] == course[:0:-1]
    assert (course[0], course[45]) == (0.2, 1.0)
    assert schedule.period_steps == 90


@pytest.mark.parametrize("form", ["published", "symmetric"])
@pytest.mark.parametrize("shape", [Linear, Cosine, Cyclic])
def test_range_is_respected_and_reached(shape: Any, form: str) -> None:
    build = getattr(shape, form)
    for low, high in [(0.2, 0.6), (0.4, 0.8), (0.6, 1.0), (0.4, 0.4)]:
        schedule = build(steps_per_epoch=500, epochs=1, low=low, high=high)
        assert levels(schedule, 501) == tuple(rho for rho in GRID if low <= rho <= high)


@pytest.mark.parametrize(
    ("shape", "form"),
    [(shape, "symmetric") for shape in (Linear, Cosine, Cyclic)]
    + [(Cyclic, "published"), (Linear, "cut"), (Cosine, "cut")],
)
def test_cooldown_replaces_the_last_epochs_only(shape: Any, form: str) -> None:
    build = getattr(shape, form)
    plain = build(steps_per_epoch=50, epochs=6)
    cooled = build(steps_per_epoch=50, epochs=6, cooldown_epochs=4)
    assert [cooled(step) for step in range(100)] == [plain(step) for step in range(100)]
    assert {cooled(step) for step in range(100, 300)} == {1.0}


def linear_drop(share: float) -> float:
    return (1 - share) * 0.8 + share * -0.1


def cosine_drop(share: float) -> float:
    return -0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2


@pytest.mark.parametrize(
    ("shape", "drop_at", "undecided", "difference"),
    # A third of the way down, 5 * drop is exactly 2.5, which the published floating-point numbers miss.
    [(Linear, linear_drop, [290 * STEPS_PER_EPOCH // 3], 0.0593), (Cosine, cosine_drop, [], 0.0610)],
)
def test_published_climbs_end_before_the_cooldown(
    shape: Any, drop_at: Callable[[float], float], undecided: list[int], difference: float
) -> None:
    """Every step of a published run, by the rule and in the arithmetic that were published."""
    epochs, cooldown_epochs = 300, 10
    total, ramp = epochs * STEPS_PER_EPOCH, (epochs - cooldown_epochs) * STEPS_PER_EPOCH
    options: dict[str, Any] = {"steps_per_epoch": STEPS_PER_EPOCH, "epochs": epochs, "cooldown_epochs": cooldown_epochs}
    course = list(map(shape.published(**options), range(total)))
    expected = [round(1 - round(5 * min(max(drop_at(step / ramp), 0.0), 1.0)) / 5, 1) for step in range(ramp)]
    assert [step for step in range(ramp) if course[step] != expected[step]] == undecided
    assert set(course[ramp:]) == {1.0}

    cut = shape.cut(**options)
    assert sum(rho != cut(step) for step, rho in enumerate(course)) / total == pytest.approx(difference, abs=1e-4)


@pytest.mark.parametrize("shape", [Linear, Cosine])
def test_forms_of_a_climb_differ_in_their_cooldown_alone(shape: Any) -> None:
    options: dict[str, Any] = {"steps_per_epoch": 50, "epochs": 6}
    assert shape.published(**options) == shape.cut(**options)
    assert levels(shape.published(**options, cooldown_epochs=6), 300) == (1.0,)


@given(step=st.integers(0, 10**9))
def test_every_rank_and_a_resumed_run_see_the_same_rho(step: int) -> None:
    """A schedule is a value: built anew, or sent to another process, and asked for any step in any order."""
    options: dict[str, Any] = {"steps_per_epoch": 1251, "epochs": 300, "cooldown_epochs": 10}
    for shape in (Linear, Cosine, Cyclic):
        schedule, again = shape.published(**options), shape.published(**options)
        schedule(7)
        assert schedule == again
        assert schedule(step) == again(step) == pickle.loads(pickle.dumps(schedule))(step)
        assert schedule(step) in GRID


@given(
    block=st.integers(1, 60), period=st.integers(1, 60), stop=st.none() | st.integers(0, 200), seed=st.integers(0, 9)
)
def test_shuffling_keeps_every_block_and_what_follows_the_stop(
    block: int, period: int, stop: int | None, seed: int
) -> None:
    plain = Cyclic(form="published", period_steps=period, cooldown_start=stop)
    shuffled = Shuffled(of=plain, block_steps=block, seed=seed, stop=stop)
    for first in range(0, 240, block):
        whole = range(first, first + block)
        assert sorted(map(shuffled, whole)) == sorted(map(plain, whole))
    if stop is not None:
        assert [shuffled(step) for step in range(stop, 240)] == [1.0] * (240 - stop)


def test_a_shuffled_cycle_has_no_ramp_and_differs_from_the_next() -> None:
    """The order is pinned: a resumed run, perhaps of a newer version, must see the same."""
    plain = Cyclic.published(steps_per_epoch=200, epochs=2)
    shuffled = Shuffled(of=plain, block_steps=200)
    course = [shuffled(step) for step in range(400)]
    assert course[:200] != course[200:]
    assert course != [Shuffled(of=plain, block_steps=200, seed=1)(step) for step in range(400)]
    assert course[:12] == [0.4, 1.0, 1.0, 0.4, 0.4, 0.4, 0.8, 0.8, 0.4, 1.0, 0.4, 1.0]
    longest_low = max(len(run) for run in "".join("x" if rho == 0.2 else " " for rho in course).split())
    assert longest_low < 5  # the ramp has 22 in a row


def test_a_list_is_repeated() -> None:
    schedule = Listed((0.3, 1.0, 0.55), cooldown_start=7)
    assert [schedule(step) for step in range(9)] == [0.3, 1.0, 0.55, 0.3, 1.0, 0.55, 0.3, 1.0, 1.0]
    assert levels(schedule, 9) == (0.3, 0.55, 1.0)


decimals = st.integers(1, 10**4).map(lambda number: number / 100)


@given(
    stages=st.lists(st.tuples(st.sampled_from([0.25, *GRID]), decimals), min_size=1, max_size=5),
    total=st.integers(1, 3000),
    stop=st.none() | st.integers(0, 3000),
)
def test_stages_follow_their_definition_exactly(
    stages: list[tuple[float, float]], total: int, stop: int | None
) -> None:
    rhos, lengths = zip(*stages, strict=True)
    exact = [Fraction(round(100 * length)) for length in lengths]
    ends = [sum(exact[: number + 1]) / sum(exact) for number in range(len(exact))]
    schedule = Stages(rhos, lengths, total, stop)
    for step in range(0, total, max(1, total // 50)):
        stage = next(number for number, end in enumerate(ends) if Fraction(step, total) < end)
        expected = 1.0 if stop is not None and step >= stop else rhos[stage]
        assert schedule(step) == pickle.loads(pickle.dumps(schedule))(step) == expected
    assert schedule(total + 7) == (1.0 if stop is not None and total + 7 >= stop else rhos[-1])
    # Every stage has its length, to a step.
    counts = [end - start for start, end in pairwise((*schedule.starts, total))]
    assert all(abs(count - total * part / sum(exact)) < 1 for count, part in zip(counts, exact, strict=True))


@given(total=st.integers(1, 500), factor=st.integers(1, 50))
def test_lengths_of_stages_are_relative(total: int, factor: int) -> None:
    """Whether they are written as shares, percentages or epochs, and though no binary number is a tenth."""
    tenths = Stages((0.4, 0.6, 1.0), (0.1, 0.2, 0.7), 10 * total)
    assert tenths.starts == (0, total, 3 * total)
    assert Stages((0.4, 0.6, 1.0), (factor, 2 * factor, 7 * factor), 10 * total).starts == tenths.starts
    assert Stages((0.4, 1.0), (3, 1), 4 * total) != Stages((0.4, 1.0), (1, 3), 4 * total)


def test_module_costs_no_torch_import() -> None:
    program = "import sys, pss.schedules; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Fixed(0.0), "rho .* 0.0"),
        (lambda: Fixed(1.2), "rho .* 1.2"),
        (lambda: Cyclic.published(steps_per_epoch=0, epochs=1), "steps_per_epoch .* 0"),
        (lambda: Linear.symmetric(steps_per_epoch=5, epochs=-1), "epochs .* -1"),
        (lambda: Cosine.published(steps_per_epoch=5, epochs=2, cooldown_epochs=3), "cooldown_epochs .* 3"),
        (lambda: Cyclic(form="published", period_steps=0), "period_steps .* 0"),
        (lambda: Linear(form="published", ramp_steps=0), "ramp_steps .* 0"),
        (lambda: Cosine(form="published", ramp_steps=-2), "ramp_steps .* -2"),
        (lambda: Linear(form="published", ramp_steps=5, low=0.3), "low .* 0.3"),
        (lambda: Linear(form="published", ramp_steps=5, high=1.2), "high .* 1.2"),
        (lambda: Linear(form="published", ramp_steps=5, low=0.8, high=0.4), "low=0.8 and high=0.4"),
        (lambda: Linear(form="published", ramp_steps=5, cooldown_start=-1), "cooldown_start .* -1"),
        (lambda: Linear(form="other", ramp_steps=5), "form .* 'other'"),  # type: ignore[arg-type]
        (lambda: Linear(form="published", ramp_steps=5)(-1), "step .* -1"),
        (lambda: histogram(Fixed(1.0), 0), "total_steps .* 0"),
        (lambda: Listed(()), r"list .* \(\)"),
        (lambda: Listed((0.5, 0.0)), "list .* 0.0"),
        (lambda: Stages((), (), 5), r"stages .* \(\)"),
        (lambda: Stages((0.4, 1.5), (1, 1), 5), "stages .* 1.5"),
        (lambda: Stages((0.4, 1.0), (1,), 5), "each of 2 stages"),
        (lambda: Stages((0.4, 1.0), (1, 0), 5), "each of 2 stages"),
        (lambda: Stages((0.4, 1.0), (1, math.inf), 5), "each of 2 stages"),
        (lambda: Stages((1.0,), (1,), 0), "num_steps .* 0"),
        (lambda: Stages((1.0,), (1,), 5)(-1), "step .* -1"),
        (lambda: Shuffled(of=Fixed(1.0), block_steps=0), "block_steps .* 0"),
        (lambda: Shuffled(of=Fixed(1.0), block_steps=5)(-1), "step .* -1"),
    ],
)
def test_what_a_user_can_get_wrong(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
