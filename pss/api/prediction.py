"""`pss.predict`: what a trained model takes image files for."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.cells import cell_len

from pipelines.augment.device import DeviceTransform
from pipelines.base import Batch, DataError
from pipelines.loaders.torch_loader import DecodedStep, Decoder
from pipelines.storage.source import IMAGE_SUFFIXES, FileSource
from pss.inference.accuracy import draws_of
from pss.inference.opening import Run, open_run
from pss.inference.sweep import operating_points
from pss.inference.sweep import predict as logits_of
from pss.inference.text import cell, printable
from pss.methods import Point
from pss.runtime import processes

_WIDEST = 60
"""Cells of a terminal that a column of the table is padded to at most."""


@dataclass(frozen=True)
class Prediction:
    """What one image is taken for."""

    file: str
    classes: tuple[tuple[str, float], ...]
    """The likeliest classes and their probabilities, the likeliest first; none where the file cannot be read."""
    error: str = ""
    """Why it cannot."""


def predict(
    run: str | Path | Run,
    images: str | Path | Sequence[str | Path],
    *,
    rho: float | None = None,
    top: int = 5,
    batch_size: int = 64,
    ema: bool = False,
    best: bool = False,
) -> list[Prediction]:
    """Classify image files, each prepared as in evaluation.

    Args:
        run: a folder of a run, a checkpoint, a published folder, `timm:NAME` or `NAME=FILE`; or one that is open.
        images: files, and folders, of which all images below are taken, in the order of their names.
        rho: the operating point; the first of the method if None.
        top: how many classes.
        batch_size: images per batch.
        ema: take the moving average of the weights.
        best: of a run, the checkpoint of the best validation, not the newest.

    Raises:
        ValueError: what is named cannot be opened, or there is no image; one that is damaged is a `Prediction` that
            says so.
    """
    names = listed([images] if isinstance(images, str | Path) else images)
    with processes.start() as world:
        opened = run if isinstance(run, Run) else open_run(str(run), world.device, ema=ema, best=best)
        (point, *_) = operating_points(opened, None if rho is None else [rho])
        return list(_predictions(opened, names, point, top, batch_size, world.device))


def listed(images: Sequence[str | Path]) -> list[str]:
    """Files, and those in folders, by name. Raises `DataError` for what is not there, or holds no image."""
    found: list[str] = []
    for one in map(Path, images):
        if one.is_dir():
            below = sorted(str(path) for path in one.rglob("*") if _is_image(path))
            if not below:
                raise DataError(f"there is no image in {one}; name files, or a folder with *.jpg or the like")
            found += below
        elif one.exists():
            found.append(str(one))
        else:
            raise DataError(f"{one} is not there; name image files, or folders of them")
    return found


def _is_image(path: Path) -> bool:
    """By its name; what begins with a dot is another program's, such as `._photo.jpg`."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def _predictions(
    run: Run, names: Sequence[str], point: Point, top: int, batch_size: int, device: torch.device
) -> Iterator[Prediction]:
    config = run.config.data
    source = FileSource(Path(), names, np.zeros(len(names), np.int64), ("",))
    decoder = Decoder(source, config, train=False, seed=0)
    transform = DeviceTransform(config, seed=0, train=False)
    classes = run.classes or [str(number) for number in range(run.num_classes)]
    count = min(top, len(classes))

    def decoded(number: int) -> torch.Tensor | str:
        pixels = torch.empty(1, 3, config.img_size, config.img_size, dtype=torch.uint8)
        step = DecodedStep(0, np.array([number], np.int64), pixels, crops_per_image=1)
        try:
            decoder.open(step)
            decoder.decode(step, range(1))
        except DataError as error:
            return str(error)
        return pixels

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads, torch.inference_mode():
        for begin in range(0, len(names), batch_size):
            numbers = range(begin, min(begin + batch_size, len(names)))
            read = list(threads.map(decoded, numbers))
            whole = [
                (number, pixels) for number, pixels in zip(numbers, read, strict=True) if not isinstance(pixels, str)
            ]
            told: dict[int, tuple[tuple[str, float], ...]] = {}
            if whole:
                index = torch.tensor([number for number, _ in whole])
                shown = torch.cat([one for _, one in whole]).to(device)
                batch = Batch(shown, torch.zeros(len(whole), dtype=torch.int64, device=device), index)
                with draws_of(index, device):
                    likely = logits_of(run, transform(batch, 0), point).float().softmax(1).topk(count, dim=1)
                for number, values, places in zip(
                    index.tolist(), likely.values.tolist(), likely.indices.tolist(), strict=True
                ):
                    told[number] = tuple((classes[place], value) for place, value in zip(places, values, strict=True))
            for number, one in zip(numbers, read, strict=True):
                error = one if isinstance(one, str) else ""
                yield Prediction(names[number], told.get(number, ()), error)


def as_json(predictions: Sequence[Prediction]) -> str:
    """A list of objects: `file`, and `classes` with their `probability`, or `error`."""
    rows: list[dict[str, Any]] = []
    for one in predictions:
        row: dict[str, Any] = {"file": printable(one.file)}
        if one.error:
            row["error"] = one.error
        else:
            row["classes"] = [{"class": name, "probability": round(value, 6)} for name, value in one.classes]
        rows.append(row)
    return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"


def as_csv(predictions: Sequence[Prediction]) -> str:
    """A line for every file and class."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("file", "rank", "class", "probability", "error"))
    for one in predictions:
        if one.error:
            table.writerow((cell(one.file), "", "", "", cell(one.error)))
        for rank, (name, value) in enumerate(one.classes, 1):
            table.writerow((cell(one.file), rank, cell(name), f"{value:.6f}", ""))
    return text.getvalue()


def as_table(predictions: Sequence[Prediction]) -> str:
    """A line for every file, in columns."""
    rows = [
        [printable(one.file), *(f"{printable(name)} {value:.1%}" for name, value in one.classes)] for one in predictions
    ]
    columns = itertools.zip_longest(*rows, fillvalue="")
    widths = [min(_WIDEST, max(map(cell_len, column))) for column in columns]
    lines = []
    for one, row in zip(predictions, rows, strict=True):
        padded = [cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=False)]
        lines.append("  ".join([*padded, one.error]).rstrip())
    return "\n".join(lines) + "\n"
