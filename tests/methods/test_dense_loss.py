"""MixToken, the loss of patches, and methods on a backbone that classifies them (the numbers are LV-ViT's checks')."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch
from memory_loader import MemoryLoader
from torch import nn

from pipelines.base import View
from pss import methods, recipes
from pss.inference.opening import load_run
from pss.methods import DenseTargets, Progress, Stage
from pss.methods.parts.dense_loss import labels_of, with_truth
from pss.methods.parts.mix_token import draw_boxes, exchanged, own_share
from pss.methods.parts.policy import patch_loss
from pss.methods.parts.token_labels import soft_labels
from pss.models.flops import macs
from pss.models.lvvit import LVViT
from pss.runs import checkpoint
from pss.runs.log import read_rows
from pss.runtime.processes import World
from pss.training.optim import build_optimizer, set_rates
from pss.training.setup import Interrupted
from pss.training.trainer import Trainer

HERE = World(rank=0, size=1, device=torch.device("cpu"))
SMALL = [
    "model.name=lvvit_s", "model.global_pool=token", "model.rel_pos=none", "model.embed_dim=24", "model.depth=4",
    "train.epochs=4", "train.batch_size=8", "optim.warmup_epochs=1", "data.prefetch_gb=0",
]  # fmt: skip


def build(*settings, classes=4):
    torch.manual_seed(0)
    method = methods.build(recipes.get("digits").with_settings([*SMALL, *settings]), classes, steps_per_epoch=5)
    for name, parameter in method.named_parameters():
        if "head" in name:
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return method


def at(step, seed=0, rank=0):
    return Progress(step=step, total_steps=20, epoch=step // 5, epochs=4, seed=seed, rank=rank)


def images_of(method, count=4):
    return torch.randn(count, 3, *method.model.image_size, generator=torch.Generator().manual_seed(1))


def box_of(rows, columns, grid=(14, 14)):
    inside = torch.zeros(grid, dtype=torch.bool)
    inside[slice(*rows), slice(*columns)] = True
    return inside.flatten()


# 5, 6. MixToken.


def test_an_image_keeps_what_is_outside_of_the_box():
    """Check 5: (2, 3) to (6, 9) of 14 x 14."""
    box = box_of((2, 6), (3, 9))
    assert own_share(box).item() == pytest.approx(0.877551, abs=1e-6)
    patches = torch.arange(3 * 196.0).view(3, 196, 1)
    mixed = exchanged(patches, box)
    assert torch.equal(mixed[0, box], patches[2, box])
    assert torch.equal(mixed[0, ~box], patches[0, ~box])
    assert torch.equal(mixed[1], patches[1])  # the middle image of an odd batch is its own partner
    assert torch.equal(exchanged(mixed, box), patches)


def test_logits_go_back_to_the_images_that_they_are_of():
    """Check 5: no blocks, a classifier that is the identity."""
    patches, box = torch.randn(4, 196, 8), box_of((2, 6), (3, 9))
    logits = nn.Identity()(exchanged(patches, box))
    assert not torch.equal(logits, patches)
    assert torch.equal(exchanged(logits, box), patches)


def test_an_empty_box_and_a_batch_of_one_change_nothing():
    """Check 5."""
    patches, nothing = torch.randn(4, 196, 8), torch.zeros(196, dtype=torch.bool)
    assert torch.equal(exchanged(patches, nothing), patches)
    assert own_share(nothing) == 1
    assert torch.equal(exchanged(patches[:1], box_of((2, 6), (3, 9))), patches[:1])


def test_boxes_are_as_large_as_published():
    """Check 6: 200,000 draws."""
    shares = draw_boxes(200_000, (14, 14), torch.Generator().manual_seed(0)).float().mean(1)
    assert shares.mean().item() == pytest.approx(0.271, abs=0.002)
    assert (shares == 0).float().mean().item() == pytest.approx(0.0204, abs=0.001)


def test_boxes_are_rectangles_of_any_grid():
    boxes = draw_boxes(200, (4, 7), torch.Generator().manual_seed(0)).view(200, 4, 7)
    for box in boxes:
        rows, columns = box.any(1), box.any(0)
        assert torch.equal(box, rows[:, None] & columns[None])
    sizes = {(int(box.any(1).sum()), int(box.any(0).sum())) for box in boxes}
    assert {(0, 0), (1, 2), (2, 4), (2, 6)} <= sizes  # some are cut off


def test_the_box_is_a_function_of_seed_step_and_rank():
    """Check 6."""
    method = build("method=dense", "data.img_size=64")
    found = {where: method.enter(images_of(method), at(*where)).box for where in ((3,), (4,), (3, 1), (3, 0, 1))}
    torch.rand(7)
    assert torch.equal(method.enter(images_of(method), at(3)).box, found[(3,)])
    assert len({tuple(box.tolist()) for box in found.values()}) == 4


def test_tokens_are_mixed_behind_the_stem_and_before_positions():
    method = build("method=dense")
    model, images = method.model.eval(), images_of(method)
    step = next(step for step in range(20) if method.enter(images, at(step)).box.any())
    entered = method.enter(images, at(step))
    plain = model.embed_patches(images)
    assert torch.equal(entered.tokens, model.place(exchanged(plain, entered.box)))
    assert not torch.equal(entered.tokens, model.embed(images))


# 10. The loss.


def flat(method, classes):
    """A model that says nothing of any class."""
    for head in (method.model.head, method.model.aux_head):
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    return method


def test_a_model_that_says_nothing_has_the_loss_of_two_uniform_answers():
    """Check 10: twice ln 1000, and with label maps, whose sums are 1.0001, that much more."""
    method = flat(build("method=dense", classes=1000), 1000)
    images, labels = images_of(method), torch.arange(4)
    assert method(images, labels, at(0))["loss"].item() == pytest.approx(13.8155, abs=1e-4)
    maps = torch.zeros(4, 2, 5, 6, 6, dtype=torch.int16)
    maps[:, 1] = torch.arange(5, dtype=torch.int16)[:, None, None]
    view = View(torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(4, -1), torch.zeros(4, dtype=torch.bool))
    labelled = flat(build("method=dense", "data.label_maps=maps.npy", classes=1000), 1000)
    assert labelled(images, labels, at(0), DenseTargets(view, maps))["loss"].item() == pytest.approx(13.8169, abs=1e-4)


def test_the_true_class_has_half_where_the_teacher_agrees_and_a_tenth_where_not():
    """Check 10."""
    teacher = torch.tensor([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1]])
    found = with_truth(teacher, torch.tensor([0, 1]), 0.0)
    torch.testing.assert_close(found, torch.tensor([[0.85, 0.1, 0.05], [0.63, 0.28, 0.09]]))
    smooth = with_truth(teacher, torch.tensor([0, 1]), 0.3)
    torch.testing.assert_close(smooth[0], 0.5 * teacher[0] + 0.5 * torch.tensor([0.8, 0.1, 0.1]))
    torch.testing.assert_close(with_truth(teacher, torch.eye(3)[:2], 0.0), found)


def test_weights_are_of_the_two_losses():
    method, images, labels = build("method=dense"), None, torch.arange(4)
    images = images_of(method)
    out = method(images, labels, at(3))
    torch.testing.assert_close(out["loss"], out["classification"] + out["patches"])
    weighed = build("method=dense", "tokens.class_weight=2", "tokens.patch_weight=0.5")(images, labels, at(3))
    torch.testing.assert_close(weighed["loss"], 2 * out["classification"] + 0.5 * out["patches"])


def labelled(name, *settings, count=6):
    """A method with label maps of random labels, and what it is given of them."""
    method = build(f"method={name}", "data.label_maps=maps.npy", *settings)
    generator = torch.Generator().manual_seed(2)
    maps = torch.empty(count, 2, 3, 6, 6, dtype=torch.int16)
    maps[:, 0] = (3 * torch.randn(count, 3, 6, 6, generator=generator)).half().view(torch.int16)
    maps[:, 1] = torch.arange(3, dtype=torch.int16)[:, None, None]
    crop = torch.tensor([[0.1, 0.2, 0.6, 0.5]]).expand(count, -1)
    return method, DenseTargets(View(crop, torch.arange(count) % 2 == 0), maps)


@pytest.mark.parametrize("settings", [[], ["tokens.ground_truth=true", "tokens.label_floor=-2"]])
@pytest.mark.parametrize("name", ["dense", "sampled", "toe"])
def test_losses_are_those_of_the_published_order(name, settings):
    """Written out: logits are brought back to the layout that is not mixed, and held against labels that never were."""
    method, dense = labelled(name, *settings)
    images, truth, model = images_of(method, 6), torch.arange(6) % 4, method.model.train()
    step = next(step for step in range(8, 20) if method.enter(images, at(step)).box.any())
    rho = method.stage(at(step)).rho
    entered = method.enter(images, at(step), rho)
    torch.manual_seed(0)
    out = method(images, truth, at(step), dense)
    patches, image = soft_labels(
        dense.maps, dense.view, grid=(4, 4), num_classes=4, smoothing=0.1, floor=-2.0 if settings else 0.0
    )
    if settings:
        image = with_truth(image, truth, 0.1)
    tokens = entered.tokens
    if name == "toe":
        tokens = method._trunk(tokens, method.stage_number(at(step)), entered.places)
    else:
        tokens = model.trunk(tokens, entered.places)
    logits, of_patches = model.answers(tokens)
    own = own_share(entered.box)
    target = own * image + (1 - own) * image.flip(0)
    of_image = -(target * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(out["classification"], of_image)
    # Where a patch was not seen, no label counts.
    canvas, seen = torch.zeros(6, 16, 4), torch.zeros(6, 16, dtype=torch.bool)
    where = torch.arange(16).expand(6, -1) if entered.kept is None else entered.kept
    canvas.scatter_(1, where[..., None].expand(-1, -1, 4), of_patches.detach())
    seen.scatter_(1, where, True)
    back, seen = exchanged(canvas, entered.box), exchanged(seen, entered.box)
    each = -(patches * back.log_softmax(2)).sum(2)
    torch.testing.assert_close(out["patches"], each[seen].mean())
    assert (where.shape[1] < 16) == (name == "sampled" and rho < 1)


def test_labels_are_picked_as_patches_are():
    kept = torch.tensor([[0, 2], [1, 3]])
    assert labels_of(kept, torch.arange(8).view(2, 4)).tolist() == [[0, 2], [5, 7]]
    assert labels_of(kept, torch.arange(16).view(2, 4, 2)).tolist() == [[[0, 1], [4, 5]], [[10, 11], [14, 15]]]


def test_without_weight_patches_neither_learn_nor_count():
    method = build("method=dense", "tokens.patch_weight=0")
    assert isinstance(method.model, LVViT)
    images, labels = images_of(method), torch.arange(4)
    out = method(images, labels, at(3))
    assert set(out) == {"loss", "logits"}
    assert not method.mixing
    out["loss"].backward()
    assert {name for name, part in method.named_parameters() if part.grad is None} == {
        "model.aux_head.weight", "model.aux_head.bias",
    }  # fmt: skip
    grouped = {id(part) for group in method.param_groups(method.phases()[0]) for part in group["params"]}
    assert id(method.model.aux_head.weight) not in grouped
    before = method.predict(images)
    nn.init.normal_(method.model.aux_head.weight)
    method.eval()
    assert torch.equal(method.predict(images), method.eval().predict(images))
    assert before.shape == (4, 4)
    assert macs(method.model) < macs(build("method=dense").model)


# 12. Methods on top.


def test_all_patches_are_the_plain_model_to_the_bit():
    """Check 12: with and without a schedule."""
    found = []
    for name, extra in (("dense", []), ("sampled", ["schedule.name=fixed", "schedule.rho=1"]), ("toe", [])):
        method = build(f"method={name}", *extra)
        images, labels = images_of(method), torch.arange(4)
        out = method(images, labels, at(19))
        found.append((out["loss"], method.eval().predict(images, 1.0), method.model(images)))
    for loss, prediction, plain in found:
        assert torch.equal(loss, found[0][0])
        assert torch.equal(prediction, found[0][1])
        assert torch.equal(prediction, plain)


def test_a_sampled_step_learns_of_the_patches_that_it_sees():
    """Check 12: the maximum of a prediction is over them, too."""
    method = build("method=sampled", "schedule.name=fixed", "schedule.rho=0.5")
    seen = []
    method.model.aux_head.register_forward_hook(lambda module, given, made: seen.append(made.shape[1]))
    method(images_of(method), torch.arange(4), at(3))
    method.predict(images_of(method), 0.5)
    assert seen == [7, 7]  # round(0.5 * 17) less the class token


def test_merged_patches_are_classified_by_the_bias_alone():
    """Check 12."""
    method = build("method=toe", "toe.starts=0,2,3")
    model, entered = method.model, method.enter(images_of(method), at(0))
    assert method.counts(1, 16) == (4, 8)
    tokens = method._trunk(entered.tokens, 1, entered.places)
    assert tokens.shape == (4, 17, 24)
    logits = model.answers(tokens)[1]
    merged = (logits == model.aux_head.bias).all(2)
    assert merged.sum(1).tolist() == [8] * 4
    assert torch.equal(merged, (tokens[:, 1:] == 0).all(2))
    _, places, chosen = method.expand(model.run_blocks(entered.tokens, None, stop=1), None, 1)
    assert places is chosen
    assert not merged.gather(1, chosen).any()


def test_merged_patches_of_a_schedule_are_those_that_entered():
    method = build("method=toe", "toe.starts=0,2,3", "schedule.name=fixed", "schedule.rho=0.7")
    out = method(images_of(method), torch.arange(4), at(0))
    assert out["loss"].isfinite()
    entered = method.enter(images_of(method), at(0), 0.7)
    assert entered.kept.shape == (4, 11)
    assert method._trunk(entered.tokens, 1, entered.places).shape == (4, 12, 24)


@pytest.mark.parametrize(
    ("name", "first", "second"), [("lvvit_t", 0.679, 0.833), ("lvvit_s", 0.544, 0.766), ("lvvit_m", 0.486, 0.738)]
)
def test_what_stages_of_token_expansion_cost(name, first, second):
    settings = [f"model.name={name}", "method=toe", "toe.rate=0.4"]
    with torch.device("meta"):
        method = methods.build(recipes.get("lvvit-s").with_settings(settings), 1000, 5)
    dense = macs(method.model)
    shares = [method.training_cost(Stage(1.0, stage)).backbone / dense for stage in ("stage 1", "stage 2", "")]
    assert shares == pytest.approx([first, second, 1.0], abs=5e-4)


@pytest.mark.parametrize(
    ("name", "places", "costs"),
    [
        (
            "lvvit_s", (4, 8, 12),
            {0.9: (5.75, 5.88), 0.8: (5.09, 5.21), 0.7: (4.55, 4.65), 0.6: (4.08, 4.17), 0.5: (3.71, 3.79)},
        ),
        (
            "lvvit_m", (5, 10, 15),
            {0.9: (10.98, 11.21), 0.8: (9.58, 9.78), 0.7: (8.41, 8.59), 0.6: (7.40, 7.57), 0.5: (6.59, 6.74)},
        ),
    ],
)  # fmt: skip
def test_what_dynamicvit_costs(name, places, costs):
    settings = [
        f"model.name={name}",
        "method=dynamicvit",
        f"model.weights={name}.pth",
        "dynamicvit.teacher=timm:lvvit_s",
    ]
    with torch.device("meta"):
        method = methods.build(recipes.get("lvvit-s").with_settings(settings), 1000, 5)
    assert method.places == places
    for point, (backbone, whole) in costs.items():
        cost = method.cost(point)
        assert (round(cost.backbone / 1e9, 2), round(cost.forward / 1e9, 2)) == (backbone, whole)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Weights of a model that has learnt a little, in a file."""
    method, path = build("method=dense"), tmp_path_factory.mktemp("trained") / "dense.pt"
    torch.save(method.model.state_dict(), path)
    return path


