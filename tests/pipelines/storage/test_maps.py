"""Label maps: rows of a mapped file, whatever they hold; a file that does not fit the split is refused."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.base import DataError
from pipelines.storage.maps import LabelMaps


def saved(path: Path, array: np.ndarray[Any, Any]) -> Path:
    np.save(path, array)
    return path


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int16, np.int64, np.uint8, np.uint16, np.bool_])
@pytest.mark.parametrize("shape", [(), (3,), (2, 5, 18, 18), (0,)], ids=str)
def test_rows_are_the_samples(dtype: Any, shape: tuple[int, ...], tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (40, *shape)).astype(dtype)
    maps = LabelMaps(saved(tmp_path / "maps.npy", array), 40)
    index = np.array([39, 0, 7, 7, 12])
    for opened in (maps, pickle.loads(pickle.dumps(maps))):
        rows = opened.rows(index)
        assert rows.dtype == opened.dtype == torch.from_numpy(array).dtype
        assert (rows.shape[1:], opened.shape) == (shape, shape)
        assert np.array_equal(rows.numpy(), array[index])
    rows.zero_()  # the receiver's: neither the file nor what is mapped of it
    assert np.array_equal(maps.rows(index).numpy(), array[index])
    assert maps.rows(index[:0]).shape == (0, *shape)
    assert np.array_equal(np.load(maps.path), array)


def test_a_file_in_fortrans_order_is_read_as_well(tmp_path: Path) -> None:
    array = np.arange(240).reshape(10, 4, 6)
    maps = LabelMaps(saved(tmp_path / "maps.npy", np.asfortranarray(array)), 10)
    assert np.array_equal(maps.rows(np.array([9, 2])).numpy(), array[[9, 2]])


def test_a_sample_that_does_not_exist_is_not_another(tmp_path: Path) -> None:
    maps = LabelMaps(saved(tmp_path / "maps.npy", np.zeros((4, 2))), 4)
    for i in (4, -1):
        with pytest.raises(AssertionError):
            maps.rows(np.array([i]))


@pytest.mark.parametrize("rows", [39, 41])
def test_a_wrong_number_of_maps_is_refused(rows: int, tmp_path: Path) -> None:
    path = saved(tmp_path / "maps.npy", np.zeros((rows, 2)))
    with pytest.raises(DataError, match=rf"holds {rows} label maps for a split of 40 samples; write one for each"):
        LabelMaps(path, 40)


def test_what_is_no_array_of_numbers_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "maps.npy"
    with pytest.raises(DataError, match=r"cannot be read \(it is not there"):
        LabelMaps(path, 4)
    with pytest.raises(DataError, match="cannot be read"):
        LabelMaps(tmp_path, 4)
    for content in (b"", b"maps", np.zeros(4).tobytes()):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"is no whole \.npy file"):
            LabelMaps(path, 4)
    np.save(path, np.array([None] * 4), allow_pickle=True)
    with pytest.raises(DataError, match=r"is no whole \.npy file"):
        LabelMaps(path, 4)
    path.write_bytes(saved(path, np.zeros((4, 8))).read_bytes()[:-1])
    with pytest.raises(DataError, match=r"is no whole \.npy file"):
        LabelMaps(path, 4)
    for array, match in (
        (np.float32(3), "holds 0 label maps"),
        (np.zeros(4, ">f4"), "holds >f4 values"),
        (np.array(["a"] * 4), "holds <U1 values"),
    ):
        with pytest.raises(DataError, match=match):
            LabelMaps(saved(path, np.asarray(array)), 4)


def test_the_fingerprint_tells_files_apart(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(size=(300, 4))
    others = [array.astype(np.float32), array.reshape(300, 2, 2), array[::-1].copy()]
    for first in (0, 299):
        others.append(array.copy())
        others[-1][first] += 1
    prints = [LabelMaps(saved(tmp_path / f"{i}.npy", a), 300).fingerprint for i, a in enumerate((array, *others))]
    assert len(set(prints)) == len(prints)
    assert LabelMaps(saved(tmp_path / "copy.npy", array), 300).fingerprint == prints[0]
