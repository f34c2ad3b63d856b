"""How the three commands end: 0, or 2 with one sentence on stderr for what a user can put right (1 for what not)."""

from __future__ import annotations

import errno
import io
import os
import sys
from contextlib import suppress
from typing import Any, NoReturn

import typer

_TRACEBACK = "--traceback"
_REMEDIES = {
    errno.ENOSPC: "make room, or write to another disk",
    errno.EDQUOT: "make room, or write to another disk",
    errno.EROFS: "write to another disk",
    errno.ENAMETOOLONG: "choose a shorter one",
    errno.ENOTDIR: "move it away, or choose another path",
    errno.EEXIST: "move it away, or choose another path",
    errno.EISDIR: "name a file",
    errno.EACCES: "change who may read and write it, or choose another path",
    errno.EPERM: "choose another path",
    errno.ENOENT: "check the path",
}
_UsageError: Any = typer.BadParameter.__base__  # Typer brings its own copy of Click, or Click itself


class Failed(Exception):
    """What ended a command and was no mistake of its user: one sentence, exit code 1."""


def run(app: typer.Typer, arguments: list[str] | None = None) -> None:
    """Run `app` on the command line and exit.

    `ValueError` and `OSError` are user errors. With --traceback anywhere on the command line, or PSS_TRACEBACK=1 in
    the environment, they are raised instead. Typer itself turns Ctrl-C into exit code 130.
    """
    try:
        import pss  # noqa: F401
    except ImportError as error:  # another package has the name of one of ours
        _end(str(error), 2)
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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal cannot show must not end a command
            with suppress(OSError):
                stream.reconfigure(errors="backslashreplace")
    try:
        code = app(args=arguments, standalone_mode=False)
        flush()  # at the exit of the interpreter it would be too late to say that it failed
    except _UsageError as error:
        said = error.format_message().rstrip(".").replace("Value error, ", "")
        _end(f"{said}; {error.ctx.command_path if error.ctx else 'the command'} --help shows what there is", 2)
    except typer.Abort:
        _end("the input ended", 1)
    except (ValueError, OSError) as error:
        if debug:
            raise
        _end(sentence(error), 2)
    except Failed as error:
        if debug:
            raise
        _end(str(error), 1)
    sys.exit(code)


def sentence(error: Exception) -> str:
    """What a command says of an error: one line; of the system's own errors, file, reason and remedy in words."""
    if not isinstance(error, OSError) or error.errno is None:
        return " ".join(str(error).split()) or type(error).__name__
    from pipelines.base import in_words

    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    told = ": ".join([" and ".join(names), in_words(error)] if names else [in_words(error)])
    remedy = _REMEDIES.get(error.errno)
    return told if remedy is None else f"{told}; {remedy}"


def flush() -> None:
    """Say all that was printed; raises `OSError`, which names the standard output, where it cannot be said."""
    try:
        sys.stdout.flush()
    except OSError as error:
        # What is left in the buffer must not fail once more when the interpreter exits.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OSError(error.errno, error.strerror, "the standard output") from error


def _end(told: str, code: int) -> NoReturn:
    with suppress(OSError):
        flush()
    with suppress(OSError):  # whoever would read it is gone, and the exit code still says it
        told = " ".join(told.split())  # one line, whatever is in the names of files
        print(f"error: {''.join(one if one.isprintable() else ascii(one)[1:-1] for one in told)}", file=sys.stderr)
    sys.exit(code)
