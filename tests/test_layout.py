"""The architecture, asserted: who may import whom, what stays light, and that this checkout is what is tested."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cli
import pipelines
import pss

ROOT = Path(__file__).parent.parent


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [
        ("pipelines", {"pipelines"}),
        ("pss", {"pss", "pipelines.base", "pipelines.augment.device", "pipelines.augment"}),
        ("cli", {"pss", "pipelines", "cli"}),
    ],
)
def test_imports_point_one_way(folder, allowed):
    ours = ("pss", "pipelines", "cli", "tools", "tests")
    for path in (ROOT / folder).rglob("*.py"):
        for name in imports_of(path):
            if name.split(".")[0] in ours:
                assert any(name == a or name.startswith(a + ".") for a in allowed), f"{path} imports {name}"


def test_the_three_packages_are_those_of_this_checkout():
    assert {Path(package.__file__).parent.parent for package in (cli, pipelines, pss)} == {ROOT}


@pytest.mark.parametrize("command", ["convert", "train", "eval"])
def test_help_imports_nothing_heavy(command):
    code = (
        f"import sys, runpy; sys.argv = ['pss-{command}', '--help']\n"
        "try: runpy.run_module('cli." + command + "', run_name='__main__')\n"
        "except SystemExit as done: assert not done.code, done.code\n"
        "heavy = {'torch', 'timm', 'numpy', 'nvidia', 'ffcv', 'matplotlib', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


@pytest.mark.parametrize("module", ["pss", "pss.schedules"])
def test_schedules_need_no_torch(module):
    code = f"import sys, {module}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_every_public_name_exists():
    for name in pss.__all__:
        assert getattr(pss, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pss.nothing  # noqa: B018


def test_committed_files_name_no_registry_and_no_private_path():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    words = ("python" + "hosted", "pypi" + ".org", "files.deb" + "ian", "/work" + "/main", "/work" + "/shared")
    for name in listed:
        text = (ROOT / name).read_bytes().decode("utf-8", errors="ignore")
        for word in words:
            assert word not in text, f"{name} contains {word}"
