"""What becomes of damaged and unusual files: the right pixels, or a `DataError` that names the file; nothing else.

All cases of a loader run in one process, which reports what it saw: a crash or a hang would end that process alone.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import convert_folder, missing, picture
from PIL import Image

from pipelines import DataConfig, DataError, build

SIDE = 64
RIGHT, NAMED = "right pixels", "names the file"


def encoded(format: str, image: Image.Image | None = None, **options: object) -> bytes:
    out = io.BytesIO()
    (image or photograph()).save(out, format, **options)
    return out.getvalue()


def photograph() -> Image.Image:
    return picture(SIDE, SIDE, 5)


def flipped(content: bytes, first: int, last: int) -> bytes:
    changed = bytearray(content)
    changed[first:last] = bytes(byte ^ 0x5A for byte in changed[first:last])
    return bytes(changed)


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def deep_png() -> bytes:
    gray = np.asarray(photograph().convert("L")).astype(np.uint16) * 257
    return encoded("PNG", Image.fromarray(gray))


JPEG = encoded("JPEG", quality=90)
SCAN = JPEG.index(b"\xff\xda") + 14  # the first byte of the entropy-coded data

# Content, and what the torch and the DALI loader make of it.
FILES: dict[str, tuple[Callable[[], bytes | None], tuple[str, ...], tuple[str, ...]]] = {
    "truncated": (lambda: JPEG[: len(JPEG) // 2], (NAMED,), (NAMED,)),
    "header flipped": (lambda: flipped(JPEG, 2, 24), (NAMED,), (NAMED,)),
    "frame flipped": (lambda: flipped(JPEG, JPEG.index(b"\xff\xc0"), SCAN - 20), (NAMED,), (NAMED,)),
    "empty": (lambda: b"", (NAMED,), (NAMED,)),
    "missing": (lambda: None, (NAMED,), (NAMED,)),
    "random": (lambda: np.random.default_rng(0).bytes(3000), (NAMED,), (NAMED,)),
    "text": (lambda: b"not a picture at all\n" * 50, (NAMED,), (NAMED,)),
    "gif": (lambda: encoded("GIF"), (RIGHT,), (NAMED,)),
    "png": (lambda: encoded("PNG"), (RIGHT,), (RIGHT,)),
    "webp": (lambda: encoded("WEBP", lossless=True), (RIGHT,), (RIGHT,)),
    "bmp": (lambda: encoded("BMP"), (RIGHT,), (RIGHT,)),
    "cmyk": (lambda: encoded("JPEG", photograph().convert("CMYK")), (RIGHT,), (RIGHT,)),
    "gray": (lambda: encoded("JPEG", photograph().convert("L")), (RIGHT,), (RIGHT,)),
    "16 bit": (deep_png, (RIGHT,), (RIGHT,)),
    "rotated": (lambda: encoded("JPEG", exif=rotated()), (RIGHT,), (RIGHT,)),
}


def outcome(root: Path, backend: str, check: Callable[[str], bool]) -> str:
    """Load the one image of `root`'s validation split and judge pixels or message."""
    config = DataConfig(img_size=SIDE, crop_pct=1.0)
    try:
        loader = build(root, "val", config=config, batch_size=1, train=False, loader=backend, num_workers=1)
        (batch,) = list(loader)
        loader.close()
    except DataError as error:
        return NAMED if check(str(error)) and " object at 0x" not in str(error) else f"says {error}"
    with Image.open(next((root / "val" / "only").iterdir())) as image:
        deep = image.mode.startswith("I;16")  # which Pillow clips
        wanted = np.asarray((photograph().convert("L") if deep else image).convert("RGB")).astype(int)
    error = np.abs(batch.images[0].permute(1, 2, 0).numpy().astype(int) - wanted).mean()
    return RIGHT if error < 1.5 else f"pixels differ by {error:.0f}"


