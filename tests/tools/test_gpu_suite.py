"""The GPU suite on a CPU: every part runs at tiny shapes, what goes wrong is recorded, what is done is kept."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import warm

from pss import recipes
from tools import gpu_suite
from tools.gpu_suite import Part, Suite, figures

ROOT = Path(__file__).parents[2]


def arguments(output, **changes):
    settings = {"images": None, "parts": None, "again": False, "minutes": 9.0, "commit": "abc", "dry_run": True}
    return argparse.Namespace(output=output, **(settings | changes))


def kept(output):
    return {path.stem: json.loads(path.read_text()) for path in output.glob("*.json")}


@pytest.fixture
def simple(monkeypatch):
    """A suite of small parts in place of the real ones; the names of those that ran."""
    ran = []

    def part(name, *commands, obstacle=None):
        def noted(_):
            ran.append(name)
            return [list(command) for command in commands]

        return Part(noted, 60, lambda: obstacle)

    parts = {
        "good": part("good", ["platform"], ["this"]),
        "bad": part("bad", ["this"], ["no_such_module"]),
        "barred": part("barred", obstacle="the moon is full"),
        "last": part("last", ["platform"]),
    }
    monkeypatch.setattr(Suite, "parts", lambda self: parts)
    return ran


SOME = {"train", "attention", "step-tiny", "augment"}
ALL = SOME | {"tests", "rates-tiny", "loaders"}


@pytest.mark.parametrize("parts", [SOME, pytest.param(ALL, marks=pytest.mark.exhaustive)], ids=["some", "all"])
def test_a_dry_run_runs_every_part(tmp_path, monkeypatch, capsys, parts):
    """All in processes started as they are on a GPU; some in processes forked from one that has imported torch."""
    words = ["--dry-run", "--output", str(tmp_path)]
    if parts == ALL:
        command = [sys.executable, "-m", "tools.gpu_suite", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
        code, said = done.returncode, done.stderr
    else:
        forking = vars(subprocess) | {"Popen": warm.Popen, "run": warm.run}
        monkeypatch.setattr(gpu_suite, "subprocess", SimpleNamespace(**forking))
        monkeypatch.setattr(sys, "argv", ["gpu_suite", *words, "--parts", *sorted(parts)])
        code, said = gpu_suite.main(), capsys.readouterr().out
    found = kept(tmp_path)
    reasons = {name: result["reason"] for name, result in found.items() if result["status"] == "failed"}
    assert (reasons, code) == ({}, 0), said
    assert {name for name, result in found.items() if result["status"] == "done"} == parts
    if "rates-tiny" in parts:
        assert {"saving", "images/s at rho 1", "data wait"} == figures(found["rates-tiny"]).keys()
        assert found["rates-tiny"]["measured"]["rates"]["settings"]["compiled"]
    assert found["train"]["measured"]["train"]["settings"]["loader"] in ("dali", "torch")
    assert "dry run" in (tmp_path / "report.md").read_text().splitlines()[0]


def test_what_fails_or_cannot_run_is_recorded_and_stops_nothing(tmp_path, simple, capsys):
    assert gpu_suite.run(arguments(tmp_path)) == 1
    found = kept(tmp_path)
    assert {name: result["status"] for name, result in found.items()} == {
        "good": "done", "bad": "failed", "barred": "impossible", "last": "done"
    }  # fmt: skip
    assert found["good"]["told"].count("\n") > 10  # of both commands
    assert "no_such_module" in found["bad"]["reason"]
    assert found["barred"]["reason"] == "the moon is full"
    assert found["good"]["commit"] == "abc"
    report = (tmp_path / "report.md").read_text()
    assert "| barred | impossible: the moon is full |" in report
    assert "| rates-deit-s-224 | saving | at least 34.5% | – | not measured |" in report


def test_what_is_done_is_kept_unless_asked_for_again(tmp_path, simple):
    gpu_suite.run(arguments(tmp_path))
    simple.clear()
    gpu_suite.run(arguments(tmp_path))
    assert simple == ["bad"]
    gpu_suite.run(arguments(tmp_path, parts=["last"]))
    assert simple == ["bad"]
    gpu_suite.run(arguments(tmp_path, parts=["last"], again=True))
    assert simple == ["bad", "last"]


def test_nothing_is_begun_that_might_not_end(tmp_path, simple, capsys):
    assert gpu_suite.run(arguments(tmp_path, minutes=0.9)) == 0
    assert simple == []
    assert "good: put off, it may take 60 s; run again" in capsys.readouterr().out
    assert "| good | not run yet |" in (tmp_path / "report.md").read_text()


def test_a_part_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    endless = Part(lambda _: [["http.server", "0"]], 1.0)
    monkeypatch.setattr(Suite, "parts", lambda self: {"endless": endless})
    assert gpu_suite.run(arguments(tmp_path)) == 1
    assert kept(tmp_path)["endless"]["reason"] == "not done within 1 s"


def test_unknown_parts_are_named(tmp_path, simple):
    with pytest.raises(SystemExit, match="there is no part 'gut'; parts are good, bad"):
        gpu_suite.run(arguments(tmp_path, parts=["gut"]))


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_suite"])
    with pytest.raises(SystemExit):
        gpu_suite.main()
    assert "no CUDA device here; --dry-run" in capsys.readouterr().err


def test_goals_are_set_beside_figures(tmp_path):
    suite = Suite(arguments(tmp_path, dry_run=False), tmp_path)
    levels = {"1": {"seconds": [0.1, 0.09, 0.5]}}
    measured = {"savings": [0.2, 0.36, 0.35], "levels": levels, "settings": {"batch": "1024"}, "data_wait": 0.04}
    suite.device = "cpu"
    common = {"status": "done", "reason": None, "seconds": 1, "commit": "abc", "told": ""}
    for part, stem in (("rates-deit-s-224", "rates"), ("train", "train")):
        (tmp_path / f"{part}.json").write_text(json.dumps(common | {"measured": {stem: measured}}))
    report = suite.report()
    assert "| rates-deit-s-224 | saving | at least 34.5% | 35.0% | yes |" in report
    assert "| rates-deit-s-224 | images/s at rho 1 | at least 10,500 | 10,240 | no |" in report
    assert "| train | data wait | at most 3.0% | 4.0% | no |" in report
    assert "| rates-vit-b-224 | saving | at least 34.2% | – | not measured |" in report


def test_the_recipes_on_a_gpu_are_valid_without_their_weights():
    for recipe, _, img_size, _ in gpu_suite.MODELS.values():
        assert recipes.get(recipe).with_settings(["model.weights=none"]).data.img_size == img_size


def test_commands_on_a_gpu_name_it_and_the_real_models(tmp_path):
    suite = Suite(arguments(tmp_path, dry_run=False, images=tmp_path / "none.tar"), tmp_path)
    suite.images = tmp_path  # type: ignore[misc]
    parts = suite.parts()
    assert list(parts)[:3] == ["tests", "compile", "rates-deit-s-224"]
    assert len(parts["compile"].commands(tmp_path)) == 3
    for name, part in parts.items():
        if name != "tests":
            for words in part.commands(tmp_path):
                assert words[words.index("--device") + 1] == "cuda"
    assert sum(part.limit_seconds for part in parts.values()) < 3 * 1800
    assert "compile.cuda_graphs=true" in parts["rates-deit-s-224-cuda-graphs"].commands(tmp_path)[0]
