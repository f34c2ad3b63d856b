"""DynamicViT: what its specification can be checked by on a CPU, without ImageNet (the numbers are its checks')."""

from __future__ import annotations

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from memory_loader import MemoryLoader
from token_norm import TokenNorm
from torch import nn

from pss import methods, recipes
from pss.inference.opening import load_run
from pss.methods import Progress, Teacher
from pss.methods.dynamicvit import quarters
from pss.methods.parts.policy import (
    KEEP,
    Predictor,
    decide,
    gumbel,
    kl_loss,
    policy_softmax,
    ratio_loss,
    token_loss,
    with_likeliest,
)
from pss.models.create import create_model
from pss.runs.log import read_rows
from pss.runtime.processes import World
from pss.training.optim import AdamW, build_optimizer, set_rates
from pss.training.trainer import Trainer

SMALL = ["method=dynamicvit", "model.embed_dim=24", "train.epochs=4", "optim.warmup_epochs=1", "data.prefetch_gb=0"]
DEEP = [
    "data.img_size=224", "model.patch_size=16", "model.depth=12", "model.embed_dim=64", "model.num_heads=4",
]  # fmt: skip
READOUTS = {"class token": "model.global_pool=token", "mean of patches": "model.global_pool=avg"}


def build(*settings, recipe="digits", classes=4):
    torch.manual_seed(0)
    config = recipes.get(recipe).with_settings([*(SMALL if recipe == "digits" else ()), *settings])
    return methods.build(config, classes, steps_per_epoch=2)


def on_paper(*settings, model="deit_small_patch16_224", size=224):
    """A method whose tensors have shapes and nothing else."""
    named = [f"model.name={model}", f"data.img_size={size}", "method=dynamicvit", *settings]
    with torch.device("meta"):
        return methods.build(recipes.get("deit-s-224-plain").with_settings(named), 1000, steps_per_epoch=2)


