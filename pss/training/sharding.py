"""Models that do not fit one GPU: parameters, gradients, moving average and optimizer state in shards (FSDP2).

Each process keeps a share of every tensor and sees a block whole only while it computes it. What is learnt is what DDP
learns. Checkpoints hold whole tensors, so that other numbers of processes, and `pss-eval`, can read them; gathering
them, like every forward pass, takes all processes together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from pss.runtime.shards import shard_like

if TYPE_CHECKING:
    from pss.methods import Method
    from pss.runtime.processes import World


def shard(method: Method, world: World) -> None:
    """Turn the parameters of `method`, the same on every process, into shards on the processes' devices.

    Block by block, so that no device ever holds the whole model if `method` is still on the host.
    """
    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in method.model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(method, mesh=mesh)
    # What validation calls; the one may call the other, which must not gather anew.
    register_fsdp_forward_method(method, "predict_with_cost" if method.costs_vary else "predict")
    register_fsdp_forward_method(method, "begin_run")
    for buffer in method.buffers():
        assert buffer.device.type == world.device.type, "buffers are not sharded, and must be on the device"


def reshard(method: nn.Module) -> None:
    """Let go of what a forward pass without a backward pass has gathered: parameters are shards again."""
    for module in method.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather(state: Any, world: World) -> Any:
    """`state` with whole tensors, on the host, in place of shards; every process must call it.

    Only the main process gets them, one after the other: no device needs room for more than one.
    """

    def collect(part: DTensor) -> Tensor:
        value: Tensor = part.full_tensor()
        return value.cpu() if world.is_main else value.new_empty(0)

    return tree_map_only(DTensor, collect, state)


def scatter_optimizer(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimizer of whole tensors, for one whose parameters are shards."""
    parameters: list[nn.Parameter] = [part for group in optimizer.param_groups for part in group["params"]]
    shards: dict[int, dict[str, Any]] = {}
    for number, values in state["state"].items():
        like = parameters[number]
        shards[number] = {
            name: shard_like(value, like) if isinstance(value, Tensor) and value.shape == like.shape else value
            for name, value in values.items()
        }
    return state | {"state": shards}
