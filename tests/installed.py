"""pss as others have it: built from its sdist, installed as a wheel, and no checkout in sight."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
_COPIED = (
    ".ci", ".gitignore", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "Makefile", "README.md",
    "constraints.txt", "docs", "mkdocs.yml", "pyproject.toml", "pss", "pipelines", "cli", "tests", "tools",
)  # fmt: skip


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel of this checkout; everything else in it is what these tests run with."""

    folder: Path

    @property
    def wheel(self) -> Path:
        (found,) = (self.folder / "dist").glob("*.whl")
        return found

    @property
    def sdist(self) -> Path:
        return self.folder / "sdist" / self.wheel.name.rpartition("-py3")[0]

    @property
    def bin(self) -> Path:
        return self.folder / "venv" / "bin"

    def run(self, *words: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """What a command says, found as an activated environment would find it."""
        env = _plain_environment()
        # The tools that come with the packages borrowed below, torchrun for one, are beside pytest's Python.
        path = os.pathsep.join((str(self.bin), str(Path(sys.executable).parent), env["PATH"]))
        env |= {"PATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "100"} | environment
        return subprocess.run(
            list(map(str, words)), cwd=cwd, env=env, capture_output=True, text=True, timeout=600, check=False
        )


def install(folder: Path) -> None:
    """Build the sdist, the wheel from it, and an environment with it, all below `folder`."""
    (folder / "checkout").mkdir()  # a copy, because the build leaves files beside what it builds
    for name in _COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "checkout" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / "checkout")
    _call(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "checkout")
    shutil.rmtree(folder / "checkout")
    (packed,) = (folder / "dist").glob("*.tar.gz")
    (folder / "sdist").mkdir()
    _call("tar", "-xf", packed, "-C", folder / "sdist")
    (wheel,) = (folder / "dist").glob("*.whl")
    _call(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
    python = folder / "venv" / "bin" / "python"
    _call(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel)
    # A path in a .pth file is taken as it is: the .pth files in that folder, one of which may name a checkout, are not.
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (folder / "venv" / "lib" / version / "site-packages" / "borrowed.pth").write_text(
        sysconfig.get_path("purelib") + "\n"
    )


def _plain_environment() -> dict[str, str]:
    """Without what leads Python to a checkout."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PSS_"))}


def _call(*words: object) -> None:
    done = subprocess.run(
        list(map(str, words)), env=_plain_environment(), capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
