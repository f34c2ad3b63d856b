"""What decides which data a run sees: order, ranks, resuming, and the refusal to go on with anything else."""

from __future__ import annotations

import hashlib
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import convert_folder, missing, picture
from test_loaders import BACKENDS

from pipelines import Batch, DataConfig, DataError, Loader, build
from pipelines.loaders.order import train_plan

CONFIG = DataConfig(img_size=32)
POINTS, EPOCHS = 30, 4
THREADS = {"torch": (0, 2), "dali": (2, 3), "ffcv": (2, 2)}  # of resumed runs; the others have one
NUM, RANKS = 1002, 3


def make(root: Path, backend: str, **options: Any) -> Loader:
    settings = {"config": CONFIG, "batch_size": 4, "num_workers": 1, "train": True, **options}
    return build(root, "train", loader=backend, **settings)


def digest(batch: Batch) -> str:
    parts = (batch.images.contiguous(), batch.labels, batch.index)
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()


def delivered(loader: Loader, epoch: int, step: int = 0) -> list[str]:
    loader.set_epoch(epoch, step)
    return [digest(batch) for batch in loader]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_resumed_from_its_state_goes_on_as_if_nothing_had_been(backend: str, converted_root: Path) -> None:
    """At 30 random points: a new loader with other threads, given what a checkpoint holds and nothing else."""
    whole = make(converted_root, backend)
    expected = [delivered(whole, epoch) for epoch in range(EPOCHS + 1)]
    steps = whole.steps_per_epoch
    assert len({one for epoch in expected for one in epoch}) == (EPOCHS + 1) * steps
    states = json.dumps(whole.state_dict())
    assert len(states) < 1000
    points = random.Random(backend).sample(range(EPOCHS * steps), POINTS)
    for number, (epoch, step) in enumerate(divmod(point, steps) for point in points):
        resumed = make(converted_root, backend, num_workers=THREADS[backend][number % 2])
        resumed.load_state_dict(json.loads(states))
        assert delivered(resumed, epoch, step) == expected[epoch][step:]
        assert resumed.delivered_hash == whole.planned_hash(epoch)
        assert delivered(resumed, epoch + 1) == expected[epoch + 1]
        resumed.close()
    whole.close()
    print(f"{backend}: {POINTS} of {POINTS} points of {EPOCHS} epochs of {steps} steps")


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,002 small images."""
    root = tmp_path_factory.mktemp("thousand")
    for label in range(3):
        (root / "src" / f"{label}").mkdir(parents=True)
    for i in range(NUM):
        picture(24, 24, i).save(root / "src" / f"{i % 3}" / f"{i}.jpg", quality=90)
    formats = "dali" if missing("ffcv") else "ffcv,dali"
    convert_folder(root / "src", root / "set", formats, split="train", max_size=32)
    return root / "set"


@pytest.mark.parametrize("backend", BACKENDS)
def test_three_ranks_see_every_sample_once_in_each_of_eight_epochs(backend: str, thousand: Path) -> None:
    settings = {"config": DataConfig(img_size=16), "batch_size": NUM // RANKS // 2}
    ranks = [make(thousand, backend, rank=rank, world_size=RANKS, **settings) for rank in range(RANKS)]
    alone = make(thousand, "torch", config=settings["config"], batch_size=NUM // 2)
    orders = set()
    for epoch in range(8):
        seen: list[int] = []
        for loader in ranks:
            loader.set_epoch(epoch)
            for batch in loader:
                assert len(batch.images) == len(batch.index) == settings["batch_size"]
                assert (batch.labels.numpy() == loader.table.labels[batch.index.numpy()]).all()
                seen.extend(batch.index.tolist())
            assert loader.delivered_hash == loader.planned_hash(epoch)
        assert sorted(seen) == list(range(NUM))
        assert sum(loader.delivered_hash for loader in ranks) % (1 << 32) == alone.planned_hash(epoch)
        orders.add(tuple(seen))
    assert len(orders) == 8
    for loader in (*ranks, alone):
        loader.close()


def test_what_fills_no_global_batch_is_left_out_and_nothing_is_padded() -> None:
    """In training; evaluation pads nothing either, its last batches are short."""
    never = set(range(NUM))
    for epoch in range(8):
        batches = [train_plan(NUM, 5, epoch, batch_size=32, rank=rank, world_size=RANKS) for rank in range(RANKS)]
        seen = [i for steps in batches for step in steps for i in step.tolist()]
        assert len(seen) == len(set(seen)) == NUM // 96 * 96 == 960
        never -= set(seen)
    assert not never


@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluation_on_three_ranks_pads_nothing(backend: str, thousand: Path) -> None:
    seen: list[int] = []
    for rank in range(RANKS):
        loader = make(thousand, backend, train=False, rank=rank, world_size=RANKS, batch_size=100)
        sizes = [(len(batch.images), seen.extend(batch.index.tolist()))[0] for batch in loader]
        assert sizes == [100, 100, 100, 34]
        loader.close()
    assert sorted(seen) == list(range(NUM))


WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "another seed": ({"seed": 1}, ["seed"]),
    "another batch size": ({"batch_size": 5}, ["global_batch"]),
    "another number of ranks": ({"world_size": 2}, ["global_batch"]),
    "another image size": ({"config": DataConfig(img_size=48)}, ["config.img_size"]),
    "other crops": ({"config": DataConfig(img_size=32, crop_scale=(0.2, 1))}, ["config.crop_scale"]),
    "another augmentation": (
        {"config": DataConfig(img_size=32, rand_augment="rand-m9-mstd0.5-inc1-n2", erasing=0.25)},
        ["config.erasing", "config.rand_augment"],
    ),
    "repeated samples": ({"config": DataConfig(img_size=32, repeats=3)}, ["config.repeats"]),
    "evaluation": ({"train": False}, ["train"]),
    "another set": ({"root": "other"}, ["data", "num_samples"]),
    "the same images in another order": ({"root": "shuffled"}, ["data"]),
    "another back end": ({"backend": "another"}, ["backend"]),
    "another version of the order": ({"order_version": 0}, ["order_version"]),
}


@pytest.fixture(scope="module")
def others(image_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("others")
    formats = "dali" if missing("ffcv") else "ffcv,dali"
    convert_folder(image_root / "val", root / "other", formats, split="train", max_size=64)
    convert_folder(image_root, root / "shuffled", formats, max_size=64, seed=1)
    return {"other": root / "other", "shuffled": root / "shuffled"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_checkpoint_of_another_run_is_refused_by_what_differs(
    backend: str, converted_root: Path, others: dict[str, Path]
) -> None:
    loader = make(converted_root, backend)
    own = loader.state_dict()
    loader.load_state_dict(own)
    for kind, (options, fields) in WRONG.items():
        if "root" in options:
            state = make(others[options["root"]], backend).state_dict()
        elif "order_version" in options:
            state = own | options
        elif "backend" in options:
            state = make(converted_root, "dali" if backend == "torch" else "torch").state_dict()
        else:
            state = make(converted_root, backend, **options).state_dict()
        with pytest.raises(DataError, match="started with other data settings") as error:
            loader.load_state_dict(state)
        assert sorted(re.findall(r"[:;] ([\w.]+) was ", str(error.value))) == fields, kind
    assert len(WRONG) >= 8
    loader.load_state_dict(own | {"libraries": {}})  # only told about in the log
    loader.close()
