"""Damaged and unusual files, and what conversion, verification and each loader make of them.

    python damage.py FOLDER EVERY COLUMN...

prints what each COLUMN makes of its rows, or of one in EVERY, as JSON. Every case has a process of its own, which is
killed if it hangs.
FOLDER comes from `write_sets`.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import multiprocessing
import shutil
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from conftest import Silent, convert_folder, missing, picture, write_folder
from PIL import Image

from pipelines import DataConfig, DataError, build
from pipelines.conversion import engines
from pipelines.conversion.beton import FIELD, HEADER, METADATA
from pipelines.conversion.verify import verify
from pipelines.storage.source import TarSource

NAMED, WARNED, RIGHT = "named in an error", "named in a warning", "right pixels"
SECONDS = 30.0  # after which a case has hung
SIDE = 96
NUM = 30  # samples of a converted set
VICTIM = 7  # the damaged one
CHANGED = ("verify", "verify --full", "torch", "dali", "ffcv")
"""Columns of the damage done after a conversion; those of `FILES` are convert, torch and dali."""


def photograph() -> Image.Image:
    return picture(SIDE, SIDE, 5)


def encoded(format: str, image: Image.Image | None = None, **options: Any) -> bytes:
    out = io.BytesIO()
    (image or photograph()).save(out, format, **options)
    return out.getvalue()


def flipped(content: bytes, first: int, count: int = 8, bits: int = 0xFF) -> bytes:
    changed = bytearray(content)
    changed[first : first + count] = bytes(byte ^ bits for byte in changed[first : first + count])
    return bytes(changed)


def overwritten(content: bytes, first: int, new: bytes) -> bytes:
    return content[:first] + new + content[first + len(new) :]


def scan_of(content: bytes) -> int:
    """Where the entropy-coded data of a JPEG begins."""
    start = content.index(b"\xff\xda")
    return start + 2 + int(struct.unpack(">H", content[start + 2 : start + 4])[0])


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # by a quarter
    return exif


def deep_png() -> bytes:
    gray = np.asarray(photograph().convert("L")).astype(np.uint16) * 257
    return encoded("PNG", Image.fromarray(gray))


JPEG = encoded("JPEG", quality=90)
SCAN = scan_of(JPEG)
MIDDLE = (SCAN + len(JPEG)) // 2
NOISE = np.random.default_rng(0).bytes

# Content of a file named .JPEG, None for one that is gone; what convert, torch and DALI make of it.
FILES: dict[str, tuple[Callable[[], bytes | None], str, str, str]] = {
    "truncated to half": (lambda: JPEG[: len(JPEG) // 2], NAMED, NAMED, NAMED),
    "truncated by 100 bytes": (lambda: JPEG[:-100], NAMED, NAMED, NAMED),
    "header flipped": (lambda: flipped(JPEG, 0, 24), NAMED, NAMED, NAMED),
    "frame header flipped": (lambda: flipped(JPEG, JPEG.index(b"\xff\xc0") + 2), NAMED, NAMED, NAMED),
    "Huffman tables flipped": (lambda: flipped(JPEG, JPEG.index(b"\xff\xc4") + 2, 40), NAMED, NAMED, NAMED),
    "data flipped": (lambda: flipped(JPEG, MIDDLE, 64), WARNED, RIGHT, RIGHT),
    "data zeroed": (lambda: overwritten(JPEG, SCAN + 50, bytes(200)), WARNED, RIGHT, RIGHT),
    "data zeroed, codes in step": (lambda: overwritten(JPEG, SCAN + 50, bytes(64)), RIGHT, RIGHT, RIGHT),
    "data random": (lambda: overwritten(JPEG, MIDDLE, NOISE(200)), WARNED, RIGHT, RIGHT),
    "a foreign marker in the data": (lambda: overwritten(JPEG, MIDDLE, b"\xff\xc8"), NAMED, NAMED, NAMED),
    "empty": (lambda: b"", NAMED, NAMED, NAMED),
    "missing": (lambda: None, NAMED, NAMED, NAMED),
    "random bytes": (lambda: NOISE(3000), NAMED, NAMED, NAMED),
    "random bytes behind a JPEG's first": (lambda: JPEG[:4] + NOISE(2000), NAMED, NAMED, NAMED),
    "text": (lambda: b"not a picture at all\n" * 50, NAMED, NAMED, NAMED),
    "PNG with flipped data": (lambda: flipped(encoded("PNG"), 2000), NAMED, NAMED, NAMED),
    "PNG cut short": (lambda: encoded("PNG")[:2000], NAMED, NAMED, NAMED),
    "WebP cut short": (lambda: encoded("WEBP")[:300], NAMED, NAMED, NAMED),
    "32-bit pixels": (lambda: encoded("TIFF", photograph().convert("F")), NAMED, NAMED, NAMED),
    "GIF": (lambda: encoded("GIF"), RIGHT, RIGHT, RIGHT),
    "PNG": (lambda: encoded("PNG"), RIGHT, RIGHT, RIGHT),
    "WebP": (lambda: encoded("WEBP", lossless=True), RIGHT, RIGHT, RIGHT),
    "BMP": (lambda: encoded("BMP"), RIGHT, RIGHT, RIGHT),
    "TIFF": (lambda: encoded("TIFF"), RIGHT, RIGHT, RIGHT),
    "CMYK": (lambda: encoded("JPEG", photograph().convert("CMYK"), quality=95), RIGHT, RIGHT, RIGHT),
    "gray": (lambda: encoded("JPEG", photograph().convert("L")), RIGHT, RIGHT, RIGHT),
    "progressive": (lambda: encoded("JPEG", progressive=True), RIGHT, RIGHT, RIGHT),
    "16 bits": (deep_png, RIGHT, RIGHT, RIGHT),
    "turned by EXIF": (lambda: encoded("JPEG", exif=rotated()), RIGHT, RIGHT, RIGHT),
}


def pixels_of(content: bytes) -> np.ndarray[Any, Any]:
    """As Pillow shows them without turning them; it would clip deep ones instead of scaling them."""
    with Image.open(io.BytesIO(content)) as image:
        if image.mode.startswith("I;16"):
            return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[:, :, None], 3, 2)
        return np.asarray(image.convert("RGB"))


def load_file(backend: str, folder: Path, row: str) -> str:
    """Row `row` of `FILES` as the only image of a plain folder; one that vanishes does so after it was listed."""
    file = folder / "val" / "only" / "a.JPEG"
    file.parent.mkdir(parents=True)
    content = FILES[row][0]()
    _write(file, content)
    try:
        loader = build(folder, "val", config=CONFIG, batch_size=1, train=False, loader=backend, num_workers=1)
        (batch,) = list(loader)
    except DataError as error:
        return _named(str(error), str(file))
    assert content is not None
    return RIGHT if _near(batch.images[0].permute(1, 2, 0).numpy(), pixels_of(content)) else "wrong pixels"


CONFIG = DataConfig(img_size=SIDE, crop_pct=1.0)


def convert_file(folder: Path, row: str) -> str:
    """The same file in a source: named, or kept with its pixels in both formats, perhaps with a warning."""
    file, good = folder / "src" / "b" / "a.JPEG", folder / "src" / "a" / "good.jpg"
    for path in (file, good):
        path.parent.mkdir(parents=True)
    content = FILES[row][0]()
    _write(file, content)
    good.write_bytes(JPEG)
    formats = "dali" if missing("ffcv") else "ffcv,dali"
    try:
        manifest = convert_folder(folder / "src", folder / "set", formats, split="train", max_size=SIDE, store="raw")
    except DataError as error:
        return "left files behind" if len(list(folder.iterdir())) > 1 else _named(str(error), str(file))
    assert content is not None
    source = TarSource(folder / "set", "train")
    (i,) = np.flatnonzero(source.labels == 1)
    kept = [pixels_of(source.read(i).tobytes())]
    if formats != "dali":
        stored = np.load(folder / "set" / "train.beton.npy")[i]
        payload = (folder / "set" / "train.beton").read_bytes()[int(stored["ptr"]) :][: int(stored["size"])]
        kept.append(np.frombuffer(payload, np.uint8).reshape(stored["height"], stored["width"], 3))
    if not all(np.array_equal(pixels, pixels_of(content)) for pixels in kept):
        return "wrong pixels"
    return WARNED if [warned["file"] for warned in manifest.warned] == [str(file)] else RIGHT


def _write(file: Path, content: bytes | None) -> None:
    if content is None:
        file.symlink_to(file.with_name("nowhere"))
    else:
        file.write_bytes(content)


def _named(message: str, *names: str) -> str:
    good = all(name in message for name in names) and " object at 0x" not in message
    return NAMED if good else f"said {message}"


def _near(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> bool:
    """Within what the decoders' rounding can do."""
    return found.shape == expected.shape and np.abs(found.astype(int) - expected).mean() < 1.5


