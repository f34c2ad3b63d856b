"""Attention that knows positions against plain loops in double precision, and its implementations against each other.

The fused kernels have tests of their own, in test_attention_fused.py.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Attention as TimmAttention
from timm.layers import AttentionRope, RotaryEmbeddingCat
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend

from pss.attention import cpu as attention_cpu
from pss.attention import materialised as attention_materialised
from pss.attention.attend import Attention, attend, attend_explicitly, attend_packed, gets_masks_right
from pss.attention.relpos import num_entries, num_separable_rows, num_table_rows, positions


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


def assert_close_to_exact(ours: Sequence[Tensor], exact: Sequence[Tensor], dtype: torch.dtype) -> None:
    """A result and its gradients against double precision.

    1e-5 and 1e-4 in float32, 1e-10 in float64; in half precision, four times the spacing of its numbers at the largest.
    """
    for number, (value, reference) in enumerate(zip(ours, exact, strict=True)):
        tolerance = 1e-10 if dtype == torch.float64 else 1e-5 if number == 0 else 1e-4
        if dtype in (torch.float32, torch.float64):
            torch.testing.assert_close(value.double(), reference, rtol=tolerance, atol=tolerance)
        else:
            atol = 4 * torch.finfo(dtype).eps * max(1.0, reference.abs().max().item())
            torch.testing.assert_close(value.double(), reference, rtol=0, atol=atol)


@st.composite
def kept_sets(draw: st.DrawFn) -> tuple[tuple[int, int], int, list[list[int]]]:
    """A patch grid, a number of prefix tokens, and as many kept patches for each of one or two images."""
    grid = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    patches = range(grid[0] * grid[1])
    num_kept = draw(st.integers(1, min(len(patches), 5)))
    images = draw(st.integers(1, 2))
    return grid, draw(st.integers(0, 2)), [sorted(draw(st.permutations(patches))[:num_kept]) for _ in range(images)]


@pytest.fixture(params=["", "reference", "materialised"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Every implementation that a CPU has, and the one that is chosen when none is asked for."""
    monkeypatch.setenv("PSS_ATTENTION", request.param)
    return request.param


@pytest.mark.parametrize("forced", ["", "reference", "materialised"])
@given(case=kept_sets(), num_heads=st.integers(1, 3), seed=st.integers(0, 2**31))
@settings(max_examples=15)
def test_sampled_attention_and_all_its_gradients_equal_the_loops(
    forced: str, case: tuple[tuple[int, int], int, list[list[int]]], num_heads: int, seed: int
) -> None:
    grid, num_prefix, rows = case
    generator = torch.Generator().manual_seed(seed)
    shape = (len(rows), num_heads, num_prefix + len(rows[0]), 4)
    exact = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in "qkv"]
    exact.append(torch.randn(num_table_rows(grid), num_heads, generator=generator, dtype=torch.float64))
    direction = torch.randn(shape, generator=generator, dtype=torch.float64)
    where = positions(grid, num_prefix, torch.tensor(rows))

    leaves = [value.requires_grad_() for value in exact]
    tokens = [[None] * num_prefix + row for row in rows]
    expected = attend_in_loops(*leaves, grid, tokens)
    gradients = torch.autograd.grad((expected * direction).sum(), leaves)

    for dtype, tolerance in [(torch.float32, (1e-5, 1e-4)), (torch.float64, (1e-12, 1e-12))]:
        q, k, v, table = (value.detach().to(dtype).requires_grad_() for value in exact)
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("PSS_ATTENTION", forced)
            result = attend(q, k, v, table=table, positions=where)
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=tolerance[0])
        for ours, reference in zip(
            torch.autograd.grad((result * direction).sum(), (q, k, v, table)), gradients, strict=True
        ):
            torch.testing.assert_close(ours.double(), reference, rtol=tolerance[1], atol=tolerance[1])


@given(
    grid=st.tuples(st.integers(2, 7), st.integers(2, 7)),
    num_prefix=st.integers(0, 3),
    share=st.floats(0.1, 1),
    kept_sets=st.sampled_from(["all", "each", "shared"]),
    num_images=st.integers(1, 5),
    width=st.sampled_from([1, 8, 20, 32, 64, 96, 128]),
    cache=st.sampled_from([1, 2**13, 2**15, 2**20]),
    shares=st.integers(1, 4),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    packed=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=80)
