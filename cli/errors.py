"""How the three commands end: 0, or 2 with one sentence on stderr for what a user can put right (1 for what not)."""

from __future__ import annotations

import os
import sys

import typer

_TRACEBACK = "--traceback"


class Failed(Exception):
    """What ended a command and was no mistake of its user: one sentence, exit code 1."""


def run(app: typer.Typer, arguments: list[str] | None = None) -> None:
    """Run `app` on the command line and exit.

    `ValueError` and `OSError` are user errors. With --traceback anywhere on the command line, or PSS_TRACEBACK=1 in
    the environment, they are raised instead. Typer itself turns Ctrl-C into exit code 130.
    """
    # Waiting threads must not spin: the loader's threads and the model's share the cores, and a spinning team that
    # misses one member for a time slice costs ten times the step. Read once, when torch loads OpenMP; to set it later
    # would tell `pss.runtime.threads` what is not so.
    if "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = os.environ.get("PSS_TRACEBACK") == "1"
    if _TRACEBACK in arguments:
        arguments.remove(_TRACEBACK)
        debug = True
    try:
        app(args=arguments)
    except (ValueError, OSError) as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Failed as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
