"""A data set that is being made in a store: tars as they are finished, and what machines tell each other of the work.

URL/.partial/journal.json   what is being converted, and how
URL/.partial/work/HASH/     results of finished pieces, of the conversion with this journal
URL/                        tars and tables; they are a data set once dataset.json is there, which comes last

A store has no locks: two machines may do the same piece. What they write is the same, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipelines.base import DataError
from pipelines.remote.mirror import at_once
from pipelines.remote.store import Entry, Store, StoreError
from pipelines.storage.manifest import MANIFEST, FileEntry, Manifest, read_manifest

PARTIAL = ".partial"
_JOURNAL = f"{PARTIAL}/journal.json"
_WORK = f"{PARTIAL}/work"
_BEAT_SECONDS = 1.0
_AT_ONCE = 16  # small objects that are fetched at the same time
_OURS = re.compile(r"[a-z]+-\d{5,}\.(tar|idx)|[a-z]+\.samples\.npy|_info\.json|README\.md|classes\.txt")
"""What a conversion writes beside its journal and its results."""


class Depot:
    """The destination of a conversion at an address.

    Raises:
        DataError: it cannot be opened.
    """

    def __init__(self, url: str, of: str = "") -> None:
        """`of` says which conversion it serves, as `serve` does."""
        self.store = Store(url, "DEST")
        self.url, self._of = self.store.url, of

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.url, self._of)

    def serve(self, purpose: Mapping[str, Any]) -> None:
        """Results are from now on those of this conversion: another one may still be at work somewhere."""
        self._of = _digest(purpose)

    @property
    def _results(self) -> str:
        return f"{_WORK}/{self._of}"

    def insist(self) -> None:
        """Raise `DataError` where somebody has begun another conversion here, and `Missing` where all is removed."""
        try:
            other = _digest(json.loads(self.store.read(_JOURNAL))) != self._of
        except ValueError as error:
            if isinstance(error, DataError):
                raise
            other = True
        if other:
            raise DataError(f"another conversion to {self.url} has been begun meanwhile, with --restart; wait for it")

    def scratch(self, below: Path, purpose: Mapping[str, Any]) -> Path:
        """Where this machine works on it: another folder for another conversion to the same address."""
        return below / "converting" / _digest(self.url) / _digest(purpose) / "set"

    def manifest(self) -> Manifest | None:
        """Of the finished data set, if there is one."""
        if self.store.find(MANIFEST) is None:
            return None
        with tempfile.TemporaryDirectory() as folder:
            self.store.fetch(MANIFEST, Path(folder) / MANIFEST, None, lambda: None)
            return read_manifest(Path(folder))[0]

    def journal(self) -> dict[str, Any] | None:
        """What is being converted to here, and how; None if nothing is.

        Raises:
            DataError: there is a finished data set, or something else.
        """
        if not self._begun():
            return None
        try:
            told = json.loads(self.store.read(_JOURNAL))
        except ValueError:
            told = None
        if not isinstance(told, dict):
            raise DataError(f"{self.url}/{_JOURNAL} is damaged; begin again with --restart")
        return told

    def _begun(self) -> bool:
        names = {entry.name for entry in self.store.entries()}
        if MANIFEST in names:
            raise DataError(f"{self.url} already exists; remove it or choose another name")
        if not names or self.store.find(_JOURNAL) is not None:
            return bool(names)
        raise DataError(f"{self.url} already holds {min(names)}; remove it or choose another name")

    def begin(self, purpose: Mapping[str, Any], scratch: Path) -> None:
        """Write the journal."""
        self.write(_JOURNAL, json.dumps(purpose, indent=1).encode(), scratch)

    def write(self, name: str, content: bytes, scratch: Path, alive: Callable[[], object] = lambda: None) -> None:
        """Write an object, by way of a file in the folder `scratch`."""
        with _unfinished(scratch / name.rpartition("/")[2]) as path:
            path.write_bytes(content)
            self.store.put(path, name, alive)

    def note(self, name: str, content: bytes, scratch: Path) -> bytes:
        """What all machines of this conversion know under a name: what the first one says."""
        if self.store.find(f"{self._results}/{name}") is None:
            self.write(f"{self._results}/{name}", content, scratch)
            return content
        return self.store.read(f"{self._results}/{name}")

    def fetch_result(self, path: Path, alive: Callable[[], object] = lambda: None) -> bool:
        """Write a piece's result to `path`, called as the piece is; False if it is not finished."""
        if self.store.find(f"{self._results}/{path.name}") is None:
            return False
        self._fetch(path, alive)
        return True

    def fetch_results(self, paths: Sequence[Path]) -> None:
        """As `fetch_result`, of all pieces that are finished and not at their paths yet."""
        finished = {entry.name for entry in self.store.entries(self._results)}
        missing = deque(path for path in paths if path.name in finished and not path.exists())
        at_once(self._fetch, missing, _AT_ONCE, lambda _: None, lambda: None)

    def _fetch(self, path: Path, alive: Callable[[], object] = lambda: None) -> None:
        with _unfinished(path) as coming:
            self.store.fetch(f"{self._results}/{path.name}", coming, None, alive)
            coming.replace(path)

    def deliver(
        self, files: Iterable[Path], result: Path, content: bytes, alive: Callable[[], object] = lambda: None
    ) -> None:
        """Move the files of a finished piece to the store, and then its result, which is at `result` as well."""
        for file in files:
            self.insist()
            with _meanwhile(alive):  # a store may say nothing before all of a tar has left
                self.store.put(file, file.name, alive)
            file.unlink()
        with _unfinished(result) as path:
            path.write_bytes(content)
            self.store.put(path, f"{self._results}/{result.name}", alive)
            path.replace(result)

    def finish(self, folder: Path, files: Mapping[str, FileEntry]) -> None:
        """Bring what is in `folder`, its dataset.json last, once all `files` are there.

        Raises:
            DataError: a file is missing or has another size; nothing is a data set then.
        """
        self.insist()
        for path in sorted(folder.iterdir()):
            if path.name != MANIFEST:
                self.store.put(path, path.name)
        there = {entry.name: entry.size for entry in self.store.entries()}
        for name, expected in files.items():
            if there.get(name, 0) not in (None, expected.bytes):
                raise DataError(
                    f"{self.url}/{name} has {there.get(name, 0)} bytes instead of {expected.bytes}, though it was "
                    "written; see who else writes there, and begin again with --restart"
                )
        self.store.put(folder / MANIFEST, MANIFEST)
        with suppress(DataError):  # who may write need not be one who may remove, and it is a data set now
            self.store.remove([Entry(PARTIAL, None, "", folder=True)])

    def clear(self) -> None:
        """Remove all that an unfinished conversion has left here, and nothing else; raises as `journal`."""
        if not self._begun():
            return
        self.store.remove([entry for entry in self.store.entries() if not entry.folder and _OURS.fullmatch(entry.name)])
        for folder in (_WORK, PARTIAL):  # the journal stays while there is anything else
            self.store.remove([Entry(folder, None, "", folder=True)])
        if left := [name for entry in self.store.entries() if (name := entry.name) == PARTIAL or _OURS.fullmatch(name)]:
            raise StoreError(
                f"{self.url}/{left[0]} is still there, though it was to be removed; give this machine the right to (of "
                "S3, s3:DeleteObject), or name another address"
            )


def _digest(told: object) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def _unfinished(path: Path) -> Iterator[Path]:
    """A name beside `path` for what becomes it; what is left there is removed."""
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.unfinished")
    try:
        yield unfinished
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def _meanwhile(alive: Callable[[], object]) -> Iterator[None]:
    """Within, a thread calls `alive` now and then."""
    over = threading.Event()

    def call() -> None:
        with suppress(Exception):  # whoever is at work calls it, too
            while not over.wait(_BEAT_SECONDS):
                alive()

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def made(dest: Path | str, purpose: Mapping[str, Any]) -> Manifest | None:
    """The finished data set at a destination, if there is one and it is what `purpose` makes."""
    try:
        if isinstance(dest, Path):
            manifest = read_manifest(dest)[0] if (dest / MANIFEST).exists() else None
        else:
            manifest = Depot(dest).manifest()
    except DataError:
        return None  # whatever it is
    made = {} if manifest is None else {"source": manifest.made.get("source"), **manifest.made.get("options", {})}
    return manifest if made == json.loads(json.dumps(purpose)) else None
