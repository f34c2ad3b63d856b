"""Conversion to a bucket where others are at work, or something goes wrong here: nothing that is finished is lost."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Silent, write_folder
from stores import Served, empty_bucket, one_by_one, s3

from pipelines.base import DataError
from pipelines.conversion import convert as conversion
from pipelines.conversion import shards, verify
from pipelines.conversion.convert import convert
from pipelines.conversion.options import Options
from pipelines.conversion.processes import Kept
from pipelines.remote import depot as depots
from pipelines.remote.depot import PARTIAL, Depot
from pipelines.remote.store import Store
from pipelines.storage.manifest import MANIFEST


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.conversion.work.map_tasks", one_by_one)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_folder(tmp_path / "photos", {"cat": 5, "dog": 5}, seed=3)
    return tmp_path / "photos"


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    with empty_bucket(tmp_path, monkeypatch) as served:
        yield served


def names(url: str = "s3://pictures") -> set[str]:
    return {name.removeprefix("pictures/") for name in s3().find(url.removeprefix("s3://"))}


def settings(folder: Path, **more: Any) -> Options:
    return Options(formats=("dali",), work_dir=folder, **{"val_fraction": 0.2, "shard_size": 2, "jobs": 1, **more})


def begin(source: Path, url: str, work: Path, monkeypatch: pytest.MonkeyPatch, tars: int = 2) -> set[str]:
    """A conversion that is killed when some tars are finished; what it leaves."""
    write, count = verify.write_checked, 0

    def ending(shard: shards.Shard) -> Any:
        nonlocal count
        count += 1
        if count > tars:
            raise KeyboardInterrupt
        return write(shard)

    with monkeypatch.context() as patched:
        patched.setattr(conversion, "write_checked", ending)
        with pytest.raises(KeyboardInterrupt):
            convert(str(source), url, settings(work), Silent())
    return names()


def test_a_source_that_is_not_there_when_it_goes_on_costs_nothing(
    source: Path, bucket: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another machine, perhaps, where its disk is not mounted."""
    left = begin(source, bucket.url, tmp_path / "a", monkeypatch)
    shutil.move(source, tmp_path / "away")
    with pytest.raises(Kept, match="there is no folder"):
        convert(str(source), bucket.url, settings(tmp_path / "b"), Silent())
    assert names() == left
    shutil.move(tmp_path / "away", source)
    assert convert(str(source), bucket.url, settings(tmp_path / "b"), Silent()) is not None
    assert bucket.puts["train-00000.tar"] == 1


