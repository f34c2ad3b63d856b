"""Files in an object store or behind HTTP, read and written whole, through whatever fsspec knows.

Loaders ask a store for nothing but the size of an object and its bytes. What arrives is held against the manifest; a
connection that drops, a server that is out of breath and bytes that are not the right ones are tried again for a
minute, with longer and longer pauses. What is missing, or may not be read or written, is said at once.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.base import DataError, in_words
from pipelines.extras import need, require
from pipelines.storage.manifest import FileEntry, hash_file

_log = logging.getLogger(__name__)

TRIES = 8
FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 30.0
_S3_TRIES = 2  # so that a download whose connection drops goes on where it was
_CONNECT_SECONDS, _READ_SECONDS = 30, 60  # without a byte, after which a connection counts as dropped

_S3, _HTTP = ("s3", "s3a"), ("http", "https")

_LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # what is wrong is not the store
_REFUSED = ("NoCredentialsError", "PartialCredentialsError", "NoAuthTokenError", "TokenRetrievalError")
"""Errors of botocore that are no `PermissionError`, and mean the same."""


class StoreError(DataError):
    """A store does not give, or take, what it is asked for; the same may go well at another time."""


class Missing(StoreError):
    """A store says that there is no such object."""


class Stopped(Exception):
    """What `alive` raises to end an attempt, and all others."""


def is_url(data: Any) -> bool:
    """Whether a data set is named by an address, such as s3://bucket/set, and not by a folder."""
    return isinstance(data, str) and "://" in data


