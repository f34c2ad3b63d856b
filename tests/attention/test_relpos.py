"""The bias index against explicit coordinates and against timm."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.pos_embed_rel import gen_relative_position_index

from pss.attention.relpos import fold, num_table_rows, pair_entries, pair_rows, positions, resize_table, spread

grids = st.tuples(st.integers(1, 6), st.integers(1, 6))


def explicit_row(grid: tuple[int, int], query: int | None, key: int | None) -> int:
    """The table row of a pair of patches by their coordinates; None stands for a prefix token."""
    height, width = grid
    num_offsets = (2 * height - 1) * (2 * width - 1)
    if query is None or key is None:
        return num_offsets + (2 if query is None and key is None else 0 if query is None else 1)
    down = query // width - key // width
    right = query % width - key % width
    return (down + height - 1) * (2 * width - 1) + (right + width - 1)


@given(grid=grids, num_prefix=st.integers(0, 3), data=st.data())
@settings(max_examples=60)
def test_index_names_the_offset_of_every_kept_pair(grid: tuple[int, int], num_prefix: int, data: st.DataObject) -> None:
    num_patches = grid[0] * grid[1]
    num_kept = data.draw(st.integers(1, num_patches))
    rows = [
        sorted(data.draw(st.permutations(range(num_patches)))[:num_kept]) for _ in range(data.draw(st.integers(1, 3)))
    ]
    where = positions(grid, num_prefix, torch.tensor(rows))
    index = pair_rows(where, num_table_rows(grid))
    for image, row in enumerate(rows):
        tokens = [None] * num_prefix + row
        assert index[image].tolist() == [[explicit_row(grid, query, key) for key in tokens] for query in tokens]
    table = torch.randn(num_table_rows(grid), 2)
    assert torch.equal(spread(table)[:, pair_entries(where)], table[index].permute(3, 0, 1, 2))


@pytest.mark.parametrize("grid", [(14, 14), (24, 24), (3, 5)])
def test_full_index_is_timms(grid: tuple[int, int]) -> None:
    expected = gen_relative_position_index(grid, class_token=True)
    index = pair_rows(positions(grid, 1), num_table_rows(grid))
    assert index.dtype == torch.int64
    assert torch.equal(index, expected.unsqueeze(0))
    assert num_table_rows(grid) == int(expected.max()) + 1


@given(grid=grids, num_heads=st.integers(1, 3))
@settings(max_examples=20)
def test_fold_is_the_adjoint_of_spread(grid: tuple[int, int], num_heads: int) -> None:
    table = torch.randn(num_table_rows(grid), num_heads, dtype=torch.float64)
    entries = torch.randn_like(spread(table))
    assert (fold(entries, len(table)) * table).sum().item() == pytest.approx((entries * spread(table)).sum().item())


@pytest.mark.parametrize(("grid", "rows"), [((14, 14), 732), ((24, 24), 2212), ((1, 1), 4)])
def test_table_sizes(grid: tuple[int, int], rows: int) -> None:
    assert num_table_rows(grid) == rows


@given(old=grids, new=grids)
@settings(max_examples=30)
def test_resized_table_keeps_shape_prefix_rows_and_constants(old: tuple[int, int], new: tuple[int, int]) -> None:
    table = torch.full((num_table_rows(old), 2), 0.5)
    table[-3:] = torch.arange(6.0).view(3, 2)
    resized = resize_table(table, old, new)
    assert resized.shape == (num_table_rows(new), 2)
    assert torch.equal(resized[-3:], table[-3:])
    assert resized[:-3] == pytest.approx(torch.full_like(resized[:-3], 0.5), abs=1e-6)


def test_resized_table_keeps_the_near_offsets() -> None:
    """Offset zero stays where it is, a table growing with distance still grows, and the own grid changes nothing."""
    old, new = (7, 7), (12, 12)
    rows = torch.arange(-6.0, 7.0)
    distance = (rows[:, None] ** 2 + rows[None, :] ** 2).sqrt()
    table = torch.cat((distance.flatten(), torch.zeros(3))).unsqueeze(1)
    assert torch.equal(resize_table(table, old, old), table)
    resized = resize_table(table, old, new)[:-3, 0].view(23, 23)
    assert resized[11, 11] == pytest.approx(0, abs=1e-6)
    assert (resized[11, 11:].diff() > 0).all()
    assert (resized[11:, 11].diff() > 0).all()
    assert resized[11, 22] == pytest.approx(6)


def test_smaller_grid_keeps_its_offsets() -> None:
    table = torch.randn(num_table_rows((5, 7)), 3, dtype=torch.float64)
    resized = resize_table(table, (5, 7), (3, 4))
    offsets = table[:-3].view(9, 13, 3)[2:-2, 3:-3]
    assert resized[:-3].view(5, 7, 3) == pytest.approx(offsets, abs=1e-12)


def test_table_of_another_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="100 rows"):
        resize_table(torch.zeros(100, 2), (14, 14), (24, 24))
