"""DALI: on a CPU the torch loader's pixels to the bit; what a GPU is given, run on the CPU as far as that goes."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import missing

from pipelines import Batch, DataConfig, DataError, build
from pipelines.base import GpuDecoding, Progressive
from pipelines.storage.source import open_source

if reason := missing("dali"):
    pytest.skip(reason, allow_module_level=True)

from pipelines.loaders.dali_loader import DaliLoader

CONFIG = DataConfig(img_size=48)

Make = Callable[..., DaliLoader]


class InGraphLoader(DaliLoader):
    """Works as on a GPU, without one."""

    def _decodes_in_graph(self) -> bool:
        return True


@pytest.fixture
def make(converted_root: Path) -> Iterator[Make]:
    made: list[DaliLoader] = []

    def build_one(kind: type[DaliLoader] = InGraphLoader, split: str = "train", **options: Any) -> DaliLoader:
        settings = {"config": CONFIG, "batch_size": 6, "num_workers": 2, "train": split == "train", **options}
        made.append(kind(open_source(converted_root, split), **settings))
        return made[-1]

    yield build_one
    for loader in made:
        loader.close()


def reference(root: Path, split: str, **options: Any) -> list[Batch]:
    settings = {"config": CONFIG, "batch_size": 6, "train": split == "train", **options}
    loader = build(root, split, loader="torch", **settings)
    batches = list(loader)
    loader.close()
    return batches


def differences(a: list[Batch], b: list[Batch]) -> np.ndarray[Any, Any]:
    """Mean absolute pixel difference of each image, of 255, after both were found to hold the same samples and
    to tell the same windows."""
    for x, y in zip(a, b, strict=True):
        assert x.view is not None
        assert y.view is not None
        assert torch.equal(x.view.crop, y.view.crop)
        assert torch.equal(x.index, y.index)
        assert torch.equal(x.labels, y.labels)
    return np.concatenate(
        [(x.images.int() - y.images.int()).abs().float().mean((1, 2, 3)) for x, y in zip(a, b, strict=True)]
    )


@pytest.mark.parametrize("decode_once", [1, 3])
@pytest.mark.parametrize("split", ["train", "val"])
def test_on_a_cpu_it_equals_the_torch_loader(split: str, decode_once: int, converted_root: Path, make: Make) -> None:
    config = replace(CONFIG, decode_once=decode_once)
    assert not differences(
        list(make(DaliLoader, split, config=config)), reference(converted_root, split, config=config)
    ).any()


@pytest.mark.skipif(
    "PSS_IMAGENET_SAMPLE" not in os.environ, reason="PSS_IMAGENET_SAMPLE names no tar of ImageNet images"
)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_on_a_cpu_it_equals_the_torch_loader_on_photographs(interpolation: Any, tmp_path: Path) -> None:
    folder = tmp_path / "train" / "all"
    folder.mkdir(parents=True)
    with tarfile.open(os.environ["PSS_IMAGENET_SAMPLE"]) as tar:
        for member in tar.getmembers()[:200]:
            if content := tar.extractfile(member):
                (folder / Path(member.name).name).write_bytes(content.read())
    config = DataConfig(interpolation=interpolation)
    for train in (True, False):
        loader = DaliLoader(open_source(tmp_path, "train"), config=config, batch_size=25, train=train, num_workers=2)
        batches = list(loader)
        loader.close()
        assert not differences(
            batches, reference(tmp_path, "train", config=config, batch_size=25, train=train, num_workers=2)
        ).any()


@pytest.mark.parametrize("decode_once", [1, 3])
@pytest.mark.parametrize("split", ["train", "val"])
def test_in_its_graph_dali_resizes_by_the_same_geometry(
    split: str, decode_once: int, converted_root: Path, make: Make
) -> None:
    config = replace(CONFIG, decode_once=decode_once)
    ours, expected = list(make(split=split, config=config)), reference(converted_root, split, config=config)
    assert 0 < differences(ours, expected).mean() < 1.0  # another kernel: if nothing differs, it was not used
    shifted = [replace(batch, images=batch.images.roll(2, -1)) for batch in expected]
    assert differences(shifted, expected).mean() > 2.0


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    "decoding",
    [GpuDecoding(pipelines=3), GpuDecoding(cpu_share=0.5), GpuDecoding(pipelines=2, cpu_share=0.3)],
    ids=["3 pipelines", "half on the CPU", "2 pipelines, 0.3 on the CPU"],
)
def test_however_decoding_is_shared_the_batches_are_the_same(
    decoding: GpuDecoding, split: str, converted_root: Path, make: Make
) -> None:
    """To the bit: each image is what the one or the other decoder makes of it, wherever it lies in the epoch."""
    config = replace(CONFIG, gpu_decoding=decoding)
    shared = make(split=split, config=config)
    ours, on_cpu = list(shared), reference(converted_root, split)
    differing = differences(ours, list(make(split=split))) > 0
    share = [i < round(len(batch.images) * decoding.cpu_share) for batch in ours for i in range(len(batch.images))]
    assert not differing[~np.array(share)].any()
    assert not differences(ours, on_cpu)[np.array(share)].any()
    shared.set_epoch(0, 3)
    assert not differences(list(shared), ours[3:]).any()


def test_everything_on_the_cpu_leaves_dalis_graph_nothing_to_do(converted_root: Path, make: Make) -> None:
    loader = make(config=replace(CONFIG, gpu_decoding=GpuDecoding(cpu_share=1.0)))
    assert not differences(list(loader), reference(converted_root, "train")).any()


def test_who_decodes_is_noted_and_does_not_stop_a_resumed_run(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    before, after = (make(config=replace(CONFIG, gpu_decoding=GpuDecoding(cpu_share=share))) for share in (0.0, 0.5))
    after.load_state_dict(before.state_dict())
    assert "cpu_share=0.5" in caplog.text


def test_a_damaged_image_is_named_at_its_batch(tmp_path: Path, image_root: Path) -> None:
    """By the decoder of either kind, after the batches before it."""
    folder = tmp_path / "val" / "all"
    folder.mkdir(parents=True)
    for i, path in enumerate(sorted((image_root / "val" / "cat").iterdir())):
        (folder / f"{i}.jpg").write_bytes(path.read_bytes())
    (folder / "6.jpg").write_bytes((folder / "6.jpg").read_bytes()[:300])
    for kind, decoding in ((DaliLoader, GpuDecoding()), (InGraphLoader, GpuDecoding(pipelines=2, cpu_share=0.5))):
        config = replace(CONFIG, gpu_decoding=decoding)
        loader = kind(open_source(tmp_path, "val"), config=config, batch_size=2, train=False, num_workers=1)
        batches = iter(loader)
        assert [next(batches).index.tolist() for _ in range(3)] == [[0, 1], [2, 3], [4, 5]]
        with pytest.raises(DataError, match=r"6\.jpg"):
            next(batches)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hardware_load": 1.5}, "hardware_load is 1.5"),
        ({"cpu_share": -0.1}, "cpu_share is -0.1"),
        ({"pipelines": 0}, "pipelines is 0"),
        ({"preallocate": (-1, 0)}, "preallocate is"),
    ],
)
def test_impossible_decoding_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GpuDecoding(**settings)


@pytest.mark.parametrize("decode_once", [1, 3])
@pytest.mark.parametrize("split", ["train", "val"])
def test_dali_accepts_the_graph_for_a_gpu(
    split: str, decode_once: int, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operators check their arguments when they are defined; only building the pipeline needs a GPU."""
    devices: list[str] = []
    monkeypatch.setattr("pipelines.loaders.dali_loader.Pipeline.build", lambda pipe: None)
    monkeypatch.setattr(
        "pipelines.loaders.dali_loader.Pipeline.set_outputs",
        lambda pipe, *outputs: devices.extend(output.device for output in outputs),
    )
    decoding = GpuDecoding(pipelines=2, cpu_share=0.5, hardware_load=0.3, preallocate=(500, 400))
    config = replace(CONFIG, decode_once=decode_once, gpu_decoding=decoding)
    make(DaliLoader, split, config=config, device="cuda:0")
    images = 3 if split == "train" and decode_once == 3 else 1
    assert devices == (["cpu"] + ["gpu"] * images) * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("decoding", [GpuDecoding(), GpuDecoding(pipelines=2, cpu_share=0.25, hardware_load=1.0)])
@pytest.mark.parametrize("split", ["train", "val"])
def test_on_a_gpu_it_shows_the_same_images(split: str, decoding: GpuDecoding, converted_root: Path, make: Make) -> None:
    loader = make(DaliLoader, split, device="cuda", config=replace(CONFIG, gpu_decoding=decoding))
    batches = list(loader)
    assert all(batch.images.is_cuda for batch in batches)
    on_host = [replace(batch, images=batch.images.cpu()) for batch in batches]
    assert differences(on_host, reference(converted_root, split)).mean() < 2.0


def test_a_gpus_graph_resizes_to_the_size_of_the_epoch(make: Make) -> None:
    progressive = Progressive(start_size=32, begin_epoch=1, end_epoch=2)
    for crops in (1, 3):
        growing = make(config=replace(CONFIG, progressive=progressive, decode_once=crops))
        for epoch, side in ((1, 32), (2, 48), (0, 32)):
            alone = make(config=replace(CONFIG, img_size=side, decode_once=crops))
            batches = []
            for loader in (growing, alone):
                loader.set_epoch(epoch)
                batches.append(list(loader))
            assert not differences(*batches).any()
            assert batches[0][0].images.shape[-1] == side