def taught(trained, *settings):
    fine_tuned = [f"model.weights={trained}", f"dynamicvit.teacher={trained}", "dynamicvit.frozen_epochs=2"]
    method = build("method=dynamicvit", *fine_tuned, *settings)
    method.teachers["teacher"].load(HERE.device)
    method.model.load_state_dict(torch.load(trained, weights_only=True))
    return method


def test_dynamicvit_is_taught_by_class_token_and_patches_apart(trained):
    method = taught(trained)
    teacher = method.teachers["teacher"]
    images, labels = images_of(method), torch.arange(4)
    answer = teacher(images)
    logits, patches = teacher.model.answers(answer.tokens)
    assert torch.equal(answer.logits, logits)
    assert torch.equal(answer.patches, patches)
    assert not torch.equal(answer.logits, teacher.model.readout(answer.tokens))
    out = method(images, labels, at(3))
    for name in ("kl", "distill"):
        assert out[name] > 0
    out["loss"].backward()
    assert method.model.aux_head.weight.grad.abs().sum() > 0
    assert methods.find("dynamicvit").mixes(method.config) == "pixels"
    seen = []
    method.model.aux_head.register_forward_hook(lambda module, given, made: seen.append(made.shape[1]))
    method.predict(images, 0.5)
    assert seen == [method.counts(0.5)[-1]]  # the maximum is over those that were kept


