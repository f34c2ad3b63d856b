"""Token Expansion: the checks of its specification, by number, and how it goes with schedules and small images."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from memory_loader import MemoryLoader

from pss import methods, recipes
from pss.config import Config
from pss.methods import Progress, Stage
from pss.methods.toe import ToE, merge, select, thirds, uniform_seeds
from pss.planning.plan import plan
from pss.runs.log import read_rows
from pss.runtime.processes import World
from pss.training.trainer import Trainer

HERE = World(rank=0, size=1, device=torch.device("cpu"))
TINY = ["method=toe", "model.embed_dim=24", "train.epochs=6", "optim.warmup_epochs=1", "data.prefetch_gb=0"]


def tiny(*settings, seed=0):
    torch.manual_seed(seed)
    config = recipes.get("digits").with_settings([*TINY, *settings])
    method = methods.build(config, num_classes=4, steps_per_epoch=5)
    torch.nn.init.normal_(method.model.head.weight)
    return method


def on_meta(recipe, *settings):
    with torch.device("meta"):
        return methods.build(recipes.get(recipe).with_settings(settings), num_classes=1000, steps_per_epoch=10)


def at(epoch, *, steps=5, step=0, epochs=6):
    return Progress(step=epoch * steps + step, total_steps=epochs * steps, epoch=epoch, epochs=epochs, seed=0, rank=0)


def images_of(method, count=5, size=None):
    sides = method.model.image_size if size is None else (size, size)
    return torch.randn(count, 3, *sides, generator=torch.Generator().manual_seed(1))


def tokens_by_block(method, images, position):
    """What each block is given in a training step."""
    seen = []
    hooks = [
        block.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
        for block in method.model.blocks
    ]
    method(images, torch.zeros(len(images), dtype=torch.int64), position)
    for hook in hooks:
        hook.remove()
    return tuple(seen)


def features(count=3, patches=50, width=16, seed=0):
    return torch.randn(count, patches, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def written_out(patches, seeds, steps):
    """One image, as the paper describes it: selected and unselected are two lists."""
    unit = F.normalize(patches, dim=-1)
    chosen, others = seeds.tolist(), [i for i in range(len(patches)) if i not in seeds]
    for size in steps:
        near = {i: max(float(unit[i] @ unit[a]) for a in chosen) for i in others}
        picks = sorted(others, key=lambda i: near[i])[:size]  # stable: the lower index goes first
        chosen += picks
        others = [i for i in others if i not in picks]
    goes_to = {i: max(range(len(chosen)), key=lambda a: float(unit[i] @ unit[chosen[a]])) for i in others}
    means = [
        torch.stack([patches[index], *(patches[i] for i in others if goes_to[i] == place)]).mean(0)
        for place, index in enumerate(chosen)
    ]
    return chosen, goes_to, torch.stack(means)


# Counts and stages (checks 1, 10).


@pytest.mark.parametrize(
    ("rate", "reference", "counts"),
    [
        (0.5, False, [(49, 98), (49, 98, 147), (196,)]),
        (0.4, False, [(39, 78), (39, 78, 137), (196,)]),
        (0.6, False, [(58, 117), (58, 117, 156), (196,)]),
        (0.5, True, [(49, 98), (49, 98, 147), (196,)]),
        (0.4, True, [(39, 78), (39, 78, 136), (196,)]),
        (0.6, True, [(58, 116), (58, 116, 155), (196,)]),
    ],
)
def test_counts_are_those_of_the_specification(rate, reference, counts):
    method = on_meta("toe-s", f"toe.rate={rate}", f"toe.reference={reference}")
    assert [method.counts(number, 196) for number in (1, 2, 3)] == counts
    assert on_meta("toe-s", "toe.rate=0.58").counts(1, 100) == (29, 58)  # products are 28.999… and 57.999…
    for repeats in (1, 2, 49, 100):  # check 10
        steps = on_meta("toe-s", f"toe.repeats={repeats}").steps((49, 98))
        assert (sum(steps), len(steps)) == (49, min(repeats, 49))
        assert min(steps) > 0


@pytest.mark.parametrize(
    ("settings", "changes"),
    [([], (0, 100, 200)), (["toe.starts=0,130,260", "optim.min_lr=2e-4"], (0, 130, 260))],
    ids=["published", "hyper"],
)
@pytest.mark.parametrize(("rate", "seen"), [(0.5, (99, 148, 197)), (0.4, (79, 138, 197))])
def test_stages_change_exactly_where_they_begin(settings, changes, rate, seen):
    method = on_meta("toe-s", f"toe.rate={rate}", *settings)
    for epoch in range(300):
        number = sum(epoch >= start for start in changes)
        stage = method.stage(at(epoch, epochs=300))
        assert stage == Stage(1.0, ("stage 1", "stage 2", "")[number - 1])
        assert method.training_tokens(stage) == (197,) + (seen[number - 1],) * 11


@pytest.mark.parametrize(
    ("epochs", "starts"), [(300, (0, 100, 200)), (50, (0, 17, 33)), (4, (0, 1, 3)), (2, (0, 1, 1)), (1, (0, 0, 0))]
)
def test_thirds_of_a_run(epochs, starts):
    assert thirds(epochs) == starts


def test_all_tokens_go_on_before_a_first_stage_that_begins_later():
    method = tiny("toe.starts=1,2,3")
    assert [tokens_by_block(method, images_of(method), at(epoch))[1] for epoch in range(5)] == [17, 9, 13, 17, 17]
    assert [method.stage(at(epoch)).name for epoch in range(5)] == ["", "stage 1", "stage 2", "", ""]
    told = "0.5 for 1 epoch, 0.75 for 1 epoch, all for 3 epochs"
    assert method.course() == f"ρ: 1.0 throughout; of these go on after block 1: all for 1 epoch, {told}"


def test_a_resumed_run_is_in_its_stage_at_once(tmp_path):
    """Check 10: the stage is that of the epoch, and nothing is remembered."""

    def trained(steps):
        config = recipes.get("digits").with_settings(
            [*TINY, "train.batch_size=8", "train.log_every_steps=1", f"train.max_steps={steps}"]
        )
        loaders = MemoryLoader(40), MemoryLoader(40, train=False)
        Trainer(config, *loaders, classes=list("abcd"), output=tmp_path, world=HERE).fit()
        return [(row["epoch"], row.get("stage"), row["tokens"]) for row in read_rows(tmp_path, "step")]

    assert trained(13)[-1] == (3, "stage 2", 14)
    assert trained(22)[13:] == [(3, "stage 2", 14)] * 2 + [(4, "stage 2", 14)] * 5 + [(5, None, 17)] * 2
    assert list(read_rows(tmp_path, "epoch")[0]["by_rho"]) == ["1 stage 1"]


# The module (checks 3 to 8).


def test_seeds_lie_at_equal_distances():
    """Check 4; and what the authors' stride makes of it, which leaves the lower rows without."""
    assert uniform_seeds(196, 49).tolist() == list(range(0, 196, 4))
    places = uniform_seeds(196, 39)
    assert set(places.diff().tolist()) == {5}
    assert int(places[-1]) == 190
    assert uniform_seeds(10, 4).tolist() == [0, 2, 5, 7]
    seen = {}
    for rate in (0.4, 0.6):
        method = on_meta("toe-s", f"toe.rate={rate}", "toe.reference=true")
        seen[rate] = int(uniform_seeds(196, method.counts(1, 196)[0], method.stride)[-1])
    assert seen == {0.4: 152, 0.6: 171}
    assert on_meta("toe-s").stride is None


