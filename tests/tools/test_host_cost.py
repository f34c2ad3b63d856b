"""The benchmark of the interpreter's time: what it writes, and what it counts."""

from __future__ import annotations

import json
import tarfile
import threading
import time
from pathlib import Path

import pytest
from conftest import missing

from tools.benchmarks import host_cost
from tools.benchmarks.host_cost import Account, converted


def burn(seconds: float) -> None:
    began = time.thread_time()
    while time.thread_time() - began < seconds:
        pass


@pytest.mark.exhaustive
def test_one_command_writes_what_the_interpreter_costs(
    converted_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", str(converted_root), "--batch", "8", "--rounds", "1", "--threads", "1"]
    host_cost.main([*words, "--json", str(tmp_path / "cost.json")])
    result = json.loads((tmp_path / "cost.json").read_text())
    told = capsys.readouterr().out
    for backend in host_cost.BACKENDS:
        if missing(backend):
            assert result[f"{backend}_us_per_image"] is None
            continue
        costs = [result["table"][batch]["loaders"][backend] for batch in ("8",)]
        assert result[f"{backend}_us_per_image"] == costs[0]["steady"]["us"] > 0
        assert all(min(cost["first"]["us"], cost["steady"]["us"], cost["steady"]["batch_us"]) > 0 for cost in costs)
        assert f"{backend} | 8 | " in told
    assert 4 < result["augment_launches"] <= 40
    assert result["augment_ms_per_step"] > 0
    assert result["step_ms"] > 0


def test_other_threads_count_and_what_needs_no_lock_does_not() -> None:
    account, done, more = Account(), threading.Event(), threading.Event()
    working = threading.Thread(target=lambda: (burn(0.2), done.set(), more.wait(20)))
    burn(0.1)
    account.begin()
    working.start()
    burn(0.3)
    account.apart("unlocked", burn)(0.4)
    account.apart("unlocked", burn, entry_ns=int(3e8))(0.4)
    assert done.wait(60)
    account.look()
    more.set()
    working.join(20)
    assert account.microseconds("unlocked") == pytest.approx(0.5e6, rel=0.1)
    assert account.rest() == pytest.approx(0.8e6, rel=0.1)  # 0.2 there, 0.3 here and 0.3 of the second call


def test_a_thread_that_has_ended_counts() -> None:
    account = Account()
    with host_cost.calls_apart(account):
        account.begin()
        working = threading.Thread(target=burn, args=(0.3,))
        working.start()
        working.join(60)
        account.look()
    assert 0.29e6 < account.rest() < 0.45e6


@pytest.mark.parametrize("given", [True, False])
def test_photographs_are_taken_several_times_over(
    given: bool, image_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PSS_IMAGENET_SAMPLE", raising=False)
    if given:
        with tarfile.open(tmp_path / "sample.tar", "w") as tar:
            tar.add(image_root / "val", "photographs")
        monkeypatch.setenv("PSS_IMAGENET_SAMPLE", str(tmp_path / "sample.tar"))
    else:
        monkeypatch.setattr(host_cost.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    made = json.loads((converted(tmp_path, 30) / "dataset.json").read_text())
    assert made["splits"]["train"]["num_samples"] == 30
    assert len(made["classes"]) == (3 if given else 10)
    assert bool(made["splits"]["train"]["beton"]) == (given and missing("ffcv") is None)
