"""Label maps: dense targets that belong to the samples of a split, one each, in a .npy file."""

from __future__ import annotations

import hashlib
import mmap
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.base import DataError, in_words
from pipelines.storage.reading import DiskWaits

_ROWS_IN_FINGERPRINT = 64


class LabelMaps:
    """The rows of a .npy file, mapped into memory: row i is the map of sample i of the split, of any shape and dtype.

    Raises `DataError` for a file that cannot be used or has not `num_samples` rows, where that is known. Can be sent to
    other processes, which map the file again.
    """

    def __init__(self, path: str | Path, num_samples: int | None = None) -> None:
        self.path = Path(path)
        try:
            mapped = np.lib.format.open_memmap(self.path, mode="r")
        except OSError as error:
            raise DataError(f"the label maps {path} cannot be read ({in_words(error)}); check data and path") from error
        except ValueError as error:
            raise DataError(f"{path} is no whole .npy file of numbers ({error}); write it with numpy.save") from error
        found = len(mapped) if mapped.ndim else 0
        self.num_samples = found if num_samples is None else num_samples
        if found != self.num_samples:
            raise DataError(
                f"{path} holds {found} label maps for a split of {num_samples} samples; "
                "write one for each, in the order of the split"
            )
        self._rows: NDArray[Any] = np.asarray(mapped)
        self._memory: Any = mapped.base  # what numpy made of the file, an mmap
        self._begin = mapped.offset % mmap.ALLOCATIONGRANULARITY  # of row 0 in it
        try:
            self.dtype: torch.dtype = torch.from_numpy(np.empty(0, self._rows.dtype)).dtype
        except (TypeError, ValueError) as error:
            raise DataError(f"{path} holds {self._rows.dtype} values, which torch has not; store others") from error
        self._waiting = DiskWaits()
        self.shape: tuple[int, ...] = self._rows.shape[1:]
        """Of one map."""

    def rows(self, index: NDArray[np.int64], *, pin_memory: bool = False) -> Tensor:
        """A copy of the maps of samples `index`, (len(index), *shape), on the host."""
        assert ((index >= 0) & (index < self.num_samples)).all()
        if self._waiting():
            self._fetch(index)
        rows = torch.empty((len(index), *self.shape), dtype=self.dtype, pin_memory=pin_memory)
        np.take(self._rows, index, axis=0, out=rows.numpy(), mode="clip")  # other modes copy through a buffer
        return rows

    def _fetch(self, index: NDArray[np.int64]) -> None:
        """Have the system read all rows at once: page by page, a batch would wait for each in turn."""
        if not self._rows.flags.c_contiguous or not self._rows.size:
            return
        length = self._rows.nbytes // self.num_samples
        for start in (self._begin + length * index).tolist():
            page = start - start % mmap.PAGESIZE
            self._memory.madvise(mmap.MADV_WILLNEED, page, start - page + length)

    @cached_property
    def fingerprint(self) -> str:
        """Of dtype, shape and some of the rows: a resumed run compares it, and the file may have many gigabytes."""
        some = np.unique(np.linspace(0, self.num_samples - 1, _ROWS_IN_FINGERPRINT).astype(np.int64))
        kind = f"{self._rows.dtype.str} {self._rows.shape}".encode()
        return hashlib.sha256(kind + self._rows[some].tobytes()).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.num_samples)