@pytest.mark.parametrize("steps", [[7, 8], [15], [1] * 15, [5, 5, 4, 4]])
def test_it_equals_the_algorithm_written_out(steps):
    patches, seeds = features(), uniform_seeds(50, 12)
    chosen, nearest = select(patches, seeds, steps)
    merged = merge(patches, chosen, nearest)
    for image in range(len(patches)):
        expected, goes_to, means = written_out(patches[image], seeds, steps)
        assert chosen[image].tolist() == expected
        assert {i: int(nearest[image, i]) for i in goes_to} == goes_to
        torch.testing.assert_close(merged[image], means)


@pytest.mark.parametrize("distance", ["cosine", "euclidean", "manhattan"])
def test_selected_and_merged_are_all_patches_once(distance):
    """Check 3."""
    patches = features()
    chosen, nearest = select(patches, uniform_seeds(50, 12), [7, 6], distance)
    for image in range(3):
        assert len(set(chosen[image].tolist())) == 25
    assert torch.equal(nearest.gather(1, chosen), torch.arange(25).expand(3, -1))
    assert (nearest.min(), nearest.max()) == (0, 24)


def test_prefix_tokens_are_left_as_they_are():
    """Check 3 and pitfall 8: a distilled model has two."""
    method = tiny("model.name=deit_tiny_distilled_patch16_224", "model.rel_pos=none", "model.global_pool=none")
    tokens = torch.randn(3, 18, 24)
    merged, kept, _ = method.expand(tokens, None, 1)
    assert merged.shape == (3, 10, 24)
    assert torch.equal(merged[:, :2], tokens[:, :2])
    assert kept.shape == (3, 8)