def test_the_divergence_of_patches_is_summed_over_classes_and_averaged_over_kept_ones():
    ours, theirs = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    kept = torch.tensor([[1.0, 0, 1], [0, 0, 1]])
    taught, student = theirs.softmax(-1), ours.softmax(-1)
    each = (taught * (taught / student).log()).sum(-1)
    torch.testing.assert_close(patch_loss(ours, theirs, kept), each[kept == 1].mean())
    assert patch_loss(theirs, theirs, kept).item() == pytest.approx(0, abs=1e-6)


def test_without_a_teacher_of_patches_dynamicvit_leaves_them_out(trained):
    for settings in ([], [f"dynamicvit.teacher={trained}", "dynamicvit.distill_weight=0"]):
        method = build("method=dynamicvit", *settings)
        assert method.model.patch_share == 0
        assert not method.model.aux_head.weight.requires_grad
    assert taught(trained).model.patch_share == 0.5


# 11. Freezing.


@pytest.mark.parametrize("reference", [False, True])
def test_a_frozen_backbone_stays_as_it_is(trained, reference):
    """Check 11: parameters and buffers; those of the published code drift."""
    method = taught(trained, f"dynamicvit.reference={reference}")
    before = {name: value.clone() for name, value in method.model.state_dict().items()}
    (phase,) = method.phases()
    optimizer, schedule = build_optimizer(method, phase, batch_size=8, steps_per_epoch=5)
    images, labels = images_of(method, 8), torch.arange(8) % 4
    for step in range(5):
        method.train()
        method.begin_epoch(at(step))
        set_rates(optimizer, schedule, step + 5, method.lr_factors(at(step)))
        optimizer.zero_grad()
        method(images, labels, at(step))["loss"].backward()
        optimizer.step()
    moved = {name for name, value in method.model.state_dict().items() if not torch.equal(value, before[name])}
    kinds = ("running_mean", "running_var", "num_batches_tracked")
    drifting = {f"patch_embed.bn{number}.{kind}" for number in (1, 2, 3) for kind in kinds}
    assert moved == (drifting if reference else set())


