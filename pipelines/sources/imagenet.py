"""ImageNet as it is downloaded: the training and validation tars, with the labels of the devkit or of a text file."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from pipelines.base import DataError
from pipelines.sources.archive import image_member, read_compressed, tar_members
from pipelines.sources.folder import list_classes
from pipelines.sources.sample import Listing, Sample
from pipelines.storage.source import class_names, find_split_folder, image_files

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
_DEVKIT = "ILSVRC2012_devkit_t12"
_META, _TRUTH = "meta.mat", "ILSVRC2012_validation_ground_truth.txt"


def is_imagenet(source: Path) -> bool:
    """Whether `list_imagenet` can read this file or folder."""
    if source.is_file():
        return source.name == TRAIN_TAR
    return any((source / name).exists() for name in (TRAIN_TAR, VAL_TAR)) or _flat_validation(source) is not None


def list_imagenet(source: Path) -> Listing:
    """Training classes in the order of their WordNet ids; validation labels from the devkit or the one text file
    with a line for each image: `FILE WNID`, `FILE NUMBER` (of the class in that order, from 0) or `WNID`."""
    folder, train_tar = (source.parent, source) if source.is_file() else (source, source / TRAIN_TAR)
    splits: dict[str, Sequence[Sample]] = {}
    classes: tuple[str, ...] = ()
    if train_tar.exists():
        classes, splits["train"] = _list_training(train_tar)
    elif train_folder := find_split_folder(folder, "train"):
        classes = class_names(train_folder)
        splits["train"] = list_classes(train_folder, classes)
    images = [] if source.is_file() else _validation_images(folder)
    if images:
        labels = _validation_labels(folder, images, classes)
        classes = classes or tuple(sorted(set(labels)))
        number = {name: label for label, name in enumerate(classes)}
        if unknown := sorted(set(labels) - set(number)):
            raise DataError(f"the validation labels in {folder} name {unknown[0]!r}, which is no training class")
        splits["val"] = [
            Sample(image.name, number[label], image.path, image.offset, image.length)
            for image, label in zip(images, labels, strict=True)
        ]
    return Listing(classes, splits)


def _list_training(path: Path) -> tuple[tuple[str, ...], list[Sample]]:
    tars = sorted(tar_members(path), key=lambda member: member.name)
    for member in tars:
        if not member.name.endswith(".tar"):
            raise DataError(f"{path} holds {member.name}; expected a tar for every class, as ImageNet is distributed")
    samples = []
    for label, tar in enumerate(tars):
        for member in sorted(tar_members(path, tar), key=lambda member: member.name):
            image = image_member(member, path)
            samples.append(
                Sample(f"{path}, {tar.name}, {image.name}", label, str(path), image.offset, image.length),
            )
    return tuple(PurePosixPath(tar.name).stem for tar in tars), samples


def _validation_images(folder: Path) -> list[Sample]:
    """Sorted by name; their labels are still 0."""
    tar = folder / VAL_TAR
    if tar.exists():
        members = sorted((image_member(m, tar) for m in tar_members(tar)), key=lambda m: m.name)
        return [Sample(f"{tar}, {m.name}", 0, str(tar), m.offset, m.length) for m in members]
    flat = _flat_validation(folder)
    return [Sample(str(flat / name), 0, str(flat / name)) for name in image_files(flat)] if flat else []


def _flat_validation(folder: Path) -> Path | None:
    """The folder that holds the validation images without class folders."""
    place = find_split_folder(folder, "val")
    if place is None and (any(folder.glob("*.txt")) or any(folder.glob(f"{_DEVKIT}*"))):
        place = folder
    return place if place is not None and image_files(place) else None


def _validation_labels(folder: Path, images: Sequence[Sample], classes: Sequence[str]) -> list[str]:
    """The WordNet id of every image."""
    devkit = _devkit(folder)
    if devkit is not None:
        name_of = _devkit_classes(devkit[_META])
        lines = devkit[_TRUTH].decode().split()
        if len(lines) != len(images):
            raise DataError(f"the devkit in {folder} labels {len(lines)} images, but there are {len(images)}")
        return [name_of[int(line)] for line in lines]
    texts = {path: path.read_text(errors="replace").splitlines() for path in sorted(folder.glob("*.txt"))}
    fitting = [path for path, lines in texts.items() if len(lines) == len(images)]
    if len(fitting) != 1:
        found = "none" if not fitting else ", ".join(path.name for path in fitting)
        raise DataError(
            f"{folder} needs {_DEVKIT}.tar.gz or one text file with {len(images)} lines to label the validation "
            f"images ({found} found)"
        )
    rows = [line.split() for line in texts[fitting[0]]]
    if all(len(row) == 1 for row in rows):
        return [row[0] for row in rows]
    if any(len(row) != 2 for row in rows):
        raise DataError(f"{fitting[0]} has a line without exactly a file name and a label; mend it")
    label_of = {PurePosixPath(name).name: label for name, label in rows}
    names = [PurePosixPath(image.name.rsplit(", ", 1)[-1]).name for image in images]
    if missing := [name for name in names if name not in label_of]:
        raise DataError(f"{fitting[0]} has no line for {missing[0]}; download it again")
    labels = [label_of[name] for name in names]
    if not all(label.isdigit() for label in labels):
        return labels
    if not classes:
        raise DataError(f"{fitting[0]} numbers the classes; their names come from the training images, which lack")
    if high := [label for label in labels if int(label) >= len(classes)]:
        raise DataError(f"{fitting[0]} has label {high[0]}, but there are {len(classes)} training classes, from 0")
    return [classes[int(label)] for label in labels]


def _devkit(folder: Path) -> dict[str, bytes] | None:
    packed, unpacked = folder / f"{_DEVKIT}.tar.gz", folder / _DEVKIT / "data"
    if packed.exists():
        files = read_compressed(packed, {_META, _TRUTH})
        if len(files) != 2:
            raise DataError(f"{packed} lacks data/{_META} or data/{_TRUTH}; download it again")
        return files
    if unpacked.is_dir():
        return {name: (unpacked / name).read_bytes() for name in (_META, _TRUTH)}
    return None


def _devkit_classes(meta: bytes) -> dict[int, str]:
    """The WordNet id of every leaf class, by the devkit's own number (from 1, in no useful order)."""
    from scipy.io import loadmat

    synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
    return {
        int(number): str(name)
        for number, name, children in zip(
            synsets["ILSVRC2012_ID"], synsets["WNID"], synsets["num_children"], strict=True
        )
        if int(children) == 0
    }
