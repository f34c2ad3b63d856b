"""Loaders of sets that lie elsewhere: the samples and pixels of a local copy, each tar fetched once an epoch and node,
whatever goes wrong on the way, and however many processes there are."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from conftest import missing
from store_reader import BATCH, GROUPS, WINDOW
from stores import http_store, s3_store

import pipelines
from pipelines.base import DataConfig, DataError
from pipelines.remote import fetching, place
from pipelines.remote import store as stores
from pipelines.remote.place import open_remote
from pipelines.remote.tars import RemoteTars
from pipelines.storage.manifest import MANIFEST, read_manifest

ROOT = Path(__file__).parents[3]
EXHAUSTIVE = pytest.mark.exhaustive
WINDOWED = DataConfig(img_size=32, window=WINDOW, groups=GROUPS)
ALL = DataConfig(img_size=32)


@pytest.fixture(autouse=True)
def brief_pauses(monkeypatch):
    monkeypatch.setattr(stores, "FIRST_PAUSE_SECONDS", 0.01)


@pytest.fixture(params=["http", "s3"])
def served(request, tarred, monkeypatch):
    with http_store(tarred) if request.param == "http" else s3_store(tarred, monkeypatch) as found:
        yield found


@pytest.fixture
def by_http(tarred):
    with http_store(tarred) as found:
        yield found


def built(data, *, split="train", config=WINDOWED, loader="torch", world=1, rank=0, **more):
    options = {"batch_size": BATCH // world, "seed": 5, "num_workers": 1} | more
    return pipelines.build(
        data, split, config=config, train=split == "train", loader=loader, rank=rank, world_size=world, **options
    )


def delivered(loader, epochs=1):
    """Pixels, numbers and labels of some epochs."""
    found = []
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        found += [(batch.images.clone(), batch.index.tolist(), batch.labels.tolist()) for batch in loader]
        assert loader.delivered_hash == loader.planned_hash(epoch)
    loader.close()
    return found


def assert_same(found, expected):
    assert len(found) == len(expected)
    for (images, *numbers), (others, *others_numbers) in zip(found, expected, strict=True):
        assert numbers == others_numbers
        assert torch.equal(images, others)


def needed_gigabytes(root, window=WINDOW, groups=GROUPS):
    """What a cache must hold at least, in GB."""
    return place.windowed_bytes(read_manifest(Path(root))[0], groups, window, BATCH, 1) / 1e9


def tars_in(cache):
    return [path for path in cache.rglob("*.tar") if path.parent.name != "locks"]


@pytest.mark.parametrize("config", [WINDOWED, ALL], ids=["windowed", "all"])
def test_the_batches_of_a_local_copy_from_a_cache_that_holds_all(served, tarred, tmp_path, config):
    remote = open_remote(served.url, tmp_path)
    assert_same(delivered(built(remote, config=config), 2), delivered(built(tarred, config=config), 2))
    assert set(served.tars().values()) == {1}, "what is there is not fetched again"
    assert served.gets[MANIFEST] == served.gets["train.samples.npy"] == served.gets["val.samples.npy"] == 1


def test_each_tar_once_an_epoch_from_a_cache_that_holds_a_few(served, tarred, tmp_path):
    limit = needed_gigabytes(tarred)
    remote = open_remote(served.url, tmp_path, limit)
    watching, most = threading.Event(), [0]

    def watch():
        while not watching.wait(0.002):
            with_sizes = [path.stat().st_size for path in list(remote.folder.glob("*")) if path.exists()]
            most[0] = max(most[0], sum(with_sizes))

    watcher = threading.Thread(target=watch)
    watcher.start()
    found = []
    loader, order = built(remote), built(tarred).windows
    for epoch in range(3):
        before = served.gets.copy()
        loader.set_epoch(epoch)
        found += [(batch.images.clone(), batch.index.tolist(), batch.labels.tolist()) for batch in loader]
        needed = int((order.uses(epoch, range(GROUPS)).first >= 0).sum())
        assert sum((served.gets - before).values()) <= needed + GROUPS * 2 * WINDOW, (
            "with what the next epoch begins with"
        )
    loader.close()
    watching.set()
    watcher.join()
    assert_same(found, delivered(built(tarred), 3))
    assert max(served.tars().values()) <= 3
    assert 0 < most[0] <= limit * 1e9 + (remote.folder / MANIFEST).stat().st_size


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_every_loader_reads_them(by_http, tarred, tmp_path, loader):
    if reason := missing(loader):
        pytest.skip(reason)
    remote = open_remote(by_http.url, tmp_path, needed_gigabytes(tarred))
    assert_same(delivered(built(remote, loader=loader), 2), delivered(built(tarred, loader=loader), 2))


def test_evaluation_in_order(served, tarred, tmp_path):
    sizes = [path.stat().st_size for path in Path(tarred).glob("val-*.tar")]
    tables = sum(path.stat().st_size for path in Path(tarred).glob("*.samples.npy"))
    remote = open_remote(served.url, tmp_path, (tables + 2 * max(sizes)) / 1e9)
    config = {"split": "val", "batch_size": 1}
    assert_same(delivered(built(remote, **config)), delivered(built(tarred, **config)))
    assert served.tars("val") == dict.fromkeys(sorted(served.tars("val")), 1)
    assert not served.tars("train")


def test_room_is_set_aside_in_the_order_in_which_tars_are_needed(by_http, tarred, tmp_path, monkeypatch):
    """However long it takes a thread: a later tar would have to go again for a sooner one."""
    sizes = [path.stat().st_size for path in Path(tarred).glob("val-*.tar")]
    tables = sum(path.stat().st_size for path in Path(tarred).glob("*.samples.npy"))
    remote = open_remote(by_http.url, tmp_path, (tables + 2 * max(sizes)) / 1e9)
    made, reserve = [], fetching.Cache._reserve

    def slowly(cache, folder, name, num_bytes, steps):
        if name in ("val-00000.tar", "val-00001.tar"):
            time.sleep(0.3)
        if found := reserve(cache, folder, name, num_bytes, steps):
            made.append(name)
        return found

    monkeypatch.setattr(fetching.Cache, "_reserve", slowly)
    config = {"split": "val", "batch_size": 1}
    assert_same(delivered(built(remote, **config)), delivered(built(tarred, **config)))
    assert made == [f"val-0000{number}.tar" for number in range(5)]


def test_faults_change_nothing(served, tarred, tmp_path):
    rng = random.Random(1)
    kinds = ["500", "wrong", "503"] + (["drop", "slow"] if served.url.startswith("http") else [])
    for path in Path(tarred).iterdir():
        served.faults[path.name] = rng.choices(kinds, k=rng.randrange(3))
    served.faults[MANIFEST] = ["500"]
    remote = open_remote(served.url, tmp_path, needed_gigabytes(tarred))
    assert_same(delivered(built(remote), 2), delivered(built(tarred), 2))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("404", r"set/train-000\d\d.tar is not there; see that the address is right and the upload complete"),
        ("403", r"set/train-000\d\d.tar may not be read from here"),
        ("wrong", r"set/train-000\d\d.tar could not be had in 2 attempts, .* its bytes are not those of dataset.json"),
    ],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_what_cannot_be_had_ends_the_loader(by_http, tmp_path, monkeypatch, fault, message, workers):
    monkeypatch.setattr(stores, "TRIES", 2)
    for number in range(11):
        by_http.faults[f"train-{number:05d}.tar"] = [f"always {fault}"]
    loader = built(open_remote(by_http.url, tmp_path), num_workers=workers)
    with pytest.raises(DataError, match=message):
        next(iter(loader))
    assert tars_in(tmp_path) == []


def test_a_store_that_says_nothing_is_given_up(by_http, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "SILENT_SECONDS", 0.5)
    remote = open_remote(by_http.url, tmp_path)
    silent = threading.Event()
    monkeypatch.setattr(fetching.Cache, "bring", lambda *words, **more: silent.wait(0.1) or "busy")
    loader = built(remote)
    with pytest.raises(DataError, match=r"nothing was heard of http.*train-0000\d.tar for 0.5 s; see that the store"):
        next(iter(loader))
    silent.set()


def test_a_slow_store_is_waited_for(by_http, tarred, tmp_path):
    for number in range(11):
        by_http.faults[f"train-{number:05d}.tar"] = ["always slow"]
    loader = built(open_remote(by_http.url, tmp_path))
    loader.stall_seconds = 0.3
    assert_same(delivered(loader), delivered(built(tarred)))


def test_tars_are_fetched_ahead_of_the_reader(by_http, tarred, tmp_path):
    loader = built(open_remote(by_http.url, tmp_path, needed_gigabytes(tarred)))
    batches = iter(loader)
    next(batches)
    began = time.monotonic()
    while len(tars_in(tmp_path)) < 2 * GROUPS and time.monotonic() - began < 60:
        time.sleep(0.02)
    assert len(tars_in(tmp_path)) >= 2 * GROUPS, "while a window is read, the next one comes"
    loader.close()


def test_a_tar_that_was_removed_is_fetched_again(by_http, tarred, tmp_path):
    remote = open_remote(by_http.url, tmp_path)
    expected = delivered(built(tarred))
    assert_same(delivered(built(remote)), expected)
    for path in remote.folder.glob("*.tar"):
        path.unlink()
    assert_same(delivered(built(remote)), expected)


def test_a_tar_that_changed_on_the_disk_is_told(by_http, tmp_path):
    remote = open_remote(by_http.url, tmp_path)
    delivered(built(remote))
    for path in remote.folder.glob("train-*.tar"):
        content = path.read_bytes()
        path.write_bytes(bytes(len(content)))
    with pytest.raises(DataError, match=r"train-000\d\d.tar is no longer as it was fetched; remove it, and it is fetc"):
        delivered(built(remote))


def test_sources_can_be_sent_to_other_processes(by_http, tarred, tmp_path):
    source = pickle.loads(pickle.dumps(pipelines.open_split(open_remote(by_http.url, tmp_path), "train")))
    local = pipelines.open_split(tarred, "train")
    assert isinstance(source, RemoteTars)
    index = np.array([40, 3, 17])
    assert [one.tobytes() for one in source.read_many(index)] == [one.tobytes() for one in local.read_many(index)]
    assert source.read(5).tobytes() == local.read(5).tobytes()
    assert source.name(0).startswith(f"{by_http.url}/train-00000.tar, member")
    source.leave()


def test_threads_end_with_the_loader(by_http, tmp_path):
    delivered(built(open_remote(by_http.url, tmp_path)))
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("pss-fetch")] == []
    assert list(tmp_path.rglob("*.plan")) == []


def test_a_local_run_goes_on_from_a_store(by_http, tarred, tmp_path):
    state = built(tarred).state_dict()
    built(open_remote(by_http.url, tmp_path)).load_state_dict(state)


# What is refused.


def test_a_cache_that_is_too_small(by_http, tarred, tmp_path):
    needed = needed_gigabytes(tarred)
    remote = open_remote(by_http.url, tmp_path, needed * 0.99)
    with pytest.raises(DataError, match=r"--cache-gb is .* and this node needs .* at once: 2 x 1 tars \(data.window\)"):
        built(remote)
    with pytest.raises(DataError, match=r"has .* GB and --cache-gb is .* a permutation of all samples needs the whole"):
        built(remote, config=ALL)
    with pytest.raises(DataError, match=r"--cache-gb is 1e-07, and the tables of http://.* alone have .* GB; raise it"):
        open_remote(by_http.url, tmp_path, 1e-7)
    with pytest.raises(DataError, match=r"--cache-gb is -1; it must be a number above 0"):
        open_remote(by_http.url, tmp_path, -1)


def test_a_disk_without_room_for_the_set(by_http, tarred, tmp_path, monkeypatch):
    remote = open_remote(by_http.url, tmp_path)
    tars = sum(path.stat().st_size for path in Path(tarred).glob("train-*.tar"))
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0, 0, tars - 1))
    with pytest.raises(
        DataError, match=r"--cache-dir .* has .* GB left, and .* GB of the train split of http.*--cache-gb"
    ):
        built(remote)
    assert not by_http.tars()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0, 0, tars))
    delivered(built(remote, config=ALL))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0, 0, 0))
    built(remote, config=ALL).close()


def test_the_window_that_a_cache_serves(by_http, tarred, tmp_path):
    manifest, _ = read_manifest(tarred)
    total = sum(entry.bytes for name, entry in manifest.files.items() if name.endswith((".tar", ".samples.npy")))
    config = DataConfig(groups=64)

    def chosen(gigabytes, **more):
        remote = open_remote(by_http.url, tmp_path, gigabytes)
        return remote.choose_window(DataConfig(window=1, groups=2) if more else config, BATCH, 1)

    assert chosen(None) is None
    assert chosen(total / 1e9) is None
    assert chosen(total / 1e9, window=1) == 1
    assert place.usual_window(manifest, 2, round(1e9 * needed_gigabytes(tarred, 2, 2)), BATCH, 1) == 2
    assert place.usual_window(manifest, 2, 1000, BATCH, 1) is None


def test_a_node_of_several_needs_less(tarred, monkeypatch):
    manifest, _ = read_manifest(tarred)
    alone = place.windowed_bytes(manifest, 4, 1, BATCH, 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert place.windowed_bytes(manifest, 4, 1, BATCH, 2) >= alone
    assert place.windowed_bytes(manifest, 4, 1, BATCH, 4) < 0.8 * place.windowed_bytes(manifest, 4, 1, BATCH, 2)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://{}/nothing", r"http://.*/nothing/dataset.json is not there; see that the address is right"),
    ],
)
def test_an_address_with_no_data_set(tmp_path, url, message):
    (tmp_path / "there").mkdir()
    with http_store(tmp_path / "there") as served:
        address = url.format(served.url.split("/")[2])
        with pytest.raises(DataError, match=message):
            open_remote(address, tmp_path / "cache")
        (tmp_path / "there" / MANIFEST).write_text("{}")
        with pytest.raises(DataError, match=r"http://.*/dataset.json was not written by pss-convert; point at"):
            open_remote(served.url, tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == []


def test_cache_options_are_for_addresses(tarred, tmp_path):
    for options in ({"cache_dir": tmp_path}, {"cache_gb": 1}):
        with pytest.raises(DataError, match=r"--cache-(dir|gb) is for --data at an address, .*; leave it out"):
            pipelines.find_data(tarred, **options)


def test_ffcv_reads_no_set_elsewhere(by_http, tmp_path):
    with pytest.raises(DataError, match=r"--loader ffcv .*reads one file of all images, and http.* is elsewhere; copy"):
        built(open_remote(by_http.url, tmp_path), loader="ffcv")


# Several processes on one cache.


@contextmanager
def readers(world, data, folder, gigabytes, epoch, step, epochs, name, pause=0.0, loader="torch"):
    """As many processes as a node would have, reading; notes are in `folder`."""
    started = []
    try:
        for rank in range(world):
            words = (data, folder / "cache", gigabytes, rank, world, epoch, step, epochs, folder / f"{name}-{rank}")
            command = [sys.executable, str(ROOT / "tests" / "store_reader.py"), *map(str, words), str(pause), loader]
            started.append(_start(command, {"LOCAL_WORLD_SIZE": str(world)}))
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def _start(command, environment):
    return warm.Popen(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment, stderr=subprocess.PIPE, text=True
    )


def finish(processes):
    told = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(told)[-4000:]


def notes(folder, name, world):
    """The rows of each global batch that all ranks have delivered, by epoch and step."""
    ranks = []
    for rank in range(world):
        path, found = folder / f"{name}-{rank}", {}
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                epoch, step, rows = json.loads(line)
            except ValueError:
                break  # the process was killed as it wrote
            found[epoch, step] = rows
        ranks.append(found)
    return {at: [row for found in ranks for row in found[at]] for at in sorted(set.intersection(*map(set, ranks)))}


@pytest.fixture(scope="module")
def expected(tarred, tmp_path_factory):
    """The rows of three epochs from a local folder, by one process."""
    folder = tmp_path_factory.mktemp("local")
    words = (tarred, "-", 0, 0, 1, 0, 0, 3, folder / "rows-0")
    finish([_start([sys.executable, str(ROOT / "tests" / "store_reader.py"), *map(str, words)], {})])
    return notes(folder, "rows", 1)


@pytest.mark.parametrize(
    ("world", "kind"),
    [
        (2, "http"),
        pytest.param(1, "http", marks=EXHAUSTIVE), pytest.param(4, "http", marks=EXHAUSTIVE),
        pytest.param(1, "s3", marks=EXHAUSTIVE), pytest.param(2, "s3", marks=EXHAUSTIVE),
        pytest.param(4, "s3", marks=EXHAUSTIVE),
    ],
)  # fmt: skip
def test_processes_share_a_cache(tarred, tmp_path, monkeypatch, expected, world, kind):
    limit = needed_gigabytes(tarred)
    with http_store(tarred) if kind == "http" else s3_store(tarred, monkeypatch) as served:
        rng = random.Random(world)
        for number in range(11):
            served.faults[f"train-{number:05d}.tar"] = rng.choices(["500", "wrong", "slow"], k=rng.randrange(2))
        with readers(world, served.url, tmp_path, limit, 0, 0, 3, "rows") as processes:
            finish(processes)
        failed = {name: count for name, count in served.tars().items() if count > 6}
    assert notes(tmp_path, "rows", world) == expected
    assert failed == {}


@pytest.mark.parametrize(
    ("seed", "worlds"),
    [
        (0, (2, 1)),
        *(pytest.param(seed, worlds, marks=EXHAUSTIVE) for seed in range(1, 6) for worlds in ((1, 4), (4, 2))),
    ],
)
def test_killed_at_any_moment_and_resumed_by_others(by_http, tarred, tmp_path, expected, seed, worlds):
    limit, rng = needed_gigabytes(tarred), random.Random(seed)
    for number in range(11):
        by_http.faults[f"train-{number:05d}.tar"] = ["slow"] * rng.randrange(3)
    before, after = worlds
    with readers(before, by_http.url, tmp_path, limit, 0, 0, 3, "first", pause=0.05) as processes:
        moment = rng.uniform(0.1, 1.0)
        begun = time.monotonic()
        while not notes(tmp_path, "first", before) and time.monotonic() - begun < 60:
            time.sleep(0.02)
        time.sleep(moment)
        for process in processes:
            process.kill()
    first = notes(tmp_path, "first", before)
    assert first.items() <= expected.items()
    epoch, step = max(first)
    steps = 1 + max(step for _, step in expected)
    begin = (epoch, step + 1) if step + 1 < steps else (epoch + 1, 0)
    with readers(after, by_http.url, tmp_path, limit, *begin, 3, "second") as processes:
        finish(processes)
    second = notes(tmp_path, "second", after)
    assert first | second == expected
    assert not set(first) & set(second)
    assert list((tmp_path / "cache").rglob("coming/*")) == []


def test_a_cache_is_not_left_with_files_of_dead_processes(by_http, tarred, tmp_path):
    limit = needed_gigabytes(tarred)
    for number in range(11):
        by_http.faults[f"train-{number:05d}.tar"] = ["slow"] * 2
    with readers(2, by_http.url, tmp_path, limit, 0, 0, 3, "rows") as processes:
        begun = time.monotonic()
        while not list((tmp_path / "cache").rglob("coming/*")) and time.monotonic() - begun < 60:
            time.sleep(0.01)
        for process in processes:
            process.kill()
    remote = open_remote(by_http.url, tmp_path / "cache", limit)
    delivered(built(remote), 2)
    assert [path for name in ("coming", "plans") for path in (remote.folder / name).iterdir()] == []
    shutil.rmtree(tmp_path / "cache")
