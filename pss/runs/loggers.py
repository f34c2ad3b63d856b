"""Who shows the rows of a run's log: TensorBoard, Weights & Biases, MLflow, and classes of the user's own.

`log.jsonl` is the source. A logger is given its rows as they are written, and none can end or change a run: one that
fails is told of once, and the run goes on without it.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.extras import need
from pss.plugins import is_plugin, load
from pss.runs import records
from pss.runtime.files import in_words

STATE = "loggers.json"
TENSORBOARD = "tensorboard"

Say = Callable[[str], None]

_NO_SCALARS = ("kind", "step", "time")
_KINDS = ("step", "epoch")
_PARAMS, _PARAM_LENGTH = 100, 500  # of a batch, and of the oldest MLflow servers
_PATIENCE_SECONDS = 60.0  # for what a logger has yet to send when the run is over

_log = logging.getLogger(__name__)


def nowhere(line: str) -> None:
    """Prints nothing."""


@dataclass(frozen=True)
class Run:
    """The run that is logged."""

    folder: Path
    config: Mapping[str, Any]
    """All its settings, as `config.json` has them."""
    key: str | None = None
    """What this logger called the run when it began; None where it begins."""
    say: Say = nowhere
    """Prints a line that stays."""

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def flat(self) -> dict[str, Any]:
        """The settings by their full names, as `--set` takes them."""
        return dict(_flat(self.config))


class Logger:
    """What shows the rows of a run; made in the main process alone. All calls come from one thread, which is not the
    one that trains, so that the run waits for none of them."""

    key: str | None = None
    """Names the run in the logger's own store: a resumed run is given it as `Run.key`."""

    def __init__(self, run: Run) -> None:
        """Begin, or go on with what `run.key` names."""

    def add(self, row: Mapping[str, Any]) -> None:
        """Show a row of `log.jsonl`; its `kind` is `start`, `step` or `epoch`. After a resume only those come that were
        not shown before the run was stopped, so that each step and epoch comes once."""

    def picture(self, path: Path, step: int) -> None:
        """Show a picture, a PNG."""

    def close(self) -> None:
        """The run is over, or stopped."""


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row by name, `KIND/NAME`: of one that has a place in a curve."""
    if row["kind"] not in _KINDS:
        return {}
    return {
        f"{row['kind']}/{name}": value
        for name, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in _NO_SCALARS
    }


def check(names: Sequence[str]) -> None:
    """Raise `ValueError` for what is no logger, and `DataError` where its package is not installed."""
    for name in names:
        if name == "wandb":
            need("train.loggers=wandb", "wandb", "wandb")
        if name == "mlflow":
            need("train.loggers=mlflow", "mlflow", "mlflow")
        if is_plugin(name) and not (isinstance(kind := load(name), type) and issubclass(kind, Logger)):
            raise ValueError(f"train.loggers: {name} is no logger; derive it from pss.runs.loggers.Logger")


class WandB(Logger):
    """Weights & Biases. Its own environment variables say where: WANDB_PROJECT, WANDB_MODE, WANDB_DIR and others."""

    def __init__(self, run: Run) -> None:
        import wandb

        where = os.environ.get("WANDB_DIR") or str(run.folder)
        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "pss",
            name=os.environ.get("WANDB_NAME") or run.name,
            dir=where,
            id=run.key,
            resume="allow",
            config=dict(run.config),
            settings=wandb.Settings(console="off", silent=True, login_timeout=30),
        )
        self.key = self._run.id
        if not self._run.offline:
            run.say(f"Weights & Biases: {self._run.url}")
        elif not self._run.disabled:
            run.say(f"Weights & Biases: offline; wandb sync {where}/wandb/offline-run-*-{self.key} uploads it")

    def add(self, row: Mapping[str, Any]) -> None:
        if found := scalars(row):
            self._run.log(found, step=row["step"])

    def picture(self, path: Path, step: int) -> None:
        self._run.log({path.stem: self._wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow(Logger):
    """MLflow. Its own environment variables say where: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and others."""

    def __init__(self, run: Run) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric, self._client = Metric, MlflowClient()
        if run.key is not None:
            self.key = run.key
            self._client.update_run(self.key, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "pss"
        experiment = self._client.get_experiment_by_name(name)
        number = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        self.key = self._client.create_run(number, run_name=run.name).info.run_id
        settings = [Param(name, str(value)[:_PARAM_LENGTH]) for name, value in run.flat().items()]
        for begin in range(0, len(settings), _PARAMS):
            self._client.log_batch(self.key, params=settings[begin : begin + _PARAMS])
        run.say(f"MLflow: run {self.key} of experiment {name}")

    def add(self, row: Mapping[str, Any]) -> None:
        milliseconds = round(1000 * row.get("time", time.time()))
        metrics = [self._metric(name, value, milliseconds, row["step"]) for name, value in scalars(row).items()]
        if metrics:
            self._client.log_batch(self.key, metrics=metrics)

    def picture(self, path: Path, step: int) -> None:
        self._client.log_artifact(self.key, str(path))

    def close(self) -> None:
        self._client.set_terminated(self.key)


BUILT_IN: dict[str, type[Logger]] = {"wandb": WandB, "mlflow": MLflow}


class Apart:
    """A logger in a thread of its own: it is waited for at the end of the run alone, and what it raises ends it."""

    def __init__(self, name: str, run: Run) -> None:
        self.name, self._run = name, run
        self._calls: queue.SimpleQueue[Callable[[Logger], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name=f"logger {name}", daemon=True)
        self._thread.start()

    def add(self, row: Mapping[str, Any]) -> None:
        self._calls.put(lambda logger: logger.add(row))

    def picture(self, path: Path, step: int) -> None:
        self._calls.put(lambda logger: logger.picture(path, step))

    def close(self) -> None:
        """Wait for what it has yet to do, for a minute at most."""
        self._calls.put(None)
        self._thread.join(_PATIENCE_SECONDS)
        if self._thread.is_alive():
            _log.warning(
                "logger %s is still sending after %.0f s; the run ends without it", self.name, _PATIENCE_SECONDS
            )

    def _serve(self) -> None:
        try:
            kind = BUILT_IN.get(self.name) or load(self.name)
            logger = kind(self._run)
            _remember(self._run.folder, self.name, logger.key or "")
            while (call := self._calls.get()) is not None:
                call(logger)
            logger.close()
        except BaseException as error:  # whatever reports, the run goes on
            reason = in_words(error)
            _log.warning(
                "logger %s failed (%s: %s); the run goes on without it", self.name, type(error).__name__, reason
            )


_remembering = threading.Lock()


def keys_of(folder: Path) -> dict[str, str]:
    """What each logger calls the run in `folder`; nothing where none has begun, or the file cannot be read."""
    try:
        found = json.loads((folder / STATE).read_text(encoding="utf-8"))
        return {name: key for name, key in found.items() if isinstance(key, str) and name not in records.STAMP}
    except (OSError, ValueError, AttributeError):
        return {}


def _remember(folder: Path, name: str, key: str) -> None:
    with _remembering:
        known = keys_of(folder)
        if known.get(name) != key:
            records.write(folder / STATE, {**known, name: key})


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
