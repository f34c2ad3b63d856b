"""Other programs read a converted set: the snippets of docs/data.md, run as they are printed."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Silent, convert_folder, missing, picture, shared
from numpy.typing import NDArray
from PIL import Image

from pipelines.base import DataError
from pipelines.conversion.companions import companion_files
from pipelines.conversion.verify import verify
from pipelines.storage.manifest import Split, read_manifest
from pipelines.storage.source import TarSource

ROOT = Path(__file__).parents[3]
DOCS = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
CLASSES = ("a: 'quoted' \"name\"", "größe", "no")  # YAML takes the last one for false
SIDE = 64
needs_ffcv = pytest.mark.skipif(missing("ffcv") is not None, reason="FFCV is not installed")
needs_dali = pytest.mark.skipif(missing("dali") is not None, reason="DALI is not installed")


def write_images(folder: Path) -> None:
    """For each class a JPEG, a gray one, one in CMYK, a PNG, and a PNG with a palette, which is stored anew."""
    for number, name in enumerate(CLASSES):
        for split in ("train", "val"):
            place = folder / split / name
            place.mkdir(parents=True)
            image = picture(SIDE, SIDE, 10 * number + (split == "val"))
            image.save(place / "0.jpg", quality=90)
            image.convert("L").save(place / "1.jpg", quality=90)
            image.convert("CMYK").save(place / "2.jpg", quality=90)
            image.save(place / "3.png")
            image.quantize(64).save(place / "4.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that holds `my-set`, its .beton with pixels, and `jpeg-set`, its .beton with JPEGs."""

    def make(folder: Path) -> None:
        write_images(folder / "source")
        formats = "dali" if missing("ffcv") else "ffcv,dali"
        convert_folder(folder / "source", folder / "my-set", formats, store="raw", max_size=SIDE)
        if not missing("ffcv"):
            convert_folder(folder / "source", folder / "jpeg-set", "ffcv", max_size=SIDE)

    with shared(tmp_path_factory, "interop", make) as folder:
        yield folder


def stored(place: Path, split: str) -> tuple[list[NDArray[np.uint8]], list[int]]:
    """Pixels and labels, by the table."""
    source = TarSource(place / "my-set", split)
    images = [rgb(Image.open(io.BytesIO(source.read(i).data))) for i in range(source.num_samples)]
    return images, source.labels.tolist()


