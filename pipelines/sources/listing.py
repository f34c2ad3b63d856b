"""What a source is: every reader says what it would make of it, and exactly one of them must account for all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipelines.base import DataError
from pipelines.remote.mirror import Reach
from pipelines.remote.store import is_url
from pipelines.sources.arrays import claim_cifar, claim_digits
from pipelines.sources.columns.samples import Sample
from pipelines.sources.columns.tree import HIDDEN, LITTER, Tree, join, list_tree, pattern_of, shown, some
from pipelines.sources.elsewhere import called, list_store
from pipelines.sources.folder import claim_folders
from pipelines.sources.imagenet import claim_imagenet
from pipelines.sources.names import kind_of, looks_like_image, suffix_of
from pipelines.sources.sample import UNSPLIT, Choice, Claim, Listing, Spool, check_labels
from pipelines.sources.tables import claim_parquet, claim_saved
from pipelines.sources.webdataset import claim_webdataset
from pipelines.storage.manifest import FORMAT, MANIFEST

__all__ = ["DIGITS", "FORMATS", "Choice", "Claim", "Inspected", "Listing", "Sample", "Spool", "inspect"]

DIGITS = "digits"

FORMATS: Mapping[str, Callable[[Tree, Choice], Claim | None]] = {
    "imagenet": claim_imagenet,
    "cifar": claim_cifar,
    "arrow": claim_saved,
    "parquet": claim_parquet,
    "webdataset": claim_webdataset,
    "folders": claim_folders,
}
"""Every reader, by the name that `--source-format` takes."""

_SHARES = {"imagenet": ("webdataset", "folders")}
"""Readers that another one stands for: ImageNet's archives are tars, and may have class folders beside them."""
_READS = {
    "class_order": ("folders", "imagenet"),
    "class_level": ("folders", "imagenet"),
    "images": ("folders", "imagenet", "parquet", "arrow", "webdataset"),
    "label": ("parquet", "arrow", "webdataset"),
    "use_test": ("folders", "parquet", "arrow", "webdataset"),
}
_UNPACK = {
    ".zip": "unzip", ".7z": "7z x", ".rar": "unrar x", ".tgz": "gunzip", ".gz": "gunzip", ".bz2": "bunzip2",
    ".xz": "unxz", ".zst": "unzstd", ".lz4": "unlz4",
}  # fmt: skip
_NOT_DATA = "neither images nor labels"
_EXPECTED = (_NOT_DATA, HIDDEN, LITTER)
_NAMED = 100  # of each rule, in the manifest


@dataclass(frozen=True)
class Inspected:
    """A source as its one reader sees it, with an account of every file."""

    source: str
    claim: Claim
    found: int = 0
    """Entries that the listing has seen."""
    rest: dict[str, list[str]] = field(default_factory=dict)
    """By rule: what is neither read nor used."""
    tree: Tree | None = None
    """Where it has been found; None of a built-in set."""

    @property
    def holding(self) -> int:
        """Files that hold samples."""
        return sum(map(len, self.claim.taken.values()))

    def listing(self, spool: Spool) -> Listing:
        """All samples."""
        if self.tree is None or self.tree.address is None:
            return Listing(self.claim.classes, self.claim.read(spool))
        spool.told = self.tree.told
        with _naming(self.tree):
            samples = self.claim.read(spool)
        return Listing(self.claim.classes, {split: some.renamed(self.tree.told) for split, some in samples.items()})

    def remove_copies(self) -> None:
        """Delete what was copied of a source elsewhere: nobody reads its samples any more."""
        if self.tree is not None and self.tree.mirror is not None:
            self.tree.mirror.remove()

    def account(self) -> dict[str, Any]:
        """For the manifest: the numbers of `files` add up to `found`."""
        claim = self.claim
        return {
            "format": claim.format,
            "files": {
                "found": self.found,
                "with_samples": self.holding,
                "metadata": dict(sorted(claim.metadata.items())),
                "not_read": {
                    rule: {"count": len(names), "names": names[:_NAMED]} for rule, names in sorted(self.rest.items())
                },
            },
            "samples": {split: len(labels) for split, labels in claim.splits.items()},
            "members": {split: dict(sorted(found.items())) for split, found in claim.members.items()},
        }

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        claim = self.claim
        return {
            "source": self.source,
            "layout": claim.described,
            "classes": list(claim.classes),
            "labels": claim.labels,
            "splits": {
                split: {"samples": len(labels), "where": claim.places[split], "per_class": claim.counts(split)}
                for split, labels in claim.splits.items()
            },
            "notes": claim.notes,
            **self.account(),
        }

    def in_words(self) -> list[str]:
        """A few lines for a screen."""
        claim, classes = self.claim, [shown(name) for name in self.claim.classes]
        lines = [f"{shown(self.source)}: {claim.described}"]
        for split, labels in claim.splits.items():
            name = "images" if split == UNSPLIT else split
            lines.append(
                f"  {name:<9}{len(labels):,} in {len(set(labels)):,} classes, from {shown(claim.places[split]) or '.'}"
            )
        named = f"{classes[0]}, {classes[1]}, … {classes[-1]}" if len(classes) > 3 else ", ".join(classes)
        lines.append(f"  classes  {len(classes):,}: {named} (labels 0 to {len(classes) - 1:,})")
        lines.append(f"  labels   {shown(claim.labels)}")
        if self.found:
            lines.append(f"  files    {self.account_in_words()}")
        for rule, names in sorted(self.rest.items(), key=lambda item: (item[0] in _EXPECTED, item[0])):
            lines.append(f"           {rule}: {shown(some(names))}")
        return [*lines, *(f"  note     {shown(note)}" for note in claim.notes)]

    def account_in_words(self) -> str:
        """One line in which the numbers add up."""
        parts = [f"{self.holding:,} with samples"]
        if self.claim.metadata:
            parts.append(f"{len(self.claim.metadata):,} used ({shown(some(list(self.claim.metadata)))})")
        if rest := sum(map(len, self.rest.values())):
            parts.append(f"{rest:,} not read")
        return f"{self.found:,} found: {' + '.join(parts)}"