def test_materialised_is_the_reference(
    grid: tuple[int, int],
    num_prefix: int,
    share: float,
    kept_sets: str,
    num_images: int,
    width: int,
    cache: int,
    shares: int,
    dtype: torch.dtype,
    packed: bool,
    seed: int,
) -> None:
    """Every kind of kept sets, tokens in any order, in one tensor or three; in parts, by one thread or several."""
    generator = torch.Generator().manual_seed(seed)
    num_patches = grid[0] * grid[1]
    order = torch.rand(1 if kept_sets == "shared" else num_images, num_patches, generator=generator).argsort(1)
    kept = None if kept_sets == "all" else order[:, : max(1, int(share * num_patches))]
    where = positions(grid, num_prefix, kept)
    where = where[:, :, torch.randperm(where.shape[2], generator=generator)]
    num_tokens, num_heads = where.shape[2], 3
    qkv = torch.randn(num_images, num_tokens, 3, num_heads, width, generator=generator).to(dtype).requires_grad_()
    table_dtype = torch.promote_types(dtype, torch.float32)
    table = torch.randn(num_table_rows(grid), num_heads, generator=generator).to(table_dtype).requires_grad_()
    direction = torch.randn(num_images, num_heads, num_tokens, width, generator=generator)

    exact = [x.detach().double().requires_grad_() for x in (qkv, table)]
    expected = attend_explicitly(*exact[0].permute(2, 0, 3, 1, 4), table=exact[1], positions=where)
    gradients = torch.autograd.grad((expected * direction).sum(), exact)

    by_role = qkv.permute(2, 0, 3, 1, 4)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_OWN_CACHE", "_SHARED_CACHE"):
            patch.setattr(attention_cpu, name, cache)
        patch.setattr(attention_cpu, "num_shares", lambda: shares)
        if packed:
            result = attend_packed(by_role, table=table, positions=where)
        else:
            result = attend(*by_role, table=table, positions=where)
        ours = torch.autograd.grad((result * direction).sum(), (qkv, table))
    assert result.dtype == ours[0].dtype == dtype
    assert ours[1].dtype == table_dtype
    assert_close_to_exact((result, *ours), (expected, *gradients), dtype)


def test_the_memory_that_a_thread_keeps_serves_every_size_dtype_and_mode() -> None:
    attention_cpu._memory.clear()
    for num_images, dtype in ((4, torch.float32), (1, torch.float64), (7, torch.float64), (2, torch.bfloat16)):
        where = positions((3, 4), 1, torch.rand(num_images, 12).argsort(1)[:, :9])
        q, k, v = torch.randn(3, num_images, 2, 10, 8).to(dtype)
        table = torch.randn(num_table_rows((3, 4)), 2, dtype=torch.float64).to(dtype)
        expected = attend_explicitly(q.double(), k.double(), v.double(), table=table.double(), positions=where)
        with torch.inference_mode():
            seen = attend(q, k, v, table=table, positions=where)
        result = attend(q.requires_grad_(), k, v, table=table, positions=where)
        result.sum().backward()
        for ours in (seen, result):
            torch.testing.assert_close(ours.double(), expected, rtol=0, atol=0.05 if dtype == torch.bfloat16 else 1e-5)


def test_threads_divide_the_images_and_repeat_themselves_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_cpu, "num_shares", lambda: 3)
    qkv, table = torch.randn(3, 8, 2, 10, 8, requires_grad=True), torch.randn(num_table_rows((3, 4)), 2)
    for where in (positions((3, 4), 1, torch.rand(8, 12).argsort(1)[:, :9]), positions((3, 4), 1)[:, :, :10]):
        attention_cpu._memory.clear()
        results = []
        for _ in range(20):
            out = attend_packed(qkv, table=table.requires_grad_(), positions=where)
            results.append(torch.autograd.grad(out.square().sum(), (qkv, table)))
        (plan,) = (shares for shares in attention_cpu._memory.known.values() if len(shares) > 1)
        assert [[(part.start, part.stop) for part, _ in share.parts] for share in plan] == [
            [(0, 2)],
            [(2, 5)],
            [(5, 8)],
        ]
        for again in results[1:]:
            assert all(map(torch.equal, again, results[0]))


