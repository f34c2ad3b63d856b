"""Files are whole or not there, wherever the disk fills up, and an obstacle is found before it is met."""

from __future__ import annotations

import os

import pytest

from pipelines.base import in_words
from pss.runtime import files

PAGE = os.sysconf("SC_PAGE_SIZE")
OLD = {"a": b"old", "b": b"old", "c": b"old"}
NEW = {"a": b"1" * PAGE, "b": "ü" * PAGE, "c": b"3" * 10}  # 1, 2 and 1 pages


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else None


def encoded(some):
    return {name: value if isinstance(value, bytes) else value.encode() for name, value in some.items()}


@pytest.mark.parametrize("there", [False, True])
def test_a_full_disk_leaves_a_folder_as_it_was(small_disk, there):
    disk = small_disk(64 * PAGE)
    for pages in range(4):
        folder = disk.path / str(pages) / "deep"
        if there:
            disk.leave(8 * PAGE)
            files.write_folder(folder, OLD)
        disk.leave(pages * PAGE)
        with pytest.raises(OSError, match=str(folder)) as told:
            files.write_folder(folder, NEW)
        assert in_words(told.value) == "no space left on that disk"
        assert contents(folder) == (OLD if there else None)
        assert folder.parent.exists() == there
    disk.leave(8 * PAGE)
    files.write_folder(folder, NEW)
    assert contents(folder) == encoded(NEW)
    assert not [name for name in disk.files() if "partial" in name]


def test_a_full_disk_leaves_the_older_file(small_disk):
    disk = small_disk(16 * PAGE)
    files.write(disk.path / "one", "before")
    for free in (0, PAGE, 2 * PAGE):
        disk.leave(free)
        with pytest.raises(OSError, match="one"):
            files.write(disk.path / "one", b"x" * (3 * PAGE))
        assert (disk.path / "one").read_text() == "before"
        assert disk.files() == ["one"]


def test_what_is_made_for_a_file_is_taken_back_with_it(tmp_path):
    with pytest.raises(OSError, match="new") as told:
        files.write(tmp_path / "new" / "folder" / ("n" * 300), "x")
    assert in_words(told.value) == "the name is too long"
    assert list(tmp_path.iterdir()) == []
    longest = tmp_path / "new" / ("n" * 255)
    files.write(longest, "\udcff")
    assert longest.read_bytes() == b"\\udcff"
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder") as told:
        files.write_all(tmp_path, {"first": "x", "folder": "x"})
    assert in_words(told.value) == "it is a folder"
    assert not (tmp_path / "first").exists()


def test_an_obstacle_is_named_and_nothing_is_left(small_disk, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    sealed = small_disk(16 * PAGE)
    sealed.seal()
    before = sorted(tmp_path.iterdir())
    for path, folder, words in [
        ("new", True, None),
        ("new/deep/deeper", True, None),
        ("new/file.json", False, None),
        ("folder", True, None),
        ("file", False, None),
        ("file", True, "a file is in the way"),
        ("broken", True, "a file is in the way"),
        ("file/x", True, "a file is in the way"),
        ("file/x/y", False, "a file is in the way"),
        ("folder", False, "it is a folder"),
        ("n" * 300, True, "the name is too long"),
        (f"new/{'n' * 300}/x", False, "the name is too long"),
        (sealed.path, True, "read-only file system"),
        (sealed.path / "new" / "x", False, "read-only file system"),
    ]:
        assert files.obstacle(tmp_path / path, folder=folder) == words, path
    assert sorted(tmp_path.iterdir()) == before
    assert list((tmp_path / "folder").iterdir()) == []


def test_errors_of_the_system_are_words():
    for number in range(1, 134):
        told = in_words(OSError(number, os.strerror(number), "file"))
        assert told
        assert "Errno" not in told
        assert "\n" not in told
    assert in_words(FileExistsError(17, "File exists")) == "a file is in the way"
    assert in_words(OSError("two\nlines")) == "two lines"
    assert in_words(KeyError()) == "KeyError"
