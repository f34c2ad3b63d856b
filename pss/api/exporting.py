"""What `pss-eval --export FILE.onnx --int8` does: an exported model, quantised, and held against the float one."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import pipelines
from pss.api.training import LoaderName
from pss.inference import export, sweep
from pss.inference.accuracy import evaluation_inputs
from pss.inference.opening import Run
from pss.inference.quantised.making import NUM_IMAGES, Quantised, quantise
from pss.inference.quantised.measuring import Measured, measure, table
from pss.inference.quantised.sessions import Session
from pss.methods import Point
from pss.runtime import files
from pss.runtime.processes import World

Say = Callable[[str], None]

_CPU = World(rank=0, size=1, device=torch.device("cpu"))


@dataclass(frozen=True)
class Int8:
    """A quantised file, and what it was found to be worth."""

    quantised: Quantised
    found: list[Measured]
    """The float file and this one at every ρ that they have."""
    batch_size: int
    threads: int

    def table(self) -> str:
        """Accuracy, speed and size of both, for people."""
        return table(self.found, self.batch_size)

    def verdict(self) -> str:
        """What 8 bits gain and cost, at the largest ρ that was measured."""
        exported, quantised = self.found[-2:]
        ratio = quantised.images_per_second.median / exported.images_per_second.median
        rate = f"{ratio:.2f} times the images a second of float32" + (", which is slower" if ratio < 1 else "")
        less = round(exported.accuracy.top1 - quantised.accuracy.top1, 2)
        drop = f"{abs(less):.2f} points of top-1 {'less' if less > 0 else 'more'}" if less else "the same top-1"
        return (
            f"int8 at ρ {quantised.rho}: {rate}, {quantised.bytes / exported.bytes:.2f} of its size, "
            f"{drop}; on this CPU, {self.threads} "
            f"{'thread' if self.threads == 1 else 'threads'}, onnxruntime"
        )


def export_int8(
    run: Run,
    path: Path,
    data: pipelines.DataPath,
    *,
    point: Point,
    dynamic: bool = False,
    split: str = "val",
    loader: LoaderName = "auto",
    batch_size: int = 64,
    say: Say = lambda line: None,
) -> Int8:
    """Write a run's model to `path` as ONNX of 8 bits, then measure it beside the float form, which is not written.

    Args:
        run: Its method is moved to the CPU.
        path: An `.onnx` file.
        data: The data set. Training images calibrate, or where there are none, those of the validation split.
        point: The operating point; None for a method that has none to choose.
        dynamic: Leave the number of patches to be chosen at each call instead.
        split: What accuracy is measured on.
        loader: What decodes the images.
        batch_size: For the images per second.
        say: Is given what is worth a line.

    Raises:
        ValueError: as `pss.inference.export.export`; another suffix; data that cannot be read.
        OSError: the file cannot be written; what was there before still is.
    """
    check_int8(path)
    threads = len(os.sched_getaffinity(0))
    with sweep.stage("exporting and quantising", _CPU):
        content, _ = export.made(run, path, point=point, dynamic=dynamic)
        source = "train" if "train" in pipelines.open_dataset(data).splits else "val"
        quantised = quantise(content, _some_images(run, data, source, loader), threads)
    files.write(path, quantised.content)
    shares = " and ".join(f"{share:.1%} with {kind} ranges" for kind, share in quantised.agreement.items())
    say(
        f"wrote {path}: int8 with {quantised.kind} ranges of activations; calibrated on {quantised.num_calibrated} "
        f"images of {source}, int8 agrees with float32 on {shares} of {quantised.num_compared} others"
    )
    sessions = {"float32": Session(content, threads), f"int8 {quantised.kind}": Session(quantised.content, threads)}
    reader = pipelines.build(
        data, split, config=run.config.data, batch_size=batch_size, train=False, loader=loader, device="cpu"
    )
    try:
        inputs = evaluation_inputs(reader, run.config.data, _CPU.device)
        with sweep.progress("both files", reader.num_samples, _CPU) as bar:
            found = measure(sessions, inputs, _CPU, batch_size=batch_size, watch=bar)
    finally:
        reader.close()
    return Int8(quantised, found, batch_size, threads)


def check_int8(path: Path) -> None:
    """Raise `ValueError` for a file that cannot be written in 8 bits here."""
    if path.suffix == ".pt2":
        raise ValueError(f"--export {path} --int8: only ONNX files are quantised; name a file that ends in .onnx")
    export.check_target(path)


def _some_images(run: Run, data: pipelines.DataPath, split: str, loader: LoaderName) -> NDArray[np.float32]:
    """Images of all over a split as evaluation prepares them, float32 (N, 3, S, S)."""
    total = pipelines.open_dataset(data).num_samples(split)
    reader = pipelines.build(
        data,
        split,
        config=run.config.data,
        batch_size=16,
        train=False,
        loader=loader,
        device="cpu",
        world_size=max(1, total // NUM_IMAGES),  # of so many processes one gets images at equal distances
    )
    try:
        found = [shown.images for shown in evaluation_inputs(reader, run.config.data, _CPU.device)]
    finally:
        reader.close()
    images: NDArray[np.float32] = torch.cat(found)[:NUM_IMAGES].numpy()
    return images
