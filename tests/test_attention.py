"""Attention with a position bias against plain loops in double precision."""

import math

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Attention as TimmAttention
from torch import Tensor, nn

from pss.attention import Attention, attend, attend_explicitly
from pss.relpos import bias_index, num_table_rows


def table_row(grid: tuple[int, int], query: int | None, key: int | None) -> int:
    """The table row for two patches, told by their coordinates; None stands for a prefix token."""
    num_offsets = (2 * grid[0] - 1) * (2 * grid[1] - 1)
    if query is None:
        return num_offsets + 2 if key is None else num_offsets
    if key is None:
        return num_offsets + 1
    down, right = query // grid[1] - key // grid[1], query % grid[1] - key % grid[1]
    return (down + grid[0] - 1) * (2 * grid[1] - 1) + right + grid[1] - 1


def attend_in_loops(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, grid: tuple[int, int], tokens: list[list[int | None]]
) -> Tensor:
    """Attention one number at a time; `tokens` names each image's patches, None for a prefix token."""
    images = []
    for image, patches in enumerate(tokens):
        heads = []
        for head in range(q.shape[1]):
            rows = []
            for i, query in enumerate(patches):
                logits = torch.stack(
                    [
                        (q[image, head, i] * k[image, head, j]).sum() / math.sqrt(q.shape[-1])
                        + table[table_row(grid, query, key), head]
                        for j, key in enumerate(patches)
                    ]
                )
                weights = logits.exp() / logits.exp().sum()
                rows.append(sum(weights[j] * v[image, head, j] for j in range(len(patches))))
            heads.append(torch.stack(rows))  # type: ignore[arg-type]
        images.append(torch.stack(heads))
    return torch.stack(images)


@st.composite
def kept_sets(draw: st.DrawFn) -> tuple[tuple[int, int], int, list[list[int]]]:
    """A patch grid, a number of prefix tokens, and as many kept patches for each of one or two images."""
    grid = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    patches = range(grid[0] * grid[1])
    num_kept = draw(st.integers(1, min(len(patches), 5)))
    images = draw(st.integers(1, 2))
    return grid, draw(st.integers(0, 2)), [sorted(draw(st.permutations(patches))[:num_kept]) for _ in range(images)]


@given(case=kept_sets(), num_heads=st.integers(1, 3), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=25)
def test_sampled_attention_and_all_its_gradients_equal_the_loops(
    case: tuple[tuple[int, int], int, list[list[int]]], num_heads: int, seed: int
) -> None:
    grid, num_prefix, rows = case
    generator = torch.Generator().manual_seed(seed)
    shape = (len(rows), num_heads, num_prefix + len(rows[0]), 4)
    exact = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in "qkv"]
    exact.append(torch.randn(num_table_rows(grid), num_heads, generator=generator, dtype=torch.float64))
    direction = torch.randn(shape, generator=generator, dtype=torch.float64)
    index = bias_index(grid, num_prefix, torch.tensor(rows))

    leaves = [value.requires_grad_() for value in exact]
    tokens = [[None] * num_prefix + row for row in rows]
    expected = attend_in_loops(*leaves, grid, tokens)
    gradients = torch.autograd.grad((expected * direction).sum(), leaves)

    for function, dtype, tolerance in [
        (attend, torch.float32, (1e-5, 1e-4)),
        (attend, torch.float64, (1e-12, 1e-12)),
        (attend_explicitly, torch.float64, (1e-12, 1e-12)),
    ]:
        q, k, v, table = (value.detach().to(dtype).requires_grad_() for value in exact)
        result = function(q, k, v, table=table, bias_index=index)
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=tolerance[0])
        for ours, reference in zip(
            torch.autograd.grad((result * direction).sum(), (q, k, v, table)), gradients, strict=True
        ):
            torch.testing.assert_close(ours.double(), reference, rtol=tolerance[1], atol=tolerance[1])


def test_one_index_serves_all_images_when_all_patches_are_there() -> None:
    q, k, v = (torch.randn(3, 2, 1 + 6, 4) for _ in "qkv")
    table = torch.randn(num_table_rows((2, 3)), 2)
    shared = bias_index((2, 3), 1)
    each = bias_index((2, 3), 1, torch.arange(6).expand(3, -1))
    assert shared.shape[0] == 1
    one, many = (attend(q, k, v, table=table, bias_index=index) for index in (shared, each))
    torch.testing.assert_close(one, many, rtol=0, atol=1e-6)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("function", [attend, attend_explicitly])
