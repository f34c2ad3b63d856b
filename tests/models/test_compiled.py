"""Compiled token counts: one graph each, an error for one too many, and the results of the model as it is."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from test_vit import images, tiny
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from pss.models.compiled import Graphs
from pss.models.vit import VisionTransformer

RHOS = (0.2, 0.4, 0.6, 0.8, 1.0)


def compiled(max_graphs: int = 8, **options: Any) -> tuple[VisionTransformer, VisionTransformer, Any]:
    """A model that compiles, its twin that does not, and the count of what was compiled."""
    model = tiny(spread=0.2, depth=1, **options)
    plain = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    model.graphs = Graphs(max_graphs=max_graphs, backend=counter)
    return model, plain, counter


def gradients(model: VisionTransformer, rho: float, batches: int = 1) -> list[torch.Tensor | None]:
    model.zero_grad()
    for _ in range(batches):
        model(images(4), rho).square().sum().backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize(
    ("rel_pos", "rhos"), [("none", (0.4, 1)), ("bias", RHOS), ("separable", (0.4, 1)), ("rope", (0.4, 1))]
)
def test_one_graph_per_level_and_mode_with_the_results_of_the_plain_model(
    rel_pos: str, rhos: tuple[float, ...]
) -> None:
    model, plain, counter = compiled(rel_pos=rel_pos)
    assert model.state_dict().keys() == plain.state_dict().keys()
    for _ in range(2):
        for rho in rhos:
            model.train()
            for ours, theirs in zip(gradients(model, rho), gradients(plain, rho), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        model.eval()
        with torch.inference_mode():
            torch.testing.assert_close(model(images(4)), plain(images(4)), rtol=0, atol=1e-5)
    assert counter.frame_count == len(rhos) + 1


def test_images_of_lower_resolution_are_levels_of_their_own() -> None:
    """Of 2 x 3 patches: at rho = 1 all images have the same places, below that each its own."""
    model, plain, counter = compiled(rel_pos="bias")
    small = torch.randn(4, 3, 8, 12)
    for rho in (1, 0.6, 1, 0.6):
        ours, theirs = (one(small, rho, low_resolution=True) for one in (model, plain))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            model(small[:3], rho, low_resolution=True), theirs[:3], rtol=0, atol=1e-5
        )  # a short batch is filled up
    assert counter.frame_count == 2


def test_a_level_over_the_limit_is_an_error() -> None:
    model, _, counter = compiled(max_graphs=5)
    for rho in RHOS:
        model(images(), rho)
    with pytest.raises(ValueError, match=r"2 images of 12 tokens .* the 5 of compile\.max_graphs; raise it"):
        model(images(), 0.5)
    with pytest.raises(ValueError, match="training"):
        model.train()(images(), 0.2)
    model.eval()(images(), 0.2)
    assert counter.frame_count == 5


def test_a_second_graph_for_a_level_is_an_error() -> None:
    """Whatever torch finds changed: here a number that a module holds."""
    model, _, _ = compiled()
    model(images(), 0.4)
    model.blocks[0].norm1.eps = 1e-3
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        model(images(), 0.4)


@pytest.mark.parametrize("rel_pos", ["bias", "rope"])
def test_a_short_last_batch_takes_no_graph(rel_pos: str) -> None:
    model, plain, counter = compiled(rel_pos=rel_pos)
    x = images(5)
    for rho in (0.4, 1.0):
        for count in (5, 3, 1, 5):
            torch.testing.assert_close(model(x[:count], rho), plain(x[:count], rho), rtol=0, atol=1e-5)
    assert counter.frame_count == 2
    model(images(6), 0.4)
    assert counter.frame_count == model.graphs.num_graphs == 3  # type: ignore[union-attr]


def test_a_copy_computes_with_its_own_weights() -> None:
    model, _, counter = compiled()
    before = model(images(), 0.4)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(plainly(model)))):
        with torch.no_grad():
            other.norm.bias += 1
            other.head.weight += 1
        assert not torch.allclose(other(images(), 0.4), before)
        assert other.graphs.num_graphs == 1
    assert torch.equal(model(images(), 0.4), before)
    assert counter.frame_count == 1


def plainly(model: VisionTransformer) -> VisionTransformer:
    """A copy whose backend can be pickled."""
    other = copy.deepcopy(model)
    other.graphs = Graphs(backend="aot_eager")
    return other


def test_gradients_accumulate_and_activations_may_be_recomputed() -> None:
    model, plain, counter = compiled(rel_pos="bias")
    for ours, theirs in zip(gradients(model, 0.4, 2), gradients(plain, 0.4, 2), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    once = gradients(model, 0.4)
    model.zero_grad()
    assert model.graphs is not None
    tokens, kept = model.sample(model.embed(images(4)), 0.4)
    tokens = checkpoint(model.compute, model.trunk, tokens, kept, use_reentrant=False)
    model.readout(tokens).square().sum().backward()
    for parameter, gradient in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert counter.frame_count == 1


def test_inside_ddp_nothing_changes(tmp_path: Path) -> None:
    model, plain, _ = compiled(rel_pos="bias")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
        for _ in range(2):
            for rho in (0.4, 1.0):
                model.zero_grad()
                wrapped(images(4), rho).square().sum().backward()
                expected = gradients(plain, rho)
                for parameter, gradient in zip(model.parameters(), expected, strict=True):
                    torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-4)
    finally:
        torch.distributed.destroy_process_group()
    assert model.graphs is not None
    assert model.graphs.num_graphs == 2


class Powers(torch.nn.Module):
    """A part that takes a number and returns several tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(2.0))

    def part(self, tokens: torch.Tensor, number: int, kept: torch.Tensor | None) -> dict[str, torch.Tensor]:
        powers = [self.factor * tokens**power for power in range(1, number + 1)]
        return {"sum": sum(powers, torch.zeros(())), "kept": tokens[..., 0] if kept is None else kept}


