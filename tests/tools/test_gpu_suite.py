"""The GPU suite on a CPU: every part runs at tiny shapes, what goes wrong is recorded, what is done is kept."""

from __future__ import annotations

import argparse
import ast
import io
import json
import random
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import warm

from pss import recipes
from tools import gpu_parts, gpu_suite, wheels
from tools.gpu_parts import Part, Parts
from tools.gpu_report import figures
from tools.gpu_suite import Suite

ROOT = Path(__file__).parents[2]


def arguments(output, **changes):
    settings = {"images": None, "parts": None, "again": False, "minutes": 9.0, "commit": "abc", "dry_run": True}
    settings["archive"] = None
    return argparse.Namespace(output=output, **(settings | changes))


def kept(output):
    return {path.stem: json.loads(path.read_text()) for path in output.glob("*.json")}


@pytest.fixture
def simple(monkeypatch):
    """A suite of small parts in place of the real ones; the names of those that ran."""
    ran = []

    def part(name, *command, obstacle=None):
        def noted(_):
            ran.append(name)
            return list(command)

        return Part(noted, 60, lambda: obstacle)

    parts = {
        "good": part("good", "this"),
        "bad": part("bad", "no_such_module"),
        "barred": part("barred", obstacle="the moon is full"),
        "last": part("last", "platform"),
    }
    monkeypatch.setattr(Suite, "parts", lambda self: parts)
    return ran


SOME = {"train", "attention", "step-tiny", "augment"}
ALL = SOME | {"tests", "rates-tiny", "loaders"}


