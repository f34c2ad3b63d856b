"""Derivatives beyond the plain gradient are right, or an error; undefined gradients and empty batches pass through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.autograd.forward_ad import dual_level, make_dual

from pss.attention import relpos
from pss.attention.attend import attend_packed
from pss.attention.materialised import materialised_attention
from pss.models.compiled import Graphs
from pss.models.create import create_model
from pss.models.vit import VisionTransformer

# torch's own decompositions for forward derivatives are scripted, which it warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")

GRID = (2, 3)
TINY: dict[str, Any] = {"num_classes": 5, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def tiny(rel_pos: Any, name: str = "vit_tiny_patch16_224") -> VisionTransformer:
    torch.manual_seed(0)
    model = create_model(name, img_size=32, rel_pos=rel_pos, **TINY).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def slope(function: Callable[[Tensor], Tensor], at: Tensor, along: Tensor) -> Tensor:
    with torch.no_grad():
        return (function(at + 1e-6 * along) - function(at - 1e-6 * along)) / 2e-6


@pytest.mark.parametrize("rho", [1.0, 0.5])
def test_forward_derivatives_through_a_bias_are_right(rho: float) -> None:
    """They were zero without a word, for the images as for the tables."""
    model = tiny("bias")
    x, v = torch.randn(2, 2, 3, 32, 32, dtype=torch.float64)
    tangent = torch.func.jvp(lambda x: model(x, rho), (x,), (v,))[1]
    torch.testing.assert_close(tangent, slope(lambda x: model(x, rho), x, v), rtol=1e-5, atol=1e-7)

    name = "blocks.0.attn.relative_position_bias_table"
    table = model.get_parameter(name).detach()

    def of_table(table: Tensor) -> Tensor:
        logits: Tensor = torch.func.functional_call(model, {name: table}, (x, rho))
        return logits

    along = torch.randn_like(table)
    tangent = torch.func.jvp(of_table, (table,), (along,))[1]
    assert tangent.abs().max() > 1e-3
    torch.testing.assert_close(tangent, slope(of_table, table, along), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rel_pos", ["none", "separable", "rope"])
def test_forward_derivatives_that_torch_does_not_have_raise(rel_pos: str) -> None:
    model = tiny(rel_pos)
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="forward AD"):
        torch.func.jvp(model, (x,), (x,))


def test_dual_numbers_and_second_derivatives_raise() -> None:
    qkv = torch.randn(3, 1, 2, 7, 4, dtype=torch.float64, requires_grad=True)
    table = torch.randn(relpos.num_table_rows(GRID), 2, dtype=torch.float64, requires_grad=True)
    where = relpos.positions(GRID, 1)
    with dual_level(), pytest.raises(NotImplementedError):
        attend_packed(make_dual(qkv.detach(), qkv.detach()), table=table, positions=where)
    (grad,) = torch.autograd.grad(attend_packed(qkv, table=table, positions=where).sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(grad.sum(), qkv)


def test_gradients_per_sample_and_batches_of_batches() -> None:
    model = tiny("bias")
    x = torch.randn(3, 2, 3, 32, 32, dtype=torch.float64)
    each = torch.stack([model(some, 0.5) for some in x])
    torch.testing.assert_close(torch.func.vmap(lambda some: model(some, 0.5))(x), each)
    name = "blocks.1.attn.relative_position_bias_table"

    def loss(table: Tensor, image: Tensor) -> Tensor:
        logits: Tensor = torch.func.functional_call(model, {name: table}, (image[None], 0.5))
        return logits.square().sum()

    table = model.get_parameter(name)
    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(table.detach(), x[0])
    for image, gradient in zip(x[0], found, strict=True):
        torch.testing.assert_close(gradient, torch.autograd.grad(loss(table, image), table)[0])


@pytest.mark.parametrize("kept", [None, torch.tensor([[0, 2, 5], [1, 2, 3]])])
@pytest.mark.parametrize("both", [False, True])
def test_gradcheck_passes_with_its_defaults(kept: Tensor | None, both: bool) -> None:
    num_tokens = 7 if kept is None else 4
    qkv = torch.randn(3, 2, 2, num_tokens, 4, dtype=torch.float64, requires_grad=True)
    table = torch.randn(relpos.num_table_rows(GRID), 2, dtype=torch.float64, requires_grad=True)
    where = relpos.positions(GRID, 1, kept)

    def attention(qkv: Tensor, table: Tensor) -> Any:
        if both:  # what the backward pass needs besides has no derivative
            return materialised_attention(qkv, table, where)
        return attend_packed(qkv, table=table, positions=where)

    assert torch.autograd.gradcheck(attention, (qkv, table))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
@pytest.mark.parametrize("rel_pos", ["none", "bias", "separable", "rope"])
def test_no_images_give_no_logits_as_timms(name: str, rel_pos: str) -> None:
    model = tiny(rel_pos, name)
    none = torch.zeros(0, 3, 32, 32, dtype=torch.float64)
    if rel_pos == "none":
        assert timm.create_model(name, img_size=32, **TINY)(none.float()).shape == (0, 5)
    for rho in (1.0, 0.5, 0.01):
        for sort in ("magnitude", "random"):
            for training in (False, True):
                model.train(training).zero_grad()
                with torch.no_grad():
                    assert model(none, rho, sort=sort).shape == (0, 5)
                    assert model(none[..., :16, :16], rho, sort=sort, low_resolution=True).shape == (0, 5)
                model(none, rho, sort=sort).sum().backward()
                assert not any(parameter.grad.any() for parameter in model.parameters())  # type: ignore[union-attr]


def test_no_images_need_no_compiled_graph() -> None:
    model = tiny("bias")
    model.graphs = Graphs(backend="eager")
    assert model(torch.zeros(0, 3, 32, 32, dtype=torch.float64), 0.5).shape == (0, 5)
    assert model.graphs.num_graphs == 0