def test_parts_take_numbers_and_return_several_tensors() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    graphs, module = Graphs(backend=counter), Powers()
    tokens, kept = torch.randn(4, 3, 2), torch.arange(12).view(4, 3)
    for number in (1, 3, 1, 3):
        for some in (4, 2):
            ours = graphs(module.part, tokens[:some], number, kept[:some])
            theirs = module.part(tokens[:some], number, kept[:some])
            assert ours.keys() == theirs.keys()
            for name in ours:
                torch.testing.assert_close(ours[name], theirs[name])
    graphs(module.part, tokens, 1, None)
    assert counter.frame_count == graphs.num_graphs == 3


def test_autocast_is_part_of_a_level() -> None:
    model, plain, counter = compiled(rel_pos="bias")
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(images(), 0.4), plain(images(), 0.4), rtol=0.1, atol=0.1)
        model(images(), 0.4)
    assert counter.frame_count == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("rel_pos", "cuda_graphs"), [("none", True), ("bias", True), ("bias", False)])
def test_generated_code_and_cuda_graphs_agree_with_the_plain_model(rel_pos: str, cuda_graphs: bool) -> None:
    model = tiny(spread=0.2, depth=1, rel_pos=rel_pos).cuda()
    plain = copy.deepcopy(model)
    model.graphs = Graphs(cuda_graphs=cuda_graphs)
    x = images(8).cuda()
    for _ in range(4):  # a graph is recorded at the second or third call
        for rho in (0.4, 1.0):
            gradients = []
            for each in (model.train(), plain.train()):
                each.zero_grad()
                with torch.autocast("cuda", torch.bfloat16):
                    logits = each(x, rho)
                logits.float().square().sum().backward()
                gradients.append([logits, *(parameter.grad.clone() for parameter in each.parameters())])  # type: ignore[union-attr]
            for ours, theirs in zip(*gradients, strict=True):
                assert (ours - theirs).norm() <= 0.03 * theirs.norm() + 1e-3
        with torch.inference_mode():
            torch.testing.assert_close(model.eval()(x[:5]), plain.eval()(x[:5]), rtol=1e-2, atol=1e-2)
    assert model.graphs.num_graphs == 3
