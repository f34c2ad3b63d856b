"""The table of a sweep, for people."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
_SPREAD = re.compile(r"([\d.,e+-]+) \(([\d.,e+-]+)–([\d.,e+-]+)\)")
Column = tuple[str, Callable[[Row], str]]

COLUMNS: tuple[Column, ...] = (
    ("ρ", lambda row: _point(row)),
    ("tokens", lambda row: str(row["tokens"])),
    ("top-1 %", lambda row: f"{row['top1']:.2f}"),
    ("top-5 %", lambda row: f"{row['top5']:.2f}"),
    ("loss", lambda row: f"{row['loss']:.3f}"),
    ("GFLOPs", lambda row: f"{row['gflops']:.3g}" if row["gflops_low"] is None else _in_words(row, "gflops", ".3g")),
    ("images/s", lambda row: _in_words(row, "images_per_second", ",.0f")),
    ("with loader", lambda row: _in_words(row, "images_per_second_with_loader", ",.0f")),
    ("ms, batch 1", lambda row: _in_words(row, "latency_ms", ".3g")),
    ("MiB", lambda row: "–" if row["peak_memory_mib"] is None else f"{row['peak_memory_mib']:,.0f}"),
)
"""Heading and content of each column of the table, for people."""


def _point(row: Row) -> str:
    if row["rho"] is None:
        return "as trained"
    return f"{row['rho']:.3g}" if row["knob"] == "ρ" else f"{row['knob']} {row['rho']:.3g}"


def _in_words(row: Row, name: str, form: str) -> str:
    return f"{row[name]:{form}} ({row[name + '_low']:{form}}–{row[name + '_high']:{form}})"


def show(rows: Sequence[Row]) -> None:
    """Print the table."""
    console = Console(markup=False, emoji=False)  # names of runs are not to be read as either
    print(table_of(rows, console if console.is_terminal else None), end="")


def table_of(rows: Sequence[Row], console: Console | None = None) -> str:
    """The table as it is printed, as wide as `console`, or as it needs to be."""
    if console is None:
        width = max(200, 150 + max(cell_len(row["run"]) for row in rows))
        console = Console(width=width, markup=False, emoji=False)
    columns = _fitting(rows, console.width)
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("run", overflow="fold")
    for heading, _ in columns:
        table.add_column(heading, justify="right")
    last = None
    for row in rows:
        if last not in (None, row["run"]):
            table.add_section()
        table.add_row(row["run"] if row["run"] != last else "", *(text(row) for _, text in columns))
        last = row["run"]
    with console.capture() as printed:
        console.print(table)
    left = [heading for heading, _ in COLUMNS if heading not in dict(columns)]
    more = f"({', '.join(left)}: in rho.csv)\n" if left else ""
    return printed.get() + more + "".join(f"{told}\n" for told in slower_alone(rows))


def _fitting(rows: Sequence[Row], width: int) -> tuple[Column, ...]:
    """The columns as they fit: with the whole spread, or half its width, or without those that matter least."""
    shortest = tuple((heading, partial(_shorter, text)) for heading, text in COLUMNS)
    run = min(20, max(cell_len(row["run"]) for row in rows))
    choices: list[tuple[Column, ...]] = [COLUMNS, shortest]
    for unneeded in ("MiB", "loss", "top-5 %", "tokens"):
        choices.append(tuple(one for one in choices[-1] if one[0] != unneeded))
    for columns in choices:
        wanted = (max(cell_len(heading), *(cell_len(text(row)) for row in rows)) for heading, text in columns)
        if run + sum(cells + 2 for cells in wanted) <= width:
            break
    return columns


def _shorter(text: Callable[[Row], str], row: Row) -> str:
    """A median with its spread, low and high in brackets, as a median and how far the farther one is from it."""
    full = text(row)
    if (found := _SPREAD.fullmatch(full)) is None:
        return full
    middle, low, high = (float(number.replace(",", "")) for number in found.groups())
    return f"{found[1]} ±{max(high - middle, middle - low) / middle:.0%}" if middle else full


def slower_alone(rows: Sequence[Row]) -> list[str]:
    """A line for every run that keeps fewer tokens and takes longer over a single image, beyond the spread of both.

    What chooses tokens has costs of its own, which many images share and one does not.
    """
    lines = []
    for run in dict.fromkeys(row["run"] for row in rows):
        own = [row for row in rows if row["run"] == run and row["rho"] is not None]
        whole = max(own, key=lambda row: row["rho"], default=None)
        slower = [row for row in own if whole and row["latency_ms_low"] > whole["latency_ms_high"]]
        if whole and slower:
            points, best = ", ".join(f"{row['rho']:.3g}" for row in slower), f"{whole['knob']} {whole['rho']:.3g}"
            lines.append(
                f"{run}: a single image takes longer at {whole['knob']} {points} than at {best}; run it at {best}"
            )
    return lines
