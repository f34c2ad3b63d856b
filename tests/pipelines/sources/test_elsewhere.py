"""Sources at an address: the same data set as from a folder, whatever the store does, and nothing outside the copy."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import Silent, write_folder
from stores import BUCKET, http_store, s3_store
from test_convert_sources import KEPT, Samples, cifar_files, samples, write_tar

import cli.convert
from cli.errors import run
from pipelines.base import DataError
from pipelines.conversion import engines
from pipelines.conversion.convert import convert, merge
from pipelines.conversion.options import Options
from pipelines.conversion.processes import Kept
from pipelines.remote import mirror, objects
from pipelines.remote import store as stores
from pipelines.sources.columns.tree import list_tree
from pipelines.sources.elsewhere import called, list_store
from pipelines.sources.listing import Choice, inspect

__all__ = ["samples"]
PREFIX = "sets/small/"


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Brief pauses, copies in the test's folder, and the work in this process: others take long to start."""
    monkeypatch.setattr(stores, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(stores, "TRIES", 3)
    monkeypatch.setattr(engines, "map_processes", at_work)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(objects, "_stores", {})


def at_work(
    function: Callable[[Any], Any], tasks: Sequence[Any], jobs: int, on_result: Callable[[Any], None], patience: float
) -> list[Any]:
    results = []
    for task in tasks:
        results.append(function(task))
        on_result(results[-1])
    return results


def make(source: str | Path, dest: Path, tell: Callable[[str], None] = lambda line: None, **options: Any) -> Any:
    settings = Options(**{"formats": ("dali",), "shard_size": 5, "jobs": 1} | options)
    return convert(str(source), dest, settings, Silent(), tell)


def check_same(found: Path, expected: Path, url: str, source: Path) -> None:
    """Every file, byte for byte, but for the address in the manifest."""
    files = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in found.iterdir()) == files
    for name in files:
        if name != "dataset.json":
            assert (found / name).read_bytes() == (expected / name).read_bytes(), name
    told = [
        json.loads((found / "dataset.json").read_text().replace(url, str(source))),
        json.loads((expected / "dataset.json").read_text()),
    ]
    for one in told:
        del one["sha256"]  # of the rest
    assert told[0] == told[1]


def copies(tmp_path: Path) -> list[str]:
    """The files of all copies, without the locks."""
    below = tmp_path / "cache" / "pss" / "sources"
    return sorted(path.relative_to(below).as_posix().split("/", 2)[2] for path in below.glob("*/files/**/*.*"))


def client() -> Any:
    import boto3

    return boto3.client("s3")


