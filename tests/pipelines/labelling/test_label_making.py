"""Label maps of a converted set: their place, their numbers, and that no kill, damage or other teacher spoils them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Silent, convert_folder, missing
from numpy.typing import NDArray
from painting_teacher import GRID, Teacher
from PIL import Image

from pipelines import DataConfig, DataError, build
from pipelines.base import View
from pipelines.conversion import verify as verification
from pipelines.conversion.processes import Kept
from pipelines.conversion.verify import verify
from pipelines.labelling import making
from pipelines.labelling.making import MapOptions, make_label_maps
from pipelines.storage.manifest import MANIFEST, read_manifest
from pipelines.storage.source import TarSource
from pss.methods.parts.token_labels import pooled_logits

ROOT = Path(__file__).parents[3]
COUNT = 90


def coordinates(height: int, width: int, third: int) -> Image.Image:
    """Red is the share of the way down, green that to the right, of 240; blue marks the image."""
    down, right = ((np.arange(n) + 0.5) / n * 240 for n in (height, width))
    pixels = np.empty((height, width, 3))
    pixels[..., 0], pixels[..., 1], pixels[..., 2] = down[:, None], right, third
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion of coordinate images, of all shapes."""
    folder, rng = tmp_path_factory.mktemp("coordinates"), np.random.default_rng(0)
    for split, count in (("train", COUNT), ("val", 9)):
        for i in range(count):
            place = folder / split / ("cat", "dog", "emu")[i % 3]
            place.mkdir(parents=True, exist_ok=True)
            height, width = (int(n) for n in rng.integers(60, 160, 2))
            coordinates(height, width, i).save(place / f"{i:03d}.jpg", quality=98, subsampling=0)
    dest = tmp_path_factory.mktemp("converted") / "set"
    convert_folder(folder, dest, "dali" if missing("ffcv") else "ffcv,dali")
    return dest


