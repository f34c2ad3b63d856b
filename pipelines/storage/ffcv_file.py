"""FFCV itself, kept at arm's length. Only its loader imports it besides."""

from __future__ import annotations

import functools
import importlib.metadata
import warnings
from typing import Any

import numpy as np

from pipelines.base import DataError, choose_loader
from pipelines.extras import install_hint

FFCV_VERSION = "1.0.2"


def import_ffcv() -> None:
    """Import FFCV; raises `DataError` where it is missing or of another version.

    It sets torch's thread count when it is imported, and again with every loader. Only numba's is meant to change.
    It compiles anew for every loader what does not differ between them. It also lists in which page of the file every
    sample lies, for readers of whole pages: 8 s and 600 MB for ImageNet that nobody here needs.
    """
    try:
        found = importlib.metadata.version("ffcv")
    except importlib.metadata.PackageNotFoundError:
        raise DataError(f"{choose_loader('ffcv')} needs ffcv; run: {install_hint('ffcv')}") from None
    if found != FFCV_VERSION:
        raise DataError(
            f"FFCV {found} is installed, and {choose_loader('ffcv')} needs {FFCV_VERSION}; run: {install_hint('ffcv')}"
        )
    import numba
    import torch

    threads = torch.get_num_threads()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it imports distutils
            from ffcv.loader import loader
            from ffcv.memory_managers.os_cache import OSCacheContext, OSCacheManager
            from ffcv.pipeline.compiler import Compiler
    except ImportError as error:
        raise DataError(
            f"{choose_loader('ffcv')} needs ffcv, which cannot be imported ({error}); run: {install_hint('ffcv')}"
        ) from error
    torch.set_num_threads(threads)

    def set_num_threads(count: int) -> None:
        Compiler.num_threads = count
        numba.set_num_threads(count)

    Compiler.set_num_threads = set_num_threads
    if not hasattr(Compiler.compile, "cache_info"):
        Compiler.compile = functools.cache(Compiler.compile)

    class MappedFile(OSCacheManager):  # type: ignore[misc]
        """A file that is mapped whole; a decoder that knows where its images lie needs no more."""

        def __init__(self, reader: Any) -> None:
            self.reader, self.context = reader, OSCacheContext(self)
            self.ptrs = self.sizes = np.zeros(0, dtype=np.uint64)

        def compile_reader(self) -> None: ...

    loader.OSCacheManager = MappedFile
