"""A CUDA device that computes nothing: what a program would launch and move, and whether it would wait, without a GPU.

Within `FakeGpu` tensors on "cuda" are torch's fake tensors, which know their shape, type and device and hold nothing;
tensors on the host are real, so that what is drawn and planned there goes on as usual. Streams, events, generators and
pinned memory have stand-ins. Every operation on the device is counted as it would be launched; one that would make the
host wait for the device raises `Waits`, and one that mixes devices raises what torch raises.

What counts as a launch: each operation that torch dispatches to the device and that computes or copies something, once,
also where it consists of several kernels (a sort, say); not what makes a view, or only allocates. One of our own counts
as one, those of augmentation as their kernels. One on a list of tensors (`_foreach_*`, `_fused_*`) counts as torch's
multi-tensor kernels divide it: 65,536 numbers a block, at most 320 blocks and, by the number of lists, 110, 64, 48, 36
or 30 tensors a launch; the norm has another launch that gathers its parts. Bytes moved are the sizes of what an
operation is given and of what it returns, each element of an expanded tensor once.
"""

from __future__ import annotations

import ctypes
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipelines.augment.plan import num_launches
from pss.attention import attend as attention

OTHER = "the rest"  # the part of what is launched outside every `FakeGpu.part`
_NOTHING = {  # operations that start nothing, besides those that return views
    "aten::_unsafe_view", "aten::detach", "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::is_pinned",
    "aten::lift_fresh", "aten::new_empty", "aten::new_empty_strided", "aten::record_stream", "prim::device",
    "aten::sym_size", "aten::sym_stride", "aten::sym_numel", "aten::sym_storage_offset",
}  # fmt: skip
_SIZED_BY_DATA = {"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::bincount"}
"""Operations whose result has a size that the host must know."""
_BLOCK, _MOST_BLOCKS, _MOST_TENSORS = 65_536, 320, (110, 64, 48, 36, 30)


class Waits(RuntimeError):
    """An operation that makes the host wait until the device has done all that it was asked to."""


@dataclass
class Work:
    """What a part of a program asks of the device."""

    launches: int = 0
    moved: int = 0
    """Bytes."""
    by_name: Counter[str] = field(default_factory=Counter)
    """Launches by operation."""