def at(step, seed=0, rank=0):
    return Progress(step=step, total_steps=8, epoch=step // 2, epochs=4, seed=seed, rank=rank)


def images_of(method, count=2):
    made = torch.randn(count, 3, *method.model.image_size, generator=torch.Generator().manual_seed(1))
    return made.to(next(method.parameters()).dtype)


def spread_weights(method, std):
    for name, parameter in method.named_parameters():
        if parameter.ndim > 1 or "table" in name:
            nn.init.normal_(parameter, std=std, generator=torch.Generator().manual_seed(len(name)))
    return method


def forcing(kept):
    """Noise that decides as `kept` (B, S, N) says, whatever predictors say."""
    pull = torch.where(kept, 1e3, -1e3)
    return torch.stack((pull, -pull), dim=-1)


def kept_at_inference(method, images, point=None):
    """Which patches go on after each stage, (B, S, N)."""
    depths = method.depths(images, point)
    return torch.stack([depths > place for place in method.places], dim=1)


# 1. Hiding and gathering.


@pytest.mark.parametrize("rel_pos", ["none", "bias", "separable", "rope"])
@pytest.mark.parametrize("readout", READOUTS)
@torch.inference_mode()
def test_hidden_patches_are_as_good_as_gone(readout, rel_pos):
    """Check 1, in float64 without eps, for both readouts and all positions."""
    method = build(*DEEP, READOUTS[readout], f"model.rel_pos={rel_pos}", "dynamicvit.eps=0")
    method = spread_weights(method.double().eval(), 0.2)
    images = images_of(method)
    kept = kept_at_inference(method, images)
    assert kept.sum(-1).tolist() == [[137, 96, 67]] * 2
    model = method.model
    tokens, decided = method.masked(model.embed(images), forcing(kept), model.positions(None))
    assert torch.equal(decided.bool(), kept)
    hidden, gathered = method.masked_answers(tokens, decided[:, -1])[0], method.predict(images)
    assert gathered.std() > 0.1
    torch.testing.assert_close(hidden, gathered, atol=1e-12, rtol=0)


@pytest.mark.parametrize("readout", READOUTS)
@torch.inference_mode()
def test_hidden_patches_are_as_good_as_gone_in_single_precision(readout):
    """Check 1, in float32 with the published eps."""
    method = spread_weights(build(*DEEP, READOUTS[readout], "model.rel_pos=none").eval(), 0.1)
    images = images_of(method)
    kept = kept_at_inference(method, images)
    tokens, decided = method.masked(method.model.embed(images), forcing(kept), None)
    hidden, gathered = method.masked_answers(tokens, decided[:, -1])[0], method.predict(images)
    assert gathered.std() > 0.1
    torch.testing.assert_close(hidden, gathered, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_the_mean_over_prefix_and_patches_leaves_out_hidden_ones():
    """A readout that counts the class token in needs its count, too."""
    method = spread_weights(build("model.global_pool=avg", "dynamicvit.eps=0").double().eval(), 0.2)
    method.model.pool_include_prefix = True
    images = images_of(method)
    kept = kept_at_inference(method, images)
    tokens, decided = method.masked(method.model.embed(images), forcing(kept), method.model.positions(None))
    torch.testing.assert_close(
        method.masked_answers(tokens, decided[:, -1])[0], method.predict(images), atol=1e-12, rtol=0
    )


def test_other_pooling_is_refused():
    with pytest.raises(ValueError, match=r"cannot hide patches from model.global_pool=max; use token or avg"):
        methods.find("dynamicvit")(
            create_model("vit_tiny_patch16_224", depth=4, global_pool="max"),
            recipes.get("digits").with_settings(SMALL), 2,
        )  # fmt: skip


def test_a_readout_of_another_kind_is_refused():
    with pytest.raises(ValueError, match=r"cannot hide patches from the readout of Backbone; use a model.name"):
        build("model.name=everything:backbone")


# 2. Nothing dropped.


@torch.inference_mode()
def test_all_kept_is_the_dense_model_of_timm():
    """Check 2: in training with every patch kept, and at inference at ρ = 1, where no predictor is asked."""
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=4, img_size=64, depth=6).eval()
    nn.init.normal_(plain.head.weight, std=0.1)
    own = ["model.patch_size=none", "model.depth=6", "data.img_size=64", "model.embed_dim=none", "model.num_heads=none"]
    method = build(*own, "model.global_pool=token", "model.rel_pos=none", "dynamicvit.eps=0").eval()
    assert set(method.model.state_dict()) - set(plain.state_dict()) <= {"trained_on", "_extra_state"}
    method.model.load_state_dict(plain.state_dict(), strict=False)
    images = images_of(method)
    everything = torch.ones(2, 3, 16, dtype=torch.bool)
    tokens, decided = method.masked(method.model.embed(images), forcing(everything), None)
    torch.testing.assert_close(method.masked_answers(tokens, decided[:, -1])[0], plain(images), atol=1e-5, rtol=0)
    for predictor in method.predictors:
        predictor.forward = None
    torch.testing.assert_close(method.predict(images, 1.0), plain(images), atol=1e-5, rtol=0)
    assert method.cost(1.0).extra == 0


# 3, 7, 8. Losses.


def test_ratio_loss():
    """Check 3: of each image by itself."""
    targets = torch.tensor([0.7, 0.49, 0.343])
    everything = ratio_loss(torch.ones(2, 3, 196), targets)
    assert everything.item() == pytest.approx(0.2605830, abs=1e-7)
    counted = torch.stack([(torch.arange(196) < count).float() for count in (137, 96, 67)])[None]
    assert ratio_loss(counted, targets).item() == pytest.approx(8.1e-7, rel=0.01)
    both = torch.stack((torch.ones(1, 8), torch.zeros(1, 8)))
    assert ratio_loss(both, torch.tensor([0.5])).item() == 0.25


def test_the_divergence_is_from_the_teacher_to_the_student():
    """Check 7."""
    student, teacher = torch.zeros(3, 2), torch.tensor([[math.log(3), 0.0]]).expand(3, -1)
    assert kl_loss(student, teacher).item() == pytest.approx(0.130812, abs=1e-6)
    assert kl_loss(student.bfloat16(), teacher).dtype == torch.float32


def test_distances_are_of_kept_patches():
    """Check 8: the mean over kept patches of the whole batch and their features; 0 where none is kept."""
    patches, teacher = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    kept = torch.tensor([[1.0, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    loss = token_loss(patches, teacher, kept)
    torch.testing.assert_close(loss, F.mse_loss(patches[kept.bool()], teacher[kept.bool()]))
    other = torch.where(kept.bool()[..., None], patches, 100.0)
    assert torch.equal(token_loss(other, teacher, kept), loss)
    patches.requires_grad_()
    kept.requires_grad_()
    token_loss(patches, teacher, kept).backward()
    assert kept.grad is None
    patches.grad = None
    nothing = token_loss(patches, teacher, torch.zeros(2, 5))
    nothing.backward()
    assert nothing.item() == 0
    assert (patches.grad == 0).all()


@pytest.fixture
def dense_weights(tmp_path):
    torch.manual_seed(5)
    config = recipes.get("digits").with_settings(SMALL)
    model = create_model(config.model.name, num_classes=4, img_size=32, **config.model.overrides())
    nn.init.normal_(model.head.weight)
    torch.save(model.state_dict(), tmp_path / "dense.pt")
    return tmp_path / "dense.pt"


def test_the_loss_is_the_sum_of_its_parts_and_the_teacher_sees_the_same_images(dense_weights, monkeypatch):
    method = build(f"dynamicvit.teacher={dense_weights}", "dynamicvit.kl_weight=0.25")
    method.teachers["teacher"].load(torch.device("cpu"))
    seen, ask = [], Teacher.__call__
    monkeypatch.setattr(Teacher, "__call__", lambda self, images: (seen.append(images), ask(self, images))[1])
    images, targets = images_of(method), torch.tensor([[0.5, 0.5, 0, 0], [0, 0.1, 0.9, 0]])
    out = method(images, targets, at(0))
    assert seen[0] is images
    assert {"kl", "distill", "ratio", "classification", "kept_1", "kept_2", "kept_3"} < set(out)
    parts = out["classification"] + 2 * out["ratio"] + 0.25 * out["kl"] + 0.5 * out["distill"]
    torch.testing.assert_close(out["loss"], parts)
    assert out["kl"] > 0
    assert out["distill"] > 0
    assert out["kept_1"] >= out["kept_2"] >= out["kept_3"]


def test_weights_of_zero_ask_for_less(dense_weights):
    method = build(f"dynamicvit.teacher={dense_weights}", "dynamicvit.distill_weight=0")
    method.teachers["teacher"].load(torch.device("cpu"))
    out = method(images_of(method), torch.tensor([0, 1]), at(0))
    assert "kl" in out
    assert "distill" not in out


def test_a_teacher_of_another_width_is_refused_where_features_are_compared(tmp_path):
    config = recipes.get("digits").with_settings([*SMALL, "method=dense", "model.embed_dim=48"])
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text(config.to_json(), encoding="utf-8")
    method = build(f"dynamicvit.teacher={tmp_path / 'run'}")
    teacher = method.teachers["teacher"]
    teacher.model = create_model(config.model.name, num_classes=4, img_size=32, **config.model.overrides()).eval()
    with pytest.raises(ValueError, match=r"16 patches of 48 features, and the model 16 of 24; .*distill_weight=0"):
        method(images_of(method), torch.tensor([0, 1]), at(0))


# 4. Costs.


@pytest.mark.parametrize(
    ("rho", "backbone", "predictors"),
    [
        (1.0, 4_598_882_304, 0),
        (0.9, 3_913_635_840, 127_098_240),
        (0.8, 3_348_665_088, 114_388_416),
        (0.7, 2_878_020_096, 102_877_632),
        (0.6, 2_472_868_608, 91_846_464),
        (0.5, 2_146_806_528, 82_254_144),
    ],
)
def test_costs_of_deit_s(rho, backbone, predictors):
    """Check 4: backbone and predictors apart."""
    cost = on_paper().cost(rho)
    assert (cost.backbone, cost.extra) == (backbone, predictors)


@pytest.mark.parametrize(
    ("model", "size", "settings", "backbone", "total"),
    [
        ("deit_small_patch16_224", 384, [], 9.349, 9.652),
        ("deit_small_patch16_224", 384, ["dynamicvit.rho=0.5"], 6.945, 7.187),
        ("deit_base_patch16_224", 224, [], 11.064, 11.476),
        # Section 6: one stage, and two, of the cost of three.
        ("deit_small_patch16_224", 224, ["dynamicvit.places=6", "dynamicvit.rates=0.25"], 2.87, 2.92),
        ("deit_small_patch16_224", 224, ["dynamicvit.places=4,7", "dynamicvit.rates=0.6,0.36"], 2.88, 2.95),
        ("deit_small_patch16_224", 224, ["dynamicvit.places=4,8", "dynamicvit.rho=0.6"], 2.97, 3.04),
    ],
)
def test_costs_of_other_models_and_stages(model, size, settings, backbone, total):
    cost = on_paper(*settings, model=model, size=size).cost()
    digits = len(f"{total}".split(".")[1])
    assert round(cost.backbone / 1e9, digits) == backbone
    assert round(cost.forward / 1e9, digits) == total


def test_parameters_of_deit_s():
    method = on_paper()
    assert sum(part.numel() for part in method.predictors[0].parameters()) == 241_250
    assert sum(part.numel() for part in method.parameters()) == 22_774_414


def test_training_costs_the_whole_model_and_all_predictors_and_the_teacher():
    """Of all patches: nothing is saved in training."""
    dense = "timm:deit_small_patch16_224.fb_in1k"
    method = on_paper(f"dynamicvit.teacher={dense}")
    cost = method.training_cost(method.stage(at(0)))
    assert (cost.backbone, cost.teacher) == (4_598_882_304, 4_598_882_304)
    assert cost.extra == 3 * 196 * (1.625 * 384**2 + 384 / 2)
    assert method.training_tokens(method.stage(at(0))) == (197,) * 12
    assert method.training_tokens(method.stage(at(0)), 112) == (50,) * 12


# 5. What predictors learn from.


@pytest.mark.parametrize("hides", ["multiplied", "added"])
def test_gradients_reach_dropped_patches(hides):
    """Check 5, and that a mask of minus infinity, which is added, would stop them."""
    method = spread_weights(build("model.global_pool=token", "model.rel_pos=none"), 0.2)
    logits = torch.randn(2, 16, 2, requires_grad=True)
    kept = decide(logits.log_softmax(-1), gumbel((2, 16, 2), torch.Generator().manual_seed(0)))
    assert 0 < kept.sum() < 32
    if hides == "multiplied":
        options = {"policy": torch.cat((torch.ones(2, 1), kept), dim=1)}
    else:
        added = torch.where(kept.detach() > 0, kept.clamp(min=0.5).log(), -torch.inf)
        options = {"attn_mask": torch.cat((torch.zeros(2, 1), added), dim=1)[:, None, None, :]}
    model = method.model
    tokens = model.run_blocks(model.embed(images_of(method)), None, 0, 2, **options)
    F.cross_entropy(model.readout(model.norm(tokens)), torch.tensor([0, 1])).backward()
    moved = (logits.grad != 0).all(-1)
    assert torch.equal(moved, kept > 0 if hides == "added" else torch.ones(2, 16, dtype=torch.bool))


def test_predictors_see_the_mean_of_what_is_left():
    """In training as at inference, where the others are gone."""
    torch.manual_seed(0)
    predictor = Predictor(8).double()
    for part in predictor.parameters():
        nn.init.normal_(part)
    patches = torch.randn(2, 6, 8, dtype=torch.float64)
    kept = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 1, 1, 1, 1, 0]], dtype=torch.float64)
    hidden = predictor(patches, kept)[kept.bool()].view(2, 4, 2)
    torch.testing.assert_close(hidden, predictor(patches[kept.bool()].view(2, 4, 8)), atol=1e-12, rtol=0)
    assert not torch.allclose(hidden, predictor(patches)[kept.bool()].view(2, 4, 2))


# 6. What is kept.


def test_what_is_dropped_does_not_come_back():
    """Check 6; the class token is seen throughout."""
    method = build()
    policies = []
    for block in method.model.blocks:
        block.attn.register_forward_pre_hook(
            lambda module, args, options: policies.append(options.get("policy")), with_kwargs=True
        )
    tokens, noise = method.model.embed(images_of(method, 8)), gumbel((8, 3, 16, 2), torch.Generator().manual_seed(0))
    _, kept = method.masked(tokens, noise, method.model.positions(None))
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    assert (kept[:, 2] <= kept[:, 1]).all()
    assert (kept[:, 1] <= kept[:, 0]).all()
    assert policies[0] is None
    for policy, stage in zip(policies[1:], kept.unbind(1), strict=True):
        assert (policy[:, 0] == 1).all()
        assert torch.equal(policy[:, 1:], stage)


@torch.inference_mode()
def test_tensors_get_shorter_at_inference():
    """Check 6."""
    method = build(*DEEP).eval()
    lengths = []
    for block in method.model.blocks:
        block.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    method.predict(images_of(method))
    assert lengths == [197] * 3 + [138] * 3 + [97] * 3 + [68] * 3 == list(method.tokens())
    lengths.clear()
    method.predict(images_of(method), 0.5)
    assert lengths[::3] == [197, 99, 50, 25]


@pytest.mark.parametrize(
    ("size", "rho", "counts"),
    [
        (224, 0.9, (176, 158, 142)),
        (224, 0.6, (117, 70, 42)),
        (384, 0.7, (403, 282, 197)),
        (384, 0.5, (288, 144, 72)),
        (224, 0.01, (1, 1, 1)),
    ],
)
def test_counts_are_shares_of_all_patches(size, rho, counts):
    """Section 5, and pitfall 1: of the patches that there are."""
    assert on_paper(size=size).counts(rho) == counts


def test_rounding_costs_no_patch_unless_as_published():
    """Pitfall 11: 0.7 ** 2 of 100 patches come to less than 49."""
    assert 0.7**2 * 100 < 49
    counts = [build("data.img_size=80", f"dynamicvit.reference={old}").counts(0.7) for old in (False, True)]
    assert counts == [(70, 49, 34), (70, 48, 34)]


def test_the_best_are_kept_by_their_probability_and_the_lower_index_wins_a_tie():
    """Section 2: logits (2, 3) and (1, -1) rank the other way round by probability."""
    method = build("dynamicvit.places=1", "dynamicvit.rates=0.5").eval()
    answers = torch.full((1, 16, 2), 0.0)
    answers[0, 5], answers[0, 9] = torch.tensor([2.0, 3.0]), torch.tensor([1.0, -1.0])
    method.predictors[0].forward = lambda patches, kept=None: answers.log_softmax(-1)
    (kept,) = kept_at_inference(method, images_of(method, 1))[0]
    assert kept.nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 6, 7, 9]


