"""CIFAR-10 and CIFAR-100 as they are downloaded for Python. The images become PNG, which keeps every pixel."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines.base import DataError, in_words
from pipelines.sources.archive import read_compressed
from pipelines.sources.sample import Listing
from pipelines.sources.spool import Spool

_SIDE = 32
_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
# folder in the archive, then: training files, test files, names, their key, key of the labels
_KINDS = {
    "cifar-10-batches-py": (_BATCHES, ("test_batch",), "batches.meta", b"label_names", b"labels"),
    "cifar-100-python": (("train",), ("test",), "meta", b"fine_label_names", b"fine_labels"),
}
_ARCHIVES = {"cifar-10-python.tar.gz": "cifar-10-batches-py", "cifar-100-python.tar.gz": "cifar-100-python"}


def find_cifar(source: Path) -> tuple[Path, str] | None:
    """The archive or unpacked folder that `source` is or holds, and which of the two sets it is."""
    for name, kind in [*_ARCHIVES.items(), *((kind, kind) for kind in _KINDS)]:
        for path in (source, source / name):
            if path.name == name and path.exists():
                return path, kind
    return None


def list_cifar(path: Path, kind: str, spool: Spool) -> Listing:
    """The images in the order of the files."""
    train, test, meta, names_key, labels_key = _KINDS[kind]
    wanted = {*train, *test, meta}
    if path.is_dir():
        files = {name: (path / name).read_bytes() for name in wanted if (path / name).exists()}
    else:
        files = read_compressed(path, wanted)
    if missing := sorted(wanted - set(files)):
        raise DataError(f"{path} lacks {missing[0]}; download it again")
    classes = tuple(name.decode() for name in _load(files[meta], path, meta)[names_key])
    return Listing(
        classes,
        {
            split: spool.fill(split, _images(files, names, path, labels_key))
            for split, names in (("train", train), ("val", test))
        },
    )


def _images(
    files: dict[str, bytes], names: tuple[str, ...], path: Path, key: bytes
) -> Iterator[tuple[str, int, bytes]]:
    for name in names:
        batch = _load(files[name], path, name)
        data, labels = batch.get(b"data"), batch.get(key, [])
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape != (len(labels), 3 * _SIDE**2):
            raise DataError(f"{path}, {name} does not hold images with a label each; download it again")
        for i, (row, label) in enumerate(zip(data, labels, strict=True)):
            encoded = io.BytesIO()
            Image.fromarray(row.reshape(3, _SIDE, _SIDE).transpose(1, 2, 0)).save(encoded, "PNG")
            yield f"{path}, {name}, image {i}", int(label), encoded.getvalue()


class _ArraysOnly(pickle.Unpickler):
    """A pickle can run any program. This one may make arrays, and what Python has built in."""

    _ALLOWED = frozenset(
        (module, name)
        for core in ("numpy.core", "numpy._core")
        for module, name in ((f"{core}.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype"))
    ) | {("_codecs", "encode")}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _load(content: bytes, path: Path, name: str) -> dict[bytes, Any]:
    try:
        loaded = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can fail in any way
        raise DataError(f"{path}, {name} is not what CIFAR holds ({in_words(error)}); download it again") from error
    if not isinstance(loaded, dict):
        raise DataError(f"{path}, {name} is not what CIFAR holds; download it again")
    return loaded
