"""Single objects by their addresses, from stores that each process opens once."""

from __future__ import annotations

import threading
from collections.abc import Callable

from pipelines.base import DataError
from pipelines.remote.store import Store, StoreError

_stores: dict[str, Store] = {}
_opening = threading.Lock()


def read_object(address: str, most: int, alive: Callable[[], object] = lambda: None) -> bytes:
    """The first `most` bytes of an object of a source, or all that it has.

    Args:
        address: of the object, such as s3://bucket/photos/cat/1.jpg.
        most: so many are asked for.
        alive: called now and then while the next attempt is waited for.

    Raises:
        Missing: there is no such object.
        StoreError: it cannot be had.
    """
    protocol, _, rest = address.partition("://")
    where, _, name = rest.partition("/")
    return _store(f"{protocol}://{where}").read(name, 0, most, alive)


def _store(url: str) -> Store:
    with _opening:
        if url not in _stores:
            try:
                _stores[url] = Store(url, "SOURCE")
            except DataError as error:  # another machine than the one that has listed the source may lack what it needs
                raise StoreError(str(error)) from error
        return _stores[url]