def test_patches_stay_in_their_order():
    """So that of equals the lower index wins at the next stage, too."""
    method = build("dynamicvit.places=1,2", "dynamicvit.rates=0.5,0.25").eval()
    rising = torch.stack((torch.arange(16.0), torch.zeros(16)), dim=-1)[None]
    method.predictors[0].forward = lambda patches, kept=None: rising.log_softmax(-1)
    method.predictors[1].forward = lambda patches, kept=None: torch.zeros(1, 8, 2)
    first, second = kept_at_inference(method, images_of(method, 1))[0]
    assert first.nonzero().flatten().tolist() == [8, 9, 10, 11, 12, 13, 14, 15]
    assert second.nonzero().flatten().tolist() == [8, 9, 10, 11]


def test_places_follow_the_depth():
    assert quarters(12) == (3, 6, 9)
    assert quarters(16) == (4, 8, 12)
    assert quarters(20) == (5, 10, 15)
    assert [quarters(depth) for depth in (1, 2, 3, 4, 6)] == [(0,), (1,), (1, 2), (1, 2, 3), (1, 3, 4)]


def test_points_begin_with_the_trained_one_and_another_moves_all_stages():
    method = build()
    assert method.points() == (0.7, 1.0, 0.9, 0.8, 0.6, 0.5)
    assert method.rates(0.5) == (0.5, 0.25, 0.125)
    given = build("dynamicvit.places=1,2", "dynamicvit.rates=1,0.49")
    assert given.points()[0] == 0.7
    assert given.rates(0.7) == pytest.approx((1, 0.49))
    assert given.rates(0.5) == pytest.approx((1, 0.25))
    assert given.counts(1.0) == (16, 16)
    assert [part.tolist() for part in given.targets] == pytest.approx([1, 0.49])