def put(key: str, body: bytes = b"") -> None:
    client().put_object(Bucket=BUCKET, Key=f"{PREFIX}{key}", Body=body)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Class folders, with a file that is read as what it is."""
    folder = tmp_path / "photos"
    write_folder(folder / "train", {"cat": 4, "dog": 3})
    write_folder(folder / "val", {"cat": 2, "dog": 2}, seed=1)
    (folder / "notes.txt").write_text("of cats and dogs\n")
    return folder


SOME = ("folders", "name and wnid", "parquet", "tars, json")


@pytest.mark.parametrize(
    "kind", [kind if kind in SOME else pytest.param(kind, marks=pytest.mark.exhaustive) for kind in KEPT]
)
def test_every_kind_of_source_gives_the_same_set(
    kind: str, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "src").mkdir()
    source = KEPT[kind](tmp_path / "src", samples)
    make(source, tmp_path / "here")
    with s3_store(source, monkeypatch, nested=True) as served:
        told: list[str] = []
        make(served.url, tmp_path / "there", told.append)
    check_same(tmp_path / "there", tmp_path / "here", served.url, source)
    assert "cache" not in (tmp_path / "there" / "dataset.json").read_text()
    assert copies(tmp_path) == []
    assert not (tmp_path / "cache" / "pss" / "sources").exists()
    files = [path for path in source.rglob("*") if path.is_file()]
    fetched = [path for path in files if path.suffix != ".JPEG"]
    assert any("fetching" in line for line in told) == bool(fetched)
    # An image is read as it is checked and as it is written, anything else once.
    assert sum(served.gets.values()) == 2 * len(files) - len(fetched)


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("store", ["s3", "http"])
def test_cifar(single: bool, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, _ = cifar_files(False)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    name = "cifar-10-python.tar.gz"
    if single:
        write_tar(folder / name, {f"cifar-10-batches-py/{name}": content for name, content in files.items()}, "w:gz")
    else:
        for one, content in files.items():
            (folder / one).write_bytes(content)
    source = folder / name if single else folder
    if store == "http" and not single:
        with http_store(folder) as served, pytest.raises(DataError, match="web servers do not say what is in one"):
            make(f"{served.url}/", tmp_path / "there")
        return
    make(source, tmp_path / "here")
    with s3_store(folder, monkeypatch, nested=True) if store == "s3" else http_store(folder) as served:
        if not single:  # the folder tells what it is
            for one, content in files.items():
                put(f"cifar-10-batches-py/{one}", content)
        url = f"{served.url}/{name}" if single else f"{served.url}/cifar-10-batches-py"
        make(url, tmp_path / "there")
    check_same(tmp_path / "there", tmp_path / "here", url, source)


def test_a_signature_is_asked_with_and_never_told(tmp_path: Path, samples: Samples) -> None:
    (tmp_path / "src").mkdir()
    source = KEPT["tars, json"](tmp_path / "src", samples)
    told: list[str] = []
    with http_store(source) as served:
        with pytest.raises(DataError) as info:
            make(f"{served.url}/nothing.tar?X-Sig=secret", tmp_path / "there", told.append, split="train")
        assert "secret" not in str(info.value)
        with pytest.raises(DataError) as info:  # the server knows no queries
            make(f"{served.url}/train-0000.tar?X-Sig=secret", tmp_path / "there", told.append, split="train")
        assert "secret" not in "".join([str(info.value), *told])
    for address in ("https://me:secret@host/x.tar", "zip://a::https://me:secret@host/x.zip"):
        with pytest.raises(DataError) as info:
            called(address)
        assert "secret" not in str(info.value)


def tree_of(draw: random.Random, root: Path) -> None:
    """Folders of any depth with names of many kinds."""
    names = [
        "a",
        "Ä",
        "b b",
        ".hidden",
        "._x",
        "Thumbs.db",
        "c+d",
        "e%20f",
        "日本",
        "g#h",
        "i[1]",
        "val",
        "k?",
        "l&m='\"",
    ]
    folders = [""]
    for _ in range(draw.randint(1, 9)):
        folders.append(f"{draw.choice(folders)}/{draw.choice(names)}".lstrip("/"))
    for folder in folders:
        for _ in range(draw.randint(0, 4)):
            name = draw.choice(names) + draw.choice([".jpg", ".PNG", ".txt", ".tar", ".zip", ""])
            path = root / folder / name
            if not path.exists() and not any(up.is_file() for up in path.parents):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(name.encode())
    (root / "one.jpg").parent.mkdir(parents=True, exist_ok=True)
    (root / "one.jpg").write_bytes(b"1")


@pytest.mark.parametrize("seed", [0, *(pytest.param(i, marks=pytest.mark.exhaustive) for i in range(1, 12))])
def test_a_listing_is_that_of_the_same_tree_on_the_disk(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(seed)
    tree_of(draw, tmp_path / "src")
    for folder in sorted((path for path in (tmp_path / "src").rglob("*") if path.is_dir()), reverse=True):
        if not any(path.is_file() for path in folder.rglob("*")):
            folder.rmdir()  # stores have no empty folders
    with s3_store(tmp_path / "src", monkeypatch, nested=True) as served:
        for pattern in ([], ["*.txt"], ["./one.jpg"], ["nothing"], ["b b", "*.zip"]):
            ways: list[Any] = []
            for list_it in (partial(list_tree, tmp_path / "src"), partial(list_store, served.url, Choice())):
                try:
                    tree = list_it(ignore=pattern, **({} if list_it.func is list_tree else {"reach": mirror.Reach()}))
                    told: Any = {folder: list(names) for folder, names in tree.folders.items()}
                    ways.append((list(told.items()), dict(tree.ignored), tree.found))
                except DataError as error:
                    ways.append(str(error).replace(served.url, str(tmp_path / "src")))
            assert ways[0] == ways[1]


def test_what_stands_for_folders_is_passed_by(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(photos, tmp_path / "here")
    with s3_store(photos, monkeypatch, nested=True) as served:
        for key in ("", "train/", "train/cat/", "val"):
            put(key)
        client().put_object(Bucket=BUCKET, Key=PREFIX.rstrip("/"), Body=b"")
        make(served.url, tmp_path / "there")
    check_same(tmp_path / "there", tmp_path / "here", served.url, photos)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("train/../../../../gone.txt", r"train/\.\.: a name that no file can have"),
        ("train/./x.txt", r"train/\.: a name that no file can have"),
        ("train//x.txt", "train/: a name that no file can have"),
        ("/etc/x.txt", "small/: a name that no file can have"),
        ("x/", "x/: a name that no file can have"),
        ("val/cat/" + "n" * 252 + ".txt", "a name of more than 255 bytes"),
        ("train/cat", "train/cat: the name of an object and of a folder"),
        ("a/" * 70 + "x.txt", "lies 64 folders deep"),
        ("cafe\u0301.txt", "two names that differ in their Unicode form alone"),
    ],
)
def test_names_that_are_no_paths_are_refused(
    key: str, words: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (photos / "caf\u00e9.txt").write_text("x")
    with s3_store(photos, monkeypatch, nested=True) as served:
        put(key, b"content")
        with pytest.raises(DataError, match=words):
            make(served.url, tmp_path / "there")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]


@pytest.mark.exhaustive
def test_a_name_that_is_no_path_can_be_left_out(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_store(photos, monkeypatch, nested=True) as served:
        put("train/../x.txt", b"content")
        assert make(served.url, tmp_path / "there", ignore=("..",)).splits["train"].num_samples == 7


@pytest.mark.parametrize(
    ("name", "fault"), [("notes.txt", fault) for fault in ("500", "drop", "short", "403")] + [("000.jpg", "500")]
)
def test_faults_that_pass(name: str, fault: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(photos, tmp_path / "here")
    with s3_store(photos, monkeypatch, nested=True) as served:
        served.faults[name] = [fault]
        if fault == "403":  # no use to ask again, in this run
            with pytest.raises(DataError, match=r"notes.txt may not be read from here"):
                make(served.url, tmp_path / "there")
        make(served.url, tmp_path / "there")
    check_same(tmp_path / "there", tmp_path / "here", served.url, photos)


@pytest.mark.parametrize(
    ("name", "fault", "words"),
    [
        pytest.param(
            *("list", "500", "s3://pictures/sets/small could not be had in 3 attempts"), marks=pytest.mark.exhaustive
        ),
        ("notes.txt", "500", "small/notes.txt could not be had in 3 attempts, .* the same command continues"),
        pytest.param(
            *("notes.txt", "short", "small/notes.txt could not be had in 3 attempts"), marks=pytest.mark.exhaustive
        ),
        pytest.param(
            *("003.jpg", "500", "train/cat/003.jpg could not be had in 3 attempts, .* the same command continues"),
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(  # s3fs itself asks five times again each time
            *("003.jpg", "drop", "train/cat/003.jpg could not be had in 3 attempts"), marks=pytest.mark.exhaustive
        ),
        ("003.jpg", "403", "train/cat/003.jpg may not be read from here"),
        pytest.param(
            *("003.jpg", "404", "train/cat/003.jpg is not there any more; restore it, and the same command continues"),
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_faults_that_stay_end_in_a_sentence_and_the_same_command_continues(
    name: str, fault: str, words: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(photos, tmp_path / "here")
    with s3_store(photos, monkeypatch, nested=True) as served:
        served.faults[name] = [f"always {fault}"]
        with pytest.raises(Kept if name == "003.jpg" else DataError, match=words) as info:
            make(served.url, tmp_path / "there")
        assert "cache" not in str(info.value)
        served.faults.clear()
        make(served.url, tmp_path / "there")
    check_same(tmp_path / "there", tmp_path / "here", served.url, photos)


def test_an_outage_of_a_conversion_that_goes_on_loses_nothing(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_store(photos, monkeypatch, nested=True) as served:
        served.faults["003.jpg"] = ["always 500"]
        with pytest.raises(Kept):
            make(served.url, tmp_path / "there")
        served.faults["list"] = ["always 500"]
        finished = sorted((tmp_path / ".there.partial" / "work").iterdir())
        with pytest.raises(Kept, match="could not be had"):
            make(served.url, tmp_path / "there")
        assert sorted((tmp_path / ".there.partial" / "work").iterdir()) == finished
        served.faults.clear()
        make(served.url, tmp_path / "there")


def test_a_fetch_that_was_interrupted_goes_on(
    tmp_path: Path, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "src").mkdir()
    source = KEPT["tars, json"](tmp_path / "src", samples)
    make(source, tmp_path / "here")
    with s3_store(source, monkeypatch, nested=True) as served:
        served.faults["val-0001.tar"] = ["always 500"]
        with pytest.raises(DataError, match=r"val-0001.tar could not be had"):
            make(served.url, tmp_path / "there")
        there = copies(tmp_path)
        assert "val-0001.tar" not in there
        served.faults.clear()
        served.gets.clear()
        for line in make_and_tell(served.url, tmp_path / "there"):
            if line.startswith("fetching"):
                assert ("val-0001.tar of" in line) == (len(there) == 4)
        assert not any(served.gets[name] for name in there)
        assert served.gets["val-0001.tar"] == 1
    check_same(tmp_path / "there", tmp_path / "here", served.url, source)


def make_and_tell(source: str, dest: Path, **options: Any) -> list[str]:
    told: list[str] = []
    make(source, dest, told.append, **options)
    return told


@pytest.mark.exhaustive
def test_a_file_that_changes_between_fetches_is_fetched_again(
    tmp_path: Path, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "src").mkdir()
    source = KEPT["tars, json"](tmp_path / "src", samples)
    with s3_store(source, monkeypatch, nested=True) as served:
        found = inspect(served.url, Choice())
        names = sorted(path.name for path in source.iterdir())
        assert copies(tmp_path) == names
        gets = served.gets.copy()
        assert inspect(served.url, Choice()).as_dict() == found.as_dict()
        assert served.gets == gets  # the copy stays, and serves
        swapped = (source / "classes.txt").read_text().split()[::-1]
        put("classes.txt", ("\n".join(swapped) + "\n").encode())  # of the same size
        assert list(inspect(served.url, Choice()).claim.classes) == swapped
        assert served.gets["classes.txt"] == 2


def test_a_file_that_changes_as_it_is_fetched_is_noticed(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_store(photos, monkeypatch, nested=True) as served:
        fetch = stores.Store.fetch

        def late(self: Any, file: str, *more: Any) -> None:
            put("notes.txt", b"of dogs and cats\n")
            fetch(self, file, *more)

        monkeypatch.setattr(stores.Store, "fetch", late)
        with pytest.raises(DataError, match=r"small/notes.txt has changed since the source was listed"):
            make(served.url, tmp_path / "there")


def test_an_image_that_changes_after_it_was_checked_is_noticed(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_store(photos, monkeypatch, nested=True) as served:
        check = engines.map_processes

        def later(function: Any, tasks: Any, *more: Any) -> Any:
            found = check(function, tasks, *more)
            put("train/cat/001.jpg", (photos / "train" / "cat" / "002.jpg").read_bytes())
            return found

        monkeypatch.setattr(engines, "map_processes", later)
        with pytest.raises(Kept, match=r"s3://.*/train/cat/001.jpg changed while it was being converted"):
            make(served.url, tmp_path / "there")


@pytest.mark.exhaustive
def test_parts_read_their_share_and_the_last_one_clears_up(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(photos, tmp_path / "here", shard_size=2)
    with s3_store(photos, monkeypatch, nested=True) as served:
        parts = {"shard_size": 2, "work_dir": tmp_path / "work"}
        assert make(served.url, tmp_path / "there", part=(1, 2), **parts) is None
        assert list((tmp_path / "work" / "sources").glob("*/files/notes.txt"))
        assert make(served.url, tmp_path / "there", part=(2, 2), **parts) is not None
        images = sum(count for name, count in served.gets.items() if name.endswith(".jpg"))
        assert images == 2 * 11
        assert list((tmp_path / "work").iterdir()) == []
    check_same(tmp_path / "there", tmp_path / "here", served.url, photos)


def test_merging_a_conversion_in_parts(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(photos, tmp_path / "here", shard_size=2)
    with s3_store(photos, monkeypatch, nested=True) as served:
        assert make(served.url, tmp_path / "there", part=(1, 2), shard_size=2) is None
        merge(tmp_path / "there", 1, Silent(), lambda line: None, work_dir=tmp_path / "work")
    check_same(tmp_path / "there", tmp_path / "here", served.url, photos)


@pytest.mark.exhaustive
def test_a_copy_that_another_process_uses_stays(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_store(photos, monkeypatch, nested=True) as served:
        used = inspect(served.url, Choice())
        make(served.url, tmp_path / "there")
        assert copies(tmp_path) == ["notes.txt"]
        used.remove_copies()
        assert not (tmp_path / "cache" / "pss" / "sources").exists()


def test_several_at_once_fetch_once(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_store(photos, monkeypatch, nested=True) as served:
        found: list[Any] = []
        threads = [threading.Thread(target=lambda: found.append(inspect(served.url, Choice()))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 3
        assert served.gets["notes.txt"] == 1


def test_copies_need_room(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_store(photos, monkeypatch, nested=True) as served:
        usage = type("Usage", (), {"free": 10})
        monkeypatch.setattr(mirror.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(
            DataError, match=r"--work-dir /\S+ has 0.0 MB left, and the files of s3://\S+ that are read"
        ):
            make(served.url, tmp_path / "there")
        (tmp_path / "file").write_text("")
        with pytest.raises(DataError, match=r"--work-dir /\S+/file cannot be written \(a file is in the way\)"):
            make(served.url, tmp_path / "there", work_dir=tmp_path / "file")


def test_errors_name_the_address(tmp_path: Path, samples: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a reader finds wrong with a copy."""
    (tmp_path / "src").mkdir()
    source = KEPT["tars, json"](tmp_path / "src", samples)
    tar = source / "train-0000.tar"
    tar.write_bytes(tar.read_bytes()[:3000])
    (source / "val-0002.tar.zst").write_bytes(b"x")
    with s3_store(source, monkeypatch, nested=True) as served:
        with pytest.raises(DataError, match=r"s3://pictures/sets/small/train-0000.tar is damaged or no tar") as info:
            make(served.url, tmp_path / "there")
        assert "cache" not in str(info.value)
        with pytest.raises(DataError, match=r"s3://pictures/sets/small/train-0000.tar is damaged or no tar"):
            inspect(f"{served.url}/train-0000.tar", Choice())
        with pytest.raises(DataError, match=r"s3://pictures/sets/small/val-0002.tar.zst is a compressed archive"):
            inspect(f"{served.url}/val-0002.tar.zst", Choice())
        assert served.gets["val-0002.tar.zst"] == 0  # nobody would read it


