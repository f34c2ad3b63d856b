"""Threads that each do their share of an operation alone."""

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pss.runtime import threads as cpu_threads
from pss.runtime.threads import num_shares, run_shares

EXHAUSTIVE = pytest.mark.exhaustive


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_each_share_runs_in_a_thread_of_its_own_that_has_torch_to_itself(four_threads: None, count: int) -> None:
    together = threading.Barrier(count)
    seen = {}

    def work(share: int) -> None:
        together.wait(10)  # nobody gets here alone
        seen[share] = (threading.get_ident(), torch.get_num_threads(), torch.is_grad_enabled())

    run_shares(work, count)
    assert sorted(seen) == list(range(count))
    idents, threads, recording = zip(*seen.values(), strict=True)
    assert len(set(idents)) == count
    assert threading.get_ident() not in idents
    assert set(threads) == {1}
    assert not any(recording)
    assert torch.is_grad_enabled()
    assert torch.get_num_threads() == 4
    started_later: list[int] = []
    thread = threading.Thread(target=lambda: started_later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert started_later == [4]


def test_a_single_share_is_the_callers() -> None:
    seen = []
    run_shares(lambda share: seen.append((share, threading.get_ident())), 1)
    assert seen == [(0, threading.get_ident())]


def test_what_a_share_raises_is_raised_when_all_have_ended() -> None:
    released, ended = threading.Event(), []

    def work(share: int) -> None:
        if share == 0:
            released.set()
            raise ZeroDivisionError
        released.wait(10)
        ended.append(share)

    with pytest.raises(ZeroDivisionError):
        run_shares(work, 3)
    assert sorted(ended) == [1, 2]
    run_shares(ended.append, 3)  # and the threads go on
    assert sorted(ended) == [0, 1, 1, 2, 2]


def test_several_callers_take_turns() -> None:
    totals = torch.zeros(4, 2)
    inside: list[int] = []
    together: list[set[int]] = []

    def call(caller: int) -> None:
        def work(share: int) -> None:
            inside.append(caller)
            time.sleep(0.001)
            together.append(set(inside))
            inside.remove(caller)
            totals[caller, share].add_(1)

        for _ in range(50):
            run_shares(work, 2)

    callers = [threading.Thread(target=call, args=(caller,)) for caller in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert torch.equal(totals, torch.full((4, 2), 50.0))
    assert all(len(callers) == 1 for callers in together)


def test_shares_are_for_few_threads_that_sleep_between_operations(
    four_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for sleeps, threads, shares in ((True, 4, 4), (True, 1, 1), (False, 4, 1), (True, 9, 1)):
        monkeypatch.setattr(cpu_threads, "_openmp_sleeps", sleeps)
        torch.set_num_threads(threads)
        assert num_shares() == shares


@pytest.mark.parametrize(
    ("policy", "shares"),
    [
        ("PASSIVE", 2),
        pytest.param("passive", 2, marks=EXHAUSTIVE),
        pytest.param("ACTIVE", 1, marks=EXHAUSTIVE),
        (None, 1),
    ],
)
def test_the_environment_says_whether_threads_sleep(policy: str | None, shares: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    code = "import torch; torch.set_num_threads(2); from pss.runtime import threads; print(threads.num_shares())"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=environment if policy is None else environment | {"OMP_WAIT_POLICY": policy},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert int(result.stdout) == shares


def test_a_forked_process_has_threads_of_its_own() -> None:
    run_shares(lambda share: None, 2)
    child = multiprocessing.get_context("fork").Process(target=run_shares, args=(abs, 2))
    child.start()
    child.join(60)
    assert child.exitcode == 0


_RUN_A_COMMAND = """
import typer
from cli.errors import run
app = typer.Typer()
app.command()(lambda: None)
try:
    run(app, [])
except SystemExit as done:
    assert not done.code
"""


@pytest.mark.parametrize("sets_the_policy", ["import tools", _RUN_A_COMMAND])
@pytest.mark.parametrize("torch_first", [False, True])
def test_nobody_sets_the_policy_when_torch_has_already_read_it(sets_the_policy: str, torch_first: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    count = "import torch; torch.set_num_threads(2); from pss.runtime import threads; print(threads.num_shares())"
    code = "\n".join(["import torch"] * torch_first + [sets_the_policy, count])
    command, root = [sys.executable, "-c", code], Path(__file__).parents[2]
    result = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=120, check=True)
    assert int(result.stdout) == (1 if torch_first else 2)
