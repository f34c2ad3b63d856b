"""Relative position bias: one learned number per head and per offset between two patches of the grid.

Rows of a table, in the order of BEiT and timm: the `(2h-1)(2w-1)` patch offsets in raster order, then three rows
for pairs with a prefix token: prefix query and patch key, patch query and prefix key, prefix and prefix. All prefix
tokens (class, distillation, registers) share these three.

With `key(r, c) = r * (2w - 1) + c`, the row of a pair of patches is `key(query) - key(key) + C`: one integer per token
says everything about its position, whichever tokens are kept.
"""

import torch
from timm.layers import resize_rel_pos_bias_table
from torch import Tensor

Grid = tuple[int, int]

NUM_PREFIX_ROWS = 3


def num_table_rows(grid: Grid) -> int:
    """Rows of the table of an (h, w) patch grid."""
    height, width = grid
    return (2 * height - 1) * (2 * width - 1) + NUM_PREFIX_ROWS


def bias_index(
    grid: Grid, num_prefix: int, kept: Tensor | None = None, device: torch.device | str | None = None
) -> Tensor:
    """The table row of every pair of tokens, queries first.

    Args:
        grid: Patch rows and columns (h, w) of the whole image.
        num_prefix: Leading tokens that are not patches.
        kept: Indices of the kept patches, (B, K - num_prefix); None when all patches are there.
        device: Where to build the index if `kept` is None.

    Returns:
        (B, K, K) int64, or (1, N, N) if `kept` is None.
    """
    height, width = grid
    stride = 2 * width - 1
    patches = torch.arange(height * width, device=device).unsqueeze(0) if kept is None else kept
    keys = patches // width * stride + patches % width  # (B, K - num_prefix)
    offset = (height - 1) * stride + width - 1

    num_rows = num_table_rows(grid)
    num_tokens = num_prefix + patches.shape[1]
    index = keys.new_empty(keys.shape[0], num_tokens, num_tokens)
    index[:, num_prefix:, num_prefix:] = keys.unsqueeze(2) - keys.unsqueeze(1) + offset
    index[:, :num_prefix, num_prefix:] = num_rows - 3
    index[:, num_prefix:, :num_prefix] = num_rows - 2
    index[:, :num_prefix, :num_prefix] = num_rows - 1
    return index


def resize_table(table: Tensor, old_grid: Grid, new_grid: Grid) -> Tensor:
    """Interpolate a table (rows, H) to another grid; the three prefix rows are kept as they are.

    Offsets near zero keep their spacing and far ones are stretched geometrically, as BEiT does it.

    Raises:
        ValueError: the table does not belong to `old_grid`.
    """
    if table.shape[0] != num_table_rows(old_grid):
        raise ValueError(f"a table of {table.shape[0]} rows does not belong to a patch grid of {old_grid}")
    shape = (num_table_rows(new_grid), table.shape[1])
    resized: Tensor = resize_rel_pos_bias_table(table, new_grid, shape, old_window_size=old_grid)
    return resized