def test_points_for_a_choice_cost_less_than_larger_ones():
    """A predictor that drops one patch costs more than it saves; so dense is never the slower choice."""
    method = on_paper()
    points = method.fine_points()
    assert list(points) == sorted(points)
    assert points[-1] == 1.0
    costs = [method.cost(point).forward for point in points]
    assert costs == sorted(set(costs))
    assert method.cost(195 / 196).forward > costs[-1]
    assert method.tokens(0.7) in {method.tokens(point) for point in points}


# 9. What is optimized, and when.


def fine_tuning(*settings):
    """The recipe on a small model, with running statistics."""
    small = ["model.depth=4", "model.embed_dim=24", "model.num_heads=3", "data.img_size=64", "dynamicvit.teacher=none"]
    method = build(*small, *settings, recipe="dynamicvit-s")
    method.model.norm_pre = TokenNorm(24)
    return method


def train(method, steps):
    (phase,) = method.phases()
    optimizer, schedule = build_optimizer(method, phase, batch_size=1024, steps_per_epoch=2)
    assert isinstance(optimizer, AdamW)
    images, labels = images_of(method, 4), torch.tensor([0, 1, 2, 3])
    for step in range(steps):
        position = at(step)._replace(total_steps=60, epochs=30)
        method.train()
        method.begin_epoch(position)
        set_rates(optimizer, schedule, step, method.lr_factors(position))
        optimizer.zero_grad()
        method(images, labels, position)["loss"].backward()
        optimizer.step()
    return optimizer