@pytest.fixture
def root(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to be labelled, in small pieces."""
    monkeypatch.setattr(making, "_PIECE", 8)
    monkeypatch.setattr(making, "BATCH", 4)
    shutil.copytree(original, tmp_path / "set")
    return tmp_path / "set"


def label(root: Path, teacher: Teacher | None = None, progress: Any = None, **options: Any) -> Any:
    return make_label_maps(root, teacher or Teacher(), MapOptions(**options), progress or Silent())


def state(root: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in root.iterdir()}


def rows_of(root: Path, split: str = "train") -> tuple[NDArray[np.float16], NDArray[np.uint16]]:
    """Logits by class (samples, 3, h, w), and classes."""
    rows = np.load(root / read_manifest(root)[0].label_maps[split].file)
    assert rows.dtype == np.int16
    logits, classes = rows[:, 0].view(np.float16), rows[:, 1].view(np.uint16)
    return np.take_along_axis(logits, np.argsort(classes, 1), 1), classes


def test_a_map_lies_over_the_whole_image_of_its_sample(root: Path) -> None:
    entry = label(root)
    logits, classes = rows_of(root)
    assert logits.shape == (COUNT, 3, *GRID)
    places = (np.arange(6) + 0.5) / 6
    assert np.abs(logits[:, 0] - places[:, None]).max() < 0.02  # whatever the shape of the image
    assert np.abs(logits[:, 1] - places).max() < 0.02
    assert (np.sort(classes, 1) == np.arange(3)[:, None, None]).all()
    blues = logits[:, 2].astype(np.float64).mean((1, 2)) * 240
    source = TarSource(root, "train")
    for i in range(0, COUNT, 7):
        with Image.open(io.BytesIO(source.read(i).tobytes())) as image:
            assert abs(np.asarray(image)[..., 2].mean() - blues[i]) < 1
    assert entry.top1 == pytest.approx(1 / 3)
    assert (entry.grid, entry.top_k, entry.covers, entry.side) == (GRID, 3, "whole", 48)
    told = json.loads((root / MANIFEST).read_text())
    assert told["label_maps"]["train"]["file"] in told["files"]
    assert sorted(path.name for path in root.iterdir()) == sorted([*told["files"], MANIFEST])


def test_the_reference_sees_the_central_square(root: Path) -> None:
    label(root, square=True)
    logits, _ = rows_of(root)
    heights, widths = (np.load(root / "train.samples.npy")[name] for name in ("height", "width"))
    places = (np.arange(6) + 0.5) / 6 - 0.5
    for which, extent, other in ((0, heights, widths), (1, widths, heights)):
        share = np.minimum(extent, other) / extent
        seen = logits[:, which].mean(2 - which)  # along the other axis
        assert np.abs(seen - (0.5 + share[:, None] * places)).max() < 0.02


@pytest.mark.skipif(bool(missing("ffcv")), reason="FFCV is not installed")
def test_copies_for_ffcv_are_taken_where_there_are_no_others(original: Path, root: Path, tmp_path: Path) -> None:
    label(root)
    expected, _ = rows_of(root)
    manifest = json.loads((original / MANIFEST).read_text())
    manifest["splits"]["train"]["shards"] = []
    write(root, manifest)
    label(root)
    logits, _ = rows_of(root)
    assert np.abs(logits - expected).max() < 0.03  # another JPEG of the same pixels
    assert not np.array_equal(logits, expected)


def write(root: Path, manifest: dict[str, Any]) -> None:
    """With a checksum that is right."""
    manifest = {name: value for name, value in manifest.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (root / MANIFEST).write_text(json.dumps({**manifest, "sha256": digest}, indent=1, ensure_ascii=False) + "\n")


@pytest.mark.parametrize("num_classes", [1000, 21841])
def test_as_many_classes_as_imagenet_has_are_exact(original: Path, root: Path, num_classes: int) -> None:
    """From a teacher's numbers, by way of the file and a loader, to a patch's logits."""
    manifest = json.loads((original / MANIFEST).read_text())
    names = [f"n{i:08d}" for i in range(num_classes)]
    manifest["classes"] = names
    for split in manifest["splits"].values():
        split["per_class"] += [0] * (num_classes - len(split["per_class"]))
    write(root, manifest)
    numbers = (num_classes - 1, 2049 if num_classes > 2049 else 999 - 1, num_classes // 2 + 1)
    label(root, Teacher(num_classes=num_classes, classes=tuple(names), numbers=numbers), top_k=3)
    loader = build(
        root, "train", config=DataConfig(img_size=32), batch_size=9, train=True, loader="torch", label_maps="auto",
        num_workers=0,
    )  # fmt: skip
    for batch in loader:
        assert batch.maps is not None
        assert batch.maps.shape[1:] == (2, 3, *GRID)
        whole = View(torch.tensor([[0.0, 0, 1, 1]]).repeat(9, 1), torch.zeros(9, dtype=torch.bool))
        pooled = pooled_logits(batch.maps, whole, grid=GRID, num_classes=num_classes)
        assert pooled.abs().sum((0, 1)).nonzero().flatten().tolist() == sorted(numbers)
        down = pooled[..., numbers[0]].view(9, *GRID).mean(2)
        assert torch.allclose(down, (torch.arange(6) + 0.5) / 6, atol=0.02)
    loader.close()


def test_a_map_of_18_by_18_takes_at_most_what_was_promised(tmp_path: Path) -> None:
    assert 2 * 5 * 18 * 18 * 2 <= 6600
    one = np.zeros((1, 2, 5, 18, 18), "<i2")
    np.save(tmp_path / "one.npy", one)
    assert (tmp_path / "one.npy").stat().st_size == 6480 + 128  # the header is there once in a file


SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = [".", "tests/pipelines/labelling"]
from painting_teacher import Teacher
from pipelines.labelling import making

class Silent:
    def start(self, phase, total): pass
    def advance(self, images): pass

making._PIECE, making.BATCH = 8, 4
making.make_label_maps(Path(sys.argv[1]), Teacher(seconds=0.05), making.MapOptions(), Silent())
"""


def test_killed_again_and_again_it_comes_out_the_same(original: Path, root: Path, tmp_path: Path) -> None:
    label(root)
    expected = state(root)
    other = tmp_path / "other"
    shutil.copytree(original, other)
    work = other / ".train.maps.partial" / "work"
    for least in (1, 4):
        process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(other)], cwd=ROOT, env=os.environ)
        deadline = time.monotonic() + 60
        while len(list(work.glob("piece-??????"))) < least and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=60) == -signal.SIGKILL
        assert not read_manifest(other)[0].label_maps
    done = len(list(work.glob("piece-??????")))
    assert 4 <= done < 12
    teacher = Teacher()
    said: list[str] = []
    make_label_maps(other, teacher, MapOptions(), Silent(), said.append)
    assert said == [f"continuing the unfinished label maps of {other}"]
    assert teacher.calls == sum(len(range(at, min(at + 8, COUNT), 4)) for at in range(8 * done, COUNT, 8))
    assert state(other) == expected


