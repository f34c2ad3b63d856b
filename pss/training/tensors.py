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
    """What a module holds. Its parameters and modules stay the same ones; a buffer may be replaced by another."""

    def __init__(self, module: nn.Module) -> None:
        """Look through `module` once."""
        self.parameters = list(module.parameters())
        """As torch lists them."""
        self.trained = [part for part in self.parameters if part.requires_grad]
        self.alike = _alike(self.parameters)
        """Whether all parameters, and with them their gradients, are of one kind."""
        self.sharded = any(isinstance(part, DTensor) for part in self.parameters)
        self._with_buffers = [one for one in module.modules() if one._buffers]

    def buffers(self) -> list[Tensor]:
        """What `module.buffers()` yields, in another order at most."""
        found = [part for one in self._with_buffers for part in one._buffers.values() if part is not None]
        return list({id(part): part for part in found}.values()) if len(found) > 1 else found

    def state(self) -> list[Tensor]:
        """What a state dict holds: the parameters, and those buffers that are saved, each once."""
        kept = [
            part
            for one in self._with_buffers
            for name, part in one._buffers.items()
            if part is not None and name not in one._non_persistent_buffers_set
        ]
        return [*self.parameters, *({id(part): part for part in kept}.values())]


@torch.no_grad()
def total_norm(parts: Sequence[Tensor], alike: bool | None = None) -> Tensor:
    """`nn.utils.get_total_norm(parts)`, to the bit. `alike` says whether the parts are of one kind; None looks."""
    first = parts[0] if parts else torch.zeros(())
    alike = bool(parts) and (_alike(parts) if alike is None else alike)
    if not alike or not _has_foreach_support([first.detach()], first.device):
        return nn.utils.get_total_norm(list(parts))
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(parts), 2.0)), 2.0)
    return norm


def _alike(parts: Sequence[Tensor]) -> bool:
    return len({(type(part), part.dtype, part.device) for part in parts}) == 1
