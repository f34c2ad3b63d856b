"""What the plain and the sampled method do beside the contract, and the learning rates of all."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from pss import methods, recipes
from pss.config import ScheduleConfig
from pss.methods import Progress
from pss.methods.sampled import build_schedule
from pss.training.optim import build_optimizer, peak_lr, set_rates


def tiny(**changes):
    config = recipes.get("digits").with_settings(["model.embed_dim=24", "model.depth=2", "train.epochs=4"])
    return replace(config, **changes)


def at(step, total=40):
    return Progress(step=step, total_steps=total, epoch=step // 10, epochs=4, seed=0, rank=0)


@pytest.mark.parametrize("name", ["dense", "sampled"])
def test_predict_obeys_rho_in_evaluation(name):
    method = methods.build(tiny().with_method(name), num_classes=10, steps_per_epoch=10).eval()
    images = torch.randn(2, 3, 32, 32)
    for parameter in method.model.head.parameters():
        torch.nn.init.normal_(parameter)
    assert not torch.equal(method.predict(images, 1.0), method.predict(images, 0.4))
    assert method.tokens(0.6) == (10, 10)  # of 17
    assert method.cost(0.4).forward < method.cost(1.0).forward


def test_no_decay_on_vectors_class_token_and_position_embedding():
    method = methods.build(tiny(), num_classes=10, steps_per_epoch=10)
    (phase,) = method.phases()
    undecayed = {id(p) for group in method.param_groups(phase) if group["weight_decay"] == 0 for p in group["params"]}
    named = {name for name, p in method.named_parameters() if id(p) in undecayed}
    assert {"model.pos_embed", "model.cls_token", "model.head.bias"} <= named
    assert not any("relative_position_bias_table" in name or name.endswith("qkv.weight") for name in named)


@pytest.mark.parametrize("rel_pos", ["bias", "separable"])
def test_tables_of_positions_are_decayed_unless_told_otherwise(rel_pos):
    config = tiny().with_settings([f"model.rel_pos={rel_pos}", "optim.decay_rel_pos=false"])
    method = methods.build(config, num_classes=10, steps_per_epoch=10)
    (phase,) = method.phases()
    undecayed = {id(p) for group in method.param_groups(phase) if group["weight_decay"] == 0 for p in group["params"]}
    named = {name for name, p in method.named_parameters() if id(p) in undecayed}
    assert sum("relative_position_bias_table" in name for name in named) == 2
    assert not any(name.endswith("qkv.weight") for name in named)


def test_layers_learn_more_slowly_towards_the_input():
    """BEiT's rule: the head at the full rate, each block at `layer_decay` of the one after it, the stem last."""
    method = methods.build(tiny().with_settings(["optim.layer_decay=0.5"]), num_classes=10, steps_per_epoch=10)
    (phase,) = method.phases()
    groups = method.param_groups(phase)
    scale = {id(p): group.get("lr_scale", 1.0) for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    named = {name.removeprefix("model."): (scale[id(p)], decay[id(p)]) for name, p in method.named_parameters()}
    for name, expected in {
        "head.weight": (1.0, 0.05),
        "head.bias": (1.0, 0.0),
        "blocks.1.attn.qkv.weight": (0.5, 0.05),
        "blocks.1.attn.relative_position_bias_table": (0.5, 0.05),
        "blocks.0.mlp.fc1.bias": (0.25, 0.0),
        "patch_embed.proj.weight": (0.125, 0.05),
        "pos_embed": (0.125, 0.0),
        "cls_token": (0.125, 0.0),
    }.items():
        assert named[name] == expected, name


def test_layers_begin_and_end_at_the_same_rate():
    """The published runs scale the peak alone: warm-up and minimum are one number for all groups."""
    config = tiny().with_settings(["optim.layer_decay=0.5", "optim.warmup_epochs=1", "optim.min_lr=1e-4"])
    method = methods.build(config, num_classes=10, steps_per_epoch=10)
    (phase,) = method.phases()
    optimizer, schedule = build_optimizer(method, phase, batch_size=256, steps_per_epoch=10)
    low, first, peak = config.optim.min_lr, config.optim.warmup_lr, peak_lr(config.optim, 256)
    scales = [group.get("lr_scale", 1.0) for group in method.param_groups(phase)]
    assert set(scales) == {1.0, 0.5, 0.25, 0.125}
    for step in (0, 4, 10, 25, 39):
        set_rates(optimizer, schedule, step, {})
        for group, scale in zip(optimizer.param_groups, scales, strict=True):
            top = scale * peak
            warm = first + step * (top - first) / 10
            late = low + (top - low) * (1 + math.cos(math.pi * step / 40)) / 2
            assert group["lr"] == pytest.approx(warm if step < 10 else late), (step, scale)


def test_rates_stay_at_their_minimum_in_the_cooldown():
    config = tiny().with_settings(["optim.cooldown_epochs=1", "optim.warmup_epochs=0"])
    method = methods.build(config, num_classes=10, steps_per_epoch=10)
    (phase,) = method.phases()
    optimizer, schedule = build_optimizer(method, phase, batch_size=32, steps_per_epoch=10)
    rates = []
    for step in range(40):
        set_rates(optimizer, schedule, step, {})
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[30:] == [config.optim.min_lr] * 10
    assert all(before > after for before, after in itertools.pairwise(rates[:31]))


def test_rates_of_named_groups_are_scaled_and_other_names_refused():
    method = methods.build(tiny(), num_classes=10, steps_per_epoch=10)
    (phase,) = method.phases()
    plain = method.param_groups(phase)
    method.param_groups = lambda phase: [group | {"name": str(number)} for number, group in enumerate(plain)]
    optimizer, schedule = build_optimizer(method, phase, batch_size=32, steps_per_epoch=10)
    set_rates(optimizer, schedule, 35, {})
    (rate,) = {group["lr"] for group in optimizer.param_groups}
    set_rates(optimizer, schedule, 35, {"1": 0.0})
    assert [group["lr"] for group in optimizer.param_groups] == [rate, 0.0]
    with pytest.raises(ValueError, match="sets rates of stem"):
        set_rates(optimizer, schedule, 35, {"stem": 1.0})


def test_sampled_follows_its_schedule_and_dense_has_none():
    sampled = methods.build(tiny(), num_classes=10, steps_per_epoch=10)
    assert [sampled.stage(at(step)).rho for step in range(10)] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4]
    dense = methods.build(tiny().with_method("dense"), num_classes=10, steps_per_epoch=10)
    assert {dense.stage(at(step)).rho for step in range(10)} == {1.0}


