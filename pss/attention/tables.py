"""What the kernels of `pss.attention.kernels` do with a bias table, as functions of tensors.

Needs Triton and a CUDA device, or Triton's interpreter (TRITON_INTERPRET=1), which runs the kernels on a CPU, slowly.
"""

from typing import Any

import torch
import triton  # type: ignore[import-untyped,unused-ignore]
from torch import Tensor

from pss.attention import kernels as kernels
from pss.attention import relpos

# The default of this option is about to change, and Triton warns until one chooses.
FUSE: dict[str, Any] = {"enable_fp_fusion": True}

# Programs per multiprocessor in a kernel that sums the gradient of a table: each has histograms to fill and to sum.
_PROGRAMS_PER_MULTIPROCESSOR = 2


def spread_table(table: Tensor, factor: float = 1.0) -> Tensor:
    """`pss.attention.relpos.spread` of `table` (rows, H) times `factor`, in float32."""
    num_rows, num_heads = table.shape
    reach = relpos.reach(num_rows)
    num_entries = 5 * reach + 4
    spread = table.new_empty(num_heads, num_entries, dtype=torch.float32)
    kernels.spread_table[(triton.cdiv(num_entries, 256), num_heads)](
        table, spread, factor, 2 * reach + 1, reach, num_entries, *table.stride(), BLOCK=256, **FUSE
    )
    return spread


def write_bias(table: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """The bias of all pairs of tokens, (B or 1, H, K, K).

    Lines are a multiple of 8 numbers apart, as torch's memory-efficient kernel wants them; it would copy others.
    """
    _, num_sets, num_tokens = positions.shape
    num_rows, num_heads = table.shape
    positions = positions.contiguous()
    bias = table.new_empty(num_sets, num_heads, num_tokens, -(-num_tokens // 8) * 8, dtype=dtype)
    kernels.write_bias[(triton.cdiv(num_tokens, 32) * num_sets * num_heads,)](
        spread_table(table),
        positions,
        bias,
        num_heads,
        num_tokens,
        relpos.reach(num_rows),
        positions.stride(0),
        set_stride(positions),
        bias.stride(2),
        BLOCK_QUERIES=32,
        BLOCK_KEYS=64,
        **FUSE,
    )
    return bias[..., :num_tokens]


def reduce_bias(grad_bias: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    """The gradient of `table` (rows, H), from that of the bias (B, H, K, K); the adjoint of `write_bias`."""
    num_images, num_heads, num_tokens, _ = grad_bias.shape
    assert grad_bias.stride(3) == 1
    positions = positions.contiguous()
    reduction = TableReduction(table, num_images, num_tokens, block_size=64)
    kernels.reduce_bias[(reduction.num_programs,)](
        grad_bias,
        positions,
        reduction.histograms,
        reduction.partial,
        num_images,
        num_heads,
        num_tokens,
        relpos.reach(table.shape[0]),
        reduction.images_per_program,
        *grad_bias.stride()[:-1],
        positions.stride(0),
        set_stride(positions),
        BLOCK_QUERIES=32,
        BLOCK_KEYS=64,
        BLOCK_ENTRIES=64,
        **FUSE,
    )
    return reduction.total()


class TableReduction:
    """How a kernel sums the gradient of a table (rows, H) over a batch, and the memory for it."""

    def __init__(self, table: Tensor, num_images: int, num_tokens: int, block_size: int) -> None:
        num_rows, num_heads = table.shape
        num_blocks = triton.cdiv(num_tokens, block_size)
        multiprocessors = torch.cuda.get_device_properties(table.device).multi_processor_count if table.is_cuda else 1
        num_groups = max(1, _PROGRAMS_PER_MULTIPROCESSOR * multiprocessors // (num_blocks * num_heads))
        self.images_per_program = triton.cdiv(num_images, num_groups)
        num_groups = triton.cdiv(num_images, self.images_per_program)
        self.num_programs = num_groups * num_heads * num_blocks
        num_offsets = num_rows - relpos.NUM_PREFIX_ROWS
        self.histograms = table.new_empty(self.num_programs, block_size, num_offsets, dtype=torch.float32)
        self.partial = table.new_empty(num_groups * num_blocks, num_rows, num_heads, dtype=torch.float32)
        self._dtype = table.dtype

    def total(self) -> Tensor:
        """The gradient (rows, H), once the kernel is through."""
        return self.partial.sum(0).to(self._dtype)


def set_stride(positions: Tensor) -> int:
    """How far the numbers of one image are from those of the next; 0 if all images keep the same tokens."""
    return positions.stride(1) if positions.shape[1] > 1 else 0
