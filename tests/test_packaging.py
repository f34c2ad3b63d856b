"""What is installed works where others have folders of the same names, and brings what it needs."""

from __future__ import annotations

import re
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


@pytest.fixture
def project(tmp_path):
    """A folder of somebody's project, which has packages called `cli` and `pipelines`."""
    for name in ("cli", "pipelines"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("OWNER = 'somebody'\n")
    return tmp_path


@pytest.mark.parametrize("command", ["pss-convert", "pss-train", "pss-eval"])
def test_commands_do_not_look_into_the_working_folder(installed, project, command):
    done = installed.run(command, "--version", cwd=project)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("pss ")


def test_torchrun_starts_the_command_in_such_a_folder(installed, project):
    words = ["torchrun", "--standalone", "--nproc-per-node", 1, "--no-python", "pss-train", "--list"]
    done = installed.run(*words, cwd=project)
    assert done.returncode == 0, done.stderr
    assert "digits" in done.stdout


@pytest.mark.parametrize("name", ["cli", "pipelines"])
@pytest.mark.parametrize("command", ["pss-convert", "pss-train", "pss-eval"])
def test_a_package_that_comes_first_is_named_with_the_remedy(installed, project, command, name):
    """On PYTHONPATH, where the commands find it too."""
    other = {"cli": "pipelines", "pipelines": "cli"}[name]
    (project / other / "__init__.py").unlink()  # a folder without it never comes before a package
    done = installed.run(command, "--list", cwd=project, PYTHONPATH=str(project))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        f"error: pss brings a package {name!r}, but Python finds {project / name} first; rename that one, or take "
        f"{project} off Python's path (PYTHONPATH, or the folder you start in)\n"
    )


@pytest.mark.parametrize("module", ["cli.convert", "cli.train", "cli.eval"])
def test_a_module_started_beside_another_pipelines_says_so(installed, project, module):
    (project / "cli" / "__init__.py").unlink()
    done = installed.run("python", "-m", module, "--list", cwd=project)
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"error: pss brings a package 'pipelines', but Python finds {project}/pipelines first;"
    )
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("line", ["import pss", "from pss.methods import Method"])
def test_an_import_beside_another_pipelines_says_so(installed, project, line):
    done = installed.run("python", "-c", line, cwd=project)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        f"ImportError: pss brings a package 'pipelines', but Python finds {project}/pipelines first;"
    )


def test_an_import_beside_another_cli_works(installed, project):
    (project / "pipelines" / "__init__.py").unlink()
    done = installed.run("python", "-c", "import cli, pss; print(cli.OWNER, pss.Fixed(0.5)(0))", cwd=project)
    assert done.stdout == "somebody 0.5\n", done.stderr


def test_a_module_of_that_name_counts_too_and_one_without_a_spec(tmp_path, installed):
    (tmp_path / "pipelines.py").touch()
    code = "import pipelines; pipelines.__spec__ = None; import pss"
    done = installed.run("python", "-c", code, cwd=tmp_path)
    assert f"but Python finds {tmp_path}/pipelines.py first" in done.stderr


@pytest.mark.exhaustive
def test_types_are_seen_from_outside(installed, tmp_path):
    """By mypy, in a project that has pss installed, and other packages left out, which take minutes."""
    others = "torch, numpy, typer, rich, pydantic, pydantic_core, annotated_types, PIL, timm, nvidia, ffcv, yaml"
    sections = ",".join(f"mypy-{name}.*" for name in others.split(", "))
    (tmp_path / "mypy.ini").write_text(
        f"[mypy]\nfollow_imports = silent\n[{sections}]\nfollow_imports = skip\nignore_missing_imports = True\n"
    )
    (tmp_path / "use.py").write_text(
        "import cli.errors\nimport pipelines.extras\nimport pss\n\n"
        "reveal_type(pss.Fixed(0.5)(0))\nreveal_type(pipelines.extras.install_hint)\nreveal_type(cli.errors.sentence)\n"
    )
    words = ["--python-executable", installed.bin / "python", "--no-error-summary", "use.py"]
    done = installed.run(sys.executable, "-m", "mypy", *words, cwd=tmp_path)
    shown = [told.replace("builtins.", "") for told in re.findall(r'Revealed type is "(.*)"', done.stdout)]
    wanted = ["float", "def (extra: str) -> str", "def (error: Exception) -> str"]
    assert shown == wanted, done.stdout + done.stderr


@pytest.mark.exhaustive
def test_the_sdist_has_what_its_tests_read(installed, tmp_path):
    """Some that read documents and settings, run in it."""
    tests = ["tests/test_layout.py::test_the_map_shows_every_file", "tests/test_readme.py", "tests/test_schedules.py"]
    kept_out = {"PYTHONDONTWRITEBYTECODE": "1", "HYPOTHESIS_STORAGE_DIRECTORY": str(tmp_path)}
    words = ["-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", *tests]
    done = installed.run(sys.executable, *words, cwd=installed.sdist, **kept_out)
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_sdist_has_every_file_that_a_test_or_a_target_needs(installed):
    with tarfile.open(next((installed.folder / "dist").glob("*.tar.gz"))) as tar:
        there = {name.partition("/")[2] for name in tar.getnames()}
    for folder in ("pss", "pipelines", "cli", "tools", "tests", "docs", ".ci"):
        files = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*") if path.is_file()}
        missing = {name for name in files - there if "__pycache__" not in name}
        assert not missing
    assert {"Makefile", "constraints.txt", "mkdocs.yml", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"} <= there


def test_the_wheel_has_code_types_and_the_reports_parts_and_nothing_else(installed):
    with zipfile.ZipFile(installed.wheel) as wheel:
        names = wheel.namelist()
        (about,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(wheel.read(about).decode())
    code = {name for name in names if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in code} == {"pss", "pipelines", "cli"}
    assert {Path(name).suffix for name in code} == {".py", ".typed", ".html", ".css", ".js"}
    assert {f"{package}/py.typed" for package in ("pss", "pipelines", "cli")} <= code
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Author"]
    assert metadata["Keywords"]
    versions = [line.rpartition(" ")[2] for line in metadata.get_all("Classifier") if ":: 3." in line]
    assert versions
    assert f">={versions[0]}" in metadata["Requires-Python"]
    assert f"<3.{int(versions[-1].partition('.')[2]) + 1}" in metadata["Requires-Python"]


def test_what_is_pinned_installs_on_the_oldest_python():
    """Debian 12 has 3.11.2: a release that needs 3.11.5, as some do, leaves its users without an environment."""
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    assert len(pinned) > 100
    oldest = re.search(r">=([\d.]+)", PROJECT["requires-python"])[1] + ".0"
    for name in pinned:
        try:
            needs = metadata.metadata(name).get("Requires-Python") or ""
        except metadata.PackageNotFoundError:  # an extra's, which is not installed here
            continue
        assert SpecifierSet(needs).contains(oldest), f"{name} {metadata.version(name)} needs Python {needs}"


def test_what_an_index_shows_needs_no_file_beside_it():
    text = (ROOT / PROJECT["readme"]).read_text("utf-8")
    targets = re.findall(r"\]\(\s*([^)\s]+)", text)
    assert targets
    assert [target for target in targets if not target.startswith("https://")] == []
    assert "![" not in text