def rgb(image: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(image.convert("RGB"))


def snippet(heading: str) -> str:
    """The code below a heading of docs/data.md."""
    _, found, text = DOCS.partition(f"# {heading}\n")
    assert found
    code = re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert code
    return code[1]


def run(heading: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(place)
    names: dict[str, Any] = {}
    exec(snippet(heading), names)
    return names


def same(names: dict[str, Any], expected: tuple[list[NDArray[np.uint8]], list[int]]) -> None:
    images, labels = expected
    assert list(names["labels"]) == labels
    assert len(names["images"]) == len(images)
    for found, image in zip(names["images"], images, strict=True):
        assert np.array_equal(rgb(found), image)


def test_the_pixels_and_labels_are_those_of_the_originals(place: Path) -> None:
    """What the others are compared with."""
    originals: dict[bytes, int] = {}
    for label, name in enumerate(sorted(CLASSES)):
        for path in (place / "source" / "train" / name).iterdir():
            with Image.open(path) as image:
                originals[rgb(image).tobytes()] = label
    images, labels = stored(place, "train")
    assert {image.tobytes(): label for image, label in zip(images, labels, strict=True)} == originals
    assert len(originals) == 5 * len(CLASSES)


@pytest.mark.filterwarnings("ignore")  # webdataset leaves tars open
class TestOthers:
    def test_webdataset(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("webdataset", reason="webdataset is not installed")
        same(run("webdataset", place, monkeypatch), stored(place, "train"))

    def test_timm(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("webdataset", reason="webdataset is not installed")
        names = run("timm", place, monkeypatch)
        same(names, stored(place, "val"))
        assert len(names["dataset"]) == len(stored(place, "val")[1])

    def test_timm_trains(self, place: Path) -> None:
        pytest.importorskip("webdataset", reason="webdataset is not installed")
        from timm.data import create_dataset

        images, labels = stored(place, "train")
        dataset = create_dataset("wds/", root=str(place / "my-set"), split="train", is_training=True, batch_size=5)
        assert len(dataset) == len(images)
        found = [(rgb(image).tobytes(), label) for image, label in dataset]
        assert sorted(found) == sorted(zip((image.tobytes() for image in images), labels, strict=True))

    def test_datasets(self, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        datasets = pytest.importorskip("datasets", reason="datasets is not installed")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
        names = run("Hugging Face `datasets`", place, monkeypatch)
        same(names, stored(place, "train"))
        assert tuple(names["names"]) == read_manifest(place / "my-set")[0].classes == tuple(sorted(CLASSES))
        both = datasets.load_dataset(str(place / "my-set"), cache_dir=str(tmp_path))
        assert set(both) == {"train", "validation"}
        same({"images": both["validation"]["jpg"], "labels": both["validation"]["cls"]}, stored(place, "val"))


@needs_dali
def test_dali(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("DALI", place, monkeypatch)
    images, labels = stored(place, "train")
    assert names["labels"].tolist() == labels[:8]
    for found, image in zip(names["images"], images, strict=False):
        assert np.abs(found.astype(int) - image).mean() < 3  # DALI has a JPEG decoder of its own
    pixels = [np.array_equal(found, image) for found, image in zip(names["images"], images, strict=False)]
    assert any(pixels)  # the PNGs


@needs_dali
def test_dalis_reader_finds_every_member(place: Path) -> None:
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    source = TarSource(place / "my-set", "train")
    tar = place / "my-set" / source.entry.shards[0]
    kinds = {"jpg": types.UINT8, "lab": types.INT32, "sid": types.INT64, "cls": types.UINT8}
    for ext in (["jpg", "lab", "sid"], ["jpg", "cls"]):
        pipe = Pipeline(batch_size=source.num_samples, num_threads=1, device_id=None)
        with pipe:
            pipe.set_outputs(
                *fn.readers.webdataset(
                    paths=[str(tar)], index_paths=[str(tar.with_suffix(".idx"))], ext=ext,
                    dtypes=[kinds[name] for name in ext], missing_component_behavior="error",
                )
            )  # fmt: skip
        found = dict(zip(ext, pipe.run(), strict=True))
        for i in range(source.num_samples):
            assert np.array(found["jpg"][i]).tobytes() == source.read(i).tobytes()
            if "cls" in found:
                assert np.array(found["cls"][i]).tobytes() == str(source.labels[i]).encode()
            else:
                assert (np.array(found["lab"][i]).item(), np.array(found["sid"][i]).item()) == (source.labels[i], i)


@needs_ffcv
@pytest.mark.exhaustive
def test_ffcv(place: Path, tmp_path: Path) -> None:
    """In a process that has nothing of pss: pss changes what FFCV does."""
    code = snippet("In the `.beton`")
    script = "import numpy\n" + "".join(
        code.replace("my-set", name) + f"numpy.savez('{name}.npz', images=images, labels=labels)\n"
        for name in ("my-set", "jpeg-set")
    )
    for name in ("my-set", "jpeg-set"):
        (tmp_path / name).symlink_to(place / name)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
    )
    assert ended.returncode == 0, ended.stderr
    images, labels = stored(place, "train")
    raw, jpeg = np.load(tmp_path / "my-set.npz"), np.load(tmp_path / "jpeg-set.npz")
    assert raw["labels"].tolist() == jpeg["labels"].tolist() == labels[:8]
    assert np.array_equal(raw["images"], np.stack(images[:8]))
    for found, image in zip(jpeg["images"], images, strict=False):
        again = io.BytesIO()
        Image.fromarray(image).save(again, "JPEG", quality=90, subsampling="4:2:0")
        assert np.abs(found.astype(int) - rgb(Image.open(again))).mean() < 2


def test_classes_that_share_a_name_stay_numbers_for_datasets() -> None:
    splits = {"train": Split(2, (1, 1), "train.samples.npy", ("train-00000.tar",))}
    files = companion_files(("crane", "crane"), splits, {"train": [2]})
    assert b"class_label" not in files["README.md"]
    assert files["classes.txt"] == b"crane\ncrane\n"
    assert b"class_label" in companion_files(("crane", "ox"), splits, {"train": [2]})["README.md"]


@pytest.mark.parametrize("name", ["two\nlines", "two\u2028lines", ""])
def test_a_name_that_breaks_a_line_is_not_listed(name: str) -> None:
    splits = {"train": Split(2, (1, 1), "train.samples.npy", ("train-00000.tar",))}
    files = companion_files((name, "ox"), splits, {"train": [2]})
    assert set(files) == {"_info.json", "README.md"}
    assert files["README.md"].isascii()
    assert files["README.md"].count(b"\n---\n") == 1


def test_a_split_without_tars_is_shown_to_nobody() -> None:
    splits = {"train": Split(2, (1, 1), "train.samples.npy", (), "train.beton")}
    assert set(companion_files(("a", "b"), splits, {"train": []})) == {"classes.txt"}
    splits["val"] = Split(2, (1, 1), "val.samples.npy", ("val-00000.tar",))
    files = companion_files(("a", "b"), splits, {"train": [], "val": [2]})
    assert b"train" not in files["_info.json"]
    assert b"train" not in files["README.md"]


def test_what_lies_beside_the_tars_is_verified(place: Path, tmp_path: Path) -> None:
    for path in (place / "my-set").iterdir():
        (tmp_path / path.name).symlink_to(path)
    assert verify(tmp_path, 1, Silent()).format_version == 3
    for name in ("_info.json", "README.md", "classes.txt"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        (tmp_path / name).write_bytes(content.swapcase())
        with pytest.raises(DataError, match=re.escape(name)):
            verify(tmp_path, 1, Silent())
        (tmp_path / name).write_bytes(content)
