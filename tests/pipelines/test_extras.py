"""What is missing is said with a command that installs it, whatever pss was installed from."""

from __future__ import annotations

import ast
import json
import shlex
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from pipelines import extras
from pipelines.base import DataError

ROOT = Path(__file__).parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Make it seem that pss is installed, from `origin`, with the metadata that the build writes."""

    def install(origin):
        info = tmp_path / "site" / "patch_sampling_schedule-9.9.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        lines = ["Metadata-Version: 2.4", "Name: patch-sampling-schedule", "Version: 9.9"]
        lines += ["Requires-Dist: torch>=2", 'Requires-Dist: onnx>=1.18; extra == "export"']
        lines += ['Requires-Dist: ffcv==1.0.2; sys_platform == "linux" and extra == "ffcv"']
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        if origin:
            (info / "direct_url.json").write_text(json.dumps(origin))
        monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
        monkeypatch.setattr(extras, "_CHECKOUT", tmp_path / "site")
        assert metadata.version("patch-sampling-schedule") == "9.9"

    return install


@pytest.mark.skipif(not (ROOT / "pipelines").is_dir(), reason="the tests run on an installed wheel")
def test_a_checkout_is_installed_with_the_extra():
    assert shlex.split(extras.install_hint("export")) == ["pip", "install", "-e", f"{ROOT}[export]"]


def test_a_wheel_is_named_where_it_lies(installed, tmp_path):
    wheel = tmp_path / "my wheels" / "patch_sampling_schedule-9.9-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.touch()
    installed({"url": wheel.as_uri(), "archive_info": {}})
    assert shlex.split(extras.install_hint("export")) == ["pip", "install", f"{wheel}[export]"]


@pytest.mark.parametrize("origin", [None, {"url": "file:///gone/pss.whl", "archive_info": {}}])
def test_without_the_wheel_the_packages_are_named(installed, origin):
    installed(origin)
    assert extras.install_hint("export") == "pip install 'onnx>=1.18'"
    assert extras.install_hint("ffcv") == "pip install ffcv==1.0.2"


def test_a_commit_is_named(installed):
    installed({"url": "https://example.org/pss.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}})
    wanted = "patch-sampling-schedule[export] @ git+https://example.org/pss.git@abc"
    assert shlex.split(extras.install_hint("export")) == ["pip", "install", wanted]


def test_one_line_turns_it_into_the_form_of_an_index(installed, monkeypatch):
    monkeypatch.setattr(extras, "PUBLISHED", True)
    installed(None)
    assert extras.install_hint("export") == "pip install 'patch-sampling-schedule[export]'"


def test_what_is_missing_is_noticed_without_importing_anything():
    with pytest.raises(DataError) as error:
        extras.need("--engine ray", "ray", "json", "no_such_module", "no_such.module")
    told = f"--engine ray needs no_such_module and no_such.module; run: {extras.install_hint('ray')}"
    assert str(error.value) == told
    assert extras.require("json", "ray", "--engine ray") is json


def test_what_is_broken_says_why(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("import no_such_module")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DataError, match=r"cannot be imported \(No module named 'no_such_module'\); run: pip install"):
        extras.require("half_installed", "ray", "--engine ray")


def test_every_extra_that_code_names_exists():
    named = set()
    for package in ("pss", "pipelines", "cli"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("require", "need"):
                    named |= {(path, ast.literal_eval(node.args[1]))} if path.name != "extras.py" else set()
    assert {extra for _, extra in named} <= EXTRAS.keys()
