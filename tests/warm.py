"""`subprocess` for Python processes that need not import torch and timm anew: they are forked from one that has.

`Popen` and `run` take what those of `subprocess` take, as far as the tests use it. What they start is a process of its
own: pid, streams, environment, folder, session and exit code are its own, and signals end it. It differs from a fresh
Python in what is imported already, in a hash seed that it shares with the others of the same parent, and at its end:
it waits for its threads and calls what waits for the exit, but does not take its modules apart, which for torch takes
as long as a test. A test of the start itself, of what an import does, or of that end wants `subprocess`.

A parent starts with the first process that is wanted, ends with the tests, and has nothing but imports behind it: no
thread, no operation of torch, which a fork would not survive.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

ROOT = Path(__file__).parent.parent
MODULES = (
    "torch", "torchvision", "timm", "safetensors.torch", "torch.utils.tensorboard", "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict", "torch.distributed.elastic.multiprocessing.errors", "matplotlib.figure",
    "typer", "rich.console", "rich.progress", "pss.training.trainer", "pss.inference.sweep", "pss.inference.report",
    "pss.planning.plan", "pipelines.conversion.convert", "pipelines.conversion.verify", "pipelines.loaders.prefetch",
    "pipelines.loaders.torch_loader", "pipelines.loaders.probe",
)  # fmt: skip
"""What a parent imports. Not the modules that are commands, and nothing that starts threads, as FFCV does."""
_READ_ONCE = ("TRITON_INTERPRET",)  # variables that are read on import: for each value there is a parent
_LONGEST = 1 << 20  # bytes of a request
_ACTIONS = ("error", "ignore")
_USUAL_FILTERS = len(warnings.filters)


class Popen:
    """A process that has been started. Its streams, where they are pipes, are text."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        start_new_session: bool = False,
        text: bool = True,
    ) -> None:
        assert command[0] == sys.executable
        assert text
        assert stdin in (None, subprocess.DEVNULL)  # nothing to read, in either case
        environment = dict(os.environ if env is None else env)
        self.args, self.returncode = list(command), None
        self.stdout, theirs = _pipe(stdout, 1)
        self.stderr, theirs_too = _pipe(stderr, 2)
        self._line, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = {
            "words": self.args[1:], "env": environment, "cwd": str(cwd or Path.cwd()), "session": start_new_session,
        }  # fmt: skip
        with Path(os.devnull).open("rb") as nothing:
            streams = [far.fileno(), nothing.fileno(), theirs, theirs_too]
            socket.send_fds(_parent(environment), [json.dumps(request).encode()], streams)
        far.close()
        for given, mine in ((stdout, theirs), (stderr, theirs_too)):
            if given == subprocess.PIPE:
                os.close(mine)
        self._line.settimeout(60)
        self.pid = int(self._line.recv(64))

    returncode: int | None
    """Below 0 if a signal ended it; None while it runs."""

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._line.settimeout(timeout)
            try:
                told = self._line.recv(64)
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
            self._line.close()
            assert told, "the parent of the processes is gone"
            self.returncode = os.waitstatus_to_exitcode(int(told))
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it still says on its pipes, until they are closed; what was read before a timeout is not lost."""
        limit = None if timeout is None else time.monotonic() + timeout
        if not hasattr(self, "_readers"):
            self._told: dict[int, str] = {}
            streams = enumerate((self.stdout, self.stderr))
            self._readers = [threading.Thread(target=self._read, args=one, daemon=True) for one in streams]
            for reader in self._readers:
                reader.start()
        for reader in self._readers:
            reader.join(None if limit is None else max(0.0, limit - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
        self.wait(None if limit is None else max(0.0, limit - time.monotonic()))
        return self._told.get(0, ""), self._told.get(1, "")

    def _read(self, number: int, stream: IO[str] | None) -> None:
        if stream is not None and not stream.closed:
            with stream:
                self._told[number] = stream.read()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Popen:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        self.wait()


def run(
    command: Sequence[str],
    *,
    timeout: float | None = None,
    check: bool = False,
    capture_output: bool = False,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """`subprocess.run`."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = Popen(command, **options)
    try:
        said = process.communicate(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    assert process.returncode is not None
    done = subprocess.CompletedProcess(process.args, process.returncode, *said)
    if check:
        done.check_returncode()
    return done


def _pipe(given: int | None, usual: int) -> tuple[IO[str] | None, int]:
    """Our end of a pipe, if there is to be one, and what the process gets."""
    if given is None:
        return None, usual
    if given == subprocess.DEVNULL:
        return None, _devnull()
    assert given == subprocess.PIPE
    ours, theirs = os.pipe()
    return os.fdopen(ours, encoding="utf-8"), theirs


def _devnull() -> int:
    if "devnull" not in _parents:
        _parents["devnull"] = os.open(os.devnull, os.O_RDWR)
    return int(_parents["devnull"])


# Parents

_parents: dict[Any, Any] = {}
_starting = threading.Lock()


def _parent(environment: Mapping[str, str]) -> socket.socket:
    """The line to the parent whose imports have seen the same environment."""
    key = tuple(environment.get(name) for name in _READ_ONCE)
    with _starting:
        if key not in _parents:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LONGEST)
            alone = {"OMP_WAIT_POLICY": "PASSIVE", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            own = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "OMP_"))}
            own |= {name: value for name, value in zip(_READ_ONCE, key, strict=True) if value is not None}
            process = subprocess.Popen(
                [sys.executable, str(Path(__file__)), str(theirs.fileno())],
                cwd=ROOT, env=own | alone, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
            )  # fmt: skip
            theirs.close()
            _parents[key] = ours
            atexit.register(_end, process, ours)
        line: socket.socket = _parents[key]
        return line