@pytest.mark.parametrize("distance", ["cosine", "euclidean", "manhattan"])
def test_another_cluster_joins_first(distance):
    """Check 5, and pitfall 3 for distances: far ones are picked, and merged into near ones."""
    patches = features(1, 12) * 0.01
    patches[:, :6, 0] += 1.0
    patches[:, 6:, 1] += 1.0
    seeds = torch.tensor([0, 2, 4])
    chosen, nearest = select(patches, seeds, [2], distance)
    assert chosen[0, :3].tolist() == [0, 2, 4]
    assert set(chosen[0, 3:].tolist()) <= set(range(6, 12))
    assert all(int(place) < 3 for place in nearest[0, :6])
    assert all(int(place) >= 3 for place in nearest[0, 6:])


def test_of_equally_far_patches_the_lower_index_joins():
    patches = torch.eye(4).repeat_interleave(2, dim=0).unsqueeze(0)  # pairs of the same
    chosen, nearest = select(patches, torch.tensor([0]), [2, 1])
    assert chosen.tolist() == [[0, 2, 3, 4]]
    assert nearest.tolist() == [[0, 0, 1, 2, 3, 3, 0, 0]]  # the last two resemble none: the first is as near as any


def test_merging_is_the_mean_of_the_selected_one_and_what_goes_to_it():
    """Check 6."""
    patches = torch.tensor([[[0.0, 0.0], [2.0, 4.0], [4.0, 8.0], [1.0, 1.0], [3.0, 3.0]]])
    chosen, nearest = torch.tensor([[1, 3]]), torch.tensor([[0, 0, 0, 1, 1]])
    assert torch.equal(merge(patches, chosen, nearest), torch.tensor([[[2.0, 4.0], [2.0, 2.0]]]))
    many = features(4, 196, 8)
    chosen, nearest = select(many, uniform_seeds(196, 49), [25, 24])
    index = nearest.unsqueeze(2).expand(-1, -1, 8)
    scattered = torch.zeros(4, 98, 8, dtype=many.dtype).scatter_reduce(1, index, many, "mean", include_self=False)
    torch.testing.assert_close(merge(many, chosen, nearest), scattered, rtol=0, atol=1e-6)


