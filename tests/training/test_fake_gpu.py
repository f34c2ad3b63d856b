"""Whole training steps on a GPU that is not there; the tests themselves are in on_a_fake_gpu.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("which", ["not exhaustive", pytest.param("exhaustive", marks=pytest.mark.exhaustive)])
def test_on_a_gpu_that_is_not_there(which: str) -> None:
    """In a process of its own: torch looks for devices once, when it first computes gradients."""
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-m", which]
    done = subprocess.run(
        [*command, str(HERE / "on_a_fake_gpu.py")],
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    print(done.stdout)