# Settings.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["loss.mixup=0.8"], r"loss.mixup is 0.8, which nothing reads .*a method that does not mix tokens instead"),
        (
            ["loss.mixup=0.8", "tokens.mix=false", "data.label_maps=x.npy"],
            r"loss.mixup mixes images, and their label maps \(data.label_maps\) cannot follow; set loss.mixup=0",
        ),
        (["tokens.ground_truth=true"], "tokens.ground_truth is True, which nothing reads .* data.label_maps"),
        (["tokens.class_weight=0"], "tokens.class_weight"),
        (["model.name=vit_tiny_patch16_224", "tokens.patch_weight=0.5"], r"nothing reads .*classifier of patches"),
        (["model.name=vit_tiny_patch16_224", "data.label_maps=x.npy"], "a method that learns from label maps"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        build("method=dense", *settings)


def test_a_backbone_of_ones_own_without_a_classifier_of_patches_is_refused():
    settings = ["method=dense", "model.name=everything:backbone", "model.global_pool=avg"]
    build(*settings)
    with pytest.raises(ValueError, match=r"model.name=everything:backbone has no classifier of patches"):
        build(*settings, "tokens.patch_weight=0.5")


def test_pixels_may_be_mixed_where_tokens_are_not():
    method = build("method=dense", "tokens.mix=false", "loss.mixup=0.8")
    images, soft = images_of(method), torch.eye(4)
    assert methods.find("dense").mixes(method.config) == "pixels"
    assert method.enter(images, at(3)).box is None
    one, other = method(images, torch.arange(4), at(3)), method(images, soft * 0.9 + 0.1 / 4, at(3))
    torch.testing.assert_close(one["loss"], other["loss"])


# A run.


def trainer(tmp_path, *settings, on_batch=None):
    config = recipes.get("digits").with_settings([*SMALL, "train.log_every_steps=1", "train.ema_decay=0.9", *settings])
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "config.json").write_text(config.to_json(), encoding="utf-8")
    maps = np.zeros((40, 2, 3, 6, 6), dtype=np.int16)
    maps[:, 1] = np.arange(40)[:, None, None, None] % 4
    given = maps if config.data.label_maps else None
    loaders = (
        MemoryLoader(40, maps=given, on_batch=on_batch, size=config.data.train_size),
        MemoryLoader(40, train=False),
    )
    return Trainer(config, *loaders, classes=list("abcd"), output=tmp_path, world=HERE)