def _end(process: subprocess.Popen[bytes], line: socket.socket) -> None:
    line.close()
    process.wait(10)


def _serve(line: socket.socket) -> dict[str, Any]:
    """In a parent: fork for each request, and tell how what was forked ended. Returns the request in the forked one."""
    watched = selectors.DefaultSelector()
    watched.register(line, selectors.EVENT_READ)
    while True:
        for ready, _ in watched.select():
            if ready.fileobj is line:
                message, files, _, _ = socket.recv_fds(line, _LONGEST, 4)
                if not message:
                    os._exit(0)
                answer, *streams = files
                if (pid := os.fork()) == 0:
                    for number, stream in enumerate(streams):
                        os.dup2(stream, number)
                    watched.close()  # both at once: later, their numbers will be those of other files
                    line.close()
                    os.closerange(3, max(int(path.name) for path in Path("/proc/self/fd").iterdir()) + 1)
                    return dict(json.loads(message))
                for stream in streams:
                    os.close(stream)
                with contextlib.suppress(BrokenPipeError):
                    os.write(answer, str(pid).encode())
                watched.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, answer))
            else:
                pid, answer = ready.data
                watched.unregister(ready.fileobj)
                os.close(ready.fd)
                _, status = os.waitpid(pid, 0)
                with contextlib.suppress(BrokenPipeError):
                    os.write(answer, str(status).encode())
                os.close(answer)


def _become(request: dict[str, Any], installed: list[str]) -> NoReturn:
    """In a forked process: be what `python WORDS` would be, and end as it would."""
    code = 0
    try:
        _run(request, installed)
    except SystemExit as leaving:
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
        code = int(isinstance(leaving.code, str)) or int(leaving.code or 0)  # type: ignore[arg-type]
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 0xFF)


def _run(request: dict[str, Any], installed: list[str]) -> None:
    import numpy as np
    import torch

    environment: dict[str, str] = request["env"]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request["session"]:
        os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(environment)
    words: list[str] = request["words"]
    actions = [action for action in environment.get("PYTHONWARNINGS", "").split(",") if action]
    while words[0] == "-W":
        actions.append(words[1])
        words = words[2:]
    imported = warnings.filters[: len(warnings.filters) - _USUAL_FILTERS]  # as if they had been imported after
    del warnings.filters[: len(imported)]
    for action in actions:
        assert action in _ACTIONS
        warnings.simplefilter(action)  # type: ignore[arg-type]
        sys.warnoptions.append(action)
    warnings.filters[:0] = imported
    warnings._filters_mutated()  # type: ignore[attr-defined]
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0)))))
    np.random.seed()  # noqa: NPY002 (what was inherited others have, too)
    torch.default_generator.seed()
    added = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path[:] = [request["cwd"], *added, *installed]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        sys.path[:] = ["", *added, *installed]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        sys.path[:] = [str(Path(words[0]).parent), *added, *installed]
        runpy.run_path(words[0], run_name="__main__")


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests; when they end, so does this
    own = {str(Path(__file__).parent), str(ROOT)}
    installed = [path for path in sys.path if path not in own]
    for name in MODULES:
        importlib.import_module(name)
    threads = list(Path("/proc/self/task").iterdir())
    assert len(threads) == 1, "an import has started a thread, which a fork would not take along"
    _become(_serve(socket.socket(fileno=int(sys.argv[1]))), installed)


if __name__ == "__main__":
    main()
