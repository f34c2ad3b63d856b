"""A chosen rho is the one that an exhaustive sweep would pick."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pss import methods, recipes
from pss.inference import choose
from pss.inference.opening import Run
from pss.inference.timing import Spread


def made(**changes):
    values = {"depth": 1, "embed_dim": 24, **changes}
    config = recipes.get("digits").with_settings([f"model.{key}={value}" for key, value in values.items()])
    return Run("mine", config, None, 0, methods.build(config, 4, steps_per_epoch=1).eval())


@given(st.binary(min_size=1, max_size=200), st.floats(0, 1), st.integers(0, 80))
def test_search_finds_what_trying_all_finds(increments, share, bonus):
    """Costs rise with the count, but for multiples of 8, which are cheaper."""
    costs, total = [], 0
    for number, increment in enumerate(increments):
        total += increment
        costs.append(total - (bonus if number % 8 == 0 else 0))
    budget = share * max(costs)
    exhaustive = [number for number, cost in enumerate(costs) if cost <= budget]
    tried = []

    def meets(number):
        tried.append(number)
        return costs[number] <= budget

    assert choose.largest(len(costs), meets) == (exhaustive[-1] if exhaustive else None)
    if bonus == 0:
        assert len(tried) <= 17  # 8 halvings, and a window


def test_the_whole_model_may_be_faster_than_one_that_chooses():
    """With predictors on the way, one image: nothing under 3 ms but all patches."""
    costs = [3.6, 3.5, 3.5, 3.7, 2.3]
    assert choose.largest(5, lambda number: costs[number] <= 3) == 4
    assert choose.largest(5, lambda number: costs[number] <= 2) is None
    assert choose.largest(0, lambda number: True) is None


@pytest.mark.parametrize("demand", [{"budget_ms": 5.0}, {"target_ips": 400.0}])
@pytest.mark.parametrize("rhos", [None, [0.3, 1.0, 0.7]])
def test_the_largest_that_is_fast_enough(monkeypatch, demand, rhos):
    """A machine that takes 0.5 ms a token: 10 tokens in 5 ms, and two images of 10 tokens at 400 a second."""
    run = made()
    asked = []

    def timed(calls, **_):
        (call,) = calls
        rho = call.args[2]
        asked.append(rho)
        milliseconds = 0.5 * run.method.tokens(rho)[0]
        value = milliseconds if "budget_ms" in demand else 2 / milliseconds * 1000
        return [Spread(value, value, value)]

    monkeypatch.setattr(choose, "latencies", timed)
    monkeypatch.setattr(choose, "rates", timed)
    found = choose.fast_enough(run, batch=2, device=torch.device("cpu"), rhos=rhos, **demand)
    assert found.tokens == (10 if rhos is None else 5)
    assert run.method.tokens(found.rho)[0] == found.tokens
    assert len(asked) == len(set(asked))
    too_much = {key: value * (0.01 if key == "budget_ms" else 100) for key, value in demand.items()}
    with pytest.raises(ValueError, match="no ρ brings batches of 2"):
        choose.fast_enough(run, batch=2, device=torch.device("cpu"), rhos=rhos, **too_much)


def test_every_count_of_tokens_has_one_rho():
    run = made()
    levels = choose.levels(run)
    assert [run.method.tokens(rho)[0] for rho in levels] == list(range(2, 18))
    assert levels[-1] == 1.0
    aligned = made(token_counts="aligned")
    assert [aligned.method.tokens(rho)[0] for rho in choose.levels(aligned)] == [8, 16, 17]


def test_the_smallest_that_is_accurate_enough():
    rhos, top1 = [0.2, 1.0, 0.4, 0.6, 0.8], [60.0, 81.0, 80.2, 79.9, 80.5]
    assert choose.accurate_enough(rhos, top1, max_drop=0.5) == 0.8
    assert choose.accurate_enough(rhos, top1, max_drop=1.0) == 0.4
    assert choose.accurate_enough(rhos, top1, max_drop=0.0) == 1.0
    assert choose.accurate_enough(rhos, top1, max_drop=30.0) == 0.2
