"""One listing of a source folder: every file in it, or why it is not looked at."""

from __future__ import annotations

import errno
import os
import stat
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from pipelines.base import DataError, in_words
from pipelines.remote.mirror import Mirror
from pipelines.sources.columns.names import packed

_LITTER = ("__MACOSX", "Thumbs.db", "desktop.ini", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")
_MAX_DEPTH = 64
MAX_NAME = 255  # bytes of what is between two slashes, on every disk
_MAX_VISITS = 100  # links to links to folders would be followed for ever, though not in circles
_NAMED = 3  # of many, in one sentence

HIDDEN, LITTER = "hidden", "left by an operating system"


@dataclass
class Tree:
    """The files of a source by folder; names are relative to `root`, with `/` between their parts."""

    root: Path
    """The source if it is a folder, else the folder of that file; of a source elsewhere, where the copies of those of
    its files are that are no images."""
    folders: dict[str, Sequence[str]] = field(default_factory=dict)
    """Sorted names of the files by folder, which is "" for the root; folders without a file as well."""
    ignored: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """By rule: files and whole folders (`name/`) that are not looked at."""
    single: str | None = None
    """The one file, where the source is a file."""
    address: str | None = None
    """What `root` stands for, where that is elsewhere: images are read from there, and messages name it."""
    mirror: Mirror | None = None
    """Who makes the copies."""

    def __post_init__(self) -> None:
        self._below: dict[str, list[str]] | None = None

    def path(self, name: str) -> Path:
        return self.root / name

    @property
    def origin(self) -> str:
        """The folder or the address that images are read from."""
        return str(self.root) if self.address is None else self.address

    @property
    def name(self) -> str:
        """What the folder itself is called."""
        return self.origin.rpartition("/")[2]

    def told(self, text: str) -> str:
        """A message or a name, with the address in it and not the folder of the copies."""
        if self.address is None:
            return text
        return text.replace(str(self.root), self.address).replace(shown(self.root), self.address)

    def head(self, name: str, count: int) -> bytes:
        """The first bytes of a file, wherever it is."""
        if self.mirror is not None:
            return self.mirror.store.read(name, 0, count)
        with self.path(name).open("rb") as file:
            return file.read(count)

    def files(self) -> Iterator[str]:
        """All files, by folder and name."""
        for folder in sorted(self.folders):
            for name in self.folders[folder]:
                yield join(folder, name)

    def called(self, fits: Callable[[str], object]) -> list[str]:
        """The files whose own name fits, by folder and name, as full names."""
        return [join(folder, name) for folder in sorted(self.folders) for name in self.folders[folder] if fits(name)]

    def children(self, folder: str) -> list[str]:
        """The folders in `folder`, sorted, as full names."""
        if self._below is None:
            self._below = defaultdict(list)
            for name in sorted(self.folders):
                if name:
                    self._below[name.rpartition("/")[0]].append(name)
        return self._below.get(folder, [])

    def below(self, folder: str) -> Iterator[str]:
        """`folder` and all folders in it, at any depth."""
        yield folder
        for child in self.children(folder):
            yield from self.below(child)

    @property
    def found(self) -> int:
        """How many entries the listing has seen: files, and folders that are ignored as a whole."""
        return sum(map(len, self.folders.values())) + sum(map(len, self.ignored.values()))


def join(folder: str, name: str) -> str:
    """A full name."""
    return f"{folder}/{name}" if folder else name


def and_above(folder: str) -> list[str]:
    """A folder and all that it lies in, the root first."""
    parts = folder.split("/")
    return ["", *("/".join(parts[: i + 1]) for i in range(len(parts)))] if folder else [""]


def pattern_of(name: str) -> str:
    """What `--ignore` takes for this file or folder and no other, in quotes for a shell."""
    return f"'{shown(name if '/' in name else f'./{name}')}'"


def shown(path: Path | str) -> str:
    """A path or another text of the source as it can be printed: what is no UTF-8, commands to a terminal, ends of
    lines and marks that turn the direction of writing are spelled out."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return text if text.isprintable() else "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def some(names: Sequence[str]) -> str:
    """The first few of many."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def list_tree(source: Path, ignore: Sequence[str] = (), follow_links: bool = False) -> Tree:
    """Everything in `source`, a folder or a file.

    Args:
        source: resolved.
        ignore: patterns of names that are left out, each of a file or a folder: `*.txt` and `val` wherever they are,
            `extra/*` and `./val` as seen from the source.
        follow_links: whether links may lead out of the source.

    Raises:
        DataError: something in it cannot be read, is neither file nor folder, leads out of it, or has a name that is
            not UTF-8.
    """
    if not source.is_dir():
        return Tree(source.parent, {"": [source.name]}, single=source.name)
    tree = Tree(source)
    walk = _Walk(tree, tuple(ignore), follow_links)
    walk.folder("", (source.stat().st_dev, source.stat().st_ino), ())
    walk.conclude(str(tree.root))
    return tree


class Rules:
    """What is looked at in a source, by its name. What is wrong is collected, so that one sentence names it."""

    def __init__(self, ignore: tuple[str, ...]) -> None:
        self.ignore = ignore
        self.used: set[str] = set()
        self.problems: dict[str, list[str]] = defaultdict(list)

    def fits(self, name: str, last: str) -> str | None:
        """Why an entry is not looked at, by its full name and the last part of it; None if it is."""
        for pattern in self.ignore:
            plain = pattern.rstrip("/").removeprefix("./")
            anywhere = "/" not in pattern.rstrip("/")
            if plain in (name, last if anywhere else name) or fnmatchcase(last if anywhere else name, plain):
                self.used.add(pattern)
                return f"--ignore {pattern}"
        if last in _LITTER or last.startswith("._"):
            return LITTER
        return HIDDEN if last.startswith(".") else None

    def is_text(self, place: str, last: str) -> bool:
        """Whether the name of an entry of the folder `place` is UTF-8."""
        if last.isprintable() or not _undecodable(last):
            return True
        self.problems["utf-8"].append(shown(f"{place}/{last}"))
        return False

    def compare_forms(self, place: str, names: list[str]) -> None:
        """Look at all names in the folder `place` that are looked at."""
        if all(name.isascii() for name in names):
            return
        forms: dict[str, str] = {}
        for name in names:
            other = forms.setdefault(unicodedata.normalize("NFC", name), name)
            if other != name:
                self.problems["forms"].append(f"{shown(f'{place}/{name}')} ({other!a} and {name!a})")

    def conclude(self, source: str) -> None:
        """Raise `DataError` for what was found to be wrong."""
        found = {kind: some(names) for kind, names in self.problems.items()}
        if names := found.get("dangling"):
            raise DataError(
                f"{names}: a link to what is not there; mount its disk, mend it, or leave it out with --ignore"
            )
        if names := found.get("circle"):
            raise DataError(f"{names}: a link that goes in circles; remove it, or leave it out with --ignore")
        if names := found.get("special"):
            raise DataError(
                f"{names}: no plain file (a pipe, socket or device); remove it, or leave it out with --ignore"
            )
        if names := found.get("outside"):
            raise DataError(
                f"{names}: a link that leads out of the source; --follow-links reads what it points to, --ignore "
                "leaves it out"
            )
        if names := found.get("no path"):
            raise DataError(
                f"{names}: a name that no file can have, with '.', '..', nothing or a NUL between slashes; rename the "
                "object, or leave it out with --ignore"
            )
        if names := found.get("long"):
            raise DataError(
                f"{names}: a name of more than {MAX_NAME} bytes, which no disk takes; rename the object, or leave it "
                "out with --ignore"
            )
        if names := found.get("both"):
            raise DataError(
                f"{names}: the name of an object and of a folder; rename one of them, or leave both out with --ignore"
            )
        if names := found.get("utf-8"):
            raise DataError(f"{names}: a name that is not UTF-8; rename it (convmv can), or leave it out with --ignore")
        if names := found.get("forms"):
            raise DataError(
                f"{names}: two names that differ in their Unicode form alone; rename one of them, or leave it out with "
                "--ignore"
            )
        if unused := [pattern for pattern in self.ignore if pattern not in self.used]:
            raise DataError(f"--ignore {unused[0]} fits nothing in {source}; mend the pattern or leave it out")


class _Walk(Rules):
    """One walk through a source on the disk."""

    def __init__(self, tree: Tree, ignore: tuple[str, ...], follow_links: bool) -> None:
        super().__init__(ignore)
        self.tree, self.follow_links = tree, follow_links
        self.real = os.path.realpath(tree.root)
        self.visits: Counter[tuple[int, int]] = Counter()

    def folder(self, folder: str, identity: tuple[int, int], above: tuple[tuple[int, int], ...]) -> None:
        place = self.tree.path(folder) if folder else self.tree.root
        check_depth(str(place), len(above))
        try:
            with os.scandir(place) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(
                f"{shown(place)} cannot be read ({in_words(error)}); change who may read it, or leave it out with "
                "--ignore"
            ) from error
        files: list[str] = []
        inside: list[tuple[str, tuple[int, int]]] = []
        for entry in found:
            name = join(folder, entry.name)
            if rule := self.fits(name, entry.name):
                is_folder = entry.is_dir(follow_symlinks=False)
                self.tree.ignored[rule].append(f"{name}/" if is_folder else name)
                continue
            if not self.is_text(str(place), entry.name):
                continue
            if (kind := self._kind(entry, name)) == "file":
                files.append(entry.name)
            elif kind == "folder":
                about = entry.stat()
                inside.append((name, (about.st_dev, about.st_ino)))
        self.compare_forms(str(place), files + [name.rpartition("/")[2] for name, _ in inside])
        self.tree.folders[folder] = packed(files)
        del files, found  # not to be kept while the folders below are read
        for name, its_identity in inside:
            self.visits[its_identity] += 1
            if its_identity in (*above, identity):
                self.problems["circle"].append(shown(self.tree.path(name)))
            elif self.visits[its_identity] > _MAX_VISITS:
                raise DataError(
                    f"{shown(self.tree.path(name))} is reached in more than {_MAX_VISITS} ways, through links to it or "
                    "to folders above it; remove some, or leave them out with --ignore"
                )
            else:
                self.folder(name, its_identity, (*above, identity))

    def _kind(self, entry: os.DirEntry[str], name: str) -> str | None:
        if entry.is_symlink():
            try:
                target = os.path.realpath(entry.path, strict=True)
            except OSError as error:
                self.problems["circle" if error.errno == errno.ELOOP else "dangling"].append(shown(entry.path))
                return None
            outside = os.path.commonpath([target, self.real]) != self.real
            if outside and not self.follow_links:
                self.problems["outside"].append(shown(entry.path))
                return None
        mode = entry.stat().st_mode
        if stat.S_ISREG(mode):
            return "file"
        if stat.S_ISDIR(mode):
            return "folder"
        self.problems["special"].append(shown(entry.path))
        return None


def check_depth(place: str, depth: int) -> None:
    """Raise `DataError` for a folder that lies too deep."""
    if depth > _MAX_DEPTH:
        raise DataError(f"{shown(place)} lies {_MAX_DEPTH} folders deep; name a folder further down as the source")


def _undecodable(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return True
    return False
