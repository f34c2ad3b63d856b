"""The Triton kernels against attention written out in double precision.

Without a GPU they run in Triton's interpreter, at tiny shapes, and are compiled for a GPU as far as an executable. The
interpreter must be chosen before Triton is first imported, and torchvision imports it, so there the tests of this file
run in a process of their own, which the last one starts.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import triton_runs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_runs import (
    DEVICE,
    INTERPRETED,
    RESOURCES,
    assert_as_in_table,
    needs_triton,
    not_within,
    printed_by,
    run_interpreted,
)

from pss.attention.attend import attend, attend_explicitly, attend_packed
from pss.attention.relpos import num_table_rows, pair_rows, positions

EXAMPLES = int(os.environ.get("PSS_KERNEL_EXAMPLES", "8"))
"""How many examples are drawn of what a test is for."""
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

pytestmark = needs_triton
runs_kernels = triton_runs.runs_kernels("test_in_tritons_interpreter")


@pytest.fixture(autouse=True, scope="module")
def bfloat16_products() -> Iterator[None]:
    """Triton's interpreter keeps bfloat16 as bit patterns, and multiplies those; here it multiplies the numbers."""
    if not INTERPRETED:
        yield
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    plain = InterpreterBuilder.create_dot

    def create_dot(self: Any, *operands: Any) -> Any:
        half = [operand.dtype.scalar == tl.bfloat16 for operand in operands[:2]]
        pair = (self.cast_impl(x, tl.float32) if is_half else x for x, is_half in zip(operands, half, strict=False))
        return plain(self, *pair, *operands[2:])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", create_dot)
        yield


