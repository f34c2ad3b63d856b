"""The architecture, asserted: who may import whom, what stays light, and that this checkout is what is tested.

The table of folders in CONTRIBUTING.md is the rule; this file holds the code against it.
"""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cli
import pipelines
import pss

ROOT = Path(__file__).parent.parent
PACKAGES = ("pss", "pipelines", "cli")
MOST_FILES, MOST_LINES = 13, 400
LONG = {"pss/attention/kernels.py"}  # one kernel beside the other
TABLE = re.findall(r"^\| `([\w/]+)/` \|[^|]*\|([^|]*)\|$", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.MULTILINE)
RULES = {folder: set(re.findall(r"`([\w.]+)`", allowed)) for folder, allowed in TABLE}


def modules_of(*packages):
    """Dotted names and paths."""
    for package in packages:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


KNOWN = dict(modules_of(*PACKAGES, "tools"))


def imports_of(path):
    """Our modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            while name and name not in KNOWN:
                name = name.rpartition(".")[0]
            if name:
                yield name


def folder_of(module):
    """The row of the table that a module belongs to."""
    parts = KNOWN[module].relative_to(ROOT).parts[:-1]
    while "/".join(parts) not in RULES:
        parts = parts[:-1]
    return "/".join(parts)


def test_every_folder_is_in_the_table():
    assert set(RULES) == {
        path.parent.relative_to(ROOT).as_posix()
        for package in (*PACKAGES, "tools")
        for path in (ROOT / package).rglob("__init__.py")
        if path.parent.name != "report"  # its code is one file, beside what the page is made of
    }


@pytest.mark.parametrize("module", KNOWN)
def test_imports_point_one_way(module):
    own = folder_of(module)
    for name in set(imports_of(KNOWN[module])):
        if folder_of(name) == own:
            continue
        allowed = any(name == rule or name.startswith(f"{rule}.") for rule in RULES[own])
        assert allowed, f"{module} imports {name}; CONTRIBUTING.md lets {own}/ import {sorted(RULES[own])}"


def test_there_are_no_circles():
    """Neither of modules nor of folders; imports inside functions and for type checkers count."""
    modules = {name: set(imports_of(path)) - {name} for name, path in KNOWN.items()}
    # A package that is imported for one of its modules is not what the module needs.
    tuple(graphlib.TopologicalSorter(modules).static_order())
    folders = {}
    for name, found in modules.items():
        needs = folders.setdefault(folder_of(name), set())
        # `pss` and `pipelines` themselves hold what is below all, settings, and what is above all, the public names.
        needs |= {folder_of(other) for other in found} - {folder_of(name), "pss", "pipelines"}
    del folders["pss"], folders["pipelines"]
    tuple(graphlib.TopologicalSorter(folders).static_order())


def test_folders_and_files_stay_small():
    for folder in RULES:
        files = [path for path in (ROOT / folder).glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= MOST_FILES, f"{folder} holds {len(files)} files"
    for module, path in KNOWN.items():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= MOST_LINES or path.relative_to(ROOT).as_posix() in LONG, f"{module} has {lines} lines"


def test_the_map_shows_every_file():
    shown, folder = set(), ""
    for line in (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").splitlines():
        if found := re.match(r"([\w/]+)/(?:  |$)", line):
            folder = found[1]
        elif found := re.match(r"    (\w+\.py) ", line):
            shown.add(f"{folder}/{found[1]}")
    files = {path.relative_to(ROOT).as_posix() for path in KNOWN.values()}
    assert shown == {name for name in files if not name.endswith(("/__init__.py", "/version.py"))}


def test_every_package_says_what_lives_there():
    for folder in RULES:
        doc = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text(encoding="utf-8")))
        assert doc, folder
        assert len(doc) > 80, folder


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
    if not (ROOT / ".git").exists():
        pytest.skip("this is no checkout, so that nothing tells what is committed")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    words = ("python" + "hosted", "pypi" + ".org", "files.deb" + "ian", "/work" + "/main", "/work" + "/shared")
    for name in listed:
        text = (ROOT / name).read_bytes().decode("utf-8", errors="ignore")
        for word in words:
            assert word not in text, f"{name} contains {word}"