def test_rates_of_four_groups():
    """Check 9: (predictors, backbone) at the beginning, after five epochs, and at the end."""
    method = fine_tuning()
    (phase,) = method.phases()
    optimizer, schedule = build_optimizer(method, phase, batch_size=1024, steps_per_epoch=2)
    assert sorted((group["name"], group["weight_decay"]) for group in optimizer.param_groups) == [
        ("backbone", 0.0), ("backbone", 0.05), ("predictors", 0.0), ("predictors", 0.05),
    ]  # fmt: skip
    for step, predictors, backbone in ((0, 0, 0), (9, 9e-4, 0), (10, 1e-3, 1e-5), (60, 1e-6, 1e-8)):
        set_rates(optimizer, schedule, step, method.lr_factors(at(step)._replace(epochs=30)))
        found = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert found == pytest.approx({"predictors": predictors, "backbone": backbone}), step
    grouped = {id(part) for group in optimizer.param_groups for part in group["params"]}
    assert not {id(method.model.pos_embed), id(method.model.cls_token)} & grouped


def test_the_backbone_is_frozen_to_the_bit_and_learns_then():
    """Check 9: parameters and buffers, in the first five epochs; predictors learn from the second step on."""
    method = fine_tuning()
    before = {name: value.clone() for name, value in method.state_dict().items() if isinstance(value, torch.Tensor)}
    train(method, 10)
    for name, value in before.items():
        moved = not torch.equal(value, method.state_dict()[name])
        assert moved == name.startswith("predictors"), name
    train(method, 12)
    moved = {name for name, value in before.items() if not torch.equal(value, method.state_dict()[name])}
    assert {"model.blocks.0.attn.qkv.weight", "model.norm_pre.norm.running_mean", "model.head.weight"} <= moved
    assert not {"model.cls_token", "model.pos_embed"} & moved


