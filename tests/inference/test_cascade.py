"""A cascade: no thresholds are better, what is told is what the model does, and a file of it runs without pss."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import shared
from hypothesis import given, settings
from hypothesis import strategies as st
from test_export import made, need

import cli.eval
import pss
from cli.cascades import lines
from cli.errors import run as run_command
from pss.api import cascading
from pss.api.cascading import Found, Target
from pss.inference import cascade as cascades
from pss.inference.cascade import Answers, Cascade, cost_of, fit, fitted_on, outcome, paired, top1_at
from pss.inference.export import export
from pss.inference.timing import Spread

PAGE = (Path(__file__).parents[2] / "docs" / "cascade.md").read_text(encoding="utf-8")
MACS = {0.2: 2.0, 0.4: 4.0, 0.7: 7.0, 1.0: 10.0}


def answers(count: int, seed: int, rhos: Any = (0.4, 0.7, 1.0)) -> Answers:
    """Of a model that is the surer the likelier it is right, and the better the more it sees."""
    rng = np.random.default_rng(seed)
    sure = rng.uniform(0.1, 1.0, (len(rhos), count)).round(2)
    right = (rng.uniform(size=sure.shape) < sure * (0.7 + 0.3 * np.array(rhos)[:, None])).astype(float)
    return Answers(tuple(rhos), tuple(MACS[rho] for rho in rhos), sure, right)


@given(count=st.integers(1, 14), seed=st.integers(0, 999), target=st.floats(0, 100), by_cost=st.booleans())
@settings(max_examples=30)
def test_no_thresholds_are_better_than_those_that_are_fitted(
    count: int, seed: int, target: float, by_cost: bool
) -> None:
    """Against every threshold that tells the images apart, for few images, of which each is a quantile."""
    own = answers(count, seed)
    wanted: dict[str, float] = {"most_macs": 4 + target / 8} if by_cost else {"least_top1": target}
    found = fit(own, own.rhos, **wanted)
    best = None
    for size in (2, 3):
        for rhos in itertools.combinations(own.rhos, size):
            for thresholds in itertools.product(*(np.unique(sure) for sure in own.at(rhos).sure[:-1])):
                got = outcome(own, Cascade(rhos, thresholds))
                meets = (
                    got.macs <= wanted["most_macs"] + 1e-9 if by_cost else got.top1 >= target - 1e-9 and got.macs < 10
                )
                score = (-got.top1, got.macs) if by_cost else (got.macs, -got.top1)
                if meets and (best is None or score < best):
                    best = score
    if best is None:
        assert found is None
        return
    got = outcome(own, found)
    assert ((-got.top1, got.macs) if by_cost else (got.macs, -got.top1)) == pytest.approx(best, abs=1e-4)


def test_what_is_fitted_keeps_its_word_with_four_stages() -> None:
    own = answers(400, 3, (0.2, 0.4, 0.7, 1.0))
    for most in (3.0, 5.0, 9.0):
        found = fit(own, own.rhos, most_macs=most)
        assert outcome(own, found).macs <= most + 1e-4
    assert fit(own, own.rhos, most_macs=1.9) is None
    assert fit(own, own.rhos, least_top1=100.0) is None


def test_what_costs_more_than_the_largest_alone_is_no_answer() -> None:
    """Of a model that is never sure of anything it is right about at a small ρ."""
    right = np.stack([np.zeros(40), np.ones(40)])
    own = Answers((0.4, 1.0), (4.0, 10.0), np.full((2, 40), 0.5), right)
    assert fit(own, own.rhos, least_top1=100.0) is None  # all would go on, for 14
    sure = np.stack([np.linspace(0, 1, 40), own.sure[1]])
    half = Answers(own.rhos, own.macs, sure, np.stack([np.array([0.0, 1.0] * 20), right[1]]))
    assert fit(half, half.rhos, least_top1=100.0) is None  # the second surest is wrong
    for least in (50.0, 60.0):
        found = fit(half, half.rhos, least_top1=least)
        assert found is not None
        assert outcome(half, found).macs < 10


def test_where_a_single_one_does_as_well_it_is_named() -> None:
    """A cascade whose last stage alone is right, and a single ρ that is as often right for less."""
    right = np.stack([np.zeros(40), np.ones(40), np.ones(40)])
    own = Answers((0.4, 0.7, 1.0), (4.0, 7.0, 10.0), np.full((3, 40), 0.5), right)
    speeds = {rho: Spread(9.0, 8.0, 10.0) for rho in (None, *own.rhos)}
    found = Found(Cascade((0.4, 1.0), (0.9,)), Target(), own, own, own.rhos, speeds, "made up")
    assert list(lines(found.to_dict()))[-1].endswith("a single ρ does as well for as much, or less: ρ 0.7 alone, say")
    sure = np.stack([np.linspace(0, 1, 40)] * 2)
    between = Answers((0.4, 1.0), (4.0, 10.0), sure, np.stack([np.array([0.0, 1.0] * 20), np.ones(40)]))
    cascade = Cascade(between.rhos, (float(sure[0, 8]),))  # eight go on: 60 % for 6, and a ρ between the two for 5.2
    found = Found(cascade, Target(), between, between, between.rhos, speeds, "made up")
    assert list(lines(found.to_dict()))[-1].endswith(
        "a single ρ does as well for as much, or less"
    )  # none was measured


def test_the_ends_of_the_thresholds_are_single_models() -> None:
    own = answers(50, 1)
    first, last = outcome(own, Cascade(own.rhos, (0.0, 0.0))), outcome(own, Cascade(own.rhos, (2.0, 2.0)))
    assert (first.top1, first.macs, first.shares) == (pytest.approx(own.top1[0]), 4.0, (1.0, 0.0, 0.0))
    assert (last.top1, last.macs, last.shares) == (pytest.approx(own.top1[2]), 21.0, (0.0, 0.0, 1.0))


def test_single_models_between_those_that_were_measured() -> None:
    right = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]], dtype=float)
    own = Answers((0.2, 0.4, 0.7, 1.0), (2.0, 4.0, 7.0, 10.0), right, right)
    assert [cost_of(own, top1) for top1 in (0, 25, 50, 75, 100)] == [2, 2, 4, 7, 10]
    assert cost_of(own.at((0.2, 0.4)), 51) is None
    assert [top1_at(own, macs) for macs in (2, 3, 7, 10)] == [25, 37.5, 50, 100]
    assert paired(right[3], right[0]) == (75.0, pytest.approx(100 * (3 / 16 / 4) ** 0.5))


def test_half_of_the_images_whoever_asks() -> None:
    chosen = fitted_on(10_000)
    assert 4800 < chosen.sum() < 5200
    assert (fitted_on(500) == chosen[:500]).all()


@pytest.mark.parametrize("thresholds", [(0.0, 0.0), (0.6, 0.5), (2.0, 0.5), (2.0, 2.0)])
def test_a_cascade_answers_as_the_model_does_at_each_share(thresholds: Any) -> None:
    run = made()
    images = torch.randn(9, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    cascade = Cascade((0.2, 0.6, 1.0), thresholds)
    logits, stages = cascade.predict(run, images)
    for number, rho in enumerate(cascade.rhos):
        with torch.inference_mode():
            alone = run.method.predict(images, rho)
        torch.testing.assert_close(logits[stages == number], alone[stages == number], atol=1e-4, rtol=0)
        sure = alone.softmax(1).amax(1)
        if number < 2:
            assert (sure[stages == number] >= thresholds[number] - 1e-4).all()
            assert (sure[stages > number] < thresholds[number] + 1e-4).all()


def test_what_is_told_adds_up_and_is_drawn(tmp_path: Path) -> None:
    fitted, told = answers(3000, 1), answers(3000, 2)
    target = Target(None, 4.2e-9)  # little more than the first ρ, so that a single one reaches as much
    cascade = target.fitted(fitted, fitted.rhos)
    speeds = {rho: Spread(9.0, 8.0, 10.0) for rho in (None, *told.rhos)}
    found = Found(cascade, target, fitted, told, told.rhos, speeds, "made up")
    values = found.to_dict()
    assert sum(stage["share"] for stage in values["stages"]) == pytest.approx(1)
    assert values["gmacs"] == pytest.approx(found.outcome.macs / 1e9)
    assert values["against_largest"]["difference"] == pytest.approx(values["top1"] - told.top1[-1], abs=1e-3)
    assert values["at_equal_top1"]["saved"] == pytest.approx(
        1 - 1e-9 * found.outcome.macs / values["at_equal_top1"]["gmacs"]
    )
    costs = [point["gmacs"] for point in values["frontier"]]
    assert costs == sorted(costs)
    assert max(costs) <= 1.1e-8
    assert {path.name for path in found.write(tmp_path)} == {"cascade.json", "cascade.png"}
    assert json.loads((tmp_path / "cascade.json").read_text()) == values
    with pytest.raises(ValueError, match="is within -100 points of the largest and costs less"):
        Target(-100.0).fitted(fitted, fitted.rhos)
    with pytest.raises(ValueError, match="as the first alone takes 4e-09; raise --target-gmacs"):
        Target(None, 1e-9).fitted(fitted, fitted.rhos)


SHORT = ["train.epochs=2", "optim.warmup_epochs=0", "train.batch_size=16", "model.depth=2", "train.num_workers=1"]


@pytest.fixture(scope="module")
def run(image_root: Path, tmp_path_factory: Any) -> Any:
    def make(folder: Path) -> None:
        pss.train("digits", image_root, folder / "run", settings=SHORT, loader="torch", quiet=True)

    with shared(tmp_path_factory, "cascaded", make) as folder:
        yield folder / "run"


def evaluate(*words: Any) -> Any:
    with pytest.raises(SystemExit) as done:
        run_command(cli.eval.app, [str(word) for word in words])
    return done.value.code


def test_the_command_fits_says_writes_and_exports(run: Path, image_root: Path, tmp_path: Path, capsys: Any) -> None:
    need("onnx")
    options = ("--data", image_root, "--loader", "torch", "--rho", "0.5,1", "--output", tmp_path / "out")
    code = evaluate(run, *options, "--cascade", "0.3,1", "--max-drop", "30", "--export", tmp_path / "cascade.onnx")
    told = capsys.readouterr()
    assert code in (0, None), told.err
    values = json.loads((tmp_path / "out" / "cascade.json").read_text())
    assert (tmp_path / "out" / "cascade.png").read_bytes().startswith(b"\x89PNG")
    assert [one["rho"] for one in values["singles"]] == [0.3, 0.5, 1.0]
    assert values["fitted_images"] + values["images"] == 23
    assert [stage["rho"] for stage in values["stages"]] == [0.3, 1.0]
    assert told.out.startswith("cascade ρ 0.3 → 1, the cheapest that loses at most 30 points of top-1: thresholds from")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cascade.onnx", "out"]
    again = pss.evaluate(run, image_root, rho=[0.5, 1], loader="torch", cascade=[0.3, 1], target=Target(30.0))
    assert again.cascade.to_dict()["stages"] == values["stages"]
    assert {"cascade.json", "cascade.png", "rho.json"} <= again.contents().keys()


def test_another_split_to_fit_on(run: Path, image_root: Path, tmp_path: Path) -> None:
    found = pss.evaluate(run, image_root, rho=[1.0], loader="torch", cascade=(0.3, 1), fit_split="train").cascade
    assert (found.fitted.sure.shape[1], found.told.sure.shape[1]) == (53, 23)


@pytest.mark.exhaustive
def test_a_split_that_is_not_there_is_found_before_anything_is_evaluated(
    run: Path, image_root: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(cascading, "collect", lambda *_, **__: pytest.fail("evaluated"))
    with pytest.raises(ValueError, match="test2"):
        pss.evaluate(run, image_root, rho=[1.0], loader="torch", cascade=(0.3, 1), fit_split="test2")
    with pytest.raises(ValueError, match="asked for; name two to 4 different ones"):
        pss.evaluate(run, image_root, rho=[1.0], loader="torch", cascade=(0.1, 0.2, 0.3, 0.4, 0.5))


def test_the_frontier_is_fitted_once(run: Path, image_root: Path, monkeypatch: Any) -> None:
    found = pss.evaluate(run, image_root, rho=[1.0], loader="torch", cascade=(0.3, 1)).cascade
    fits: list[Any] = []
    monkeypatch.setattr(cascading, "fit", lambda *given, **wanted: fits.append(given) or fit(*given, **wanted))
    found.to_dict(), found.to_json(), found.figure()
    assert len(fits) == 12


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--cascade", "0.5"], "names 1 ρ; name two to four"),
        (["--cascade", "0.1,0.2,0.3,0.4,0.5"], "names 5 ρ"),
        (["--cascade", "0.5,2"], "--cascade 2 is out of range"),
        (["--target-gmacs", "1"], "--target-gmacs is for a cascade"),
        (["--fit-split", "train"], "--fit-split is for a cascade"),
        (["--cascade", "auto", "--budget-ms", "3"], "--budget-ms chooses one ρ"),
        (["--cascade", "auto", "--max-drop", "1", "--target-gmacs", "1"], "fit the cascade to one of them"),
        (["--cascade", "auto", "--target-gmacs", "nan"], "give a number above 0"),
        (["--cascade", "auto", "--push", "there"], "--push does not go with --cascade"),
        (["--cascade", "auto", "--target-gmacs", "1e-9"], "raise --target-gmacs"),
        (["--cascade", "auto", "--fit-split", "test2"], "test2"),
        (["--cascade", "auto", "--fit-split", "val"], "name another split with --fit-split"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    run: Path, image_root: Path, tmp_path: Path, monkeypatch: Any, capsys: Any, words: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert evaluate(run, "--data", image_root, "--loader", "torch", "--output", tmp_path / "out", *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert told in line
    assert list(tmp_path.iterdir()) == []


def test_a_method_without_a_share_has_no_cascade(monkeypatch: Any) -> None:
    varying = made()
    monkeypatch.setattr(type(varying.method), "costs_vary", True)
    with pytest.raises(ValueError, match="--cascade runs a model at several ρ, and mine was trained with method="):
        cascades.collect(varying, None, (0.5, 1.0), None)


def test_the_loop_of_the_page_runs_where_there_is_no_pss(tmp_path: Path) -> None:
    """And answers as pss does."""
    need("onnx")
    mine = made()
    images = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(9))
    with torch.inference_mode():
        sure = [np.sort(mine.method.predict(images, rho).softmax(1).amax(1).numpy()) for rho in (0.4, 0.7)]
    cascade = Cascade((0.4, 0.7, 1.0), tuple(float(some[5:7].mean()) for some in sure))
    found = Found(cascade, Target(), *[answers(10, 0)] * 2, (0.4, 0.7, 1.0), {}, "mine")
    export(mine, tmp_path / "cascade.onnx", point=None, dynamic=True, more=found.metadata(mine))
    np.save(tmp_path / "images.npy", images.numpy())
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    blocked = "import sys\nfor name in ('pss', 'pipelines', 'cli', 'torch'):\n    sys.modules[name] = None\n"
    asked = "\nprint(json.dumps([one.tolist() for one in classify(np.load('images.npy'))]))\n"
    (tmp_path / "loop.py").write_text(blocked + code + asked, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "loop.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    classes, stages = json.loads(done.stdout)
    logits, expected = cascade.predict(mine, images)
    assert stages == expected.tolist()
    assert set(stages) == {0, 1, 2}
    assert classes == logits.argmax(1).tolist()


def test_the_commands_of_the_page_are_understood() -> None:
    import typer.main

    (block,) = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
    for line in block.splitlines():
        words = line.partition("#")[0].split()
        context = typer.main.get_command(cli.eval.app).make_context("eval", words[1:])
        assert context.params["cascade"] in ("auto", "0.4,0.7,1.0")
