"""What may be opened as an image, and where; metadata that somebody else has written."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from conftest import convert_folder, missing, picture, write_folder
from PIL import Image

from pipelines import DataConfig, build
from pipelines.base import DataError
from pipelines.conversion.scan import ImageFile, Unreadable, check_image
from pipelines.sources.sample import Sample
from pipelines.storage import manifest as manifests
from pipelines.storage.images import FORMATS, open_image
from pipelines.storage.json_files import parse_json, read_json
from pipelines.storage.manifest import MANIFEST, read_manifest
from pipelines.storage.source import FolderSource

ROOT = Path(__file__).parents[3]
SCRIPT = b"(%s) (w) file closefile showpage\n"


def encoded(format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    picture(20, 30, 0).save(out, format, **options)
    return out.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *more: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("format", FORMATS)
def test_kinds_that_are_read(format: str) -> None:
    with open_image(encoded(format)) as image:
        assert (image.format, image.size) == (format, (30, 20))


@pytest.mark.parametrize("format", ["PPM", "TGA", "ICO", "PCX", "SGI", "JPEG2000", "DDS", "EPS", "PDF", "XBM"])
def test_kinds_that_are_not(format: str, tmp_path: Path) -> None:
    out = io.BytesIO()
    try:
        picture(32, 32, 0).convert("1" if format == "XBM" else "RGB").save(out, format)
    except (OSError, KeyError):
        pytest.skip(f"this Pillow writes no {format}")
    (tmp_path / "x.jpg").write_bytes(out.getvalue())
    found = check_image(Sample("x", 0, str(tmp_path / "x.jpg")))
    assert found == Unreadable("x", "not an image of a kind that is read")


@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff"])
def test_postscript_never_runs(suffix: str, tmp_path: Path) -> None:
    """Also where Ghostscript is there, which Pillow would hand it to."""
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n" + SCRIPT % bytes(tmp_path / "proof")
    write_folder(tmp_path / "src", {"a": 2})
    (tmp_path / "src" / "a" / f"x.{suffix}").write_bytes(program)
    with pytest.raises(DataError, match=rf"x\.{suffix}: not an image of a kind that is read"):
        convert_folder(tmp_path / "src", tmp_path / "set", "dali", split="train")
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (png(40000, 40000), "more than 89478485 pixels"),
        (png(9000, 9943), "more than 89478485 pixels"),
        (png(8, 8, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(100 << 20), 9))), "too large"),
        (png(8, 8, chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(100 << 20), 9))), "too large"),
        (png(0, 8), ""),
        (b"", "empty file"),
        (encoded("JPEG")[:60], ""),
        (encoded("GIF")[:20], ""),
        (encoded("WEBP")[:40], ""),
        (encoded("TIFF")[:100], ""),
        (b"BM" + bytes(60), ""),
        (b"RIFF\xff\xff\xff\xffWEBPVP8L" + bytes(20), ""),
        (b"II*\0" + b"\xff" * 60, ""),
    ],
)
def test_damaged_and_hostile_images_have_a_reason(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(content)
    found = check_image(Sample("x", 0, str(tmp_path / "x.png")))
    assert isinstance(found, Unreadable)
    assert reason in found.reason
    assert found.reason
    assert "\n" not in found.reason


@pytest.mark.parametrize("format", ["GIF", "WEBP", "TIFF", "PNG"])
def test_of_many_pictures_the_first_counts(format: str, tmp_path: Path) -> None:
    out, rest = io.BytesIO(), [picture(20, 30, seed) for seed in range(1, 40)]
    picture(20, 30, 0).save(out, format, save_all=True, append_images=rest)
    (tmp_path / "x").write_bytes(out.getvalue())
    found = check_image(Sample("x", 0, str(tmp_path / "x")))
    assert isinstance(found, ImageFile)
    assert (found.height, found.width) == (20, 30)


def test_images_are_opened_in_one_place() -> None:
    """And decoders that go by content are handed nothing that was not looked at there."""
    loaders = {f"pipelines/loaders/{name}_loader.py" for name in ("torch", "ffcv")}
    allowed: dict[str, set[str]] = {
        r"Image\.open\(": {"pipelines/storage/images.py", "pss/inference/publishing/card.py"},  # what it shows
        r"cv2\.im(read|decode)|decode_(jpeg|png|image)\b|io\.read_image": loaders,
        r"(?<!safetensors\.)torch\.load\((?!.*weights_only=True)": set(),
        r"allow_pickle\s*=\s*True": set(),
    }
    for pattern, places in allowed.items():
        for package in ("pss", "pipelines", "cli"):
            for path in (ROOT / package).rglob("*.py"):
                if re.search(pattern, path.read_text(encoding="utf-8")):
                    assert path.relative_to(ROOT).as_posix() in places, (pattern, path)


# --- plain folders, which pss-train reads as they lie


@pytest.mark.parametrize("kind", ["pipe", "folder", "nowhere", "circle"])
def test_what_is_no_file_among_the_images_is_named(kind: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"a": 2, "b": 2})
    odd = tmp_path / "train" / "b" / "odd.jpg"
    if kind == "pipe":
        os.mkfifo(odd)
    elif kind == "folder":
        odd.mkdir()
    else:
        odd.symlink_to(odd if kind == "circle" else tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"odd\.jpg is no plain file"):
        FolderSource(tmp_path, "train")


def test_names_that_are_not_utf8_are_read(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"a": 2, "b": 2})
    Path(os.fsdecode(os.fsencode(tmp_path / "train" / "b") + b"/caf\xe9.jpg")).write_bytes(encoded("JPEG"))
    loader = build(tmp_path, "train", config=DataConfig(img_size=24), batch_size=5, train=False, loader="torch")
    assert sum(len(batch.labels) for batch in loader) == 5


def test_numbers_are_classes_in_their_order(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"10": 1, "9": 1, "100": 1})
    assert FolderSource(tmp_path, "train").classes == ("9", "10", "100")
    manifest = convert_folder(tmp_path, tmp_path / "set", "dali")
    assert manifest.classes == ("9", "10", "100")


# --- metadata


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("metadata")
    write_folder(root / "src", {"a": 3, "b": 3})
    convert_folder(root / "src", root / "set", "dali", split="train")
    return root / "set"


def _set(*path: str | int, to: Any) -> Any:
    def change(content: Any) -> Any:
        at = content
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = to
        return content

    return change


@pytest.mark.parametrize(
    "change",
    [
        _set("classes", to="ab"),
        _set("classes", to=[1, 2]),
        _set("classes", to=["a"]),
        _set("splits", to=[]),
        _set("splits", "train", "num_samples", to=-1),
        _set("splits", "train", "num_samples", to=10**30),
        _set("splits", "train", "num_samples", to="6"),
        _set("splits", "train", "num_samples", to=7),
        _set("splits", "train", "per_class", to=[6]),
        _set("splits", "train", "table", to="../../etc/passwd"),
        _set("splits", "train", "shards", to=["/etc/passwd"]),
        _set("splits", "train", "shards", to=[["x"]]),
        _set("splits", "other", to={}),
        _set("files", to={"/etc/passwd": {"bytes": 1, "sha256": "x"}}),
        _set("files", to={"..": {"bytes": 1, "sha256": "x"}}),
        _set("files", "train-00000.tar", to=5),
        _set("skipped", to=[1]),
        _set("format_version", to=[2]),
        lambda _: [],
        lambda _: 5,
    ],
)
def test_a_manifest_that_somebody_edited_is_refused(change: Any, converted: Path, tmp_path: Path) -> None:
    """Also where its checksum has been made to fit."""
    content = json.loads((converted / MANIFEST).read_text())
    del content["sha256"]
    changed = change(content)
    if isinstance(changed, dict):
        changed["sha256"] = manifests._digest(changed)
    (tmp_path / MANIFEST).write_text(json.dumps(changed))
    with pytest.raises(DataError, match=rf"{MANIFEST} .*;"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[" * 200_000, '{"a":' * 50_000, "9" * 5000, "\ud800".encode("utf-8", "surrogatepass"), "null", '"x"'],
)
def test_json_that_is_none_or_of_another_kind_is_refused(text: Any, tmp_path: Path) -> None:
    content = text if isinstance(text, bytes) else text.encode()
    with pytest.raises(DataError, match=r"^it is damaged \(.*\); remove it$"):
        parse_json(content, dict[str, Any], "it", remedy="remove it")
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(DataError, match="file is damaged"):
        read_json(tmp_path / "file", dict[str, Any], remedy="remove it")


def test_a_table_of_another_set_is_refused(converted: Path, tmp_path: Path) -> None:
    import numpy as np

    for rows in (np.zeros(5, np.int64), np.zeros((6, 2)), np.load(converted / "train.samples.npy")[:4]):
        out = io.BytesIO()
        np.save(out, rows)
        content = json.loads((converted / MANIFEST).read_text())
        del content["sha256"]
        for name in content["files"]:
            (tmp_path / name).write_bytes((converted / name).read_bytes())
        (tmp_path / "train.samples.npy").write_bytes(out.getvalue())
        entry = manifests.hash_file(tmp_path / "train.samples.npy")
        content["files"]["train.samples.npy"] = {"bytes": entry.bytes, "sha256": entry.sha256}
        (tmp_path / MANIFEST).write_text(json.dumps({**content, "sha256": manifests._digest(content)}))
        with pytest.raises(DataError, match=r"train\.samples\.npy is no table of 6 samples"):
            build(tmp_path, "train", config=DataConfig(img_size=24), batch_size=2, train=False, loader="torch")


@pytest.mark.skipif(missing("ffcv") is not None, reason="FFCV is not installed")
def test_pillow_still_names_its_formats_so() -> None:
    Image.init()
    assert set(FORMATS) <= set(Image.OPEN)
