"""Run under torchrun by test_distributed.py: train a few steps and tell what this rank saw.

distributed_run.py DATA OUTPUT [SECTION.KEY=VALUE ...] [nan=RANK:STEP] [kill=RANK:STEP] [hang=RANK:STEP]

`nan` spoils the loss of a rank at a step, `kill` ends the rank there, once, and `hang` has it do nothing any more.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

import pipelines
from pss import recipes
from pss.runtime import processes as dist
from pss.runtime.shards import whole
from pss.training.trainer import Trainer


def main() -> None:
    data, output = Path(sys.argv[1]), Path(sys.argv[2])
    faults = dict(word.split("=") for word in sys.argv[3:] if word.split("=")[0] in ("nan", "kill", "hang"))
    config = recipes.get("digits").with_settings([word for word in sys.argv[3:] if word.split("=")[0] not in faults])
    torch.set_num_threads(1)
    seen: list[tuple[float, list[int]]] = []
    with dist.start(config.train.timeout_seconds) as world:
        options = {
            "config": config.data, "batch_size": config.train.batch_size // world.size, "seed": config.train.seed,
            "rank": world.rank, "world_size": world.size, "loader": "torch", "num_workers": 0,
        }  # fmt: skip
        loaders = (
            pipelines.build(data, "train", train=True, label_maps=config.data.label_maps, **options),
            pipelines.build(data, "val", train=False, **options),
        )
        output.mkdir(exist_ok=True)
        trainer = Trainer(
            config, *loaders, classes=list(pipelines.open_dataset(data).classes), output=output, world=world
        )
        prepare = trainer.inputs._prepare

        def record(batch, epoch, step):
            at = trainer._position()
            seen.append((trainer.method.stage(at).rho, batch.index.tolist()))
            return prepare(batch, epoch, step)

        trainer.inputs._prepare = record
        forward = trainer.method.forward

        def faulty(images, targets, at, *dense):
            here = {name for name, where in faults.items() if where == f"{at.rank}:{at.step}"}
            out = forward(images, targets, at, *dense)
            if "nan" in here:
                out["loss"] = out["loss"] * float("nan")
            if "kill" in here and not (output / "killed").exists():
                (output / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if "hang" in here:
                time.sleep(1000)
            return out

        trainer.method.forward = faulty
        row = trainer.fit()
        digest = sum(float(whole(p.double().abs().sum())) for p in trainer.method.parameters())
        buffers = hashlib.sha256(b"".join(one.cpu().numpy().tobytes() for one in trainer.method.buffers())).hexdigest()
        report = {"seen": seen, "row": row, "digest": digest, "buffers": buffers, "num_val": loaders[1].num_samples,
                  "skipped": trainer.guard.check(0), "moved": trainer.moved}  # fmt: skip
        (output / f"rank{world.rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