def usual_folder() -> Path:
    """Where this machine keeps what is fetched and made, unless somebody says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pss"


@dataclass(frozen=True)
class Entry:
    """What a folder of a store holds under a name."""

    name: str
    """Empty where the store has a name that no disk could have: with nothing between two slashes."""
    size: int | None
    """In bytes; None of a folder, or where the store does not say."""
    version: str
    """Changes with the content, where the store tells; else the size."""
    folder: bool


class Store:
    """A folder at an address.

    Raises:
        DataError: fsspec, or what it reads such addresses with, is not installed; or it knows no such addresses.
    """

    def __init__(self, url: str, named: str = "--data") -> None:
        """`named` is the option that the address was given with, for messages."""
        self.url, self._named = url.rstrip("/"), named
        what = f"{named} {self.url}"
        self.protocol = protocol = url.partition("://")[0].lower()
        if protocol in _S3:
            need(what, "remote", "fsspec", "s3fs")
        elif protocol in _HTTP:
            need(what, "remote", "fsspec", "aiohttp")
        core = require("fsspec.core", "remote", what)
        self._callback = require("fsspec.callbacks", "remote", what).Callback
        try:
            # An instance of our own: others of this process may have other limits.
            self._files, self._path = core.url_to_fs(self.url, skip_instance_cache=True, **_options(protocol))
        except (ImportError, ValueError) as error:
            raise DataError(
                f"{what} cannot be opened: {in_words(error)}; install what it needs, or name another address"
            ) from error
        if self.protocol in _S3:
            self._files.retries = _S3_TRIES  # of s3fs within one of ours: five, each with a pause

    def at(self, folder: str) -> Store:
        """The same store, seen from a folder in it."""
        made = copy(self)
        made.url, made._path = f"{self.url}/{folder}", f"{self._path}/{folder}"
        return made

    def name(self, file: str) -> str:
        """The address of a file, for messages; without a query, which may hold a signature."""
        return f"{self.url}/{file.partition('?')[0] if self.protocol in _HTTP else file}".rstrip("/")

    def fetch(
        self,
        file: str,
        into: Path,
        expected: FileEntry | None,
        alive: Callable[[], object],
        tries: int | None = None,
    ) -> None:
        """Write a file of the data set to `into`, where nobody looks yet.

        Args:
            file: its name.
            into: is overwritten; what is there after a failure is of no use.
            expected: what it must be; None for any content.
            alive: called now and then while bytes arrive or the next attempt is waited for.
            tries: attempts; `TRIES` if None.

        Raises:
            DataError: it is not there, may not be read, or could not be had after all attempts.
        """
        self._insist(file, lambda: self._attempt(file, into, expected, alive), into, alive, tries)

    def read(
        self, file: str, offset: int = 0, length: int | None = None, alive: Callable[[], object] = lambda: None
    ) -> bytes:
        """Bytes of a file from `offset` on, up to its end where `length` is None; `alive` and errors as of `fetch`."""
        found = b""

        def attempt() -> str | None:
            nonlocal found
            end = None if length is None else offset + length
            try:
                found = self._files.cat_file(f"{self._path}/{file}", start=offset or None, end=end)
            except Exception as error:
                if not _beyond(error):
                    raise
                found = b""  # no part of an empty object can be asked for
            return None

        self._insist(file, attempt, alive=alive)
        return found

    def entries(self, folder: str = "", alive: Callable[[], object] = lambda: None) -> list[Entry]:
        """What is in a folder, in the order of the names; nothing where there is no such folder. `alive` as of `fetch`.

        Raises:
            DataError: as `fetch`, but for what is not there.
        """
        at = f"{self._path}/{folder}".rstrip("/")
        found: list[Entry] = []

        def attempt() -> str | None:
            try:
                self._files.invalidate_cache(at)
                listed = self._files.ls(at, detail=True)
            except FileNotFoundError as error:
                if not _absent(_reason(error)):
                    raise
                listed = []
            found[:] = _entries(at, listed, self.protocol in _S3)
            return None

        self._insist(folder, attempt, alive=alive)
        return found

    def find(self, file: str = "", alive: Callable[[], object] = lambda: None) -> Entry | None:
        """A file, or the folder itself; None where there is no such thing. `alive` and errors as of `entries`."""
        at = f"{self._path}/{file}".rstrip("/")
        found: list[Entry] = []

        def attempt() -> str | None:
            try:
                self._files.invalidate_cache(at)
                found[:] = [_entry(file, self._files.info(at))]
            except FileNotFoundError as error:
                if not _absent(_reason(error)):
                    raise
            return None

        self._insist(file, attempt, alive=alive)
        return found[0] if found else None

    def put(self, path: Path, file: str, alive: Callable[[], object] = lambda: None) -> None:
        """Write a file of this machine to the store; it appears there whole.

        Args:
            path: is read.
            file: its name in the store.
            alive: called now and then while bytes leave or the next attempt is waited for.

        Raises:
            DataError: it may not be written, or could not be after all attempts.
        """
        address = f"{self._path}/{file}"

        def attempt() -> str | None:
            callback = self._callback(hooks={"alive": lambda size, value, **more: alive()})
            self._files.put_file(str(path), address, callback=callback)
            alive()
            self._files.invalidate_cache(address)
            found, size = self._files.info(address).get("size"), path.stat().st_size
            return None if found in (None, size) else f"{found} of its {size} bytes arrived"

        self._insist(file, attempt, alive=alive, writing=True)

    def remove(self, entries: Sequence[Entry]) -> None:
        """Delete files, and folders with all that is in them. Raises as `put`."""

        def attempt() -> str | None:
            for folders in (False, True):  # of a file, it would ask what is in it
                paths = [f"{self._path}/{entry.name}" for entry in entries if entry.folder == folders]
                with suppress(FileNotFoundError):
                    _ = paths and self._files.rm(paths, recursive=folders)
            self._files.invalidate_cache()
            return None

        if entries:
            self._insist(entries[0].name, attempt, writing=True)

    def _insist(
        self,
        file: str,
        attempt: Callable[[], str | None],
        into: Path | None = None,
        alive: Callable[[], object] = lambda: None,
        tries: int | None = None,
        *,
        writing: bool = False,
    ) -> None:
        """Call `attempt`, which says what is wrong with what it got, until nothing is."""
        tries = TRIES if tries is None else tries
        begin = "written" if writing else "read"
        for number in range(1, tries + 1):
            try:
                wrong = attempt()
            except Stopped:
                raise
            except Exception as error:  # of every library that fsspec may use
                cause = _reason(error)
                if into is not None and isinstance(error, OSError) and error.errno in _LOCAL:
                    raise DataError(
                        f"{into} cannot be written ({in_words(error)}); name another disk with --cache-dir, or less of "
                        "it with --cache-gb"
                        if self._named == "--data"
                        else f"{into} cannot be written ({in_words(error)}); make room, or name another disk with "
                        "--work-dir"
                    ) from error
                if _denied(cause):
                    raise StoreError(
                        f"{self.name(file)} may not be {begin} from here ({_told(cause)}); give this machine the right "
                        "to, as the store's own tools would have it: of S3, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
                    ) from error
                if _absent(cause):
                    raise Missing(
                        f"{self.name(file)} cannot be written, as there is no such bucket; make it, or name another"
                        if writing
                        else f"{self.name(file)} is not there; see that the address is right and the upload complete"
                    ) from error
                wrong = _told(cause)
            if wrong is None:
                return
            if number < tries:
                self._pause(file, wrong, number, alive)
        on = "a run goes on with --resume" if self._named == "--data" else "the same command continues"
        raise StoreError(
            f"{self.name(file)} could not be written in {tries} attempts, the last time because {wrong}; see that the "
            f"store answers, and begin again: {on}"
            if writing
            else f"{self.name(file)} could not be had in {tries} attempts, the last time because {wrong}; see that the "
            f"store answers and the object is whole, and begin again: {on}"
        )

    def _attempt(self, file: str, into: Path, expected: FileEntry | None, alive: Callable[[], object]) -> str | None:
        """What is wrong with what was fetched; None if nothing is."""
        callback = self._callback(hooks={"alive": lambda size, value, **more: alive()})
        address = f"{self._path}/{file}"
        size = self._files.info(address).get("size")
        if expected is not None and size is not None and size != expected.bytes:
            return f"it has {size} bytes instead of {expected.bytes}"
        alive()
        self._files.get_file(address, str(into), callback=callback)
        found = into.stat().st_size
        if expected is None:
            return None if size in (None, found) else f"{found} of its {size} bytes arrived"
        if found != expected.bytes:
            return f"{found} of its {expected.bytes} bytes arrived"
        alive()
        return None if hash_file(into) == expected else "its bytes are not those of dataset.json"

    def _pause(self, file: str, wrong: str, attempt: int, alive: Callable[[], object]) -> None:
        seconds = min(_LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
        seconds *= random.uniform(0.75, 1.25)  # so that a thousand nodes do not all come back at once
        _log.warning("%s: %s; trying again in %.1f s", self.name(file), wrong, seconds)
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            alive()
            time.sleep(min(left, 1.0))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.url, self._named)


def _entries(at: str, listed: list[dict[str, Any]], of_s3: bool) -> list[Entry]:
    """Of what fsspec lists of the folder `at`; some stores list the folder itself, too, or an object that stands for
    it, which is empty. What S3 has under an empty name looks much like that."""
    at, found = at.rstrip("/"), []
    for one in listed:
        name = one["name"].rstrip("/")
        if name != at:
            found.append(_entry(name.rpartition("/")[2], one))
        elif of_s3 and one["name"] != at and (one["type"] == "directory" or one["size"]):
            found.append(_entry("", one))
    return sorted(found, key=lambda entry: entry.name)


def _entry(name: str, about: dict[str, Any]) -> Entry:
    if about.get("type") == "directory":
        return Entry(name, None, "", True)
    size = about.get("size")
    version = next((about[key] for key in _VERSIONS if about.get(key)), size)
    return Entry(name, None if size is None else int(size), str(version), False)


_VERSIONS = ("ETag", "etag", "md5Hash", "blob_id", "mtime", "LastModified", "last_modified", "Last-Modified")
"""What stores call that which changes with the content, the best first."""


def _reason(error: Exception) -> BaseException:
    """What went wrong: over HTTP, fsspec takes every failure to ask for a size for a missing file."""
    cause = error.__cause__
    http = isinstance(cause, TimeoutError) or type(cause).__module__.partition(".")[0] == "aiohttp"
    return cause if isinstance(error, FileNotFoundError) and cause is not None and http else error


def _told(error: BaseException) -> str:
    """In words; aiohttp's own of an answer are its parts with commas between them."""
    status = getattr(error, "status", None)
    return in_words(error) if status is None else f"the server answers {status}"


