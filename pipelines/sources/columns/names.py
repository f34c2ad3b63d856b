"""Sequences of names in little memory: those of a folder in one buffer, and full names put together on demand."""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import PurePosixPath
from typing import overload

import numpy as np

_FEW = 4  # names that take less memory as they are
_APART = "\0"  # in no name of a file
_AT_ONCE = 1 << 12  # names decoded together


class Names(Sequence[str], ABC):
    """Names that are put together when they are asked for; a slice is a list."""

    __slots__ = ()

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | slice) -> str | list[str]:
        return [self._name(i) for i in range(len(self))[at]] if isinstance(at, slice) else self._name(at)

    @abstractmethod
    def _name(self, at: int) -> str: ...


class PackedNames(Names):
    """Names in one buffer, with four bytes beside each; see `packed`."""

    __slots__ = ("_before", "_behind", "_buffer", "_ends")

    def __init__(self, before: str, buffer: bytes, behind: str, ends: array[int]) -> None:
        """All names begin with `before` and end with `behind`; the buffer holds what is between, in UTF-8 with a NUL
        after each but the last, and `ends` where that ends."""
        self._before, self._buffer, self._behind, self._ends = before, buffer, behind, ends

    def __len__(self) -> int:
        return len(self._ends)

    def _name(self, at: int) -> str:
        end = self._ends[at]
        start = self._ends[at - 1] + 1 if at % len(self._ends) else 0
        return self._before + self._decoded(start, end) + self._behind

    def __iter__(self) -> Iterator[str]:
        start, between = 0, f"{self._behind}{_APART}{self._before}"
        for last in range(_AT_ONCE - 1, len(self) + _AT_ONCE - 1, _AT_ONCE):
            end = self._ends[min(last, len(self) - 1)]
            some = self._decoded(start, end).replace(_APART, between)
            yield from f"{self._before}{some}{self._behind}".split(_APART)
            start = end + 1

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str) or not name.startswith(self._before) or not name.endswith(self._behind):
            return False
        own = name[len(self._before) : len(name) - len(self._behind)]
        return _encoded(own) in self._buffer and super().__contains__(name)

    def _decoded(self, start: int, end: int) -> str:
        return str(self._buffer[start:end], "utf-8", "surrogatepass")


def packed(names: Sequence[str]) -> Sequence[str]:
    """The same names in less memory, least where they are sorted: what all have in common is kept once. They may be
    any text, also what is no UTF-8 on the disk."""
    if len(names) < _FEW:
        return names
    whole = _APART.join(names)
    if whole.count(_APART) >= len(names):  # one of them holds a NUL itself
        return names
    first, last = names[0], names[-1]
    same = next((i for i, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))
    before, behind = first[:same], PurePosixPath(first).suffix
    between = f"{behind}{_APART}{before}"
    own = whole[len(before) : len(whole) - len(behind)].replace(between, _APART)
    if f"{before}{own.replace(_APART, between)}{behind}" != whole:  # not all have it in common
        before = behind = ""
        own = whole
    buffer = _encoded(own)
    found = np.append(np.flatnonzero(np.frombuffer(buffer, np.uint8) == 0), len(buffer))
    ends = array("I" if len(buffer) < 1 << 32 else "Q")
    ends.frombytes(found.astype(f"u{ends.itemsize}").tobytes())
    return PackedNames(before, buffer, behind, ends)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


class FullNames(Names):
    """The names of many folders, one folder after the other, each name behind that of its folder."""

    __slots__ = ("_count", "_groups", "_starts")

    def __init__(self) -> None:
        self._groups: list[tuple[str, Sequence[str]]] = []  # what comes before the names, and the names
        self._starts = array("q")  # number of the first name of each group
        self._count = 0

    @classmethod
    def of(cls, names: Sequence[str]) -> FullNames:
        """Full names, packed."""
        if isinstance(names, FullNames):
            return names
        made = cls()
        made.add("", packed(names))
        return made

    def add(self, folder: str, names: Sequence[str]) -> None:
        """The names of one more folder; those of "" are full names already. `names` must not change afterwards."""
        self._append(f"{folder}/" if folder else "", names)

    def extend(self, others: FullNames) -> None:
        """All of `others` behind these."""
        for before, names in others._groups:
            self._append(before, names)

    def under(self, root: str) -> FullNames:
        """These names as seen from a folder that holds `root`."""
        made = FullNames()
        for before, names in self._groups:
            made._append(f"{root}/{before}", names)
        return made

    def in_order(self) -> FullNames:
        """The same names, sorted."""
        if len(self._groups) == 1 and all(one <= other for one, other in pairwise(self._groups[0][1])):
            return self
        return FullNames.of(sorted(self))

    def _append(self, before: str, names: Sequence[str]) -> None:
        if names:
            self._groups.append((before, names))
            self._starts.append(self._count)
            self._count += len(names)

    def __len__(self) -> int:
        return self._count

    def _name(self, at: int) -> str:
        at = range(self._count)[at]
        group = bisect_right(self._starts, at) - 1
        before, names = self._groups[group]
        return before + names[at - self._starts[group]]

    def __iter__(self) -> Iterator[str]:
        for before, names in self._groups:
            for name in names:
                yield before + name
