"""A process of a run: it opens a set and goes through epochs without decoding."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipelines import DataConfig, build
from pipelines.loaders import torch_loader  # noqa: F401 - before memory is counted
from pipelines.storage.source import TarSource
from tools.scale.processes import Task, serve


def epochs(task: Task, mark: Callable[[str], None]) -> Task:
    """Epochs as the training thread goes through them: how long it waits before the first batch of each, and at the
    end, where what was delivered is compared with what was planned."""
    source = TarSource(Path(task["root"]), "train")
    mark("opened")  # for what the table alone takes
    source.close()
    del source
    mark("build")
    loader = build(
        task["root"],
        "train",
        config=DataConfig(),
        batch_size=task["batch"],
        train=True,
        loader="torch",
        rank=task["rank"],
        world_size=task["world_size"],
        num_workers=1,
    )
    mark("built")
    waits, compared = [], []
    for epoch in range(task["epochs"]):
        began = time.perf_counter()
        loader.set_epoch(epoch)
        batches = iter(loader)
        waits.append(time.perf_counter() - began)
        time.sleep(task["pause"])  # the epoch's training
        began = time.perf_counter()
        planned = loader.planned_hash(epoch)
        compared.append(time.perf_counter() - began)
        del batches
    mark("kept")
    loader.close()
    return {"waits": waits, "compared": compared, "hash": planned}


def files(task: Task, mark: Callable[[str], None]) -> Task:
    """How many files are open at once at most, while an image of every tar is read under a limit."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (task["limit"], task["limit"]))
    source = TarSource(Path(task["root"]), "train")
    mark("open")
    first = np.unique(np.load(source.root / source.entry.table)["shard"], return_index=True)[1]
    most = 0
    for some in np.array_split(np.random.default_rng(0).permutation(first), max(1, len(first) // 16)):
        assert all(not image.any() for image in source.read_many(some))
        most = max(most, sum(1 for _ in Path("/proc/self/fd").iterdir()) - 1)  # less the look itself
    source.close()
    return {"tars": len(first), "most_open": most}


if __name__ == "__main__":
    serve(lambda task, mark: {"epochs": epochs, "files": files}[task["what"]](task, mark))