@pytest.mark.exhaustive
@pytest.mark.parametrize("parts", [SOME, ALL], ids=["some", "all"])
def test_a_dry_run_runs_every_part(tmp_path, monkeypatch, capsys, parts):
    """All in processes started as they are on a GPU; some in processes forked from one that has imported torch."""
    words = ["--dry-run", "--output", str(tmp_path), "--archive", str(tmp_path / "gpu.tar.gz")]
    if parts == ALL:
        command = [sys.executable, "-m", "tools.gpu_suite", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
        code, said = done.returncode, done.stderr
    else:
        forking = vars(subprocess) | {"Popen": warm.Popen, "run": warm.run}
        for module in (gpu_suite, gpu_parts):
            monkeypatch.setattr(module, "subprocess", SimpleNamespace(**forking))
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
    with tarfile.open(tmp_path / "gpu.tar.gz") as tar:
        assert {f"gpu/{name}.json" for name in parts} | {"gpu/report.md"} <= set(tar.getnames())


def test_what_fails_or_cannot_run_is_recorded_and_stops_nothing(tmp_path, simple, capsys):
    assert gpu_suite.run(arguments(tmp_path)) == 1
    found = kept(tmp_path)
    assert {name: result["status"] for name, result in found.items()} == {
        "good": "done", "bad": "failed", "barred": "impossible", "last": "done"
    }  # fmt: skip
    assert found["good"]["told"].count("\n") > 10
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
    endless = Part(lambda _: ["http.server", "0"], 1.0)
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
    suite.made.device = "cpu"
    common = {"status": "done", "reason": None, "seconds": 1, "commit": "abc", "told": ""}
    for part, stem in (("rates-deit-s-224", "rates"), ("train", "train")):
        (tmp_path / f"{part}.json").write_text(json.dumps(common | {"measured": {stem: measured}}))
    suite.publish()
    report = (tmp_path / "report.md").read_text()
    assert "| rates-deit-s-224 | saving | at least 34.5% | 35.0% | yes |" in report
    assert "| rates-deit-s-224 | images/s at rho 1 | at least 10,500 | 10,240 | no |" in report
    assert "| train | data wait | at most 3.0% | 4.0% | no |" in report
    assert "| rates-vit-b-224 | saving | at least 34.2% | – | not measured |" in report


def test_the_recipes_on_a_gpu_are_valid_without_their_weights():
    for recipe, _, img_size, _ in gpu_parts.MODELS.values():
        assert recipes.get(recipe).with_settings(["model.weights=none"]).data.img_size == img_size


def test_commands_on_a_gpu_name_it_and_the_real_models(tmp_path):
    made = Parts(arguments(tmp_path, dry_run=False, images=tmp_path / "none.tar"), tmp_path)
    made.images = tmp_path  # type: ignore[misc]
    parts = made.all()
    for name, part in parts.items():
        words = part.command(tmp_path)
        if name != "tests":
            assert words[words.index("--device") + 1] == "cuda"
            assert words.count("--recipe") + words.count("--model") <= 1  # one model at a time
    assert "compile.cuda_graphs=true" in parts["rates-deit-s-224-cuda-graphs"].command(tmp_path)
    assert "tests/attention/test_attention.py" in parts["tests"].command(tmp_path)
    assert "tests/test_layout.py" not in parts["tests"].command(tmp_path)


def test_two_calls_of_six_minutes_answer_what_teaches_most(tmp_path, monkeypatch):
    """However long the first three parts take within their limits; and each part has a chance in a call of its own."""
    parts = Parts(arguments(tmp_path, dry_run=False, images=tmp_path / "none.tar"), tmp_path).all()
    assert list(parts)[:3] == ["tests", "rates-deit-s-224", "train"]
    assert all(part.limit_seconds <= 350 for part in parts.values())
    clock = [0.0]
    monkeypatch.setattr(gpu_suite.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(Suite, "parts", lambda self: parts)
    answered = []

    def ran(suite, name, part, limit_seconds):
        clock[0] += limit_seconds
        answered.append(name)
        result = {"status": "done", "reason": None, "notes": [], "seconds": 1, "told": "", "measured": {}}
        gpu_suite.write(suite.output / f"{name}.json", json.dumps(result).encode())
        return result

    monkeypatch.setattr(Suite, "run", ran)
    for call in range(2):
        clock[0] = 1000.0 * call
        assert gpu_suite.run(arguments(tmp_path, minutes=6.0)) == 0
        assert clock[0] <= 1000.0 * call + 360
    assert answered == ["tests", "rates-deit-s-224", "train"]


def test_what_was_too_slow_gets_all_that_is_left(tmp_path, monkeypatch):
    limits = []
    slow = Part(lambda _: ["http.server", "0"], 1.0)
    monkeypatch.setattr(Suite, "parts", lambda self: {"slow": slow})
    monkeypatch.setattr(Suite, "_execute", lambda self, command, limit: limits.append(limit) or ("not done within", ""))
    for _ in range(2):
        assert gpu_suite.run(arguments(tmp_path, minutes=2.0)) == 1
    assert limits[0] <= 1
    assert limits[1] > 100


def test_a_batch_that_does_not_fit_is_halved_and_that_is_said(tmp_path, monkeypatch, capsys):
    commands = []

    def execute(suite, command, limit):
        commands.append(command)
        batch = int(command[command.index("--batch") + 1])
        if batch > 300:
            return "exit code 1: torch.OutOfMemoryError", "CUDA out of memory. Tried to allocate 2 GiB"
        return None, "fine"

    monkeypatch.setattr(Suite, "_execute", execute)
    monkeypatch.setattr(
        Suite, "parts", lambda self: {"one": Part(lambda _: ["m", "--batch", "1024", "--x", "7"], 60.0)}
    )
    assert gpu_suite.run(arguments(tmp_path)) == 0
    assert commands == [["m", "--batch", batch, "--x", "7"] for batch in ("1024", "512", "256")]
    told = "a batch of 1024 did not fit, 512 was taken; a batch of 512 did not fit, 256 was taken"
    assert told in capsys.readouterr().out
    assert f"| one | done: {told} |" in (tmp_path / "report.md").read_text()
    monkeypatch.setattr(Suite, "_execute", lambda *_: ("exit code 1: torch.OutOfMemoryError", "CUDA out of memory"))
    assert gpu_suite.run(arguments(tmp_path, again=True)) == 1
    assert gpu_parts.halved(["m", "--batch", "1"]) is gpu_parts.halved(["m"]) is None


def test_a_call_that_is_killed_leaves_an_archive_of_what_was_done(tmp_path, simple, monkeypatch):
    archive = tmp_path / "gpu.tar.gz"
    run = Suite.run

    def killed(suite, name, part, limit_seconds):
        if name == "last":
            raise KeyboardInterrupt
        return run(suite, name, part, limit_seconds)

    monkeypatch.setattr(Suite, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        gpu_suite.run(arguments(tmp_path / "results", archive=archive))
    with tarfile.open(archive) as tar:
        names = set(tar.getnames())
        assert {"gpu/report.md", "gpu/good.json", "gpu/bad.json", "gpu/barred.json"} == names
        assert json.load(tar.extractfile("gpu/good.json"))["status"] == "done"


def test_an_archive_keeps_to_its_size_and_says_what_it_left_out():
    noise = random.Random(0).randbytes
    files = {"report.md": b"short", "a.json": noise(3000), "b.json": noise(3000), "c.json": noise(3000)}
    packed = gpu_suite.archived(files, 8000)
    assert len(packed) <= 8000
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        assert tar.getnames() == ["gpu/report.md", "gpu/a.json", "gpu/b.json", "gpu/left_out.txt"]
        assert tar.extractfile("gpu/left_out.txt").read() == b"c.json\n"


def test_a_part_whose_modules_are_not_there_says_which(tmp_path, monkeypatch):
    find = gpu_parts.find_spec
    monkeypatch.setattr(gpu_parts, "find_spec", lambda name: None if name in ("pydantic", "hypothesis") else find(name))
    parts = Parts(arguments(tmp_path), tmp_path).all()
    assert parts["tests"].obstacle() == "not installed: pydantic, hypothesis; python -m tools.wheels fetches them"
    assert parts["attention"].obstacle() == "not installed: pydantic; python -m tools.wheels fetches them"


def test_wheels_are_those_that_a_machine_with_torch_lacks():
    """All that is imported wherever a run is trained or tested on a GPU is there already or in the folder."""
    own = {"pss", "pipelines", "cli", "tools"} | {path.stem for path in (ROOT / "tests").rglob("*.py")}
    elsewhere = {"onnx", "ffcv", "nvidia", "matplotlib"}  # in modules that nothing but those back ends and plots import
    names = {"PIL": "pillow", "annotated_types": "pydantic", "typing_extensions": "pydantic", "pytest": "pytest"}
    files = [path for package in ("pss", "pipelines", "cli", "tools") for path in (ROOT / package).rglob("*.py")]
    for path in [*files, *(ROOT / name for name in gpu_parts.tests_on_a_gpu())]:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                found = [node.module]
            for name in {name.split(".")[0] for name in found} - own - elsewhere - sys.stdlib_module_names:
                assert names.get(name, name) in (*wheels.WANTED, *wheels.THERE), f"{path} imports {name}"
    lines = wheels.requirements()
    assert [line.split(">=")[0] for line in lines] == list(wheels.WANTED)
    assert all(">=" in line for line in lines)


def test_wheels_of_what_is_there_are_dropped(tmp_path):
    for name in ("numpy-2.4.6-cp312-cp312-x.whl", "pydantic-2.14.3-py3-none-any.whl", "pytest_timeout-2.4.0-py3.whl"):
        (tmp_path / name).touch()
    wheels.drop(tmp_path)
    assert {path.name.split("-")[0] for path in tmp_path.iterdir()} == {"pydantic", "pytest_timeout"}
