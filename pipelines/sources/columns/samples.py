"""Samples, and sequences of them as columns."""

from __future__ import annotations

import errno
import os
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from pipelines.base import DataError
from pipelines.remote.objects import read_object
from pipelines.remote.store import Missing, is_url
from pipelines.sources.columns.names import FullNames, Names, packed

MAX_ENCODED = 256 << 20
"""Bytes of the largest encoded image that is read."""

_AT_ONCE = 1 << 16
_AHEAD = 16  # images that are on their way at the same time, for each process

Numbers = range | NDArray[np.int32]
"""Rows of columns."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One encoded image."""

    name: str
    """For messages and lists: the file, or the archive and the member."""
    label: int
    path: str
    """A file of this machine, or the address of an object, which is then all of the image."""
    offset: int = 0
    length: int | None = None
    """None: the whole file."""

    def read(self, alive: Callable[[], object] = lambda: None) -> bytes:
        """The encoded bytes; `DataError` or `OSError` where they cannot be had, and `StoreError` of an address, which
        may keep one waiting: `alive` is called meanwhile."""
        most = MAX_ENCODED + 1 if self.length is None else self.length
        if is_url(self.path):
            try:
                encoded = read_object(self.path, most, alive)
            except Missing as error:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.path) from error
        else:
            with Path(self.path).open("rb") as file:
                file.seek(self.offset)
                encoded = file.read(most)
        if len(encoded) > MAX_ENCODED:
            raise DataError(f"larger than {MAX_ENCODED >> 20} MiB")
        if self.length is not None and len(encoded) != self.length:
            raise DataError("its archive ends before it does")
        return encoded


class Columns(Protocol):
    """What `Samples` are views of."""

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def labels(self) -> Sequence[int]: ...

    def sample(self, i: int) -> Sample:
        """The sample of row `i`."""
        ...

    def __iter__(self) -> Iterator[Sample]:
        """All samples, in less time than one by one."""
        ...


class FileColumns:
    """Whole files."""

    def __init__(self, names: Sequence[str], labels: Sequence[int]) -> None:
        """As many `labels` as paths."""
        assert len(names) == len(labels)
        self.names, self.labels = names, labels

    def sample(self, i: int) -> Sample:
        name = self.names[i]
        return Sample(name, self.labels[i], name)

    def __iter__(self) -> Iterator[Sample]:
        return (Sample(name, label, name) for name, label in zip(self.names, self.labels, strict=True))


class RangeColumns:
    """Byte ranges of files: samples as they are found, at 24 bytes each beside their names."""

    def __init__(self, samples: Iterable[Sample] = ()) -> None:
        self.names = FullNames()
        self.labels: array[int] | list[int] = array("i")
        self._number_of: dict[str, int] = {}
        self._paths: list[str] = []
        self._file, self._offset, self._length = array("i"), array("q"), array("q")
        self.extend(samples)

    def extend(self, samples: Iterable[Sample]) -> None:
        """Further samples behind these."""
        left = iter(samples)
        while some := list(islice(left, _AT_ONCE)):
            self.names.add("", packed([one.name for one in some]))
            labels = [one.label for one in some]
            try:
                self.labels.extend(array("i", labels))
            except OverflowError:  # no label of a class: whoever counts them will name it
                self.labels = [*self.labels, *labels]
            for one in some:
                if (number := self._number_of.setdefault(one.path, len(self._paths))) == len(self._paths):
                    self._paths.append(one.path)
                self._file.append(number)
                self._offset.append(one.offset)
                self._length.append(-1 if one.length is None else one.length)

    def sample(self, i: int) -> Sample:
        length = self._length[i]
        path = self._paths[self._file[i]]
        return Sample(self.names[i], self.labels[i], path, self._offset[i], None if length < 0 else length)

    def __iter__(self) -> Iterator[Sample]:
        rows = zip(self.names, self.labels, self._file, self._offset, self._length, strict=True)
        return (
            Sample(name, label, self._paths[file], offset, None if length < 0 else length)
            for name, label, file, offset, length in rows
        )


