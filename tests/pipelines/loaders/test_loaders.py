"""One contract, three back ends: what is delivered does not depend on back end, threads, ranks or interruptions."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import io
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm
from conftest import convert_folder, missing, picture
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import v2

from pipelines import Batch, DataConfig, DataError, Loader, build, choose_backend, open_dataset
from pipelines.base import Progressive
from pipelines.conversion.options import PROFILES
from pipelines.loaders.prefetch import Inputs
from pipelines.storage.beton import JPEG, RAW
from pipelines.storage.manifest import read_manifest
from tools.real_data import unpack

BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(missing(name) is not None, reason=str(missing(name))))
    for name in ("torch", "dali", "ffcv")
]
CONFIG = DataConfig(img_size=48)
NUM_TRAIN, NUM_VAL = 53, 23

Make = Callable[..., Loader]


@pytest.fixture
def make(converted_root: Path) -> Iterator[Make]:
    """Builds loaders and closes them after the test."""
    made: list[Loader] = []

    def build_one(backend: str, split: str = "train", root: Path = converted_root, **options: Any) -> Loader:
        settings = {"config": CONFIG, "batch_size": 4, "num_workers": 0, "train": split == "train", **options}
        made.append(build(root, split, loader=backend, **settings))
        return made[-1]

    yield build_one
    for loader in made:
        loader.close()


def same(a: list[Batch], b: list[Batch]) -> bool:
    """Bit for bit, windows included."""
    return len(a) == len(b) and all(
        torch.equal(p, q) for x, y in zip(a, b, strict=True) for p, q in zip(_told(x), _told(y), strict=True)
    )


def _told(batch: Batch) -> list[torch.Tensor]:
    return [batch.images, batch.labels, batch.index] + ([] if batch.view is None else [batch.view.crop])


def difference(a: list[Batch], b: list[Batch]) -> float:
    """Mean absolute pixel difference, of 255."""
    return float(np.mean([(x.images.int() - y.images.int()).abs().float().mean() for x, y in zip(a, b, strict=True)]))


def epoch_of(loader: Loader, epoch: int, start_step: int = 0) -> list[Batch]:
    loader.set_epoch(epoch, start_step)
    return list(loader)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluation_delivers_every_sample_once_in_order(backend: str, world_size: int, make: Make) -> None:
    for rank in range(world_size):
        loader = make(backend, "val", rank=rank, world_size=world_size)
        batches = list(loader)
        index = torch.cat([batch.index for batch in batches]).tolist()
        assert index == list(range(rank, NUM_VAL, world_size))
        assert len(batches) == loader.steps_per_epoch
        assert sum(len(batch.images) for batch in batches) == len(index)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_was_delivered_can_be_checked(backend: str, split: str, make: Make) -> None:
    """The hash grows batch by batch to the planned one, also from mid-epoch on, and begins anew with an epoch."""
    whole, other = make(backend, split), make(backend, split)
    planned = whole.planned_hash(2)
    for loader, start in ((whole, 0), (other, 3)):
        loader.set_epoch(2, start)
        grown = [loader.delivered_hash, *(loader.delivered_hash for _ in loader)]
        assert (grown[0] == 0) == (start == 0)
        assert len(set(grown)) == len(grown) == loader.steps_per_epoch - start + 1
        assert grown[-1] == planned == other.planned_hash(2)
    assert (whole.planned_hash(1) == planned) == (split == "val")
    whole.set_epoch(1)
    assert whole.delivered_hash == 0
    halves = [make(backend, split, batch_size=2, rank=rank, world_size=2).planned_hash(2) for rank in range(2)]
    assert sum(halves) % (1 << 32) == planned


@pytest.mark.parametrize("mode", ["repeats", "decode_once"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_are_other_crops_of_the_same_image(backend: str, mode: str, make: Make) -> None:
    config = DataConfig(img_size=48, **{mode: 3})
    settings = {"batch_size": 6, "config": config}
    loader = make(backend, num_workers=2, **settings)
    batches = epoch_of(loader, 4)
    assert len(batches) == NUM_TRAIN // 6
    once = epoch_of(make(backend, batch_size=1), 4)
    single = {int(batch.index): (batch.images[0], int(batch.labels)) for batch in once}
    for batch in batches:
        assert batch.copy is not None
        samples = batch.index[::3].tolist()
        assert batch.copy.tolist() == [0, 1, 2, 0, 1, 2]
        assert torch.equal(batch.index, batch.index[::3].repeat_interleave(3))
        assert len(set(batch.draw_keys.tolist())) == 6
        assert torch.equal(batch.draw_keys[::3], batch.index[::3])
        assert batch.labels[::3].tolist() == [single[i][1] for i in samples]
        for i, (first, second, third) in zip(samples, batch.images.unflatten(0, (2, 3)), strict=True):
            assert (first.int() - single[i][0].int()).abs().float().mean() < 1  # copy 0 is what it is without copies
            assert not torch.equal(first, second)
            assert not torch.equal(second, third)
    assert same(epoch_of(make(backend, **settings), 4, 5), batches[5:])
    assert difference(batches, epoch_of(make("torch", **settings), 4)) < 6


def test_copies_are_counted_where_they_fit(make: Make) -> None:
    assert [b.copy for b in make("torch", "val", config=DataConfig(img_size=48, repeats=3))] == [None] * 6
    with pytest.raises(ValueError, match="decode_once is 3 and the batch size 4"):
        make("torch", config=DataConfig(img_size=48, decode_once=3))
    with pytest.raises(ValueError, match=r"repeats is 2 and data\.decode_once 2"):
        DataConfig(repeats=2, decode_once=2)
    with pytest.raises(ValueError, match=r"data\.repeats is 0"):
        DataConfig(repeats=0)


@pytest.mark.parametrize("mode", ["repeats", "decode_once"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_in_parts_holds_the_batches_of_as_many_ranks(backend: str, mode: str, make: Make) -> None:
    config = dataclasses.replace(CONFIG, **{mode: 2})
    whole = make(backend, batch_size=8, config=config)
    whole.set_parts(2)
    ranks = [epoch_of(make(backend, config=config, rank=rank, world_size=2), 3, 1) for rank in range(2)]
    batches = epoch_of(whole, 3, 1)
    assert whole.delivered_hash == whole.planned_hash(3)
    for step, batch in enumerate(batches):
        for name in ("images", "labels", "draw_keys"):
            assert torch.equal(getattr(batch, name), torch.cat([getattr(rank[step], name) for rank in ranks]))


@pytest.mark.parametrize(("parts", "copies", "message"), [(3, 1, "3 equal parts"), (0, 1, "0 equal"), (4, 4, "of 2;")])
def test_parts_that_no_rank_could_have_are_refused(parts: int, copies: int, message: str, make: Make) -> None:
    loader = make("torch", batch_size=8, config=dataclasses.replace(CONFIG, decode_once=copies))
    with pytest.raises(ValueError, match=message):
        loader.set_parts(parts)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_may_change_while_the_global_batch_stays(backend: str, make: Make) -> None:
    one = make(backend, batch_size=8)
    two = [make(backend, batch_size=4, rank=rank, world_size=2) for rank in range(2)]
    two[1].load_state_dict(one.state_dict())
    halves = [epoch_of(loader, 7, 2) for loader in two]
    for batch, first, second in zip(epoch_of(one, 7, 2), *halves, strict=True):
        assert torch.equal(batch.images, torch.cat([first.images, second.images]))


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(("backend", "tolerance"), [("dali", 1.5), ("ffcv", 6.0)])
def test_back_ends_show_the_same_crops(backend: str, tolerance: float, split: str, make: Make) -> None:
    """The same samples, labels and regions. FFCV differs by its second encoding and its filter."""
    if reason := missing(backend):
        pytest.skip(reason)
    ours, reference = epoch_of(make(backend, split), 3), epoch_of(make("torch", split), 3)
    for a, b in zip(ours, reference, strict=True):
        assert torch.equal(a.index, b.index)
        assert torch.equal(a.labels, b.labels)
    shifted = [Batch(batch.images.roll(3, -1), batch.labels, batch.index) for batch in reference]
    assert difference(ours, reference) < tolerance
    assert difference(shifted, reference) > tolerance  # crops off by a few pixels would show


@pytest.mark.parametrize("backend", ["torch", "dali"])
def test_a_plain_folder_gives_the_pixels_of_its_conversion(backend: str, image_root: Path, make: Make) -> None:
    if reason := missing(backend):
        pytest.skip(reason)
    folder, tars = epoch_of(make(backend, "val", image_root), 0), epoch_of(make(backend, "val"), 0)
    assert same(folder, tars)


@pytest.mark.parametrize(("backend", "tolerance"), [("torch", 0.2), ("dali", 0.2)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_evaluation_is_pillow_and_torchvision(
    backend: str, tolerance: float, interpolation: str, image_root: Path, make: Make
) -> None:
    if reason := missing(backend):
        pytest.skip(reason)
    config = DataConfig(img_size=48, interpolation=interpolation)
    loader = make(backend, "val", image_root, config=config)
    transform = v2.Compose([v2.Resize(54, v2.InterpolationMode(interpolation)), v2.CenterCrop(48), v2.PILToTensor()])
    errors = []
    for batch in loader:
        for pixels, i in zip(batch.images, batch.index.tolist(), strict=True):
            with Image.open(loader.table.name(i)) as image:
                errors.append((transform(image).int() - pixels.int()).abs().float().mean().item())
    assert len(errors) == NUM_VAL
    assert np.mean(errors) < tolerance


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_are_not_overwritten(backend: str, make: Make) -> None:
    loader = make(backend, num_workers=2)
    batches = iter(loader)
    first = next(batches)
    kept = first.images.clone()
    assert len(list(batches)) == loader.steps_per_epoch - 1
    epoch_of(loader, 1)
    assert torch.equal(first.images, kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_iteration_left_early_leaves_nothing_behind(backend: str, make: Make) -> None:
    """Neither its batches in the next iteration nor, once closed, threads or processes."""
    threads, tasks = set(threading.enumerate()), _native_threads()
    loader = make(backend, num_workers=2)
    expected = epoch_of(loader, 2)
    for _ in loader:
        break
    left = iter(loader)
    next(left)
    assert same(epoch_of(loader, 2), expected)
    with pytest.raises(RuntimeError, match="iterated anew"):
        next(left)
    for _ in loader:
        break
    loader.close()
    loader.close()
    with pytest.raises(DataError, match="closed"):
        iter(loader)
    deadline = time.monotonic() + 10
    gc.collect()
    while time.monotonic() < deadline and (set(threading.enumerate()) - threads or multiprocessing.active_children()):
        time.sleep(0.05)
    assert set(threading.enumerate()) <= threads
    assert not multiprocessing.active_children()
    if backend == "dali":
        assert _native_threads() <= tasks


def _native_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def test_the_seed_and_the_epoch_change_order_and_crops(make: Make) -> None:
    first = epoch_of(make("torch"), 0)
    for other in (epoch_of(make("torch"), 1), epoch_of(make("torch", seed=1), 0)):
        assert not torch.equal(first[0].index, other[0].index)
        seen = {int(i): pixels for batch in first for i, pixels in zip(batch.index, batch.images, strict=True)}
        again = [
            torch.equal(seen[int(i)], pixels)
            for batch in other
            for i, pixels in zip(batch.index, batch.images, strict=True)
            if int(i) in seen
        ]
        assert not any(again)


@pytest.mark.parametrize(("damage", "workers"), [("truncated", 0), ("zeroed", 0), ("truncated", 2)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_damaged_image_is_named(
    backend: str, damage: str, workers: int, converted_root: Path, tmp_path: Path, make: Make
) -> None:
    if backend == "ffcv":
        shutil.copytree(converted_root, tmp_path / "set")
        root, victim = tmp_path / "set", 31
        _damage_beton(root / "train.beton", victim, damage)
        name = f"sample {victim} "
    else:
        root = tmp_path
        path = root / "train" / "cat" / "003.jpg"
        path.parent.mkdir(parents=True)
        for i in range(12):
            picture(80, 100, i).save(path.with_name(f"{i:03d}.jpg"))
        encoded = path.read_bytes()
        start = len(encoded) // 2
        path.write_bytes(encoded[:start] if damage == "truncated" else b"\0" * len(encoded))
        name = "cat/003.jpg"
    loader = make(backend, root=root, num_workers=workers)
    with pytest.raises(DataError, match=name):
        list(loader)
    with pytest.raises(DataError, match="closed"):
        iter(loader)


def _damage_beton(path: Path, sample: int, damage: str) -> None:
    from ffcv.reader import Reader

    row = Reader(str(path)).alloc_table
    start, size = next((int(r["ptr"]), int(r["size"])) for r in row if r["sample_id"] == sample)
    content = bytearray(path.read_bytes())
    first = start + (size // 2 if damage == "truncated" else 0)
    content[first : start + size] = bytes(start + size - first)
    path.write_bytes(content)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(("backend", "tolerance"), [("torch", 0.0), ("dali", 3.0), ("ffcv", 6.0)])
def test_batches_reach_the_gpu(backend: str, tolerance: float, split: str, make: Make) -> None:
    """The reference's samples and crops, kept intact while the GPU is busy and further batches are made ready."""
    if reason := missing(backend):
        pytest.skip(reason)
    reference = epoch_of(make("torch", split), 1)
    busy = torch.zeros(4096, 4096, device="cuda")
    loader = make(backend, split, device="cuda", num_workers=2)
    copies = []
    inputs = Inputs(loader, lambda batch, epoch, step: batch, "cuda", prefetch_bytes=1 << 20)
    inputs.set_epoch(1)
    for batch in inputs:
        assert batch.images.device.type == batch.labels.device.type == "cuda"
        assert batch.index.device.type == "cpu"
        for _ in range(20):
            busy = busy @ busy
        copies.append(Batch(batch.images.clone(), batch.labels.clone(), batch.index.clone()))
        del batch
    ours = [Batch(b.images.cpu(), b.labels.cpu(), b.index.cpu()) for b in copies]
    assert same(
        [Batch(b.labels, b.labels, b.index) for b in ours], [Batch(b.labels, b.labels, b.index) for b in reference]
    )
    assert difference(ours, reference) <= tolerance


