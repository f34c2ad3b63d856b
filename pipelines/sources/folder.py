"""Images in class folders, however deep, and flat folders of images that a text file labels.

train|val|test/CLASS/*.jpg, CLASS/*.jpg, tiny-imagenet-200, Food-101, CUB-200-2011, Places365, ImageNet-100, ImageNetV2,
Kaggle's ILSVRC/Data/CLS-LOC, and what Roboflow and Kaggle export are all of this kind.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from pipelines.base import DataError
from pipelines.sources import labels as label_files
from pipelines.sources.columns.names import FullNames, packed
from pipelines.sources.columns.samples import file_samples
from pipelines.sources.columns.tree import Tree, and_above, join, pattern_of, shown, some
from pipelines.sources.names import is_image, order_classes, order_in_words, split_of
from pipelines.sources.sample import UNSPLIT, Choice, Claim, only_test, ordered_files

_PLACES = {"data_256": "train", "data_large": "train"}  # Places365 calls its training images so
_PLAIN = frozenset(("images", "image", "imgs", "img", "jpg", "jpeg", "jpegs", "png", "photos", "pictures", "data"))
"""What a folder of images is called that is no class."""
_BESIDE = re.compile(r"ILSVRC2012_(devkit|bbox)_\w+\.(tar\.gz|tgz|tar)")


@dataclass
class Part:
    """The images of one split."""

    folders: list[str]
    classes: dict[str, FullNames] = field(default_factory=dict)
    """Full names of files by class; empty for a flat folder."""
    flat: list[str] = field(default_factory=list)
    """Full names of the images of a folder without class folders, sorted."""

    @property
    def images(self) -> Sequence[str]:
        found = FullNames.of(self.flat)
        for names in self.classes.values():
            found.extend(names)
        return found


class Layout:
    """Where in a tree the images are."""

    def __init__(self, tree: Tree, choice: Choice) -> None:
        self.tree, self.choice = tree, choice
        self.named = 0
        """Files that are images because `choice.images` says so."""
        self.images = {
            folder: found for folder, names in tree.folders.items() if (found := self._images(folder, names))
        }
        self.populated = {above for folder in self.images for above in and_above(folder)}
        self.notes: list[str] = []

    def _images(self, folder: str, names: Sequence[str]) -> Sequence[str]:
        found = [name for name in names if is_image(name)]
        if (pattern := self.choice.images) is not None:
            fits = {n for n in names if fnmatchcase(n, pattern) or fnmatchcase(join(folder, n), pattern)}
            self.named += len(fits.difference(found))
            found = sorted(fits.union(found))
        return names if len(found) == len(names) else packed(found)  # the same names cost nothing

    def shown(self, name: str) -> str:
        return shown(self.tree.path(name) if name else self.tree.root)

    def children(self, folder: str) -> list[str]:
        """The folders in `folder` with images in them or below."""
        return [child for child in self.tree.children(folder) if child in self.populated]

    def below(self, folder: str) -> list[str]:
        """All images in `folder` and below, as full names."""
        return [join(one, name) for one in self.tree.below(folder) for name in self.images.get(one, ())]

    def taken(self, left: Iterable[str]) -> dict[str, Sequence[str]]:
        """All images by folder, but those that are left out."""
        gone = set(left)
        some_gone = {name.rpartition("/")[0] for name in gone}
        return {
            folder: [name for name in names if join(folder, name) not in gone] if folder in some_gone else names
            for folder, names in self.images.items()
        }

    def base(self) -> str:
        """The folder whose folders are splits or classes: down through folders that hold nothing else."""
        at = ""
        while not self.images.get(at) and len(children := self.children(at)) == 1:
            (child,) = children
            if self._word(child) or (self.images.get(child) and not self.is_plain(child)):
                break
            at = child
        return at

    def is_plain(self, folder: str) -> bool:
        """Whether it holds images, no folders of them, and its name is that of no class."""
        above, last = folder.split("/")[-2:] if "/" in folder else ("", folder)
        plain = last.lower() in _PLAIN or last == above
        return plain and not self.children(folder) and self.choice.class_level is None

    def _word(self, folder: str) -> str | None:
        last = folder.rpartition("/")[2]
        return _PLACES.get(last.lower()) or split_of(last)

    def splits(self, base: str) -> dict[str, list[str]] | None:
        """The folders of `base` by `train`, `val` and `test`; None if they are no splits."""
        children = self.children(base)
        if self.choice.class_level == 1 and not any(self.children(child) for child in children):
            return None
        decided = self.choice.one_split or self.choice.class_level is not None
        if decided and not all(map(self.word_or_none, children)):
            return None
        words = {child: self.word_or_none(child) for child in children}
        named = [child for child, word in words.items() if word]
        if not named:
            return None
        if others := [child for child, word in words.items() if not word]:
            raise DataError(
                f"{self.shown(named[0])} is called like a split and {self.shown(others[0])} beside it like a class; "
                f"leave one out with --ignore, or give --class-level 1 if all are classes"
            )
        found: dict[str, list[str]] = {}
        for child in named:
            found.setdefault(str(self._word(child)), []).append(child)
        for split, folders in found.items():
            if len({re.sub(r"\d+", "", folder) for folder in folders}) > 1:
                raise DataError(
                    f"{self.tree.root} has two folders for {split}: {some(folders)}; leave one out with --ignore, or "
                    "give --class-level 1 if they are classes"
                )
        return found

    def word_or_none(self, folder: str) -> str | None:
        try:
            return self._word(folder)
        except DataError:
            return None

    def part(self, folders: list[str], known: Iterable[str] = ()) -> Part:
        """What the folders of one split hold; `known` are the classes of the training split."""
        part = Part(folders)
        for folder in folders:
            direct, children = self.images.get(folder, []), self.children(folder)
            if direct and children:
                raise DataError(
                    f"{self.shown(join(folder, direct[0]))} lies beside the class folders of {self.shown(folder)}"
                    f"{f', with {len(direct) - 1} more' if len(direct) > 1 else ''}; move it, or leave it out with "
                    "--ignore"
                )
            if not direct and len(children) == 1 and not self.children(children[0]):
                name = children[0].rpartition("/")[2]
                if self.is_plain(children[0]) or (known and name not in known):  # tiny-imagenet-200: val/images
                    folder, direct = children[0], self.images[children[0]]
            if direct:
                part.flat += [join(folder, name) for name in direct]
            else:
                for name, files in self._classes(folder, children).items():
                    part.classes.setdefault(name, FullNames()).extend(files)
        if part.flat and part.classes:
            raise DataError(
                f"{some(folders)} in {self.tree.root}: some hold class folders, others images; --ignore some"
            )
        part.flat.sort()
        return part

    def _classes(self, folder: str, children: list[str]) -> dict[str, FullNames]:
        level = self.choice.class_level or self._level(folder, children)
        found: dict[str, FullNames] = {}
        start = len(folder) + 1 if folder else 0
        for one in self.tree.below(folder):
            if one in self.images:
                parts = one[start:].split("/")
                if level > len(parts):
                    raise DataError(
                        f"{self.shown(one)} holds images less than {level} folders below {self.shown(folder)}; lower "
                        "--class-level, or leave it out with --ignore"
                    )
                name = "/".join(parts if level == 0 else parts[:level])
                found.setdefault(name, FullNames()).add(one, self.images[one])
        empty = [one for one in self.tree.children(folder) if one not in self.populated]
        if empty and self.choice.class_level is None and level == 1:
            raise DataError(
                f"class folder {self.shown(empty[0])} holds no image that is read; add some, or leave it out with "
                "--ignore"
            )
        return found

    def _level(self, folder: str, children: list[str]) -> int:
        """Which folder below `folder` is the class; 0: the last one, whatever its depth."""
        nested = [child for child in children if self.children(child)]
        if not nested:
            return 1
        if not any(self.images.get(child) for child in children):
            if len({tuple(one.rpartition("/")[2] for one in self.children(child)) for child in children}) == 1:
                (first, *more) = self.children(children[0])
                if not more and not self.children(first):  # CLASS/images/*.jpg everywhere
                    return 1
            if all(self._of_letter(child) for child in children):
                return 0  # Places365: a/airfield, a/apartment_building/outdoor
        elif all(self.images.get(child) for child in nested):
            below = sum(len(self.below(child)) - len(self.images[child]) for child in nested)
            self.notes.append(
                f"{below} images lie in folders below a class folder and are of that class: "
                f"{some([one for child in nested for one in self.children(child)])}"
            )
            return 1
        deep = nested[0]
        raise DataError(
            f"{self.shown(self.children(deep)[0])} holds images two folders below {self.shown(folder)}: is the class "
            f"{deep.rpartition('/')[2]!r} or {self.children(deep)[0].rpartition('/')[2]!r}? Say --class-level 1 or 2, "
            "or leave folders out with --ignore"
        )

    def _of_letter(self, child: str) -> bool:
        letter = child.rpartition("/")[2].lower()
        return len(letter) == 1 and all(
            one.rpartition("/")[2].lower().startswith(letter) for one in self.children(child)
        )


def claim_folders(tree: Tree, choice: Choice) -> Claim | None:
    """What class folders or flat folders with a label file hold; None where there is no image.

    Raises:
        DataError: more than one reading is possible, or a part of the images would be left out.
    """
    layout = Layout(tree, choice)
    if not layout.images:
        return None
    if choice.images is not None and not layout.named:
        raise DataError(
            f"--images {choice.images} fits no file of {layout.shown('')} but images that are read anyway; mend the "
            "pattern, or leave it out (--ignore leaves images out)"
        )
    base = layout.base()
    folders = layout.splits(base)
    if folders is None:
        return _claim_unsplit(layout, base)
    if direct := layout.images.get(base):
        raise DataError(
            f"{layout.shown(join(base, direct[0]))} lies beside the folders of the splits"
            f"{f', with {len(direct) - 1} more' if len(direct) > 1 else ''}; move it, or leave it out with --ignore "
            f"{pattern_of(join(base, direct[0]))}"
        )
    train = layout.part(folders["train"]) if "train" in folders else None
    labelled = Labelled(layout, ())
    if train is not None:
        labelled.classes = labelled.order(train)
    known = labelled.classes
    val, test = (layout.part(folders[split], known) if split in folders else None for split in ("val", "test"))
    parts = {"train": train} if train is not None else {}
    unused: dict[str, Sequence[str]] = {}
    if test is not None:
        if choice.use_test or (val is None and not choice.held_out and (test.classes or labelled.can(test))):
            if val is not None:
                unused["validation images, as --use-test asks for the test split"] = val.images
            elif not choice.use_test:
                layout.notes.append(f"{some(test.folders)} becomes the validation split, as there is no other")
            val = test
        else:
            why = "test images" if test.classes else "test images without labels"
            unused[why] = test.images
    if val is not None:
        parts["val"] = val
    if not parts:
        raise only_test(layout.shown("")) if test is None or test.classes else _no_label(layout, test)
    for child in tree.children(base):
        if child not in layout.populated and split_of(child.rpartition("/")[2]):
            layout.notes.append(f"{child} is called like a split and holds no image")
    claim = claim_parts(layout, parts, labelled, unused)
    claim.uses_test = val is not None and val is test
    return claim


def claim_parts(
    layout: Layout, parts: Mapping[str, Part], labelled: Labelled, unused: dict[str, Sequence[str]]
) -> Claim:
    """A claim on the images of `parts`, by `train` and `val`."""
    tree, classes = layout.tree, labelled.classes
    names = {split: part.images for split, part in parts.items()}
    told = ["folders"] if any(part.classes for part in parts.values()) else []
    if not classes:
        classes = labelled.order(next(iter(parts.values())))
    splits: dict[str, Sequence[int]] = {}
    for split, part in parts.items():
        if part.flat:
            found = labelled.of(part)
            number = {name: label for label, name in enumerate(classes)}
            splits[split] = [number[name] for name in found.names]
            told.append(found.told)
        else:
            names[split], splits[split] = ordered_files(tree.root, part.classes, classes, split)
    if len(classes) == 1:
        layout.notes.append(f"there is one class only, {classes[0]}")
    if beside := [name for name in tree.called(_BESIDE.fullmatch) if name not in labelled.metadata]:
        unused["another archive of ImageNet"] = beside
    return Claim(
        "folders",
        "class folders" if all(part.classes for part in parts.values()) else "folders of images",
        classes,
        dict(splits),
        {split: some([one or "." for one in part.folders]) for split, part in parts.items()},
        f"{', and '.join(dict.fromkeys(told))}, in the order of {order_in_words(classes, layout.choice.class_order)}",
        lambda spool: {split: file_samples(tree.origin, names[split], labels) for split, labels in splits.items()},
        taken=layout.taken([name for left in unused.values() for name in left]),
        metadata=dict(labelled.metadata),
        unused=unused,
        notes=layout.notes,
    )


class Labelled:
    """The labels of flat folders, from the text files of a tree."""

    def __init__(self, layout: Layout, classes: tuple[str, ...]) -> None:
        self.layout, self.classes = layout, classes
        self.metadata: dict[str, str] = {}
        self._found: dict[str, label_files.Found] = {}

    def can(self, part: Part) -> bool:
        """Whether there are labels for it."""
        try:
            self.of(part)
        except DataError:
            return False
        return True

    def of(self, part: Part) -> label_files.Found:
        """The class of every image; `DataError` where no file says it, or several say different things."""
        key = part.folders[0]
        if key not in self._found:
            own = {name.rpartition("/")[0] for name in part.flat}
            asked = {name.rpartition("/")[2] for name in part.flat}
            elsewhere = (names for folder, names in self.layout.images.items() if folder not in own)
            others = {name for names in elsewhere for name in names if name in asked}
            split = self.layout.word_or_none(key)
            found = label_files.find(self.layout.tree, part.flat, self.classes, split=split, others=others)
            if found is None:
                raise _no_label(self.layout, part)
            self._found[key] = found
            self.metadata |= found.metadata
        return self._found[key]

    def order(self, part: Part) -> tuple[str, ...]:
        """The classes that its labels name, where nothing else does."""
        order, root = self.layout.choice.class_order, self.layout.tree.root
        if not part.flat:
            return order_classes(part.classes, order, root)
        found = self.of(part)
        names = dict.fromkeys(found.names)
        if len(names) == len(part.flat) > 2:
            raise DataError(
                f"{found.told} in {self.layout.shown('')} gives each of the {len(names)} images in "
                f"{self.layout.shown(part.folders[0])} a class of its own, so it names something else; leave it out "
                "with --ignore, and add a text file with a line FILE CLASS for each"
            )
        return order_classes(names, order, root)


def _no_label(layout: Layout, part: Part) -> DataError:
    folder = part.flat[0].rpartition("/")[0]
    return DataError(
        f"{layout.shown(folder)} holds {len(part.flat)} images without class folders, and no text file labels them, "
        "with a line FILE CLASS for each; add one (for ImageNet, ILSVRC2012_devkit_t12.tar.gz), or put them into class "
        f"folders{f', or leave them out with --ignore {pattern_of(folder)}' if folder else ''}"
    )


def _claim_unsplit(layout: Layout, base: str) -> Claim:
    tree, choice = layout.tree, layout.choice
    part = layout.part([base])
    if part.flat:
        words = {layout.word_or_none(name.rpartition("/")[2]) for name in part.flat}
        return claim_parts(layout, {"val" if words == {"val"} else UNSPLIT: part}, Labelled(layout, ()), {})
    if len(part.classes) == 1 and choice.class_level is None:
        flat = Part([base], flat=sorted(part.images))
        if (labelled := Labelled(layout, ())).can(flat):
            return claim_parts(layout, {UNSPLIT: flat}, labelled, {})
    classes = order_classes(part.classes, choice.class_order, tree.root)
    lists = None if choice.one_split or choice.held_out else label_files.split_lists(tree, base, part.images)
    labelled = Labelled(layout, classes)
    if lists is None:
        return claim_parts(layout, {UNSPLIT: part}, labelled, {})
    labelled.metadata |= lists.metadata
    layout.notes.append(f"splits are those of {lists.told}; its test images are the validation split")
    parts = {split: Part([base], own) for split, own in lists.divided(part.classes).items()}
    claim = claim_parts(layout, parts, labelled, {})
    claim.uses_test = True
    return claim
