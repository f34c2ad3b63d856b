"""Tensors that may be shards of larger ones (FSDP2), handled alike with those that are not."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(value: Tensor) -> Tensor:
    """`value` itself, or, if it is a shard, all of it: every process must ask."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def own_part(value: Tensor) -> Tensor:
    """`value` itself, or, if it is a shard, this process's share of it, in the same memory."""
    return value.to_local() if isinstance(value, DTensor) else value


def part_like(value: Tensor, like: Tensor) -> Tensor:
    """Of a tensor that every process has the whole of, the part that goes with this process's part of `like`."""
    return own_part(shard_like(value, like))


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process has the whole of, sharded as `like` is; itself if `like` is no shard."""
    if not isinstance(like, DTensor):
        return value
    # Every process has the whole of it, so nothing needs to be sent.
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
