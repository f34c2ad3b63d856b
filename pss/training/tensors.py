"""The tensors of a module, in the order in which torch lists them, and without the names.

torch's own lists go through a generator for every level of the tree, and a state dict through all its hooks: at each
step that is milliseconds of the thread that has to keep a GPU busy.
"""

from __future__ import annotations

from itertools import chain

from torch import Tensor, nn


def parameters(module: nn.Module) -> list[nn.Parameter]:
    """What `module.parameters()` yields."""
    found = (part for one in _unique(module) for part in one._parameters.values() if part is not None)
    return list({id(part): part for part in found}.values())


def buffers(module: nn.Module) -> list[Tensor]:
    """What `module.buffers()` yields."""
    found = (part for one in _unique(module) for part in one._buffers.values() if part is not None)
    return list({id(part): part for part in found}.values())


def state(module: nn.Module) -> list[Tensor]:
    """The tensors of `module.state_dict()`, themselves: parameters, and buffers that are saved, shared ones repeated."""
    found: list[Tensor] = []
    for one in _modules(module, []):
        kept = (part for name, part in one._buffers.items() if name not in one._non_persistent_buffers_set)
        found += [part for part in chain(one._parameters.values(), kept) if part is not None]
    return found


def _unique(module: nn.Module) -> list[nn.Module]:
    return list({id(one): one for one in _modules(module, [])}.values())


def _modules(module: nn.Module, found: list[nn.Module]) -> list[nn.Module]:
    """`module` and all below it, depth first; one that is at several places is there as often."""
    found.append(module)
    for child in module._modules.values():
        if child is not None:
            _modules(child, found)
    return found
