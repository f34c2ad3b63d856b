"""What users call their runs and classes, in the languages that results are written in."""

from __future__ import annotations

import re
import unicodedata

_OVERRIDES = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # they reorder what follows, too


def printable(name: str) -> str:
    """A name on one line that a terminal shows and UTF-8 can hold: anything else is written as its escape.

    That is control characters, line separators, what changes the direction of the text around it, and the bytes of
    file names that cannot be decoded.
    """

    def shown(character: str) -> str:
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in _OVERRIDES:
            return character.encode("unicode_escape", "backslashreplace").decode("ascii")
        return character

    return "".join(map(shown, name))


def shortened(name: str, most: int) -> str:
    """A name of at most `most` characters, which keeps its beginning and its end."""
    if len(name) <= most:
        return name
    tail = (most - 1) // 2
    return f"{name[: most - 1 - tail]}…{name[len(name) - tail :]}"


def markdown(name: str) -> str:
    """A name as Markdown shows it: in no other face, no link, no tag, and in a table in one cell."""
    return re.sub(r"([\\`*_{}\[\]<>()#+.!|~$&:@-])", r"\\\1", printable(name))


def cell(value: object) -> object:
    """What goes into a table of comma-separated values: a text that a spreadsheet would compute is quoted as it has "
    "it."""
    if not isinstance(value, str):
        return value
    shown = printable(value)
    return f"'{shown}" if shown.startswith(("=", "+", "-", "@")) else shown
