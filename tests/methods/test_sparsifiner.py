"""Sparsifiner: what its specification can be checked by on a CPU, without ImageNet (the numbers are its checks')."""

from __future__ import annotations

import json
import logging
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from memory_loader import MemoryLoader
from ranks import launch
from token_norm import TokenNorm
from torch import nn

from pss import methods, recipes
from pss.attention.attend import attend, attend_explicitly
from pss.methods import Phase, Progress, Stage, Teacher
from pss.methods.parts.connectivity import (
    Connection,
    Predictor,
    Thresholds,
    attend_gathered,
    attend_where,
    places_of_strongest,
    strongest,
)
from pss.methods.sparsifiner import DENSE, PREDICTORS, SPARSE
from pss.models.create import create_model
from pss.runs import checkpoint
from pss.runs.log import read_rows
from pss.runtime.processes import World
from pss.training.optim import build_optimizer
from pss.training.trainer import Trainer

SMALL = ["method=sparsifiner", "model.embed_dim=24", "train.epochs=4", "optim.warmup_epochs=1", "data.prefetch_gb=0"]
PUBLISHED = ["model.name=deit_small_patch16_224", "method=sparsifiner", "model.weights=dense.pt"]


def build(*settings, classes=4):
    torch.manual_seed(0)
    config = recipes.get("digits").with_settings([*SMALL, *settings])
    return methods.build(config, classes, steps_per_epoch=2)


def fine_tuning(*settings):
    """A method that starts from weights, so that there is no plain training before; predictors learn in epoch 0."""
    return build("model.weights=dense.pt", *settings)


def on_paper(*settings, size=224):
    """DeiT-S, of which tensors have shapes and nothing else."""
    with torch.device("meta"):
        config = recipes.get("deit-s-224-plain").with_settings([*PUBLISHED, f"data.img_size={size}", *settings])
        return methods.build(config, 1000, steps_per_epoch=2)


def at(step, epochs=4):
    return Progress(step=step, total_steps=2 * epochs, epoch=step // 2, epochs=epochs, seed=0, rank=0)


def images_of(method, count=2):
    made = torch.randn(count, 3, *method.model.image_size, generator=torch.Generator().manual_seed(1))
    return made.to(next(method.parameters()).dtype)


def spread_weights(method, std):
    """Weights with which attention differs from token to token, and predictors find something."""
    for name, parameter in method.named_parameters():
        if parameter.ndim > 1 or "table" in name:
            nn.init.normal_(parameter, std=std, generator=torch.Generator().manual_seed(len(name)))
    return method


def phase(method, name):
    (found,) = [phase for phase in method.phases() if phase.name == name]
    return found


def tensors_of(method):
    return {name: value.clone() for name, value in method.state_dict().items() if isinstance(value, torch.Tensor)}


def moved_in_a_step(method, name, steps=1):
    """Which tensors one step of a phase changes, with its groups."""
    before = tensors_of(method)
    now = phase(method, name)
    method.begin_phase(now)
    optimizer = build_optimizer(method, now, batch_size=32, steps_per_epoch=2)[0]
    first = {PREDICTORS: 0, SPARSE: 2}[name]
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    for _ in range(steps):
        method.train()
        method.begin_epoch(at(first))
        method(images_of(method, 4), torch.tensor([0, 1, 2, 3]), at(first))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name for name, value in tensors_of(method).items() if not torch.equal(value, before[name])}, optimizer


# 1. Budgets.


@pytest.mark.parametrize(
    ("settings", "point", "budget"),
    [
        ([], 0.25, 49),
        (["sparsifiner.budget_base=all"], 0.25, 50),
        ([], 0.1, 20),
        ([], 1.0, 197),
        (["sparsifiner.budget_base=all"], 1.0, 197),
        ([], 0.001, 1),
    ],
)
def test_budgets_of_deit_s(settings, point, budget):
    """Check 1."""
    assert on_paper(*settings).budgets(point) == (budget,) * 12


@pytest.mark.parametrize("size", [224, 384])
def test_32_rows_at_any_size(size):
    """Check 1: the authors' code has a sixth of the tokens, 96 at 384 px."""
    assert all(predictor.down.shape[1] == 32 for predictor in on_paper(size=size).predictors)
    assert [part.down.shape for part in build().predictors] == [(17, 9)] * 4


def test_rounding_adds_no_key():
    """0.07 of 100 comes out above 7."""
    assert math.ceil(100 * 0.07) == 8
    assert build("data.img_size=80").budgets(0.07) == (7,) * 4


def test_blocks_may_differ_and_another_point_moves_all():
    method = build("sparsifiner.keep=1,0.5,0.25,0.25")
    assert method.points()[:2] == (0.5, 1.0)
    assert method.budgets(0.5) == (17, 8, 4, 4)
    assert method.budgets(0.25) == (17, 4, 1, 1)
    assert method.budgets(1.0) == (17,) * 4
    assert build("sparsifiner.keep=1e-9").budgets(1e-9) == (1,) * 4
    with pytest.raises(ValueError, match=r"sparsifiner.keep names 2 shares, and the model has 4 blocks; name one, or"):
        build("sparsifiner.keep=0.5,0.25")