class FakeGpu:
    """A context manager; within it there is a device "cuda:0" as the module says."""

    def __init__(self) -> None:
        self.work: dict[str, Work] = {}
        """By part, in the order in which they came up."""
        self._part = OTHER
        self._counting, self._reading = True, False
        self._pinned: dict[int, Tensor] = {}  # by address; kept, so that no other tensor comes to lie there
        self._generators: list[torch.Generator] = []
        self._exits = ExitStack()

    # What a program that is counted may say.

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Within, launches belong to the part `name`; of parts in parts the innermost counts."""
        before, self._part = self._part, name
        try:
            yield
        finally:
            self._part = before

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Within, the program prepares something or reads results: nothing is counted, and what waits is let pass.

        What is read is zeros.
        """
        before = self._counting, self._reading
        self._counting, self._reading = False, True
        try:
            yield
        finally:
            self._counting, self._reading = before

    def reset(self) -> None:
        """Forget what was counted."""
        self.work = {}

    # Entering and leaving.

    def __enter__(self) -> FakeGpu:
        enter = self._exits.enter_context
        enter(_autograd_without_driver())
        for place, name, stand_in in self._stand_ins():
            enter(mock.patch.object(place, name, stand_in))
        enter(FakeTensorMode(allow_non_fake_inputs=True))
        enter(_Mode(self))
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def _stand_ins(self) -> list[tuple[Any, str, Any]]:
        """What asks torch's CUDA runtime, and what it is replaced by."""

        def waits(*_: Any, **__: Any) -> None:
            self._wait("torch.cuda.synchronize")

        no_states = [torch.empty(0, dtype=torch.uint8)]
        return [
            (torch.cuda, "Stream", _Stream),
            (torch.cuda, "Event", _Event),
            (torch.cuda, "current_stream", lambda device=None: _Stream(device)),
            (torch.cuda, "default_stream", lambda device=None: _Stream(device)),
            (torch.cuda, "stream", _within),
            (torch.cuda, "device", _within),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "synchronize", waits),
            (torch.cuda, "manual_seed_all", lambda seed: None),
            (torch.cuda, "get_rng_state", lambda device=None: no_states[0]),
            (torch.cuda, "set_rng_state", lambda state, device=None: None),
            (torch.cuda, "get_device_name", lambda device=None: "a fake GPU"),
            (torch.cuda, "is_bf16_supported", lambda *_: True),
            # Without these two autocast finds no device, and does nothing.
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (Tensor, "pin_memory", lambda tensor, *_: self._pin(tensor)),
            (Tensor, "is_pinned", lambda tensor, *_: self._is_pinned(tensor)),
            (torch, "Generator", self._generator),
            (torch, "inference_mode", _inference_mode),
            (torch.nn.functional, "scaled_dot_product_attention", _attention),
            (torch._C._nn, "scaled_dot_product_attention", _attention),
            (attention, "_cudnn_gets_masks_right", lambda: True),
            # On a GPU tensors are of a type that is served a list at a time.
            (_foreach_utils, "_foreach_supported_types", [*_foreach_utils._foreach_supported_types, FakeTensor]),
        ]

    def _pin(self, tensor: Tensor) -> Tensor:
        assert tensor.device.type == "cpu", f"a tensor on {tensor.device} cannot be pinned"
        pinned = tensor.clone()
        self._pinned[pinned.untyped_storage().data_ptr()] = pinned
        return pinned

    def _is_pinned(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cpu" and tensor.untyped_storage().data_ptr() in self._pinned

    def _generator(self, device: Any = "cpu") -> torch.Generator:
        made = _real_generator("cpu")
        if torch.device(device).type == "cuda":
            self._generators.append(made)
        return made

    # What the mode asks.

    def _wait(self, what: str) -> None:
        if not self._reading:
            raise Waits(f"{what} waits for the device (in: {self._part})")

    def check(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Raise `Waits` for an operation that touches the device and waits for it."""
        name = _name(func)
        if name in _SIZED_BY_DATA:
            self._wait(name)
        elif name in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"):
            for index in args[1]:
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    self._wait(f"{name} with a mask")
                elif index is not None and not isinstance(index, FakeTensor):
                    self._wait(f"{name} with indices in the host's memory")
        elif name == "aten::repeat_interleave" and kwargs.get("output_size") is None:
            self._wait("repeat_interleave without output_size")
        generator = kwargs.get("generator")
        if generator is not None and all(generator._cdata != own._cdata for own in self._generators):
            raise RuntimeError(f"{name} on the device has a generator of the host")

    def check_copy(self, source: Tensor, to_device: bool, non_blocking: bool) -> None:
        """Raise `Waits` for a copy between host and device during which the host waits."""
        if not to_device:
            self._wait("a copy from the device to the host")
        elif source.numel() and not (non_blocking and self._is_pinned(source)):
            kind = "blocking" if self._is_pinned(source) else "pageable"
            self._wait(f"a {kind} copy of {tuple(source.shape)} from the host to the device")

    def note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Count an operation that was asked of the device."""
        name = _name(func)
        if not self._counting or name in _NOTHING or _returns_views(func):
            return
        work = self.work.setdefault(self._part, Work())
        launches = _launches(name, args)
        given, returned = (
            [leaf for leaf in tree_leaves(part) if isinstance(leaf, Tensor)] for part in ((args, kwargs), result)
        )
        work.launches += launches
        work.moved += sum(map(_num_bytes, given)) + sum(map(_num_bytes, returned))
        written = [a for a, way in zip(args, func._schema.arguments, strict=False) if way.alias_info is not None]
        if not returned:  # what is written in place is moved both ways
            work.moved += sum(_num_bytes(leaf) for leaf in tree_leaves(written) if isinstance(leaf, Tensor))
        work.by_name[name] += launches


class _Mode(TorchDispatchMode):
    """Computes on the host what has nothing to do with the device, and lets the fake tensors do the rest."""

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        target = kwargs.get("device")
        goes = target is not None and torch.device(target).type == "cuda"
        if not on_device and not goes:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if name == "aten::record_stream":
            return None
        if name == "aten::_local_scalar_dense":
            self.gpu._wait("reading a number")
            with unset_fake_temporarily():
                return torch.zeros((), dtype=args[0].dtype).item()
        if target is not None and not goes and on_device:
            self.gpu.check_copy(args[0], False, kwargs.get("non_blocking", False))
            return self._zeros(args[0].shape, kwargs.get("dtype") or args[0].dtype)
        if name == "aten::copy_" and not isinstance(args[0], FakeTensor):
            self.gpu.check_copy(args[1], False, False)
            return args[0].zero_()
        if name == "aten::_to_copy" and not on_device:
            self.gpu.check_copy(args[0], True, kwargs.get("non_blocking", False))
        elif name == "aten::copy_" and not isinstance(args[1], FakeTensor) and args[1].ndim:
            self.gpu.check_copy(args[1], True, (*args, kwargs.get("non_blocking", False))[2])
        self.gpu.check(func, args, kwargs)
        if kwargs.get("generator") is not None:  # a fake tensor would miss the device in it
            kwargs = {**kwargs, "generator": None}
        result = func(*args, **kwargs)
        self.gpu.note(func, args, kwargs, result)
        return result

    def _zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        with unset_fake_temporarily():
            return torch.zeros(shape, dtype=dtype)


def _name(func: Any) -> str:
    return str(func._schema.name)


def _returns_views(func: Any) -> bool:
    """Whether all that an operation returns shares memory with what it is given, and nothing is written."""
    aliases = [returned.alias_info for returned in func._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def _num_bytes(tensor: Tensor) -> int:
    """Of a tensor, each element of an expanded one counted once."""
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count


def _launches(name: str, args: Sequence[Any]) -> int:
    """How many launches an operation counts as; see the module."""
    if name == "pss::augment":
        return num_launches(args[3])
    if "_foreach_" not in name and "_fused_" not in name:
        return 1 + (name == "pss::mix" and args[3] > 0)  # targets, and images where some are mixed
    given = [arg for arg in args if isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], Tensor)]
    lists = [some for some in given if len(some) == len(given[0])]
    # The operation's result, where it is not written in place, is a list of its own.
    depth = len(lists) + (not name.endswith("_") and "norm" not in name)
    most = _MOST_TENSORS[min(depth, len(_MOST_TENSORS)) - 1]
    launches, tensors, blocks = 0, 0, 0
    for tensor in lists[0]:
        tensors += 1
        for _ in range(-(-tensor.numel() // _BLOCK)):
            blocks += 1
            if blocks == _MOST_BLOCKS:
                launches, tensors, blocks = launches + 1, 1, 0
        if tensors == most:
            launches, tensors, blocks = launches + (blocks > 0), 0, 0
    launches += blocks > 0
    return launches + ("norm" in name)


class _Stream:
    """A stream on which nothing happens."""

    def __init__(self, device: Any = None, **_: Any) -> None:
        self.device, self.cuda_stream = torch.device("cuda", 0), 0

    def wait_event(self, event: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def synchronize(self) -> None:
        raise Waits("Stream.synchronize waits for the device")

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class _Event:
    """An event that has happened."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        raise Waits("Event.synchronize waits for the device")


@contextmanager
def _within(place: Any) -> Iterator[Any]:
    yield place


def _inference_mode(*given: bool) -> Any:
    """A program's own inference mode without what fake tensors cannot do there; torch itself names the mode."""
    return _real_inference_mode(*given) if given else torch.no_grad()


_real_generator, _real_inference_mode = torch.Generator, torch.inference_mode
_real_attention = torch.nn.functional.scaled_dot_product_attention


def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, *args: Any, **options: Any
) -> Tensor:
    """torch's attention by the kernel that takes everything, as its own choice asks the driver."""
    if not isinstance(q, FakeTensor):
        return _real_attention(q, k, v, attn_mask, dropout_p, *args, **options)
    if attn_mask is not None:
        attn_mask = attn_mask.expand(len(q), q.shape[1], q.shape[2], k.shape[2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    wants = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    result: Tensor = efficient(q, k, v, attn_mask, wants, dropout_p, scale=options.get("scale"))[0]
    return result


@contextmanager
def _autograd_without_driver() -> Iterator[None]:
    """Let autograd run on fake tensors in a torch that is built for CUDA, on a machine without a driver.

    Its engine asks torch's CUDA hooks whether the device is in use, which raises an error there; within, the answer is
    no. Only C++ asks: the hooks, an object that lives as long as the process, get a copy of their table of virtual
    functions with that one replaced. Its place in the table is read from the header that torch brings along.
    """
    if not torch.backends.cuda.is_built() or torch.cuda.is_available():
        yield
        return
    root = Path(torch.__file__).parent
    find = ctypes.CDLL(str(root / "lib" / "libtorch_cpu.so"))["_ZN2at6detail12getCUDAHooksEv"]
    find.restype = ctypes.c_void_p
    hooks = ctypes.c_void_p.from_address(find())  # its first word points to the table
    header = (root / "include" / "ATen" / "detail" / "AcceleratorHooksInterface.h").read_text(encoding="utf-8")
    names = re.findall(r"virtual [^;{]*?([~\w]+)\(", header)
    assert names[0].startswith("~"), names  # a destructor has two places
    before, word, ahead = hooks.value, ctypes.sizeof(ctypes.c_void_p), 2  # words that belong to the table before it
    assert before is not None
    size = ahead + 128  # more than it has
    table = (ctypes.c_void_p * size).from_buffer_copy(ctypes.string_at(before - ahead * word, size * word))
    answer: Callable[..., Any] = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_int8)(lambda *_: False)
    table[ahead + 1 + names.index("hasPrimaryContext")] = ctypes.cast(answer, ctypes.c_void_p).value  # type: ignore[arg-type]
    hooks.value = ctypes.addressof(table) + ahead * word
    try:
        yield
    finally:
        hooks.value = before
