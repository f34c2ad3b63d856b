"""What a run tells while it trains: rows of the log, lines on the screen, and the summary at its end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from pss.config import Config
from pss.methods import Method, Progress, Stage, mean_tokens
from pss.runs.log import RunLog, read_rows
from pss.runtime.processes import World
from pss.training.console import TrainView
from pss.training.meter import Meter
from pss.version import __version__

Row = dict[str, Any]


class Reporter:
    """Measures a run and reports on it. Every process has one, as sums are over all of them; the main one writes."""

    def __init__(self, config: Config, output: Path, method: Method, world: World) -> None:
        self.config, self.output, self.method, self.world = config, output, method, world
        self._costs: dict[tuple[Stage, int], int] = {}

    def open(self, *, step: int, last_step: int, epochs: int) -> None:
        """Begin to report, `step` steps into the run."""
        main = self.world.is_main
        self._log = RunLog(self.output, resume_step=step) if main else None
        self._view = TrainView(total_steps=last_step, done_steps=step, epochs=epochs, enabled=main)
        self.begin_epoch()

    def close(self) -> None:
        self._view.close()
        if self._log is not None:
            self._log.close()

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self._view.say(line)

    def begin_epoch(self) -> None:
        self._epoch_meter, self._meter = Meter(self.world), Meter(self.world)

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
        if self._log is not None:
            where = {"epoch": at.epoch, "rho": stage.rho, "img_size": size, "tokens": tokens}
            named = {"stage": stage.name} if stage.name else {}
            own = {**where, **named, "lr": lr, "skipped": skipped, **summary}
            if taken := extra.keys() & own.keys():
                raise ValueError(
                    f"method {self.method.name} returns {', '.join(sorted(taken))}, which means something else in the "
                    "log; call it otherwise"
                )
            self._log.write("step", step, **own, **extra)
        self._view.step(step, epoch=at.epoch, rho=stage.rho, img_size=size, tokens=tokens, skipped=skipped, **summary)
        self._meter.reset()

    def epoch(
        self, step: int, epoch: int, where: str, validation: dict[str, float], *, skipped: int, delivered_hash: int
    ) -> Row:
        """Report on an epoch, or on what was trained of it, and return its row of the log."""
        meter = self._epoch_meter
        row: Row = {"epoch": epoch, "train_seconds": self._epoch_seconds, **self._epoch_summary, **meter.saving()}
        row |= {"skipped": skipped, **validation}
        if self._log is not None:
            self._log.write("epoch", step, **row, by_rho=meter.by_stage(), samples_hash=f"{delivered_hash:08x}")
        averaged = f"  (average {row['ema_top1']:.2f} %)" if "ema_top1" in row else ""
        self.say(
            f"{where}  loss {row['loss']:.3f}  val loss {row['val_loss']:.3f}  "
            f"top-1 {row['top1']:.2f} %{averaged}  {row['train_seconds']:.1f} s  data wait {row['data_wait']:.0%}"
            + (f"  {skipped} steps skipped so far" if skipped else "")
        )
        return {"step": step, **row}

    def end_training(self) -> None:
        """Stop the epoch's clock: validation comes next. Every process must call it."""
        self._epoch_seconds, self._epoch_summary = self._epoch_meter.seconds, self._epoch_meter.summary()

    def summarise(self, *, step: int, epoch: int, total_steps: int, skipped: int) -> None:
        """Write `summary.json`: the run in a few numbers, over all its epochs, however often it was resumed."""
        epochs = read_rows(self.output, "epoch")
        best = max(epochs, key=score_of, default=None)
        summary = {
            "recipe": self.config.recipe,
            "version": __version__,
            "finished": step == total_steps,
            "step": step,
            "epoch": epoch,
            "processes": self.world.size,
            "train_seconds": sum(row["train_seconds"] for row in epochs),
            "skipped": skipped,
            "best": None if best is None else {"epoch": best["epoch"], "step": best["step"], "top1": score_of(best)},
            "last": epochs[-1] if epochs else None,
        }
        partial = self.output / "summary.partial"
        partial.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        partial.replace(self.output / "summary.json")


def score_of(row: Row) -> float:
    """What the best checkpoint is best in: top-1 of the weights or of their average, whichever is higher."""
    return max(float(row["top1"]), float(row.get("ema_top1", 0.0)))