def test_statistics_drift_in_the_published_code():
    """Check 9, the control."""
    method = fine_tuning("dynamicvit.reference=true")
    before = {name: value.clone() for name, value in method.model.named_buffers()}
    train(method, 2)
    moved = {name for name, value in method.model.named_buffers() if not torch.equal(value, before[name])}
    assert moved == {f"norm_pre.norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}


def test_falling_rates_of_layers_leave_the_groups_apart():
    """Pitfall 7."""
    method = fine_tuning("optim.layer_decay=0.5")
    (phase,) = method.phases()
    groups = method.param_groups(phase)
    own = {id(part) for part in method.predictors.parameters()}
    assert {group["name"] for group in groups} == {"predictors", "backbone"}
    assert all((id(part) in own) == (group["name"] == "predictors") for group in groups for part in group["params"])


def test_a_backbone_without_weights_learns_from_the_beginning():
    """At the full rate, class token and position embedding too: it has everything to learn."""
    method = build()
    assert method.lr_factors(at(0)) == {"backbone": 1.0}
    assert method.model.pos_embed.requires_grad
    assert build("dynamicvit.backbone_lr=0.1").lr_factors(at(0)) == {"backbone": 0.1}
    own = build("dynamicvit.frozen_epochs=1", "dynamicvit.backbone_lr=0.1")
    assert [own.lr_factors(at(step))["backbone"] for step in (0, 1, 2)] == [0.0, 0.0, 0.1]


def test_short_runs_are_frozen_for_half_of_them_at_most_and_say_so():
    method = build("model.weights=dense.pt")
    assert [method.lr_factors(at(step))["backbone"] for step in (0, 3, 4, 7)] == [0.0, 0.0, 0.01, 0.01]
    assert method.course() == (
        "ρ: 0.7 at inference, where 11, 7 and 5 of 16 patches go on into blocks 1, 2 and 3; all patches in training, "
        "the backbone frozen in the first 2 of 4 epochs"
    )
    assert "frozen in the first 5 of 30 epochs" in fine_tuning().course()


# 10. Chance.


def test_draws_are_as_likely_as_the_predictor_says():
    """Check 10: the Gumbel-max property."""
    logits = torch.tensor([[0.0, 0.0], [1.0, -0.5], [-2.0, 0.3]])
    noise = gumbel((200_000, 3, 2), torch.Generator().manual_seed(0))
    drawn = decide(logits.log_softmax(-1).expand(200_000, -1, -1), noise)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(drawn.mean(0), logits.softmax(-1)[:, KEEP], atol=0.01, rtol=0)


def test_draws_are_a_function_of_seed_step_and_rank_and_inference_draws_nothing():
    """Check 10."""
    method = spread_weights(build(), 0.2)
    images, labels = images_of(method), torch.tensor([0, 1])

    def loss(*where):
        return method(images, labels, at(*where))["loss"].item()

    assert loss(3) == loss(3)
    assert len({loss(3), loss(4), loss(3, 1), loss(3, 0, 1)}) == 4
    assert torch.equal(method.predict(images), method.predict(images))


# What the published code does otherwise.


def test_the_largest_logit_is_of_visible_keys():
    """Pitfall 3: a hidden key beats all others by far, and nothing is left of them in the published code."""
    logits, policy = torch.zeros(1, 1, 3, 3), torch.tensor([[1.0, 1.0, 0.0]])
    logits[0, 0, 0, 2] = 200.0
    logits.requires_grad_()
    ours = policy_softmax(logits, policy.requires_grad_(), 1e-6)
    torch.testing.assert_close(ours[0, 0, 0], torch.tensor([0.5, 0.5, 0.0]), atol=1e-5, rtol=0)
    ours.square().sum().backward()
    assert logits.grad.isfinite().all()
    assert policy.grad.isfinite().all()
    published = policy_softmax(logits, policy, 1e-6, reference=True)
    torch.testing.assert_close(published[0, 0, 0], torch.full((3,), 1 / 3))
    torch.testing.assert_close(published[0, 0, 1], ours[0, 0, 1])


def test_a_hidden_key_pulls_no_harder_at_its_gate_than_the_largest_one_that_is_seen():
    """The published derivative grows with the exponential of the key's lead, up to a millionfold."""
    logits, pulls = torch.tensor([0.0, 0.0, 10.0]).expand(1, 1, 3, 3), []
    for reference in (False, True):
        policy = torch.tensor([[1.0, 1.0, 0.0]]).requires_grad_()
        policy_softmax(logits, policy, 1e-6, reference=reference)[0, 0, 0, 2].backward()
        pulls.append(policy.grad[0, 2].item())
    assert pulls == pytest.approx([1 / 2, math.exp(10) / 2], rel=0.05)


def test_tokens_see_themselves_and_eps_is_shared_by_all():
    logits = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    weights = policy_softmax(logits, torch.zeros(2, 4, dtype=torch.float64), 0.0)
    assert torch.equal(weights, torch.eye(4, dtype=torch.float64).expand(2, 3, 4, 4))
    policy = torch.tensor([[1.0, 1.0, 0.0, 1.0]], dtype=torch.float64).expand(2, -1)
    weights = policy_softmax(logits, policy, 1e-3)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 4, dtype=torch.float64))
    assert (weights[:, :, [0, 1, 3], 2] > 0).all()
    assert policy_softmax(logits.bfloat16(), policy.float(), 1e-6).dtype == torch.float32


