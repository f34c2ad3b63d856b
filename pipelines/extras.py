"""Optional packages, and the command that installs them.

Every message that names one takes the command from here.
"""

from __future__ import annotations

import importlib
import json
import shlex
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from pipelines.base import DataError

PUBLISHED = False
"""Whether a package index holds pss by its name. Set it to True on the day it does: that is all there is to change."""

NAME = "patch-sampling-schedule"
_CHECKOUT = Path(__file__).parents[1]


def install_hint(extra: str) -> str:
    """The command that adds the packages of `extra`, to be run in the environment that pss runs in.

    In a checkout it installs that; for a wheel it names the wheel, or where it is gone, the packages themselves.
    """
    if (_CHECKOUT / "pyproject.toml").is_file():
        return f"pip install -e {shlex.quote(f'{_CHECKOUT}[{extra}]')}"
    if PUBLISHED:
        return f"pip install {shlex.quote(f'{NAME}[{extra}]')}"
    try:
        installed = metadata.distribution(NAME)
    except metadata.PackageNotFoundError:  # a copy of the folders, which says nothing of where it came from
        return f"pip install {shlex.quote(f'{NAME}[{extra}]')}"
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    url = origin.get("url", "")
    if vcs := origin.get("vcs_info"):
        wanted = f"{NAME}[{extra}] @ {vcs['vcs']}+{url}@{vcs['commit_id']}"
        return f"pip install {shlex.quote(wanted)}"
    parts = urlsplit(url)
    if parts.scheme == "file" and (path := Path(unquote(parts.path))).exists():
        return f"pip install {shlex.quote(f'{path}[{extra}]')}"
    return " ".join(["pip install", *map(shlex.quote, _packages(installed, extra))])


def require(module: str, extra: str, what: str) -> Any:
    """Import `module`, which `what` needs and `extra` installs.

    Raises:
        DataError: it is missing, or cannot be imported.
    """
    need(what, extra, module)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"{what} needs {module}, which cannot be imported ({error}); run: {install_hint(extra)}"
        ) from error


def need(what: str, extra: str, *modules: str) -> None:
    """Notice before any work that modules are missing, without importing them.

    Raises:
        DataError: some are, with the command that installs them.
    """
    if missing := [module for module in modules if not _installed(module)]:
        raise DataError(f"{what} needs {' and '.join(missing)}; run: {install_hint(extra)}")


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it would be in is missing
        return False


def _packages(installed: metadata.Distribution, extra: str) -> list[str]:
    """Requirements of an extra, as the distribution's metadata list them."""
    found = []
    for line in installed.requires or ():
        requirement, _, marker = (part.strip() for part in line.partition(";"))
        if f'extra == "{extra}"' in marker.replace("'", '"'):
            found.append(requirement)
    return found
