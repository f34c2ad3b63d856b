"""Whole batches from tars: the same bytes by array and by address, checked once, in threads, and fetched if need be."""

from __future__ import annotations

import ctypes
import resource
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import missing
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipelines.base import DataError
from pipelines.storage import source as sources
from pipelines.storage import unlocked
from pipelines.storage.manifest import SAMPLE, take_rows
from pipelines.storage.mapping import map_file, will_need
from pipelines.storage.reading import _BATCHES_AFTER_A_WAIT, DiskWaits, Readers, Unchecked
from pipelines.storage.source import TarSource

WITHOUT_NUMBA = missing("ffcv")  # which brings numba

Read = Callable[[TarSource, NDArray[np.int64]], list[bytes]]


def arrays(source: TarSource, index: NDArray[np.int64]) -> list[bytes]:
    return [image.tobytes() for image in source.read_many(index)]


def addresses(source: TarSource, index: NDArray[np.int64]) -> list[bytes]:
    return [ctypes.string_at(*place) for place in zip(*(of.tolist() for of in source.locate(index)), strict=True)]


ways = pytest.mark.parametrize(
    "read",
    [arrays, pytest.param(addresses, marks=pytest.mark.skipif(WITHOUT_NUMBA is not None, reason=str(WITHOUT_NUMBA)))],
)


@pytest.fixture
def copied(converted_root: Path, tmp_path: Path) -> Path:
    shutil.copytree(converted_root, tmp_path / "set")
    return tmp_path / "set"