def test_what_is_kept_lies_on_the_cpu_whatever_the_default_device() -> None:
    q, k, v = torch.randn(3, 2, 2, 10, 8)
    table = torch.randn(num_table_rows((3, 4)), 2)
    where = positions((3, 4), 1, torch.rand(2, 12).argsort(1)[:, :9])
    with torch.device("meta"):
        attention_cpu._memory.clear()
    attention_cpu._rows.cache_clear()
    with torch.device("meta"):
        result, _ = attention_cpu.forward(torch.stack((q, k, v)), table, where)
    expected = attend_explicitly(q, k, v, table=table, positions=where)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def test_positions_that_changed_in_place_are_not_taken_for_the_ones_remembered() -> None:
    q, k, v = torch.randn(3, 2, 2, 10, 8)
    table = torch.randn(num_table_rows((3, 4)), 2)
    sets = [positions((3, 4), 1, torch.rand(2, 12).argsort(1)[:, :9]) for _ in range(3)]
    with torch.inference_mode():
        sets_without_version = [where.clone() for where in sets]
    for each in (sets, sets_without_version):
        where = each[0]
        for others in each:
            with torch.inference_mode(where.is_inference()):
                where.copy_(others)
            result = attend(q, k, v, table=table, positions=where)
            expected = attend_explicitly(q, k, v, table=table, positions=where)
            torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def test_autocast_does_not_round_the_bias() -> None:
    where = positions((3, 4), 1)
    q, k, v = torch.zeros(3, 2, 2, 13, 8).bfloat16()
    v[:, :, 0] = 1
    table = torch.full((num_table_rows((3, 4)), 2), 8.0)
    table[-3:] = 8.02  # of pairs with the prefix token; in bfloat16 it is 8
    with torch.autocast("cpu", torch.bfloat16):
        result = attend(q, k, v, table=table, positions=where)
    expected = attend_explicitly(q.double(), k.double(), v.double(), table=table.double(), positions=where)
    assert abs(float(expected[0, 0, 1, 0]) - 1 / 13) > 1e-3
    torch.testing.assert_close(result.double(), expected, rtol=2**-8, atol=0)


def test_gradients_flow_to_what_needs_them() -> None:
    where = positions((2, 3), 1)
    qkv, table = torch.randn(3, 2, 2, 7, 8), torch.randn(num_table_rows((2, 3)), 2)
    expected = attend_packed(qkv, table=table, positions=where)
    assert not expected.requires_grad
    for needy in (qkv, table):
        needy.requires_grad_()
        result = attend_packed(qkv, table=table, positions=where)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
        result.sum().backward()
        assert needy.grad is not None
        with torch.no_grad():
            assert torch.equal(attend_packed(qkv, table=table, positions=where), result)
        needy.requires_grad_(False)


