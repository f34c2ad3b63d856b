"""What a person sees while a run trains: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

_PLAIN_SECONDS = 20.0
_BAR, _NARROW_BAR = 20, 8
_ROOMY = 100
"""Columns from which the bar has its full width."""

Part = tuple[int, str]
"""A part of the line, and how soon it goes where there is no room: the highest number first; 0 stays."""


class TrainView:
    """Shows where the run is. Silent on every process but the main one."""

    def __init__(self, *, total_steps: int, done_steps: int, epochs: int, enabled: bool) -> None:
        self.console = Console(stderr=True, quiet=not enabled, highlight=False, markup=False, emoji=False)
        self._epochs = epochs
        self._total, self._first = total_steps, done_steps
        self._began = self._last_line = time.monotonic()
        self._live: Progress | None = None
        if enabled and self.console.is_terminal:
            bar = _BAR if self.console.width >= _ROOMY else _NARROW_BAR
            text = TextColumn(
                "{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")
            )
            self._live = Progress(
                BarColumn(bar_width=bar), text, console=self.console, refresh_per_second=4, transient=True
            )
            self._task = self._live.add_task("the first step: filling the queue, compiling", total=None)
            self._live.start()

    def step(
        self,
        step: int,
        *,
        epoch: int,
        rho: float,
        img_size: int,
        tokens: int | float,
        loss: float,
        images_per_second: float,
        data_wait: float,
        grad_norm: float,
        skipped: int,
        mfu: float | None = None,
    ) -> None:
        """Show the state after `step` optimizer steps."""
        parts: list[Part] = [
            (0, f"epoch {epoch + 1}/{self._epochs}"),
            (6, f"step {step}/{self._total}"),
            (7, f"{img_size} px"),
            (2, f"ρ {rho:.2g}"),
            (5, f"{tokens} tokens"),
            (1, f"loss {loss:.3f}"),
            (8, f"|g| {grad_norm:.2g}"),
            (1, f"{images_per_second:,.0f} img/s"),
            (4, f"MFU {mfu:.0%}" if mfu is not None else ""),
            (3, f"data wait {data_wait:.0%}"),
            (0, f"{skipped} skipped" if skipped else ""),
            (0, f"ETA {self._eta(step)}"),
        ]
        if self._live is not None:
            self._show(fitted(parts, self._room()), completed=step, total=self._total)
        elif time.monotonic() - self._last_line >= _PLAIN_SECONDS:
            self._last_line = time.monotonic()
            self.console.print("  ".join(text for _, text in parts if text), soft_wrap=True, markup=False)

    def validated(self, images: int, total: int) -> None:
        """Show that so many images of the validation split are done."""
        if self._live is not None:
            self._show(f"validating: {min(images, total):,} of {total:,} images", completed=images, total=total)

    def say(self, line: str) -> None:
        """Print a line that stays."""
        (self._live.console if self._live is not None else self.console).print(line, soft_wrap=True, markup=False)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()

    def _show(self, line: str, *, completed: int, total: int) -> None:
        assert self._live is not None
        self._live.update(self._task, completed=completed, total=total, description=line, refresh=True)

    def _room(self) -> int:
        width = self.console.width
        return width - (_BAR if width >= _ROOMY else _NARROW_BAR) - 1

    def _eta(self, step: int) -> str:
        done = step - self._first
        if done <= 0:
            return "–"
        seconds = (time.monotonic() - self._began) / done * (self._total - step)
        hours, rest = divmod(int(seconds), 3600)
        return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def fitted(parts: Sequence[Part], room: int) -> str:
    """The parts of a line, without those that must go for it to take `room` columns at most."""
    shown = [part for part in parts if part[1]]
    while cell_len(line := "  ".join(text for _, text in shown)) > room:
        worst = max(shown)
        if worst[0] == 0:
            break
        shown.remove(worst)
    return line