@pytest.mark.parametrize("moment", ["sync_folder", "with_label_maps"])
def test_ended_at_the_very_end_it_goes_on(root: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """When the file is there and the manifest not yet told."""
    before = state(root)

    def end(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(making, moment, end)
        with pytest.raises(KeyboardInterrupt):
            label(root)
    assert state_of(root, before) == before
    teacher = Teacher()
    entry = label(root, teacher)
    assert not teacher.calls
    assert not (root / ".train.maps.partial").exists()
    verify(root, 1, Silent(), full=True)
    assert (root / entry.file).exists()


def state_of(root: Path, names: dict[str, str]) -> dict[str, str]:
    return {name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in names}


def test_damage_to_an_unfinished_file_is_named_and_mended(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Damaging(Silent):
        done = 0

        def advance(self, images: int) -> None:
            self.done += images
            if self.done == 40:  # of which 16 were written long ago
                (path,) = (root / ".train.maps.partial" / "set").iterdir()
                with path.open("r+b") as file:
                    file.seek(128 + 9 * 2 * 3 * 36 * 2)
                    file.write(b"\xff")

    with pytest.raises(Kept, match=r"is not as it was written \(samples 8 to 15\); the same command makes these again"):
        label(root, progress=Damaging())
    teacher = Teacher()
    label(root, teacher)
    assert teacher.calls == 2


def test_damage_is_found_by_verification(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = label(root)
    path, good = root / entry.file, (root / entry.file).read_bytes()
    verify(root, 1, Silent())
    verify(root, 1, Silent(), full=True)
    for place, value in (((17, 0), 0x7E00), ((17, 1), 3), ((17, 0, 2), 0x7BFF)):  # no number, no class, no order
        rows = np.load(path)
        rows[place] = value
        np.save(path, rows)
        with monkeypatch.context() as patched:
            patched.setattr(verification, "_SAMPLED", COUNT)
            with pytest.raises(DataError, match=f"{entry.file}, sample 17 are not as they were written"):
                verify(root, 1, Silent())
    path.write_bytes(good)
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(DataError, match=f"{entry.file} are not as they were written"):
        verify(root, 1, Silent(), full=True)
    for content in (good[:-2], good + b"0"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"{entry.file} are not as they were written"):
            verify(root, 1, Silent())
        with pytest.raises(DataError, match=f"{entry.file} has {len(content)} bytes instead of {len(good)}; copy"):
            auto(root)
    path.unlink()
    with pytest.raises(DataError, match=f"{entry.file} are not as they were written"):
        verify(root, 1, Silent())
    with pytest.raises(DataError, match=r"cannot be read \(it is not there\); copy it again"):
        auto(root)


def auto(root: Path, split: str = "train") -> Any:
    config = DataConfig(img_size=32)
    loader = build(
        root,
        split,
        config=config,
        batch_size=4,
        train=split == "train",
        loader="torch",
        label_maps="auto",
        num_workers=0,
    )
    batch = next(iter(loader))
    loader.close()
    return batch


def test_auto_is_what_the_split_has(root: Path, image_root: Path) -> None:
    with pytest.raises(DataError, match=rf"{root} has no label maps of its train split; make them with pss-convert"):
        auto(root)
    with pytest.raises(DataError, match=r"is no converted data set, and has no label maps of its own; convert it"):
        auto(image_root)
    entry = label(root)
    assert np.array_equal(auto(root).maps.numpy(), np.load(root / entry.file)[auto(root).index.numpy()])
    with pytest.raises(DataError, match=r"no label maps of its val split; .* TEACHER --split val"):
        auto(root, "val")
    label(root, split="val")
    assert auto(root, "val").maps.shape == (4, 2, 3, *GRID)
    assert set(read_manifest(root)[0].label_maps) == {"train", "val"}
    verify(root, 1, Silent(), full=True)


def test_a_run_goes_on_when_its_set_gets_label_maps(root: Path) -> None:
    """Its images are the same, and so is what says which they are."""
    before, manifest = read_manifest(root)[1], (root / MANIFEST).read_bytes()
    assert before == hashlib.sha256(manifest).hexdigest()
    for split in ("train", "val"):
        label(root, split=split)
        assert read_manifest(root)[1] == before
    label(root, top_k=2, restart=True)
    assert read_manifest(root)[1] == before
    assert (root / MANIFEST).read_bytes() != manifest


def test_the_same_again_does_nothing(root: Path) -> None:
    label(root)
    before, teacher, said = state(root), Teacher(name="under another name"), list[str]()
    make_label_maps(root, teacher, MapOptions(), Silent(), said.append)
    assert not teacher.calls
    assert state(root) == before
    assert "has these label maps already" in said[0]


def test_other_maps_are_refused_and_replaced_on_demand(root: Path) -> None:
    first = label(root)
    for other, options in (
        (Teacher(name="b", digest="1" * 64), {}),
        (Teacher(), {"top_k": 2}),
        (Teacher(), {"grid": 3}),
    ):
        with pytest.raises(
            DataError, match=r"has label maps of its train split already \(a teacher at 48 pixels, the whole"
        ):
            label(root, other, **options)  # type: ignore[arg-type]
    second = label(root, Teacher(name="b", digest="1" * 64), grid=3, restart=True)
    assert (second.teacher, second.grid) == ("b", (3, 3))
    assert not (root / first.file).exists()
    assert first.file not in read_manifest(root)[0].files
    verify(root, 1, Silent(), full=True)


def test_maps_in_the_place_of_others_are_continued(root: Path) -> None:
    """The others stay until these are whole; --restart need not be said again, and begins anew if it is."""
    first = label(root)

    class Ending(Silent):
        done = 0

        def advance(self, images: int) -> None:
            self.done += images
            if self.done > 40:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        label(root, progress=Ending(), top_k=2, restart=True)
    assert (root / first.file).exists()
    assert read_manifest(root)[0].label_maps["train"] == first
    verify(root, 1, Silent())
    with pytest.raises(DataError, match="--restart"):
        label(root, grid=2)
    teacher = Teacher()
    label(root, teacher, top_k=2)
    assert teacher.calls == 13  # of 23 batches
    assert not (root / first.file).exists()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_classes": 4}, r"a teacher knows 4 classes and .*set has 3; name a teacher"),
        ({"num_classes": 1000, "classes": None}, "knows 1,000 classes and .* has 3"),
        ({"classes": ("cat", "emu", "dog")}, r"class 1 is 'emu' to a teacher and 'dog' in .*set; name"),
        ({"scale": float("nan")}, r"a teacher finds values that are no numbers in .*train-00000.tar, member 0000000\d"),
    ],
)
def test_a_teacher_of_other_classes_is_refused(root: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(DataError, match=match):
        label(root, replace(Teacher(), **changes))
    assert not read_manifest(root)[0].label_maps


def test_what_cannot_be_made_is_refused(root: Path, image_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for options, match in (
        ({"top_k": 4}, r"--top-k is 4; it must lie in 1 \.\.\. 3"),
        ({"grid": 7}, r"--label-grid is 7, and a teacher tells 6 x 6 places apart; name at most 6"),
    ):
        with pytest.raises(ValueError, match=match):
            label(root, **options)
    with pytest.raises(DataError, match=r"holds no dataset.json; convert it with pss-convert first"):
        label(image_root)
    said: list[str] = []
    make_label_maps(root, Teacher(classes=None), MapOptions(), Silent(), said.append)
    assert "is not known: taken to be those of" in said[0]
    monkeypatch.setattr(making.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(Kept, match=r"has 0\.0 MB left, and its label maps need 0\.0 MB; make room"):
        label(root, split="val")


def test_two_at_once_are_refused(root: Path) -> None:
    class Second(Silent):
        refused = 0

        def advance(self, images: int) -> None:
            if not self.refused:
                self.refused = 1
                with pytest.raises(DataError, match="another pss-convert is writing"):
                    label(root)

    progress = Second()
    label(root, progress=progress)
    assert progress.refused


def test_sets_of_version_2_get_maps_too(root: Path, original: Path) -> None:
    manifest = json.loads((original / MANIFEST).read_text()) | {"format_version": 2}
    del manifest["account"]
    write(root, manifest)
    before = read_manifest(root)[1]
    label(root)
    told, fingerprint = read_manifest(root)
    assert (told.format_version, fingerprint) == (2, before)


Spoil = Callable[[dict[str, Any]], None]


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda m: m["files"].pop(m["label_maps"]["train"]["file"]), r"says nothing of 'train\.maps"),
        (lambda m: m["label_maps"]["train"].update(num_classes=4), "label maps of other classes"),
        (lambda m: m["label_maps"]["train"].update(grid=[6]), "is damaged"),
        (lambda m: m["label_maps"]["train"].pop("teacher"), "is damaged"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(root: Path, spoil: Spoil, match: str) -> None:
    label(root)
    manifest = json.loads((root / MANIFEST).read_text())
    spoil(manifest)
    write(root, manifest)
    with pytest.raises(DataError, match=match):
        read_manifest(root)
