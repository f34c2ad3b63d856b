"""What does in fewer operations what torch or timm does, to the bit."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from pss.runtime.seeds import seed_generator
from pss.training.guard import Guard, skipping, update_average
from pss.training.optim import AdamW
from pss.training.tensors import Inventory, clip_gradients, total_norm


class Odd(nn.Module):
    """Shared modules and parameters, buffers that are saved or not, and some that are missing."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layers = nn.BatchNorm1d(3), nn.ModuleList([nn.Linear(3, 3) for _ in range(2)])
        self.again, self.tied = self.norm, self.layers[0].weight
        self.register_buffer("hidden", torch.ones(2), persistent=False)
        self.register_buffer("missing", None)
        self.layers[0].bias = None


def test_an_inventory_holds_what_torch_lists() -> None:
    model = Odd()
    held = Inventory(model)
    model.hidden, model.missing = torch.zeros(2), torch.zeros(3)  # replaced since, and come since
    for ours, theirs in (
        (held.parameters, list(model.parameters())),
        ([*held.parameters, *held.saved_buffers()], list(model.state_dict(keep_vars=True).values())),
        (held.statistics(), [part for part in model.buffers() if part.is_floating_point()]),
    ):
        assert {id(one) for one in ours} == {id(one) for one in theirs}
        assert len(ours) == len({id(one) for one in theirs})
    assert [id(one) for one in held.parameters] == [id(one) for one in model.parameters()]


def test_an_inventory_has_gradients_until_they_are_forgotten() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    held, untrained = Inventory(model), model[0].weight
    untrained.requires_grad_(False)
    model(torch.ones(1, 2)).sum().backward()
    expected = [part.grad for part in model.parameters() if part is not untrained]
    assert [id(one) for one in held.gradients()] == [id(one) for one in expected]
    held.forget_gradients()
    assert not held.gradients()
    assert all(part.grad is None for part in model.parameters())


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float32, torch.float64)])
@pytest.mark.parametrize("odd", [1.0, math.inf, math.nan])
def test_the_norm_is_torchs(dtypes: tuple[torch.dtype, ...], odd: float) -> None:
    parts = [torch.randn(3, number + 1, dtype=dtypes[number % len(dtypes)]) for number in range(9)]
    parts[4][0, 0] = odd
    assert torch.equal(total_norm(parts).nan_to_num(7), nn.utils.get_total_norm(parts).nan_to_num(7))


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float32, torch.float64)])
@pytest.mark.parametrize("scale", [1e-3, 10.0, math.inf])
def test_clipping_is_torchs(dtypes: tuple[torch.dtype, ...], scale: float) -> None:
    weights = [nn.Parameter(torch.zeros(3, number + 1, dtype=dtypes[number % len(dtypes)])) for number in range(9)]
    held = Inventory(nn.ParameterList(weights))
    for weight in weights[1:]:  # one of them has no gradient
        weight.grad = scale * torch.randn_like(weight)
    norm, ours = total_norm(held.gradients()), [gradient.clone() for gradient in held.gradients()]
    clip_gradients(ours, 0.5, norm, alike=held.alike)
    nn.utils.clip_grads_with_norm_(weights, 0.5, norm)
    for one, gradient in zip(ours, held.gradients(), strict=True):
        assert torch.equal(one.nan_to_num(7), gradient.nan_to_num(7))


