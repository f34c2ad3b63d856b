"""Damage, before and after: what is wrong with a source is named, what happens to a converted set is found."""

from __future__ import annotations

import io
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Silent, convert_folder, missing, picture, write_folder
from PIL import Image

from pipelines import convert as conversion
from pipelines.base import DataError
from pipelines.beton import FIELD, HEADER, METADATA
from pipelines.manifest import read_manifest
from pipelines.source import TarSource
from pipelines.verify import verify

SIZE = (48, 64)  # of the image that is damaged
Change = Callable[[bytes], bytes]


def flipped(content: bytes, first: int, count: int) -> bytes:
    damaged = bytearray(content)
    for i in range(first, first + count):
        damaged[i] ^= 0xFF
    return bytes(damaged)


def scan_of(content: bytes) -> int:
    """Where the entropy-coded data of a JPEG begins."""
    start = content.index(b"\xff\xda")
    return start + 2 + int(struct.unpack(">H", content[start + 2 : start + 4])[0])


def zeroed_scan(content: bytes) -> bytes:
    middle = (scan_of(content) + len(content)) // 2
    return content[:middle] + bytes(64) + content[middle + 64 :]


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)  # type: ignore[arg-type]
    return out.getvalue()


UNREADABLE: dict[str, tuple[Change, str]] = {
    "truncated to half": (lambda c: c[: len(c) // 2], "truncated"),
    "truncated by the last 100 bytes": (lambda c: c[:-100], "truncated"),
    "first bytes flipped": (lambda c: flipped(c, 0, 8), "not an image"),
    "frame header flipped": (lambda c: flipped(c, c.index(b"\xff\xc0") + 2, 8), ""),
    "32-bit pixels": (lambda c: encoded(picture(*SIZE, 1).convert("F"), "TIFF"), "32-bit pixels"),
    "empty": (lambda c: b"", "empty file"),
    "random bytes": (lambda c: np.random.default_rng(0).bytes(len(c)), "not an image"),
    "text": (lambda c: b"this is no picture\n", "not an image"),
    "random bytes behind a JPEG's first four": (lambda c: c[:4] + np.random.default_rng(0).bytes(2000), ""),
    "a PNG with flipped data": (lambda c: flipped(encoded(picture(*SIZE, 1), "PNG"), 400, 8), ""),
    "a PNG cut short": (lambda c: encoded(picture(*SIZE, 1), "PNG")[:900], "truncated"),
    "a WebP cut short": (lambda c: encoded(picture(*SIZE, 1), "WEBP")[:200], ""),
}


def test_every_damaged_image_is_named_or_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "LISTED", 100)
    write_folder(tmp_path / "src", {"a": 3})
    victims = {how: tmp_path / "src" / "b" / f"{i:03d}.jpg" for i, how in enumerate(UNREADABLE)}
    (tmp_path / "src" / "b").mkdir()
    picture(*SIZE, 7).save(tmp_path / "src" / "b" / "good.jpg")
    for how, victim in victims.items():
        victim.write_bytes(UNREADABLE[how][0](encoded(picture(*SIZE, 0), "JPEG", quality=90)))
    with pytest.raises(DataError, match=f"{len(victims)} image") as error:
        convert_folder(tmp_path / "src", tmp_path / "set", "dali", split="train")
    said = str(error.value)
    assert all(f"{victim}: " in said for victim in victims.values())
    assert " object at 0x" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
    manifest = convert_folder(tmp_path / "src", tmp_path / "set", "dali", split="train", on_error="skip")
    assert manifest.splits["train"].per_class == (3, 1)
    reasons = {skipped["file"]: skipped["reason"] for skipped in manifest.skipped}
    assert list(reasons) == [str(victim) for victim in victims.values()]
    assert all(UNREADABLE[how][1] in reasons[str(victim)] for how, victim in victims.items())
    verify(tmp_path / "set", 1, Silent(), full=True)


def _exif(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    return encoded(image, "JPEG", quality=95, exif=exif)


def _sixteen_bits(image: Image.Image) -> bytes:
    return encoded(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "PNG")


FOREIGN: dict[str, Callable[[Image.Image], bytes]] = {
    "GIF": lambda image: encoded(image.convert("P"), "GIF"),
    "PNG": lambda image: encoded(image, "PNG"),
    "WebP": lambda image: encoded(image, "WEBP", lossless=True),
    "BMP": lambda image: encoded(image, "BMP"),
    "TIFF": lambda image: encoded(image, "TIFF"),
    "CMYK": lambda image: encoded(image.convert("CMYK"), "JPEG", quality=95),
    "gray": lambda image: encoded(image.convert("L"), "JPEG", quality=95),
    "progressive": lambda image: encoded(image, "JPEG", quality=95, progressive=True),
    "PNG with 16 bits": _sixteen_bits,
    "turned by EXIF": _exif,
}


def test_other_formats_named_jpg_keep_their_pixels(tmp_path: Path) -> None:
    """As Pillow shows them without turning them, which is what the loaders do."""
    originals = {kind: make(picture(*SIZE, 3)) for kind, make in FOREIGN.items()}
    for i, original in enumerate(originals.values()):
        folder = tmp_path / "src" / str(i)  # a class of its own, and so a label to find it by
        folder.mkdir(parents=True)
        (folder / "0.jpg").write_bytes(original)
    formats = "dali" if missing("ffcv") else "ffcv,dali"
    convert_folder(tmp_path / "src", tmp_path / "set", formats, split="train", max_size=64, store="raw")
    source = TarSource(tmp_path / "set", "train")
    for i, label in enumerate(source.labels.tolist()):
        kind = list(FOREIGN)[label]
        with Image.open(io.BytesIO(originals[kind])) as image:
            gray = (np.asarray(image) // 256).astype(np.uint8) if kind == "PNG with 16 bits" else None
            expected = np.stack([gray] * 3, -1) if gray is not None else np.asarray(image.convert("RGB"))
        with Image.open(io.BytesIO(source.read(i).data)) as stored:
            assert np.array_equal(np.asarray(stored.convert("RGB")), expected), kind
        if formats != "dali":
            row = np.load(tmp_path / "set" / "train.beton.npy")[i]
            content = (tmp_path / "set" / "train.beton").read_bytes()[int(row["ptr"]) :][: int(row["size"])]
            assert np.array_equal(np.frombuffer(content, np.uint8).reshape(expected.shape), expected), kind
    verify(tmp_path / "set", 1, Silent(), full=True)


def test_damage_that_no_decoder_reports_is_kept_as_it_is(tmp_path: Path) -> None:
    """Zeros are valid codes: Pillow decodes them to a wrong picture without an error. The bytes stay what they were."""
    write_folder(tmp_path / "src", {"a": 1})
    victim = tmp_path / "src" / "a" / "000.jpg"
    victim.write_bytes(zeroed_scan(encoded(picture(*SIZE, 0), "JPEG", quality=90)))
    convert_folder(tmp_path / "src", tmp_path / "set", "dali", split="train")
    assert TarSource(tmp_path / "set", "train").read(0).tobytes() == victim.read_bytes()


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "src", {"a": 3})
    (tmp_path / "src" / "a" / "001.jpg").unlink()
    (tmp_path / "src" / "a" / "001.jpg").symlink_to(tmp_path / "nowhere.jpg")
    with pytest.raises(DataError, match=r"a/001\.jpg: the file is missing"):
        convert_folder(tmp_path / "src", tmp_path / "set", "dali", split="train")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("damage")
    write_folder(root / "src", {"a": 20, "b": 10})
    convert_folder(root / "src", root / "set", "dali" if missing("ffcv") else "ffcv,dali", split="train", max_size=64)
    return root / "set"


def _place(root: Path, name: str, part: str) -> int:
    """Where to flip eight bytes of sample 7, or of what tells where it is."""
    tar, beton = np.load(root / "train.samples.npy")[7], None
    if name.endswith(".beton"):
        beton = np.load(root / "train.beton.npy")[7]
        header = np.fromfile(root / name, dtype=HEADER, count=1)[0]
        return {
            "header": 0,
            "field": HEADER.itemsize,
            "metadata": HEADER.itemsize + 3 * FIELD.itemsize + 7 * METADATA.itemsize,
            "data": int(beton["ptr"]) + int(beton["size"]) // 2,
            "table": int(header["table"]) + 24 * 7,
        }[part]
    offset = int(tar["offset"]) if name.endswith("0000.tar") else 0
    return {
        "data": offset + int(tar["length"]) // 2,
        "member header": offset - 512 + 100,
        "label": offset + -(-int(tar["length"]) // 512) * 512 + 512,
        "anywhere": 40,
    }[part]


FLIPS = [  # file, part, the name under which it must be reported
    ("train-00000.tar", "data", "train-00000.tar, member 00000007.jpg"),
    ("train-00000.tar", "member header", "train-00000.tar, member 00000007.jpg"),
    ("train-00000.tar", "label", "train-00000.tar, member 00000007.jpg"),
    ("train-00000.idx", "anywhere", "train-00000.idx"),
    ("train.samples.npy", "anywhere", "train.samples.npy"),
    ("train.beton", "header", "train.beton, header"),
    ("train.beton", "field", "train.beton, header or metadata"),
    ("train.beton", "metadata", "train.beton, header or metadata"),
    ("train.beton", "data", "train.beton, sample 7"),
    ("train.beton", "table", "train.beton, allocation table"),
    ("train.beton.npy", "anywhere", "train.beton.npy"),
]


@pytest.mark.parametrize(("name", "part", "reported"), FLIPS)
@pytest.mark.parametrize("full", [False, True])
def test_flipped_bytes_are_found(
    name: str, part: str, reported: str, full: bool, converted: Path, tmp_path: Path
) -> None:
    """Quickly too: the set is smaller than the sample that is taken of it."""
    if not (converted / name).exists():
        pytest.skip("FFCV is not installed")
    root = tmp_path / "set"
    shutil.copytree(converted, root)
    (root / name).write_bytes(flipped((root / name).read_bytes(), _place(root, name, part), 8))
    with pytest.raises(DataError, match=reported):
        verify(root, 1, Silent(), full=full)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", ["train-00001.tar", "train.beton", "train.samples.npy", "train-00000.idx"])
def test_missing_empty_and_truncated_files_are_found(name: str, full: bool, converted: Path, tmp_path: Path) -> None:
    if not (converted / name).exists():
        pytest.skip("FFCV is not installed")
    whole = (converted / name).read_bytes()
    root = tmp_path / "set"
    shutil.copytree(converted, root)
    for content in (None, b"", whole[:-100], whole[: len(whole) // 2], whole + b"x"):
        (root / name).unlink() if content is None else (root / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            verify(root, 1, Silent(), full=full)
    (root / name).write_bytes(whole)
    verify(root, 1, Silent(), full=full)


def test_files_of_another_set_are_found(converted: Path, tmp_path: Path) -> None:
    """The index of another tar, and another tar of the same size."""
    root = tmp_path / "set"
    shutil.copytree(converted, root)
    shutil.copy(root / "train-00001.idx", root / "train-00000.idx")
    with pytest.raises(DataError, match=r"train-00000\.idx"):
        verify(root, 1, Silent())
    shutil.copy(converted / "train-00000.idx", root)
    size = (root / "train-00000.tar").stat().st_size
    (root / "train-00000.tar").write_bytes(np.random.default_rng(0).bytes(size))
    with pytest.raises(DataError, match=r"train-00000\.tar, member 00000000.* and 10 more"):
        verify(root, 1, Silent())


def test_only_full_verification_sees_what_lies_between_the_samples(converted: Path, tmp_path: Path) -> None:
    root = tmp_path / "set"
    shutil.copytree(converted, root)
    path = root / "train-00000.tar"
    path.write_bytes(path.read_bytes()[:-1] + b"x")  # behind the end of the archive
    verify(root, 1, Silent())
    with pytest.raises(DataError, match=r"train-00000\.tar are not"):
        verify(root, 1, Silent(), full=True)
    assert read_manifest(root)[0].splits["train"].num_samples == 30
