"""What a person sees while a run trains: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

_PLAIN_SECONDS = 20.0


class TrainView:
    """Shows where the run is. Silent on every process but the main one."""

    def __init__(self, *, total_steps: int, done_steps: int, epochs: int, enabled: bool) -> None:
        self.console = Console(stderr=True, quiet=not enabled, highlight=False, markup=False, emoji=False)
        self._epochs = epochs
        self._total, self._first = total_steps, done_steps
        self._began = self._last_line = time.monotonic()
        self._live: Progress | None = None
        if enabled and self.console.is_terminal:
            columns = (BarColumn(bar_width=20), TextColumn("{task.description}", markup=False))
            self._live = Progress(*columns, console=self.console, refresh_per_second=4, transient=True)
            self._task = self._live.add_task("starting", total=total_steps, completed=done_steps)
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
        odd = f"  {skipped} skipped" if skipped else ""
        used = f"  MFU {mfu:.0%}" if mfu is not None else ""
        line = (
            f"epoch {epoch + 1}/{self._epochs}  step {step}/{self._total}  "
            f"{img_size} px  ρ {rho:.2g}  {tokens} tokens  "
            f"loss {loss:.3f}  |g| {grad_norm:.2g}  {images_per_second:,.0f} img/s{used}  "
            f"data wait {data_wait:.0%}{odd}  ETA {self._eta(step)}"
        )
        if self._live is not None:
            self._live.update(self._task, completed=step, description=line)
        elif time.monotonic() - self._last_line >= _PLAIN_SECONDS:
            self._last_line = time.monotonic()
            self.console.print(line, soft_wrap=True, markup=False)

    def say(self, line: str) -> None:
        """Print a line that stays."""
        (self._live.console if self._live is not None else self.console).print(line, soft_wrap=True, markup=False)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()

    def _eta(self, step: int) -> str:
        done = step - self._first
        if done <= 0:
            return "–"
        seconds = (time.monotonic() - self._began) / done * (self._total - step)
        hours, rest = divmod(int(seconds), 3600)
        return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
