"""pss: train Vision Transformers on a schedule of sampled patches.

The names below are the public API. They are imported on first use, so that `import pss` costs nothing. It makes timm
know the models, as `pss_NAME`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pss.neighbours import check, is_command
from pss.timm_models import install as _install_in_timm
from pss.version import __version__

if TYPE_CHECKING:
    from pss.api.conversion import convert
    from pss.api.evaluation import evaluate
    from pss.api.prediction import predict
    from pss.api.training import train
    from pss.models.create import create_model
    from pss.models.flops import macs
    from pss.models.weights import load_weights
    from pss.schedules import Cosine, Cyclic, Fixed, Linear

if not is_command():
    check("pipelines")

__all__ = [
    "Cosine",
    "Cyclic",
    "Fixed",
    "Linear",
    "__version__",
    "convert",
    "create_model",
    "evaluate",
    "load_weights",
    "macs",
    "predict",
    "train",
]

_HOME = {
    "Cosine": "pss.schedules",
    "Cyclic": "pss.schedules",
    "Fixed": "pss.schedules",
    "Linear": "pss.schedules",
    "convert": "pss.api.conversion",
    "create_model": "pss.models.create",
    "evaluate": "pss.api.evaluation",
    "load_weights": "pss.models.weights",
    "macs": "pss.models.flops",
    "predict": "pss.api.prediction",
    "train": "pss.api.training",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pss' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__


_install_in_timm()
