"""Random access to encoded images: the same bytes and labels from a folder and from its conversion."""

from __future__ import annotations

import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import picture, write_folder
from PIL import Image

from pipelines.base import DataError
from pipelines.storage.manifest import read_manifest
from pipelines.storage.source import FolderSource, TarSource, open_source


def test_a_folder_comes_in_the_order_of_class_and_name(image_root: Path) -> None:
    source = FolderSource(image_root, "validation")  # an alias of val
    assert source.classes == ("cat", "dog", "emu")
    assert source.names[:2] == ["cat/000.jpg", "cat/001.jpg"]
    assert source.labels.tolist() == [0] * 8 + [1] * 9 + [2] * 6
    index = np.array([20, 3, 3, 11])
    heights, widths = source.sizes(index)
    for i, height, width, encoded in zip(index, heights, widths, source.read_many(index), strict=True):
        path = Path(source.name(i))
        assert encoded.tobytes() == path.read_bytes()
        with Image.open(path) as image:
            assert image.size == (width, height)
    source.close()


@pytest.mark.parametrize("split", ["train", "val"])
def test_tars_hold_the_folders_bytes(split: str, image_root: Path, converted_root: Path) -> None:
    folder, tars = FolderSource(image_root, split), TarSource(converted_root, split)
    every = np.arange(folder.num_samples)
    files = {folder.read(i).tobytes(): (folder.labels[i], *np.stack(folder.sizes(every), 1)[i]) for i in every}
    stored = [(tars.read(i).tobytes(), tars.labels[i], *np.stack(tars.sizes(every), 1)[i]) for i in every]
    assert len(files) == len({encoded for encoded, *_ in stored}) == tars.num_samples
    for encoded, *facts in stored:
        assert tuple(facts) == files[encoded]
    order = [encoded for encoded, *_ in stored]
    assert (order == list(files)) == (split == "val")  # the training split is shuffled once


def test_the_name_of_a_sample_leads_to_it(converted_root: Path) -> None:
    source = TarSource(converted_root, "train")
    shard, member = source.name(45).split(", member ")
    with tarfile.open(shard) as tar:
        content = tar.extractfile(member)
        assert content is not None
        assert content.read() == source.read(45).tobytes()


@pytest.mark.parametrize("converted", [True, False])
def test_sources_travel_to_other_processes(converted: bool, image_root: Path, converted_root: Path) -> None:
    source = open_source(converted_root if converted else image_root, "train")
    before = source.read(5).tobytes()
    message = pickle.dumps(source)
    assert pickle.loads(message).read(5).tobytes() == before
    assert len(message) < 10_000


def test_fingerprints_tell_data_sets_apart(image_root: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"cat": 17, "dog": 19, "emu": 17}, seed=1)
    same, original = FolderSource(tmp_path, "train"), FolderSource(image_root, "train")
    assert same.fingerprint == original.fingerprint != FolderSource(image_root, "val").fingerprint
    picture(50, 50, 0).save(tmp_path / "train" / "cat" / "new.jpg")
    assert FolderSource(tmp_path, "train").fingerprint != original.fingerprint


def test_what_is_wrong_with_a_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no folder"):
        FolderSource(tmp_path / "none", "train")
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="has no val split"):
        FolderSource(tmp_path, "val")
    (tmp_path / "train" / "cat").mkdir()
    with pytest.raises(DataError, match="there is no image"):
        FolderSource(tmp_path, "train")
    (tmp_path / "train" / "cat" / "a.jpg").write_text("not an image")
    source = FolderSource(tmp_path, "train")
    with pytest.raises(DataError, match=r"cat/a\.jpg is not an image \(JPEG"):
        source.sizes(np.array([0]))
    source.close()
    write_folder(tmp_path / "val", {"dog": 1})
    with pytest.raises(DataError, match="class 'dog'"):
        FolderSource(tmp_path, "val")


def test_a_manifest_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text('{"format": "other"}')
    with pytest.raises(DataError, match="not written by pss-convert"):
        read_manifest(tmp_path)