def inspect(
    source: str, choice: Choice, ignore: Sequence[str] = (), follow_links: bool = False, reach: Reach | None = None
) -> Inspected:
    """Everything in `source`: the word "digits", a file, a folder, or an address, which `reach` is for.

    Raises:
        StoreError: what lies elsewhere cannot be listed or fetched.
        DataError: nobody can read it, more than one reader can, or a part of the data would be left out.
    """
    if source == DIGITS:
        if ignore:
            raise DataError(f"--ignore {ignore[0]} is for folders; leave it out")
        return _checked(Inspected(source, claim_digits()), choice)
    given, source = source, called(source) if is_url(source) else source
    if is_url(source):
        if follow_links:
            raise DataError(f"--follow-links is for folders of this machine, and {shown(source)} is none; leave it out")
        return _inspected(list_store(given, choice, ignore, reach or Reach()), source, choice)
    path = Path(source)
    if not path.exists():
        what = "file or folder" if path.suffix else "folder"
        raise DataError(f"there is no {what} {shown(path)}; name one that holds images, or the word digits")
    if not path.is_dir() and not path.is_file():
        raise DataError(f"{shown(path)} is no file or folder; name one that holds images")
    return _inspected(list_tree(path, ignore, follow_links), source, choice)


def _inspected(tree: Tree, source: str, choice: Choice) -> Inspected:
    with _naming(tree):
        _refuse_converted(tree)
        if tree.mirror is not None:
            tree.mirror.fetch()
        claim = _only_claim(tree, choice)
        rest = _rest(tree, claim, choice)
    told = replace(
        claim,
        places={split: tree.told(place) for split, place in claim.places.items()},
        labels=tree.told(claim.labels),
        notes=[tree.told(note) for note in claim.notes],
    )
    return _checked(Inspected(source, told, tree.found, rest, tree), choice)


@contextmanager
def _naming(tree: Tree) -> Iterator[None]:
    """Within, errors name a source elsewhere by its address."""
    try:
        yield
    except DataError as error:
        if (told := tree.told(str(error))) == str(error):
            raise
        raise type(error)(told) from error
    except OSError as error:
        if isinstance(error.filename, str):
            error.filename = tree.told(error.filename)
        raise


def _checked(inspected: Inspected, choice: Choice) -> Inspected:
    claim = inspected.claim
    for name, readers in _READS.items():
        if getattr(choice, name) not in (None, False) and claim.format not in readers:
            raise DataError(
                f"--{name.replace('_', '-')} means nothing for {claim.described}; leave it out (it is for "
                f"{', '.join(readers)})"
            )
    if choice.use_test and not claim.uses_test:
        raise DataError(f"--use-test asks for test images, and {shown(inspected.source)} has none; leave it out")
    check_labels(claim, shown(inspected.source))
    return inspected


def _refuse_converted(tree: Tree) -> None:
    for folder, names in tree.folders.items():
        if MANIFEST in names and _is_ours(tree, join(folder, MANIFEST)):
            if not folder:
                raise DataError(f"{shown(tree.root)} has been converted already; convert its original source")
            raise DataError(
                f"{shown(tree.path(folder))} in the source is a data set of pss-convert; move it away, or leave it out "
                f"with --ignore {shown(folder)}"
            )


