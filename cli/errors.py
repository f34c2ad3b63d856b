"""How the three commands end: 0, or 2 with one sentence on stderr for what a user can put right (1 for what not)."""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

import typer

_TRACEBACK = "--traceback"
_UsageError: Any = typer.BadParameter.__base__  # Typer brings its own copy of Click, or Click itself


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
        code = app(args=arguments, standalone_mode=False)
    except _UsageError as error:
        said = error.format_message().rstrip(".").replace("Value error, ", "")
        _leave(f"{said}; {error.ctx.command_path if error.ctx else 'the command'} --help shows what there is", 2)
    except typer.Abort:
        _leave("the input ended", 1)
    except (ValueError, OSError) as error:
        if debug:
            raise
        _leave(error, 2)
    except Failed as error:
        if debug:
            raise
        _leave(error, 1)
    sys.exit(code)


def _leave(message: object, code: int) -> NoReturn:
    """One line, whatever was given on the command line and is quoted in it."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(code)
