"""What a batch says of its windows, flips and label maps, held against pixels that encode where they come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MAX_SIZE, convert_folder, missing
from memory_loader import MemoryLoader
from PIL import Image
from test_loaders import BACKENDS, PROGRESSIVE, same
from torch import Tensor

from pipelines import Batch, DataConfig, DataError, Loader, View, build
from pipelines.augment.device import DeviceTransform
from pipelines.loaders.prefetch import Inputs, Prefetcher
from pss.methods.parts.token_labels import pooled_logits

NUM_TRAIN, NUM_VAL = 37, 19
SHORTEST = MAX_SIZE * 160 // 260
"""Side of FFCV's copies in pixels, at least. It rounds each edge of a window outwards to one of them."""
TOLERANCE = {"torch": 0.01, "dali": 0.01, "ffcv": 0.005 + 2 / SHORTEST}
CONFIG = DataConfig(img_size=48, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

Make = Callable[..., Loader]


def coordinates(height: int, width: int) -> Image.Image:
    """Red is the share of the way down, green that to the right; both differ from edge to edge by 240 of 255."""
    down, right = ((np.arange(n) + 0.5) / n * 240 for n in (height, width))
    pixels = np.empty((height, width, 3))
    pixels[..., 0], pixels[..., 1], pixels[..., 2] = down[:, None], right, 120
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion of coordinate images; FFCV's copies of them are smaller, by up to a half."""
    folder, rng = tmp_path_factory.mktemp("coordinates"), np.random.default_rng(0)
    for split, count in (("train", NUM_TRAIN), ("val", NUM_VAL)):
        (folder / split / "all").mkdir(parents=True)
        for i in range(count):
            height, width = (int(n) for n in rng.integers(160, 260, 2))
            coordinates(height, width).save(folder / split / "all" / f"{i:03d}.jpg", quality=98, subsampling=0)
    dest = tmp_path_factory.mktemp("converted") / "set"
    convert_folder(folder, dest, "dali" if missing("ffcv") else "ffcv,dali", max_size=MAX_SIZE)
    return dest


@pytest.fixture
def make(root: Path) -> Iterator[Make]:
    """Builds loaders and closes them after the test."""
    made: list[Loader] = []

    def build_one(backend: str, split: str = "train", ahead: bool = False, **options: Any) -> Loader:
        settings = {"config": CONFIG, "batch_size": 6, "num_workers": 1, "train": split == "train", **options}
        made.append(build(root, split, loader=backend, **settings))
        if ahead:
            made.append(Prefetcher(made.pop(), 1 << 20))
        return made[-1]

    yield build_one
    for loader in made:
        loader.close()


@pytest.fixture
def maps(tmp_path: Path) -> Path:
    """Of the training split; each holds its sample's number."""
    array = np.broadcast_to(np.arange(NUM_TRAIN, dtype=np.int16)[:, None, None], (NUM_TRAIN, 2, 3))
    np.save(tmp_path / "maps.npy", array)
    return tmp_path / "maps.npy"


def epoch_of(loader: Loader, epoch: int, start_step: int = 0) -> list[Batch]:
    loader.set_epoch(epoch, start_step)
    return list(loader)


def crops_of(batches: list[Batch]) -> Tensor:
    """All windows, (batches x B, 4)."""
    assert all(batch.view is not None for batch in batches)
    return torch.cat([batch.view.crop for batch in batches if batch.view is not None])


def seen(images: Tensor) -> Tensor:
    """The windows that coordinate images (B, 3, S, S), of 0 ... 255, show, (B, 4); extents below 0 if mirrored."""
    side = images.shape[-1]
    inner = slice(side // 4, side - side // 4)  # resampling bends the lines at the edges
    at = (torch.arange(side, dtype=torch.float64)[inner] + 0.5) / side
    fits = []
    for channel, over in ((0, 3), (1, 2)):
        line = images[:, channel].double().mean(over - 1)[:, inner] / 240  # (B, S / 2)
        slope = ((line - line.mean(1, keepdim=True)) * (at - at.mean())).sum(1) / ((at - at.mean()) ** 2).sum()
        fits.append((line.mean(1) - slope * at.mean(), slope))
    (top, height), (left, width) = fits
    return torch.stack([top, left, height, width], dim=1).float()


OPTIONS = [
    pytest.param("train", {}, id="train"),
    pytest.param("val", {}, id="val"),
    pytest.param("train", {"repeats": 3}, id="repeats"),
    pytest.param("train", {"decode_once": 3}, id="decode_once"),
    pytest.param("train", {"progressive": PROGRESSIVE}, id="progressive"),
]


@pytest.mark.parametrize(("split", "options"), OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_window_is_what_the_pixels_show(backend: str, split: str, options: dict[str, Any], make: Make) -> None:
    batches = epoch_of(make(backend, split, config=replace(CONFIG, **options)), 2)
    told, shown = crops_of(batches), torch.cat([seen(batch.images) for batch in batches])
    assert len(told) == (NUM_VAL if split == "val" else NUM_TRAIN // 6 * 6)
    error = (told - shown).abs()
    assert error.max() < TOLERANCE[backend]
    assert error.mean() < TOLERANCE[backend] / 3
    for wrong in (told.roll(1, 0), told[:, [1, 0, 3, 2]]):  # of another row; transposed
        assert (wrong - shown).abs().mean() > 0.02
    for batch in batches:
        assert batch.view is not None
        assert (batch.view.crop.dtype, batch.view.flipped.dtype) == (torch.float32, torch.bool)
        assert batch.view.crop.is_contiguous()
        assert batch.view.flipped.shape == batch.labels.shape
        assert not batch.view.flipped.any()  # as the images, until the transform flips them


@pytest.mark.parametrize(("split", "options"), OPTIONS)
def test_back_ends_tell_the_same_windows(split: str, options: dict[str, Any], make: Make) -> None:
    """To the bit, whoever decodes, in the caller's thread or another, ahead of its reader or not."""
    reference = epoch_of(make("torch", split, config=replace(CONFIG, **options), num_workers=0), 3)
    for backend in ("torch", "dali", "ffcv"):
        if missing(backend):
            continue
        for ahead in (False, True):
            ours = epoch_of(make(backend, split, ahead, config=replace(CONFIG, **options)), 3)
            assert torch.equal(crops_of(ours), crops_of(reference))
            assert all(torch.equal(a.index, b.index) for a, b in zip(ours, reference, strict=True))


def test_copies_have_windows_of_their_own(make: Make) -> None:
    single = {int(batch.index): batch.view.crop[0] for batch in epoch_of(make("torch", batch_size=1), 4) if batch.view}
    for mode in ("repeats", "decode_once"):
        for batch in epoch_of(make("torch", config=replace(CONFIG, **{mode: 3})), 4):
            assert batch.view is not None
            for sample, crops in zip(batch.index[::3].tolist(), batch.view.crop.unflatten(0, (2, 3)), strict=True):
                assert len(torch.unique(crops, dim=0)) == 3
                assert torch.equal(crops[0], single[sample])  # copy 0 is what it is without copies


def test_sizes_that_grow_leave_windows_as_they_are(make: Make) -> None:
    growing = make("torch", config=replace(CONFIG, progressive=PROGRESSIVE))
    for epoch in (0, 2, 4):
        assert torch.equal(crops_of(epoch_of(growing, epoch)), crops_of(epoch_of(make("torch"), epoch)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_resumed_epoch_tells_the_windows_of_an_uninterrupted_one(backend: str, make: Make) -> None:
    whole = epoch_of(make(backend), 5)
    assert torch.equal(crops_of(epoch_of(make(backend), 5, 4)), crops_of(whole[4:]))
    assert torch.equal(crops_of(epoch_of(make(backend, ahead=True), 5, 4)), crops_of(whole[4:]))
    assert not torch.equal(crops_of(epoch_of(make(backend), 6)), crops_of(whole))


def test_an_iteration_under_way_keeps_its_epoch(make: Make) -> None:
    """Also in what it tells, if the next epoch is chosen before its last batch is taken."""
    loader, whole = make("torch"), epoch_of(make("torch"), 1)
    loader.set_epoch(1)
    batches = iter(loader)
    first = next(batches)
    loader.set_epoch(2)
    assert same([first, *batches], whole)
    assert torch.equal(crops_of(whole), torch.cat([crops_of([first]), crops_of(whole[1:])]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_transform_tells_what_it_shows(backend: str, make: Make) -> None:
    """Mirrored where the pixels are, about half; the window is the loader's; the images are those of a plain call."""
    transform = DeviceTransform(CONFIG, seed=9, train=True)
    flips = []
    for batch in epoch_of(make(backend), 1):
        values, view = transform.with_view(batch, 1)
        assert torch.equal(values, transform(batch, 1))
        assert torch.equal(view.crop, crops_of([batch]))
        shown = seen(values * 255)
        assert torch.equal(shown[:, 3] < 0, view.flipped)
        left, width = view.crop[:, 1], view.crop[:, 3]
        start, slope = torch.where(view.flipped, left + width, left), torch.where(view.flipped, -width, width)
        assert (shown[:, 1] - start).abs().max() < TOLERANCE[backend]
        assert (shown[:, 3] - slope).abs().max() < TOLERANCE[backend]
        flips += view.flipped.tolist()
    assert 8 < sum(flips) < len(flips) - 8


def test_the_memory_loader_shows_all_of_its_images() -> None:
    for loader in (MemoryLoader(), Prefetcher(MemoryLoader(), 1 << 20)):
        batch = next(iter(loader))
        assert batch.view is not None
        assert torch.equal(batch.view.crop, torch.tensor([[0.0, 0, 1, 1]]).repeat(8, 1))
        assert not batch.view.flipped.any()
        loader.close()


def test_a_view_cannot_be_changed(make: Make) -> None:
    view = next(iter(make("torch", "val"))).view
    assert isinstance(view, View)
    with pytest.raises(dataclasses.FrozenInstanceError):
        view.crop = torch.zeros(6, 4)  # type: ignore[misc]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("options", [{}, {"repeats": 3}, {"decode_once": 3}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_label_maps_follow_their_samples(
    backend: str, options: dict[str, Any], ahead: bool, maps: Path, make: Make
) -> None:
    loader = make(backend, ahead=ahead, config=replace(CONFIG, **options), label_maps=maps)
    plain = make(backend, config=replace(CONFIG, **options))
    for batch, without in zip(epoch_of(loader, 2), epoch_of(plain, 2), strict=True):
        assert batch.maps is not None
        assert (batch.maps.dtype, batch.maps.shape) == (torch.int16, (6, 2, 3))
        assert torch.equal(batch.maps, batch.index.to(torch.int16).view(-1, 1, 1).expand(6, 2, 3))
        assert without.maps is None
        assert same([batch], [without])


@pytest.mark.parametrize("options", [{}, {"repeats": 3}, {"decode_once": 3}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_label_maps_are_cut_where_the_images_are(
    backend: str, options: dict[str, Any], tmp_path: Path, make: Make
) -> None:
    """Of maps that hold their own coordinates and images that show theirs, patches say the same, mirrored or not."""
    side, grid = 32, (6, 6)
    shares = ((np.arange(side) + 0.5) / side).astype(np.float16).view(np.int16)
    values = np.stack([np.broadcast_to(shares[:, None], (side, side)), np.broadcast_to(shares, (side, side))])
    classes = np.broadcast_to(np.array([0, 1], dtype=np.int16)[:, None, None], (2, side, side))
    np.save(tmp_path / "maps.npy", np.broadcast_to(np.stack([values, classes]), (NUM_TRAIN, 2, 2, side, side)))
    config = replace(CONFIG, **options)
    transform, tolerance = DeviceTransform(config, seed=9, train=True), TOLERANCE[backend] + 0.004
    flipped = 0
    for batch in epoch_of(make(backend, config=config, label_maps=tmp_path / "maps.npy"), 2):
        images, view = transform.with_view(batch, 2)
        assert batch.maps is not None
        patches = torch.nn.functional.adaptive_avg_pool2d(images[:, :2] * 255 / 240, grid)  # (B, 2, 6, 6)
        shown = patches.flatten(2).transpose(1, 2)
        told = pooled_logits(batch.maps, view, grid=grid, num_classes=2)
        assert (told - shown).abs().max() < tolerance
        for wrong in ({"flipped": ~view.flipped}, {"crop": view.crop.roll(1, 0)}):
            assert (
                pooled_logits(batch.maps, replace(view, **wrong), grid=grid, num_classes=2) - shown
            ).abs().max() > 0.1
        transposed = pooled_logits(batch.maps, view, grid=grid, num_classes=2, geometry="reference")
        assert (transposed - shown).abs().max() > 0.1
        flipped += int(view.flipped.sum())
    assert 8 < flipped < 28


def test_label_maps_of_evaluation_are_in_the_order_of_the_split(tmp_path: Path, make: Make) -> None:
    np.save(tmp_path / "maps.npy", np.arange(NUM_VAL))
    for rank in range(2):
        batches = list(make("torch", "val", rank=rank, world_size=2, label_maps=str(tmp_path / "maps.npy")))
        rows = torch.cat([batch.maps for batch in batches if batch.maps is not None])
        assert rows.tolist() == list(range(rank, NUM_VAL, 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_label_maps_of_another_split_are_refused(backend: str, maps: Path, make: Make) -> None:
    with pytest.raises(DataError, match=f"holds {NUM_TRAIN} label maps for a split of {NUM_VAL} samples"):
        make(backend, "val", label_maps=maps)


def test_a_resumed_run_has_the_label_maps_it_was_started_with(maps: Path, tmp_path: Path, make: Make) -> None:
    started = make("torch", label_maps=maps).state_dict()
    make("torch", label_maps=maps).load_state_dict(started)
    np.save(tmp_path / "others.npy", np.load(maps)[::-1])
    for other in (make("torch"), make("torch", label_maps=tmp_path / "others.npy")):
        with pytest.raises(DataError, match="label_maps was"):
            other.load_state_dict(started)
    assert "label_maps" not in make("torch").state_dict()  # as runs have it that know of no maps


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_on_a_gpu_maps_and_the_complete_view_are_there(backend: str, ahead: bool, maps: Path, make: Make) -> None:
    reference = epoch_of(make("torch", label_maps=maps), 1)
    inputs = Inputs(
        make(backend, label_maps=maps, device="cuda"),
        lambda batch, epoch, step: batch,
        "cuda",
        prefetch_bytes=1 << 20 if ahead else 0,
    )
    transform = DeviceTransform(CONFIG, seed=9, train=True)
    inputs.set_epoch(1)
    for batch, expected in zip(inputs, reference, strict=True):
        assert batch.view is not None
        assert batch.maps is not None
        assert expected.maps is not None
        assert batch.maps.is_cuda
        assert not batch.view.crop.is_cuda
        assert torch.equal(batch.maps.cpu(), expected.maps)
        values, view = transform.with_view(batch, 1)
        on_host = transform.with_view(expected, 1)[1]
        assert values.device == view.crop.device == view.flipped.device == batch.images.device
        assert torch.equal(view.crop.cpu(), on_host.crop)
        assert torch.equal(view.flipped.cpu(), on_host.flipped)
    inputs.close()
