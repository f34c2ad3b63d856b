"""How fast pss-convert works, and its writing of FFCV files beside FFCV's own writer with the same settings.

    python -m tools.benchmarks.convert FOLDER [--repeat 5] [--jobs 2] [--max-size 500]

FOLDER holds CLASS/*.jpg. The two writers take turns; given are the median and the range of images per second.
"""

from __future__ import annotations

import argparse
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from pipelines.conversion.beton import BetonFile, Piece, encode_piece
from pipelines.conversion.engines import map_tasks
from pipelines.conversion.scan import ImageFile, check_chunk, checked_images
from pipelines.conversion.work import Crew, chunks_of
from pipelines.sources.folder import list_folder

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


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--max-size", type=int, default=500)
    options = parser.parse_args()
    (samples,) = list_folder(options.folder).splits.values()
    chunks = [samples[chunk] for chunk in chunks_of(len(samples), 8, 1024)]
    began = time.perf_counter()
    checked = map_tasks(check_chunk, chunks, options.jobs, lambda _: None)
    print(f"check the source      {len(samples) / (time.perf_counter() - began):7.0f} images/s")
    images = [image for chunk, found in zip(chunks, checked, strict=True) for image in checked_images(chunk, found)[0]]
    ours, theirs = [], []
    for _ in range(options.repeat):
        theirs.append(len(images) / _time_ffcv(images, options.max_size, options.jobs))
        ours.append(len(images) / _time_ours(images, options.max_size, options.jobs))
    for name, rates in (("pss-convert writes", ours), ("FFCV's writer writes", theirs)):
        print(f"{name:21} {statistics.median(rates):7.0f} images/s  ({min(rates):.0f} ... {max(rates):.0f})")
    print(f"ratio of the medians  {statistics.median(ours) / statistics.median(theirs):7.2f}")


def _time_ours(images: list[ImageFile], max_size: int, jobs: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        crew = Crew(work, jobs, "processes", None)
        chunks = chunks_of(len(images), 8, 512)
        results = crew.paths("beton", len(chunks))
        data = [path.with_name(f"{path.name}.data") for path in results]
        pieces = [
            Piece(str(path), images[chunk], [False] * len(images[chunk]), max_size, 90)
            for path, chunk in zip(data, chunks, strict=True)
        ]
        beton = BetonFile(work / "train.beton", results, data, len(images), max_size)
        began = time.perf_counter()
        crew.run("beton", encode_piece, pieces, lambda _: beton.advance())
        beton.finish(np.array([image.sample.label for image in images], dtype=np.int64))
        return time.perf_counter() - began


def _time_ffcv(images: list[ImageFile], max_size: int, jobs: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        task = pickle.dumps(([image.sample.path for image in images], f"{folder}/train.beton", max_size, jobs))
        done = subprocess.run([sys.executable, "-c", _FFCV], input=task, capture_output=True, check=True)
        return float(done.stdout.split()[-1])


if __name__ == "__main__":
    main()
