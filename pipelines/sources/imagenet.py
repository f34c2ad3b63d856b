"""ImageNet as it is downloaded: the training and validation archives, or one of them beside class folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

from pipelines.base import DataError
from pipelines.sources import labels as label_files
from pipelines.sources.archive import Member, image_member, tar_members
from pipelines.sources.columns.samples import RangeColumns, Sample, Samples, file_samples
from pipelines.sources.columns.tree import Tree, some
from pipelines.sources.folder import Layout, Part
from pipelines.sources.names import is_image, order_classes
from pipelines.sources.sample import Choice, Claim, ordered_files

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
_NOT_USED = "another archive of ImageNet"


def claim_imagenet(tree: Tree, choice: Choice) -> Claim | None:
    """Training classes in the order of their WordNet ids, and validation images with the labels of the devkit or of a
    text file; None where neither archive is there.

    Raises:
        DataError: a split is there twice, or has no labels.
    """
    train_tar, val_tar = (_one(tree, name) for name in (TRAIN_TAR, VAL_TAR))
    if train_tar is None and val_tar is None:
        return None
    layout = Layout(tree, choice)
    base = layout.base()
    folders = (layout.splits(base) or {}) if layout.images else {}
    unused: dict[str, Sequence[str]] = {}
    for name, used in (("class_order", train_tar is None), ("class_level", folders), ("images", layout.named)):
        if getattr(choice, name) is not None and not used:
            raise DataError(
                f"--{name.replace('_', '-')} means nothing for {tree.path(train_tar or val_tar or '')}, an archive "
                "whose classes are WordNet ids; leave it out"
            )
    for split, tar in (("train", train_tar), ("val", val_tar)):
        if tar and (twice := folders.get(split)):
            raise DataError(
                f"{tree.root} holds the {split} split twice, {tar} and the folder {twice[0]}/, of which one is to be "
                "left out with --ignore"
            )
    if "test" in folders:
        unused["test images"] = layout.below(folders["test"][0])
    splits: dict[str, Samples] = {}
    places: dict[str, str] = {}
    files: list[str] = []
    classes: tuple[str, ...] = ()
    if train_tar:
        classes, splits["train"] = _training(tree, train_tar)
        places["train"] = train_tar
    elif "train" in folders:
        part = layout.part(folders["train"])
        files += part.images
        classes = order_classes(part.classes, choice.class_order, tree.root)
        splits["train"] = file_samples(tree.origin, *ordered_files(tree.root, part.classes, classes, "train"))
        places["train"] = some(folders["train"])
    told, metadata = "the WordNet ids of the training images", dict[str, str]()
    if val_tar or "val" in folders:
        part = layout.part(folders["val"], classes) if "val" in folders else Part([])
        files += part.images
        if part.classes:
            splits["val"] = file_samples(tree.origin, *ordered_files(tree.root, part.classes, classes, "val"))
        else:
            images = _members(tree, val_tar) if val_tar else file_samples(tree.origin, part.flat, [0] * len(part.flat))
            found = label_files.find(
                tree, [one.name for one in images], classes, [_last(one) for one in images], split="val"
            )
            if found is None:
                raise DataError(
                    f"{tree.path(val_tar) if val_tar else tree.root} holds {len(images)} validation images without "
                    f"labels; add {label_files.DEVKIT}.tar.gz, or a text file with a line FILE CLASS for each"
                )
            classes = classes or tuple(sorted(set(found.names)))
            number = {name: label for label, name in enumerate(classes)}
            if unknown := sorted(set(found.names) - set(number)):
                raise DataError(
                    f"{tree.root} has validation labels {some(unknown)}, which are no training classes; mend them"
                )
            labelled = (
                Sample(one.name, number[name], one.path, one.offset, one.length)
                for one, name in zip(images, found.names, strict=True)
            )
            splits["val"] = Samples(RangeColumns(labelled))
            told, metadata = f"WordNet ids, and {found.told}", found.metadata
        places["val"] = val_tar or some(folders["val"])
    others = [name for name in tree.called(_is_other) if name not in metadata]
    if others:
        unused[_NOT_USED] = others
    taken: dict[str, list[str]] = {}
    for file in (*filter(None, (train_tar, val_tar)), *files):
        folder, _, last = file.rpartition("/")
        taken.setdefault(folder, []).append(last)
    return Claim(
        "imagenet",
        "ImageNet as it is downloaded",
        classes,
        {split: samples.labels.tolist() for split, samples in splits.items()},
        places,
        f"{told}, in the order of their names",
        lambda spool: dict(splits),
        taken=dict(taken),
        metadata=metadata,
        unused=unused,
        notes=layout.notes,
    )


def _one(tree: Tree, wanted: str) -> str | None:
    found = tree.called(wanted.__eq__)
    if len(found) > 1:
        raise DataError(f"{tree.root} holds {wanted} twice, {some(found)}; leave one out with --ignore")
    return found[0] if found else None


def _is_other(name: str) -> bool:
    return (
        name.startswith("ILSVRC2012_") and name not in (TRAIN_TAR, VAL_TAR) and name.endswith((".tar", ".gz", ".tgz"))
    )


def _training(tree: Tree, name: str) -> tuple[tuple[str, ...], Samples]:
    path = tree.path(name)
    tars = sorted(tar_members(path), key=lambda member: member.name)
    for member in tars:
        if not member.name.endswith(".tar"):
            raise DataError(f"{path} holds {member.name}; expected a tar for every class, as ImageNet is distributed")
    samples = RangeColumns()
    for label, tar in enumerate(tars):
        images = sorted(tar_members(path, tar), key=lambda member: member.name)
        if not images:
            raise DataError(f"{path}, {tar.name} holds no image; download it again")
        samples.extend(_sample(path, tar.name, member, label) for member in images)
    return tuple(PurePosixPath(tar.name).stem for tar in tars), Samples(samples)


def _sample(path: object, inside: str, member: Member, label: int) -> Sample:
    if not is_image(member.name):
        raise DataError(f"{path}, {inside} holds {member.name}, which is no image; download it again")
    image = image_member(member, f"{path}")
    return Sample(f"{path}, {inside}, {image.name}", label, str(path), image.offset, image.length)


def _members(tree: Tree, name: str) -> list[Sample]:
    path = tree.path(name)
    found = []
    for member in sorted(tar_members(path), key=lambda member: member.name):
        if not is_image(member.name):
            raise DataError(f"{path} holds {member.name}, which is no image; download it again")
        image = image_member(member, path)
        found.append(Sample(f"{path}, {image.name}", 0, str(path), image.offset, image.length))
    return found


def _last(sample: Sample) -> str:
    return PurePosixPath(sample.name.rpartition(", ")[2]).name
