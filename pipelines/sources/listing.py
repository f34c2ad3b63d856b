"""Which reader a source is for: the first one that recognises it lists its samples."""

from __future__ import annotations

from pathlib import Path

from pipelines.base import DataError
from pipelines.sources.cifar import find_cifar, list_cifar
from pipelines.sources.folder import list_folder
from pipelines.sources.imagenet import is_imagenet, list_imagenet
from pipelines.sources.sample import Listing, Sample, check_labels
from pipelines.sources.spool import Spool, list_digits
from pipelines.sources.tables import is_saved, list_parquet, list_saved, parquet_files
from pipelines.sources.webdataset import list_webdataset, shard_files
from pipelines.storage.manifest import MANIFEST

__all__ = ["DIGITS", "Listing", "Sample", "Spool", "list_source"]

DIGITS = "digits"


def list_source(source: str, spool: Spool) -> Listing:
    """Everything in `source`: the word "digits", a file or a folder. `DataError` if it cannot be used."""
    path = Path(source)
    if source == DIGITS:
        return list_digits(spool)
    if not path.exists():
        what = "file or folder" if path.suffix else "folder"
        raise DataError(f"there is no {what} {path}; name one that holds images, or the word digits")
    if (path / MANIFEST).exists():
        raise DataError(f"{path} has been converted already; convert its original source")
    listing = _list(path, spool)
    check_labels(listing, path)
    return listing


def _list(path: Path, spool: Spool) -> Listing:
    if is_imagenet(path):
        return list_imagenet(path)
    if cifar := find_cifar(path):
        return list_cifar(*cifar, spool)
    if is_saved(path):
        return list_saved(path, spool)
    if parquet_files(path):
        return list_parquet(path, spool)
    if shard_files(path):
        return list_webdataset(path)
    if path.is_file():
        raise DataError(f"{path} is no source that can be read; use .parquet, .tar, or an archive of CIFAR")
    return list_folder(path)
