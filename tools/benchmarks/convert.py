"""How fast pss-convert works, and its writing of FFCV files beside FFCV's own writer with the same settings.

    python -m tools.benchmarks.convert FOLDER [--repeat 5] [--jobs 2] [--max-size 500]

FOLDER holds CLASS/*.jpg. The two writers take turns, after one that is not counted; ratios are formed within a turn.
"""

from __future__ import annotations

import argparse
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipelines.conversion.beton import BetonFile, Piece, encode_piece
from pipelines.conversion.engines import map_tasks
from pipelines.conversion.processes import PATIENCE
from pipelines.conversion.scan import Images, check_chunk, checked_images
from pipelines.conversion.work import Crew, chunks_of
from pipelines.sources.listing import Choice, Spool, inspect
from tools.benchmarks.measure import Result, cells, conclude, in_turns, over, page, parser, spread

OURS, FFCV = "pss-convert", "FFCV's writer"

_FFCV = """
import sys, time, pickle, warnings
import numpy as np
warnings.simplefilter("ignore")
from PIL import Image
from ffcv.fields import IntField, RGBImageField
from ffcv.writer import DatasetWriter
paths, beton, size, jobs = pickle.load(sys.stdin.buffer)
class Pictures:
    def __len__(self): return len(paths)
    def __getitem__(self, i):
        with Image.open(paths[i]) as image:
            return np.array(image.convert("RGB")), 0, i
fields = {"image": RGBImageField("jpg", max_resolution=size, jpeg_quality=90), "label": IntField(), "index": IntField()}
import os
sys.stderr = open(os.devnull, "w")
began = time.perf_counter()
DatasetWriter(beton, fields, page_size=1 << 21, num_workers=jobs).from_indexed_dataset(Pictures(), chunksize=20)
print(time.perf_counter() - began)
"""


def measured(arguments: argparse.Namespace) -> Result:
    """Images per second: once of checking the source, and in every round of each writer."""
    found = inspect(str(arguments.folder), Choice(one_split=True))
    (samples,) = found.listing(Spool(arguments.folder)).splits.values()
    chunks = [samples[chunk] for chunk in chunks_of(len(samples), 8, 1024)]
    began = time.perf_counter()
    checked = map_tasks(check_chunk, chunks, arguments.jobs, lambda _: None)
    checking = len(samples) / (time.perf_counter() - began)
    images, _ = checked_images(samples, checked, None, "")
    writers = {
        OURS: lambda: len(images) / _time_ours(images, arguments.max_size, arguments.jobs),
        FFCV: lambda: len(images) / _time_ffcv(images, arguments.max_size, arguments.jobs),
    }
    return {"checking": checking, "rates": in_turns(writers, arguments.rounds)}


def report(result: Result) -> str:
    """The result as markdown."""
    settings, rates = result["settings"], result["rates"]
    rows = [
        f"{name} | {cells(values, '.0f')} | {spread(over(values, rates[FFCV]), '.2f')}"
        for name, values in rates.items()
    ]
    title = (
        f"At most {settings['max_size']} pixels, {settings['jobs']} jobs, {settings['rounds']} rounds; checking the "
        f"source {result['checking']:.0f} images/s"
    )
    return page(result, title, "writer | images/s | quartiles | times FFCV's", rows)


def main(argv: Sequence[str] | None = None) -> Result:
    """Run as the arguments say (the command line's if None), print and write the report, and return the result."""
    command = parser(__doc__, rounds=5)
    command.add_argument("folder", type=Path)
    command.add_argument("--repeat", dest="rounds", type=int, default=argparse.SUPPRESS, help="the same as --rounds")
    command.add_argument("--jobs", type=int, default=2)
    command.add_argument("--max-size", type=int, default=500)
    return conclude(command.parse_args(argv), measured, report)


def _time_ours(images: Images, max_size: int, jobs: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        crew = Crew(work, jobs, "processes", None, PATIENCE)
        chunks = chunks_of(len(images), 8, 512)
        results = crew.paths("beton", len(chunks))
        data = [path.with_name(f"{path.name}.data") for path in results]
        pieces = [
            Piece(str(path), images[chunk], np.zeros(len(images[chunk]), np.bool_), max_size, 90)
            for path, chunk in zip(data, chunks, strict=True)
        ]
        beton = BetonFile(work / "train.beton", results, data, len(images), max_size)
        began = time.perf_counter()
        crew.run("beton", encode_piece, pieces, lambda _: beton.advance())
        beton.finish(images.labels)
        return time.perf_counter() - began


def _time_ffcv(images: Images, max_size: int, jobs: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        task = pickle.dumps(([image.sample.path for image in images], f"{folder}/train.beton", max_size, jobs))
        done = subprocess.run([sys.executable, "-c", _FFCV], input=task, capture_output=True, check=True)
        return float(done.stdout.split()[-1])


if __name__ == "__main__":
    main()
