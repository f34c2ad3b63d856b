"""WebDataset shards: tars whose members `KEY.jpg` and `KEY.cls` (or .json, .lab) belong together."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from pipelines.base import DataError
from pipelines.sources.archive import Member, image_member, tar_members
from pipelines.sources.columns.samples import RangeColumns, Sample, Samples
from pipelines.sources.columns.tree import Tree, join, shown, some
from pipelines.sources.names import by_split, check_parts, is_image
from pipelines.sources.sample import UNSPLIT, Choice, Claim, check_class_names, number_classes, only_test
from pipelines.storage.json_files import bounded

_LABELS = (".cls", ".lab", ".json")
_JSON_KEYS = ("label", "cls", "class")
_NAME_KEYS = ("class_name", "classname", "label_name", "labelname", "class", "label", "cls")
"""Entries of a .json that may name a class, where they hold a word; the first that does counts."""
_MAX_LABEL = 1 << 20  # bytes of a member that holds a label
_MAX_DIGITS = 9
_INFO = ("_info.json", "info.json")
_MAX_INFO = 64 << 20
NAMES = "classes.txt"
_NUMBERED = re.compile(r"(.*?)(\d{1,9})(\D*\.tar)", re.IGNORECASE)


def claim_webdataset(tree: Tree, choice: Choice) -> Claim | None:
    """The samples of all tars in the order of their names; None where there is no tar.

    Classes are named by the lines of a `classes.txt` beside the shards, else by an entry of the samples' .json that
    names every class, else by their numbers.

    Raises:
        DataError: a shard is missing or damaged, a sample has no label, or more than one image.
    """
    tars = tree.called(lambda name: name.lower().endswith(".tar"))
    if not tars:
        return None
    if tree.single is None:
        check_parts(tree, tars)
    described, metadata = _info(tree, tars)
    splits = by_split(tree, tars)
    notes, unused, uses_test = _gaps(tars), dict[str, Sequence[str]](), False
    chosen: dict[str, list[str]] = {}
    if None in splits:
        chosen[UNSPLIT] = splits[None]
    else:
        chosen = {split: splits[split] for split in ("train", "val") if split in splits}
        if "test" in splits and ("val" not in chosen or choice.use_test) and not choice.held_out:
            if "val" in chosen:
                unused["validation images, as --use-test asks for the test split"] = chosen["val"]
            else:
                notes.append(f"{splits['test'][0]} becomes the validation split, as there is no other")
            chosen["val"], uses_test = splits["test"], True
        elif "test" in splits:
            unused["test images"] = splits["test"]
    if not chosen:
        raise only_test(shown(tree.root))
    members: dict[str, Counter[str]] = {}
    samples: dict[str, RangeColumns] = {}
    told: set[str] = set()
    named: dict[int, set[str]] = {}
    for split, names in chosen.items():
        members[split], samples[split] = Counter(), RangeColumns()
        for name in names:
            shard = _Shard(tree, name, choice, members[split], named)
            if not (own := shard.samples()):
                raise DataError(
                    f"{shown(shard.path)} holds no sample; download it again, or leave it out with --ignore"
                )
            samples[split].extend(own)
            told |= shard.told
    labels: dict[str, Sequence[int]] = {split: columns.labels for split, columns in samples.items()}
    names_file = [name for name in tree.folders.get("", ()) if name == NAMES]
    if names_file:
        path = tree.path(NAMES)
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8; save it as such, or leave it out with --ignore") from error
        classes = check_class_names(lines, f"{path}")
        metadata[NAMES] = "class names"
        named_by = f"named by {NAMES}"
    else:
        classes = number_classes(tree.root, labels)
        named_by = "classes by number"
        if named:
            told_names = _names(named, len(classes))
            if isinstance(told_names, str):
                notes.append(f"classes are named by their numbers, as the .json members {told_names}")
            else:
                classes, named_by = told_names, "classes in its order, named by .json"
    taken: dict[str, list[str]] = {}
    for name in (name for names in chosen.values() for name in names):
        folder, _, last = name.rpartition("/")
        taken.setdefault(folder, []).append(last)
    known = set(tree.called(lambda name: name.endswith((".parquet", "_stats.json", ".csv"))))
    for name in tars:  # img2dataset describes the images of each tar in a table and a file beside it
        for beside in (f"{name[:-4]}.parquet", f"{name[:-4]}_stats.json", f"{name[:-4]}.csv"):
            if beside in known:
                metadata[beside] = "a description of the tar beside it"
    return Claim(
        "webdataset",
        described,
        classes,
        labels,
        {split: some(names) for split, names in chosen.items()},
        f"{' or '.join(sorted(told))} in each sample, {named_by}",
        lambda spool: {split: Samples(columns) for split, columns in samples.items()},
        taken=dict(taken),
        metadata=metadata,
        unused=unused,
        notes=notes,
        uses_test=uses_test,
        members=members,
    )


def _names(named: Mapping[int, set[str]], num_classes: int) -> tuple[str, ...] | str:
    """Classes by their numbers, as samples name them; of namesakes, each is followed by its number. Or why they cannot
    be named so: the rest of a sentence."""
    if (first := next((number for number in range(num_classes) if number not in named), None)) is not None:
        return f"name {len(named)} of {num_classes} classes, not {first}"
    if several := [(number, sorted(names)) for number, names in sorted(named.items()) if len(names) > 1]:
        number, names = several[0]
        return f"name class {number} both {names[0]!r} and {names[1]!r}"
    found = [next(iter(named[number])) for number in range(num_classes)]
    counts = Counter(found)
    told = [f"{name} ({number})" if counts[name] > 1 else name for number, name in enumerate(found)]
    try:
        return check_class_names(told, "it")
    except DataError as error:
        return f"hold one that is none: {error}"


def _gaps(tars: Sequence[str]) -> list[str]:
    """A sentence for every row of numbered shards that does not have all its numbers: some may be missing."""
    rows: dict[tuple[str, int, str], set[int]] = {}
    for name in tars:
        if match := _NUMBERED.fullmatch(name):
            rows.setdefault((match[1], len(match[2]), match[3]), set()).add(int(match[2]))
    notes = []
    for (before, digits, after), there in rows.items():
        missing = next((number for number in range(min(there), max(there)) if number not in there), None)
        if missing is not None and len(there) > 1:
            notes.append(
                f"{before}{missing:0{digits}d}{after} is not there: {len(there)} shards from "
                f"{min(there)} to {max(there)}"
            )
    return notes


def _info(tree: Tree, tars: Sequence[str]) -> tuple[str, dict[str, str]]:
    """timm's list of the shards, if there is one: all that it names must be there."""
    found = tree.called(_INFO.__contains__)
    for name in found:
        path = tree.path(name)
        files = _shard_names(path)
        if files is None:
            continue
        folder = name.rpartition("/")[0]
        if missing := [one for one in files if join(folder, one) not in set(tars)]:
            raise DataError(
                f"{shown(path)} lists the shard {missing[0]!r}, one of {len(missing)} that are not there; download it "
                "again, or leave the list out with --ignore"
            )
        return "WebDataset tars as timm keeps them", {name: "the list of the shards"}
    return "WebDataset tars", {}