def damage(source: TarSource, i: int) -> None:
    row = source._rows[i]
    with (source.root / source.entry.shards[row["shard"]]).open("r+b") as tar:
        tar.seek(int(row["offset"]) + int(row["length"]) // 2)
        byte = tar.read(1)
        tar.seek(-1, 1)
        tar.write(bytes([byte[0] ^ 0x55]))


@ways
def test_a_batch_is_its_images_in_any_order_and_number(read: Read, converted_root: Path) -> None:
    source, single = TarSource(converted_root, "train"), TarSource(converted_root, "train")
    for index in ([], [7], [7, 7, 3], list(range(52, -1, -1))):
        assert read(source, np.array(index, dtype=np.int64)) == [single.read(i).tobytes() for i in index]
    source.close()


@ways
def test_the_first_damaged_image_of_a_batch_is_named(read: Read, copied: Path) -> None:
    source = TarSource(copied, "train")
    order = np.random.default_rng(0).permutation(53)
    for i in (order[50], order[20], order[40]):
        damage(source, int(i))
    read(source, order[:20])
    with pytest.raises(DataError, match=rf"member {order[20]:08d}\.jpg has been damaged since the conversion; copy"):
        read(source, order)
    read(source, order[21:40])
    with pytest.raises(DataError, match=f"member {order[50]:08d}"):
        read(source, order[41:])
    unchecked = TarSource(copied, "train", check_bytes=False)
    assert len(read(unchecked, order)) == 53
    source.close()


@ways
def test_what_was_checked_once_is_not_checked_again(read: Read, copied: Path) -> None:
    source, every = TarSource(copied, "train"), np.arange(53)
    read(source, every)
    damage(source, 9)
    assert read(source, every)[9] == source.read(9).tobytes()
    source.close()


@ways
def test_a_place_outside_its_tar_is_named(read: Read, converted_root: Path) -> None:
    every = np.arange(53)
    for column, value in (("offset", 1 << 40), ("offset", -1), ("length", 0), ("length", 1 << 40)):
        source = TarSource(converted_root, "train")
        source._rows = source._rows.copy()
        source._rows[column][30] = value
        with pytest.raises(DataError, match=r"member 00000030\.jpg lies outside its file; copy the table and the tar"):
            read(source, every)


@ways
def test_checksums_are_compared_beside_each_other(
    read: Read, converted_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in one of several threads, none of them the caller's; `close` ends them."""
    source, threads, met = TarSource(converted_root, "train"), set(), threading.Barrier(3)

    def noted(work: Any, *arguments: Any) -> Any:
        if threading.current_thread() not in threads:
            threads.add(threading.current_thread())
            met.wait(20)  # for two others
        return work(*arguments)

    crc32 = unlocked.zlib.crc32  # type: ignore[attr-defined]
    monkeypatch.setattr(unlocked, "zlib", SimpleNamespace(crc32=lambda data: noted(crc32, data)))
    if read is addresses:
        search, fetch = unlocked._compiled()
        monkeypatch.setattr(unlocked, "_compiled", lambda: (lambda *given: noted(search, *given), fetch))
    source._readers = Readers(3)
    read(source, np.arange(53))
    assert len(threads) == 3
    assert threading.current_thread() not in threads
    source.close()
    assert not [thread for thread in threads if thread.is_alive()]


def test_a_tar_has_one_address(converted_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if several threads come to it first: what one of them was told must stay mapped."""
    source, together, mapped = TarSource(converted_root, "train"), threading.Barrier(4), []

    def slow(path: Path) -> NDArray[np.uint8]:
        mapped.append(threading.current_thread())
        return map_file(path)

    monkeypatch.setattr(sources, "map_file", slow)

    def read() -> None:
        together.wait(20)
        source.read_many(np.arange(53))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(mapped) == len(source.entry.shards)
    source.close()


class Faults:
    """Stands for the operating system's count of waits for the disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_majflt=self.count))


def test_whether_files_come_from_a_disk_is_seen_by_the_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    faults, waiting = Faults(monkeypatch), DiskWaits()
    told = [waiting() for _ in range(3 * _BATCHES_AFTER_A_WAIT)]
    assert told == [i < _BATCHES_AFTER_A_WAIT for i in range(len(told))]
    faults.count += 1
    assert sum(waiting() for _ in range(3 * _BATCHES_AFTER_A_WAIT)) == _BATCHES_AFTER_A_WAIT


@ways
def test_pages_are_asked_for_while_they_come_from_a_disk(
    read: Read, converted_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, index, asked = TarSource(converted_root, "train"), np.array([5, 40, 12]), []
    faults = Faults(monkeypatch)

    def need(content: NDArray[np.uint8]) -> None:
        asked.append((content.ctypes.data, len(content)))
        will_need(content)

    def fetch(address: NDArray[np.int64], length: NDArray[np.int64]) -> None:
        asked.extend(zip(address.tolist(), length.tolist(), strict=True))
        unlocked.fetch_at(address, length)

    monkeypatch.setattr(sources, "will_need", need)
    monkeypatch.setattr(sources, "fetch_at", fetch)
    read(source, index)
    begin, length = source.locate(index)
    assert asked[:3] == list(zip(begin.tolist(), length.tolist(), strict=True))
    del asked[3:]
    for _ in range(2 * _BATCHES_AFTER_A_WAIT):
        read(source, index)
    assert 3 < len(asked) <= 3 * _BATCHES_AFTER_A_WAIT
    asked.clear()
    read(source, index)
    assert not asked
    faults.count += 1
    read(source, index)
    assert len(asked) == 3
    source.close()


def test_mapped_files_hold_no_descriptor_and_go_with_their_last_view(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(256)) * 64)
    before = len(list(Path("/proc/self/fd").iterdir()))
    maps = [map_file(tmp_path / "file") for _ in range(200)]
    assert len(list(Path("/proc/self/fd").iterdir())) == before

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(str(tmp_path / "file"))

    assert mapped() == 200
    part = maps[7][100:105]
    assert part.tolist() == [100, 101, 102, 103, 104]
    assert not part.flags.writeable
    del maps
    assert mapped() == 1
    assert part.tolist() == [100, 101, 102, 103, 104]
    del part
    assert mapped() == 0


@pytest.mark.parametrize("name", ["nothing", ""])
def test_what_cannot_be_mapped_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{tmp_path / name} cannot be read"):
        map_file(tmp_path / name)


@given(st.integers(1, 50), st.lists(st.integers(0, 49), max_size=70))
def test_rows_are_those_that_numpy_finds(count: int, places: list[int]) -> None:
    rows = np.zeros(count, SAMPLE)
    for column, name in enumerate(SAMPLE.names or ()):
        rows[name] = np.arange(count) * 7 + column
    index = np.array([place % count for place in places], dtype=np.int64)
    assert np.array_equal(take_rows(rows, index), rows[index])
    with pytest.raises(IndexError):
        take_rows(rows, np.array([count]))


@given(st.integers(1, 40), st.lists(st.lists(st.integers(0, 39), max_size=9), max_size=6))
def test_a_sample_is_unchecked_until_it_is_compared(count: int, batches: list[list[int]]) -> None:
    unchecked, left = Unchecked(count), np.ones(count, dtype=bool)
    every = np.arange(count)
    for batch in batches:
        index = np.array([place % count for place in batch], dtype=np.int64)
        assert unchecked.of(index).tolist() == left[index].tolist()
        unchecked.clear(index)
        left[index] = False
        assert unchecked.of(every).tolist() == left.tolist()
    nothing = Unchecked(0)
    nothing.clear(every)
    assert not nothing.of(every).any()