def test_masks_hide_keys_and_add_to_logits(function: object, with_bias: bool) -> None:
    q, k, v = (torch.randn(2, 3, 5, 4, dtype=torch.float64) for _ in "qkv")
    options = {}
    if with_bias:
        options = {"table": torch.randn(num_table_rows((2, 2)), 3).double(), "bias_index": bias_index((2, 2), 1)}
    visible = torch.tensor([[True, True, False, True, False], [True, False, True, True, True]])

    by_boolean = function(q, k, v, attn_mask=visible[:, None, None, :], **options)  # type: ignore[operator]
    penalty = torch.zeros(2, 1, 1, 5).masked_fill(~visible[:, None, None, :], float("-inf"))
    by_penalty = function(q, k, v, attn_mask=penalty, **options)  # type: ignore[operator]
    torch.testing.assert_close(by_boolean, by_penalty, rtol=0, atol=1e-12)

    # Hidden keys might as well not be there.
    for image in range(2):
        there = visible[image].nonzero().flatten()
        if with_bias:
            options["bias_index"] = bias_index((2, 2), 1)[:, there][:, :, there]
        q_there, k_there, v_there = (x[image : image + 1, :, there] for x in (q, k, v))
        alone = function(q_there, k_there, v_there, **options)  # type: ignore[operator]
        torch.testing.assert_close(by_boolean[image : image + 1, :, there], alone, rtol=0, atol=1e-12)


def test_bias_and_mask_follow_the_dtype_of_the_queries() -> None:
    q, k, v = (torch.randn(1, 2, 5, 8, dtype=torch.bfloat16) for _ in "qkv")
    table = torch.randn(num_table_rows((2, 2)), 2, requires_grad=True)
    mask = torch.randn(1, 1, 5, 5, dtype=torch.float64)
    result = attend(q, k, v, table=table, bias_index=bias_index((2, 2), 1), attn_mask=mask)
    assert result.dtype == torch.bfloat16
    (gradient,) = torch.autograd.grad(result.float().square().sum(), table)
    assert gradient.dtype == torch.float32
    assert gradient.any()


def test_table_without_index_is_refused() -> None:
    q = torch.randn(1, 1, 2, 4)
    with pytest.raises(ValueError, match="both or neither"):
        attend(q, q, q, table=torch.zeros(12, 1))
    with pytest.raises(ValueError, match="both or neither"):
        attend(q, q, q, bias_index=torch.zeros(1, 2, 2, dtype=torch.int64))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"qk_norm": True, "scale_norm": True}, {"qkv_bias": False}, {"attn_drop": 0.3, "proj_drop": 0.2}],
)
def test_module_is_timms_bit_for_bit(options: dict[str, object], training: bool) -> None:
    source = TimmAttention(24, num_heads=3, **({"qkv_bias": True, "norm_layer": nn.LayerNorm} | options))
    ours = Attention(source)
    assert set(ours.state_dict()) == set(source.state_dict())
    x = torch.randn(2, 7, 24)
    results = []
    for module in (source, ours):
        module.train(training)
        torch.manual_seed(0)
        results.append(module(x))
    assert torch.equal(*results)


def test_key_bias_makes_no_difference() -> None:
    source = TimmAttention(24, num_heads=3, qkv_bias=True)
    nn.init.normal_(source.qkv.bias)
    x = torch.randn(2, 7, 24)
    expected = source(x)
    ours = Attention(source)
    ours.drop_key_bias()
    assert {"q_bias", "v_bias"} < set(ours.state_dict())
    assert "qkv.bias" not in ours.state_dict()
    torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-6)


def test_module_agrees_with_timms_beit() -> None:
    """The whole attention of BEiT: bias on queries and values, and a table with rows for the class token."""
    beit = timm.models.beit.Attention(24, num_heads=3, qkv_bias=True, window_size=(3, 4))
    source = TimmAttention(24, num_heads=3, qkv_bias=True)
    ours = Attention(source)
    ours.drop_key_bias()
    ours.add_bias_table(num_table_rows((3, 4)))
    assert not ours.relative_position_bias_table.any()  # type: ignore[union-attr]
    for parameter in beit.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(beit.state_dict())
    x = torch.randn(2, 13, 24)
    torch.testing.assert_close(ours(x, bias_index((3, 4), 1)), beit(x), rtol=0, atol=1e-5)


def test_subclass_takes_over_our_own_module() -> None:
    class Doubled(Attention):
        def project_out(self, x: Tensor) -> Tensor:
            return 2 * super().project_out(x)

    ours = Attention(TimmAttention(24, num_heads=3, qkv_bias=True))
    ours.drop_key_bias()
    ours.add_bias_table(num_table_rows((2, 2)))
    doubled = Doubled(ours)
    x, index = torch.randn(2, 5, 24), bias_index((2, 2), 1)
    assert list(doubled.state_dict()) == list(ours.state_dict())
    assert torch.equal(doubled(x, index), 2 * ours(x, index))