def _shard_names(path: Any) -> list[str] | None:
    if (content := bounded(path, _MAX_INFO)) is None:
        return None
    try:
        splits = json.loads(content)["splits"]
        names = [name for split in splits.values() for name in split["filenames"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # some other program's
    return names if all(isinstance(name, str) for name in names) else None


class _Shard:
    """One tar."""

    def __init__(
        self, tree: Tree, name: str, choice: Choice, members: Counter[str], named: dict[int, set[str]]
    ) -> None:
        self.path, self.choice, self.members, self.named = tree.path(name), choice, members, named
        self.told: set[str] = set()
        """Members that hold the labels, by suffix."""

    def samples(self) -> list[Sample]:
        found: list[Sample] = []
        group: list[Member] = []
        key, seen = None, set[str]()
        for member in tar_members(self.path):
            last = member.name.rpartition("/")[2]
            if last.startswith("._") or "__MACOSX/" in member.name:
                self.members["left by an operating system"] += 1
                continue
            its = _key(member.name)
            if its != key:
                if group:
                    found.append(self._sample(group))
                    group = []
                if its in seen:
                    raise DataError(
                        f"{shown(self.path)} has members of the sample {its!r} in two places; pack it so that they "
                        "follow each other"
                    )
                seen.add(its)
                key = its
            group.append(member)
        if group:
            found.append(self._sample(group))
        return found

    def _sample(self, group: Sequence[Member]) -> Sample:
        what = f"{shown(self.path)}, {group[0].name}"
        by_extension: dict[str, Member] = {}
        for member in group:
            extension = _extension(member.name)
            if extension in by_extension:
                raise DataError(
                    f"{shown(self.path)} has two members {by_extension[extension].name} and {member.name} of one "
                    f"sample, {_key(member.name)!r}: what is before the first dot; rename them"
                )
            by_extension[extension] = member
        images = {extension: one for extension, one in by_extension.items() if is_image(one.name)}
        if self.choice.images is not None:
            wanted = self.choice.images.lower().lstrip(".")
            images = {extension: one for extension, one in by_extension.items() if extension == wanted}
        if len(images) != 1:
            hint = f"; say which with --images {next(iter(images))}" if images else ""
            told = some(list(images)) if images else "none"
            raise DataError(
                f"{what}: expected one image in a sample, found {told}{hint or '; repair the tar, or --ignore it'}"
            )
        exact = [by_extension[suffix[1:]] for suffix in _LABELS if suffix[1:] in by_extension]
        labels = exact or [one for suffix in _LABELS for one in group if one.name.lower().endswith(suffix)]
        if not exact and len(labels) > 1:
            raise DataError(
                f"{what}: two members may hold the class, {labels[0].name} and {labels[1].name}; call one of them "
                f"{_key(group[0].name)}.cls"
            )
        if self.choice.label is not None:
            labels = [one for one in group if one.name.lower().endswith(".json")]
            if len(labels) != 1:
                raise DataError(
                    f"{what}: --label {self.choice.label} names an entry of a .json member, and its sample has "
                    f"{len(labels)} of them; leave --label out, or repair the tar"
                )
        if not labels:
            raise DataError(
                f"{what}: expected a {', '.join(_LABELS)} member with the class beside the image; pack one, as pss "
                "trains on labels"
            )
        (image,) = images.values()
        for extension in by_extension:
            self.members[f".{extension}"] += 1
        image_member(image, self.path)
        label, name = _label(self.path, labels[0], self.choice.label)
        beside = by_extension.get("json")
        if name is None and label not in self.named and beside is not None and labels[0] is not beside:
            name = _name_beside(self.path, beside)
        if name is not None:
            self.named.setdefault(label, set()).add(name)
        self.told.add(PurePosixPath(labels[0].name).suffix.lower())
        return Sample(f"{shown(self.path)}, {image.name}", label, str(self.path), image.offset, image.length)


def _key(name: str) -> str:
    """Everything before the first dot of the last part, as WebDataset has it."""
    place = PurePosixPath(name)
    return str(place.parent / place.name.split(".", 1)[0])


def _extension(name: str) -> str:
    """Everything behind it."""
    return PurePosixPath(name).name.partition(".")[2].lower()


def _label(path: Any, member: Member, key: str | None) -> tuple[int, str | None]:
    """The number of a class, and its name where the member tells it."""
    if member.length > _MAX_LABEL:
        raise DataError(f"{shown(path)}, {member.name} has {member.length} bytes, too many for a label; repair the tar")
    content = Sample(member.name, 0, str(path), member.offset, member.length).read()
    try:
        if member.name.lower().endswith(".lab"):
            if len(content) != 4:
                raise ValueError("not four bytes")
            return int.from_bytes(content, "little", signed=True), None
        if member.name.lower().endswith(".cls"):
            return _number(content.decode("ascii").strip()), None
        described = json.loads(content)
        values = [described[name] for name in (_JSON_KEYS if key is None else (key,)) if name in described]
        numbers = [value for value in values if type(value) is int] or [_number(str(value)) for value in values]
        first = numbers[0]
        if len(set(numbers)) == 1:  # beside the number of a class, its name is no contradiction
            return first, _name_in(described)
    except (ValueError, TypeError, IndexError, RecursionError) as error:
        raise DataError(
            f"{shown(path)}, {member.name} holds no class number: {content[:40]!r}; repair the tar, or name its entry "
            "with --label"
        ) from error
    raise DataError(
        f"{shown(path)}, {member.name} has several entries that may be the label, and they differ: {content[:40]!r}; "
        "say which with --label"
    )


def _name_in(described: Mapping[str, Any]) -> str | None:
    """What a sample's .json calls its class; None where it has only a number."""
    words = [described[key] for key in _NAME_KEYS if isinstance(described.get(key), str)]
    return next((word for word in words if word.strip() and not re.fullmatch(r"-?[0-9]+", word)), None)


def _name_beside(path: Any, member: Member) -> str | None:
    """The same of a .json that the class is not read from; None where it says nothing of the kind."""
    if member.length > _MAX_LABEL:
        return None
    try:
        described = json.loads(Sample(member.name, 0, str(path), member.offset, member.length).read())
    except (ValueError, RecursionError):
        return None
    return _name_in(described) if isinstance(described, dict) else None


def _number(text: str) -> int:
    return int(text if re.fullmatch(rf"-?[0-9]{{1,{_MAX_DIGITS}}}", text) else "no class number")