def test_random_sampling_is_a_function_of_seed_step_and_rank():
    config = tiny()
    config = replace(config, model=replace(config.model, sort="random")).having(ScheduleConfig(name="fixed", rho=0.4))
    torch.manual_seed(0)
    method = methods.build(config, num_classes=10, steps_per_epoch=10)
    torch.nn.init.normal_(method.model.head.weight)
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])

    def logits(step, rank=0):
        return method(images, labels, at(step)._replace(rank=rank))["logits"]

    assert torch.equal(logits(3), logits(3))
    assert not torch.equal(logits(3), logits(4))
    assert not torch.equal(logits(3), logits(3, rank=1))


@pytest.mark.parametrize("name", ["linear", "cosine", "cyclic"])
def test_every_form_can_be_configured(name):
    """Cycles do not depend on the length of the run, and have no form that a cooldown cuts off."""
    config = tiny()
    published = build_schedule(config, ScheduleConfig(name=name), 90)
    symmetric = build_schedule(config, ScheduleConfig(name=name, form="symmetric"), 90)
    assert published.form == "published"
    assert symmetric.form == "symmetric"
    cooled = build_schedule(config, ScheduleConfig(name=name, cooldown_epochs=1), 90)
    if name == "cyclic":
        cut = cooled
        with pytest.raises(ValueError, match=r"schedule.form is 'cut', .*name=linear or cosine would read it"):
            ScheduleConfig(name=name, form="cut")
    else:
        cut = build_schedule(config, ScheduleConfig(name=name, form="cut", cooldown_epochs=1), 90)
    assert {cooled(step) for step in range(270, 360)} == {cut(step) for step in range(270, 360)} == {1.0}
    assert [cut(step) for step in range(270)] == [published(step) for step in range(270)]
    assert (cooled == cut) == (name == "cyclic")


def test_cycle_length_is_a_knob():
    schedule = build_schedule(tiny(), ScheduleConfig(period_steps=9), 90)
    assert [schedule(step) for step in range(9)] == [schedule(step + 9) for step in range(9)]
    assert {schedule(step) for step in range(9)} == {0.2, 0.4, 0.6, 0.8, 1.0}


def test_learning_rate_warms_up_scales_and_ends():
    config = recipes.get("deit-s-224")
    assert peak_lr(config.optim, 1024) == pytest.approx(1e-3)
    method = methods.build(tiny(optim=config.optim, train=replace(config.train, epochs=20)), 10, steps_per_epoch=10)
    (phase,) = method.phases()
    optimizer, schedule = build_optimizer(method, phase, batch_size=1024, steps_per_epoch=10)
    rates = []
    for step in range(200):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(1e-6)
    assert rates[25] == pytest.approx((1e-6 + 1e-3) / 2, rel=0.01)
    assert max(rates) == pytest.approx(1e-3, rel=0.15)
    assert rates[-1] == pytest.approx(1e-5, rel=0.01)


def test_unknown_method_is_named():
    with pytest.raises(ValueError, match=r"use one of .*dense, .*sampled"):
        tiny().with_method("sparse")
