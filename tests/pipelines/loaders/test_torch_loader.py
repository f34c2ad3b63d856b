"""The torch loader's threads take several images at a time, and every image gets the pixels it always had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import DataConfig, DataError, build
from pipelines.loaders.geometry import evaluation_resize, random_crops
from pipelines.loaders.order import sample_numbers
from pipelines.loaders.threads import Threads
from pipelines.loaders.torch_loader import TorchLoader
from pipelines.storage.source import FolderSource

CONFIG = DataConfig(img_size=48)
SETTINGS = [("train", 1, 2), ("train", 4, 1), ("val", 1, 0), ("val", 1, 2)]
TASKS = [(48, 1, 6), (48, 2, 8), (48, 16, 48), (5, 2, 5), (53, 1, 7)]


def make(root: Path, split: str = "train", **options: Any) -> TorchLoader:
    settings = {"config": CONFIG, "batch_size": 16, "num_workers": 2, "train": split == "train", **options}
    loader = build(root, split, loader="torch", **settings)
    assert isinstance(loader, TorchLoader)
    return loader


def as_it_was(loader: TorchLoader, keys: np.ndarray[Any, Any], epoch: int) -> torch.Tensor:
    """One image after the other, by the operators in torch's and torchvision's public names."""
    kernel = {
        "bilinear": torch.ops.aten._upsample_bilinear2d_aa,
        "bicubic": torch.ops.aten._upsample_bicubic2d_aa,
    }[loader.config.interpolation]
    side, samples, made = loader.side(epoch), sample_numbers(keys), []
    heights, widths = loader.source.sizes(samples)
    boxes = random_crops(heights, widths, keys, seed=loader.seed, epoch=epoch, config=loader.config)
    sizes, corners = evaluation_resize(heights, widths, loader.config)
    for i, box, size, corner in zip(samples.tolist(), boxes.tolist(), sizes.tolist(), corners.tolist(), strict=True):
        encoded = loader.source.read(i)
        if encoded[:2].tobytes() == b"\xff\xd8":
            whole = torch.ops.image.decode_jpeg(torch.from_numpy(encoded.copy()), 3, False)
        else:
            with Image.open(loader.source.name(i)) as image:
                whole = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        if loader.train:
            top, left, height, width = box
            cut = whole[:, top : top + height, left : left + width]
            made.append(kernel(cut.unsqueeze(0), [side, side], False, None, None)[0])
        else:
            (top, left), resized = corner, kernel(whole.unsqueeze(0), size, False, None, None)[0]
            made.append(resized[:, top : top + side, left : left + side])
    return torch.stack(made)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("split", "copies", "workers"), [("train", 1, 2), ("train", 4, 1), ("train", 1, 0), ("val", 1, 2)]
)
def test_pixels_are_those_of_one_image_after_the_other(
    split: str, copies: int, workers: int, interpolation: Any, image_root: Path, tmp_path: Path
) -> None:
    folder = tmp_path / split / "all"
    folder.mkdir(parents=True)
    for number, path in enumerate(sorted((image_root / split).rglob("*.jpg"))):
        if number % 5:
            (folder / f"{number:02d}.jpg").hardlink_to(path)
        else:
            Image.open(path).save(folder / f"{number:02d}.png")
    config = DataConfig(img_size=48, interpolation=interpolation, decode_once=copies)
    loader = make(tmp_path, split, config=config, num_workers=workers)
    loader.set_epoch(2)
    steps = loader._plan(2)
    for keys, batch in zip(steps, loader, strict=True):
        assert torch.equal(batch.images, as_it_was(loader, keys, 2))
    loader.close()


@pytest.mark.parametrize(
    ("batch_size", "workers", "tasks"), [(48, 1, 6), (48, 2, 8), (48, 16, 48), (5, 2, 5), (53, 1, 7)]
)
def test_threads_are_given_several_images_at_a_time(
    batch_size: int, workers: int, tasks: int, image_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as each gets several turns at a batch, which is what keeps them busy to its end."""
    submitted = []
    submit = Threads.submit

    def note(threads: Threads, task: Any) -> None:
        submitted.append(task)
        submit(threads, task)

    monkeypatch.setattr(Threads, "submit", note)
    loader = make(image_root, batch_size=batch_size, num_workers=workers)
    assert len(list(loader)) == loader.steps_per_epoch
    assert len(submitted) == loader.steps_per_epoch * (tasks + 1)  # with the reading of the batch


def test_names_are_made_for_messages_only(image_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path costs as much as the whole geometry of an image."""
    loader = make(image_root, "val")
    named = []
    name = FolderSource.name
    list(loader)
    monkeypatch.setattr(FolderSource, "name", lambda source, i: (named.append(i), name(source, i))[1])
    assert len(list(loader)) == 2
    assert len(named) == 2  # what each batch would be said to wait for


def test_what_is_damaged_is_named_within_its_share(image_root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "val" / "all"
    folder.mkdir(parents=True)
    for number, path in enumerate(sorted((image_root / "val").rglob("*.jpg"))[:16]):
        content = path.read_bytes()
        (folder / f"{number:02d}.jpg").write_bytes(content[: len(content) // 2] if number == 5 else content)
    with pytest.raises(DataError, match=r"all/05\.jpg"):
        list(make(tmp_path, "val", num_workers=1))
