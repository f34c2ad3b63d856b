"""The packages that pss brings along, told from a project's own of the same name.

`cli` and `pipelines` are names that other projects have too. Whichever lies first on Python's path is imported, and
what follows would be an error about a module that the project never had.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]


def check(*names: str) -> None:
    """See that Python would import our packages of these names, and no others.

    Raises:
        ImportError: another one comes first; it says which, and what to do.
    """
    for name in names:
        other = _found(name)
        if other is not None and other.parent != _ROOT:
            raise ImportError(
                f"pss brings a package {name!r}, but Python finds {other} first; rename that one, or take "
                f"{other.parent} off Python's path (PYTHONPATH, or the folder you start in)",
                name=name,
            )


def is_command() -> bool:
    """Whether this process is one of the three commands, which say such things without a traceback."""
    return bool(sys.argv) and Path(sys.argv[0]).name in ("pss-convert", "pss-train", "pss-eval")


def _found(name: str) -> Path | None:
    """The folder or file that `import name` takes; None where there is none, or only a folder without `__init__.py`."""
    try:
        spec = find_spec(name)
    except ValueError:  # imported already, by something that left out its spec
        origin = getattr(sys.modules[name], "__file__", None)
    else:
        origin = spec.origin if spec else None
    if origin is None:
        return None
    path = Path(origin).resolve()
    return path.parent if path.name == "__init__.py" else path