def test_one_set_of_positions_serves_all_images_when_all_patches_are_there(implementation: str) -> None:
    q, k, v = (torch.randn(3, 2, 1 + 6, 4) for _ in "qkv")
    table = torch.randn(num_table_rows((2, 3)), 2, requires_grad=True)
    shared = positions((2, 3), 1)
    each = positions((2, 3), 1, torch.arange(6).expand(3, -1))
    assert shared.shape == (2, 1, 7)
    one, many = (attend(q, k, v, table=table, positions=where) for where in (shared, each))
    torch.testing.assert_close(one, many, rtol=0, atol=1e-6)
    gradients = [torch.autograd.grad(result.square().sum(), table)[0] for result in (one, many)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_bias", [False, True])
def test_masks_hide_keys_and_add_to_logits(implementation: str, with_bias: bool) -> None:
    q, k, v = (torch.randn(2, 3, 5, 4, dtype=torch.float64) for _ in "qkv")
    options: dict[str, Tensor] = {}
    if with_bias:
        options = {"table": torch.randn(num_table_rows((2, 2)), 3).double(), "positions": positions((2, 2), 1)}
    visible = torch.tensor([[True, True, False, True, False], [True, False, True, True, True]])

    by_boolean = attend(q, k, v, attn_mask=visible[:, None, None, :], **options)
    penalty = torch.zeros(2, 1, 1, 5).masked_fill(~visible[:, None, None, :], float("-inf"))
    by_penalty = attend(q, k, v, attn_mask=penalty, **options)
    torch.testing.assert_close(by_boolean, by_penalty, rtol=0, atol=1e-12)

    # Hidden keys might as well not be there.
    for image in range(2):
        there = visible[image].nonzero().flatten()
        if with_bias:
            options["positions"] = positions((2, 2), 1)[:, :, there]
        q_there, k_there, v_there = (x[image : image + 1, :, there] for x in (q, k, v))
        alone = attend(q_there, k_there, v_there, **options)
        torch.testing.assert_close(by_boolean[image : image + 1, :, there], alone, rtol=0, atol=1e-12)


def test_dropout_drops_attention_weights(implementation: str) -> None:
    """With values of one everywhere, a row of the result is the sum of its weights that were left, scaled up."""
    q = k = torch.zeros(4, 2, 5, 8)
    table = torch.zeros(num_table_rows((2, 2)), 2)
    result = attend(q, k, torch.ones_like(q), table=table, positions=positions((2, 2), 1), dropout=0.5)
    left = result[..., 0] * 5 / 2  # how many of five weights of 0.2 were doubled
    torch.testing.assert_close(left, left.round())
    assert len(left.round().unique()) > 2


def test_bias_and_mask_follow_the_dtype_of_the_values(implementation: str) -> None:
    q, k, v = (torch.randn(1, 2, 5, 8, dtype=torch.bfloat16) for _ in "qkv")
    table = torch.randn(num_table_rows((2, 2)), 2, requires_grad=True)
    where = positions((2, 2), 1)
    for mask in (None, torch.randn(1, 1, 5, 5, dtype=torch.float64)):
        result = attend(q.float(), k, v, table=table, positions=where, attn_mask=mask)
        assert result.dtype == torch.bfloat16
        (gradient,) = torch.autograd.grad(result.float().square().sum(), table)
        assert gradient.dtype == torch.float32
        assert gradient.any()


def test_a_table_without_positions_is_refused() -> None:
    q = torch.randn(1, 1, 2, 4)
    with pytest.raises(ValueError, match="both or n"):
        attend(q, q, q, table=torch.zeros(12, 1))
    with pytest.raises(ValueError, match="both or n"):
        attend(q, q, q, positions=positions((1, 1), 1))


@pytest.mark.parametrize(
    ("wanted", "message"),
    [("flash", "one of reference, materialised, fused, got 'flash'"), ("fused", "cpu device.* unset PSS_ATTENTION")],
)
def test_implementations_that_cannot_be_had(wanted: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSS_ATTENTION", wanted)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(ValueError, match=message):
        attend(q, q, q, table=torch.zeros(num_table_rows((2, 2)), 1), positions=positions((2, 2), 0))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's check looks at its own copies
@pytest.mark.parametrize("kept", [None, torch.tensor([[0, 2, 5], [1, 2, 3]])])
def test_the_materialised_operator_keeps_torchs_rules(kept: Tensor | None) -> None:
    """Declared shapes and strides, no aliasing, gradients under compilation."""
    where = positions((2, 3), 1, kept)
    qkv = torch.randn(3, 2, 2, where.shape[2], 8, requires_grad=True)
    table = torch.randn(num_table_rows((2, 3)), 2, requires_grad=True)
    torch.library.opcheck(torch.ops.pss.materialised_attention.default, (qkv, table, where))


def test_the_memory_efficient_kernel_is_called_as_torch_declares_it() -> None:
    """Without a GPU: torch checks the arguments and derives the shapes of the results."""
    with FakeTensorMode():
        qkv = torch.empty(2, 39, 3, 6, 64, dtype=torch.bfloat16, device="cuda").permute(2, 0, 3, 1, 4)
        bias = torch.empty(2, 6, 39, 40, dtype=torch.bfloat16, device="cuda")[..., :39]
        out, lse = attention_materialised._memory_efficient(qkv, bias)
        assert out.shape == (2, 39, 6, 64)
        grad_qkv, grad_bias = attention_materialised._memory_efficient_backward(out, qkv, bias, out, lse)
        assert grad_qkv.stride() == qkv.stride()
        assert grad_bias.shape == (2, 6, 39, 39)
        assert grad_bias.stride(3) == 1


def test_a_backend_that_gets_masks_wrong_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    check = gets_masks_right.__wrapped__
    assert check(SDPBackend.MATH, "cpu")
    plain = F.scaled_dot_product_attention

    def without_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return plain(q, k, v, mask if q.dtype == torch.float32 else None)

    def with_nan(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        out = plain(q, k, v, mask)
        return out if q.dtype == torch.float32 else out.masked_fill(out == out.max(), float("nan"))

    def refusing(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        raise RuntimeError("No available kernel")

    for broken in (without_mask, with_nan, refusing):
        monkeypatch.setattr(F, "scaled_dot_product_attention", broken)
        assert not check(SDPBackend.MATH, "cpu")


@pytest.mark.parametrize("kept_sets", ["each", "shared"])
def test_nothing_of_all_pairs_of_tokens_is_kept_for_the_backward_pass(kept_sets: str) -> None:
    kept = torch.rand(1 if kept_sets == "shared" else 3, 196).argsort(1)[:, :157]
    where = positions((14, 14), 1, kept)
    qkv = torch.randn(3, 158, 3, 2, 8, requires_grad=True)
    table = torch.randn(732, 2, requires_grad=True)
    storages = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = attend_packed(qkv.permute(2, 0, 3, 1, 4), table=table, positions=where)
    spread = 4 * 2 * num_entries(len(table))
    assert sum(storages.values()) == qkv.nbytes + table.nbytes + where.nbytes + out.nbytes + spread


# The module.


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
    ours.add_positions("bias", (3, 4))
    assert not ours.relative_position_bias_table.any()  # type: ignore[union-attr]
    for parameter in beit.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(beit.state_dict())
    x = torch.randn(2, 13, 24)
    torch.testing.assert_close(ours(x, positions((3, 4), 1)), beit(x), rtol=0, atol=1e-5)


def test_subclass_takes_over_our_own_module() -> None:
    class Doubled(Attention):
        def project_out(self, x: Tensor) -> Tensor:
            return 2 * super().project_out(x)

    ours = Attention(TimmAttention(24, num_heads=3, qkv_bias=True))
    ours.drop_key_bias()
    ours.add_positions("bias", (2, 2))
    doubled = Doubled(ours)
    x, where = torch.randn(2, 5, 24), positions((2, 2), 1)
    assert list(doubled.state_dict()) == list(ours.state_dict())
    assert torch.equal(doubled(x, where), 2 * ours(x, where))


def turns(grid: tuple[int, int], num_prefix: int, kept: Tensor, width: int) -> Tensor:
    """Sines and cosines of the rotary embedding for prefix tokens and kept patches, (B, K, 2 * width)."""
    rope = RotaryEmbeddingCat(width, temperature=100.0, in_pixels=False, feat_shape=list(grid))
    still = torch.cat((torch.zeros(width), torch.ones(width))).expand(len(kept), num_prefix, -1)
    return torch.cat((still, rope.get_embed()[kept]), dim=1)


def positioned(rel_pos: Any, grid: tuple[int, int], num_prefix: int, kept: Tensor) -> tuple[Attention, Tensor]:
    """An attention module of three heads 8 wide with random parameters, and the positions of the kept patches."""
    module = Attention(TimmAttention(24, num_heads=3, qkv_bias=True, qk_norm=True, norm_layer=nn.LayerNorm))
    if rel_pos != "none":
        module.add_positions(rel_pos, grid)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module, turns(grid, num_prefix, kept, 8) if rel_pos == "rope" else positions(grid, num_prefix, kept)


@pytest.mark.parametrize("rel_pos", ["none", "bias", "separable", "rope"])
@given(grid=st.tuples(st.integers(1, 4), st.integers(2, 5)), num_prefix=st.integers(0, 2), seed=st.integers(0, 2**31))
@settings(max_examples=15)
def test_permuting_tokens_and_positions_permutes_the_results(
    rel_pos: str, grid: tuple[int, int], num_prefix: int, seed: int
) -> None:
    torch.manual_seed(seed)
    num_patches = grid[0] * grid[1]
    kept = torch.rand(2, num_patches).argsort(1)[:, : (num_patches + 1) // 2]
    module, where = positioned(rel_pos, grid, num_prefix, kept)
    x = torch.randn(2, num_prefix + kept.shape[1], 24)
    order = torch.randperm(x.shape[1])
    moved = where[:, order] if rel_pos == "rope" else where[:, :, order]
    torch.testing.assert_close(module(x[:, order], moved), module(x, where)[:, order], rtol=0, atol=1e-5)
    # Positions matter: another patch in the place of the first one changes the result.
    if num_patches > kept.shape[1] and rel_pos != "none":
        kept[:, 0] = torch.tensor([next(p for p in range(num_patches) if p not in row) for row in kept.tolist()])
        elsewhere = positioned(rel_pos, grid, num_prefix, kept)[1]
        if kept.shape[1] > 1:
            assert not torch.allclose(module(x, elsewhere), module(x, where), atol=1e-4)


def attend_in_pairs(module: Attention, x: Tensor, where: Tensor, tokens: list[list[int | None]]) -> Tensor:
    """What the module computes, in double precision, from the offset of every pair of patches or the angle of each."""
    assert module.grid is not None or module.rel_pos == "none"
    q, k, v = module.qkv(x).unflatten(2, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = module.q_norm(q), module.k_norm(k)
    if module.rel_pos == "rope":
        sines, cosines = where[..., ::2].chunk(2, dim=2)  # each angle is there twice
        turn = torch.complex(cosines, sines).unsqueeze(1)
        q, k = (torch.view_as_real(torch.view_as_complex(y.unflatten(3, (-1, 2))) * turn).flatten(3) for y in (q, k))
    logits = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    if module.rel_pos in ("bias", "separable"):
        height, width = module.grid  # type: ignore[misc]
        table = module.relative_position_bias_table
        if module.rel_pos == "separable":
            rows, columns, prefix = module.separable_relative_position_bias_table.split(  # type: ignore[union-attr]
                (2 * height - 1, 2 * width - 1, 3)
            )
            table = torch.cat(((rows[:, None] + columns[None]).flatten(0, 1), prefix))
        index = [[[table_row((height, width), i, j) for j in patches] for i in patches] for patches in tokens]
        logits = logits + table[torch.tensor(index)].permute(0, 3, 1, 2)  # type: ignore[index]
    return module.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("rel_pos", ["none", "bias", "separable", "rope"])
@given(
    case=kept_sets(),
    head_width=st.sampled_from([8, 32, 64, 96, 128]),
    normed=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=25)
def test_every_kind_of_positions_equals_double_precision(
    rel_pos: Any,
    case: tuple[tuple[int, int], int, list[list[int]]],
    head_width: int,
    normed: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """The whole module, with the gradients of its input and of all its parameters."""
    grid, num_prefix, rows = case
    torch.manual_seed(seed)
    width = 2 * head_width
    module = Attention(TimmAttention(width, num_heads=2, qkv_bias=True, qk_norm=normed, norm_layer=nn.LayerNorm))
    if rel_pos != "none":
        module.add_positions(rel_pos, grid)
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, std=1.0 if "table" in name else width**-0.5)
    kept = torch.tensor(rows)
    where = turns(grid, num_prefix, kept, head_width) if rel_pos == "rope" else positions(grid, num_prefix, kept)
    module = module.to(dtype)
    x = torch.randn(len(rows), num_prefix + kept.shape[1], width).to(dtype).requires_grad_()
    direction = torch.randn(x.shape).to(dtype)

    exact, x_exact = copy.deepcopy(module).double(), x.detach().double().requires_grad_()
    angles = where.to(dtype) if rel_pos == "rope" else where
    tokens = [[None] * num_prefix + row for row in rows]
    expected = attend_in_pairs(exact, x_exact, angles.double(), tokens)
    gradients = torch.autograd.grad((expected * direction).sum(), (x_exact, *exact.parameters()))

    result = module(x, angles)
    ours = torch.autograd.grad((result * direction).sum(), (x, *module.parameters()))
    if dtype == torch.float32:
        assert_close_to_exact((result, *ours), (expected, *gradients), dtype)
    else:  # a chain of roundings; single elements may cancel
        for value, reference in zip((result, *ours), (expected, *gradients), strict=True):
            assert (value - reference).norm() <= 16 * torch.finfo(dtype).eps * max(1.0, reference.norm().item())


@given(case=kept_sets(), seed=st.integers(0, 2**31))
@settings(max_examples=15)
def test_separable_bias_is_one_of_rows_plus_one_of_columns(
    case: tuple[tuple[int, int], int, list[list[int]]], seed: int
) -> None:
    """The full table that has the sums in it gives the same attention."""
    grid, num_prefix, rows = case
    torch.manual_seed(seed)
    separable, where = positioned("separable", grid, num_prefix, torch.tensor(rows))
    full, _ = positioned("bias", grid, num_prefix, torch.tensor(rows))
    table = separable.separable_relative_position_bias_table
    assert table is not None
    assert len(table) == num_separable_rows(grid) == 2 * (grid[0] + grid[1]) + 1
    with torch.no_grad():
        vertical, horizontal, prefix = table.split((2 * grid[0] - 1, 2 * grid[1] - 1, 3))
        sums = torch.cat(((vertical[:, None] + horizontal[None]).flatten(0, 1), prefix))
    state = {name: value for name, value in separable.state_dict().items() if not name.startswith("separable")}
    full.load_state_dict(state | {"relative_position_bias_table": sums})

    x = torch.randn(len(rows), num_prefix + len(rows[0]), 24)
    ours, theirs = separable(x, where), full(x, where)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    direction = torch.randn_like(ours)
    (gradient,) = torch.autograd.grad((ours * direction).sum(), table)
    (of_sums,) = torch.autograd.grad((theirs * direction).sum(), full.relative_position_bias_table)
    of_sums, of_prefix = of_sums[:-3].view(len(vertical), len(horizontal), 3), of_sums[-3:]
    torch.testing.assert_close(gradient, torch.cat((of_sums.sum(1), of_sums.sum(0), of_prefix)), rtol=1e-4, atol=1e-4)


def test_rotary_attention_is_timms() -> None:
    kept = torch.tensor([[0, 3, 7, 11], [1, 2, 5, 6]])
    ours, where = positioned("rope", (3, 4), 1, kept)
    timms = AttentionRope(24, num_heads=3, qkv_bias=True, qk_norm=True, norm_layer=nn.LayerNorm, num_prefix_tokens=1)
    timms.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 24)
    expected = timms(x, rope=where[:, 1:].unsqueeze(1))
    torch.testing.assert_close(ours(x, where), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rel_pos", ["separable", "rope"])
def test_attention_that_needs_positions_says_so(rel_pos: str) -> None:
    module, _ = positioned(rel_pos, (2, 2), 1, torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match=f"rel_pos='{rel_pos}' needs the positions"):
        module(torch.randn(1, 3, 24))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("num_tokens", [39, 197])
def test_materialised_on_a_gpu(dtype: torch.dtype, num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = torch.rand(3, 196).argsort(1)[:, : num_tokens - 1] if num_tokens < 197 else None
    where = positions((14, 14), 1, kept).cuda()
    qkv = torch.randn(3, num_tokens, 3, 2, 64, device="cuda", dtype=dtype).permute(2, 0, 3, 1, 4).requires_grad_()
    table = torch.randn(732, 2, device="cuda", requires_grad=True)
    results = []
    for name, inputs in (("materialised", (qkv, table)), ("reference", (qkv.double(), table.double()))):
        monkeypatch.setenv("PSS_ATTENTION", name)
        result = attend_packed(inputs[0], table=inputs[1], positions=where)
        results.append((result, *torch.autograd.grad(result.square().sum(), inputs)))
    for ours, exact in zip(*results, strict=True):
        assert (ours - exact).norm() <= (1e-4 if dtype == torch.float32 else 2e-2) * exact.norm()
