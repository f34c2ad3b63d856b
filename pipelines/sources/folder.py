"""`CLASS/*.jpg`, or `train|val|test/CLASS/*.jpg`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipelines.base import DataError
from pipelines.sources.sample import UNSPLIT, Listing, Sample
from pipelines.storage.manifest import SPLIT_ALIASES
from pipelines.storage.source import class_names, find_split_folder, image_files


def list_folder(source: Path) -> Listing:
    """The images of class folders; `DataError` where there are none."""
    folders = {split: found for split in SPLIT_ALIASES if (found := find_split_folder(source, split))}
    folders = folders or {UNSPLIT: source}
    classes = class_names(next(iter(folders.values())))
    if not classes:
        raise DataError(
            f"{next(iter(folders.values()))} has no class folder; expected <class>/*.jpg or "
            "train|val/<class>/*.jpg in the source"
        )
    return Listing(classes, {split: list_classes(folder, classes) for split, folder in folders.items()})


def list_classes(folder: Path, classes: Sequence[str]) -> list[Sample]:
    """Every image in `<folder>/<class>/`, by class and name; `DataError` for an empty or unknown class."""
    if unknown := sorted(set(class_names(folder)) - set(classes)):
        raise DataError(f"{folder} has the class {unknown[0]!r}, which the training split has not")
    samples: list[Sample] = []
    for label, name in enumerate(classes):
        images = image_files(folder / name) if (folder / name).is_dir() else ()
        if not images:
            raise DataError(f"class {name!r} has no image in {folder / name}; add some or remove the folder")
        for image in images:
            path = str(folder / name / image)
            samples.append(Sample(path, label, path))
    return samples