@pytest.mark.parametrize("idle", [False, True])
@pytest.mark.parametrize("name", ["step", "advance"])
def test_the_optimizer_is_torchs(idle: bool, name: str) -> None:
    ours, theirs = (nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    pairs = [(ours, AdamW), (theirs, torch.optim.AdamW)]
    optimizers = []
    for model, kind in pairs:
        groups = [
            {"params": model[1].parameters(), "lr": 0.02},  # in another order than the model lists them
            {"params": model[0].parameters(), "weight_decay": 0.1},
        ]
        if idle:
            groups.append({"params": [nn.Parameter(torch.ones(2))]})  # never has a gradient
        optimizers.append(kind(groups, lr=0.01, fused=True))
    held = Inventory(ours)
    for number, skip in enumerate((0, 0, 1, 0, 1, 1, 0)):
        x = torch.randn(3, 4)
        for (model, _), optimizer in zip(pairs, optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            if number == 3:
                model[0].bias.grad = None
            if number == 4:  # as a resumed run does
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            skipping(optimizer, torch.tensor(float(skip)))
            if optimizer is optimizers[0] and name == "advance":
                optimizer.advance(held.parameters, held.gradients())
            else:
                optimizer.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    for number, of_parameter in states[1].items():
        for key, value in of_parameter.items():
            assert torch.equal(states[0][number][key], value)


def test_the_generators_of_cpu_and_own_gpu_are_seeded_as_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    seed_generator(3, 1, 4)
    drawn, seed = torch.rand(3), torch.initial_seed()
    gpus = torch.Generator(), torch.Generator()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "default_generators", gpus)
    before = gpus[0].initial_seed()
    seed_generator(3, 1, 4)
    assert torch.equal(torch.rand(3), drawn)
    assert gpus[1].initial_seed() == seed
    assert gpus[0].initial_seed() == before


@pytest.mark.parametrize("skip", [0.0, 1.0])
def test_the_average_moves_as_timms_and_statistics_are_copied(skip: float) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    ema = ModelEmaV3(model, decay=0.99)
    for part in model.parameters():
        part.data += torch.randn_like(part)
    model[1].running_mean += 2.0
    expected = copy.deepcopy(ema.module)
    share = (1 - 0.99) * (1 - torch.tensor(skip))
    with torch.no_grad():
        for average, value in zip(expected.parameters(), model.parameters(), strict=True):
            average += (value - average) * share
        expected[1].running_mean.copy_(model[1].running_mean)
    update_average(Inventory(ema.module), Inventory(model), ema.get_decay(5), torch.tensor(skip))
    for one, other in zip(expected.state_dict().values(), ema.module.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def judged(counts: Tensor, loss: Tensor, norm: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    """`Guard.judge`, in plain words."""
    used = norm if clip is None else norm.clamp(max=clip)
    bad = bool(~torch.isfinite(norm) | ~torch.isfinite(used.float().square()))
    counts[0] += bad
    counts[1] = counts[1] + 1 if bad else 0
    counts[2] = max(counts[1], counts[2])
    measured = torch.zeros(3) if bad else torch.stack((loss.float(), norm.float(), torch.ones(())))
    return torch.tensor(float(bad)), measured


def test_the_guard_judges_as_in_plain_words() -> None:
    guard, counts = Guard(torch.device("cpu"), limit=100), torch.zeros(3, dtype=torch.int64)
    norms = (0.0, 1.0, 1e18, 2e19, 3e38, 1e300, math.inf, math.nan)
    for dtype, norm, clip, loss in itertools.product(
        (torch.float32, torch.float64), norms, (None, 1.0, 1e25), (1.0, math.nan)
    ):
        values = torch.tensor(loss), torch.tensor(norm, dtype=dtype)
        for ours, plain in zip(guard.judge(*values, clip), judged(counts, *values, clip), strict=True):
            assert ours.dtype == plain.dtype
            assert torch.equal(ours.nan_to_num(7), plain.nan_to_num(7))
        assert torch.equal(guard.counts, counts)


@pytest.mark.parametrize("loss", [2.0, 0.0, math.inf, -math.inf, math.nan])
def test_gradients_of_a_loss_that_is_not_finite_are_nan(loss: float) -> None:
    x = torch.tensor(loss, requires_grad=True)
    Guard(torch.device("cpu"), limit=1).backward(3 * x)
    assert x.grad is not None
    assert x.grad.isnan() if not math.isfinite(loss) else x.grad == 3