_ENDLESS = """
import sys
from pipelines import DataConfig, build
loader = build(sys.argv[1], "train", config=DataConfig(img_size=48), batch_size=4, train=True, loader=sys.argv[2],
               num_workers=2)
while True:
    for _ in loader:
        print("delivered", flush=True)
"""


@pytest.mark.parametrize(
    "backend", [*BACKENDS[:2], pytest.param("ffcv", marks=[*BACKENDS[2].marks, pytest.mark.exhaustive])]
)
def test_a_killed_trainer_leaves_nothing_behind(backend: str, converted_root: Path) -> None:
    """It has no child that could outlive it, and nobody holds its streams open."""
    command = [sys.executable, "-c", _ENDLESS, str(converted_root), backend]
    root = Path(__file__).parents[3]
    with warm.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(3):
            assert process.stdout.readline() == "delivered\n"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
        process.communicate(timeout=20)
    assert children == []


def test_decoding_threads_leave_torchs_threads_alone(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each runs its operators alone; the caller's setting, and that of threads to come, stays."""
    from pipelines.loaders.torch_loader import Decoder

    inside, later = [], []
    decode = Decoder.decode

    def note(*arguments: Any) -> None:
        inside.append(torch.get_num_threads())
        decode(*arguments)

    monkeypatch.setattr(Decoder, "decode", note)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        list(make("torch", num_workers=2))
        assert torch.get_num_threads() == 3
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(before)
    assert set(inside) == {1}
    assert later == [3]


@pytest.mark.parametrize("part", ["open", "decode"])
def test_a_failure_in_a_thread_arrives_at_its_batch(part: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.loaders.torch_loader import Decoder

    loader = make("torch", num_workers=2)
    loader.set_epoch(0)
    victim, work = loader._plan(0)[5], getattr(Decoder, part)

    def fail(decoder: Decoder, step: Any, *row: int) -> None:
        if np.array_equal(step.keys, victim):
            raise MemoryError("no memory for this batch")
        work(decoder, step, *row)

    monkeypatch.setattr(Decoder, part, fail)
    batches = iter(loader)
    assert len([next(batches) for _ in range(5)]) == 5
    with pytest.raises(MemoryError, match="this batch"):
        next(batches)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pss-decode")]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_back_end_that_hangs_is_given_up(backend: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    loader, go_on = make(backend, num_workers=1), threading.Event()
    monkeypatch.setattr(loader, "stall_seconds", 0.3)

    def hang(*_: Any) -> None:
        go_on.wait(20)
        raise MemoryError("too late")

    if backend == "ffcv":
        monkeypatch.setattr("pipelines.loaders.ffcv_loader._Epoch.run_pipeline", hang)
    else:
        monkeypatch.setattr(loader.source, "read_many", hang)
    monkeypatch.setattr("pipelines.storage.reading._JOIN_SECONDS", 0.1)
    began = time.monotonic()
    with pytest.raises(DataError, match=r"for 0\.3 s"):
        next(iter(loader))
    assert time.monotonic() - began < 10  # of a wait of 20
    with pytest.raises(DataError, match="closed"):
        iter(loader)
    go_on.set()


def test_an_ffcv_thread_that_fails_is_reported(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := missing("ffcv"):
        pytest.skip(reason)
    loader = make("ffcv")
    from pipelines.loaders.ffcv_loader import _Epoch

    def fail(*_: Any) -> None:
        raise MemoryError("no memory for this batch")

    monkeypatch.setattr(_Epoch, "run_pipeline", fail)
    with pytest.raises(DataError, match="no memory for this batch"):
        next(iter(loader))


@pytest.mark.parametrize(("split", "workers", "copies"), [("train", 2, 1), ("train", 1, 2), ("val", 2, 1)])
def test_ffcv_compiles_nothing_while_it_is_watched(split: str, workers: int, copies: int, make: Make) -> None:
    """Compilation may take longer than a loader may stall: it is over when the loader is there."""
    if reason := missing("ffcv"):
        pytest.skip(reason)
    from numba.core import event

    grow = Progressive(start_size=32, end_epoch=1, multiple=16)
    config = dataclasses.replace(CONFIG, decode_once=copies, progressive=grow)
    loader = make("ffcv", split, config=config, num_workers=workers)
    with event.install_recorder("numba:compile") as compiled:
        for epoch in range(2):
            assert len(epoch_of(loader, epoch)) == loader.steps_per_epoch
    assert not compiled.buffer


def test_ffcv_stops_when_it_is_left(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := missing("ffcv"):
        pytest.skip(reason)
    from pipelines.loaders.ffcv_loader import _Epoch

    loader = make("ffcv", batch_size=1)
    decoded = []
    run_pipeline = _Epoch.run_pipeline

    def count(*arguments: Any) -> Any:
        decoded.append(arguments[1])
        return run_pipeline(*arguments)

    monkeypatch.setattr(_Epoch, "run_pipeline", count)
    for _ in loader:
        break
    loader.close()
    assert len(decoded) < NUM_TRAIN // 2


def test_ffcv_leaves_torchs_threads_alone(make: Make) -> None:
    if reason := missing("ffcv"):
        pytest.skip(reason)
    before = torch.get_num_threads()
    list(make("ffcv", num_workers=before + 1))
    assert torch.get_num_threads() == before


def test_ffcv_evaluation_warns(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    if reason := missing("ffcv"):
        pytest.skip(reason)
    from pipelines.loaders.ffcv_loader import EVALUATION_WARNING

    assert make("ffcv", "val").warning == EVALUATION_WARNING
    assert EVALUATION_WARNING in caplog.text


def test_damaged_or_missing_files_are_refused_at_once(converted_root: Path, tmp_path: Path) -> None:
    if reason := missing("ffcv"):
        pytest.skip(reason)

    def refused(file: str, loader: str, change: Callable[[bytes], bytes]) -> str:
        root = tmp_path / f"{loader}{len(list(tmp_path.iterdir()))}"
        root.mkdir()
        for path in converted_root.iterdir():
            (root / path.name).write_bytes(change(path.read_bytes()) if path.name == file else path.read_bytes())
        with pytest.raises(DataError) as error:
            build(root, "train", config=CONFIG, batch_size=4, train=True, loader=loader)
        return str(error.value)

    assert "train-00001.tar has" in refused("train-00001.tar", "torch", lambda b: b[:-512])
    assert "train.beton has" in refused("train.beton", "ffcv", lambda b: b[:-100])
    assert "is damaged" in refused("train.beton", "ffcv", lambda b: b[:3200] + bytes(400) + b[3600:])
    assert "is damaged" in refused("train.beton", "ffcv", lambda b: b"\7" + b[1:])
    assert "is damaged" in refused("dataset.json", "torch", lambda b: b[:-20])
    assert "format version" in refused(
        "dataset.json", "torch", lambda b: b.replace(b'"format_version": 3', b'"format_version": 9')
    )


def test_too_little_data_is_refused(make: Make) -> None:
    with pytest.raises(DataError, match=r"53 samples.*64"):
        make("torch", batch_size=32, rank=0, world_size=2)


def test_wrong_settings_are_refused(make: Make, image_root: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"batch_size": 0}, "batch size is 0"),
        ({"rank": 2, "world_size": 2}, "rank 2"),
        ({"seed": -1}, "seed is -1"),
        ({"num_workers": -1}, "workers is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            make("torch", **options)
    with pytest.raises(DataError, match="no loader 'tf'"):
        make("tf")
    with pytest.raises(DataError, match="no split 'holdout'"):
        make("torch", "holdout")
    with pytest.raises(DataError, match=r"holds no dataset\.json"):
        make("ffcv", root=image_root)
    with pytest.raises(DataError, match="there is no folder"):
        make("torch", root=tmp_path / "nowhere")
    loader = make("torch")
    with pytest.raises(ValueError, match="step 14"):
        loader.set_epoch(0, 14)


def test_open_dataset(image_root: Path, converted_root: Path, tmp_path: Path) -> None:
    counts = {"train": (17, 19, 17), "val": (8, 9, 6)}
    for root in (image_root, converted_root):
        data = open_dataset(root)
        assert (data.classes, data.splits, data.per_class) == (("cat", "dog", "emu"), ("train", "val"), counts)
    with pytest.raises(DataError, match="no data set"):
        open_dataset(tmp_path)


def test_auto_takes_what_the_data_allows(image_root: Path, converted_root: Path, tmp_path: Path, make: Make) -> None:
    preferred = "torch" if missing("dali") else "dali"
    assert make("auto").backend == make("auto", root=image_root).backend == preferred
    if missing("ffcv"):
        return
    ffcv_only = _with_train(converted_root, tmp_path / "ffcv", shards=())
    assert make("auto", root=ffcv_only).backend == "ffcv"
    assert make("auto", "val", ffcv_only).backend == preferred
    beside = [choose_backend(ffcv_only, split, beside="torch") for split in ("train", "val")]
    assert [*beside, choose_backend(ffcv_only, "val", beside="ffcv")] == ["ffcv", "torch", preferred]
    with pytest.raises(DataError, match=r"FFCV data only.*--loader ffcv"):
        make("torch", root=ffcv_only)
    with pytest.raises(DataError, match="has no FFCV file"):
        make("ffcv", root=_with_train(converted_root, tmp_path / "dali", beton=None))


def _with_train(root: Path, copy: Path, **entries: Any) -> Path:
    """A copy of a converted data set whose manifest says something else about the training split."""
    shutil.copytree(root, copy)
    manifest, _ = read_manifest(root)
    train = dataclasses.replace(manifest.splits["train"], **entries)
    changed = dataclasses.replace(manifest, splits={**manifest.splits, "train": train})
    (copy / "dataset.json").write_text(changed.to_json())
    return copy


def test_pictures_of_every_kind(tmp_path: Path, make: Make) -> None:
    """Gray, CMYK, progressive, PNG, and EXIF orientation, which is ignored: the same in all back ends."""
    folder = tmp_path / "val" / "all"
    folder.mkdir(parents=True)
    image = picture(90, 120, 0)
    image.convert("L").save(folder / "gray.jpg")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.save(folder / "progressive.jpg", progressive=True)
    image.save(folder / "picture.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    image.save(folder / "rotated.jpg", exif=exif)
    (reference,) = list(make("torch", "val", tmp_path, batch_size=8))
    for i, name in enumerate(("cmyk", "gray", "picture", "progressive", "rotated")):
        mean = np.asarray(image.convert("L").convert("RGB") if name == "gray" else image).mean((0, 1))
        assert abs(reference.images[i].float().mean((1, 2)).numpy() - mean).max() < 12
    if not missing("dali"):
        (ours,) = list(make("dali", "val", tmp_path, batch_size=8))
        assert difference([ours], [reference]) < 0.5


def _odd_pictures(folder: Path) -> None:
    """Formats that a decoder may not know, under names that do not always say so."""
    folder.mkdir(parents=True)
    image, other = picture(90, 120, 0), picture(90, 120, 1)
    image.save(folder / "a.gif")
    image.save(folder / "animated.gif", save_all=True, append_images=[other])
    image.save(folder / "named.jpg", "GIF")
    image.save(folder / "plain.png")
    image.save(folder / "animated.webp", save_all=True, append_images=[other])
    image.convert("P").save(folder / "palette.tif")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "rotated.tiff", exif=exif)
    image.save(folder / "pages.tiff", save_all=True, append_images=[other])
    image.convert("1").save(folder / "bits.bmp")
    deep = np.asarray(image)[..., 0].astype(np.uint16) * 257
    Image.fromarray(deep).save(folder / "deep.png")
    Image.fromarray(deep).save(folder / "deep.tif")
    image.convert("CMYK").save(folder / "cmyk.jpg")


@pytest.mark.parametrize("decode_once", [1, 2])
@pytest.mark.parametrize("split", ["train", "val"])
def test_dali_shows_what_it_cannot_decode(split: str, decode_once: int, tmp_path: Path, make: Make) -> None:
    if reason := missing("dali"):
        pytest.skip(reason)
    _odd_pictures(tmp_path / split / "all")
    config = dataclasses.replace(CONFIG, decode_once=decode_once)
    ours, reference = (
        list(make(backend, split, tmp_path, config=config, num_workers=2)) for backend in ("dali", "torch")
    )
    assert sum(len(batch.labels) for batch in ours) == 12
    assert same(ours, reference)


def test_a_gif_that_is_cut_off_is_named_by_every_loader(tmp_path: Path, make: Make) -> None:
    _odd_pictures(tmp_path / "val" / "all")
    broken = tmp_path / "val" / "all" / "animated.gif"
    broken.write_bytes(broken.read_bytes()[:400])
    for backend in ["torch"] if missing("dali") else ["torch", "dali"]:
        with pytest.raises(DataError, match=r"all/animated\.gif "):
            list(make(backend, "val", tmp_path))


needs_photographs = pytest.mark.skipif(
    "PSS_IMAGENET_SAMPLE" not in os.environ, reason="PSS_IMAGENET_SAMPLE names no tar of ImageNet images"
)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photographs")
    unpack(Path(os.environ["PSS_IMAGENET_SAMPLE"]), root / "val")
    return root


@pytest.fixture(scope="module")
def evaluated(photographs: Path) -> dict[str, NDArray[np.uint8]]:
    """What Pillow and torchvision make of each photograph at 224 pixels, (224, 224, 3), by path."""
    transform = v2.Compose([v2.Resize(256, v2.InterpolationMode.BICUBIC), v2.CenterCrop(224)])

    def evaluate(path: Path) -> NDArray[np.uint8]:
        with Image.open(path) as image:
            return np.asarray(transform(image.convert("RGB")))

    paths = sorted((photographs / "val").rglob("*.JPEG"))
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(map(str, paths), pool.map(evaluate, paths), strict=True))


@needs_photographs
@pytest.mark.parametrize("backend", ["torch", "dali"])
def test_photographs_are_evaluated_as_torchvision_does(
    backend: str, photographs: Path, evaluated: dict[str, NDArray[np.uint8]], make: Make
) -> None:
    """Each once on 1, 2 and 3 ranks, the same pixels every time."""
    if reason := missing(backend):
        pytest.skip(reason)
    first: dict[int, bytes] = {}
    errors = []
    for world_size in (1, 2, 3):
        seen = []
        for rank in range(world_size):
            settings = {"config": DataConfig(), "batch_size": 50, "num_workers": 2}
            loader = make(backend, "val", photographs, rank=rank, world_size=world_size, **settings)
            for batch in loader:
                images = batch.images.permute(0, 2, 3, 1).numpy()
                for i, pixels in zip(batch.index.tolist(), images, strict=True):
                    seen.append(i)
                    if world_size == 1:
                        errors.append(np.abs(pixels.astype(np.int16) - evaluated[loader.table.name(i)]).mean())
                    digest = hashlib.sha256(pixels.tobytes()).digest()
                    assert first.setdefault(i, digest) == digest
        assert sorted(seen) == list(range(len(evaluated)))
    print(f"{backend}: {len(errors)} photographs, mean difference {np.mean(errors):.3f}, of one {np.max(errors):.3f}")
    assert len(errors) == 750
    assert np.mean(errors) < 0.2


@needs_photographs
def test_back_ends_agree_on_photographs(photographs: Path, tmp_path: Path, make: Make) -> None:
    if reason := missing("dali"):
        pytest.skip(reason)
    (tmp_path / "train" / "all").mkdir(parents=True)
    for path in sorted((photographs / "val").rglob("*.JPEG"))[:96]:
        (tmp_path / "train" / "all" / path.name).hardlink_to(path)
    options = {"root": tmp_path, "config": DataConfig(), "batch_size": 32, "num_workers": 2}
    reference, ours = (epoch_of(make(name, **options), 0) for name in ("torch", "dali"))
    assert all(torch.equal(a.index, b.index) for a, b in zip(ours, reference, strict=True))
    assert difference(ours, reference) < 0.5


@pytest.mark.skipif(missing("ffcv") is not None, reason="FFCV is not installed")
@pytest.mark.parametrize("profile", ["raw400", "mix500"])
def test_images_stored_as_pixels_are_read_right(profile: str, tmp_path: Path, make: Make) -> None:
    """Exactly what was scaled down and stored; those that `mix` stores as JPEG, as their decoder gives them."""
    import cv2

    size, store = PROFILES[profile]
    (tmp_path / "src" / "a").mkdir(parents=True)
    for i in range(6):
        picture(size + 100, size + 100, i).save(tmp_path / "src" / "a" / f"{i}.png")
    convert_folder(tmp_path / "src", tmp_path / "set", "ffcv", split="train", max_size=size, store=store)
    rows = np.load(tmp_path / "set" / "train.beton.npy")
    assert set(rows["mode"].tolist()) == ({RAW} if store == "raw" else {JPEG, RAW})
    config = DataConfig(img_size=size, crop_pct=1.0)
    loader = make("ffcv", root=tmp_path / "set", config=config, train=False)
    beton, originals, found = (tmp_path / "set" / "train.beton").read_bytes(), {}, set()
    for i in range(6):
        with Image.open(tmp_path / "src" / "a" / f"{i}.png") as image:
            originals[i] = cv2.resize(np.asarray(image), (size, size), interpolation=cv2.INTER_AREA).tobytes()
    for batch in loader:
        for i, pixels in zip(batch.index.tolist(), batch.images.permute(0, 2, 3, 1).numpy(), strict=True):
            stored = beton[int(rows["ptr"][i]) :][: int(rows["size"][i])]
            if rows["mode"][i] == RAW:
                assert pixels.tobytes() == stored
                found.update(name for name, original in originals.items() if original == stored)
            else:
                assert np.abs(pixels.astype(int) - np.asarray(Image.open(io.BytesIO(stored)))).mean() < 2  # a quick DCT
    assert len(found) == (rows["mode"] == RAW).sum()


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_can_be_read_in_inference_mode(backend: str, make: Make) -> None:
    plain = list(make(backend, "val", num_workers=1))
    with torch.inference_mode():
        assert same(list(make(backend, "val", num_workers=1)), plain)


PROGRESSIVE = Progressive(start_size=32, begin_epoch=1, end_epoch=4, multiple=8)


def test_images_grow_epoch_by_epoch() -> None:
    config = DataConfig(img_size=48, progressive=PROGRESSIVE)
    assert [config.train_size(epoch) for epoch in range(6)] == [32, 32, 40, 40, 48, 48]
    assert [DataConfig(img_size=48).train_size(epoch) for epoch in (0, 9)] == [48, 48]
    jump = DataConfig(img_size=48, progressive=Progressive(start_size=32, begin_epoch=2, end_epoch=2))
    assert [jump.train_size(epoch) for epoch in range(4)] == [32, 32, 48, 48]
    with pytest.raises(ValueError, match=r"start_size is 64, above data\.img_size \(48\)"):
        DataConfig(img_size=48, progressive=Progressive(start_size=64, end_epoch=1))
    with pytest.raises(ValueError, match="set begin_epoch and a later end_epoch"):
        Progressive(start_size=32, begin_epoch=3, end_epoch=2)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_smaller_images_are_the_same_crops(backend: str, workers: int, make: Make) -> None:
    """To the bit those of a loader that delivers nothing else; evaluation is at full size."""
    growing = make(backend, config=DataConfig(img_size=48, progressive=PROGRESSIVE), num_workers=workers)
    for epoch, side in ((1, 32), (4, 48), (2, 40)):
        alone = make(backend, config=DataConfig(img_size=side), num_workers=workers)
        assert same(epoch_of(growing, epoch), epoch_of(alone, epoch))
    val = make(backend, "val", config=DataConfig(img_size=48, progressive=PROGRESSIVE))
    assert next(iter(val)).images.shape[-1] == 48