@dataclass(frozen=True)
class Change:
    """Something done to one file of a converted set."""

    file: str
    make: Callable[[bytes, Place], bytes | None]
    """From its content and where things are in it; None takes it away."""
    said: str
    """Of what the error must speak."""
    noticed: Sequence[str] = CHANGED
    """By which columns. The others do not read it, and deliver what they always did."""


@dataclass(frozen=True)
class Place:
    """Where sample `VICTIM` is in the files of `root`; `other` is another set."""

    root: Path
    other: Path

    @property
    def tar(self) -> Any:
        return np.load(self.root / "train.samples.npy")[VICTIM]

    @property
    def beton(self) -> Any:
        return np.load(self.root / "train.beton.npy")[VICTIM]

    @property
    def table(self) -> int:
        return int(np.fromfile(self.root / "train.beton", dtype=HEADER, count=1)[0]["table"])

    def in_tar(self, share: float = 0.5) -> int:
        return int(self.tar["offset"]) + int(self.tar["length"] * share)

    def in_beton(self, share: float = 0.5) -> int:
        return int(self.beton["ptr"]) + int(self.beton["size"] * share)


VERIFYING = CHANGED[:2]
TARS = (*VERIFYING, "torch", "dali")
BETON = (*VERIFYING, "ffcv")
_METADATA = HEADER.itemsize + 3 * FIELD.itemsize + VICTIM * METADATA.itemsize
_TAR, _IDX, _TABLE, _BETON, _STORED = (
    "train-00000.tar", "train-00000.idx", "train.samples.npy", "train.beton", "train.beton.npy",
)  # fmt: skip
_MEMBER, _SAMPLE = f"{_TAR}, member {VICTIM:08d}.jpg", f"{_BETON}, sample {VICTIM}"


