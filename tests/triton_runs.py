"""Where Triton's kernels run in tests: on a GPU, else in its interpreter, in a process of its own.

The interpreter must be chosen before Triton is first imported, and torchvision imports it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import warm

ROOT = Path(__file__).parents[1]
ON_GPU = torch.cuda.is_available()
INTERPRETED = not ON_GPU and os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if ON_GPU else "cpu"
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
not_within = pytest.mark.skipif(ON_GPU or INTERPRETED, reason="the kernels run in this process")


def runs_kernels(starts: str) -> pytest.MarkDecorator:
    """Marks tests of kernels; without a GPU the test `starts` has them run in the interpreter."""
    return pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason=f"runs in the process that {starts} starts")


def run_interpreted(file: str, examples: str, *words: str) -> None:
    """Run the tests of `file`, as `words` say to pytest, in Triton's interpreter, with so many drawn examples each."""
    imported = "ignore::pytest.PytestAssertRewriteWarning"  # plugins are, before pytest could rewrite them
    done = warm.run(
        [sys.executable, "-m", "pytest", "-vv", "-W", imported, "-p", "no:cacheprovider", *words, file],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "PSS_KERNEL_EXAMPLES": examples},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " PASSED" in done.stdout


RESOURCES = """
import re, subprocess, tempfile
from pathlib import Path
import triton

def resources(compiled):
    '''What a compiled kernel takes of a multiprocessor: registers of a thread, spilled bytes, shared memory.'''
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = {key: int(value) for key, value in re.findall("(REG|STACK|LOCAL):([0-9]+)", usage.stdout)}
    return {"registers": found["REG"], "spilled": found["STACK"] + found["LOCAL"], "shared": compiled.metadata.shared}
"""
"""Python that defines `resources(compiled)`, for scripts of `printed_by`."""


def printed_by(script: str, given: Any, cache: Path) -> list[str]:
    """The lines that `script` prints, which compiles kernels for a GPU in a process of its own; no GPU is needed."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(given)],
        cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def assert_as_in_table(path: Path, case: str, found: dict[str, dict[str, int]]) -> None:
    """Compare what kernels take with the table at `path`; PSS_WRITE_TABLES=1 writes it anew.

    Another Triton than the table's compiles otherwise: then nothing may spill that did not, and no more is asked.
    """
    table = json.loads(path.read_text(encoding="utf-8"))
    if os.environ.get("PSS_WRITE_TABLES") == "1":
        table["kernels"][case], table["triton"] = found, version("triton")
        path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    expected = table["kernels"][case]
    if table["triton"] == version("triton"):
        assert found == expected, f"{path.name} says otherwise; if this is meant, write it anew"
    assert found.keys() == expected.keys()
    for name, took in found.items():
        assert bool(took["spilled"]) <= bool(expected[name]["spilled"]), (name, took)