def test_a_disk_that_damages_a_tar_costs_that_tar_alone(
    source: Path, bucket: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = shards.write_shard

    def damaging(shard: shards.Shard) -> Any:
        finished = write(shard)
        if shard.tar.endswith("train-00002.tar"):
            Path(shard.tar).write_bytes(bytes(10))
        return finished

    with monkeypatch.context() as patched:
        patched.setattr(verify, "write_shard", damaging)
        with pytest.raises(Kept, match="cannot be read back as written; check the disk"):
            convert(str(source), bucket.url, settings(tmp_path / "a"), Silent())
    assert convert(str(source), bucket.url, settings(tmp_path / "a"), Silent()) is not None
    assert bucket.puts["train-00000.tar"] == bucket.puts["train-00002.tar"] == 1


@pytest.mark.exhaustive
def test_restart_leaves_what_is_not_ours(
    source: Path, bucket: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An address is not only the conversion's, as a partial folder on the disk is; a whole bucket is one, too."""
    begin(source, "s3://pictures", tmp_path / "a", monkeypatch)
    others = {"other/set/dataset.json", "thesis.tex", "other/train-00000.tar"}
    for name in others:
        s3().pipe_file(f"pictures/{name}", b"mine")
    with pytest.raises(DataError):
        convert(
            str(source), "s3://pictures", settings(tmp_path / "a", restart=True, class_order="nothing.txt"), Silent()
        )
    assert names() == others


def test_restart_waits_for_who_is_at_work_on_this_machine(
    source: Path, bucket: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: set[str] = set()
    write = verify.write_checked

    def meanwhile(shard: shards.Shard) -> Any:
        if shard.tar.endswith("train-00001.tar"):
            left.update(names())
            with pytest.raises(Kept, match=r"another pss-convert is writing s3://pictures/sets/small; wait for it"):
                convert(str(source), bucket.url, settings(tmp_path / "a", seed=1, restart=True), Silent())
            assert names() == left
        return write(shard)

    monkeypatch.setattr(conversion, "write_checked", meanwhile)
    assert convert(str(source), bucket.url, settings(tmp_path / "a"), Silent()) is not None
    assert left


@pytest.mark.parametrize(
    ("source", "dest", "message"),
    [
        ("s3://pictures/raw", "s3://pictures/raw/out", "s3://pictures/raw/out lies in s3://pictures/raw"),
        ("s3://pictures", "s3://pictures/out", "s3://pictures/out lies in s3://pictures"),
        ("s3://pictures/raw", "s3://pictures/raw/", "s3://pictures/raw lies in s3://pictures/raw"),
        ("digits", "s3://pictures//set", "has '.', '..' or nothing between two slashes"),
        ("digits", "s3://pictures/../set", "has '.', '..' or nothing between two slashes"),
        ("digits", "s3://pictures/set*", r"has '\*' in its name"),
        ("digits", "s3://pictures/set[1]", r"has '\[' in its name"),
    ],
)
def test_destinations_that_are_refused(bucket: Served, tmp_path: Path, source: str, dest: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        convert(source, dest, settings(tmp_path / "a"), Silent())
    assert names() == set()
    assert not (tmp_path / "a").exists()


@pytest.mark.exhaustive
def test_who_may_write_and_not_remove_has_a_set(
    source: Path, bucket: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise DataError("may not be written from here")

    monkeypatch.setattr(Store, "remove", refused)
    assert convert(str(source), bucket.url, settings(tmp_path / "a"), Silent()) is not None
    assert f"sets/small/{MANIFEST}" in names()


@pytest.mark.parametrize("at", ["fetch_results", "merging"])
@pytest.mark.exhaustive
def test_a_part_that_another_one_overtakes_at_the_end(
    source: Path, bucket: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """It finds the results removed, or the folder that the two share."""
    work = tmp_path / "a"
    assert convert(str(source), bucket.url, settings(work, part=(1, 2)), Silent()) is None
    overtaken = False

    def overtake() -> None:
        nonlocal overtaken
        if not overtaken and len([name for name in names() if "/tar-" in name]) == 5:
            overtaken = True
            convert(str(source), bucket.url, settings(tmp_path / "b", part=(1, 2)), Silent())
            assert f"sets/small/{PARTIAL}/journal.json" not in names()
            if at == "merging":
                shutil.rmtree(work)

    if at == "merging":
        agreed = conversion.DepotPlace.merging
        monkeypatch.setattr(conversion.DepotPlace, "merging", lambda place: overtake() or agreed(place))
    else:
        fetch = Depot._fetch

        def fetching(depot: Depot, path: Path, *more: Any) -> None:
            if threading.current_thread() is not threading.main_thread() and "tar" in path.name:
                overtake()
            fetch(depot, path, *more)

        monkeypatch.setattr(Depot, "_fetch", fetching)
    told: list[str] = []
    made = convert(str(source), bucket.url, settings(work, part=(2, 2)), Silent(), told.append)
    assert overtaken
    assert made is not None
    assert told[-1] == f"part 2/2 finds {bucket.url} finished by the others"
    assert not work.exists()


def test_a_slow_upload_is_not_taken_for_a_process_that_is_stuck(
    bucket: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    depot = Depot(bucket.url)
    depot.serve({})
    depot.begin({}, tmp_path)
    monkeypatch.setattr(depot.store, "put", lambda *_: time.sleep(0.3))
    monkeypatch.setattr(depots, "_BEAT_SECONDS", 0.05)
    (tmp_path / "file").write_bytes(b"x")
    heard: list[None] = []
    depot.deliver([tmp_path / "file"], tmp_path / "result", b"", lambda: heard.append(None))
    assert len(heard) > 2


def test_what_may_not_be_removed_is_not_taken_for_new(
    source: Path, bucket: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3 refuses to remove one object of many in an answer that s3fs does not look at."""
    left = begin(source, bucket.url, tmp_path / "a", monkeypatch)
    monkeypatch.setattr(Store, "remove", lambda *_: None)
    with pytest.raises(DataError, match=r"is still there, though it was to be removed; give this machine the right"):
        convert(str(source), bucket.url, settings(tmp_path / "b", restart=True), Silent())
    assert names() == left
    assert not (tmp_path / "b").exists()


def test_parts_that_begin_at_the_same_time_on_one_machine(
    bucket: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To ask in vain for a lock of one's own gives up the shared one."""
    told, others = Depot.journal, list[conversion.DepotPlace]()

    def place() -> conversion.DepotPlace:
        return conversion.DepotPlace(Depot(bucket.url), tmp_path / "a", {}, restart=False, shared=True)

    def journal(depot: Depot) -> dict[str, Any] | None:
        found = told(depot)
        if not others:
            monkeypatch.setattr(Depot, "journal", told)
            others.append(place())
            (others[0].work / "result").touch()
        return found

    monkeypatch.setattr(Depot, "journal", journal)
    first = place()
    assert (others[0].work / "result").exists()
    first.leave()
    others[0].leave()


def test_who_is_at_work_when_another_machine_restarts_gives_way(
    source: Path, bucket: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it writes would else be taken for a part of the other set, or its set for that."""
    write = verify.write_checked
    options = settings(tmp_path / "b", seed=1, restart=True)

    def meanwhile(shard: shards.Shard) -> Any:
        monkeypatch.setattr(conversion, "write_checked", stopping)
        with pytest.raises(KeyboardInterrupt):
            convert(str(source), bucket.url, options, Silent())
        return write(shard)

    def stopping(shard: shards.Shard) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "write_checked", meanwhile)
    with pytest.raises(Kept, match="another conversion to s3://pictures/sets/small has been begun meanwhile"):
        convert(str(source), bucket.url, settings(tmp_path / "a"), Silent())
    monkeypatch.setattr(conversion, "write_checked", write)
    made = convert(str(source), bucket.url, settings(tmp_path / "b", seed=1), Silent())
    assert made is not None
    assert made.made["options"]["seed"] == 1
