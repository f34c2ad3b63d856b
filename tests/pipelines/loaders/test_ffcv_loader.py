"""FFCV's decoder writes into what is delivered, is told of a batch at a time, and checks what it reads itself."""

from __future__ import annotations

import dataclasses
import gc
import shutil
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import convert_folder, missing
from numpy.typing import NDArray

from pipelines import DataConfig, DataError
from pipelines.base import Progressive
from pipelines.loaders.geometry import crop_boxes, scale_boxes
from pipelines.loaders.order import EpochPlan, sample_numbers
from pipelines.loaders.plans import Plans
from pipelines.storage.beton import RAW
from pipelines.storage.unlocked import crc32_at

if reason := missing("ffcv"):
    pytest.skip(reason, allow_module_level=True)

import numba
from ffcv.libffcv import imdecode, resize_crop

from pipelines.loaders import ffcv_loader
from pipelines.loaders.ffcv_loader import FfcvLoader
from pipelines.loaders.threads import PixelMemory

CONFIG = DataConfig(img_size=48)

Make = Callable[..., FfcvLoader]


@pytest.fixture
def make(converted_root: Path) -> Iterator[Make]:
    made: list[FfcvLoader] = []

    def build_one(split: str = "train", root: Path = converted_root, **options: Any) -> FfcvLoader:
        settings = {"config": CONFIG, "batch_size": 4, "num_workers": 2, "train": split == "train", **options}
        made.append(FfcvLoader(root, split, **settings))
        return made[-1]

    yield build_one
    for loader in made:
        loader.close()


