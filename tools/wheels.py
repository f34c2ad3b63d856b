"""A folder of wheels for a machine without package registries: what pss needs beside torch and what comes with it.

    python -m tools.wheels .whl --python 3.12
    python -m pip install --no-index --find-links .whl -r .whl/requirements.txt

The first line, where there is a registry, fetches what the trainer, the GPU suite and the tests import that is not in
`THERE`, in the versions of constraints.txt, for that Python on x86-64 Linux. The second installs, on the machine
itself, what it lacks; pip leaves alone what is there already. DALI, FFCV and what only conversion and export need stay
out.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent

WANTED = ("pydantic", "typer", "rich", "tensorboard", "pytest", "pytest-timeout", "hypothesis")
THERE = ("torch", "torchvision", "triton", "timm", "numba", "numpy", "pillow", "safetensors", "setuptools")
"""Comes with torch, torchvision, timm and numba, or with Python."""

_PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (34, 31, 28, 27, 24, 17)] + ["manylinux2014_x86_64"]


def requirements() -> list[str]:
    """`WANTED`, each with the versions that pyproject.toml admits."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = project["dependencies"] + project["optional-dependencies"]["dev"]
    admitted = {re.split(r"[^\w-]", line)[0]: line for line in lines}
    return [admitted[name] for name in WANTED]


def fetch(folder: Path, python: str) -> None:
    """Fill `folder` with wheels for that Python, and `requirements.txt`."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = folder / "requirements.txt"
    listed.write_text("\n".join(requirements()) + "\n", encoding="utf-8")
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--dest", str(folder)]
    words += ["--only-binary", ":all:", "--implementation", "cp", "--python-version", python]
    words += [word for platform in _PLATFORMS for word in ("--platform", platform)]
    words += ["--constraint", str(ROOT / "constraints.txt"), "--requirement", str(listed)]
    subprocess.run(words, check=True)
    drop(folder)


def drop(folder: Path) -> None:
    """Delete the wheels of what is there anyway, which the others need."""
    for wheel in folder.glob("*.whl"):
        if wheel.name.split("-")[0].replace("_", "-").lower() in THERE:
            wheel.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the wheels go")
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    parser.add_argument("--python", default=own, help="of the machine that they are for")
    arguments = parser.parse_args()
    try:
        fetch(arguments.folder, arguments.python)
    except subprocess.CalledProcessError as error:
        print(
            f"pip could not fetch the wheels (exit code {error.returncode}); its own words are above", file=sys.stderr
        )
        return 1
    wheels = list(arguments.folder.glob("*.whl"))
    size = sum(wheel.stat().st_size for wheel in wheels) / 1e6
    print(f"{len(wheels)} wheels, {size:.1f} MB, for Python {arguments.python}; on the machine they are for:")
    print(f"python -m pip install --no-index --find-links {arguments.folder} -r {arguments.folder}/requirements.txt")
    return 0


if __name__ == "__main__":
    sys.exit(main())
