"""What the benchmarks share: turns, quartiles, arguments and files."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest

from pipelines.base import DataError
from tools.benchmarks import measure
from tools.benchmarks.measure import ThreadTime, conclude, in_turns, over, page, parser, spread


def test_cases_take_turns_in_alternating_order_after_a_round_that_warms_up():
    called = []
    cases = {name: lambda name=name: called.append(name) or len(called) for name in "abc"}
    assert in_turns(cases, 3) == {"a": [4, 9, 10], "b": [5, 8, 11], "c": [6, 7, 12]}
    assert "".join(called) == "cba" + "abc" + "cba" + "abc"
    assert in_turns(cases, 1, warm_up=False) == {"a": [13], "b": [14], "c": [15]}


def test_time_of_parts_is_theirs_alone_and_not_that_of_the_clock(monkeypatch):
    now = 0

    def look():
        nonlocal now
        now += 1  # what a look at the clock takes
        return now

    monkeypatch.setattr(measure.time, "thread_time", look)
    clock = ThreadTime("rest")
    none = clock.taken()
    assert none.keys() == {"rest"}
    for _ in range(2):
        now += 100
        with clock.part("outer"):
            now += 50
            for _ in range(3):
                with clock.part("inner"):
                    now += 7
        with suppress(KeyError), clock.part("fails"):
            now += 20
            raise KeyError
        assert clock.taken() == {"rest": none["rest"] + 100, "outer": 50, "inner": 21, "fails": 20}


def test_a_ratio_is_formed_within_a_round_and_told_with_its_spread():
    drifting = [1.0, 10.0, 100.0, 1000.0, 10000.0]
    ratios = over([2 * seconds for seconds in drifting], drifting)
    assert spread(ratios, ".1f") == "2.0 (2.0–2.0)"
    assert spread([1, 2, 3, 4, 5], "g") == "3 (2–4)"
    assert spread([7], "g") == "7 (7–7)"


def test_what_was_measured_is_printed_and_kept(tmp_path, capsys):
    command = parser("A benchmark.", rounds=3, threads=1)
    assert not hasattr(command.parse_args([]), "device")
    words = ["--rounds", "2", "--json", str(tmp_path / "a.json"), "--markdown", str(tmp_path / "a.md")]
    result = conclude(
        command.parse_args(words),
        lambda arguments: {"figures": [1.5] * arguments.rounds, "settings": {"model": "small"}},
        lambda result: page(result, "Title", "figure | twice", [f"{x} | {2 * x}" for x in result["figures"]]),
        "pytest",
        "no-such-package",
    )
    assert result["settings"] == {"rounds": 2, "threads": 1, "model": "small"}
    assert result["environment"]["pytest"] == pytest.__version__
    assert result["environment"]["no-such-package"] is None
    assert json.loads((tmp_path / "a.json").read_text()) == result
    lines = (tmp_path / "a.md").read_text().splitlines()
    assert lines == capsys.readouterr().out.splitlines()
    assert (lines[0], lines[2:]) == ("Title", ["", "| figure | twice |", "|---|---|", *["| 1.5 | 3.0 |"] * 2])


def test_data_that_cannot_be_used_are_a_sentence(capsys):
    def measured(arguments):
        raise DataError("there is no folder nowhere; name the one that holds the data set")

    with pytest.raises(SystemExit) as done:
        conclude(parser("A benchmark.", rounds=1).parse_args([]), measured, str)
    assert done.value.code == 2
    assert capsys.readouterr().err == "error: there is no folder nowhere; name the one that holds the data set\n"