def test_every_token_is_learnt_from():
    """Check 7: a merged one through its share of the mean, and none through the choice."""
    method = tiny()
    tokens = torch.randn(3, 17, 24, requires_grad=True)
    merged, _, _ = method.expand(tokens, None, 1)
    merged.sum().backward()
    assert (tokens.grad.abs().sum(-1) > 0).all()
    patches = tokens.detach()[:, 1:]
    _, nearest = select(patches, uniform_seeds(16, 4), [2, 2])
    counts = F.one_hot(nearest, 8).sum(1)
    torch.testing.assert_close(tokens.grad[:, 1:, 0], (1 / counts).gather(1, nearest))


def test_the_last_stage_is_the_identity():
    """Check 8, and the step is that of the plain method."""
    method = tiny().train()
    tokens, places = torch.randn(2, 17, 24), torch.arange(16)
    merged, kept, _ = method.expand(tokens, places, 3)
    assert merged is tokens
    assert kept is places
    dense = methods.build(method.config.with_method("dense"), num_classes=4, steps_per_epoch=5)
    dense.load_state_dict(method.state_dict())
    images, labels = images_of(method), torch.arange(5) % 4
    assert torch.equal(method(images, labels, at(5))["logits"], dense(images, labels, at(5))["logits"])
    assert not torch.equal(method(images, labels, at(0))["logits"], dense(images, labels, at(0))["logits"])


def test_one_by_one_covers_no_worse_than_at_once():
    """Check 10."""
    patches = features(4, 196, 8).float()
    worst = {}
    for repeats in (1, 49):
        sizes = tiny(f"toe.repeats={repeats}").steps((49, 98))
        chosen, _ = select(patches, uniform_seeds(196, 49), sizes)
        unit = F.normalize(patches, dim=-1)
        near = (unit @ unit.gather(1, chosen.unsqueeze(2).expand(-1, -1, 8)).transpose(1, 2)).amax(2)
        worst[repeats] = near.amin(1)
    assert (worst[49] >= worst[1]).all()
    assert (worst[49] > worst[1]).any()


def test_tokens_without_a_direction_are_no_trouble():
    """Pitfall 9."""
    patches = features().float()
    patches[:, 3:9] = 0
    patches.requires_grad_()
    chosen, nearest = select(patches, uniform_seeds(50, 12), [7, 6])
    merge(patches, chosen, nearest).square().sum().backward()
    assert patches.grad.isfinite().all()
    assert all(len(set(row.tolist())) == 25 for row in chosen)


def test_half_precision_chooses_in_single():
    """Section 2.7: autocast changes neither what is chosen nor the means."""
    patches = features(2, 100, 32).float()
    seeds = uniform_seeds(100, 25)
    chosen, nearest = select(patches, seeds, [13, 12])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again, also = select(patches, seeds, [13, 12])
        merged = merge(patches, again, also)
        assert merge(patches.bfloat16(), again, also).dtype == torch.bfloat16
    assert torch.equal(again, chosen)
    assert torch.equal(also, nearest)
    assert torch.equal(merged, merge(patches, chosen, nearest))


# What is trained and what is evaluated (check 2).


@pytest.mark.parametrize("epoch", [0, 2, 5])
def test_evaluation_is_that_of_the_plain_model(epoch):
    """Check 2: bit for bit at every stage, with no state of its own."""
    method = tiny()
    dense = methods.build(method.config.with_method("dense"), num_classes=4, steps_per_epoch=5)
    assert method.state_dict().keys() == dense.state_dict().keys()
    dense.load_state_dict(method.state_dict())
    images = images_of(method)
    method(images, torch.zeros(5, dtype=torch.int64), at(epoch))  # a step leaves nothing behind
    method.eval(), dense.eval()
    assert torch.equal(method.predict(images), dense.model(images))
    assert method.tokens() == (17,) * 4


