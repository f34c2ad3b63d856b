"""What pss-eval writes: whether it can be written, asked before anything is measured, and the writing."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cli.errors import Failed

if TYPE_CHECKING:
    from pss.runtime.processes import World


def agree(world: World, check: Callable[[], None]) -> None:
    """Call `check` where files are written, on the main process; what it raises as `ValueError` all processes raise."""
    refusal = None
    if world.is_main:
        try:
            check()
        except ValueError as error:
            refusal = str(error)
    refusal = world.broadcast(refusal)
    if refusal is not None:
        raise ValueError(refusal)


def check_paths(*, output: Path | None, export: Path | None, push: Path | None) -> None:
    """Raise `ValueError` for what is named to be written and cannot be, before anything large is imported."""
    from pss.runtime.files import obstacle

    if os.environ.get("RANK", "0") != "0":  # the main process writes
        return
    for option, path in (("--output", output), ("--push", push)):
        if path is not None and (reason := obstacle(path, folder=True)) is not None:
            raise ValueError(f"{option} {path} cannot be written into: {reason}; name another folder")
    if export is not None and (reason := obstacle(export)) is not None:
        raise ValueError(f"--export {export} cannot be written: {reason}; name another file")


def check_folder(folder: Path, names: Iterable[str], *, given: bool) -> None:
    """Raise `ValueError` for a folder that files of these names cannot be written into; `given` as --output, or the
    one that follows from the runs."""
    from pss.runtime import files

    reason = files.obstacle(folder, folder=True)
    if reason is None:
        blocked = next((name for name in names if (folder / name).is_dir()), None)
        reason = None if blocked is None else f"{blocked} in it is a folder"
    if reason is None:
        return
    if given:
        raise ValueError(f"--output {folder} cannot be written into: {reason}; name another folder")
    raise ValueError(f"{folder}, where the results would go, cannot be written into: {reason}; name one with --output")


class Writing:
    """Results that are written one after the other: one that fails takes none of the others with it."""

    def __init__(self) -> None:
        self.written: list[str] = []
        self._failed: list[tuple[str, Exception]] = []

    @contextmanager
    def result(self, name: str) -> Iterator[None]:
        """Note whether what is done within succeeds."""
        try:
            yield
        except Exception as error:  # a picture that cannot be drawn is no reason to lose the table
            self._failed.append((name, error))
        else:
            self.written.append(name)

    def close(self) -> None:
        """Raise what failed, in one sentence: as `OSError`, `ValueError`, or `Failed` where no user can mend it."""
        if not self._failed:
            return
        from pipelines.base import in_words

        reasons = dict.fromkeys(in_words(error) for _, error in self._failed)
        named = {why: listed([name for name, error in self._failed if in_words(error) == why]) for why in reasons}
        told = "; ".join(f"{names} could not be written: {why}" for why, names in named.items())
        system = [error for _, error in self._failed if isinstance(error, OSError)]
        if any(not isinstance(error, OSError | ValueError) for _, error in self._failed):
            raise Failed(f"{told}; the results are above, and --traceback says more") from self._failed[0][1]
        if len(system) < len(self._failed):  # what says itself what to do
            raise ValueError(told) from self._failed[0][1]
        remedy = "make room" if all(one.errno in _FULL for one in system) else "mend that"
        raise OSError(f"{told}; {remedy} and run it again, or write to another disk") from system[0]


_FULL = (errno.ENOSPC, errno.EDQUOT)


def listed(names: Sequence[str]) -> str:
    """Names as a sentence lists them."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
