"""Sets of format version 2, without `.cls` members and files for other programs, are verified and loaded as before."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Silent, missing, shared

from pipelines import DataConfig, DataError, build
from pipelines.conversion.verify import verify
from pipelines.storage.manifest import MANIFEST, read_manifest


def write_older(new: Path, old: Path) -> None:
    """What a pss of version 2 made of the same images, written without the code that writes and checks sets."""
    old.mkdir()
    manifest = json.loads((new / MANIFEST).read_text(encoding="utf-8"))
    for name in ("_info.json", "README.md", "classes.txt"):
        del manifest["files"][name]
    for name in manifest["files"]:
        shutil.copy(new / name, old / name)
    for split in manifest["splits"].values():
        rows = np.load(new / split["table"])
        for shard in split["shards"]:
            offsets = _tar_without_decimals(new / shard, old / shard)
            for number, offset in offsets.items():
                rows["offset"][number] = offset
        np.save(old / split["table"], rows)
    for name in manifest["files"]:
        content = (old / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    del manifest["sha256"]
    manifest["format_version"] = 2
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    text = json.dumps({**manifest, "sha256": digest}, indent=1, ensure_ascii=False) + "\n"
    (old / MANIFEST).write_text(text, encoding="utf-8")


def _tar_without_decimals(new: Path, old: Path) -> dict[int, int]:
    """Copy a tar without `.cls` and write its index; returns where the images begin."""
    located: dict[str, list[str]] = {}
    offsets, content, written = {}, io.BytesIO(), 0
    with tarfile.open(new) as tar, tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as out:
        for member in tar:
            key, _, extension = member.name.partition(".")
            if extension == "cls":
                continue
            data = tar.extractfile(member)
            assert data is not None
            plain = tarfile.TarInfo(member.name)
            plain.size = member.size
            out.addfile(plain, data)
            first = written + tarfile.BLOCKSIZE
            written = first + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            located.setdefault(key, []).append(f"{extension} {first} {member.size} {member.name}")
            if extension == "jpg":
                offsets[int(key)] = first
    end = bytes(2 * tarfile.BLOCKSIZE)
    old.write_bytes(content.getvalue()[:written] + end)
    lines = [f"v1.2 {len(located)}", *(" ".join(parts) for parts in located.values())]
    old.with_suffix(".idx").write_text("\n".join(lines) + "\n")
    return offsets


@pytest.fixture(scope="module")
def older_root(converted_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with shared(tmp_path_factory, "older", lambda folder: write_older(converted_root, folder / "set")) as folder:
        yield folder / "set"


@pytest.mark.parametrize("full", [False, True])
def test_an_older_set_is_verified(older_root: Path, full: bool) -> None:
    assert verify(older_root, 1, Silent(), full=full).format_version == 2
    with tarfile.open(older_root / "train-00000.tar") as tar:
        assert {Path(name).suffix for name in tar.getnames()} == {".jpg", ".lab", ".sid"}


@pytest.mark.parametrize("extension", ["lab", "sid"])
def test_damage_behind_an_image_of_an_older_set_is_found(older_root: Path, tmp_path: Path, extension: str) -> None:
    for path in older_root.iterdir():
        shutil.copy(path, tmp_path / path.name)
    with tarfile.open(tmp_path / "val-00000.tar") as tar:
        offset = tar.getmember(f"00000003.{extension}").offset_data
    with (tmp_path / "val-00000.tar").open("r+b") as file:
        file.seek(offset)
        file.write(b"\x7f")
    with pytest.raises(DataError, match=r"val-00000\.tar, member 00000003\.jpg"):
        verify(tmp_path, 1, Silent(), full=True)


def test_damage_to_a_decimal_label_is_found(converted_root: Path, tmp_path: Path) -> None:
    for path in converted_root.iterdir():
        shutil.copy(path, tmp_path / path.name)
    with tarfile.open(tmp_path / "val-00000.tar") as tar:
        offset = tar.getmember("00000003.cls").offset_data
    with (tmp_path / "val-00000.tar").open("r+b") as file:
        file.seek(offset)
        file.write(b"9")
    with pytest.raises(DataError, match=r"val-00000\.tar, member 00000003\.jpg"):
        verify(tmp_path, 1, Silent())


@pytest.mark.parametrize("backend", ["torch", "dali", "ffcv"])
def test_every_loader_shows_the_same_of_an_older_set(converted_root: Path, older_root: Path, backend: str) -> None:
    if reason := missing(backend):
        pytest.skip(reason)
    shown = []
    for root in (converted_root, older_root):
        loader = build(
            root, "train", config=DataConfig(img_size=48), batch_size=8, train=True, loader=backend, num_workers=1
        )
        try:
            loader.set_epoch(1)
            shown.append([(batch.images.clone(), batch.labels.clone(), batch.index.clone()) for batch in loader])
        finally:
            loader.close()
    assert len(shown[0]) == len(shown[1]) > 4
    for new, old in zip(*shown, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(new, old, strict=True))


@pytest.mark.parametrize("version", [1, 4, "3", None])
def test_other_versions_are_refused(older_root: Path, tmp_path: Path, version: object) -> None:
    manifest = json.loads((older_root / MANIFEST).read_text(encoding="utf-8"))
    (tmp_path / MANIFEST).write_text(json.dumps({**manifest, "format_version": version}), encoding="utf-8")
    with pytest.raises(DataError, match=rf"has format version {version}, this program reads 2 and 3"):
        read_manifest(tmp_path)