@pytest.mark.parametrize("rel_pos", ["none", "bias", "rope"])
def test_positions_go_with_the_selected(rel_pos):
    """The blocks after it see each token where its patch lies, whatever the images' resolution."""
    method = tiny(f"model.rel_pos={rel_pos}", "model.patch_size=4", "data.progressive.start_size=16",
                  "data.progressive.begin_epoch=2", "data.progressive.end_epoch=4",
                  "data.progressive.multiple=4")  # fmt: skip
    with torch.no_grad():
        for name, table in method.named_parameters():
            if name.endswith("position_bias_table"):
                torch.nn.init.normal_(table)
    model, small = method.model, images_of(method, size=16)
    tokens, places = model.see(small, 1.0, low_resolution=True)
    assert places.shape == (16,)
    tokens = model.run_blocks(tokens, model.positions(places), stop=1)
    _, kept, _ = method.expand(tokens, places, 1)
    chosen, nearest = select(tokens[:, 1:], uniform_seeds(16, 4), [2, 2])
    assert torch.equal(kept, places[chosen])
    expected = torch.cat((tokens[:, :1], merge(tokens[:, 1:], chosen, nearest)), dim=1)
    order = torch.randperm(8)
    shuffled = torch.cat((expected[:, :1], expected[:, 1:][:, order]), dim=1)
    positions = model.positions(places[chosen][:, order])
    logits = model.readout(model.norm(model.run_blocks(shuffled, positions, start=1)))
    found = method(small, torch.zeros(5, dtype=torch.int64), at(0))["logits"]
    torch.testing.assert_close(found, logits)
    assert method.training_tokens(method.stage(at(0)), 16) == (17, 9, 9, 9)


@pytest.mark.parametrize("sort", ["magnitude", "random"])
def test_under_a_schedule_it_selects_from_what_is_kept(sort):
    settings = ["schedule.name=cyclic", "model.patch_size=4", f"model.sort={sort}"]
    method = tiny(*settings)
    images = images_of(method)
    for epoch in (0, 2, 5):
        for step in range(5):
            position = at(epoch, step=step)
            stage = method.stage(position)
            expected = method.training_tokens(stage)
            assert tokens_by_block(method, images, position) == expected
            entering = method.model.num_kept_tokens(stage.rho)
            share = (0.5, 0.75, 1.0)[method.stage_number(position) - 1]
            assert expected == (entering,) + (1 + int(share * (entering - 1) + 1e-9),) * 3
    assert method.course().startswith("ρ: cyclic 0.2→1.0 within each epoch of 5 steps; of these go on after block 1: ")
    tokens = torch.randn(2, 11, 24)
    places = torch.stack([torch.arange(10) * 3, torch.arange(10) + 7])
    _, kept, _ = method.expand(tokens, places, 1)
    chosen, _ = select(tokens[:, 1:], uniform_seeds(10, 2), [1, 2])
    assert torch.equal(kept, places.gather(1, chosen))


def test_one_patch_is_enough():
    method = tiny("schedule.name=fixed", "schedule.rho=0.01")
    assert tokens_by_block(method, images_of(method), at(0)) == (2, 2, 2, 2)
    assert [method.counts(1, patches) for patches in (1, 2, 3, 5)] == [(1, 1), (1, 1), (1, 1), (1, 2)]


def test_aligned_counts_are_multiples_of_eight():
    method = on_meta("toe-s", "model.token_counts=aligned")
    for number in (1, 2, 3):
        assert (method.counts(number, 196)[-1] + 1) % 8 == 0 or number == 3
    assert method.counts(1, 2) == (1, 2)  # fewer than eight are all


# Settings.