# 2. Masks.


def test_masks_have_the_budget_and_the_class_token_sees_all():
    """Check 2."""
    method = spread_weights(fine_tuning(), 0.5).eval()
    for connected in method.connected(images_of(method, 3), 0.25):
        assert connected.mask.dtype == torch.bool
        assert not connected.mask.requires_grad
        assert not connected.scores.requires_grad
        counts = connected.mask.sum(-1)
        assert counts.shape == (3, 3, 17)
        assert (counts[:, :, 0] == 17).all()
        assert (counts[:, :, 1:] == 4).all()
        assert connected.mask[:, :, 1:, 0].float().mean() < 1  # as a key it has no privilege


def test_ties_go_to_the_first():
    """Pitfall 7: whatever order a device sorts equal scores in."""
    scores = torch.zeros(2, 3, 40)
    scores[0, 0, 7] = scores[0, 0, 30] = 1.0
    chosen = strongest(scores, 5)
    assert chosen[0, 0].nonzero().flatten().tolist() == [0, 1, 2, 7, 30]
    assert chosen[1, 2].nonzero().flatten().tolist() == [0, 1, 2, 3, 4]
    random = torch.randint(0, 4, (5, 7, 60), generator=torch.Generator().manual_seed(0)).float()
    for count in (1, 9, 59, 60):
        mask = torch.zeros(random.shape, dtype=torch.bool)
        mask.scatter_(-1, places_of_strongest(random, count), True)
        assert torch.equal(strongest(random, count), mask)
        assert (mask.sum(-1) == count).all()


# 3, 4. Attention.