def _is_ours(tree: Tree, name: str) -> bool:
    """Another program may call a file so."""
    try:
        return f'"format": "{FORMAT}"'.encode() in tree.head(name, 256)
    except OSError:
        return False


def _only_claim(tree: Tree, choice: Choice) -> Claim:
    readers = FORMATS if choice.format is None else {choice.format: FORMATS[choice.format]}
    claims: list[Claim] = []
    errors: list[DataError] = []
    done: set[str] = set()
    for name, reader in readers.items():
        if name in done:
            continue
        try:
            if (claim := reader(tree, choice)) is None:
                continue
        except DataError as error:
            errors.append(error)
        else:
            claims.append(claim)
        done.update(_SHARES.get(name, ()))
    if len(claims) > 1:
        both = " and ".join(f"{claim.described} ({_example(claim)})" for claim in claims[:2])
        raise DataError(
            f"{shown(tree.root)} holds {both}; say which with --source-format {claims[0].format} or "
            f"{claims[1].format}, or leave one out with --ignore"
        )
    if errors and claims:
        raise DataError(
            f"{shown(tree.root)} holds {claims[0].described} ({_example(claims[0])}), and more: {errors[0]}; or say "
            f"--source-format {claims[0].format}"
        )
    if errors:
        raise errors[0]
    if claims:
        return claims[0]
    where = shown(tree.root if tree.single is None else tree.path(tree.single))
    if choice.format is None and (data := _unclaimed(tree, {})):
        raise _left_out(tree, data)
    if choice.format is not None:
        raise DataError(
            f"{where} holds nothing that --source-format {choice.format} reads; leave it out to try all of them"
        )
    if tree.single is not None:
        raise DataError(f"{where} is no source that can be read; use .parquet, .tar, or an archive of CIFAR")
    raise DataError(
        f"{where} holds no image that is read; expected <class>/*.jpg, tars, Parquet, or another known layout"
    )


def _example(claim: Claim) -> str:
    return shown(next(join(folder, names[0]) for folder, names in claim.taken.items() if names))


def _rest(tree: Tree, claim: Claim, choice: Choice) -> dict[str, list[str]]:
    """Everything else in the source, by rule. Raises `DataError` for data that nobody has claimed."""
    rest: dict[str, list[str]] = {rule: list(names) for rule, names in tree.ignored.items()}
    known = set(claim.metadata)
    for rule, names in claim.unused.items():
        rest.setdefault(rule, []).extend(names)
        known.update(names)
    data = _unclaimed(tree, claim.taken, known)
    if data and choice.format is None:
        raise _left_out(tree, data)
    if data:
        rest[f"not of --source-format {choice.format}"] = list(data)
    for name in _others(tree, claim.taken):
        if name not in known and name not in data:
            rest.setdefault(_NOT_DATA, []).append(name)
    return rest


def _others(tree: Tree, taken: Mapping[str, Sequence[str]]) -> list[str]:
    """Full names of the files that hold no sample."""
    if tree.single is not None:
        return []
    found = []
    for folder, names in sorted(tree.folders.items()):
        own = taken.get(folder, ())
        if len(own) < len(names):
            mine = set(own)
            found += [join(folder, name) for name in names if name not in mine]
    return found


def _unclaimed(tree: Tree, taken: Mapping[str, Sequence[str]], known: set[str] | None = None) -> dict[str, str]:
    """What would be data, by name: what kind."""
    found: dict[str, str] = {}
    names = _others(tree, taken) if tree.single is None else [name for name in tree.files() if not taken]
    for name in names:
        if known is not None and name in known:
            continue
        kind = kind_of(name)
        if kind is None and looks_like_image(tree.path(name)):
            kind = "an image by its first bytes, but not by its name"
        if kind is not None:
            found[name] = kind
    return found


def _left_out(tree: Tree, data: Mapping[str, str]) -> DataError:
    name, kind = next(iter(data.items()))
    more = f", one of {len(data)} files that would be left out" if len(data) > 1 else ""
    suffix = suffix_of(name)
    pattern = f"'*{suffix}'" if suffix and kind != "an image" else pattern_of(name)
    if kind == "a compressed archive":
        tool = next((tool for end, tool in _UNPACK.items() if suffix.endswith(end)), "tar -xf")
        remedy = f"unpack it with {tool} first"
    elif kind.endswith("not by its name"):
        remedy = "give it the suffix of its kind, or name it with --images"
    elif kind == "an image of a kind that is not read":
        remedy = "turn it into JPEG or PNG"
    else:
        remedy = "move it away"
    return DataError(f"{shown(tree.path(name))} is {kind}{more}; {remedy}, or leave it out with --ignore {pattern}")
