"""Conversion to a bucket: the set of a local conversion, whoever makes it, and however often it is interrupted."""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import warm
from conftest import Silent, convert_folder, write_folder
from stores import Served, empty_bucket, one_by_one, s3

import cli.convert
from cli.errors import run
from pipelines.base import DataError
from pipelines.conversion import convert as conversion
from pipelines.conversion import shards, verify
from pipelines.conversion.convert import convert, merge
from pipelines.conversion.options import Options
from pipelines.conversion.processes import Kept
from pipelines.remote import store as stores
from pipelines.remote.depot import PARTIAL
from pipelines.storage.manifest import MANIFEST

ROOT = Path(__file__).parents[3]
OPTIONS: dict[str, Any] = {"val_fraction": 0.2, "shard_size": 4, "jobs": 1}
WORDS = ["--format", "dali", "--val-fraction", "0.2", "--shard-size", "4", "--jobs", "2"]


@pytest.fixture(autouse=True)
def brief_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "FIRST_PAUSE_SECONDS", 0.01)


@pytest.fixture(autouse=True)
def in_this_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces are done one after the other, unless a test asks for `processes`."""
    if "processes" not in request.fixturenames:
        monkeypatch.setattr("pipelines.conversion.work.map_tasks", one_by_one)


@pytest.fixture
def processes() -> int:
    """Have pieces done as they usually are, by so many processes."""
    return 2


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_folder(folder, {"cat": 20, "dog": 20}, seed=3)
    return folder


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a local conversion writes, by name."""
    folder = tmp_path_factory.mktemp("local") / "set"
    convert_folder(source, folder, "dali", **OPTIONS)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    with empty_bucket(tmp_path, monkeypatch) as served:
        yield served


def held(url: str) -> dict[str, bytes]:
    """Every object below an address."""
    store, root = s3(), url.removeprefix("s3://")
    return {name.removeprefix(f"{root}/"): store.cat_file(name) for name in store.find(root)}


def settings(folder: Path, **more: Any) -> Options:
    return Options(formats=("dali",), work_dir=folder, **OPTIONS | more)


def command(source: Path, url: str, work: Path, *more: str) -> warm.Popen:
    words = [sys.executable, "-m", "cli.convert", str(source), url, "--work-dir", str(work), *WORDS, *more]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return warm.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, start_new_session=True)


def test_the_set_of_a_local_conversion(
    source: Path, whole: dict[str, bytes], bucket: Served, tmp_path: Path, processes: int
) -> None:
    manifest = convert(str(source), bucket.url, settings(tmp_path / "work", jobs=processes), Silent())
    assert manifest is not None
    assert held(bucket.url) == whole
    assert all(bucket.puts[name] == 1 for name in whole)
    assert not (tmp_path / "work").exists(), "what was made for it is gone"
    with pytest.raises(DataError, match=r"^s3://pictures/sets/small already exists; remove it or choose another name$"):
        convert(str(source), bucket.url, settings(tmp_path / "work"), Silent())
    assert not (tmp_path / "work").exists()


