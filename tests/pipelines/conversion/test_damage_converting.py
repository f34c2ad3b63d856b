"""What becomes of a source with damaged images, and of a converted set that was damaged, beyond the table's rows."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import Silent, convert_folder, write_folder
from damage import FILES, JPEG, NAMED, WARNED, flipped

from pipelines import DataConfig, DataError, build
from pipelines.conversion import convert as conversion
from pipelines.conversion.verify import verify
from pipelines.storage.manifest import read_manifest

REASONS = {
    "truncated to half": "truncated",
    "header flipped": "not an image",
    "32-bit pixels": "32-bit pixels",
    "empty": "empty file",
    "missing": "the file is missing",
    "text": "not an image",
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("damage")
    write_folder(root / "src", {"a": 20, "b": 10})
    convert_folder(root / "src", root / "set", "dali", split="train")
    return root / "set"


def test_all_damaged_images_are_named_left_out_or_doubted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one conversion, with the reason."""
    monkeypatch.setattr(conversion, "LISTED", 100)
    write_folder(tmp_path / "src", {"a": 3})
    (tmp_path / "src" / "b").mkdir()
    (tmp_path / "src" / "b" / "good.jpg").write_bytes(JPEG)
    made = {row: FILES[row][0]() for row in FILES}  # a link to nowhere is no image, and refused in any case
    files = {row: tmp_path / "src" / "b" / f"{i:03d}.jpg" for i, row in enumerate(made) if made[row] is not None}
    for row, file in files.items():
        file.write_bytes(made[row] or b"")
    bad, doubted = ([row for row in files if FILES[row][1] == outcome] for outcome in (NAMED, WARNED))
    with pytest.raises(DataError, match=f"{len(bad)} image") as error:
        convert_folder(tmp_path / "src", tmp_path / "set", "dali", split="train")
    assert all((f"{files[row]}: " in str(error.value)) == (row in bad) for row in files)
    assert " object at 0x" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
    manifest = convert_folder(tmp_path / "src", tmp_path / "set", "dali", split="train", on_error="skip")
    assert manifest.splits["train"].per_class == (3, 1 + len(files) - len(bad))
    reasons = {skipped["file"]: skipped["reason"] for skipped in manifest.skipped}
    assert list(reasons) == [str(files[row]) for row in bad]
    assert all(reason in reasons[str(files[row])] for row, reason in REASONS.items() if row in files)
    warned = {warned["file"]: warned["warning"] for warned in manifest.warned}
    assert set(warned) == {str(files[row]) for row in doubted}
    assert all(warning.startswith("Corrupt JPEG data") for warning in warned.values())
    verify(tmp_path / "set", 1, Silent(), full=True)


def test_only_full_verification_sees_what_lies_between_the_samples(converted: Path, tmp_path: Path) -> None:
    root = tmp_path / "set"
    shutil.copytree(converted, root)
    path = root / "train-00000.tar"
    path.write_bytes(path.read_bytes()[:-1] + b"x")  # behind the end of the archive
    verify(root, 1, Silent())
    with pytest.raises(DataError, match=r"train-00000\.tar are not"):
        verify(root, 1, Silent(), full=True)
    assert read_manifest(root)[0].splits["train"].num_samples == 30


def test_checking_bytes_can_be_left_out(converted: Path, tmp_path: Path) -> None:
    shutil.copytree(converted, tmp_path / "set")
    tar, row = tmp_path / "set" / "train-00000.tar", np.load(converted / "train.samples.npy")[3]
    tar.write_bytes(flipped(tar.read_bytes(), int(row["offset"] + row["length"]) - 40, 1, 1))
    settings = {"config": DataConfig(img_size=24), "batch_size": 30, "train": False, "loader": "torch"}
    assert len(list(build(tmp_path / "set", "train", check_bytes=False, **settings))) == 1
    with pytest.raises(DataError, match=r"member 00000003\.jpg has been damaged since the conversion"):
        list(build(tmp_path / "set", "train", **settings))
