"""The cache of a node: whole files, one lock each, bounded, and what is needed last goes first."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from stores import http_store

from pipelines.base import DataError
from pipelines.remote import store as stores
from pipelines.remote.cache import PLANS, Cache, is_whole
from pipelines.remote.plans import AGAIN, NEVER, Plan, steps_until
from pipelines.remote.store import Store
from pipelines.storage import locks
from pipelines.storage.manifest import FileEntry, hash_file


@pytest.fixture(autouse=True)
def brief_pauses(monkeypatch):
    monkeypatch.setattr(stores, "FIRST_PAUSE_SECONDS", 0.01)


@pytest.fixture
def served(tmp_path):
    """Six files of 1,000 bytes behind HTTP."""
    (tmp_path / "there").mkdir()
    for number in range(6):
        (tmp_path / "there" / f"train-{number:05d}.tar").write_bytes(bytes([number]) * 1000)
    with http_store(tmp_path / "there") as found:
        yield found


class Place:
    """A data set in a cache."""

    def __init__(self, served, folder, limit):
        self.cache, self.store = Cache(folder, limit), Store(served.url)
        self.folder, self.served = self.cache.set_folder("ab" * 32), served

    def entry(self, number):
        return hash_file(self.served.folder / f"train-{number:05d}.tar")

    def bring(self, number, steps=0, **more):
        name = f"train-{number:05d}.tar"
        return self.cache.bring(self.store, self.folder, name, self.entry(number), steps, lambda: None, **more)

    @property
    def held(self):
        return [int(path.name[6:11]) for path in sorted(self.folder.glob("*.tar"))]

    def plan(self, **due):
        names = [f"train-{number:05d}.tar" for number in range(6)]
        made = Plan(self.folder / PLANS, names)
        made.write(0, np.array([due.get(f"n{number}", NEVER) for number in range(6)]))
        return made


@pytest.fixture
def place(served, tmp_path):
    return Place(served, tmp_path / "cache", 3000)


def test_a_file_is_fetched_once_and_moved_into_place(place):
    assert [place.bring(0), place.bring(0)] == ["there", "there"]
    assert place.served.gets == {"train-00000.tar": 1}
    assert (place.folder / "train-00000.tar").read_bytes() == bytes(1000)
    assert list((place.folder / "coming").iterdir()) == []


@pytest.mark.parametrize("faults", [["500"], ["drop", "wrong", "503"], ["wrong", "wrong"], ["404"]])
def test_what_goes_wrong_for_a_while_is_tried_again(place, faults, caplog):
    place.served.faults["train-00001.tar"] = list(faults)
    if faults == ["404"]:  # which is for good
        with pytest.raises(DataError, match=r"set/train-00001.tar is not there; see that the address is right"):
            place.bring(1)
        return
    assert place.bring(1) == "there"
    assert place.served.gets["train-00001.tar"] == len(faults) + 1
    assert hash_file(place.folder / "train-00001.tar") == place.entry(1)
    assert len([line for line in caplog.messages if "trying again in" in line]) == len(faults)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("500", r"train-00002.tar could not be had in 3 attempts, .* the server answers 500; see that the store"),
        ("wrong", r"train-00002.tar could not be had in 3 attempts, .* not those of dataset.json; see that"),
        ("drop", r"train-00002.tar could not be had in 3 attempts, .*; see that the store answers"),
        ("403", r"train-00002.tar may not be read from here \(the server answers 403\); give this machine the right"),
    ],
)
def test_what_stays_wrong_is_one_sentence_and_leaves_nothing(place, monkeypatch, fault, message):
    monkeypatch.setattr(stores, "TRIES", 3)
    place.served.faults["train-00002.tar"] = [f"always {fault}"]
    with pytest.raises(DataError, match=message) as refused:
        place.bring(2)
    assert "\n" not in str(refused.value)
    assert place.served.gets["train-00002.tar"] == (1 if fault == "403" else 3)
    assert [path for path in place.folder.rglob("*.tar*") if path.parent.name != "locks"] == []


def test_another_size_is_noticed_before_anything_is_fetched(place, monkeypatch):
    monkeypatch.setattr(stores, "TRIES", 1)
    with pytest.raises(DataError, match="it has 1000 bytes instead of 999"):
        place.cache.bring(place.store, place.folder, "train-00000.tar", FileEntry(999, "0" * 64), 0, lambda: None)
    assert not place.served.gets


def test_a_store_that_does_not_answer(place, monkeypatch):
    monkeypatch.setattr(stores, "TRIES", 2)
    nobody = Store("http://127.0.0.1:9/set")
    with pytest.raises(DataError, match=r"http://127.0.0.1:9/set/a could not be had in 2 attempts"):
        nobody.fetch("a", place.folder / "a", None, lambda: None)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_not_the_stores_fault(place, monkeypatch, number):
    def full(*words, **more):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(place.store._files, "get_file", full)
    with pytest.raises(DataError, match=r"cannot be written \((no space|the disk quota).*--cache-dir"):
        place.bring(0)


def test_what_nobody_needs_goes_first_and_then_what_is_needed_last(place):
    plan = place.plan(n0=5, n1=50, n2=NEVER, n3=2, n4=1, n5=60)
    assert [place.bring(number, 5) for number in (0, 1, 2)] == ["there"] * 3
    assert place.bring(3, 2) == "there"
    assert place.held == [0, 1, 3], "nobody needed 2"
    assert place.bring(4, 1) == "there"
    assert place.held == [0, 3, 4], "1 was needed last"
    assert place.bring(5, 60) == "full"
    assert place.held == [0, 3, 4], "nothing goes for what is needed later"
    assert place.bring(5, 2) == "there"
    assert place.held == [3, 4, 5]
    plan.close()


def test_a_reader_that_moves_on_needs_its_tars_sooner(place):
    plan = place.plan(n0=100, n1=90, n2=AGAIN)
    for number in range(3):
        place.bring(number)
    plan.advance(95)
    assert list(steps_until(place.folder / PLANS).values()) == [5, 0, AGAIN - 95, *[NEVER - 95] * 3]
    assert place.bring(3, 1) == "there"
    assert place.held == [0, 1, 3]
    plan.close()


def test_the_soonest_of_all_readers_counts_and_dead_ones_do_not(place):
    near, far = place.plan(n0=1, n1=900), place.plan(n0=900, n1=7)
    assert steps_until(place.folder / PLANS)["train-00000.tar"] == 1
    assert steps_until(place.folder / PLANS)["train-00001.tar"] == 7
    near.close()
    assert steps_until(place.folder / PLANS)["train-00000.tar"] == 900
    far.close()
    assert steps_until(place.folder / PLANS) == {}


def _die_with_a_plan(folder):
    plan = Plan(folder, ["train-00000.tar"])
    plan.write(0, np.array([3]))
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_plan_of_a_process_that_was_killed(place):
    process = multiprocessing.get_context("fork").Process(target=_die_with_a_plan, args=(place.folder / PLANS,))
    process.start()
    process.join()
    assert len(list((place.folder / PLANS).iterdir())) == 1
    assert steps_until(place.folder / PLANS) == {}
    assert list((place.folder / PLANS).iterdir()) == []


def _die_at_everything(place):
    plan, partial = place.plan(n0=1), (place.folder / PLANS / "1-0.partial").open("w+b")
    locks.lock(partial)
    with place.cache.opening():
        place.bring(0, reserved=lambda: os.kill(os.getpid(), signal.SIGKILL))
    plan.close()


@pytest.mark.parametrize("limit", [3000, None])
def test_what_a_process_that_was_killed_was_at_goes_as_the_next_one_comes(served, tmp_path, limit):
    """Whatever that was, and whether or not the cache has a limit; what others are at stays."""
    place = Place(served, tmp_path / "cache", limit)
    with place.cache.opening() as others:
        process = multiprocessing.get_context("fork").Process(target=_die_at_everything, args=(place,))
        process.start()
        process.join()
        plan = place.plan(n0=1)
        assert [len(list((place.folder / name).iterdir())) for name in (PLANS, "coming")] == [3, 1]
        assert len(list(place.cache.folder.glob(".opening-*"))) == 2
        with place.cache.opening() as own:
            assert set(place.cache.folder.glob(".opening-*")) == {others, own}
            assert list((place.folder / "coming").iterdir()) == []
            assert [path.suffix for path in (place.folder / PLANS).iterdir()] == [".plan"]
    assert steps_until(place.folder / PLANS)["train-00000.tar"] == 1
    plan.close()
    assert list(place.cache.folder.glob(".opening-*")) == []


@pytest.mark.parametrize(("module", "what"), [("cache", ".opening-*/lock"), ("plans", "*/plans/*.partial")])
def test_what_is_taken_for_that_of_a_dead_process_before_it_is_locked_is_made_again(
    served, tmp_path, monkeypatch, module, what
):
    place, times = Place(served, tmp_path / "cache", None), []

    def late(file, **how):
        if not times:
            times.append(1)
            for path in place.cache.folder.glob(what):
                path.unlink()
        locks.lock(file, **how)

    monkeypatch.setattr(f"pipelines.remote.{module}.lock", late)
    with place.cache.opening() as made:
        assert made.is_dir()
        assert list(place.cache.folder.glob(".opening-*")) == [made]
        plan = place.plan(n0=1)
    assert times == [1]
    assert steps_until(place.folder / PLANS)["train-00000.tar"] == 1
    plan.close()


def test_no_room_beside_what_others_need(place):
    plan = place.plan(n0=0, n1=0, n2=0)
    for number in range(3):
        place.bring(number)
    assert place.bring(3) == "full"
    with pytest.raises(DataError, match=r"--cache-gb 3e-06 has no room for train-00003.tar of http"):
        place.bring(3, wait=True)
    plan.close()
    assert place.bring(3) == "there"


def test_what_a_dead_process_was_fetching_takes_no_room(place):
    for number in (4, 5):
        place.cache.coming(place.folder, f"train-{number:05d}.tar", 1000).write_bytes(b"half")
    assert [place.bring(number) for number in (0, 1, 4)] == ["there"] * 3
    assert place.held == [0, 1, 4]
    assert list((place.folder / "coming").iterdir()) == []


def test_room_is_set_aside_before_bytes_arrive(place):
    place.served.faults["train-00000.tar"] = ["slow"]
    begun = threading.Event()
    fetching = threading.Thread(
        target=lambda: place.cache.bring(place.store, place.folder, "train-00000.tar", place.entry(0), 0, begun.set)
    )
    fetching.start()
    assert begun.wait(10)
    assert place.bring(0) == "busy"
    plan = place.plan(n1=0, n2=0)
    assert [place.bring(1), place.bring(2)] == ["there", "there"]
    assert place.bring(3) == "full" or is_whole(place.folder / "train-00000.tar", 1000)
    fetching.join()
    plan.close()
    assert place.served.gets["train-00000.tar"] == 1


def test_other_sets_make_room(served, tmp_path):
    older = Place(served, tmp_path / "cache", 3000)
    older.bring(0)
    time.sleep(0.01)
    older.bring(1)
    newer = Place(served, tmp_path / "cache", 3000)
    newer.folder = newer.cache.set_folder("cd" * 32)
    assert [newer.bring(2), newer.bring(3)] == ["there", "there"]
    assert (older.held, newer.held) == ([1], [2, 3]), "of what nobody needs, the oldest goes first"


def test_a_cache_without_locks_or_that_cannot_be_written(served, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"--cache-dir .*/file cannot be written \(a file is in the way\); name a fold"):
        Cache(tmp_path / "file").set_folder("ab" * 32)

    def none(*words, **more):
        raise locks.NoLocks(errno.ENOLCK, "no locks")

    place = Place(served, tmp_path / "cache", None)
    monkeypatch.setattr("pipelines.remote.cache.lock", none)
    with pytest.raises(DataError, match=r"--cache-dir .* is on a file system without locks; name a folder on a disk"):
        place.bring(0)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("gs://bucket/set", r"--data gs://bucket/set cannot be opened: .*gcsfs.*; install what it needs"),
        ("nosuch://bucket/set", r"--data nosuch://bucket/set cannot be opened: .*; install what it needs"),
    ],
)
def test_addresses_that_fsspec_cannot_read(url, message):
    with pytest.raises(DataError, match=message):
        Store(url)


def test_a_local_folder_by_its_address(tmp_path):
    (tmp_path / "a").write_bytes(b"content")
    Store(f"file://{tmp_path}").fetch("a", tmp_path / "b", None, lambda: None)
    assert (tmp_path / "b").read_bytes() == b"content"
    with pytest.raises(DataError, match=f"file://{tmp_path}/c is not there"):
        Store(f"file://{tmp_path}").fetch("c", tmp_path / "d", None, lambda: None)
    assert Path(tmp_path / "d").exists() is False
