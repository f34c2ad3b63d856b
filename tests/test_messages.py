"""Every message that is raised, walked: it says what is wrong and what to do, for the one who reads it.

A message is what `raise` is given, put together from its parts; `{...}` stands for what is filled in.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [path for package in ("pss", "pipelines", "cli", "tools") for path in sorted((ROOT / package).rglob("*.py"))]
OURS = {
    "ValueError",
    "OSError",
    "DataError",
    "StoreError",
    "Missing",
    "SettingError",
    "Failed",
    "Busy",
    "WorkerLost",
    "LaterVersion",
}
PROPER = r"SOURCE|DEST|FFCV|RandAugment|3-Augment|Parquet|DALI|PSS_\w+|CIFAR|Ray"
NAMES = rf"\{{|--\w|\b\w+[._]\w+|\bpss-\w+|{PROPER}|\bthe (digits|learning)"
REMEDY = r"[;:,]| (must|needs|expected|takes?|goes|use) |[^ (]\{\.\.\.\}$"  # such as {nearest}, "did you mean"
PYTHON_ONLY = r"\b[a-z_]+=(True|False|None|'[^']*'|\"[^\"]*\")|\bpass \w+=|\bkeyword argument|\bargument\b"


def text(node):
    """The words of an expression, `{...}` for what is filled in; None if it is no literal."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{...}" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = text(node.left), text(node.right)
        return None if None in parts else "".join(parts)
    if isinstance(node, ast.IfExp):
        return text(node.body)
    return None


def parents(tree):
    return {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}


def raised():
    """(place, name of the error, words, node, parents) of every `raise` of ours."""
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        above = parents(tree)
        for node in ast.walk(tree):
            if not isinstance(node, ast.Raise) or node.exc is None:
                continue
            call = node.exc if isinstance(node.exc, ast.Call) else None
            name = ast.unparse(call.func if call else node.exc).rpartition(".")[2]
            if name in OURS:
                words = text(call.args[0]) if call and call.args else ""
                yield f"{path.relative_to(ROOT)}:{node.lineno}", name, words, node, above


RAISED = list(raised())
WORDED = [(place, words) for place, _, words, *_ in RAISED if words]


def handlers_of(node, above):
    """The `except` clauses that a node lies in, the innermost first."""
    while node in above:
        node = above[node]
        if isinstance(node, ast.ExceptHandler):
            yield node


def caught_nearby(node, above):
    """Whether a bare `raise ValueError` is in a `try` of the same function that catches it, and says it in words."""
    while node in above:
        child, node = node, above[node]
        if isinstance(node, ast.Try) and child in node.body:
            return any("ValueError" in ast.unparse(handler.type or ast.Name("ValueError")) for handler in node.handlers)
    return False


def test_there_are_messages():
    assert len(WORDED) > 200


def test_none_is_empty():
    assert [place for place, _, words, node, above in RAISED if words == "" and not caught_nearby(node, above)] == []


COMPUTED = {
    "cli/errors.py": "the standard output, as the system's error has it",
    "cli/train.py": "what `LostProcess` says",
    "cli/outputs.py": "what the main process found, on the others; and all failed writes in one sentence",
    "pipelines/settings.py": "a sentence made of the errors of the schema library",
    "pss/runs/checkpoint.py": "a sentence with what is free on the disk",
    "pss/models/weights.py": "what is said of a tensor of another shape, from two places",
    "pipelines/rand_augment.py": "a variable of the line above",
    "pss/runs/log.py": "the system's error, of a row that was written in part",
    "pss/runs/lock.py": "what the main process found, on the others",
    "tools/benchmarks/loader.py": "what another process has said",
    "pipelines/remote/objects.py": "what a store that cannot be opened says",
    "pipelines/remote/place.py": "what is wrong with a manifest, under its address",
    "pss/runtime/files.py": "the system's error, with the file's name",
}
"""Where messages are made elsewhere than where they are raised, and how."""