def test_without_a_patch_the_mean_is_zero_and_not_undefined():
    """Pitfall 2."""
    patches, nothing = torch.randn(1, 4, 8), torch.zeros(1, 4)
    assert Predictor(8)(patches, nothing).isfinite().all()
    assert Predictor(8, reference=True)(patches, nothing).isnan().all()


def test_an_image_keeps_one_patch_as_it_does_at_inference():
    """The likeliest of those that were there; all may go in the published code."""
    likely = torch.tensor([[0.1, 0.9, 0.5], [0.2, 0.1, 0.3]]).log()[..., None].expand(-1, -1, 2)
    before, kept = torch.tensor([[1.0, 0, 1], [1, 1, 1]]), torch.tensor([[0.0, 0, 0], [1, 0, 0]])
    assert with_likeliest(kept, before, likely).tolist() == [[0, 0, 1], [1, 0, 0]]
    nothing = torch.zeros(2, 3, 16, dtype=torch.bool)
    for reference in (False, True):
        method = build(f"dynamicvit.reference={reference}")
        tokens, kept = method.masked(
            method.model.embed(images_of(method)), forcing(nothing), method.model.positions(None)
        )
        assert (kept[:, 0].sum(-1) == (0 if reference else 1)).all()
        assert kept.isfinite().all() == (not reference)  # the next predictor's mean is 0 / 0
        method.masked_answers(tokens, kept[:, -1])[0].square().sum().backward()
        found = [part.grad.isfinite().all() for part in method.parameters() if part.grad is not None]
        assert all(found) == (not reference)


