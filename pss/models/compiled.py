"""The trunk of a model, compiled once for every token count.

A schedule shows a model a handful of sequence lengths. Each gets a graph of its own, of static shapes: a graph for all
lengths at once is slower, and `torch.compile`, left to itself, stops compiling without a word after a few shapes. Here
a shape too many is an error, and so is any other reason to compile a shape again.

Training and evaluation need separate graphs. A batch that is smaller than an earlier one of the same length, such as
the last one of a split, is filled up with copies of its first image, and the results of these are dropped.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, Protocol

import torch
from torch import Tensor

_Level = tuple[Any, ...]


class HasTrunk(Protocol):
    """A model whose blocks can be computed apart from what comes before and after them."""

    @property
    def training(self) -> bool: ...

    def trunk(self, tokens: Tensor, kept: Tensor | None) -> Tensor:
        """Tokens (B, K, D) through all blocks; `kept` says which patches they are."""
        ...


class CompiledTrunk:
    """Calls `VisionTransformer.trunk` compiled; set it as the model's `compiled_trunk`.

    It belongs to one model: a copy of the model, which has weights of its own, gets an empty one with the same options.
    Names of parameters are not touched.
    """

    def __init__(self, *, max_graphs: int = 8, backend: Any = "inductor", cuda_graphs: bool = False) -> None:
        """Nothing is compiled before the first call.

        Args:
            max_graphs: How many graphs there may be, those for evaluation included.
            backend: A backend of `torch.compile`.
            cuda_graphs: Record what a graph launches on the GPU, and replay it from then on.
        """
        self._options = {"max_graphs": max_graphs, "backend": backend, "cuda_graphs": cuda_graphs}
        self.max_graphs = max_graphs
        self._batch_sizes: dict[_Level, list[int]] = {}
        # torch counts graphs per code object, so two models must not share one.
        own = FunctionType(_trunk.__code__.replace(), globals(), "trunk")
        mode = "reduce-overhead" if cuda_graphs else None
        self._compiled: Any = torch.compile(own, backend=backend, fullgraph=True, dynamic=False, mode=mode)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._options,)

    @property
    def num_graphs(self) -> int:
        """Graphs so far."""
        return sum(map(len, self._batch_sizes.values()))

    def __call__(self, model: HasTrunk, tokens: Tensor, kept: Tensor | None) -> Tensor:
        """See `VisionTransformer.trunk`.

        Raises:
            ValueError: this would take one graph more than allowed.
        """
        if not len(tokens):  # nothing to fill a batch up with
            return model.trunk(tokens, kept)
        num_graphs = self.num_graphs
        batch_size = self._batch_size(model, tokens, kept)
        num_missing = batch_size - len(tokens)
        if num_missing:
            tokens = torch.cat((tokens, tokens[:1].expand(num_missing, -1, -1)))
            if kept is not None and kept.ndim == 2:
                kept = torch.cat((kept, kept[:1].expand(num_missing, -1)))
        # As many graphs as shapes: whatever else would make torch compile once more is a fault, and raised as one.
        with torch._dynamo.config.patch(recompile_limit=self.num_graphs), _unwarned(self.num_graphs > num_graphs):
            result: Tensor = self._compiled(model, tokens, kept)
        return result[:-num_missing] if num_missing else result

    def _batch_size(self, model: HasTrunk, tokens: Tensor, kept: Tensor | None) -> int:
        """The size of the batch to compute, for which there is a graph or may be one."""
        device = tokens.device.type
        half = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        recording = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), tokens.requires_grad
        sets = 0 if kept is None else kept.ndim  # of patches: 1 for all images, or each its own
        level = (tokens.shape[1], sets, tokens.dtype, half, model.training, *recording)
        sizes = self._batch_sizes.setdefault(level, [])
        enough = [size for size in sizes if size >= len(tokens)]
        if enough:
            return min(enough)
        if self.num_graphs == self.max_graphs:
            raise ValueError(
                f"{'training' if model.training else 'evaluating'} {len(tokens)} images of {tokens.shape[1]} tokens "
                f"takes a compiled graph more than the {self.max_graphs} of compile.max_graphs; raise it, or set "
                "compile.mode=off"
            )
        sizes.append(len(tokens))
        return len(tokens)


def _trunk(model: HasTrunk, tokens: Tensor, kept: Tensor | None) -> Tensor:
    return model.trunk(tokens, kept)


@contextmanager
def _unwarned(compiling: bool) -> Iterator[None]:
    """Without the warning that torch gives for looking, when it compiles, whether an input has a gradient."""
    if not compiling:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf")
        yield


def _rebuild(options: dict[str, Any]) -> CompiledTrunk:
    return CompiledTrunk(**options)
