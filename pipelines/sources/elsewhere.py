"""A source at an address, listed as one on the disk is: images stay where they are, other files are copied here."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from pipelines.base import DataError
from pipelines.remote.mirror import TELL_SECONDS, Mirror, Reach, at_once
from pipelines.remote.store import Entry, Store, is_url
from pipelines.sources.arrays import ARCHIVES
from pipelines.sources.columns.names import packed
from pipelines.sources.columns.tree import MAX_NAME, Rules, Tree, check_depth, join, shown
from pipelines.sources.labels import DEVKIT
from pipelines.sources.names import is_image, kind_of
from pipelines.sources.sample import Choice

_LISTED_AT_ONCE = 16  # folders
_HTTP = ("http", "https")
_OPENED: Mapping[str | None, tuple[str, ...]] = {
    None: ("an archive", "a table"), "imagenet": ("an archive",), "webdataset": ("an archive",),
    "parquet": ("a table",), "arrow": ("a table",),
}  # fmt: skip
"""Kinds of files that the readers of a format open, beside those that nobody knows by their names."""
_NO_PATH = re.compile(r"\.{0,2}|.*\0.*", re.DOTALL)


def called(source: str, named: str = "SOURCE") -> str:
    """A source as messages and records name it: a folder or file by its whole path, an address without its query.
    `named` is the argument, for messages.

    Raises:
        DataError: an address that is not taken.
    """
    if not is_url(source):
        return str(Path(source).resolve())
    protocol, _, rest = source.partition("://")
    if protocol.lower() in ("file", "local"):  # fsspec's words for what needs no copy
        return str(Path(rest).resolve())
    where, slash, path = rest.partition("/")
    user, _, host = where.rpartition("@")
    if ":" in user:
        raise DataError(
            f"{named} {protocol}://{host}{slash}{path.partition('?')[0]} has a password in its address, which would be "
            "written into the data set; leave it out, and give it in the way of the store's own tools"
        )
    if re.match(r"[\w+.-]+::", source) or re.search(r"::[\w+.-]+://", source):
        raise DataError(f"{named} {protocol}://… is an address within an address; name one that is read as it is")
    if protocol.lower() in _HTTP:
        path = re.split(r"[?#]", path, maxsplit=1)[0]
        if not path or path.endswith("/"):
            raise DataError(
                f"{named} {protocol}://{where}/{path} is a folder, and web servers do not say what is in one; name a "
                "single file, such as a tar, or copy the folder to a bucket or to this machine"
            )
    if not where:
        raise DataError(f"{named} {source} names no bucket or machine; use an address such as s3://bucket/photos")
    return f"{protocol}://{where}{slash}{path}".rstrip("/")


def by_its_path(dest: Path | str) -> Path | str:
    """A destination on this machine as a path, and one elsewhere as its address. Raises as `called`."""
    if not is_url(dest):
        return Path(dest)
    if str(dest).lower().startswith(tuple(f"{protocol}://" for protocol in _HTTP)):
        raise DataError(f"{dest} cannot be written over HTTP; name a bucket (s3://, gs://) or a folder")
    known = called(str(dest), "DEST")
    if not is_url(known):
        return Path(known)
    if any(_NO_PATH.fullmatch(part) for part in known.partition("://")[2].split("/")):
        raise DataError(f"DEST {known} has '.', '..' or nothing between two slashes; leave it out")
    if magic := re.search(r"[*?[]", known):  # fsspec would remove whatever it fits
        raise DataError(f"DEST {known} has {magic[0]!r} in its name, which stands for other names; choose another")
    return known


def check_apart(source: str, dest: Path | str) -> None:
    """Raise `DataError` for an address in a source at one: going on, it would be read."""
    inside, outside = (re.sub("^s3a:", "s3:", f"{place}/") for place in (dest, source))
    if is_url(source) and inside.startswith(outside):
        raise DataError(f"DEST {dest} lies in {source}, of which it would become a part; choose another name")


@dataclass
class _Folder:
    """What is in one folder."""

    rules: Rules
    files: Sequence[str] = ()
    inside: list[str] = field(default_factory=list)
    """Full names of the folders in it, sorted."""
    ignored: list[tuple[str, str]] = field(default_factory=list)
    opened: dict[str, Entry] = field(default_factory=dict)
    """By full name: the files that are to be copied."""


def list_store(source: str, choice: Choice, ignore: Sequence[str], reach: Reach) -> Tree:
    """Everything at an address, as `list_tree` has it of a folder; `tree.mirror` makes the copies.

    Args:
        source: the address as it was given.
        choice: what the user has decided about it.
        ignore: as of `list_tree`.
        reach: where the copies are to be, and who hears of the listing.

    Raises:
        StoreError: it cannot be listed.
        DataError: there is nothing, or it has names that cannot be those of files.
    """
    address = called(source)
    query = f"?{source.split('?', 1)[1]}" if address.partition("://")[0].lower() in _HTTP and "?" in source else ""
    above, _, last = address.rpartition("/")
    if above.endswith("/"):  # a whole bucket
        store = Store(address, "SOURCE")
        found = store.find()
    else:
        store = Store(above, "SOURCE")
        found = store.find(f"{last}{query}")
    if found is None:
        raise DataError(f"there is nothing at {shown(address)}; see that the address is right and the upload complete")
    if not found.folder and (found.size or not store.at(last).entries()):  # an empty object may stand for a folder
        opened = {last: found} if _is_opened(last, choice) else {}
        mirror = Mirror(store, opened, query, reach)
        return Tree(mirror.root, {"": [last]}, single=last, address=store.url, mirror=mirror)
    if not above.endswith("/"):
        store = store.at(last)
    folders = _list(store, choice, tuple(ignore), reach)
    rules, opened = Rules(tuple(ignore)), {}
    tree = Tree(Path(), address=store.url)
    for name in sorted(folders, key=lambda name: name.split("/") if name else []):  # as one would walk through them
        folder = folders.pop(name)
        tree.folders[name] = folder.files
        opened.update(folder.opened)
        rules.used |= folder.rules.used
        for rule, left_out in folder.ignored:
            tree.ignored[rule].append(left_out)
        for problem, names in folder.rules.problems.items():
            rules.problems[problem].extend(names)
    rules.conclude(store.url)
    tree.mirror = Mirror(store, opened, "", reach)
    tree.root = tree.mirror.root
    return tree


def _list(store: Store, choice: Choice, ignore: tuple[str, ...], reach: Reach) -> dict[str, _Folder]:
    found: dict[str, _Folder] = {}
    todo, told, files = deque([""]), time.monotonic(), 0

    def done(result: tuple[str, _Folder]) -> None:
        nonlocal files
        name, folder = result
        found[name] = folder
        files += len(folder.files)
        todo.extend(folder.inside)
        if folder.inside:
            check_depth(store.name(name), name.count("/") + 2 if name else 1)

    def look() -> None:
        nonlocal told
        if time.monotonic() - told > TELL_SECONDS:
            told = time.monotonic()
            reach.tell(f"listing {store.url}: {files:,} files in {len(found):,} folders so far")

    at_once(
        lambda name, alive: (name, _sieve(store, name, choice, Rules(ignore), alive)),
        todo, _LISTED_AT_ONCE, done, look,
    )  # fmt: skip
    return found


def _sieve(store: Store, folder: str, choice: Choice, rules: Rules, alive: Callable[[], object]) -> _Folder:
    """List one folder, and look at the names."""
    found, files = _Folder(rules), list[str]()
    place = store.name(folder) if folder else store.url
    entries = store.entries(folder, alive)
    folders = {entry.name for entry in entries if entry.folder}
    for entry in entries:
        name = join(folder, entry.name)
        impossible = _NO_PATH.fullmatch(entry.name) is not None
        rule = rules.fits(name, entry.name)
        if rule is not None and (not impossible or rule.startswith("--")):
            found.ignored.append((rule, f"{name}/" if entry.folder else name))
        elif impossible:
            rules.problems["no path"].append(shown(f"{place}/{entry.name}"))
        elif not rules.is_text(place, entry.name):
            pass
        elif entry.folder:
            found.inside.append(name)
        elif entry.name in folders:
            if entry.size:  # an empty one stands for the folder
                rules.problems["both"].append(shown(f"{place}/{entry.name}"))
        else:
            files.append(entry.name)
            if _is_opened(name, choice):
                found.opened[name] = entry
    for name in found.opened:
        if any(len(part.encode()) > MAX_NAME for part in name.split("/")):
            rules.problems["long"].append(shown(store.name(name)))
    rules.compare_forms(place, files + [name.rpartition("/")[2] for name in found.inside])
    found.files = packed(files)
    return found


def _is_opened(name: str, choice: Choice) -> bool:
    """Whether some reader looks into a file of that name; it takes images as they are."""
    last = name.rpartition("/")[2]
    if is_image(last):
        return False
    kind = kind_of(last)
    if kind is None:
        return choice.images is None or not (fnmatchcase(last, choice.images) or fnmatchcase(name, choice.images))
    if kind == "a compressed archive":
        return last in (*ARCHIVES, f"{DEVKIT}.tar.gz")
    return kind in _OPENED.get(choice.format, ())