def test_a_run_with_label_maps_is_logged_resumed_and_opened(tmp_path):
    """At smaller images first, stopped in the middle; statistics and average go on to the bit."""
    settings = [
        "method=sampled", "data.label_maps=maps.npy", "data.progressive.start_size=16", "model.depth=2",
        "data.progressive.end_epoch=2", "data.progressive.multiple=16", "train.epochs=3",
    ]  # fmt: skip
    trainer(tmp_path / "whole", *settings).fit()
    with pytest.raises(Interrupted):
        trainer(tmp_path / "cut", *settings, on_batch=lambda step: step == 3 and os.kill(os.getpid(), 15)).fit()
    torch.manual_seed(12345)
    trainer(tmp_path / "cut", *settings).fit()
    states = [checkpoint.load_latest(tmp_path / name / "checkpoints")[0] for name in ("whole", "cut")]
    for part in ("method", "ema"):
        for name, value in states[0][part].items():
            assert torch.equal(value, states[1][part][name]), name
    assert torch.equal(
        states[0]["ema"]["model.patch_embed.bn1.running_mean"],
        states[0]["method"]["model.patch_embed.bn1.running_mean"],
    )
    for row in read_rows(tmp_path / "whole", "step"):
        assert math.isfinite(row["classification"] + row["patches"])
    run = load_run(tmp_path / "whole", HERE.device)
    assert run.method.model.trained_on.crop_pct == 1.0
    assert run.method.predict(images_of(run.method)).shape == (4, 4)
