"""Where the installed commands begin: `cli` is imported once it is known to be ours."""

from __future__ import annotations

import sys
from importlib import import_module

from pss.neighbours import check


def convert() -> None:
    """pss-convert."""
    _run("convert")


def train() -> None:
    """pss-train."""
    _run("train")


def evaluate() -> None:
    """pss-eval."""
    _run("eval")


def _run(command: str) -> None:
    try:
        check("cli", "pipelines")
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    import_module(f"cli.{command}").main()  # by name: the package imports nothing of the commands
