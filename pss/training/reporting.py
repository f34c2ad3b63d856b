"""What a run tells while it trains: rows of the log, lines on the screen, and the summary at its end.

Nothing here ends a run: what cannot be written or shown is a warning, and the rows are tried again later. Sums travel
in the checkpoints, so that what is told of an epoch is of all of it, however often it was resumed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor

from pipelines.base import Batch
from pss.config import Config
from pss.inference.accuracy import Observe
from pss.methods import Method, Progress, Stage, mean_tokens
from pss.runs import checkpoint, records
from pss.runs.lock import CHECKPOINTS, SUMMARY
from pss.runs.log import AUGMENTED, LOG, RunLog, read_rows
from pss.runtime.files import in_words
from pss.runtime.processes import World
from pss.training import sheet
from pss.training.console import TrainView
from pss.training.meter import Meter

Row = dict[str, Any]

_log = logging.getLogger(__name__)


class Reporter:
    """Measures a run and reports on it. Every process has one, as sums are over all of them; the main one writes."""

    def __init__(self, config: Config, output: Path, method: Method, world: World, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self.config, self.output, self.method, self.world = config, output, method, world
        self._costs: dict[tuple[Stage, int], int] = {}
        self._log: RunLog | None = None
        self._view: TrainView | None = None
        self._told: set[str] = set()
        self._epoch_meter, self._meter = Meter(world), Meter(world)
        self._before_seconds = 0.0
        """What the epochs before this one took."""
        self._stopped_seconds: float | None = None
        """What was trained of this epoch took, once its clock was stopped."""
        self.pending: Row | None = None
        """What is to be told of an epoch whose validation is not over."""

    def open(self, *, step: int, last_step: int, epochs: int, **about: Any) -> None:
        """Begin to report, `step` steps into the run; `about` says in the log what goes on with it.

        Raises:
            OSError: the log of a run that is resumed cannot be rewritten.
        """
        main = self.world.is_main
        if main:
            self._log = log = RunLog(self.output, resume_step=step)
        self._view = TrainView(total_steps=last_step, done_steps=step, epochs=epochs, enabled=main and not self._quiet)
        if main:
            names, settings = self.config.train.loggers, self.config.to_dict()
            self._attempt("the loggers", lambda: log.show(names, settings, self.say))
            self._write("start", step, **records.STAMP, processes=self.world.size, **about)

    def close(self) -> None:
        """Stop reporting."""
        for part in (self._view, self._log):
            if part is not None:
                self._attempt("the end of the report", part.close)

    def say(self, line: str) -> None:
        """Print a line that stays."""
        if (view := self._view) is not None:
            self._attempt("the console", lambda: view.say(line))

    def picture(self, images: Tensor, total_steps: int, autocast: AbstractContextManager[Any]) -> None:
        """Keep a picture of the run's first images (B, 3, S, S) and of what of them is kept; the run is as before."""
        if (log := self._log) is not None:
            self._attempt(AUGMENTED, lambda: log.picture(self._sheet(images[: sheet.IMAGES], total_steps, autocast), 0))

    def _sheet(self, images: Tensor, total_steps: int, autocast: AbstractContextManager[Any]) -> bytes:
        rows: list[sheet.Row] = []
        if self.config.train.parallel != "fsdp" or self.world.size == 1:  # shards compute together, or not at all
            rows = sheet.seen(self.method, images, sheet.levels(self.method, total_steps), autocast)
        return sheet.draw(images, rows, self.config.data, self.method.knob)

    def watch(self, passed: int, passes: int, num_images: int) -> Observe:
        """What shows how far validation is, of `passes` over `num_images` images of which `passed` are done."""
        done = passed * num_images

        def observe(batch: Batch, images: Tensor, logits: list[Tensor]) -> None:
            nonlocal done
            done += len(images) * self.world.size
            if (view := self._view) is not None:
                self._attempt("the console", lambda: view.validated(done, passes * num_images))

        return observe

    def state(self) -> Row:
        """All sums, for a checkpoint. Every process must call it."""
        return {
            "before_seconds": self._before_seconds,
            "epoch": self._epoch_meter.state(),
            "interval": self._meter.state(),
            "pending": self.pending,
        }

    def load_state(self, state: Row) -> None:
        """Go on with the sums of a checkpoint."""
        self._before_seconds, self.pending = state["before_seconds"], state["pending"]
        if len(state["epoch"]["per_rank"]) == self.world.size:  # else it is from the end of an epoch
            self._epoch_meter.load_state(state["epoch"])
            self._meter.load_state(state["interval"])

    def begin_epoch(self, *, resumed: bool) -> None:
        """Start the clocks: anew, or, inside an epoch, from where they were."""
        self._stopped_seconds = None
        for meter in (self._epoch_meter, self._meter):
            meter.start() if resumed else meter.reset()

    def add(self, images: Tensor, measured: Tensor, wait_seconds: float, at: Progress) -> None:
        """Count a step; see `Meter.add`."""
        stage = self.method.stage(at)
        level = stage, images.shape[-1]
        if level not in self._costs:
            self._costs[level] = self.method.training_cost(*level).training
        for meter in (self._meter, self._epoch_meter):
            meter.add(len(images), measured, wait_seconds, stage, self._costs[level])

    def step(self, step: int, at: Progress, out: dict[str, Tensor], *, lr: float, skipped: int) -> None:
        """Report on the steps since the last time; `out` is what the method returned for the newest."""
        summary = self._meter.summary()
        stage, size = self.method.stage(at), self.config.data.train_size(at.epoch)
        tokens = mean_tokens(self.method.training_tokens(stage, size))
        extra = {name: float(value) for name, value in out.items() if name != "loss"}
        where = {"epoch": at.epoch + 1, "rho": stage.rho, "img_size": size, "tokens": tokens}
        named = {"stage": stage.name} if stage.name else {}
        own = {**where, **named, "lr": lr, "skipped": skipped, **summary}
        if taken := extra.keys() & {"kind", "step", "time", *own}:
            raise ValueError(
                f"method {self.method.name} returns {', '.join(sorted(taken))}, which means something else in the "
                "log; call it otherwise"
            )
        self._write("step", step, **own, **extra)
        if (view := self._view) is not None:
            self._attempt(
                "the console",
                lambda: view.step(
                    step, epoch=at.epoch, rho=stage.rho, img_size=size, tokens=tokens, skipped=skipped, **summary
                ),
            )
        self._meter.reset()

    def end_training(self, *, step: int, epoch: int, complete: bool, skipped: int, delivered_hash: int) -> None:
        """Stop the epoch's clock: what was trained of it is to be saved, then validated. Every process must call it.

        Args:
            step: of the run.
            epoch: how many are complete.
            complete: whether the last one is.
            skipped: steps of the run.
            delivered_hash: of the samples of the epoch.
        """
        meter = self._epoch_meter
        number = epoch if complete else epoch + 1
        row: Row = {"step": step, "epoch": number, "complete": complete, "train_seconds": meter.seconds}
        row |= meter.summary() | {"skipped": skipped, "by_rho": meter.by_stage()}
        self._attempt("what the schedule saved", lambda: row.update(meter.saving()))
        self.pending = row | {"samples_hash": f"{delivered_hash:08x}"}
        self._stopped_seconds = 0.0 if complete else row["train_seconds"]
        if complete:
            self._before_seconds += row["train_seconds"]
            meter.reset()
            self._meter.reset()

    def told(self) -> Row | None:
        """The row of the epoch that is pending, if it is in the log already. On the main process."""
        pending = self.pending
        assert pending is not None
        return next((row for row in read_rows(self.output, "epoch") if row["step"] == pending["step"]), None)

    def epoch(self, validation: dict[str, float], where: str) -> Row:
        """Report on the epoch that is pending, or on what was trained of it, and return its row of the log."""
        assert self.pending is not None
        row, self.pending = self.pending | validation, None
        self._write("epoch", **row)
        averaged = f"  (average {row['ema_top1']:.2f} %)" if "ema_top1" in row else ""
        validated = f"  val loss {row['val_loss']:.3f}  top-1 {row['top1']:.2f} %{averaged}" if "top1" in row else ""
        self.say(
            f"{where}  loss {row['loss']:.3f}{validated}  {row['train_seconds']:.1f} s  "
            f"data wait {row['data_wait']:.0%}" + (f"  {row['skipped']} steps skipped so far" if row["skipped"] else "")
        )
        return row

    def summarise(self, *, step: int, epoch: int, total_steps: int, skipped: int) -> None:
        """Write `summary.json`: the run in a few numbers, over all its epochs, however often it was resumed.

        Raises:
            OSError: it, or a row of the log, cannot be written.
        """
        rows = read_rows(self.output, "epoch")
        best = checkpoint.read_best(self.output / CHECKPOINTS)
        summary = {
            "recipe": self.config.recipe,
            "finished": step == total_steps,
            "step": step,
            "epoch": epoch,
            "processes": self.world.size,
            "train_seconds": self._before_seconds + self._running_seconds(),
            "skipped": skipped,
            "best": None if best is None else _best_of(best, rows),
            "last": rows[-1] if rows else None,
        }
        try:
            records.write(self.output / SUMMARY, summary)
        except OSError as error:
            raise OSError(f"{self.output / SUMMARY} cannot be written ({in_words(error)}); make room there") from error
        if self._log is not None and self._log.unwritten:
            raise OSError(
                f"{self._log.unwritten} rows could not be written to {self.output / LOG}; the checkpoints are whole: "
                "make room there"
            )

    def _running_seconds(self) -> float:
        if self._stopped_seconds is not None:
            return self._stopped_seconds
        return self._epoch_meter.seconds if self._epoch_meter.steps else 0.0

    def _write(self, kind: str, step: int, **values: Any) -> None:
        if (log := self._log) is not None:
            self._attempt(LOG, lambda: log.write(kind, step, **values))

    def _attempt(self, what: str, act: Callable[[], Any]) -> None:
        try:
            act()
        except Exception as error:  # whatever reports, the run goes on
            if what not in self._told:
                self._told.add(what)
                _log.warning("%s failed (%s: %s); the run goes on", what, type(error).__name__, in_words(error))


def score_of(row: Row) -> tuple[float, str] | None:
    """What the best checkpoint is best in, top-1, and whether of the weights (`method`) or their average (`ema`); None
    for an epoch that was not validated."""
    if "top1" not in row:
        return None
    plain, average = float(row["top1"]), float(row.get("ema_top1", -1.0))
    return (average, "ema") if average > plain else (plain, "method")


def _best_of(best: records.Best, rows: list[Row]) -> Row:
    epoch = next((row["epoch"] for row in rows if row["step"] == best["step"]), None)
    return {"epoch": epoch, "step": best["step"], "top1": best["score"], "weights": best.get("weights", "method")}