def run_files(backend: str, folder: Path) -> dict[str, str]:
    """Every case as the file `a.JPEG` of a plain folder; one that vanishes does so after it has been listed."""
    seen = {}
    for name, (make, *_) in FILES.items():
        file = folder / name / "val" / "only" / "a.JPEG"
        file.parent.mkdir(parents=True)
        content = make()
        file.write_bytes(JPEG if content is None else content)
        if content is None:
            file.unlink()
            file.symlink_to(folder / "nowhere")
        seen[name] = outcome(folder / name, backend, lambda message, file=file: str(file) in message)
    return seen


def table() -> list[tuple[str, str, tuple[str, ...]]]:
    return [
        (backend, name, row[1 + number])
        for number, backend in enumerate(("torch", "dali"))
        for name, row in FILES.items()
        if not missing(backend)
    ]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Per loader what its process saw."""
    found = {}
    for backend in sorted({backend for backend, *_ in table()}):
        folder = tmp_path_factory.mktemp(backend)
        command = [sys.executable, "-W", "ignore", __file__, backend, str(folder)]
        root = Path(__file__).parent
        environment = {"PYTHONPATH": f"{root.parent}:{root}", "PATH": "/usr/bin:/bin"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90, check=False)
        assert done.returncode == 0, done.stderr
        found[backend] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(("backend", "case", "allowed"), table())
def test_a_file_is_loaded_right_or_refused_by_name(
    backend: str, case: str, allowed: tuple[str, ...], seen: dict[str, dict[str, str]]
) -> None:
    assert seen[backend][case] in allowed


CONVERTED: dict[str, Callable[[Path], tuple[str, bytes]]] = {
    "entropy data flipped": lambda root: (
        "val-00000.tar",
        _around(root, lambda jpeg: flipped(jpeg, SCAN + 90, SCAN + 95)),
    ),
    "one bit flipped": lambda root: (
        "val-00000.tar",
        _around(root, lambda jpeg: flipped(jpeg, SCAN + 200, SCAN + 201)),
    ),
    "tar truncated": lambda root: ("val-00000.tar", (root / "val-00000.tar").read_bytes()[:-4096]),
    "foreign table": lambda root: ("val.samples.npy", (root / "train.samples.npy").read_bytes()),
    "foreign offsets": lambda root: ("val.samples.npy", _moved((root / "val.samples.npy").read_bytes())),
}


def _around(root: Path, change: Callable[[bytes], bytes]) -> bytes:
    content = (root / "val-00000.tar").read_bytes()
    return content.replace(JPEG, change(JPEG))


def _moved(table: bytes) -> bytes:
    rows = np.load(io.BytesIO(table))
    rows["offset"] += 512
    out = io.BytesIO()
    np.save(out, rows)
    return out.getvalue()


@pytest.mark.parametrize("case", CONVERTED)
@pytest.mark.parametrize("backend", ["torch", "dali"])
def test_a_conversion_notices_any_changed_byte(backend: str, case: str, converted: Path, tmp_path: Path) -> None:
    if reason := missing(backend):
        pytest.skip(reason)
    shutil.copytree(converted, tmp_path / "set")
    root = tmp_path / "set"
    file, content = CONVERTED[case](root)
    (root / file).write_bytes(content)
    assert outcome(root, backend, lambda message: str(root / "val") in message) == NAMED


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage")
    for split in ("train", "val"):
        (folder / split / "only").mkdir(parents=True)
        (folder / split / "only" / "a.jpg").write_bytes(JPEG)
    (folder / "train" / "only" / "b.jpg").write_bytes(JPEG)
    convert_folder(folder, folder / "set", "dali")
    return folder / "set"


def test_checking_bytes_can_be_left_out(converted: Path, tmp_path: Path) -> None:
    shutil.copytree(converted, tmp_path / "set")
    root = tmp_path / "set"
    file, content = CONVERTED["one bit flipped"](root)
    (root / file).write_bytes(content)
    settings = {"config": DataConfig(img_size=SIDE), "batch_size": 1, "train": False, "loader": "torch"}
    assert len(list(build(root, "val", check_bytes=False, **settings))) == 1


if __name__ == "__main__":
    print(json.dumps(run_files(sys.argv[1], Path(sys.argv[2]))))
