"""Relative position bias: one learned number per head and per offset between two patches of the grid.

Rows of a table, in the order of BEiT and timm: the `(2h-1)(2w-1)` patch offsets in raster order, then three rows
for pairs with a prefix token: prefix query and patch key, patch query and prefix key, prefix and prefix. All prefix
tokens (class, distillation, registers) share these three.

With `key(r, c) = r * (2w - 1) + c`, the row of a pair of patches is `key(query) - key(key) + C`: one integer per token
says everything about its position, whichever tokens are kept.
"""

import torch
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

    As in BEiT, small offsets keep their meaning in patches and larger ones are stretched more and more, in geometric
    progression, so that the largest offset of the old grid becomes that of the new one. A smaller grid gets the
    offsets that it has unchanged.

    Raises:
        ValueError: the table does not belong to `old_grid`.
    """
    if table.shape[0] != num_table_rows(old_grid):
        raise ValueError(f"a table of {table.shape[0]} rows does not belong to a patch grid of {old_grid}")
    offsets = table[:-NUM_PREFIX_ROWS].reshape(2 * old_grid[0] - 1, 2 * old_grid[1] - 1, -1)  # (rows, columns, H)
    vertical, horizontal = (_interpolation(old, new).to(table) for old, new in zip(old_grid, new_grid, strict=True))
    resized = torch.einsum("yi,xj,ijh->yxh", vertical, horizontal, offsets)
    return torch.cat((resized.flatten(0, 1), table[-NUM_PREFIX_ROWS:]))


def _interpolation(old: int, new: int) -> Tensor:
    """The linear map from values at the offsets between `old` positions to values at those between `new` ones.

    (2 new - 1, 2 old - 1)
    """
    if old == 1:
        return torch.ones(2 * new - 1, 1)
    positive = _stretch(old - 1, new - 1) ** torch.arange(old - 1, dtype=torch.float64)
    positive = positive.cumsum(0)  # where the old offsets 1, 2, ... come to lie on the new grid
    source = torch.cat((-positive.flip(0), torch.zeros(1), positive))
    target = torch.arange(1 - new, new, dtype=torch.float64).clamp(source[0], source[-1])
    right = torch.searchsorted(source, target).clamp(min=1)
    share = (target - source[right - 1]) / (source[right] - source[right - 1])
    rows = torch.arange(2 * new - 1)
    weights = torch.zeros(2 * new - 1, 2 * old - 1, dtype=torch.float64)
    weights[rows, right - 1] = 1 - share
    weights[rows, right] = share
    return weights


def _stretch(num_offsets: int, reach: int) -> float:
    """The ratio r >= 1 for which 1 + r + ... + r ** (num_offsets - 1) is `reach`; 1 if there is none."""
    if num_offsets < 2:
        return 1.0
    low, high = 1.0, float(max(1, reach))
    for _ in range(60):
        middle = (low + high) / 2
        too_far = sum(middle**power for power in range(num_offsets)) > reach
        low, high = (low, middle) if too_far else (middle, high)
    return low