def test_attention_weights_are_dropped_but_in_the_published_code():
    """Pitfall 8."""
    for reference in (False, True):
        method = build(f"dynamicvit.reference={reference}")
        attention = method.model.blocks[0].attn
        attention.attn_drop.p = 0.5
        tokens, policy, positions = torch.randn(1, 17, 24), torch.ones(1, 17), method.model.positions(None)
        same = torch.equal(attention(tokens, positions, policy=policy), attention(tokens, positions, policy=policy))
        assert same == reference


def test_eps_is_there_before_anything_is_dropped_in_the_published_code():
    """There every block has the masked softmax; here those before the first place have their fast attention."""
    for reference in (False, True):
        method = build(f"dynamicvit.reference={reference}")
        given = []
        method.model.blocks[0].attn.register_forward_pre_hook(
            lambda module, args, options, given=given: given.append(options["policy"]), with_kwargs=True
        )
        method(images_of(method), torch.tensor([0, 1]), at(0))
        assert (given[0] is not None) == reference


# Settings.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["dynamicvit.places=3,2"], "dynamicvit.places is 3,2; name blocks in ascending order"),
        (["dynamicvit.places="], "dynamicvit.places is empty"),
        (["dynamicvit.rates=0.5,0.7"], "dynamicvit.rates is 0.5,0.7; .* none larger than the one before it"),
        (["dynamicvit.rates=1,1"], "dynamicvit.rates keeps every patch"),
        (["dynamicvit.places=1,2", "dynamicvit.rates=0.5"], "places names 2 blocks and dynamicvit.rates 1 shares"),
        (["dynamicvit.rates=0.5"], "dynamicvit.rates names 1 shares, and a model of 4 blocks drops patches at 3"),
        (["dynamicvit.places=4"], "names block 4, and the model's blocks are 0 to 3"),
        (["dynamicvit.frozen_epochs=5"], "dynamicvit.frozen_epochs is 5; it must lie between 0 and the run's 4"),
        (["dynamicvit.rho=1"], "dynamicvit.rho"),
        (
            ["dynamicvit.teacher=x", "dynamicvit.kl_weight=0", "dynamicvit.distill_weight=0"],
            "dynamicvit.teacher is set and nothing is learnt from it",
        ),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        build(*settings)


def test_a_file_has_no_free_number_of_patches():
    with pytest.raises(ValueError, match="no free number of patches; export one operating point"):
        build().export_dynamic()


def test_recipes_are_the_published_settings():
    small, base = recipes.get("dynamicvit-s"), recipes.get("dynamicvit-b")
    assert small.optim.peak_lr(1024) == 1e-3
    assert (small.train.epochs, small.data.repeats, small.data.crop_pct) == (30, 1, 0.875)
    assert [one.own[0].ratio_weight for one in (small, base)] == [2.0, 5.0]
    assert [one.model.drop_path_rate for one in (small, base)] == [0.0, 0.2]
    for one in (small, base):
        assert one.own[0].teacher == one.model.weights
        assert timm.is_model_pretrained(one.model.weights.removeprefix("timm:"))


# A run.


def test_a_run_is_taught_logged_and_opened(tmp_path, dense_weights):
    """From the weights of its teacher, at smaller images first, with images mixed; every loss is in the log by name."""
    settings = [
        f"model.weights={dense_weights}", f"dynamicvit.teacher={dense_weights}", "loss.mixup=0.8",
        "train.ema_decay=0.9", "train.batch_size=8", "train.log_every_steps=1", "data.progressive.start_size=16",
        "data.progressive.end_epoch=2", "data.progressive.multiple=16",
    ]  # fmt: skip
    config = recipes.get("digits").with_settings([*SMALL, *settings])
    output = tmp_path / "run"
    output.mkdir()
    (output / "config.json").write_text(config.to_json(), encoding="utf-8")
    loaders = MemoryLoader(40, size=config.data.train_size), MemoryLoader(40, train=False)
    world = World(rank=0, size=1, device=torch.device("cpu"))
    Trainer(config, *loaders, classes=list("abcd"), output=output, world=world).fit()
    for row in read_rows(output, "step"):
        assert {"classification", "ratio", "kl", "distill", "kept_1", "kept_2", "kept_3"} <= set(row)
    found = load_run(output, world.device).method
    assert found.predict(images_of(found)).shape == (2, 4)