def case(
    grid: tuple[int, int],
    num_prefix: int,
    num_kept: int | None,
    dtype: torch.dtype,
    width: int,
    seed: int,
    *,
    shared: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random projections of three images (B, K, 3, H, width), a table, positions in any order and a direction.

    All images keep all patches, or `num_kept`, each its own or the same ones if `shared`.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(1 if shared else 3, grid[0] * grid[1], generator=generator).argsort(1)
    where = positions(grid, num_prefix, None if num_kept is None else order[:, :num_kept])
    where = where[:, :, torch.randperm(where.shape[2], generator=generator)]
    qkv = torch.randn(3, where.shape[2], 3, 2, width, generator=generator)
    table = torch.randn(num_table_rows(grid), 2, generator=generator)
    direction = torch.randn(3, 2, where.shape[2], width, generator=generator)
    return qkv.to(DEVICE, dtype), table.to(DEVICE), where.to(DEVICE), direction.to(DEVICE)


def exact(qkv: Tensor, table: Tensor, where: Tensor, direction: Tensor) -> tuple[Tensor, ...]:
    """Result and gradients in double precision."""
    leaves = [x.detach().double().requires_grad_() for x in (qkv, table)]
    result = attend_explicitly(*leaves[0].permute(2, 0, 3, 1, 4), table=leaves[1], positions=where)
    return result, *torch.autograd.grad((result * direction).sum(), leaves)


def check(ours: Sequence[Tensor], theirs: Sequence[Tensor], dtype: torch.dtype) -> None:
    spacing = torch.finfo(dtype).eps
    for number, (result, reference) in enumerate(zip(ours, theirs, strict=True)):
        precise = 1e-5 if number == 0 else 1e-4
        atol = precise if dtype == torch.float32 else 6 * spacing * max(1.0, reference.abs().max().item())
        torch.testing.assert_close(result.double(), reference, rtol=precise if dtype == torch.float32 else 0, atol=atol)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@given(
    grid=st.tuples(st.integers(1, 6), st.integers(2, 8)),
    num_prefix=st.integers(0, 3),
    share=st.floats(0.1, 1),
    kept_sets=st.sampled_from(["all", "each", "shared"]),
    width=st.sampled_from([8, 24, 32, 64, 96, 128]),
    packed=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=EXAMPLES)
def test_fused_attention_and_all_its_gradients(
    dtype: torch.dtype,
    grid: tuple[int, int],
    num_prefix: int,
    share: float,
    kept_sets: str,
    width: int,
    packed: bool,
    seed: int,
) -> None:
    num_kept = None if kept_sets == "all" else max(1, int(share * grid[0] * grid[1]))
    qkv, table, where, direction = case(grid, num_prefix, num_kept, dtype, width, seed, shared=kept_sets == "shared")
    leaves = [qkv.requires_grad_(), table.requires_grad_()]
    by_role = qkv.permute(2, 0, 3, 1, 4)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PSS_ATTENTION", "fused")
        if packed:
            result = attend_packed(by_role, table=table, positions=where)
        else:
            result = attend(*by_role, table=table, positions=where)
    assert result.dtype == dtype
    ours = (result, *torch.autograd.grad((result * direction).sum(), leaves))
    check(ours, exact(qkv, table, where, direction), dtype)


@runs_kernels
@pytest.mark.parametrize(
    ("dtype", "grid", "num_kept"),
    [(torch.float32, (5, 7), None), (torch.float32, (8, 9), 40), (torch.float16, (8, 9), 70)],
)
def test_several_blocks_and_programs(
    dtype: torch.dtype, grid: tuple[int, int], num_kept: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More tokens than a block has, and more programs than images times heads."""
    from pss.attention import tables as attention_tables

    monkeypatch.setenv("PSS_ATTENTION", "fused")
    monkeypatch.setattr(attention_tables, "_PROGRAMS_PER_MULTIPROCESSOR", 20)
    qkv, table, where, direction = case(grid, 2, num_kept, dtype, 16, 0)
    leaves = [qkv.requires_grad_(), table.requires_grad_()]
    result = attend_packed(qkv.permute(2, 0, 3, 1, 4), table=table, positions=where)
    gradients = torch.autograd.grad((result * direction).sum(), leaves)
    check((result, *gradients), exact(qkv, table, where, direction), dtype)
    again = attend_packed(qkv.permute(2, 0, 3, 1, 4), table=table, positions=where)
    assert all(map(torch.equal, gradients, torch.autograd.grad((again * direction).sum(), leaves)))


@runs_kernels
@given(num_kept=st.integers(1, 20), num_prefix=st.integers(0, 2), seed=st.integers(0, 2**31))
@settings(max_examples=min(5, EXAMPLES))
def test_permuting_tokens_permutes_the_results(num_kept: int, num_prefix: int, seed: int) -> None:
    qkv, table, where, direction = case((4, 5), num_prefix, num_kept, torch.float32, 16, seed)
    order = torch.randperm(where.shape[2], generator=torch.Generator().manual_seed(seed))
    results = []
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PSS_ATTENTION", "fused")
        for moved in (order, torch.arange(len(order))):
            leaves = [qkv[:, moved].requires_grad_(), table.clone().requires_grad_()]
            out = attend_packed(leaves[0].permute(2, 0, 3, 1, 4), table=leaves[1], positions=where[:, :, moved])
            results.append((out, *torch.autograd.grad((out * direction[:, :, moved]).sum(), leaves)))
    (out, grad, of_table), (straight_out, straight_grad, straight_of_table) = results
    torch.testing.assert_close(out, straight_out[:, :, order], rtol=0, atol=1e-5)
    torch.testing.assert_close(grad, straight_grad[:, order], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(of_table, straight_of_table, rtol=1e-4, atol=1e-4)


@runs_kernels
def test_nothing_of_all_pairs_of_tokens_is_kept_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSS_ATTENTION", "fused")
    qkv, table, where, _ = case((7, 7), 1, 40, torch.float32, 16, 0)
    leaves = [qkv.requires_grad_(), table.requires_grad_()]
    storages = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = attend_packed(leaves[0].permute(2, 0, 3, 1, 4), table=leaves[1], positions=where)
    sums = out.nbytes // out.shape[-1]  # one number per head and token
    assert sum(storages.values()) == qkv.nbytes + table.nbytes + where.untyped_storage().nbytes() + out.nbytes + sums


@runs_kernels
def test_no_images_and_undefined_gradients() -> None:
    from pss.attention.fused import fused_attention

    qkv, table, where, _ = case((2, 3), 1, None, torch.float32, 16, 0)
    leaves = [qkv.permute(2, 0, 3, 1, 4).requires_grad_(), table.requires_grad_()]
    out = fused_attention(leaves[0][:, :0], leaves[1], where[:, :1])[0]
    assert out.shape[0] == 0
    assert not any(grad.any() for grad in torch.autograd.grad(out.sum(), leaves))
    out, lse = fused_attention(*leaves, where)
    assert not lse.requires_grad
    undefined = torch._C._functions.UndefinedGrad()(out)
    assert torch.autograd.grad(undefined, leaves, torch.zeros_like(out), allow_unused=True) == (None, None)


@runs_kernels
@pytest.mark.parametrize("sign", [-1, 1])
def test_very_large_logits_stay_finite(sign: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks reach beyond the last token, where the table is looked up too: at rows that differ by 500 here."""
    monkeypatch.setenv("PSS_ATTENTION", "fused")
    qkv, table, where, direction = case((3, 3), 0, 5, torch.float32, 16, 1)
    table[:-3] += 500 * sign
    leaves = [qkv.requires_grad_(), table.requires_grad_()]
    result = attend_packed(qkv.permute(2, 0, 3, 1, 4), table=table, positions=where)
    gradients = torch.autograd.grad((result * direction).sum(), leaves)
    for ours, reference in zip((result, *gradients), exact(qkv, table, where, direction), strict=True):
        torch.testing.assert_close(ours.double(), reference, rtol=1e-3, atol=1e-3)


@runs_kernels
@pytest.mark.parametrize("num_kept", [None, 21])
def test_the_bias_as_a_matrix_and_back(num_kept: int | None) -> None:
    from pss.attention.tables import reduce_bias, write_bias

    _, table, where, _ = case((5, 7), 2, num_kept, torch.float32, 8, 2)
    bias = write_bias(table, where, torch.float32)
    expected = table[pair_rows(where, len(table))].permute(0, 3, 1, 2)
    assert torch.equal(bias, expected)
    assert bias.stride(2) % 8 == 0
    grad_bias = torch.randn(3, *bias.shape[1:], device=DEVICE)
    leaf = table.requires_grad_()
    (gradient,) = torch.autograd.grad((leaf[pair_rows(where, len(table))].permute(0, 3, 1, 2) * grad_bias).sum(), leaf)
    torch.testing.assert_close(reduce_bias(grad_bias, table, where), gradient, rtol=1e-4, atol=1e-4)


@runs_kernels
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's check looks at its own copies
def test_the_operator_keeps_torchs_rules() -> None:
    from pss.attention.fused import fused_attention  # noqa: F401

    qkv, table, where, _ = case((2, 3), 1, 4, torch.float32, 8, 3)
    by_role = qkv.permute(2, 0, 3, 1, 4).contiguous().requires_grad_()
    torch.library.opcheck(torch.ops.pss.fused_attention.default, (by_role, table.requires_grad_(), where))


@runs_kernels
def test_a_block_compiles_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    from pss.models.create import create_model

    monkeypatch.setenv("PSS_ATTENTION", "fused")
    options: Any = {"patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 3}
    model = create_model("vit_tiny_patch16_224", num_classes=7, img_size=(12, 16), rel_pos="bias", **options)
    model = model.to(DEVICE)
    x = torch.randn(2, 3, 12, 16, device=DEVICE)
    gradients = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)):
        model.zero_grad()
        run(x, 0.5).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


COMPILE = (
    RESOURCES
    + """
import json, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pss.attention import kernels as kernels

dtype, blocks, of_keys, constants = json.loads(sys.argv[1])
pointers = dict.fromkeys(("spread", "lse", "delta", "histograms", "partial", "table"), "*fp32")
pointers |= {"positions": "*i64"} | dict.fromkeys(("qkv", "out", "grad_out", "grad_qkv", "bias", "grad_bias"), dtype)
outer, inner, options = blocks
sizes = {
    "attend_forward": (outer, inner, options),
    "attend_backward_queries": (outer, inner, options),
    "attend_backward_keys": (of_keys[1], of_keys[0], of_keys[2]),
    "spread_table": (0, 0, options),
    "write_bias": (32, 64, options),
    "reduce_bias": (32, 64, options),
}
for name, (queries, keys, options) in sizes.items():
    kernel = getattr(kernels, name)
    constants |= {"BLOCK_QUERIES": queries, "BLOCK_KEYS": keys, "BLOCK_ENTRIES": 64, "BLOCK": 256}
    kinds = pointers | {"factor": "fp32", "scale": "fp32"} | dict.fromkeys(constants, "constexpr")
    signature = {argument: kinds.get(argument, "i32") for argument in kernel.arg_names}
    source = ASTSource(kernel, signature, {argument: constants[argument] for argument in signature
                                           if argument in constants})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    print(json.dumps([name, resources(compiled)]))
"""
)


@pytest.mark.parametrize(
    "case",
    [
        ("*bf16", 64, "ieee"),
        pytest.param(("*bf16", 96, "ieee"), marks=pytest.mark.exhaustive),
        pytest.param(("*fp32", 96, "ieee"), marks=pytest.mark.exhaustive),
    ],
)
def test_kernels_compile_for_hopper(case: tuple[str, int, str], tmp_path: Path) -> None:
    """As far as machine code, which needs no GPU; what it takes is in a table."""
    from pss.attention.fused import _block_sizes

    name, width, precision = case
    dtype = {"*bf16": torch.bfloat16, "*fp32": torch.float32}[name]
    blocks, of_keys = (_block_sizes(torch.empty(1, width, dtype=dtype), of_keys) for of_keys in (False, True))
    constants = {"WIDTH": width, "BLOCK_WIDTH": 1 << (width - 1).bit_length(), "PRECISION": precision}
    lines = printed_by(COMPILE, [name, blocks, of_keys, constants], tmp_path)
    found = dict(json.loads(line) for line in lines)
    assert len(found) == 6
    assert not any(took["spilled"] for took in found.values())
    assert_as_in_table(Path(__file__).with_name("hopper.json"), f"{name[1:]}, {width} wide", found)


@pytest.mark.exhaustive
@not_within
@pytest.mark.parametrize("examples", ["1", "8"])
def test_in_tritons_interpreter(examples: str) -> None:
    run_interpreted(__file__, examples, "-k", "not hopper")