@pytest.mark.parametrize("rel_pos", ["none", "bias", "separable", "rope"])
@pytest.mark.parametrize("pool", ["token", "avg"])
@torch.inference_mode()
def test_a_full_budget_is_dense_attention(rel_pos, pool):
    """Check 3: both paths, and what predict does at keep rate 1, with any positions."""
    settings = [f"model.rel_pos={rel_pos}", f"model.global_pool={pool}"]
    method = spread_weights(fine_tuning(*settings), 0.3).eval()
    images = images_of(method)
    dense = method.model(images)
    assert dense.std() > 0.1
    for predictor in method.predictors:
        predictor.scores = None  # is not asked
    torch.testing.assert_close(method.predict(images, 1.0), dense, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rel_pos", ["none", "bias", "separable", "rope"])
@torch.inference_mode()
def test_both_paths_are_attention_written_out(rel_pos):
    """Checks 3 and 4, for N = 197: every budget, each path, weights that are zero outside."""
    method = fine_tuning(
        f"model.rel_pos={rel_pos}", "data.img_size=112", "model.depth=1", "model.global_pool=token"
    )  # 14 x 14 patches
    method = spread_weights(method, 0.3).eval()
    model, block, predictor = method.model, method.model.blocks[0], method.predictors[0]
    tokens, positions = block.norm1(model.embed(images_of(method))), model.positions(None)
    v = block.attn.project_in(tokens, positions)[2]
    dense = block.attn.project_out(block.attn.weights(tokens, positions) @ v)
    for budget in (1, 49, 197):
        connection = Connection(predictor, 1, budget)
        hidden, _ = block.attn(tokens, positions, connection=connection)
        gathered, _ = block.attn(tokens, positions, connection=connection._replace(gathered=True))
        connected = block.attn.connected(tokens, positions, connection)
        torch.testing.assert_close(hidden, block.attn.project_out(connected.sparse @ v), atol=1e-5, rtol=0)
        torch.testing.assert_close(gathered, hidden, atol=1e-5, rtol=0)
        assert (connected.sparse[~connected.mask] == 0).all()
        torch.testing.assert_close(connected.sparse.sum(-1), torch.ones(2, 3, 197))
    torch.testing.assert_close(hidden, dense, atol=1e-5, rtol=0)


def test_any_mask_gathered_and_hidden():
    """Check 4: rows of any length, of none too, whose result is zero and whose gradients are finite."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(2, 3, 20, 20, generator=generator) < 0.3
    mask[0, 0, 4], mask[1, 2, :] = False, False
    mask[0, 1, 3] = True
    keys = mask.byte().sort(dim=-1, descending=True, stable=True).indices
    allowed = mask.gather(-1, keys)
    results, gradients = [], []
    for path in (attend_where, attend_gathered):
        q, k, v = torch.randn(3, 2, 3, 20, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        given = [part.detach().requires_grad_() for part in (q, k, v)]
        if path is attend_where:
            out = attend_where(*given, mask)
        else:
            out = attend_gathered(*given, keys, scale=8**-0.5, allowed=allowed)
        gradients.append(torch.autograd.grad(out.square().sum(), given))
        results.append(out)
    torch.testing.assert_close(*results, atol=1e-5, rtol=0)
    some = mask.any(-1)
    assert (results[0][~some] == 0).all()
    assert (~some).sum() == 21
    explicit = attend_explicitly(*given, attn_mask=mask | ~some[..., None])
    torch.testing.assert_close(results[0][some], explicit[some], atol=1e-5, rtol=0)
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_an_exported_or_gathered_model_predicts_the_same():
    own = spread_weights(fine_tuning(), 0.3).eval()
    other = fine_tuning("sparsifiner.gathered=true").eval()
    other.load_state_dict(own.state_dict())
    images = images_of(own)
    for point in (0.25, 0.6, 1.0):
        torch.testing.assert_close(own.predict(images, point), other.predict(images, point), atol=1e-5, rtol=0)
    assert not torch.allclose(own.predict(images, 0.25), own.predict(images, 1.0), atol=1e-3)


# 5. Around a dense model.


@torch.inference_mode()
def test_what_predictors_observe_is_the_model_of_timm():
    """Check 5."""
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=4, img_size=64, depth=6).eval()
    nn.init.normal_(plain.head.weight, std=0.02)
    own = ["model.patch_size=none", "model.depth=6", "data.img_size=64", "model.embed_dim=none", "model.num_heads=none"]
    method = fine_tuning(*own, "model.global_pool=token", "model.rel_pos=none").eval()
    assert set(method.model.state_dict()) - set(plain.state_dict()) <= {"_extra_state"}
    method.model.load_state_dict(plain.state_dict(), strict=False)
    images = images_of(method)
    out = method(images, torch.tensor([0, 1]), at(0))
    torch.testing.assert_close(out["logits"], plain(images), atol=1e-6, rtol=0)
    torch.testing.assert_close(method.predict(images, 1.0), plain(images), atol=1e-6, rtol=0)


# 6. What is frozen.


def with_statistics(*settings):
    method = spread_weights(fine_tuning("sparsifiner.predictor_epochs=1", *settings), 0.3)
    method.model.norm_pre = TokenNorm(24)
    method._trained |= {f"norm_pre.{name}" for name, _ in method.model.norm_pre.named_parameters()}
    return method


def test_predictors_alone_move_in_their_phase():
    """Check 6: parameters and buffers."""
    method = with_statistics()
    moved, _ = moved_in_a_step(method, PREDICTORS)
    assert moved == {name for name, _ in method.named_parameters() if name.startswith("predictors.")}


def test_statistics_drift_in_the_published_code():
    """Check 6, the control."""
    moved, _ = moved_in_a_step(with_statistics("sparsifiner.reference=true"), PREDICTORS)
    statistics = {f"model.norm_pre.norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert {name for name in moved if name.startswith("model.")} == statistics


def test_the_model_alone_moves_afterwards():
    """Check 6: class token and position embedding too, without weight decay."""
    method = with_statistics("model.global_pool=token")
    moved, optimizer = moved_in_a_step(method, SPARSE)
    model = {name for name in tensors_of(method) if name.startswith("model.")} - {"model._extra_state"}
    assert model - moved <= {"model.fc_norm.weight", "model.fc_norm.bias"}
    assert not any(name.startswith("predictors.") for name in moved)
    for token in (method.model.cls_token, method.model.pos_embed):
        (decay,) = [g["weight_decay"] for g in optimizer.param_groups if any(part is token for part in g["params"])]
        assert decay == 0


def test_queries_and_keys_learn_nothing_from_predictors():
    """Pitfall 8: what predictors are taken from is detached, even where nothing is frozen."""
    method = spread_weights(fine_tuning(), 0.3)
    method(images_of(method), torch.tensor([0, 1]), at(0))["loss"].backward()
    assert all(part.grad is None for part in method.model.parameters())
    assert all(part.grad.abs().sum() > 0 for name, part in method.predictors.named_parameters())


# 7. What predictors learn.


def test_predictors_learn_the_attention():
    """Check 7: to less than half the error, in some hundred steps."""
    method = spread_weights(fine_tuning("model.depth=2"), 0.35)
    method.begin_phase(phase(method, PREDICTORS))
    method.train()
    method.begin_epoch(at(0))
    optimizer = torch.optim.AdamW(method.predictors.parameters(), lr=1e-2)
    images, errors = images_of(method, 16), []
    for _ in range(200):
        loss = method(images, torch.zeros(16, dtype=torch.int64), at(0))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    assert errors[-1] < errors[0] / 2


def test_parameters_of_deit_s():
    """Check 7."""
    method = on_paper()
    assert sum(part.numel() for part in method.predictors[0].parameters()) == 16_768
    assert sum(part.numel() for part in method.predictors.parameters()) == 201_216


def test_the_error_is_a_sum_over_rows_and_a_mean_over_blocks_and_images():
    """Section 3, of patches' rows alone."""
    method = spread_weights(fine_tuning(), 0.3).eval()
    images, model = images_of(method), method.model
    out = method(images, torch.tensor([0, 1]), at(0))
    tokens, positions, expected = model.embed(images), model.positions(None), 0.0
    for block, predictor in zip(model.blocks, method.predictors, strict=True):
        inner = block.norm1(tokens)
        q, k, _ = block.attn.project_in(inner, positions)
        reduced = predictor.queries(q) @ (predictor.keys(k).transpose(-2, -1) @ predictor.down)
        estimate = (3**-0.5 * reduced).softmax(-1) @ predictor.up.T
        expected += (estimate - block.attn.weights(inner, positions))[:, :, 1:].square().sum() / 2 / 4
        tokens = block(tokens, positions)
    torch.testing.assert_close(out["loss"], expected)
    reference = fine_tuning("sparsifiner.reference=true").eval()
    reference.load_state_dict(method.state_dict())
    published = reference(images, torch.tensor([0, 1]), at(0))["loss"]
    torch.testing.assert_close(published, 0.01 * 2 * expected)


def test_the_scale_may_be_of_the_width():
    """Pitfall 4."""
    assert on_paper().predictors[0].scale == pytest.approx(0.408, abs=1e-3)
    assert on_paper("sparsifiner.scale=width").predictors[0].scale == pytest.approx(0.177, abs=1e-3)


def test_a_basis_may_be_penalised_instead_of_decayed():
    """The L1 ablation: its weight follows a cosine over the whole run."""
    method = fine_tuning("sparsifiner.regularizer=l1", "sparsifiner.l1_weight=0.5", "sparsifiner.l1_end=0.1")
    now = phase(method, PREDICTORS)
    method.begin_phase(now)
    decays = {id(part): g["weight_decay"] for g in method.param_groups(now) for part in g["params"]}
    assert {decays[id(predictor.up)] for predictor in method.predictors} == {0.0}
    assert {decays[id(predictor.down)] for predictor in method.predictors} == {0.05}
    out = method(images_of(method), torch.tensor([0, 1]), at(1))
    assert out["l1"].item() == pytest.approx(sum(float(part.up.detach().abs().sum()) for part in method.predictors))
    weight = 0.1 + 0.4 * (1 + math.cos(math.pi / 8)) / 2
    torch.testing.assert_close(out["loss"], out["attention_error"] + weight * out["l1"])
    usual = fine_tuning()
    usual.begin_phase(now)
    decays = {id(part): g["weight_decay"] for g in usual.param_groups(now) for part in g["params"]}
    assert {decays[id(predictor.up)] for predictor in usual.predictors} == {0.05}


# 8. Thresholds.


def test_what_thresholds_leave():
    """Check 8: comparisons are strict, signs are discarded or negative entries are."""
    predictor = Predictor(6, 4, 8, scale=0.5, thresholds=Thresholds(0.25, 0.25))
    with torch.no_grad():
        predictor.up.copy_(torch.linspace(-0.5, 0.65, 24).view(6, 4))
        predictor.up[0, :2] = torch.tensor([0.25, -0.25])
    basis = predictor.basis()
    assert basis.shape == (4, 6)
    assert ((basis == 0) | (basis > 0.25)).all()
    assert basis[:2, 0].tolist() == [0, 0]
    assert basis[2, 0] == -predictor.up[0, 2]
    predictor.thresholds = Thresholds(0.25, 0.25, signs="clamp")
    assert predictor.basis()[2, 0] == 0
    q, k = torch.randn(2, 2, 3, 5, 8, generator=torch.Generator().manual_seed(0)) * 20
    coefficients = predictor.sparse_coefficients(q, k[:, :, :, :].repeat(1, 1, 2, 1)[:, :, :6])
    assert ((coefficients == 0) | (coefficients > 0.25)).all()
    assert (coefficients == 0).any()
    predictor.thresholds = Thresholds(0.25, 0.25, top=3)
    top = predictor.sparse_coefficients(q, k.repeat(1, 1, 2, 1)[:, :, :6])
    assert (top > 0).sum(-1).unique().tolist() == [3]


def test_published_thresholds_are_the_defaults():
    assert on_paper().predictors[0].thresholds == Thresholds(0.01, 0.05, None, "magnitude")
    assert build().predictors[0].thresholds.coefficient == pytest.approx(1.6 / 9)


def test_sparsities_are_told():
    """Check 8: of the basis and of coefficients, and of entries whose sign is lost."""
    method = spread_weights(fine_tuning("sparsifiner.basis_threshold=0.3"), 0.3).eval()
    method.predictors[0].up.data.fill_(0.2)
    method.predictors[1].up.data.fill_(-0.4)
    facts = method.facts()
    shares = [float((part.up.abs() > 0.3).float().mean()) for part in method.predictors]
    assert shares[:2] == [0, 1]
    assert facts["basis_sparsity"] == pytest.approx(1 - sum(shares) / 4)
    assert facts["negative_basis"] == pytest.approx(
        sum(float((part.up < -0.3).float().mean()) for part in method.predictors) / 4
    )
    assert "coefficient_sparsity" not in facts
    images = images_of(method, 6)
    with torch.inference_mode():
        for some in images.split(4):
            method.predict(some, 0.25)
        method.predict(images, 0.5)
    told = method.facts()
    zeros = [
        float((predictor.sparse_coefficients(*own) == 0).float().mean())
        for predictor, own in zip(method.predictors, queries_and_keys(method, images), strict=True)
    ]
    assert told["coefficient_sparsity"] == pytest.approx(sum(zeros) / 4)
    short = [float(((one.scores > 0).sum(-1) < 4).float().mean()) for one in method.connected(images, 0.25)]
    assert told["short_rows"] == pytest.approx(sum(short) / 4)
    assert 0.25 <= told["short_rows"] < 1  # block 0 has no basis at all
    assert method.train().eval().facts().keys() == facts.keys()


def queries_and_keys(method, images):
    model = method.model
    tokens, positions = model.embed(images), model.positions(None)
    for number, (block, predictor) in enumerate(zip(model.blocks, method.predictors, strict=True)):
        q, k, _ = block.attn.project_in(block.norm1(tokens), positions)
        yield q[:, :, 1:], k
        connection = Connection(predictor, 1, 4)
        tokens = model.run_blocks(tokens, positions, number, number + 1, connection=connection)


# 9. Untrained predictors.


def test_few_keys_by_untrained_predictors_are_refused():
    """Check 9."""
    method = fine_tuning()
    method.check_phase(phase(method, PREDICTORS))
    with pytest.raises(ValueError, match=r"predictors have taken no step, .*; have them learn first \(sparsifiner.pre"):
        method.check_phase(phase(method, SPARSE))
    method.predictor_steps += 1
    method.check_phase(phase(method, SPARSE))
    method.predictors[2].up.data.mul_(0.01)
    with pytest.raises(ValueError, match=r"no entry of the basis of block 2 is above sparsifiner.basis_threshold=0.01"):
        method.check_phase(phase(method, SPARSE))


def test_a_run_asks_before_the_phase(tmp_path):
    """Skipped steps teach nothing."""
    run = trainer(config_of("train.max_skipped=100"), tmp_path)
    forward = run.method.forward

    def spoiled(images, targets, position, *dense):
        out = forward(images, targets, position, *dense)
        return out | {"loss": out["loss"] * (float("nan") if position.phase == 1 else 1.0)}

    run.method.forward = spoiled
    with pytest.raises(ValueError, match="predictors have taken no step"):
        run.fit()
    assert run.epoch == 2


def test_evaluation_says_that_predictors_are_untrained(caplog):
    """And that patches see keys for which there are no scores, once each."""
    method = fine_tuning().eval()
    with caplog.at_level(logging.WARNING):
        assert method.facts()["predictor_steps"] == 0
        method.facts()
    assert [record.message for record in caplog.records] == [
        "the predictors are not trained yet: below keep rate 1, patches see keys for no reason"
    ]
    caplog.clear()
    method.predictor_steps += 1
    with torch.inference_mode():
        method.predict(images_of(method), 0.25)
    facts = method.facts()
    assert facts["short_rows"] == 1  # coefficients of fresh predictors are all below the threshold
    assert facts["coefficient_sparsity"] == 1
    assert "predictor_steps" not in facts
    assert "most patches have fewer positive scores than keys" in caplog.text


# 10. Costs.


def test_costs_of_deit_s():
    """Check 10: what is needed, at the published sparsities; and a combination that is computed densely."""
    method = on_paper()
    needed = method.predictors.needed_macs
    assert needed(197, [197] * 12, 0.0, 0.0) == pytest.approx(357.7e6, abs=0.05e6)
    assert needed(197, method.budgets(0.25), 0.87, 0.908) == pytest.approx(177.2e6, abs=0.05e6)
    assert needed(197, method.budgets(0.1), 0.87, 0.908) == pytest.approx(124.5e6, abs=0.05e6)
    combined = needed(197, method.budgets(0.25), 0.0, 0.0) - needed(197, method.budgets(0.25), 1.0, 1.0)
    assert combined == pytest.approx(89.4e6, abs=0.05e6)


def test_costs_are_of_what_is_computed():
    """Hidden keys are computed unless they are gathered, so that they cost more than dense attention."""
    hidden, gathered = on_paper(), on_paper("sparsifiner.gathered=true")
    dense = hidden.cost(1.0)
    assert (dense.backbone, dense.extra) == (4_598_882_304, 0)
    extra = 87_146_496 + 89_413_632 // 197 * 197
    assert hidden.cost(0.25).backbone == dense.backbone
    assert hidden.cost(0.25).extra == pytest.approx(extra, rel=1e-3)
    assert gathered.cost(1.0) == dense
    assert gathered.cost(0.25).backbone == dense.backbone - 12 * 2 * 196 * (197 - 49) * 384
    assert gathered.cost(0.25).extra == hidden.cost(0.25).extra


def test_points_for_a_choice_cost_less_than_larger_ones():
    assert on_paper().fine_points() == (1.0,)
    method = on_paper("sparsifiner.gathered=true")
    points = method.fine_points()
    costs = [method.cost(point).forward for point in points]
    assert costs == sorted(set(costs))
    assert points[-1] == 1.0
    assert 0.4 < points[-2] < 0.6  # predictors cost what half the keys do
    assert len({method.budgets(point) for point in points}) == len(points)


def test_training_costs_by_phase():
    method = on_paper("sparsifiner.teacher=timm:deit_small_patch16_224.fb_in1k", "train.epochs=45")
    alone, sparse = (method.training_cost(Stage(name=name)) for name in (PREDICTORS, SPARSE))
    assert alone.backbone == sparse.backbone == sparse.teacher == 4_598_882_304
    assert alone.teacher == 0
    assert alone.extra == sparse.extra > 0
    assert alone.backward == 2 * alone.extra
    assert sparse.backward == 2 * sparse.backbone
    assert method.training_cost(Stage(name=DENSE)).forward == 4_598_882_304
    assert method.training_tokens(Stage(name=SPARSE), 112) == (50,) * 12


# Phases.


def test_published_phases():
    """Section 4."""
    method = on_paper("train.epochs=45", "optim.lr=8e-5", "optim.lr_batch=none", "optim.min_lr=2e-6")
    assert [(one.name, one.epochs) for one in method.phases()] == [(PREDICTORS, 5), (SPARSE, 40)]
    first, last = (one.optim for one in method.phases())
    assert (first.lr, first.min_lr, first.lr_batch, first.warmup_epochs) == pytest.approx((3e-4, 2e-4, None, 3))
    assert (last.lr, last.min_lr, last.weight_decay) == (8e-5, 2e-6, 0.05)
    assert [method.stage(at(2 * epoch, 45)).name for epoch in (0, 4, 5, 44)] == [PREDICTORS] * 2 + [SPARSE] * 2
    assert method.course() == (
        "keep rate: 0.25, with which a patch looks at 49 of 197 tokens; 5 epochs of predictors alone, and the rest "
        "with few keys"
    )


def test_random_weights_are_trained_first():
    method = build("train.epochs=50")
    assert [(one.name, one.epochs) for one in method.phases()] == [(DENSE, 20), (PREDICTORS, 3), (SPARSE, 27)]
    assert "20 epochs of plain training, then 3 epochs of predictors alone" in method.course()
    method.begin_phase(phase(method, DENSE))
    assert all(part.requires_grad for part in method.model.parameters())
    assert not any(part.requires_grad for part in method.predictors.parameters())
    images, labels = images_of(method), torch.tensor([0, 1])
    loss = method(images, labels, at(0, 50))["loss"]
    torch.testing.assert_close(loss, F.cross_entropy(method.model(images), labels, label_smoothing=0.1))


def test_short_runs_warm_up_for_half_a_phase_at_most():
    method = fine_tuning("train.epochs=4", "optim.warmup_epochs=3", "optim.cooldown_epochs=1")
    alone, sparse = (one.optim for one in method.phases())
    assert (alone.warmup_epochs, alone.cooldown_epochs) == pytest.approx((0.6, 0))
    assert (sparse.warmup_epochs, sparse.cooldown_epochs) == (1.5, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.epochs=1", "optim.warmup_epochs=0"], r"predictor_epochs \(1\) leave none of the run's 1 epochs"),
        (["sparsifiner.predictor_epochs=4"], r"\(0\) and sparsifiner.predictor_epochs \(4\) leave none"),
        (["sparsifiner.keep=1"], r"sparsifiner.keep is 1; name a share below 1, such as 0.25, or set method=dense"),
        (["sparsifiner.num_down=18"], r"num_down is 18, and images have 17 tokens; set it to no more, or to none"),
        (["sparsifiner.l1_weight=0.1"], r"sparsifiner.l1_weight is 0.1, which nothing reads .*regularizer=l1"),
        (["sparsifiner.kl_weight=0.1"], r"sparsifiner.kl_weight is 0.1, which nothing reads .*sparsifiner.teacher"),
        (["sparsifiner.top=8", "sparsifiner.coefficient_threshold=0.1"], r"coefficient_threshold is 0.1, .*top=none"),
        (
            ["sparsifiner.teacher=x.pt", "sparsifiner.kl_weight=0", "sparsifiner.token_weight=0"],
            "teacher is set and nothing is learnt from it; raise sparsifiner.kl_weight",
        ),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        fine_tuning(*settings)


def test_smaller_images_use_their_places():
    """With progressive resizing: the patches that are there keep their rows of both matrices, and a share of them."""
    method = spread_weights(fine_tuning("data.img_size=64", "model.global_pool=token"), 0.3)
    seen, real = [], Predictor.coefficients

    def note(self, q, k, rows=None):
        seen.append((q.shape[2], k.shape[2], rows))
        return real(self, q, k, rows)

    images = torch.randn(2, 3, 32, 32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Predictor, "coefficients", note)
        for step in (0, 2):
            assert method(images, torch.tensor([0, 1]), at(step))["loss"].isfinite()
    places = method.model.see(images, 1.0, low_resolution=True)[1]
    for queries, keys, rows in seen:
        assert (queries, keys) == (16, 17)
        assert rows.tolist() == [0, *(1 + places).tolist()]


# What is learnt from the teacher.


@pytest.fixture
def dense_weights(tmp_path):
    torch.manual_seed(5)
    config = recipes.get("digits").with_settings(SMALL)
    model = create_model(config.model.name, num_classes=4, img_size=32, **config.model.overrides())
    nn.init.normal_(model.head.weight)
    torch.save(model.state_dict(), tmp_path / "dense.pt")
    return tmp_path / "dense.pt"


def test_the_loss_is_the_sum_of_its_parts_and_the_teacher_sees_the_same_images(dense_weights, monkeypatch):
    """Section 3; the teacher is not asked while predictors learn."""
    method = spread_weights(fine_tuning(f"sparsifiner.teacher={dense_weights}", "sparsifiner.kl_weight=0.25"), 0.3)
    method.teachers["teacher"].load(torch.device("cpu"))
    seen, ask = [], Teacher.__call__
    monkeypatch.setattr(Teacher, "__call__", lambda self, images: (seen.append(images), ask(self, images))[1])
    images, targets = images_of(method), torch.tensor([[0.5, 0.5, 0, 0], [0, 0.1, 0.9, 0]])
    assert "kl" not in method(images, targets, at(0))
    assert not seen
    out = method(images, targets, at(2))
    assert seen[0] is images
    parts = out["classification"] + 0.25 * out["kl"] + 0.5 * out["tokens_distance"]
    torch.testing.assert_close(out["loss"], parts)
    answer = ask(method.teachers["teacher"], images)
    taught = answer.logits.softmax(-1)
    kl = (taught * (taught.log() - out["logits"].log_softmax(-1))).sum(1).mean()
    torch.testing.assert_close(out["kl"], kl)
    tokens, _ = method._connected(method.model.embed(images), None, *method.budgets(0.25))
    torch.testing.assert_close(out["tokens_distance"], (tokens - answer.tokens)[:, 1:].square().mean())


def test_a_classifier_of_patches_is_compared_instead_of_features(dense_weights, monkeypatch):
    """Section 2.8: class terms are of the class logits alone, and the other term of the patches' logits."""
    method = spread_weights(fine_tuning(f"sparsifiner.teacher={dense_weights}"), 0.3)
    method.teachers["teacher"].load(torch.device("cpu"))
    kind = type(method.model)
    monkeypatch.setattr(kind, "answers", lambda self, tokens: (self.readout(tokens), 3 * self.head(tokens[:, 1:])))
    images = images_of(method)
    out = method(images, torch.tensor([0, 1]), at(2))
    teacher = method.teachers["teacher"]
    tokens, _ = method._connected(method.model.embed(images), None, *method.budgets(0.25))
    distance = 3 * (method.model.head(tokens[:, 1:]) - teacher.model.head(teacher(images).tokens[:, 1:]))
    torch.testing.assert_close(out["tokens_distance"], distance.square().mean())
    torch.testing.assert_close(out["logits"], method.model.readout(tokens))
    # Without that term the prediction itself is what is trained, as it reads the patches' classifier.
    monkeypatch.setattr(kind, "answers", lambda self, tokens: (0 * self.readout(tokens), tokens[:, 1:]))
    alone = spread_weights(fine_tuning(), 0.3)
    assert alone(images, torch.tensor([0, 1]), at(2))["logits"].abs().sum() > 0


def test_a_teacher_of_another_width_is_refused(tmp_path):
    config = recipes.get("digits").with_settings([*SMALL, "method=dense", "model.embed_dim=48"])
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text(config.to_json(), encoding="utf-8")
    method = fine_tuning(f"sparsifiner.teacher={tmp_path / 'run'}")
    teacher = method.teachers["teacher"]
    teacher.model = create_model(config.model.name, num_classes=4, img_size=32, **config.model.overrides()).eval()
    with pytest.raises(ValueError, match=r"16 patches of 48 features, and the model 16 of 24; .*token_weight=0"):
        method(images_of(method), torch.tensor([0, 1]), at(2))


# Whole runs.


def config_of(*settings):
    return recipes.get("digits").with_settings([*SMALL, "model.depth=2", "train.batch_size=8", *settings])


def trainer(config, output):
    output.mkdir(exist_ok=True)
    (output / "config.json").write_text(config.to_json(), encoding="utf-8")
    loaders = MemoryLoader(40), MemoryLoader(40, train=False)
    return Trainer(
        config, *loaders, classes=["a", "b", "c", "d"], output=output,
        world=World(rank=0, size=1, device=torch.device("cpu")),
    )  # fmt: skip


def test_a_run_goes_through_its_phases(tmp_path):
    """The log has their names and figures, and the moving average has the predictors themselves in the end."""
    config = config_of("train.ema_decay=0.99", "train.log_every_steps=5", "sparsifiner.predictor_lr=0.01")
    run = trainer(config, tmp_path)
    row = run.fit()
    rows = read_rows(tmp_path, "step")
    assert [one["stage"] for one in rows] == [DENSE, PREDICTORS, SPARSE, SPARSE]
    assert "attention_error" in rows[1]
    assert 0 <= rows[2]["coefficient_sparsity"] <= 1
    assert 0 <= rows[3]["short_rows"] <= 1
    assert int(run.method.predictor_steps) == 5
    for own, averaged in zip(run.method.predictors.parameters(), run.ema.module.predictors.parameters(), strict=True):
        assert torch.equal(own, averaged)
    assert not torch.equal(run.method.model.head.weight, run.ema.module.model.head.weight)
    assert {"basis_sparsity", "negative_basis", "coefficient_sparsity", "short_rows", "attention_needed"} <= set(row)
    json.dumps(row, allow_nan=False)


def test_phases_have_fresh_optimizers(tmp_path):
    run = trainer(config_of("train.max_steps=6"), tmp_path)
    run.fit()
    predictors = {id(part) for part in run.method.predictors.parameters()}
    assert {id(part) for part in run.optimizer.state} == predictors
    assert {float(state["step"]) for state in run.optimizer.state.values()} == {1.0}


def test_the_dense_path_is_the_fast_one():
    """A method whose attention is replaced computes plain attention as before."""
    method = spread_weights(build(), 0.3).eval()
    block, tokens = method.model.blocks[0], method.model.embed(images_of(method))
    q, k, v = block.attn.project_in(block.norm1(tokens))
    table, positions = block.attn.relative_position_bias_table, method.model.positions(None)
    expected = block.attn.project_out(attend(q, k, v, table=table, positions=positions))
    torch.testing.assert_close(block.attn(block.norm1(tokens), positions), expected)
    assert Phase(DENSE, 1, method.config.optim) not in method.phases()


def test_recipes_are_the_published_settings():
    """Sections 4 and 7: of the paper's supplement, and of the authors' shipped settings."""
    paper, release = recipes.get("sparsifiner-s"), recipes.get("sparsifiner-s-release")
    for one, epochs in ((paper, 45), (release, 50)):
        assert one.own[0].teacher == one.model.weights
        assert timm.is_model_pretrained(one.model.weights.removeprefix("timm:"))
        assert one.own[0].epochs_before(one) == (0, 5)
        assert one.train.epochs == epochs
        assert one.optim.peak_lr(1344) == 8e-5
        assert (one.data.repeats, one.model.drop_path_rate, one.optim.clip_grad) == (1, 0.0, None)
    with torch.device("meta"):
        built = [methods.build(one.with_settings(["model.weights=x.pt"]), 1000, 10) for one in (paper, release)]
    assert [one.budgets(one.keep)[0] for one in built] == [49, 50]
    assert [one.predictors[0].thresholds[:3] for one in built] == [(0.01, 0.05, None), (0.02, 0.05, 8)]


def test_a_killed_run_ends_bit_identical_across_its_phases(image_root, tmp_path):
    """SIGKILL where predictors learn, and again where the model follows; each time a process goes on from the newest
    checkpoint. Epochs have three steps."""
    killed = [
        *SMALL, "model.depth=2", "train.batch_size=16", "train.ema_decay=0.9", "loss.mixup=0.8",
        "train.checkpoint_every_minutes=1e-9", "sparsifiner.predictor_lr=0.01",
    ]  # fmt: skip
    torch.manual_seed(5)
    config = recipes.get("digits").with_settings(killed)
    model = create_model(config.model.name, num_classes=3, img_size=32, **config.model.overrides())
    torch.save(model.state_dict(), tmp_path / "dense.pt")
    words = [*killed, f"model.weights={tmp_path / 'dense.pt'}", f"sparsifiner.teacher={tmp_path / 'dense.pt'}"]
    launch(1, image_root, tmp_path / "undisturbed", *words)
    for step in (2, 5):
        with pytest.raises(AssertionError):  # it did not end well
            launch(1, image_root, tmp_path / "killed", *words, f"kill=0:{step}")
        assert checkpoint.load_latest(tmp_path / "killed" / "checkpoints")[0]["step"] <= step
        (tmp_path / "killed" / "killed").unlink()
    launch(1, image_root, tmp_path / "killed", *words)
    ours, theirs = (checkpoint.load_latest(tmp_path / name / "checkpoints")[0] for name in ("killed", "undisturbed"))
    assert ours["step"] == theirs["step"] == 12
    for part in ("method", "ema"):
        assert ours[part].keys() == theirs[part].keys()
        for name, value in theirs[part].items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(ours[part][name], value), name
    for number, moments in theirs["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(ours["optimizer"]["state"][number][name], value), name