def test_tars_leave_the_disk_as_they_are_written(
    source: Path, bucket: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At no time is there more than one a process."""
    seen = []
    write = shards.write_shard

    def counted(shard: shards.Shard) -> Any:
        finished = write(shard)
        seen.append(len(list(Path(shard.tar).parent.glob("*.tar"))))
        return finished

    monkeypatch.setattr(verify, "write_shard", counted)
    convert(str(source), bucket.url, settings(tmp_path / "work"), Silent())
    assert seen == [1] * 10


@pytest.mark.exhaustive
@pytest.mark.parametrize("count", [2, 10])
def test_killed_and_continued_on_another_machine(
    source: Path, whole: dict[str, bytes], bucket: Served, tmp_path: Path, count: int
) -> None:
    """Another folder to work in stands for another machine: nothing is there but what the bucket has."""
    rng, begun = random.Random(f"{count}"), 0
    for attempt in range(count):
        process = command(source, bucket.url, tmp_path / str(attempt))
        wanted = rng.randint(1, 8)  # objects more than there were
        deadline = time.monotonic() + 60
        while process.poll() is None and sum(bucket.puts.values()) < begun + wanted and time.monotonic() < deadline:
            time.sleep(0.005)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        begun = sum(bucket.puts.values())
        if MANIFEST in held(bucket.url):
            break
        assert not set(held(bucket.url)) - set(whole) - {n for n in held(bucket.url) if n.startswith(PARTIAL)}
    else:
        process = command(source, bucket.url, tmp_path / "last")
        _, told = process.communicate(timeout=100)
        assert process.returncode == 0, told
        assert "continuing the unfinished conversion to s3://pictures/sets/small" in told
        assert not (tmp_path / "last").exists()
    assert held(bucket.url) == whole


@pytest.mark.exhaustive
def test_parts_on_machines_that_share_nothing(
    source: Path, whole: dict[str, bytes], bucket: Served, tmp_path: Path
) -> None:
    results = [convert(str(source), bucket.url, settings(tmp_path / str(i), part=(i, 3)), Silent()) for i in (1, 2, 3)]
    assert [result is None for result in results] == [True, True, False], "the last one has put all together"
    assert held(bucket.url) == whole
    assert not any((tmp_path / str(i)).exists() for i in (1, 2, 3))
    told: list[str] = []
    late = convert(str(source), bucket.url, settings(tmp_path / "late", part=(1, 3)), Silent(), told.append)
    assert late is not None
    assert late.to_json() == results[-1].to_json()  # type: ignore[union-attr]
    assert told == [f"part 1/3 finds {bucket.url} finished by the others"]
    with pytest.raises(DataError, match="already exists"):
        convert(str(source), bucket.url, settings(tmp_path / "late", part=(1, 3), seed=1), Silent())
    assert not (tmp_path / "late").exists()


@pytest.mark.exhaustive
def test_parts_at_the_same_time(source: Path, whole: dict[str, bytes], bucket: Served, tmp_path: Path) -> None:
    """Two of the machines share a folder. Several parts may find that they are the last."""
    works = [tmp_path / name for name in ("a", "a", "b", "c")]
    parts = [command(source, bucket.url, work, "--part", f"{i + 1}/4") for i, work in enumerate(works)]
    told = [part.communicate(timeout=200) for part in parts]
    assert all(part.returncode == 0 for part in parts), told
    assert held(bucket.url) == whole


def test_a_lost_part_is_made_up_for_by_merging(
    source: Path, whole: dict[str, bytes], bucket: Served, tmp_path: Path
) -> None:
    assert convert(str(source), bucket.url, settings(tmp_path / "a", part=(2, 2)), Silent()) is None
    assert MANIFEST not in held(bucket.url)
    merge(bucket.url, 1, Silent(), lambda line: None, work_dir=tmp_path / "b")
    assert held(bucket.url) == whole
    with pytest.raises(DataError, match="already exists"):
        merge(bucket.url, 1, Silent(), lambda line: None, work_dir=tmp_path / "b")
    with pytest.raises(DataError, match=r"^there is no unfinished conversion to s3://pictures/x; start one"):
        merge("s3://pictures/x", 1, Silent(), lambda line: None, work_dir=tmp_path / "b")


@pytest.mark.exhaustive
def test_what_goes_wrong_for_a_while_is_tried_again(
    source: Path, whole: dict[str, bytes], bucket: Served, tmp_path: Path
) -> None:
    for name in ("train-00000.tar", "train-00001.idx", "check-train-000000", MANIFEST, "journal.json"):
        bucket.faults[name] = ["500", "503"]
    convert(str(source), bucket.url, settings(tmp_path / "work"), Silent())
    assert held(bucket.url) == whole
    assert bucket.puts[MANIFEST] == 3


@pytest.mark.parametrize(
    ("name", "fault", "message"),
    [
        ("train-00003.tar", "403", "sets/small/train-00003.tar may not be written from here"),
        ("train-00003.tar", "500", "sets/small/train-00003.tar could not be written in 8 attempts"),
        pytest.param(
            MANIFEST, "503", f"sets/small/{MANIFEST} could not be written in 8 attempts", marks=pytest.mark.exhaustive
        ),
        pytest.param(
            "tar-3-val-000000",
            "500",
            f"{PARTIAL}/work/[0-9a-f]+/tar-3-val-000000 could not be written in 8 attempts",
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_what_stays_wrong_is_one_sentence_and_the_same_command_continues(
    source: Path, whole: dict[str, bytes], bucket: Served, tmp_path: Path, name: str, fault: str, message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    bucket.faults[name] = [f"always {fault}"]
    told: list[str] = []
    with pytest.raises(Kept, match=message):
        convert(str(source), bucket.url, settings(tmp_path / "work"), Silent(), told.append)
    assert f"--restart drops it ({bucket.url}/{PARTIAL})" in told[-1]
    assert MANIFEST not in held(bucket.url)
    written = dict(bucket.puts)
    bucket.faults.clear()
    convert(str(source), bucket.url, settings(tmp_path / "work"), Silent(), told.append)
    assert held(bucket.url) == whole
    assert bucket.puts["train-00000.tar"] == written["train-00000.tar"], "what was finished is not done again"


@pytest.mark.exhaustive
def test_an_object_that_somebody_removes_meanwhile(
    source: Path, bucket: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        conversion, "companion_files", lambda *_: s3().rm_file("pictures/sets/small/train-00000.tar") or {}
    )
    with pytest.raises(Kept, match=r"train-00000.tar has 0 bytes instead of \d+, though it was written; see who else"):
        convert(str(source), bucket.url, settings(tmp_path / "work"), Silent())
    assert MANIFEST not in held(bucket.url)


def test_what_is_wrong_with_the_source_leaves_nothing(bucket: Served, tmp_path: Path) -> None:
    write_folder(tmp_path / "photos", {"cat": 5, "dog": 5})
    (tmp_path / "photos" / "cat" / "000.jpg").write_bytes(b"\xff\xd8\xffno image")
    with pytest.raises(DataError, match=r"1 image\(s\) cannot be used"):
        convert(str(tmp_path / "photos"), bucket.url, settings(tmp_path / "work"), Silent())
    assert held(bucket.url) == {}
    assert not (tmp_path / "work").exists()


@pytest.mark.exhaustive
def test_another_conversion_is_refused_until_restart(
    source: Path, whole: dict[str, bytes], bucket: Served, tmp_path: Path
) -> None:
    convert(str(source), bucket.url, settings(tmp_path / "a", part=(1, 2), seed=1), Silent())
    before = held(bucket.url)
    with pytest.raises(Kept, match="conversion to s3://pictures/sets/small differs from this one: seed was"):
        convert(str(source), bucket.url, settings(tmp_path / "b"), Silent())
    assert held(bucket.url) == before
    assert not (tmp_path / "b").exists()
    convert(str(source), bucket.url, settings(tmp_path / "b", restart=True), Silent())
    assert held(bucket.url) == whole


def test_a_source_that_changed_is_refused_until_restart(bucket: Served, tmp_path: Path) -> None:
    write_folder(tmp_path / "photos", {"cat": 10, "dog": 10})
    convert(str(tmp_path / "photos"), bucket.url, settings(tmp_path / "a", part=(1, 2)), Silent())
    (tmp_path / "photos" / "cat" / "003.jpg").unlink()
    with pytest.raises(Kept, match="has changed since the conversion to s3://pictures/sets/small began"):
        convert(str(tmp_path / "photos"), bucket.url, settings(tmp_path / "a"), Silent())
    convert(str(tmp_path / "photos"), bucket.url, settings(tmp_path / "a", restart=True), Silent())
    assert MANIFEST in held(bucket.url)


@pytest.mark.exhaustive
def test_other_objects_are_left_alone(source: Path, bucket: Served, tmp_path: Path) -> None:
    s3().pipe_file("pictures/sets/small/notes.txt", b"mine")
    for restart in (False, True):
        with pytest.raises(DataError, match=r"^s3://pictures/sets/small already holds notes.txt; remove it or choose"):
            convert(str(source), bucket.url, settings(tmp_path / "work", restart=restart), Silent())
    assert held(bucket.url) == {"notes.txt": b"mine"}
    assert not (tmp_path / "work").exists()


@pytest.mark.exhaustive
def test_a_damaged_journal(source: Path, bucket: Served, tmp_path: Path) -> None:
    s3().pipe_file(f"pictures/sets/small/{PARTIAL}/journal.json", b"[")
    with pytest.raises(DataError, match=r"journal.json is damaged; begin again with --restart"):
        convert(str(source), bucket.url, settings(tmp_path / "work"), Silent())
    convert(str(source), bucket.url, settings(tmp_path / "work", restart=True), Silent())
    assert MANIFEST in held(bucket.url)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["https://host/set", *WORDS], "https://host/set cannot be written over HTTP; name a bucket"),
        (
            ["s3://pictures/set", "--format", "ffcv"],
            "--format ffcv writes one file of all images",
        ),
        (
            ["s3://no-such-bucket/set", *WORDS],
            "cannot be written, as there is no such bucket; make it",
        ),
        (["s3://me:secret@host/set", *WORDS], "DEST s3://host/set has a password in its address"),
        (["nosuch://x/set", *WORDS], "DEST nosuch://x/set cannot be opened"),
        (["set", *WORDS, "--work-dir", "w"], "--work-dir is for a place at an address"),
    ],
)
def test_what_is_refused_is_one_sentence(
    source: Path, bucket: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, words: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(SystemExit) as ended:
        run(cli.convert.app, [str(source), *words])
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in told
    assert told.count("\n") == 1
    assert "Traceback" not in told
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("words", "option"), [(["--verify"], "--verify"), (["--token-labels", "timm:x"], "--token-labels")]
)
def test_what_is_for_folders_alone(capsys: pytest.CaptureFixture[str], words: list[str], option: str) -> None:
    with pytest.raises(SystemExit) as ended:
        run(cli.convert.app, ["s3://pictures/set", *words])
    assert ended.value.code == 2
    assert f"{words[0]} is for a converted folder, and s3://pictures/set is an address" in capsys.readouterr().err


def test_a_tar_that_cannot_be_read_back_does_not_leave(
    source: Path, bucket: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = shards.write_shard

    def damaging(shard: shards.Shard) -> Any:
        finished = write(shard)
        with Path(shard.tar).open("r+b") as file:
            file.seek(int(finished.rows[1]["offset"]) + 30)
            file.write(b"xx")
        return finished

    monkeypatch.setattr(verify, "write_shard", damaging)
    with pytest.raises(DataError, match=r"train-00000.tar, member 00000001.jpg cannot be read back as written; check"):
        convert(str(source), bucket.url, settings(tmp_path / "work"), Silent())
    assert not any(name.endswith(".tar") for name in held(bucket.url))


def test_a_folder_by_its_address(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    convert(str(source), f"file://{tmp_path}/set", Options(formats=("dali",), **OPTIONS), Silent())
    assert {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()} == whole


@pytest.mark.exhaustive
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_ray_nodes(source: Path, whole: dict[str, bytes], bucket: Served, tmp_path: Path) -> None:
    process = command(source, bucket.url, tmp_path / "work", "--engine", "ray")
    _, told = process.communicate(timeout=200)
    assert process.returncode == 0, told
    assert held(bucket.url) == whole


@pytest.mark.exhaustive
def test_ctrl_c_while_a_store_does_not_answer(source: Path, bucket: Served, tmp_path: Path) -> None:
    bucket.faults["train-00002.tar"] = ["always 503"]
    process = command(source, bucket.url, tmp_path / "work")
    deadline = time.monotonic() + 60
    while bucket.puts["train-00002.tar"] < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    timer = threading.Timer(30, process.kill)
    timer.start()
    _, told = process.communicate()
    timer.cancel()
    assert process.returncode == 130, told
    assert "the same command continues" in told
    assert "Traceback" not in told
