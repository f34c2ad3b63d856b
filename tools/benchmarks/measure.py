"""What the benchmarks share: rounds that take turns, quartiles, where figures are from, arguments, tables and files."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch

from pipelines.base import DataError

Result = dict[str, Any]
Outcome = TypeVar("Outcome")

PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312}
"""Dense half precision products a second, by a part of the device's name."""


def in_turns(
    cases: Mapping[str, Callable[[], Outcome]], rounds: int, *, warm_up: bool = True
) -> dict[str, list[Outcome]]:
    """What every case returns in every round, after one round that warms up.

    Whatever else the machine does falls on all cases: each has its turn in every round, and every other round goes
    backwards.
    """
    kept: dict[str, list[Outcome]] = {name: [] for name in cases}
    for number in range(-warm_up, rounds):
        for name in list(cases)[:: -1 if number % 2 else 1]:
            outcome = cases[name]()
            if number >= 0:
                kept[name].append(outcome)
    return kept


class ThreadTime:
    """Processor time of the thread that makes it, by part; of parts in parts the innermost counts.

    What entering and leaving a part takes, within it and around it, is found on empty ones and taken off.
    """

    def __init__(self, rest: str) -> None:
        """`rest` names what is outside every part."""
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._open = [rest]
        self._within = self._around = 0.0
        self._last = time.thread_time()
        empty = []
        for _ in range(500):
            self.taken()
            with self.part(""):
                pass
            with_part, without = self.taken(), self.taken()
            empty.append((with_part[""], with_part[rest] - without[rest]))
        self._within, self._around = map(statistics.median, zip(*empty, strict=True))

    def _turn(self) -> None:
        self._spent[self._open[-1]] += time.thread_time() - self._last
        self._last = time.thread_time()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Within, time belongs to the part `name`."""
        self._turn()
        self._open.append(name)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()
            self._spent[name] -= self._within
            self._spent[self._open[-1]] -= self._around

    def taken(self) -> dict[str, float]:
        """Seconds by part since the last call."""
        self._turn()
        spent = dict(self._spent)
        self._spent.clear()
        self._last = time.thread_time()
        return spent


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, median, third


def over(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Ratios, formed within each round: a machine whose speed drifts favours neither."""
    return [one / other for one, other in zip(ours, theirs, strict=True)]


def spread(values: Sequence[float], form: str) -> str:
    """The median and, in brackets, the quartiles; `form` as of a format."""
    first, median, third = quartiles(values)
    return f"{median:{form}} ({first:{form}}–{third:{form}})"


def cells(values: Sequence[float], form: str) -> str:
    """The median and the quartiles, as two cells of a table."""
    first, median, third = quartiles(values)
    return f"{median:{form}} | {first:{form}} to {third:{form}}"


def table(head: str, rows: Iterable[str]) -> list[str]:
    """The lines of a markdown table; cells are divided by " | "."""
    return [f"| {head} |", "|---" * (head.count(" | ") + 1) + "|", *(f"| {row} |" for row in rows)]


def wait_for(device: torch.device) -> None:
    """Until everything that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_tflops(device: str) -> float | None:
    """Of the device of that name, where it is known."""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in device), None)


def environment(device: torch.device, *packages: str) -> Result:
    """Where and with what figures were taken; `packages` are versions to name beside the usual ones."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    cpu = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "commit": commit.stdout.strip() or None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: _version(package) for package in ("triton", "timm", *packages)},
        "cpu": cpu[0] if cpu else platform.processor(),
        "threads": f"{torch.get_num_threads()} (OMP_WAIT_POLICY {os.environ.get('OMP_WAIT_POLICY')})",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def told(result: Result) -> str:
    """The environment of a result, as one line."""
    return ", ".join(f"{key} {value}" for key, value in result["environment"].items())


def page(result: Result, title: str, head: str, rows: Iterable[str]) -> str:
    """A report in markdown: what was measured, where, and one table."""
    return "\n".join([title, told(result), "", *table(head, rows)])


def parser(
    doc: str | None, *, rounds: int | None = None, device: str | None = None, threads: int | None = None
) -> argparse.ArgumentParser:
    """A parser with the arguments that every benchmark has, and with those whose default is given.

    Device "auto" stands for a GPU where there is one, and 0 threads for as many as torch takes by itself.
    """
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if rounds is not None:
        made.add_argument("--rounds", type=int, default=rounds, help="timed turns of every case")
    if device is not None:
        best = "cuda" if torch.cuda.is_available() else "cpu"
        made.add_argument("--device", default=best if device == "auto" else device, help="cpu or cuda")
    if threads is not None:
        made.add_argument("--threads", type=int, default=threads or torch.get_num_threads(), help="of the CPU")
    made.add_argument("--json", type=Path, help="where to write every single figure")
    made.add_argument("--markdown", type=Path, help="where to write the report, beside printing it")
    return made


def conclude(
    arguments: argparse.Namespace,
    measured: Callable[[argparse.Namespace], Result],
    report: Callable[[Result], str],
    *packages: str,
) -> Result:
    """Measure as the arguments say, publish the report, and return the result.

    It holds the arguments as `settings`, with those that `measured` returns under that name, and the `environment`.
    Data that cannot be used end the process with exit code 2 and a sentence.
    """
    if "threads" in arguments:
        torch.set_num_threads(arguments.threads)
    try:
        found = measured(arguments)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    settings = {key: value for key, value in vars(arguments).items() if key not in ("json", "markdown")}
    result = {
        **found,
        "settings": settings | found.get("settings", {}),
        "environment": environment(torch.device(vars(arguments).get("device", "cpu")), *packages),
    }
    publish(result, report(result), arguments)
    return result


def publish(result: Result, report: str, arguments: argparse.Namespace) -> None:
    """Print the report, and write it and the result where the arguments want them."""
    print(report)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")
    if arguments.markdown is not None:
        arguments.markdown.write_text(report + "\n", encoding="utf-8")
