"""Parts of a forward pass, compiled once for every shape of their tokens.

A schedule shows a model a handful of sequence lengths. Each gets a graph of its own, of static shapes: a graph for all
lengths at once is slower, and `torch.compile`, left to itself, stops compiling without a word after a few shapes. Here
a shape too many is an error, and so is any other reason to compile a shape again.

Training and evaluation need separate graphs. A batch that is smaller than an earlier one of the same shape, such as
the last one of a split, is filled up with copies of its first image, and the results of these are dropped.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

_Level = tuple[Any, ...]


class Graphs:
    """Calls methods of modules compiled; set it as `graphs` of a `VisionTransformer`, whose `compute` asks it.

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
        self._compiled: dict[Any, Any] = {}
        self._batch_sizes: dict[Any, dict[_Level, list[int]]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._options,)

    @property
    def num_graphs(self) -> int:
        """Graphs so far."""
        return sum(map(self._num_graphs, self._batch_sizes))

    def _num_graphs(self, function: Any) -> int:
        return sum(map(len, self._batch_sizes[function].values()))

    def __call__(self, part: Callable[..., Any], tokens: Tensor, *others: Tensor | int | None) -> Any:
        """`part(tokens, *others)`, compiled for these shapes.

        Args:
            part: A method of a model, such as `trunk`, or of the training method that has it: most of a forward pass,
                as each shape of a part is a graph. It returns tensors that have a row for each image, alone or in
                tuples and dicts.
            tokens: (B, K, D).
            others: What has a row for each image too, (B, ...); with one dimension, the same for all of them. Whole
                numbers have graphs of their own.

        Raises:
            ValueError: this would take one graph more than allowed.
        """
        batch_size = len(tokens)
        if not batch_size:  # nothing to fill a batch up with
            return part(tokens, *others)
        owner, function = part.__self__, part.__func__  # type: ignore[attr-defined]
        levels = self._batch_sizes.setdefault(function, {})
        num_graphs = self.num_graphs
        num_missing = self._batch_size(levels, owner.training, tokens, others) - batch_size
        arguments = (tokens, *others)
        if num_missing:
            arguments = tuple(map(_Filled(batch_size, num_missing), arguments))
        if function not in self._compiled:
            mode = "reduce-overhead" if self._options["cuda_graphs"] else None
            self._compiled[function] = torch.compile(
                _own_copy(function), backend=self._options["backend"], fullgraph=True, dynamic=False, mode=mode
            )
        # As many graphs as shapes: whatever else would make torch compile once more is a fault, and raised as one.
        limit, compiling = self._num_graphs(function), self.num_graphs > num_graphs
        with torch._dynamo.config.patch(recompile_limit=limit), _unwarned(compiling):
            result = self._compiled[function](owner, *arguments)
        return tree_map(lambda one: one[:-num_missing], result) if num_missing else result

    def _batch_size(
        self, levels: dict[_Level, list[int]], training: bool, tokens: Tensor, others: tuple[Tensor | int | None, ...]
    ) -> int:
        """The size of the batch to compute, for which there is a graph or may be one."""
        device = tokens.device.type
        half = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        recording = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), tokens.requires_grad
        shapes = tuple(
            (one.shape[0 if one.ndim == 1 else 1 :], one.ndim, one.dtype) if isinstance(one, Tensor) else one
            for one in (tokens, *others)
        )
        sizes = levels.setdefault((shapes, half, training, *recording), [])
        enough = [size for size in sizes if size >= len(tokens)]
        if enough:
            return min(enough)
        if self.num_graphs == self.max_graphs:
            raise ValueError(
                f"{'training' if training else 'evaluating'} {len(tokens)} images of {tokens.shape[1]} tokens "
                f"takes a compiled graph more than the {self.max_graphs} of compile.max_graphs; raise it, or set "
                "compile.mode=off"
            )
        sizes.append(len(tokens))
        return len(tokens)


class _Filled:
    """Adds copies of the first image; a tensor of one dimension is the same for all images."""

    def __init__(self, batch_size: int, num_missing: int) -> None:
        self._batch_size, self._num_missing = batch_size, num_missing

    def __call__(self, one: Tensor | int | None) -> Tensor | int | None:
        if not isinstance(one, Tensor) or one.ndim == 1:
            return one
        assert len(one) == self._batch_size, "what is compiled takes tensors with a row for each image"
        return torch.cat((one, one[:1].expand(self._num_missing, *one.shape[1:])))


def _own_copy(function: Any) -> Any:
    """torch counts graphs per code object, so two models must not share one."""
    code, defaults, closure = function.__code__.replace(), function.__defaults__, function.__closure__
    return FunctionType(code, function.__globals__, function.__name__, defaults, closure)


@contextmanager
def _unwarned(compiling: bool) -> Iterator[None]:
    """Without the warning that torch gives for looking, when it compiles, whether an input has a gradient."""
    if not compiling:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf")
        yield


def _rebuild(options: dict[str, Any]) -> Graphs:
    return Graphs(**options)
