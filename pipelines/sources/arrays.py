"""Images that lie in files as arrays: CIFAR as it is downloaded for Python, and the digits of scikit-learn.

Those of CIFAR become PNG, which keeps every pixel.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.base import DataError, in_words
from pipelines.sources.archive import read_compressed
from pipelines.sources.columns.tree import Tree, join
from pipelines.sources.sample import UNSPLIT, Choice, Claim, check_class_names

_SIDE = 32
_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
# folder in the archive, then: training files, test files, names, their key, key of the labels
_KINDS = {
    "cifar-10-batches-py": (_BATCHES, ("test_batch",), "batches.meta", b"label_names", b"labels"),
    "cifar-100-python": (("train",), ("test",), "meta", b"fine_label_names", b"fine_labels"),
}
ARCHIVES = {"cifar-10-python.tar.gz": "cifar-10-batches-py", "cifar-100-python.tar.gz": "cifar-100-python"}


_BESIDE = {
    "readme.html": "its own description",
    "file.txt~": "its own description",
    "readme.txt": "its own description",
}
_MAX_FILE = 512 << 20


def claim_cifar(tree: Tree, choice: Choice) -> Claim | None:
    """The archive or unpacked folder of CIFAR-10 or CIFAR-100, in the order of the files; None where there is none."""
    at = _find(tree)
    if at is None:
        return None
    path, kind, taken = at
    train, test, meta, names_key, labels_key = _KINDS[kind]
    wanted = {*train, *test, meta}
    if path.is_dir():
        if large := [name for name in wanted if (path / name).exists() and (path / name).stat().st_size > _MAX_FILE]:
            raise DataError(f"{path / large[0]} has more than {_MAX_FILE >> 20} MiB; download it again")
        files = {name: (path / name).read_bytes() for name in wanted if (path / name).exists()}
    else:
        files = read_compressed(path, wanted)
    if missing := sorted(wanted - set(files)):
        raise DataError(f"{path} lacks {missing[0]}; download it again")
    batches = {name: _Batch.load(files[name], path, name, labels_key) for name in (*train, *test)}
    splits = {"train": train, "val": test}
    return Claim(
        "cifar",
        "CIFAR-100" if kind == "cifar-100-python" else "CIFAR-10",
        _names(files[meta], path, meta, names_key),
        {split: [label for name in names for label in batches[name].labels] for split, names in splits.items()},
        {split: ", ".join(names) for split, names in splits.items()},
        f"{labels_key.decode()} in its files, named by {meta}",
        lambda spool: {
            split: spool.fill(split, (one for name in names for one in batches[name].images(f"{path}, {name}")))
            for split, names in splits.items()
        },
        taken={folder: [name for name in names if name != meta] for folder, names in taken.items()},
        metadata={join(folder, meta): "class names" for folder, names in taken.items() if meta in names},
        unused=_beside(tree),
    )


def _find(tree: Tree) -> tuple[Path, str, dict[str, list[str]]] | None:
    """The file or folder, which of the two it is, and its files by folder."""
    found: list[tuple[Path, str, dict[str, list[str]]]] = []
    for folder, names in sorted(tree.folders.items()):
        for name in names:
            if name in ARCHIVES:
                found.append((tree.path(join(folder, name)), ARCHIVES[name], {folder: [name]}))
        kind = folder.rpartition("/")[2] or tree.name
        if kind in _KINDS and tree.single is None:
            train, test, meta, *_ = _KINDS[kind]
            own = [name for name in names if name in {*train, *test, meta}]
            found.append((tree.path(folder) if folder else tree.root, kind, {folder: own}))
    if len(found) > 1:
        raise DataError(f"{tree.root} holds CIFAR twice, {found[0][0]} and {found[1][0]}; leave one out with --ignore")
    return found[0] if found else None


def _beside(tree: Tree) -> dict[str, Sequence[str]]:
    names = tree.called(_BESIDE.__contains__)
    return {"its own description": names} if names else {}


def _names(content: bytes, path: Path, meta: str, key: bytes) -> tuple[str, ...]:
    names = _load(content, path, meta).get(key)
    if not isinstance(names, list) or not all(isinstance(name, bytes) for name in names):
        raise DataError(f"{path}, {meta} does not name the classes; download it again")
    return check_class_names([name.decode("utf-8", "replace") for name in names], f"{path}, {meta}")


@dataclass(frozen=True)
class _Batch:
    """One file of images."""

    data: NDArray[np.uint8]
    labels: list[int]

    @classmethod
    def load(cls, content: bytes, path: Path, name: str, key: bytes) -> _Batch:
        batch = _load(content, path, name)
        data, labels = batch.get(b"data"), batch.get(key, [])
        fits = isinstance(labels, list) and all(type(label) is int and 0 <= label < 100 for label in labels)
        shape = (len(labels), 3 * _SIDE**2) if fits else ()
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape != shape:
            raise DataError(f"{path}, {name} does not hold images with a label each; download it again")
        return cls(data, labels)

    def images(self, what: str) -> Iterator[tuple[str, int, bytes]]:
        for i, (row, label) in enumerate(zip(self.data, self.labels, strict=True)):
            encoded = io.BytesIO()
            Image.fromarray(row.reshape(3, _SIDE, _SIDE).transpose(1, 2, 0)).save(encoded, "PNG")
            yield f"{what}, image {i}", label, encoded.getvalue()


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


def claim_digits() -> Claim:
    """The 1,797 handwritten digits that scikit-learn brings along: real data without a download."""
    from sklearn.datasets import load_digits

    labels = sorted(load_digits().target.tolist())
    return Claim(
        "digits",
        "the handwritten digits of scikit-learn",
        tuple("0123456789"),
        {UNSPLIT: labels},
        {UNSPLIT: "scikit-learn"},
        "scikit-learn's own",
        lambda spool: {UNSPLIT: spool.fill(UNSPLIT, _digit_images())},
    )


def _digit_images() -> Iterator[tuple[str, int, bytes]]:
    """(name, digit, JPEG) of every 8x8 scan, enlarged to 32x32 pixels, by digit and number."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number in np.argsort(digits.target, kind="stable"):
        gray = np.rint(digits.images[number] * (255 / 16)).astype(np.uint8)
        image = Image.fromarray(gray).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
        encoded = io.BytesIO()
        image.save(encoded, "JPEG", quality=95)
        label = int(digits.target[number])
        yield f"digits/{label}/{number:04d}.jpg", label, encoded.getvalue()