@pytest.mark.exhaustive
def test_unreadable_images_are_named_by_the_address(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (photos / "train" / "cat" / "bad.jpg").write_bytes(b"no image")
    (photos / "train" / "cat" / "empty.jpg").write_bytes(b"")
    make(photos, tmp_path / "here", on_error="skip")
    with s3_store(photos, monkeypatch, nested=True) as served:
        made = make(served.url, tmp_path / "there", on_error="skip")
        assert [one["file"] for one in made.skipped] == [
            f"{served.url}/train/cat/bad.jpg",
            f"{served.url}/train/cat/empty.jpg",
        ]
    check_same(tmp_path / "there", tmp_path / "here", served.url, photos)


def test_no_more_is_read_of_an_image_than_images_may_have(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.sources.columns.samples.MAX_ENCODED", 20_000)
    with s3_store(photos, monkeypatch, nested=True) as served:
        put("train/cat/large.jpg", bytes(3_000_000))
        asked: list[int | None] = []
        read = stores.Store.read
        monkeypatch.setattr(
            stores.Store,
            "read",
            lambda self, file, offset, length, alive: asked.append(length) or read(self, file, offset, length, alive),
        )
        with pytest.raises(DataError, match=r"cat/large.jpg: larger than 0 MiB"):
            make(served.url, tmp_path / "there")
    assert set(asked) == {20_001}


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ("s3://pictures/nothing", {}, "there is nothing at s3://pictures/nothing"),
        ("s3://elsewhere/nothing", {}, "there is nothing at s3://elsewhere/nothing"),
        ("s3://", {}, "names no bucket"),
        ("s3://pictures/sets/small", {"follow_links": True}, "--follow-links is for folders of this machine"),
        ("s3://pictures/sets/small", {"ignore": ("nope",)}, "--ignore nope fits nothing in s3://pictures/sets/small"),
        ("what://pictures/small", {}, "SOURCE what://pictures cannot be opened"),
        ("PHOTOS", {"work_dir": Path("x")}, "--work-dir is for a place at an address"),
        ("file://PHOTOS", {"work_dir": Path("x")}, "--work-dir is for a place at an address"),
    ],
)
def test_what_is_refused(
    source: str, options: dict[str, Any], words: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_store(photos, monkeypatch, nested=True), pytest.raises(DataError, match=words):
        make(source.replace("PHOTOS", str(photos)), tmp_path / "there", **options)


def test_a_converted_set_is_refused_before_its_tars_are_fetched(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(photos, tmp_path / "here")
    with s3_store(tmp_path / "here", monkeypatch, nested=True) as served:
        with pytest.raises(DataError, match="s3://pictures/sets/small has been converted already"):
            make(served.url, tmp_path / "there")
        assert set(served.gets) == {"dataset.json"}


def test_a_folder_behind_file_is_that_folder(photos: Path, tmp_path: Path) -> None:
    make(photos, tmp_path / "here")
    make(f"file://{photos}", tmp_path / "there")
    check_same(tmp_path / "there", tmp_path / "here", str(photos), photos)


def test_the_command_inspects(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with s3_store(photos, monkeypatch, nested=True) as served:
        found = []
        for source in (str(photos), served.url):
            monkeypatch.setattr("sys.argv", ["pss-convert", source, "--inspect", "--json"])
            with pytest.raises(SystemExit) as info:
                run(cli.convert.app)
            assert not info.value.code
            found.append(capsys.readouterr().out.replace(served.url, str(photos)))
        assert found[0] == found[1]
        assert json.loads(found[0])["splits"]["train"]["samples"] == 7
        monkeypatch.setattr("sys.argv", ["pss-convert", f"{served.url}/none", "--inspect"])
        with pytest.raises(SystemExit) as info:
            run(cli.convert.app)
        assert info.value.code == 2
        assert "there is nothing at s3://pictures/sets/small/none" in capsys.readouterr().err


def test_images_are_read_ahead_in_order(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long each takes to come."""
    from pipelines.sources.columns.samples import Sample, reading

    running, most = [0], [0]
    counting = threading.Lock()

    def slowly(address: str, length: int, alive: Callable[[], object]) -> bytes:
        with counting:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(random.Random(address).random() / 50)
        with counting:
            running[0] -= 1
        return address.encode()

    monkeypatch.setattr("pipelines.sources.columns.samples.read_object", slowly)
    many = [Sample(f"{i}", 0, f"s3://b/{i}") for i in range(100)]
    found = [read() for read in reading(many, lambda: None)]
    assert found == [one.path.encode() for one in many]
    assert 8 < most[0] <= 16


@pytest.mark.exhaustive
def test_processes_and_many_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With processes of its own, and more objects in a folder than a page of a listing has."""
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_folder(tmp_path / "src" / "train", {"cat": 3, "dog": 3})
    write_folder(tmp_path / "src" / "val", {"cat": 3, "dog": 3})
    image = (tmp_path / "src" / "train" / "cat" / "000.jpg").read_bytes()
    for i in range(1100):
        (tmp_path / "src" / "train" / "cat" / f"more{i:04d}.jpg").write_bytes(image)
    make(tmp_path / "src", tmp_path / "here", jobs=2, shard_size=500)
    with s3_store(tmp_path / "src", monkeypatch, nested=True) as served:
        make(served.url, tmp_path / "there", jobs=2, shard_size=500)
    check_same(tmp_path / "there", tmp_path / "here", served.url, tmp_path / "src")
