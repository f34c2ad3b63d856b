"""Conversion: the same images and labels come out, whole or not at all."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MAX_SIZE, Silent, convert_folder, missing, picture, write_folder
from PIL import Image

from pipelines.base import DataError
from pipelines.conversion import convert as conversion
from pipelines.conversion.options import Options
from pipelines.storage.manifest import SAMPLE, read_manifest
from pipelines.storage.source import TarSource

needs_ffcv = pytest.mark.skipif(missing("ffcv") is not None, reason="FFCV is not installed")
needs_dali = pytest.mark.skipif(missing("dali") is not None, reason="DALI is not installed")


def test_the_manifest_describes_every_file(converted_root: Path) -> None:
    manifest, fingerprint = read_manifest(converted_root)
    assert set(manifest.files) == {path.name for path in converted_root.iterdir()} - {"dataset.json"}
    for name, entry in manifest.files.items():
        content = (converted_root / name).read_bytes()
        assert (entry.bytes, entry.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert fingerprint == hashlib.sha256((converted_root / "dataset.json").read_bytes()).hexdigest()
    assert manifest.splits["train"].per_class == (17, 19, 17)
    assert manifest.splits["train"].num_samples == 53
    assert manifest.made["options"]["seed"] == 0


def test_the_table_says_where_every_image_is(converted_root: Path) -> None:
    manifest, _ = read_manifest(converted_root)
    for split in manifest.splits.values():
        rows = np.load(converted_root / split.table)
        assert rows.dtype == SAMPLE
        members = {}
        for number, shard in enumerate(split.shards):
            with tarfile.open(converted_root / shard) as tar:
                assert tar.getmembers()[0].uname == ""  # nothing about who wrote it
                for member in tar:
                    content = tar.extractfile(member)
                    assert content is not None
                    members[member.name] = (number, member.offset_data, content.read())
        assert len(members) == 4 * len(rows)
        for i, row in enumerate(rows):
            shard, offset, encoded = members[f"{i:08d}.jpg"]
            assert (row["shard"], row["offset"], row["length"]) == (shard, offset, len(encoded))
            assert row["crc32"] == zlib.crc32(encoded)
            with Image.open(io.BytesIO(encoded)) as image:
                assert image.size == (row["width"], row["height"])
            assert np.frombuffer(members[f"{i:08d}.lab"][2], "<i4") == row["label"]
            assert np.frombuffer(members[f"{i:08d}.sid"][2], "<i8") == i
            assert members[f"{i:08d}.cls"][2] == str(row["label"]).encode()


@needs_dali
def test_dalis_own_reader_reads_the_tars(converted_root: Path) -> None:
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    source = TarSource(converted_root, "train")
    shards = [converted_root / shard for shard in source.entry.shards]
    pipe = Pipeline(batch_size=source.num_samples, num_threads=1, device_id=None)
    with pipe:
        pipe.set_outputs(
            *fn.readers.webdataset(
                paths=[str(shard) for shard in shards],
                index_paths=[str(shard.with_suffix(".idx")) for shard in shards],
                ext=["jpg", "lab", "sid"],
                dtypes=[types.UINT8, types.INT32, types.INT64],
                missing_component_behavior="error",
            )
        )
    images, labels, numbers = pipe.run()
    for i in range(source.num_samples):
        number = int(np.array(numbers[i])[0])
        assert number == i
        assert int(np.array(labels[i])[0]) == source.labels[number]
        assert np.array(images[i]).tobytes() == source.read(number).tobytes()


@needs_ffcv
def test_the_beton_holds_the_same_pictures_scaled_down(converted_root: Path) -> None:
    from pipelines.storage.ffcv_file import import_ffcv

    import_ffcv()
    from ffcv.reader import Reader

    source = TarSource(converted_root, "train")
    path = converted_root / "train.beton"
    reader = Reader(str(path))
    assert reader.metadata["f1"].tolist() == source.labels.tolist()
    content = path.read_bytes()
    scaled = 0
    for row in reader.alloc_table:
        i = int(row["sample_id"])
        encoded = content[int(row["ptr"]) : int(row["ptr"] + row["size"])]
        with Image.open(io.BytesIO(encoded)) as stored, Image.open(io.BytesIO(source.read(i).data)) as original:
            ratio = min(1, MAX_SIZE / max(original.size))
            scaled += ratio < 1
            assert np.allclose(stored.size, np.multiply(original.size, ratio), atol=1)
            expected = original.resize(stored.size, Image.Resampling.BOX)
            assert np.abs(np.asarray(stored).astype(int) - np.asarray(expected)).mean() < 8
    assert 10 < scaled < source.num_samples - 10


def test_conversion_repeats_itself(image_root: Path, tmp_path: Path) -> None:
    """The same tars with another number of processes; another order with another seed."""
    for name, options in {"a": {}, "b": {}, "c": {"seed": 1}}.items():
        convert_folder(image_root, tmp_path / name, "dali", **options)
    a, b, c = (read_manifest(tmp_path / name)[0].files for name in "abc")
    assert a == b
    assert a["val-00000.tar"] == c["val-00000.tar"]
    assert a["train-00000.tar"] != c["train-00000.tar"]


@pytest.mark.parametrize("fraction", [0.1, 0.3])
def test_held_out_images_are_a_share_of_every_class(image_root: Path, tmp_path: Path, fraction: float) -> None:
    manifest = convert_folder(image_root / "train", tmp_path / "set", "dali", val_fraction=fraction)
    val, train = (np.array(manifest.splits[name].per_class) for name in ("val", "train"))
    counts = np.array([17, 19, 17])
    assert (val + train == counts).all()
    assert (np.abs(val - counts * fraction) <= 1).all()
    sources = [TarSource(tmp_path / "set", name) for name in ("train", "val")]
    images = [source.read(i).tobytes() for source in sources for i in range(source.num_samples)]
    originals = {path.read_bytes() for path in (image_root / "train").rglob("*.jpg")}
    assert len(images) == len(set(images)) == 53
    assert set(images) == originals


def test_a_split_can_be_converted_alone(image_root: Path, tmp_path: Path) -> None:
    manifest = convert_folder(image_root / "val", tmp_path / "set", "dali", split="test")
    assert {name: split.num_samples for name, split in manifest.splits.items()} == {"val": 23}


def test_foreign_formats_become_png_and_are_listed(tmp_path: Path) -> None:
    folder = tmp_path / "src" / "train" / "all"
    folder.mkdir(parents=True)
    image = picture(40, 60, 0)
    kept = ("rgb.jpg", "gray.jpg", "cmyk.jpg", "rgb.png")
    image.save(folder / kept[0])
    image.convert("L").save(folder / kept[1])
    image.convert("CMYK").save(folder / kept[2])
    image.save(folder / kept[3])
    image.save(folder / "a.gif")
    image.convert("RGBA").save(folder / "alpha.png")
    image.save(folder / "named.jpg", "WEBP", lossless=True)
    manifest = convert_folder(tmp_path / "src", tmp_path / "set", "dali")
    assert sorted(Path(name).name for name in manifest.transcoded) == ["a.gif", "alpha.png", "named.jpg"]
    source = TarSource(tmp_path / "set", "train")
    stored = [source.read(i).tobytes() for i in range(source.num_samples)]
    assert {(folder / name).read_bytes() for name in kept} < set(stored)
    pictures = [Image.open(io.BytesIO(encoded)) for encoded in stored]
    assert sum(p.format == "PNG" and np.array_equal(np.asarray(p), np.asarray(image)) for p in pictures) == 3


def _break(path: Path, how: str) -> None:
    content = path.read_bytes()
    path.write_bytes({"text": b"hello", "empty": b"", "truncated": content[: len(content) // 2]}[how])


@pytest.mark.parametrize(
    ("how", "reason"), [("text", "not an image"), ("empty", "empty file"), ("truncated", "truncated")]
)
def test_unreadable_images(how: str, reason: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "src" / "train", {"a": 4, "b": 4})
    victims = [tmp_path / "src" / "train" / name for name in ("a/002.jpg", "b/000.jpg")]
    for victim in victims:
        _break(victim, how)
    with pytest.raises(DataError, match=r"2 image.*a/002\.jpg.*b/000\.jpg.*--on-error skip") as error:
        convert_folder(tmp_path / "src", tmp_path / "set", "dali")
    assert reason in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
    manifest = convert_folder(tmp_path / "src", tmp_path / "set", "dali", on_error="skip")
    assert manifest.splits["train"].per_class == (3, 3)
    assert [skipped["file"] for skipped in manifest.skipped] == [str(victim) for victim in victims]
    assert all(reason in skipped["reason"] for skipped in manifest.skipped)


def test_a_long_list_of_unreadable_images_is_cut(tmp_path: Path) -> None:
    write_folder(tmp_path / "src" / "train", {"a": 13})
    for path in (tmp_path / "src" / "train" / "a").iterdir():
        _break(path, "text")
    with pytest.raises(DataError, match=r"13 image.*and 3 more") as error:
        convert_folder(tmp_path / "src", tmp_path / "set", "dali")
    assert str(error.value).count("not an image") == 10
    with pytest.raises(DataError, match="'a' has no readable image"):
        convert_folder(tmp_path / "src", tmp_path / "set", "dali", on_error="skip")


def _empty_class(root: Path) -> None:
    (root / "train" / "empty").mkdir()


def _class_unknown_in_training(root: Path) -> None:
    write_folder(root / "val", {"a": 1, "c": 1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_empty_class, "train/empty holds no image"),
        (_class_unknown_in_training, "class 'c'"),
    ],
)
def test_folders_that_do_not_fit(change: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "src" / "train", {"a": 2, "b": 2})
    change(tmp_path / "src")
    with pytest.raises(DataError, match=message):
        convert_folder(tmp_path / "src", tmp_path / "set", "dali")
    assert not (tmp_path / "set").exists()


def test_sources_and_options_that_do_not_fit(image_root: Path, tmp_path: Path) -> None:
    def refused(source: Path | str, message: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            convert_folder(Path(source), tmp_path / "set", options.pop("formats", "dali"), **options)
        assert not list(tmp_path.iterdir())

    refused(tmp_path / "none", "there is no folder")
    refused(image_root / "train", "holds classes, not splits")
    refused(image_root / "train", "holds classes, not splits", split="train", val_fraction=0.1)
    refused(image_root, "--split is for a source that names no split", split="train")
    refused(image_root, "validation split of its own", val_fraction=0.1)
    refused(image_root / "train" / "cat", "images without class folders", split="train")
    refused(image_root / "train", "no split 'holdout'", split="holdout")
    refused("digits", "--split is for", split="train")
    refused(image_root, "--format is 'tfrecord'", formats="tfrecord")
    refused(image_root / "train", "--val-fraction is 1", val_fraction=1.0)
    refused(image_root / "train", "too few to hold out", val_fraction=0.99)
    refused(image_root, "--quality is 0", quality=0)
    refused(image_root, "--max-size is 8", max_size=8)
    refused(image_root, "--on-error is 'ask'", on_error="ask")


def test_an_existing_destination_is_left_alone(image_root: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine").write_text("kept")
    with pytest.raises(DataError, match="already exists"):
        convert_folder(image_root, tmp_path / "set", "dali")
    assert (tmp_path / "set" / "mine").read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_missing_parent_folders_are_made_and_taken_away(image_root: Path, tmp_path: Path) -> None:
    dest = tmp_path / "a" / "b" / "set"
    with pytest.raises(DataError, match="validation split of its own"):
        convert_folder(image_root, dest, "dali", val_fraction=0.5)
    assert not list(tmp_path.iterdir())
    convert_folder(image_root, dest, "dali")
    assert [path.name for path in dest.parent.iterdir()] == ["set"]


class _Interrupting(Silent):
    """Does something when a phase begins."""

    def __init__(self, phase: str, action: Callable[[], None]) -> None:
        self.phase, self.action = phase, action

    def start(self, phase: str, total: int) -> None:
        if phase == self.phase:
            self.action()


def _interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("phase", ["checking val", "writing train tars", "writing val tars"])
def test_an_interrupted_conversion_is_continued(phase: str, image_root: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        conversion.convert(
            str(image_root),
            tmp_path / "set",
            Options(formats=("dali",), shard_size=20),
            _Interrupting(phase, _interrupt),
        )
    assert [path.name for path in tmp_path.iterdir()] == [".set.partial"]
    convert_folder(image_root, tmp_path / "set", "dali")
    convert_folder(image_root, tmp_path / "whole", "dali")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "whole"]
    assert checksums(tmp_path / "set") == checksums(tmp_path / "whole")


def checksums(root: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in root.iterdir()}


def test_an_image_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    write_folder(tmp_path / "src" / "train", {"a": 3})
    victim = tmp_path / "src" / "train" / "a" / "001.jpg"
    progress = _Interrupting("writing train tars", lambda: picture(30, 30, 9).save(victim))
    with pytest.raises(DataError, match=r"001\.jpg changed"):
        conversion.convert(str(tmp_path / "src"), tmp_path / "set", Options(formats=("dali",)), progress)
    assert not (tmp_path / "set").exists()


def test_the_digits(tmp_path: Path) -> None:
    formats = "dali" if missing("ffcv") else "ffcv,dali"
    manifest = convert_folder(Path("digits"), tmp_path / "set", formats)
    assert manifest.classes == tuple("0123456789")
    counts = {name: split.num_samples for name, split in manifest.splits.items()}
    assert sum(counts.values()) == 1797
    assert abs(counts["val"] / 1797 - 0.2) < 0.005
    source = TarSource(tmp_path / "set", "train")
    with Image.open(io.BytesIO(source.read(0).data)) as image:
        assert (image.size, image.format) == ((32, 32), "JPEG")
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert json.loads((tmp_path / "set" / "dataset.json").read_text())["made"]["source"] == "digits"