def _denied(error: BaseException) -> bool:
    """Whether it would be no use to ask again: this machine may not read the object."""
    status = getattr(error, "status", None)  # of aiohttp's errors
    return isinstance(error, PermissionError) or status in (401, 403) or type(error).__name__ in _REFUSED


def _absent(error: BaseException) -> bool:
    """Whether the store says that there is no such object."""
    return isinstance(error, FileNotFoundError) or getattr(error, "status", None) == 404


def _beyond(error: BaseException) -> bool:
    """Whether a part of an object was asked for that begins behind its end."""
    told = getattr(error.__cause__, "response", None) or {}
    return getattr(error, "status", None) == 416 or told.get("Error", {}).get("Code") == "InvalidRange"


def _options(protocol: str) -> dict[str, Any]:
    """How long a silent server is waited for. What else a store needs comes from its own environment variables, or
    from fsspec's (FSSPEC_S3_ENDPOINT_URL and the like)."""
    if protocol in _S3:
        waits: dict[str, Any] = {"connect_timeout": _CONNECT_SECONDS, "read_timeout": _READ_SECONDS}
        waits |= {"retries": {"total_max_attempts": 1}}  # the pauses are ours
        # One request an object; several objects are fetched at once.
        return {"config_kwargs": waits, "max_concurrency": 1, "use_listings_cache": False}
    if protocol in _HTTP:
        import aiohttp

        # By default all of a download must be over in five minutes.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_READ_SECONDS)
        return {"client_kwargs": {"timeout": timeout, "trust_env": True}, "use_listings_cache": False}
    return {}