def test_each_is_written_where_it_is_raised():
    """So that these tests can read it; those that are made by a function are known."""
    made = {place.partition(":")[0] for place, _, words, *_ in RAISED if words is None}
    assert made <= COMPUTED.keys()


PARTS = {
    "larger than {...} MiB": "follows the name of the image",
    "its archive ends before it does": "follows the name of the image",
    "not four bytes": "is caught three lines below",
    "write a name, of at most 4,096 printable characters": "follows the setting's name and value",
}
"""What is put into a sentence by the one that catches it, and how."""
OBVIOUS = {
    "schedule.low ({...}) is above schedule.high ({...})",
}
"""Where the remedy is the opposite of what is said."""


@pytest.mark.parametrize(("place", "words"), WORDED, ids=[place for place, _ in WORDED])
def test_a_message_is_one_sentence_that_names_something(place, words):
    if words in PARTS:
        return
    problems = []
    if "\n" in words:
        problems.append("it has more than one line")
    if words.endswith("."):
        problems.append("it ends with a full stop")
    if re.match(r"[A-Z]", words) and not re.match(PROPER, words):
        problems.append("it begins with a capital")
    if not re.search(NAMES, words):
        problems.append("it names no file, option or setting")
    if re.search(PYTHON_ONLY, words):
        problems.append("a command's user has no such remedy")
    if words not in OBVIOUS and not re.search(REMEDY, words):
        problems.append("it has no remedy")
    assert not problems, f"{place} says {words!r}: {', '.join(problems)}"


def test_no_error_of_the_system_is_shown_raw():
    """`[Errno 30]` is no message: what the system raised goes through `in_words`, or is told by its `strerror`."""
    raw = []
    for place, _, _, node, above in RAISED:
        for handler in handlers_of(node, above):
            kinds = ast.unparse(handler.type) if handler.type else "BaseException"
            if handler.name is None or not re.search(r"\b(OSError|IOError|Exception|BaseException)\b", kinds):
                continue
            for part in ast.walk(node.exc):
                if isinstance(part, ast.FormattedValue) and re.match(
                    rf"(str\(|repr\()?{handler.name}\b(?!\.strerror)", ast.unparse(part.value)
                ):
                    raw.append(place)
    assert raw == []


def test_no_words_of_ours_offer_what_only_python_has():
    """Wherever a remedy is kept until it is raised. `Remedies` are for Python by default, and whoever serves a command
    names others."""
    offered = []
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        above = parents(tree)
        for node in ast.walk(tree):
            words = text(node) if isinstance(node, ast.Constant | ast.JoinedStr) else None
            within = [up for up in up_from(node, above) if isinstance(up, ast.ClassDef)]
            if isinstance(above.get(node), ast.Expr) or any(one.name == "Remedies" for one in within):
                continue  # a docstring, or the defaults
            if words and re.search(r"\b(loader|ignore_head|img_size|sort)=('|True|False)|\bpass ignore", words):
                offered.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert offered == []


def up_from(node, above):
    while node in above:
        node = above[node]
        yield node


def test_whoever_reads_weights_for_a_command_names_its_remedies():
    bare = []
    for path in FILES:
        if path.relative_to(ROOT).parts[0] == "tools" or path.name == "weights.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            reads = ast.unparse(node.func).rpartition(".")[2] in ("start_from", "settings_of")
            if reads and "remedies" not in {keyword.arg for keyword in node.keywords}:
                bare.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert bare == []


def test_no_text_with_names_in_it_is_read_as_markup():
    """A run may be called `deit[lr=1e-3]`: what prints with rich takes text as it is."""
    loose = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func).rpartition(".")[2]
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if (
                (name == "Console" and (given.get("markup"), given.get("emoji")) != ("False", "False"))
                or (name == "TextColumn" and given.get("markup") != "False")
                or name in ("from_markup", "print_json")
            ):
                loose.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert loose == []