def test_plain_token_expansion_is_one_setting_and_a_schedule_one_more():
    """Whatever schedule the recipe brings along for the sampled method."""
    for recipe in ("digits", "deit-s-224", "toe-s"):
        alone = recipes.get(recipe).with_settings(["method=toe"])
        method = methods.find("toe")
        schedule = alone.section_of(method.sections[1])
        assert (schedule.name, schedule.constant, schedule.cooldown_epochs) == ("fixed", 1.0, 0)
        both = alone.with_settings(["schedule.name=cyclic"])
        assert both.section_of(method.sections[1]).span == (0.2, 1.0)
        assert Config.from_dict(both.to_dict()) == both
    assert recipes.get("digits").with_settings(["method=toe"]).with_method("sampled") == recipes.get("digits")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["toe.starts=0,200,100"], r"toe.starts is 0,200,100; .*--set toe.starts=0,100,200"),
        (["toe.starts=0,130,260", "train.epochs=50"], r"train.epochs 50; the last stage.*--set toe.starts=0,17,33"),
        (["toe.reference=true", "model.token_counts=aligned"], r"toe.reference has the published token counts"),
        (["toe.starts=1,2"], r"toe.starts is .* with commas between them \(three epochs: 0,100,200\)"),
        (["toe.rate=0"], r"toe.rate is .* above 0"),
        (["schedule.rho=0.4", "schedule.name=cyclic"], r"schedule.rho is 0.4.*schedule.name=fixed"),
    ],
)
def test_what_does_not_go_together_is_said(settings, message):
    with pytest.raises(ValueError, match=message):
        recipes.get("toe-s").with_settings(settings)


def test_a_block_must_be_left_to_see_fewer_tokens():
    with pytest.raises(ValueError, match=r"toe.after is 4 and the model has 4 blocks \(model.depth\)"):
        tiny("toe.after=4")
    method = tiny("toe.after=3")
    assert tokens_by_block(method, images_of(method), at(0)) == (17, 17, 17, 9)


# Costs (section 5).


@pytest.mark.parametrize(
    ("recipe", "rate", "ratios"),
    [
        ("toe-s", 0.5, (0.532, 0.762)),
        ("toe-s", 0.4, (0.441, 0.71)),
        ("toe-ti", 0.5, (0.522, 0.753)),
        ("toe-b", 0.5, (0.538, 0.767)),
    ],
)
def test_arithmetic_by_stage(recipe, rate, ratios):
    method = on_meta(recipe, f"toe.rate={rate}")
    costs = [method.training_cost(Stage(1.0, name)) for name in ("stage 1", "stage 2", "")]
    whole = costs[2]
    assert (whole.forward, whole.extra) == (method.cost().forward, 0)
    for cost, ratio in zip(costs, ratios, strict=False):
        assert cost.backbone / whole.backbone == pytest.approx(ratio, abs=5e-3 if ratio == 0.71 else 5e-4)
        assert 0 < cost.extra < 0.015 * cost.backbone
        assert cost.training == 3 * cost.backbone + 1.5 * cost.extra  # only half of it is learnt through


def test_arithmetic_of_a_run():
    """DeiT-S: 0.765 of dense training over equal stages (0.766 with what the selection adds)."""
    planned = plan(recipes.get("toe-s"), num_images=2048, num_classes=1000)
    assert [(level.stage.name, round(level.share, 3)) for level in planned.levels] == [
        ("", 0.333), ("stage 1", 0.333), ("stage 2", 0.333),
    ]  # fmt: skip
    backbone = sum(level.share * level.cost.backbone for level in planned.levels) / planned.dense.backbone
    assert backbone == pytest.approx(0.765, abs=5e-4)
    assert planned.mean_cost == pytest.approx(0.766, abs=5e-4)


def test_arithmetic_is_what_is_computed():
    """Of a forward pass, products counted as they are called."""
    from torch.utils.flop_counter import FlopCounterMode

    method = tiny("model.rel_pos=none")
    images, labels = images_of(method, 2), torch.zeros(2, dtype=torch.int64)
    for epoch in (0, 2, 5):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            method(images, labels, at(epoch))
        cost = method.training_cost(method.stage(at(epoch)))
        assert counter.get_total_flops() == 2 * 2 * cost.forward


def test_it_is_a_method_by_its_file():
    assert methods.find("toe") is ToE
