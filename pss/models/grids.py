"""The patch grid that a ViT's tensors were made for, as far as their shapes tell it, and tensors brought to another."""

from __future__ import annotations

import math
from collections.abc import Mapping

from timm.layers import resample_abs_pos_embed
from torch import Tensor

from pss.attention import relpos
from pss.attention.relpos import Grid

TABLE = "relative_position_bias_table"
SEPARABLE_TABLE = f"separable_{TABLE}"


def candidates(tensors: Mapping[str, Tensor], num_placed_prefix: int | None) -> list[Grid]:
    """The (h, w) grids that position embedding and bias tables allow, as far as they can be told apart.

    `num_placed_prefix` is how many prefix tokens have a position in `pos_embed`; None if it is not known.

    One number alone, of patches or of rows, is taken for that of a square: other grids have the same. Two of them are
    of one grid and of the one that lies across it. Nothing is returned where there is no such grid.
    """
    rows = _rows_of(tensors, TABLE)
    separable = _rows_of(tensors, SEPARABLE_TABLE)
    counts = _patch_counts(tensors, num_placed_prefix)
    if not counts:
        total = (separable - 1) / 2 if separable is not None else (math.isqrt(max(0, (rows or 0) - 3)) + 1)
        side = int(total) // 2
        fits = rows in (None, relpos.num_table_rows((side, side))) if side else False
        return [(side, side)] if fits and (rows is not None or separable == 4 * side + 1) else []
    for count in counts:
        if rows is None and separable is None:
            side = math.isqrt(count)
            if side * side == count:
                return [(side, side)]
            continue
        twice = (4 * count + 4 - rows) if rows is not None else (separable or 0) - 1  # 2 (h + w)
        width = twice // 2
        rest = width * width - 4 * count
        if twice % 2 or rest < 0 or math.isqrt(rest) ** 2 != rest or (width + math.isqrt(rest)) % 2:
            continue
        long = (width + math.isqrt(rest)) // 2
        short = width - long
        return [(long, long)] if long == short else [(short, long), (long, short)]
    return []


def is_sure(tensors: Mapping[str, Tensor], grids: list[Grid]) -> bool:
    """Whether the only grid that `candidates` found can be the only one: two numbers of the file agree on it."""
    tables = any(name.endswith(TABLE) for name in tensors)
    return len(grids) == 1 and "pos_embed" in tensors and tables


def _rows_of(tensors: Mapping[str, Tensor], table: str) -> int | None:
    return next(
        (value.shape[0] for name, value in tensors.items() if name.split(".")[-1] == table and value.ndim), None
    )


def _patch_counts(tensors: Mapping[str, Tensor], num_placed_prefix: int | None) -> list[int]:
    """How many patches `pos_embed` may have places for: its prefix may have none."""
    if "pos_embed" not in tensors or tensors["pos_embed"].ndim != 3:
        return []
    num_positions = tensors["pos_embed"].shape[1]
    if num_placed_prefix is not None:
        counts = [num_positions - num_placed_prefix]
    else:
        num_prefix = sum(tensors[name].shape[1] for name in ("cls_token", "dist_token", "reg_token") if name in tensors)
        counts = [num_positions - num_prefix, num_positions]
    return [count for count in counts if count > 0]


def resize(name: str, value: Tensor, old: Grid, new: Grid, num_placed_prefix: int) -> Tensor | None:
    """A tensor that has a row for every patch or offset, interpolated; None if it is not of the old grid."""
    if name == "pos_embed":
        if value.shape[1] != old[0] * old[1] + num_placed_prefix:
            return None
        placed: Tensor = resample_abs_pos_embed(value, new, old, num_placed_prefix)
        return placed
    if name.split(".")[-1] == TABLE and value.shape[0] == relpos.num_table_rows(old):
        return relpos.resize_table(value, old, new)
    return None
