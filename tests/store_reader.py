"""Reads a data set as one of some ranks, and notes each step as it is delivered.

    python tests/store_reader.py DATA CACHE CACHE_GB RANK WORLD EPOCH STEP EPOCHS NOTES [PAUSE [LOADER]]

A line of NOTES is an epoch, a step, and a hash of each row: pixels, number, label. PAUSE is what a step takes, in
seconds. CACHE "-" is for a folder.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path

import torch

import pipelines
from pipelines.base import DataConfig

GROUPS, WINDOW, BATCH = 4, 1, 4


def main() -> None:
    data, cache, gigabytes, rank, world, epoch, step, epochs, notes = sys.argv[1:10]
    pause, loader = float(sys.argv[10]) if len(sys.argv) > 10 else 0.0, (*sys.argv[11:], "torch")[0]
    torch.set_num_threads(1)
    found = pipelines.find_data(data) if cache == "-" else pipelines.find_data(data, cache, float(gigabytes))
    made = pipelines.build(
        found, "train", config=DataConfig(img_size=32, window=WINDOW, groups=GROUPS), batch_size=BATCH // int(world),
        train=True, loader=loader, seed=5, rank=int(rank), world_size=int(world), num_workers=1,
    )  # fmt: skip
    begin = int(step)
    with Path(notes).open("a", encoding="utf-8") as file:
        for number in range(int(epoch), int(epochs)):
            made.set_epoch(number, begin)
            for at, batch in enumerate(made, begin):
                told = zip(batch.images.contiguous().numpy(), batch.index.tolist(), batch.labels.tolist(), strict=True)
                rows = [
                    hashlib.sha256(image.tobytes() + b"%d %d" % (i, label)).hexdigest()[:16] for image, i, label in told
                ]
                file.write(json.dumps([number, at, rows]) + "\n")
                file.flush()
                time.sleep(pause)
            assert made.delivered_hash == made.planned_hash(number)
            begin = 0
    made.close()


if __name__ == "__main__":
    main()
