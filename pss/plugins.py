"""Classes and functions of the user's own, by name."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def is_plugin(name: str) -> bool:
    """Whether a name is one of the user's own, `package.module:attribute`."""
    return ":" in name


def load(name: str) -> Any:
    """What `package.module:attribute` names; the working folder is searched last.

    Raises:
        ValueError: there is no such module, it cannot be imported, or it has no such attribute.
    """
    module, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    try:
        loaded = import_module(module)
    except ImportError as error:
        raise ValueError(
            f"{name}: the module {module} cannot be imported ({error}); name it as in package.module:attribute, and "
            "start in the folder that holds it, or install it"
        ) from error
    if not hasattr(loaded, attribute):
        raise ValueError(f"{name}: {loaded.__file__} has nothing called {attribute!r}")
    return getattr(loaded, attribute)