def _whole_files(file: str, by: Sequence[str]) -> Iterator[tuple[str, Change]]:
    """What can happen to any file."""
    yield f"{file} truncated by 100 bytes", Change(file, lambda c, at: c[:-100], file, by)
    yield f"{file} truncated to half", Change(file, lambda c, at: c[: len(c) // 2], file, by)
    yield f"{file} empty", Change(file, lambda c, at: b"", file, by)
    yield f"{file} missing", Change(file, lambda c, at: None, file, by)
    yield f"{file} with a byte more", Change(file, lambda c, at: c + b"x", file, by)
    yield f"{file} of another set", Change(file, lambda c, at: (at.other / file).read_bytes(), file, by)
    yield f"{file} overwritten", Change(file, lambda c, at: NOISE(len(c)), file, by)


CHANGES: dict[str, Change] = {
    **{
        row: change
        for file, by in ((_TAR, TARS), (_IDX, VERIFYING), (_TABLE, CHANGED), (_BETON, BETON), (_STORED, BETON))
        for row, change in _whole_files(file, by)
    },
    "tar, data flipped": Change(_TAR, lambda c, at: flipped(c, at.in_tar()), _MEMBER, TARS),
    "tar, a bit of the data flipped": Change(_TAR, lambda c, at: flipped(c, at.in_tar(0.9), 1, 1), _MEMBER, TARS),
    "tar, data zeroed": Change(_TAR, lambda c, at: overwritten(c, at.in_tar(), bytes(64)), _MEMBER, TARS),
    "tar, header of a member flipped": Change(
        _TAR, lambda c, at: flipped(c, int(at.tar["offset"]) - 512 + 100), _MEMBER, VERIFYING
    ),
    "tar, label flipped": Change(
        _TAR, lambda c, at: flipped(c, c.index(b"%08d.lab" % VICTIM) + 512, 4), _MEMBER, VERIFYING
    ),
    "index flipped": Change(_IDX, lambda c, at: flipped(c, 40), _IDX, VERIFYING),
    "index of the next tar": Change(
        _IDX, lambda c, at: (at.root / "train-00001.idx").read_bytes(), _IDX, VERIFYING
    ),
    "table, header flipped": Change(_TABLE, lambda c, at: flipped(c, 20), _TABLE),
    "table, a label changed": Change(_TABLE, lambda c, at: flipped(c, 128 + VICTIM * 36, 1, 1), _TABLE),
    "beton, header flipped": Change(_BETON, lambda c, at: flipped(c, 0), f"{_BETON}, header", BETON),
    "beton, page size changed": Change(_BETON, lambda c, at: flipped(c, 6, 1, 0x60), f"{_BETON}, header", BETON),
    "beton, fields flipped": Change(
        _BETON, lambda c, at: flipped(c, HEADER.itemsize), f"{_BETON}, table of fields", BETON
    ),
    "beton, metadata flipped": Change(
        _BETON, lambda c, at: flipped(c, _METADATA), f"{_BETON}, metadata of sample {VICTIM}", BETON
    ),
    "beton, metadata zeroed": Change(
        _BETON,
        lambda c, at: overwritten(c, _METADATA, bytes(3 * METADATA.itemsize)),
        f"{_BETON}, metadata of sample {VICTIM}",
        BETON,
    ),
    "beton, a label changed": Change(
        _BETON, lambda c, at: flipped(c, _METADATA + 16, 1, 1), f"{_BETON}, metadata of sample {VICTIM}", BETON
    ),
    "beton, data flipped": Change(_BETON, lambda c, at: flipped(c, at.in_beton()), _SAMPLE, BETON),
    "beton, a bit of the data flipped": Change(
        _BETON, lambda c, at: flipped(c, at.in_beton(0.9), 1, 1), _SAMPLE, BETON
    ),
    "beton, data zeroed": Change(
        _BETON, lambda c, at: overwritten(c, at.in_beton(), bytes(64)), _SAMPLE, BETON
    ),
    "beton, another sample's data": Change(
        _BETON,
        lambda c, at: overwritten(c, at.in_beton(0), c[at.in_beton(1) :][: int(at.beton["size"])]),
        _SAMPLE,
        BETON,
    ),
    "beton, allocation table flipped": Change(
        _BETON, lambda c, at: flipped(c, at.table + 24 * VICTIM), f"{_BETON}, allocation table, sample {VICTIM}", BETON
    ),
    "sidecar flipped": Change(_STORED, lambda c, at: flipped(c, 128 + VICTIM * 25), _STORED, BETON),
    "manifest, a class renamed": Change("dataset.json", lambda c, at: c.replace(b'"b"', b'"c"'), "dataset.json"),
    "manifest, a number changed": Change("dataset.json", lambda c, at: c.replace(b"30", b"20"), "dataset.json"),
    "manifest truncated": Change("dataset.json", lambda c, at: c[: len(c) // 2], "dataset.json"),
    "manifest empty": Change("dataset.json", lambda c, at: b"", "dataset.json"),
    "manifest missing": Change("dataset.json", lambda c, at: None, "dataset.json"),
    "manifest of another set": Change(
        "dataset.json", lambda c, at: (at.other / "dataset.json").read_bytes(), "train.samples.npy"
    ),
}  # fmt: skip


def expected(column: str, every: int = 1) -> dict[str, str]:
    """What `column` must make of every row it has, or of one in `every`."""
    outcomes = {}
    if column in (order := ("convert", "torch", "dali")):
        outcomes |= {row: wanted[order.index(column)] for row, (_, *wanted) in FILES.items()}
    if column in CHANGED:
        outcomes |= {row: NAMED if column in change.noticed else RIGHT for row, change in CHANGES.items()}
    return dict([(row, outcome) for row, outcome in outcomes.items() if _possible(row)][::every])


def _possible(row: str) -> bool:
    return row in FILES or not missing("ffcv") or "beton" not in CHANGES[row].file


def write_sets(folder: Path) -> None:
    """Two converted sets of the same size, and what the columns are run on."""
    for name, seed in (("set", 1), ("other", 2)):
        write_folder(folder / f"{name} source", {"a": 20, "b": NUM - 20}, seed)
        formats = "dali" if missing("ffcv") else "ffcv,dali"
        convert_folder(folder / f"{name} source", folder / name, formats, split="train", max_size=64)


def change_set(sets: Path, folder: Path, row: str) -> Path:
    """A copy of the set that has been damaged; hard links, but for the file concerned."""
    change, place = CHANGES[row], Place(sets / "set", sets / "other")
    root = folder / "set"
    shutil.copytree(sets / "set", root, copy_function=lambda a, b: Path(b).hardlink_to(a))
    content = change.make((root / change.file).read_bytes(), place)
    (root / change.file).unlink()
    if content is not None:
        assert content != (sets / "set" / change.file).read_bytes()
        (root / change.file).write_bytes(content)
    return root


def verify_change(sets: Path, full: bool, folder: Path, row: str) -> str:
    root = change_set(sets, folder, row)
    try:
        verify(root, 1, Silent(), full=full)
    except DataError as error:
        return _named(str(error), CHANGES[row].said)
    return RIGHT


def load_change(sets: Path, backend: str, intact: str, folder: Path, row: str) -> str:
    root = change_set(sets, folder, row)
    try:
        return RIGHT if delivered(root, backend) == intact else "wrong pixels or labels"
    except DataError as error:
        return _named(str(error), CHANGES[row].said)


def delivered(root: Path, backend: str) -> str:
    """A digest of all images, labels and numbers of a set."""
    config = DataConfig(img_size=24)
    loader = build(root, "train", config=config, batch_size=8, train=False, loader=backend, num_workers=1)
    digest = hashlib.sha256()
    for batch in loader:
        for part in (batch.images.contiguous(), batch.labels, batch.index):
            digest.update(part.numpy().tobytes())
    loader.close()
    return digest.hexdigest()


def in_a_process(case: Callable[[Path, str], str], folder: Path, row: str) -> str:
    """What `case(folder, row)` returns, from a process that may crash or hang."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(theirs, case, folder, row))
    process.start()
    theirs.close()
    try:
        said = str(ours.recv()) if ours.poll(SECONDS) else "hung"
    except EOFError:
        said = "died"
    process.kill()
    process.join()
    return said


def _run(pipe: Connection, case: Callable[[Path, str], str], folder: Path, row: str) -> None:
    try:
        pipe.send(case(folder, row))
    except BaseException as error:
        pipe.send(f"raised {type(error).__name__}: {error}")


def run(column: str, sets: Path, every: int) -> dict[str, str]:
    """What `column` makes of every row it has, or of one in `every`."""
    of_file = convert_file if column == "convert" else partial(load_file, column)
    of_change = partial(verify_change, sets, "--full" in column)
    if column in ("torch", "dali", "ffcv"):
        importlib.import_module(f"pipelines.loaders.{column}_loader")
        # FFCV's decoder is to be compiled before the processes part; DALI does not survive that once it is running.
        intact = delivered(sets / "set", column) if column == "ffcv" else in_a_process(delivered, sets / "set", column)
        of_change = partial(load_change, sets, column, intact)
    seen = {}
    for i, row in enumerate(expected(column, every)):
        folder = sets / f"{column} {i}"
        folder.mkdir()
        seen[row] = in_a_process(of_file if row in FILES else of_change, folder, row)
        shutil.rmtree(folder)
    return seen


def _one_by_one(function: Any, tasks: Any, jobs: int, on_result: Any, patience: float = 0) -> list[Any]:
    results = [function(task) for task in tasks]
    for result in results:
        on_result(result)
    return results


if __name__ == "__main__":
    engines.map_processes = _one_by_one  # the case is a process already
    folder, every, *columns = sys.argv[1:]
    print(json.dumps({column: run(column, Path(folder), int(every)) for column in columns}))
