"""Image data pipelines: one contract (`pipelines.base`), three back ends (torchvision, DALI, FFCV)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.base import Backend, Batch, DataConfig, DataError, Loader, View, choose_loader
from pipelines.extras import need, require
from pipelines.remote.place import RemoteSet, find_data
from pipelines.remote.tars import RemoteTars
from pipelines.remote.windows import windows_of
from pipelines.storage.manifest import MANIFEST, SPLIT_ALIASES, Manifest, canonical_split, find_maps, read_manifest
from pipelines.storage.source import ConvertedTable, Source, class_names, find_split_folder, open_source

__all__ = [
    "Backend",
    "Batch",
    "DataConfig",
    "DataError",
    "DataSet",
    "Loader",
    "RemoteSet",
    "View",
    "build",
    "find_data",
    "open_dataset",
    "open_split",
]

DataPath = str | os.PathLike[str]
"""A folder, an address, or what `find_data` made of either."""


def build(
    root: DataPath,
    split: str,
    *,
    config: DataConfig,
    batch_size: int,
    train: bool,
    loader: Backend = "auto",
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    device: str = "cpu",
    num_workers: int | None = None,
    check_bytes: bool = True,
    label_maps: str | Path | None = None,
    epochs: int | None = None,
) -> Loader:
    """A loader over one split of the data set at `root`.

    `root` is a folder written by pss-convert, a plain one with `train|val/<class>/*.jpg`, or what `find_data` made of
    an address; an address itself is read through the usual cache. `batch_size` is per rank.
    `num_workers` counts threads (0: torch decodes in the caller's); by default this rank's share of the cores.
    `loader="auto"` takes DALI if it is installed and the split holds original bytes, else torch, and both read the same
    formats; FFCV only for a split that exists in no other form. `check_bytes`: in a converted set, compare each image
    with its checksum when this process first reads it (about 1 ns a byte, once). Plain folders have no checksums:
    there, damage is found where the decoder finds it; a JPEG whose pixel data decodes to other colours passes.
    `label_maps`: a .npy file with a row for each sample of the split, in its order, of which `Batch.maps` gets the
    batch's; `auto` is the one that pss-convert has made of this split. `epochs`: how many there will be, if that is
    known, so that nothing is fetched for another one. Raises `DataError` for data or a back end that cannot be used.
    """
    root = find_data(root)
    if isinstance(root, RemoteSet):
        root.check(
            canonical_split(split), config, train=train, batch_size=batch_size * world_size, world_size=world_size
        )
    settings: dict[str, Any] = {
        "config": config,
        "batch_size": batch_size,
        "train": train,
        "seed": seed,
        "rank": rank,
        "world_size": world_size,
        "device": device,
        "num_workers": num_workers,
        "epochs": epochs,
        "label_maps": None if label_maps is None else _maps_of(root, split, label_maps),
    }
    backend = choose_backend(root, split) if loader == "auto" else loader
    if backend == "ffcv":
        if isinstance(root, RemoteSet):
            raise DataError(
                f"{choose_loader('ffcv')} reads one file of all images, and {root} is elsewhere; copy the set here, or "
                "use another loader"
            )
        need(choose_loader("ffcv"), "ffcv", "ffcv")
        module = import_module("pipelines.loaders.ffcv_loader")
        made: Loader = module.FfcvLoader(root, split, check_bytes=check_bytes, **settings)
        return made
    source = open_split(root, split, check_bytes)
    if backend == "torch":
        made = import_module("pipelines.loaders.torch_loader").TorchLoader(source, **settings)
    elif backend == "dali":
        require("nvidia.dali", "dali", choose_loader("dali"))
        module = import_module("pipelines.loaders.dali_loader")
        made = module.DaliLoader(source, **settings)
    else:
        raise DataError(f"there is no loader {loader!r}; use 'auto', 'torch', 'dali' or 'ffcv'")
    return made


def open_split(root: DataPath, split: str, check_bytes: bool = True) -> Source:
    """The encoded images of a split; see `pipelines.storage.source.open_source`."""
    root = find_data(root)
    return (
        RemoteTars(root, split, check_bytes) if isinstance(root, RemoteSet) else open_source(root, split, check_bytes)
    )


def _maps_of(root: Path | RemoteSet, split: str, named: str | Path) -> Path:
    fetched = root.maps(split, named) if isinstance(root, RemoteSet) else None
    return fetched or find_maps(Path(root), split, named)


def choose_backend(root: DataPath, split: str, beside: Backend = "auto") -> Backend:
    """What `loader="auto"` stands for. `beside`: what reads another split, and is taken for this one too if it shows
    original bytes and this one has them."""
    folder = Path(root)
    if (folder / MANIFEST).exists():
        manifest, _ = read_manifest(folder)
        entry = manifest.splits.get(canonical_split(split))
        if entry is not None and not entry.shards and entry.beton:
            return "ffcv"
    if beside in ("torch", "dali"):
        return beside
    return "dali" if find_spec("nvidia") and find_spec("nvidia.dali") else "torch"


@dataclass(frozen=True)
class DataSet:
    """What there is to train on."""

    root: Path | RemoteSet
    classes: tuple[str, ...]
    splits: tuple[str, ...]
    """`train`, `val` or both."""
    manifest: Manifest | None
    """Of a converted data set; None for a plain folder."""

    def num_samples(self, split: str) -> int:
        """How many a split has; `DataError` where there is none of that name."""
        if split not in self.splits:
            raise DataError(
                f"{self.root} has no {split} split, only {' and '.join(self.splits)}; name another data set"
            )
        return sum(self.per_class[split])

    @cached_property
    def per_class(self) -> dict[str, tuple[int, ...]]:
        """Per split the number of samples of each class. A plain folder is listed for it."""
        if self.manifest is not None:
            return {name: self.manifest.splits[name].per_class for name in self.splits}
        counts = {}
        for split in self.splits:
            labels = open_source(Path(self.root), split).labels
            counts[split] = tuple(np.bincount(labels, minlength=len(self.classes)).tolist())
        return counts

    def epoch_samples(self, config: DataConfig, batch_size: int) -> int:
        """How many training samples an epoch has batches for, the global ones of `batch_size`: all, or in the windowed
        order those that every group has. `DataError` where it has no tars, or too few."""
        if config.window is None:
            return self.num_samples("train")
        if self.manifest is None:
            raise DataError(f"{self.root} has no tars, which data.window deals out; convert it, or leave that out")
        table = ConvertedTable(Path(self.root), "train")
        windows = windows_of(table, config, seed=0, batch_size=batch_size, ranks=1)
        assert windows is not None
        return windows.steps_per_epoch * batch_size


def open_dataset(root: DataPath) -> DataSet:
    """Look at the data set at `root`; `DataError` if there is none."""
    root = find_data(root)
    if isinstance(root, RemoteSet) or (root / MANIFEST).exists():
        manifest, _ = read_manifest(Path(root))
        return DataSet(root, manifest.classes, tuple(manifest.splits), manifest)
    folders = {split: folder for split in SPLIT_ALIASES if (folder := find_split_folder(root, split))}
    if not folders:
        raise DataError(
            f"there is no data set in {root}; expected {MANIFEST} (see pss-convert) or train|val/<class>/*.jpg"
        )
    return DataSet(root, class_names(next(iter(folders.values()))), tuple(folders), None)
