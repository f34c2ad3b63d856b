"""What a comparison consists of: arms as data, turns, equal training time, statistics, the picture."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tools.comparing import arms as known_arms
from tools.comparing.arms import Arm, Layout, with_starts
from tools.comparing.budget import Pace, epochs_for
from tools.comparing.page import read_published
from tools.comparing.statistics import Mean, paired
from tools.comparing.turns import Run, take_turns

DENSE = Arm("dense", ("method=dense",))
shares = st.floats(0.01, 0.99)
paces = st.builds(Pace, st.floats(0.1, 50), st.floats(0.1, 50))
some_arms = st.one_of(st.just(DENSE), st.builds(lambda share: Arm("tuned", (), {}, "dense", share), shares))


@given(some_arms, st.integers(2, 400))
def test_the_parts_of_a_run_add_up_and_grow_with_it(arm, epochs):
    before, own = arm.split(epochs)
    assert before + own == epochs
    assert own >= 1
    assert (before >= 1) == (arm.start is not None)
    grown = arm.split(epochs + 1)
    assert grown[0] >= before
    assert grown[1] >= own


@given(some_arms, paces, st.floats(1, 5000))
def test_equal_time_is_as_near_as_whole_epochs_allow(arm, pace, seconds):
    try:
        epochs = epochs_for(arm, pace, seconds)
    except ValueError:
        assert pace.seconds(arm, arm.fewest_epochs) > seconds
        return
    off = abs(pace.seconds(arm, epochs) - seconds)
    assert all(
        off <= abs(pace.seconds(arm, other) - seconds) + 1e-6
        for other in (epochs - 1, epochs + 1)
        if other >= arm.fewest_epochs
    )
    assert off <= max(pace.own, pace.before if arm.start else 0) / 2 + 1e-6


@given(paces, st.integers(1, 100))
def test_the_time_of_a_run_gives_its_epochs(pace, epochs):
    assert epochs_for(DENSE, pace, pace.seconds(DENSE, epochs)) == epochs


def test_a_slower_method_gets_fewer_epochs():
    assert epochs_for(DENSE, Pace(0, 2.0), 10.0) == 5
    assert epochs_for(Arm("tuned", (), {}, "dense", 0.25), Pace(1.0, 3.0), 20.0) == 13  # 10 at 1 s and 3 at 3 s
    with pytest.raises(ValueError, match=r"1 epochs, the fewest of dense, take 100 s.*more --epochs"):
        epochs_for(DENSE, Pace(0, 100.0), 10.0)


@given(st.floats(1, 10), st.floats(10, 1e4))
def test_half_an_epoch_more_is_the_most(pace, seconds):
    assume(seconds > pace)
    assert epochs_for(DENSE, Pace(0, pace), seconds) * pace - seconds <= pace / 2 + 1e-6


def test_paired_differences():
    """Of 1, 2 and 6: mean 3, standard deviation √7, and t of two degrees of freedom."""
    found = paired({0: 11.0, 1: 22.0, 2: 36.0}, {2: 30.0, 1: 20.0, 0: 10.0})
    assert (found.mean, found.count) == (3, 3)
    assert found.deviation == pytest.approx(7**0.5)
    assert found.half_width == pytest.approx(4.303 * (7 / 3) ** 0.5)
    assert Mean.of([5.0]).half_width is None
    assert Mean.of([1.0, 2.0]).told(".2f") == "1.50 ± 0.71"


def test_quantiles_are_those_of_students_t():
    t = pytest.importorskip("scipy.stats").t
    for freedom in range(1, 31):
        assert Mean(0.0, (freedom + 1) ** 0.5, freedom + 1).half_width == pytest.approx(t.ppf(0.975, freedom), abs=5e-4)


# Arms


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[odd\n", "is no TOML"),
        ("[a]\nsettings = ['method']\n", r"\[a\]: settings is a list of texts"),
        ("[a]\nsetings = ['method=dense']\n", r"\[a\] has setings, which no arm has; there are settings, "),
        ("a = 1\n", r"\[a\] is a value and not a table"),
        ("['a/b']\nsettings = []\n", "its runs' folders are called so"),
        ("[a]\nsettings = []\nstart = 'dense'\n", "start and fine_tuning go together"),
        ("[a]\nsettings = []\nstart = 'dense'\nfine_tuning = 1.0\n", "fine_tuning is 1.0; it is a share"),
        ("[a]\nsettings = ['model.weights={start}']\n", "name its arm"),
        ("[a]\nsettings = []\nof_epochs = { 'schedule.cooldown_epochs' = 3 }\n", "of_epochs has shares"),
        ("[a]\nsettings = []\ntimes = 0\n", "times is 0; it is how many times"),
        ("[a]\nsettings = []\nequal_time = 'no'\n", "equal_time is 'no'; it is true or false"),
    ],
)
def test_mistakes_in_a_file_of_arms(tmp_path, text, told):
    path = tmp_path / "arms.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=told) as refused:
        known_arms.read(path)
    assert str(path) in str(refused.value)


def test_arms_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.toml cannot be read"):
        known_arms.read(tmp_path / "gone.toml")
    known = {"dense": DENSE, "a": Arm("a", (), {}, "b", 0.5), "b": Arm("b", (), {}, "dense", 0.5)}
    for names, told in [(["c"], "there is no arm c"), (["b"], "dense is what"), (["dense", "a"], "starts from b")]:
        with pytest.raises(ValueError, match=told):
            known_arms.choose(known, names, "dense")


def test_published_rows_have_a_source(tmp_path):
    path = tmp_path / "rows.toml"
    path.write_text("[[row]]\nmethod = 'x'\ntop1 = 80.0\n")
    with pytest.raises(ValueError, match="without method or source"):
        read_published(path)


def test_what_a_run_is_given(tmp_path):
    known = known_arms.read(known_arms.BUILT_IN)
    layout = Layout("digits", ("train.batch_size=16",), 40, tmp_path, known, 1000)
    tuned = layout.run(known["dynamicvit"], 3, 40)
    assert tuned.name == "dynamicvit-36+4-s3"
    assert (tuned.epochs, tuned.offset) == (4, 36)
    assert tuned.needs == layout.run(known["dense"], 3, 36)
    assert f"model.weights={tmp_path / 'dense-36-s3'}" in tuned.settings
    assert f"dynamicvit.teacher={tmp_path / 'dense-36-s3'}" in tuned.settings
    assert "optim.warmup_epochs=0.24" in tuned.settings  # 3 of 50
    cooled = layout.run(known["pss-cooldown"], 0, 100)
    assert "schedule.cooldown_epochs=3" in cooled.settings
    assert layout.config(cooled).train.epochs == 100
    assert [run.name for run in with_starts([tuned, tuned.needs])] == ["dense-36-s3", "dynamicvit-36+4-s3"]


def test_an_arm_of_twice_the_epochs(tmp_path):
    known = {"dense": DENSE, "double": Arm("double", ("method=dense",), times=2)}
    assert known["double"].split(5) == (0, 10)
    run = Layout("digits", (), 5, tmp_path, known, 1000).run(known["double"], 0, 5)
    assert (run.name, run.epochs) == ("double-10-s0", 10)
    assert "train.epochs=10" in run.settings


# Turns


def write_epochs(run, count, seconds=1.0):
    run.folder.mkdir(parents=True, exist_ok=True)
    rows = [{"kind": "epoch", "step": n, "epoch": n, "train_seconds": seconds} for n in range(1, count + 1)]
    (run.folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_runs_join_in_where_the_one_they_start_from_ends(tmp_path):
    dense, before = Run(tmp_path / "dense", 6, ()), Run(tmp_path / "before", 4, ())
    tuned, called, said = Run(tmp_path / "tuned", 2, (), before), [], []

    def advance(run, epochs):
        called.append((run.name, epochs))
        write_epochs(run, epochs)

    take_turns([dense, before, tuned], 2, advance, said.append)
    assert called == [
        ("before", 2), ("dense", 2), ("dense", 4), ("before", 4), ("tuned", 2), ("dense", 6),
    ]  # fmt: skip
    assert re.match(r"12 of 12 epochs of 3 runs; .* a minute; 0 min, 0 to go", said[-1])
    called.clear()
    write_epochs(dense, 3)
    take_turns([dense, before, tuned], 2, advance, said.append)
    assert called == [("dense", 5), ("dense", 6)]


def test_no_run_begins_before_its_start_has_ended(tmp_path):
    before = Run(tmp_path / "before", 4, ())
    tuned, called = Run(tmp_path / "tuned", 2, (), before), []
    write_epochs(before, 3)  # the next round reaches beyond its end, and goes backwards

    def advance(run, epochs):
        called.append((run.name, epochs))
        write_epochs(run, epochs)

    take_turns([before, tuned], 2, advance, lambda line: None)
    assert called == [("before", 4), ("tuned", 2)]


def test_a_run_that_does_not_go_on_ends_the_turns(tmp_path):
    with pytest.raises(RuntimeError, match="no more epochs in its log"):
        take_turns([Run(tmp_path / "stuck", 2, ())], 1, lambda run, epochs: None, print)