class _RenamedNames(Names):
    __slots__ = ("_names", "_told")

    def __init__(self, names: Sequence[str], told: Callable[[str], str]) -> None:
        self._names, self._told = names, told

    def __len__(self) -> int:
        return len(self._names)

    def _name(self, at: int) -> str:
        return self._told(self._names[at])


class _Renamed:
    """Columns whose names are told otherwise."""

    def __init__(self, columns: Columns, told: Callable[[str], str]) -> None:
        self._columns, self._told = columns, told
        self.names, self.labels = _RenamedNames(columns.names, told), columns.labels

    def sample(self, i: int) -> Sample:
        return self._of(self._columns.sample(i))

    def __iter__(self) -> Iterator[Sample]:
        return map(self._of, self._columns)

    def _of(self, one: Sample) -> Sample:
        return Sample(self._told(one.name), one.label, one.path, one.offset, one.length)


class Samples(Sequence[Sample]):
    """Samples as rows of columns, each made when it is asked for. Slices are views. What is sent to another process is
    a plain list of its own samples."""

    __slots__ = ("_columns", "_numbers")

    def __init__(self, columns: Columns, numbers: Numbers | None = None) -> None:
        """Those of the rows `numbers`, or of all."""
        self._columns = columns
        self._numbers = range(len(columns.labels)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, at: int) -> Sample: ...
    @overload
    def __getitem__(self, at: slice) -> Samples: ...
    def __getitem__(self, at: int | slice) -> Sample | Samples:
        if isinstance(at, slice):
            return Samples(self._columns, self._numbers[at])
        return self._columns.sample(int(self._numbers[at]))

    def __iter__(self) -> Iterator[Sample]:
        if isinstance(self._numbers, range) and self._numbers == range(len(self._columns.labels)):
            return iter(self._columns)
        return (self._columns.sample(int(i)) for i in self._numbers)

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)

    def take(self, at: NDArray[np.int32]) -> Samples:
        """Those at the places `at`."""
        return Samples(self._columns, chosen(self._numbers, at))

    def renamed(self, told: Callable[[str], str]) -> Samples:
        """The same, called otherwise; whole files keep their names."""
        columns = self._columns
        return self if isinstance(columns, FileColumns) else Samples(_Renamed(columns, told), self._numbers)

    def name(self, at: int) -> str:
        """Of the one at place `at`."""
        return self._columns.names[int(self._numbers[at])]

    @property
    def labels(self) -> NDArray[np.int32]:
        """(len(self),)"""
        return column(np.asarray(self._columns.labels, dtype=np.int32), self._numbers)


def chosen(numbers: Numbers, at: NDArray[np.int32]) -> NDArray[np.int32]:
    """Which rows those at the places `at` among `numbers` are."""
    if isinstance(numbers, range):
        assert numbers.step == 1
        return at if numbers.start == 0 else at + np.int32(numbers.start)
    return numbers[at]


def column(values: NDArray[Any], numbers: Numbers) -> NDArray[Any]:
    """The rows `numbers` of a column; a view where they follow each other."""
    if isinstance(numbers, range):
        assert numbers.step == 1
        return values[numbers.start : numbers.stop]
    return values[numbers]


def file_samples(root: str, names: Sequence[str], labels: Sequence[int]) -> Samples:
    """Whole files as samples; `names` are relative to `root`, a folder or an address."""
    return Samples(FileColumns(FullNames.of(names).under(root), labels))


def reading(samples: Sequence[Sample], alive: Callable[[], object]) -> Iterator[Callable[[], bytes]]:
    """For one sample after the other, what returns its encoded bytes, or raises as `Sample.read`. Those that lie
    elsewhere are read ahead, some at a time: they take long to come, not much to read. `alive` as of `Sample.read`."""
    if not any(is_url(sample.path) for sample in samples):
        yield from (sample.read for sample in samples)
        return
    pool = ThreadPoolExecutor(_AHEAD, thread_name_prefix="pss-images")
    left = iter(samples)
    try:
        coming = deque(pool.submit(sample.read, alive) for sample in islice(left, _AHEAD))
        while coming:
            yield coming.popleft().result
            coming.extend(pool.submit(sample.read, alive) for sample in islice(left, 1))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