@pytest.fixture(scope="module")
def raw_root(image_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training images stored as pixels."""
    root = tmp_path_factory.mktemp("raw") / "set"
    convert_folder(image_root / "train", root, "ffcv", split="train", max_size=96, store="raw")
    return root


@pytest.fixture
def filled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The batches that FFCV's thread has been given, in their order."""
    batches: list[Any] = []
    fill = ffcv_loader._Epoch.fill

    def note(epoch: Any, batch: Any, slot: int = 0) -> None:
        fill(epoch, batch, slot)
        if len(batch.keys):  # and not a loader's compilation
            batches.append(batch)

    monkeypatch.setattr(ffcv_loader._Epoch, "fill", note)
    return batches


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("kind", ["jpg", "raw"])
def test_pixels_are_those_of_ffcvs_functions(
    kind: str, copies: int, workers: int, raw_root: Path, converted_root: Path, make: Make
) -> None:
    """To the bit, of crops that were decided for the whole epoch at once; also in an epoch of smaller images."""
    grow = Progressive(start_size=32, begin_epoch=1, end_epoch=4, multiple=8)
    config = dataclasses.replace(CONFIG, decode_once=copies, progressive=grow)
    root = raw_root if kind == "raw" else converted_root
    loader = make(root=root, config=config, num_workers=workers)
    rows, content = np.load(root / "train.beton.npy"), np.fromfile(root / "train.beton", np.uint8)
    assert set(rows["mode"] == RAW) == {kind == "raw"}
    for epoch, side in ((3, 40), (4, 48)):
        keys = np.concatenate(list(loader._plan(epoch)))
        samples = sample_numbers(keys)
        boxes, sizes = crop_boxes(*loader.table.sizes(samples), keys, seed=0, epoch=epoch, config=config, train=True)
        stored = np.stack([rows["height"], rows["width"]], axis=1).astype(np.int64)[samples]
        cuts = scale_boxes(boxes, sizes, stored)
        expected = [_cut(content, rows[i], box, side) for i, box in zip(samples, cuts, strict=True)]
        loader.set_epoch(epoch)
        images = torch.cat([batch.images for batch in loader])
        assert np.array_equal(images.permute(0, 2, 3, 1), expected)


def _cut(content: NDArray[np.uint8], row: Any, box: NDArray[np.int64], side: int) -> NDArray[np.uint8]:
    encoded = content[row["ptr"] : row["ptr"] + row["size"]]
    height, width = int(row["height"]), int(row["width"])
    pixels, cut = np.empty((height, width, 3), np.uint8), np.empty((side, side, 3), np.uint8)
    if row["mode"] == RAW:
        pixels[:] = encoded.reshape(height, width, 3)
    else:
        assert imdecode(encoded, pixels, height, width, height, width) == 0
    top, left, crop_height, crop_width = map(int, box)
    resize_crop(pixels, top, top + crop_height, left, left + crop_width, cut)
    return cut


@pytest.mark.parametrize("split", ["train", "val"])
def test_what_is_delivered_is_what_ffcv_wrote_to(split: str, filled: list[Any], make: Make) -> None:
    """There is no copy, and no memory is used twice."""
    loader = make(split)
    kept = list(loader)
    written = [batch.places["into"].tolist() for batch in filled]
    assert [[image.data_ptr() for image in batch.images] for batch in kept] == written
    assert len({place for places in written for place in places}) == sum(len(batch.labels) for batch in kept)


def test_an_epoch_is_planned_in_pieces(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A million images take as long to begin with as a few."""
    loader, planned = make(batch_size=32, seed=3), []
    loader.set_epoch(0)
    samples = np.random.default_rng(0).integers(0, loader.num_samples, 40_000 * 32)
    monkeypatch.setattr(loader, "_plans", Plans(lambda epoch: EpochPlan(samples, 32)))
    plan = loader._planned
    monkeypatch.setattr(loader, "_planned", lambda epoch, keys: (planned.append(len(keys)), plan(epoch, keys))[1])
    batches = iter(loader)
    for number in range(1, 5):
        assert torch.equal(next(batches).index, torch.from_numpy(samples.reshape(-1, 32)[number - 1]))
        assert sum(planned) <= 32 * (loader.batches_ahead + 2 + number)
    batches.close()


def test_compiling_may_take_longer_than_a_stall(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FfcvLoader, "stall_seconds", 0.3)
    compile_code = ffcv_loader.BetonLoader

    def slowly(*arguments: Any, **options: Any) -> Any:
        time.sleep(1)
        return compile_code(*arguments, **options)

    monkeypatch.setattr(ffcv_loader, "BetonLoader", slowly)
    loader = make()
    monkeypatch.setattr(loader, "stall_seconds", 30.0)
    assert len(list(loader)) == loader.steps_per_epoch


def test_compiling_without_end_is_called_that(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.storage.reading._JOIN_SECONDS", 0.1)
    monkeypatch.setattr(FfcvLoader, "compile_seconds", 0.3)
    go_on = threading.Event()

    def hang(*_: Any, **__: Any) -> None:
        go_on.wait(20)
        raise MemoryError("too late")

    monkeypatch.setattr(ffcv_loader, "BetonLoader", hang)
    with pytest.raises(DataError, match=r"^the compilation of FFCV's decoder has not ended for 0\.3 s; see if"):
        make()
    go_on.set()


@pytest.mark.parametrize("how", ["left", "restarted", "closed"])
def test_memory_outlives_the_filling(how: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that is being written to when nobody wants it any more stays until FFCV's thread has let go of it."""
    monkeypatch.setattr("pipelines.storage.reading._JOIN_SECONDS", 0.1)
    loader = make()
    expected = [batch.images.clone() for batch in loader]
    busy, go_on, kept = threading.Event(), threading.Event(), []
    base = ffcv_loader.EpochIterator
    run = base.run_pipeline

    def halfway(epoch: Any, *arguments: Any) -> Any:
        if not kept and epoch.output_queue.qsize() == 1:  # at the third batch, in the first iteration
            kept.append(weakref.ref(epoch._filling.images.untyped_storage()))
            kept.append(epoch)
            busy.set()
            assert go_on.wait(20)
        return run(epoch, *arguments)

    monkeypatch.setattr(base, "run_pipeline", halfway)
    batches = iter(loader)
    next(batches)
    assert busy.wait(20)
    if how == "closed":
        loader.close()
    elif how == "restarted":
        assert torch.equal(next(iter(loader)).images, expected[0])
    else:
        batches.close()
    memory, thread = kept
    gc.collect()
    assert thread.is_alive()
    assert memory() is not None
    assert (thread._filling.places["outcome"] == ffcv_loader._LEFT).all()  # the decoder passes by what is left
    go_on.set()
    thread.join(20)
    assert not thread.is_alive()
    if how != "closed":
        again = [batch.images for batch in loader]
        assert all(map(torch.equal, again, expected))


def test_what_is_left_is_not_decoded(make: Make) -> None:
    loader = make()
    epoch = ffcv_loader._Epoch(loader._beton, 0, loader.memory)
    batch = loader._planned(0, loader._plan(0)[0])
    batch.places["outcome"][[0, 2]] = ffcv_loader._LEFT
    allocate = batch.allocate

    def zeroed(memory: PixelMemory) -> None:
        allocate(memory)
        batch.images.zero_()

    batch.allocate = zeroed
    epoch.fill(batch)
    epoch.close()
    assert [bool(image.any()) for image in batch.images] == [False, True, False, True]
    assert batch.places["outcome"].tolist() == [ffcv_loader._LEFT, 1, ffcv_loader._LEFT, 1]


def test_a_batch_that_is_filled_slowly_is_waited_for(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each place that is filled is a sign of life."""
    loader = make()
    run = ffcv_loader.EpochIterator.run_pipeline

    def slowly(epoch: Any, *arguments: Any) -> Any:
        result = run(epoch, *arguments)
        outcomes = epoch._filling.places["outcome"]
        outcomes[:] = 0
        for place in range(len(outcomes)):
            time.sleep(0.4)
            outcomes[place] = 1
        return result

    monkeypatch.setattr(ffcv_loader.EpochIterator, "run_pipeline", slowly)
    monkeypatch.setattr(loader, "stall_seconds", 1.0)
    next(iter(loader))


def test_crc32_is_zlibs() -> None:
    at = crc32_at()
    crc32 = numba.njit(lambda piece: at(0, piece.ctypes.data, len(piece)))
    data = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8)
    for start, size in [(start, size) for start in range(3) for size in [*range(50), 4096, 4997]]:
        piece = data[start : start + size]
        assert int(crc32(piece)) == zlib.crc32(piece.tobytes())


@pytest.mark.parametrize("workers", [1, 2])
def test_changed_bytes_are_found_when_they_are_first_used(
    workers: int, raw_root: Path, tmp_path: Path, make: Make
) -> None:
    """No decoder could notice that a pixel is another. What has been checked is not checked again."""
    root = tmp_path / "set"
    shutil.copytree(raw_root, root)
    loader, victim = make(root=root, num_workers=workers), 31
    list(loader)
    row = np.load(root / "train.beton.npy")[victim]
    content = bytearray((root / "train.beton").read_bytes())
    content[int(row["ptr"] + row["size"]) - 1] ^= 1
    (root / "train.beton").write_bytes(content)
    used = set(np.concatenate(list(loader._plan(0))).tolist())
    assert victim in used
    assert set(np.flatnonzero(~loader._unchecked.of(np.arange(loader.num_samples))).tolist()) == used
    for epoch in range(2):
        loader.set_epoch(epoch)
        list(loader)
    message = rf"train\.beton, sample {victim} has been damaged since the conversion; copy the file again$"
    with pytest.raises(DataError, match=message):
        list(make(root=root, num_workers=workers))
    list(make(root=root, num_workers=workers, check_bytes=False))


def test_what_cannot_be_decoded_is_named_without_checks_too(converted_root: Path, tmp_path: Path, make: Make) -> None:
    root = tmp_path / "set"
    shutil.copytree(converted_root, root)
    row = np.load(root / "train.beton.npy")[17]
    with (root / "train.beton").open("r+b") as file:
        file.seek(int(row["ptr"]))
        file.write(bytes(int(row["size"])))
    with pytest.raises(DataError, match=r"sample 17 cannot be decoded; copy the file again or convert anew$"):
        list(make(root=root, check_bytes=False))
    with pytest.raises(DataError, match=r"sample 17 has been damaged since the conversion; copy the file again$"):
        list(make(root=root))


def test_ffcv_lists_nothing_of_every_sample(make: Make) -> None:
    """8 s and 600 MB for ImageNet."""
    manager = make()._beton.memory_manager
    assert not {"ptr_to_size", "sample_to_pages", "page_to_samples"} & set(vars(manager))
