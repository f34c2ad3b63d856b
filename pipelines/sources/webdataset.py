"""WebDataset shards: tars whose members `KEY.jpg` and `KEY.cls` (or .json, .lab) belong together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from pipelines.base import DataError
from pipelines.sources.archive import Member, image_member, tar_members
from pipelines.sources.names import by_split
from pipelines.sources.sample import Listing, Sample
from pipelines.storage.source import IMAGE_SUFFIXES

_LABELS = (".cls", ".lab", ".json")
_JSON_KEYS = ("label", "cls", "class")
_MAX_LABEL = 1 << 20  # bytes of a member that holds a label


def shard_files(source: Path) -> list[Path]:
    """The tars of a folder, or of its split folders; a tar itself."""
    if source.is_file():
        return [source] if source.suffix == ".tar" else []
    return sorted([*source.glob("*.tar"), *source.glob("*/*.tar")])


def list_webdataset(source: Path) -> Listing:
    """The samples of all shards in the order of the tars. The classes are named by their numbers, or by the lines of
    a `classes.txt` beside the shards."""
    splits = {
        split: [sample for path in paths for sample in _list_shard(path)]
        for split, paths in by_split(source, shard_files(source)).items()
    }
    names = (source if source.is_dir() else source.parent) / "classes.txt"
    if names.exists():
        return Listing(tuple(names.read_text().splitlines()), dict(splits))
    count = 1 + max((sample.label for samples in splits.values() for sample in samples), default=-1)
    return Listing(tuple(str(label) for label in range(count)), dict(splits))


def _list_shard(path: Path) -> list[Sample]:
    samples: list[Sample] = []
    group: list[Member] = []
    key = None
    for member in tar_members(path):
        found = _key(member.name)
        if group and found != key:
            samples.append(_sample(path, group))
            group = []
        key = found
        group.append(member)
    if group:
        samples.append(_sample(path, group))
    return samples


def _key(name: str) -> str:
    """Everything before the first dot of the last part, as WebDataset has it."""
    place = PurePosixPath(name)
    return str(place.parent / place.name.split(".", 1)[0])


def _sample(path: Path, group: Sequence[Member]) -> Sample:
    suffix = {PurePosixPath(member.name).suffix.lower(): member for member in group}
    images = [member for extension, member in suffix.items() if extension in IMAGE_SUFFIXES]
    labels = [suffix[extension] for extension in _LABELS if extension in suffix]
    what = f"{path}, {group[0].name}"
    if len(images) != 1 or not labels:
        raise DataError(f"{what}: expected one image and a {', '.join(_LABELS)} member with the same name")
    image = image_member(images[0], path)
    return Sample(f"{path}, {image.name}", _label(path, labels[0]), str(path), image.offset, image.length)


def _label(path: Path, member: Member) -> int:
    if member.length > _MAX_LABEL:
        raise DataError(f"{path}, {member.name} has {member.length} bytes, too many for a label")
    content = Sample(member.name, 0, str(path), member.offset, member.length).read()
    try:
        if member.name.endswith(".lab"):
            if len(content) != 4:
                raise ValueError("not four bytes")
            return int.from_bytes(content, "little", signed=True)
        if member.name.endswith(".cls"):
            return int(content)
        described = json.loads(content)
        return int(next(described[key] for key in _JSON_KEYS if key in described))
    except (ValueError, TypeError, StopIteration) as error:
        raise DataError(f"{path}, {member.name} holds no class number: {content[:40]!r}") from error
