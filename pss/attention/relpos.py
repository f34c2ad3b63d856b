"""Where two tokens lie relative to each other, and the learned tables that attention looks up by it.

Rows of a bias table, in the order of BEiT and timm: the `(2h-1)(2w-1)` patch offsets in raster order, then three rows
for pairs with a prefix token: prefix query and patch key, patch query and prefix key, prefix and prefix. All prefix
tokens (class, distillation, registers) share these three.

With `key(r, c) = r * (2w - 1) + c`, the row of a pair of patches is `key(query) - key(key) + reach`, where `reach` is
the largest key: one integer per token says everything about its position, whichever tokens are kept. So that a
difference says it of the prefix tokens too, each of the last three rows is spread over `reach + 1` entries
(`spread`), and a token has one number as a query and another one as a key (`positions`).

The separable table has `2h-1` rows for vertical offsets, `2w-1` for horizontal ones, and the same last three.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]

NUM_PREFIX_ROWS = 3


def num_table_rows(grid: Grid) -> int:
    """Rows of the table of an (h, w) patch grid."""
    height, width = grid
    return (2 * height - 1) * (2 * width - 1) + NUM_PREFIX_ROWS


def num_separable_rows(grid: Grid) -> int:
    """Rows of the separable table of an (h, w) patch grid."""
    height, width = grid
    return (2 * height - 1) + (2 * width - 1) + NUM_PREFIX_ROWS


def num_separable_features(grid: Grid) -> int:
    """Width of `separable_features` for an (h, w) patch grid: h + w + 1, up to a multiple of 8."""
    height, width = grid
    return -(-(height + width + 1) // 8) * 8


def reach(num_rows: int) -> int:
    """The largest offset between two patches, as a difference of keys, of a table with `num_rows` rows."""
    return (num_rows - NUM_PREFIX_ROWS) // 2


def num_entries(num_rows: int) -> int:
    """Entries that `spread` makes of a table of `num_rows` rows, for each head."""
    return 5 * reach(num_rows) + 4


def positions(
    grid: Grid, num_prefix: int, kept: Tensor | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Two numbers per token, one as a query and one as a key; their difference is the pair's entry in `spread`.

    Args:
        grid: Patch rows and columns (h, w) of the whole image.
        num_prefix: Leading tokens that are not patches.
        kept: Indices of the kept patches, (B, K - num_prefix); None when all patches are there.
        device: Where to build the numbers if `kept` is None.

    Returns:
        (2, B, K) int64, or (2, 1, N) if `kept` is None.
    """
    height, width = grid
    stride = 2 * width - 1
    farthest = reach(num_table_rows(grid))
    patches = torch.arange(height * width, device=device).unsqueeze(0) if kept is None else kept
    keys = patches // width * stride + patches % width  # (B, K - num_prefix), 0 to farthest
    numbers = keys.new_empty(2, keys.shape[0], num_prefix + keys.shape[1])
    numbers[0, :, num_prefix:] = keys + farthest
    numbers[1, :, num_prefix:] = keys
    numbers[0, :, :num_prefix] = 3 * farthest + 1
    numbers[1, :, :num_prefix] = -2 * (farthest + 1)
    return numbers


