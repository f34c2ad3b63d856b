"""The commands on a set in a bucket: what the page says, what is refused, and what is said."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import warm
from conftest import convert_folder, free_port, write_folder
from stores import BUCKET, http_store, s3_store

import cli.eval
import cli.train
from cli.errors import run
from pipelines.remote import place
from pipelines.remote import store as stores
from pipelines.storage.manifest import read_manifest

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "remote.md").read_text(encoding="utf-8")
SMALL = ["model.depth=1", "train.epochs=2", "train.batch_size=8", "optim.warmup_epochs=0", "schedule.cooldown_epochs=0"]
FAST = [word for setting in (*SMALL, "train.num_workers=1") for word in ("--set", setting)]


@pytest.fixture(autouse=True)
def brief_pauses(monkeypatch):
    monkeypatch.setattr(stores, "FIRST_PAUSE_SECONDS", 0.01)


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def command(words, folder, processes=1):
    module = {"pss-convert": "cli.convert", "pss-train": "cli.train", "pss-eval": "cli.eval"}[words[0]]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "home")}
    if processes == 1:
        return warm.run(
            [sys.executable, "-m", module, *words[1:]], cwd=folder, env=environment, capture_output=True, text=True
        )
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    started = [
        warm.Popen(
            [sys.executable, "-m", module, *words[1:]], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=environment | meet | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)},
        )
        for rank in range(processes)
    ]  # fmt: skip
    told = [process.communicate(timeout=200) for process in started]
    return subprocess.CompletedProcess(
        words, max(p.returncode for p in started), told[0][0], "".join(t[1] for t in told)
    )


def log(output):
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [(row["epoch"], row["loss"], row.get("top1")) for row in rows if row["kind"] == "epoch"]


@pytest.mark.exhaustive
def test_the_page_runs_as_it_is_printed(tmp_path, monkeypatch):
    """But for the size of the tars and of the run, and the addresses of the nodes."""
    write_folder(tmp_path / "photos", {"cat": 40, "dog": 40}, seed=3)
    (tmp_path / "empty").mkdir()
    convert, in_parts, train, windowed, several = (block.strip() for block in blocks("sh"))
    with s3_store(tmp_path / "empty", monkeypatch, bucket="my-bucket") as served:
        for line in (convert.replace("--shard-size 100", "--shard-size 4"), *in_parts.splitlines()):
            done = command(shlex.split(line), tmp_path)
            assert done.returncode == 0, f"{line}: {done.stderr}"
        assert done.stdout.startswith("s3://my-bucket/in-parts: 2 classes, 64 train, 16 val images")
        for line in (*train.splitlines(), windowed):
            words = shlex.split(line)
            done = command([*words, *(FAST if words[0] == "pss-train" else [])], tmp_path)
            assert done.returncode == 0, f"{line}: {done.stderr}"
            assert "Traceback" not in done.stderr
        assert "windowed order: 2 tars at a time of each of 8 groups" in done.stderr
        assert set(served.tars().values()) == {1}, "three commands on one cache"
        words = shlex.split(several.partition("--no-python ")[2])
        words[words.index("deit-s-224")] = "cifar10"
        here = {
            "s3://my-bucket/imagenet-21k": "s3://my-bucket/photos",
            "/shared/runs/deit-s": "runs/nodes",
            "/local/pss": "local",
        }
        small = ["--set", "data.groups=8"]
        done = command([*(here.get(word, word) for word in words), *FAST, *small], tmp_path, processes=2)
        assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "runs" / "nodes" / "summary.json").read_text())["finished"] is True


def train(data, output, *words):
    return ["pss-train", "cifar10", "--data", str(data), "--output", str(output), "--loader", "torch", *FAST, *words]


def test_a_run_from_a_store_is_the_run_from_the_disk(tarred, tmp_path):
    """Its log too; each tar is fetched once an epoch."""
    windowed = ["--set", "data.window=1", "--set", "data.groups=4"]
    limit = place.windowed_bytes(read_manifest(tarred)[0], 4, 1, 8, 1) / 1e9
    with http_store(tarred) as served:
        served.faults["train-00003.tar"] = ["500", "drop"]
        cache = ["--cache-dir", str(tmp_path / "cache"), "--cache-gb", repr(limit)]
        for data, name, more in ((served.url, "store", cache), (tarred, "disk", [])):
            done = command(train(data, tmp_path / name, *windowed, *more), tmp_path)
            assert done.returncode == 0, done.stderr
    assert log(tmp_path / "store") == log(tmp_path / "disk")
    own = Counter(served.tars()) - Counter({"train-00003.tar": 2})
    assert max(own.values()) <= 2, "of two epochs"


def test_a_set_that_does_not_fit_is_read_in_windows_and_the_run_keeps_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(place, "_BATCHES_AT_ONCE", 1)  # with no workers
    write_folder(tmp_path / "photos" / "train", {"cat": 66, "dog": 66}, seed=4)
    convert_folder(tmp_path / "photos", tmp_path / "set", "dali", shard_size=1)
    limit = place.windowed_bytes(read_manifest(tmp_path / "set")[0], 64, 1, 64, 1)
    more = ["--set", "train.batch_size=64", "--set", "train.num_workers=0", "--set", "schedule.lengths=1,1"]
    cache = [*more, "--cache-dir", str(tmp_path / "cache"), "--cache-gb"]
    with http_store(tmp_path / "set") as served:
        words = train(served.url, tmp_path / "run", *cache)[1:]
        told = refused(capsys, cli.train.app, *words, repr((limit - 1) / 1e9))
        assert "a permutation of all samples needs the whole set; raise --cache-gb, or set data.window and" in told
        assert not (tmp_path / "run" / "config.json").exists()
        run_app(cli.train.app, [*words, repr(limit / 1e9), "--set", "train.max_steps=1"])
        told = capsys.readouterr().err
        assert "windowed order: 1 tars at a time of each of 64 groups, 2 steps an epoch, which leaves out 4" in told
        run_app(cli.train.app, [*words, "1", "--resume"])
        assert "windowed order: 1 tars" in capsys.readouterr().err
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["data"]
    assert (settings["window"], settings["groups"]) == (1, 64)
    told = refused(capsys, cli.train.app, *train(tmp_path / "set", tmp_path / "run", *more, "--resume")[1:])
    assert "data.window (1, None)" in told


def refused(capsys, app, *words):
    with pytest.raises(SystemExit) as left:
        run(app, [str(word) for word in words])
    told = capsys.readouterr()
    assert left.value.code == 2
    assert re.fullmatch(r"error: [^\n]+\n", told.err), told.err
    return told.err


def test_what_is_refused_is_one_sentence(tarred, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stores, "TRIES", 2)
    options = ["--output", tmp_path / "run", "--loader", "torch", *FAST, "--cache-dir", tmp_path / "cache"]
    with http_store(tarred) as served:
        base = ["cifar10", "--data", served.url, *options]
        err = refused(capsys, cli.train.app, "cifar10", "--data", f"{served.url}x/y/none", "--output", tmp_path / "run")
        assert "dataset.json" in err
        err = refused(capsys, cli.train.app, *base, "--loader", "ffcv")
        assert "copy the set here, or use another loader" in err
        err = refused(capsys, cli.train.app, *base, "--cache-gb", 0)
        assert "--cache-gb is 0; it must be a number above 0" in err
        err = refused(
            capsys, cli.train.app, *base, "--set", "data.window=1", "--set", "data.groups=4", "--cache-gb", "1e-4"
        )
        assert "3 x 1 tars (data.window) of each of the 4 groups" in err
        served.faults["train-00001.tar"] = ["always 404"]
        err = refused(capsys, cli.train.app, *base, "--quiet")
        assert f"{served.url}/train-00001.tar is not there; see that the address is right" in err
    err = refused(capsys, cli.train.app, "cifar10", "--data", tarred, "--output", tmp_path / "other", "--cache-gb", 3)
    assert "--cache-gb is for --data at an address" in err
    err = refused(capsys, cli.train.app, "cifar10", "--plan", "--cache-gb", 3)
    assert "--cache-dir and --cache-gb are for --data at an address; give it, or leave them out" in err
    err = refused(capsys, cli.eval.app, "timm:vit_tiny_patch16_224", "--data", tarred, "--cache-dir", tmp_path)
    assert "--cache-dir is for --data at an address" in err


def test_the_plan_counts_the_steps_of_the_windowed_order(tarred, tmp_path, capsys):
    words = ["cifar10", "--plan", "--data", tarred, *FAST, "--set", "data.window=1", "--set", "data.groups=4"]
    run_app(cli.train.app, words)
    planned = capsys.readouterr().out
    with http_store(tarred) as served:
        words[words.index(tarred)] = served.url
        run_app(cli.train.app, [*words, "--cache-dir", tmp_path])
    assert capsys.readouterr().out == planned
    assert "2 epochs of 5 steps, 8 images a step" in planned


def run_app(app, words):
    with pytest.raises(SystemExit) as left:
        run(app, [str(word) for word in words])
    assert not left.value.code


@pytest.mark.exhaustive
def test_two_processes_evaluate_from_a_store(tarred, tmp_path, monkeypatch):
    done = command(train(tarred, tmp_path / "run"), tmp_path)
    assert done.returncode == 0, done.stderr
    tables = []
    with s3_store(tarred, monkeypatch) as served:
        for data, processes, more in ((tarred, 1, []), (served.url, 2, ["--cache-dir", str(tmp_path / "cache")])):
            words = ["pss-eval", str(tmp_path / "run"), "--data", str(data), "--output", str(tmp_path / f"{processes}")]
            done = command([*words, "--rho", "1.0,0.6", "--batch-size", "4", *more], tmp_path, processes)
            assert done.returncode == 0, done.stderr
            rows = json.loads((tmp_path / f"{processes}" / "rho.json").read_text())
            rows = rows["rows"] if isinstance(rows, dict) else rows
            tables.append([(row["rho"], row["top1"]) for row in rows])
        assert set(served.tars("val").values()) == {1}
        assert not served.tars("train")
    assert tables[0] == tables[1]
    assert BUCKET in served.url
