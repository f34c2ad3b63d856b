"""The tensors of a module, at hand at every step without going through its tree again.

torch's own lists go through a generator for every level of the tree, and a state dict through all its hooks: at each
step that is milliseconds of the thread that has to keep a GPU busy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._foreach_utils import _has_foreach_support


class Inventory:
    """What a module holds. Its parameters and modules stay the same ones; a buffer may be replaced by another of its
    kind, and one that is not there yet may come."""

    def __init__(self, module: nn.Module) -> None:
        """Look through `module` once."""
        self.parameters = list(module.parameters())
        """As torch lists them."""
        self.trained = [part for part in self.parameters if part.requires_grad]
        self.alike = _served_as_list(self.parameters)
        """Whether all parameters, and with them their gradients, are of one kind, which torch takes lists of."""
        self.sharded = any(isinstance(part, DTensor) for part in self.parameters)
        places = [(one, name) for one in module.modules() for name in one._buffers]
        self._saved = [(one._buffers, name) for one, name in places if name not in one._non_persistent_buffers_set]
        self._statistics = [
            (one._buffers, name)
            for one, name in places
            if (part := one._buffers[name]) is None or part.is_floating_point()
        ]

    def gradients(self) -> list[Tensor]:
        """Of those parameters that have one."""
        return [gradient for part in self.parameters if (gradient := part.grad) is not None]

    def forget_gradients(self) -> None:
        """Set all to None, also what no optimizer has."""
        for part in self.parameters:
            part.grad = None

    def statistics(self) -> list[Tensor]:
        """The floating-point buffers."""
        return [part for part in _present(self._statistics) if part.is_floating_point()]

    def saved_buffers(self) -> list[Tensor]:
        """Those that a state dict holds, each once."""
        return _present(self._saved)


def _present(places: list[tuple[dict[str, Tensor | None], str]]) -> list[Tensor]:
    found = [part for holder, name in places if (part := holder[name]) is not None]
    return list({id(part): part for part in found}.values()) if len(found) > 1 else found


@torch.no_grad()
def total_norm(parts: Sequence[Tensor], alike: bool | None = None) -> Tensor:
    """`nn.utils.get_total_norm(parts)`, to the bit. `alike` is that of their `Inventory`; None looks at the parts."""
    if not parts or not (_served_as_list(parts) if alike is None else alike):
        return nn.utils.get_total_norm(list(parts))
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(parts), 2.0)), 2.0)
    return norm


@torch.no_grad()
def clip_gradients(gradients: Sequence[Tensor], max_norm: float, norm: Tensor, alike: bool) -> None:
    """`nn.utils.clip_grads_with_norm_` of the parameters that have these gradients, to the bit; `norm` is theirs, and
    `alike` that of their `Inventory`."""
    share = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    if gradients and alike:
        torch._foreach_mul_(list(gradients), share)
        return
    for gradient in gradients:
        gradient.mul_(share.to(gradient.device))


def _served_as_list(parts: Sequence[Tensor]) -> bool:
    kinds = {(type(part), part.dtype, part.device) for part in parts}
    return len(kinds) == 1 and _has_foreach_support([parts[0].detach()], parts[0].device)
