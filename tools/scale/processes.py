"""Processes that do what is measured, and their memory as seen from outside, where no lock of theirs delays a look."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

Task = dict[str, Any]
_LOOK_SECONDS = 0.005
_KINDS = {"anonymous": "RssAnon", "peak": "VmHWM"}


def memory(process: int | str = "self") -> dict[str, int]:
    """Bytes that a process has to itself (anonymous), and the most it has had in memory, mapped files included."""
    status = Path(f"/proc/{process}/status").read_text()
    found = {name: re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE) for name, field in _KINDS.items()}
    return {name: int(match[1]) << 10 for name, match in found.items() if match}


def serve(work: Callable[[Task, Callable[[str], None]], Task]) -> None:
    """Be such a process: say that all is imported, wait for the others, work, and print what was found.

    `work` is given its task, and a function that notes time, processor time and memory under a name.
    """
    task: Task = json.loads(sys.argv[1])
    marks: list[tuple[str, float, float, int]] = []
    print("ready", flush=True)
    sys.stdin.readline()

    def mark(name: str) -> None:
        marks.append((name, time.monotonic(), time.process_time(), memory()["anonymous"]))

    begun = memory()
    mark("begin")
    found = work(task, mark)
    mark("end")
    print(json.dumps({**found, "marks": marks, "begun": begun, "ended": memory()}), flush=True)


def watched(module: str, tasks: Sequence[Task]) -> list[Task]:
    """What `python -m module` finds, a process a task, all at once; with the most memory that each has had to itself
    beyond that at its beginning, `peak_anonymous`, in bytes."""
    started = [
        subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(task)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for task in tasks
    ]
    try:
        pipes = [(_opened(process.stdin), _opened(process.stdout)) for process in started]
        for process, (_, heard) in zip(started, pipes, strict=True):
            if heard.readline() != "ready\n":
                raise RuntimeError(f"{module} ended with exit code {process.wait()} before it began")
        for told, _ in pipes:
            told.write("\n")
            told.flush()
        peaks = [0] * len(started)
        done = threading.Event()
        looking = threading.Thread(target=_look, args=([process.pid for process in started], peaks, done))
        looking.start()
        try:
            lines = [heard.readline() for _, heard in pipes]
        finally:
            done.set()
            looking.join()
        found = [json.loads(line) for line in lines]
    finally:
        for process in started:
            process.kill()
            process.communicate()
    return [
        one | {"peak_anonymous": max(peak, *(bytes_ for *_, bytes_ in one["marks"])) - one["begun"]["anonymous"]}
        for one, peak in zip(found, peaks, strict=True)
    ]


def seconds(found: Task, first: str, last: str, *, processor: bool = False) -> float:
    """Between two marks of a process, or what it computed meanwhile."""
    one, other = (marked(found, name)[2 if processor else 1] for name in (first, last))
    return other - one


def marked(found: Task, name: str) -> tuple[str, float, float, int]:
    """Name, time, processor time and anonymous bytes at a mark of a process, the first of that name."""
    mark: tuple[str, float, float, int] = next(one for one in found["marks"] if one[0] == name)
    return mark


def _look(processes: Sequence[int], peaks: list[int], done: threading.Event) -> None:
    while not done.wait(_LOOK_SECONDS):
        for place, process in enumerate(processes):
            try:
                peaks[place] = max(peaks[place], memory(process).get("anonymous", 0))
            except OSError:  # it has ended
                continue


def _opened(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe
