"""Loggers of a user's own, loaded by name from outside the package."""

from __future__ import annotations

from pss.runs.loggers import Logger

CALLS: list[tuple] = []


class Notes(Logger):
    """Keeps what it is given."""

    def __init__(self, run):
        self.key = run.key or "first"
        CALLS.append(("begin", run.key, run.name))

    def add(self, row):
        CALLS.append((row["kind"], row["step"]))

    def picture(self, path, step):
        CALLS.append(("picture", path.name, step))

    def close(self):
        CALLS.append(("close",))


class Failing(Notes):
    """Fails at the third row."""

    def add(self, row):
        super().add(row)
        if row["step"] >= 4:
            raise ConnectionError("the server hung up")


class Hanging(Notes):
    """Never returns from the first row."""

    def add(self, row):
        import time

        time.sleep(1000)


class NoLogger:
    """Something else."""