def turns(angles: Tensor, num_prefix: int, kept: Tensor | None = None) -> Tensor:
    """What rotary embedding turns each token by.

    Args:
        angles: Sines and cosines of all patches, (patches, 2 * head width).
        num_prefix: Leading tokens that are not patches, which are not turned.
        kept: Indices of the kept patches, (B, K - num_prefix); None when all patches are there.

    Returns:
        (B, K, 2 * head width), or (1, N, 2 * head width) if `kept` is None.
    """
    patches = angles.unsqueeze(0) if kept is None else angles[kept]
    still = torch.cat((angles.new_zeros(1), angles.new_ones(1))).repeat_interleave(angles.shape[1] // 2)
    return torch.cat((still.expand(patches.shape[0], num_prefix, -1), patches), dim=1)


def spread(table: Tensor) -> Tensor:
    """The table (rows, H) by head, its last three rows repeated `reach + 1` times: (H, 5 * reach + 4)."""
    by_head = table.t()
    offsets, prefix = by_head[:, :-NUM_PREFIX_ROWS], by_head[:, -NUM_PREFIX_ROWS:]
    repeated = prefix.unsqueeze(2).expand(-1, -1, reach(table.shape[0]) + 1)
    return torch.cat((offsets, repeated.flatten(1)), dim=1)


def fold(entries: Tensor, num_rows: int) -> Tensor:
    """The adjoint of `spread`: (H, entries) to (rows, H)."""
    num_offsets = num_rows - NUM_PREFIX_ROWS
    prefix = entries[:, num_offsets:].reshape(len(entries), NUM_PREFIX_ROWS, -1).sum(2)
    return torch.cat((entries[:, :num_offsets], prefix), dim=1).t()


def pair_entries(positions: Tensor) -> Tensor:
    """The entry in `spread` of every pair of tokens, queries first: (2, B, K) to (B, K, K)."""
    return positions[0].unsqueeze(2) - positions[1].unsqueeze(1)


def pair_rows(positions: Tensor, num_rows: int) -> Tensor:
    """The row in a table of `num_rows` rows of every pair of tokens, queries first: (2, B, K) to (B, K, K)."""
    entries = pair_entries(positions)
    num_offsets = num_rows - NUM_PREFIX_ROWS
    prefix_row = (entries - num_offsets) // (reach(num_rows) + 1)
    return torch.where(entries < num_offsets, entries, num_offsets + prefix_row)


def separable_features(table: Tensor, positions: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Features of queries and of keys whose products are the bias of a separable table.

    A key tells its row and its column, one of h and one of w features being 1, or that it is a prefix token, by one
    more; a query has the table's values for all of these. A few zeros make the width a multiple of 8, which torch's
    kernels want.

    Args:
        table: (rows, H): vertical offsets from -(h-1) to h-1, horizontal ones likewise, then three rows for prefix
            query and patch key, patch query and prefix key, prefix and prefix.
        positions: Of the tokens, (2, B, K).
        grid: Patch rows and columns (h, w) of the whole image.

    Returns:
        (B, H, K, features) and (B, 1, K, features).
    """
    height, width = grid
    by_head = table.t()  # (H, rows)
    vertical, horizontal = by_head[:, : 2 * height - 1], by_head[:, 2 * height - 1 : -NUM_PREFIX_ROWS]
    prefix = by_head[:, -NUM_PREFIX_ROWS:]
    # A query in row r meets keys in rows 0, 1, ... at offsets r, r - 1, ...; line h or w is a prefix token's.
    rows = vertical.flip(1).unfold(1, height, 1).flip(1)  # (H, h, h)
    columns = horizontal.flip(1).unfold(1, width, 1).flip(1)
    to_patch, to_prefix, both = prefix[:, :, None, None].unbind(1)  # (H, 1, 1) each
    rows = torch.cat((rows, to_patch.expand(-1, 1, height)), dim=1)
    columns = torch.cat((columns, torch.zeros_like(columns[:, :1])), dim=1)
    prefixes = torch.cat((to_prefix, both), dim=1)  # (H, 2, 1)

    keys = positions[1]  # (B, K)
    is_prefix = keys < 0
    row = torch.where(is_prefix, height, keys // (2 * width - 1))
    column = torch.where(is_prefix, width, keys % (2 * width - 1))
    padding = num_separable_features(grid) - (height + width + 1)
    query_features = (
        F.embedding(index, lines.transpose(0, 1).flatten(1)).view(*index.shape, *lines.shape[::2])
        for index, lines in ((row, rows), (column, columns), (is_prefix.long(), prefixes))
    )  # (B, K, H, h), (B, K, H, w), (B, K, H, 1)
    for_queries = F.pad(torch.cat(tuple(query_features), dim=3), (0, padding)).transpose(1, 2)
    key_features = (
        F.one_hot(row, height + 1)[..., :-1],
        F.one_hot(column, width + 1)[..., :-1],
        is_prefix.unsqueeze(2),
    )
    for_keys = F.pad(torch.cat(key_features, dim=2), (0, padding)).unsqueeze(1)
    return for_queries, for_keys.to(table.dtype)


def resize_table(table: Tensor, old_grid: Grid, new_grid: Grid) -> Tensor:
    """Interpolate a table (rows, H) to another grid; the three prefix rows are kept as they are.

    As in BEiT, small offsets keep their meaning in patches and larger ones are stretched more and more, in geometric
    progression, so that the largest offset of the old grid becomes that of the new one. A smaller grid gets the
    offsets that it has unchanged.

    Raises:
        ValueError: the table does not belong to `old_grid`.
    """
    if table.shape[0] != num_table_rows(old_grid):
        raise ValueError(
            f"a table of {table.shape[0]} rows does not belong to a patch grid of {old_grid}; name the grid it is of"
        )
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
