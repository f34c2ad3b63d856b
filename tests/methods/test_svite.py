"""SViTE: what its specification can be checked by on a CPU, without ImageNet (the numbers are its checks')."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from memory_loader import fit
from sparse_steps import TINY, Steps, build, images_of, on_paper, stir, trained_head

from pss import recipes
from pss.inference import hub
from pss.inference.opening import load_run
from pss.methods import Stage
from pss.methods.parts.selector import Selector, num_selected, temperature
from pss.methods.parts.topology import Course, densities, move, random_mask
from pss.methods.svite import prunable
from pss.planning.plan import plan
from pss.runs.log import read_rows
from pss.runtime.processes import World

HERE = World(rank=0, size=1, device=torch.device("cpu"))
SVITE = ["method=svite", "svite.interval=5"]


# Densities.


@pytest.mark.parametrize("name", ["tiny", "small", "base"])
def test_densities_of_the_blocks(name):
    """Check 3."""
    method = on_paper("svite-s", f"model.name=deit_{name}_patch16_224")
    shapes = {key: tuple(method.model.get_parameter(key).shape) for key in prunable(method.model, "blocks")}
    sizes = list(map(math.prod, shapes.values()))
    assert len(shapes) == 4 * 12
    for density, of_qkv, of_proj, of_mlp in ((0.5, 0.5, 0.75, 0.46875), (0.7, 0.7048, 1.0, 0.6607)):
        found = dict(zip(shapes, densities(list(shapes.values()), density), strict=True))
        for key, share in found.items():
            wanted = of_qkv if "qkv" in key else of_proj if "proj" in key else of_mlp
            assert share == pytest.approx(wanted, abs=5e-5)
        assert sum(share * size for share, size in zip(found.values(), sizes, strict=True)) == pytest.approx(
            density * sum(sizes)
        )


def test_how_many_weights_are_there():
    """Checks 1, 3 and 5: counts, and what is masked."""
    tiny = on_paper("svite-ti")
    assert sum(tiny.counts.values()) == 2_654_208
    assert sum(tiny.masks.get_buffer(name).numel() for name in tiny.counts) == 5_308_416
    assert all(name.startswith("blocks.") and name.endswith(".weight") for name in tiny.counts)
    release = on_paper("svite-s", "svite.weights=release")
    shares = {name: count / release.masks.get_buffer(name).numel() for name, count in release.counts.items()}
    for name, share in {
        "patch_embed.proj.weight": 0.2061,
        "blocks.3.attn.qkv.weight": 0.5037,
        "blocks.3.attn.proj.weight": 0.7555,
        "blocks.3.mlp.fc1.weight": 0.4722,
        "blocks.3.mlp.fc2.weight": 0.4722,
        "head.weight": 0.5228,
    }.items():
        assert shares[name] == pytest.approx(share, abs=5e-5)
    assert len(shares) == 2 + 48
    assert sum(release.masks.get_buffer(name).numel() for name in shares) == 21_912_576
    uniform = on_paper("svite-s", "svite.distribution=uniform", "svite.density=0.3")
    assert all(count == round(0.3 * uniform.masks.get_buffer(name).numel()) for name, count in uniform.counts.items())


def test_never_masked():
    """Check 5: neither biases, norms, class token and position embedding, nor the scorer."""
    method = build("method=svite", "svite.weights=release", "svite.keep=0.5", "model.rel_pos=separable", classes=100)
    masked = {f"model.{name}" for name in method.counts}
    others = [parameter for name, parameter in method.named_parameters() if name not in masked]
    assert {parameter.ndim for parameter in others} == {1, 2, 3}
    assert {name for name, parameter in method.named_parameters() if parameter.ndim == 2} - masked == {
        "selector.scorer.weight",
        *(f"model.blocks.{number}.attn.separable_relative_position_bias_table" for number in range(2)),
    }
    full = build("method=svite", "svite.density=1", "svite.keep=0.5")  # the selector alone
    assert not list(full.masks.buffers())
    assert full.course() == "ρ: 0.5 throughout, as the selector chooses"


# When and how masks move.


def test_share_that_is_replaced_and_how_often():
    """Check 4."""
    course = Course.of(1000, None, 0.8, 0.5, 0.005)
    assert [round(course.share(done), 4) for done in (0, 250, 500, 800, 1000)] == [0.5, 0.4275, 0.2525, 0.0523, 0.005]
    assert course.interval == 10
    assert [step + 1 for step in range(1000) if course.moves(step)] == list(range(10, 800, 10))
    assert course.last_step == 790
    for recipe, steps, wanted in (("svite-s", 2502, 80), ("svite-b", 1251, 85), ("svite-ti", 2502, 60)):
        updates = on_paper(recipe, steps_per_epoch=steps).updates
        assert updates.last_step // updates.interval == wanted
        assert updates.moves(updates.last_step - 1)
        assert not updates.moves(updates.last_step + updates.interval - 1)
    assert Course.of(1000, 7, 0.0, 0.5, 0.005).last_step == 0
    assert not any(Course.of(1000, 7, 0.0, 0.5, 0.005).moves(step) for step in range(1000))


def test_the_weakest_go_and_the_most_promising_come():
    mask = torch.tensor([True, True, True, False, False, False])
    strength = torch.tensor([0.1, 0.3, 0.2, 0.0, 0.0, 0.0])
    promise = torch.tensor([9.0, 9.0, 9.0, 2.0, 1.0, 3.0])
    moved = move(mask, strength, promise, 2)
    # 0 and 2 are dropped; 0 and 2 promise most, and come back.
    assert moved.mask.tolist() == [True, True, True, False, False, False]
    assert moved.touched.tolist() == [True, False, True, False, False, False]
    assert not moved.grown.any()
    others = move(mask, strength, promise, 2, regrow=False)
    assert others.mask.tolist() == [False, True, False, True, False, True]
    assert others.grown.tolist() == [False, False, False, True, False, True]
    ties = move(mask, torch.ones(6), torch.zeros(6), 1, regrow=False)  # nothing tells them apart: the first ones
    assert ties.mask.tolist() == [False, True, True, True, False, False]


def test_masks_are_exact_and_those_of_the_seed():
    for count in (0, 7, 60):
        assert int(random_mask((6, 10), count, torch.Generator().manual_seed(1)).sum()) == count
    same, other = build(*SVITE), build(*SVITE, "train.seed=1")
    assert all(torch.equal(a, b) for a, b in zip(build(*SVITE).masks.buffers(), same.masks.buffers(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(other.masks.buffers(), same.masks.buffers(), strict=True))
    assert "masks.blocks.1.mlp.fc1.weight" in same.state_dict()


def masks_of(method):
    return {name: mask.clone() for name, _, mask in method.masked()}


@pytest.mark.parametrize("regrow", ["true", "false"])
def test_counts_never_change_and_the_first_move_replaces_what_it_should(regrow):
    """Check 1."""
    method = build("method=svite", "svite.interval=1", f"svite.regrow={regrow}", "svite.density=0.7")
    steps, before = Steps(method), masks_of(method)
    assert 0 < len(method.counts) < len(prunable(method.model, "blocks"))  # the projection is dense
    steps.take()
    share = method.updates.share(1)
    for name, weight, mask in method.masked():
        count = math.ceil(share * method.counts[name])
        changed = int((mask != before[name]).sum()) // 2
        if regrow == "false":  # all that are dropped stay away, but for as many as there is room for
            assert changed == min(count, mask.numel() - method.counts[name])
        else:
            assert 0 < changed <= count
        moments = steps.optimizer.state[weight]["exp_avg"]
        assert int((moments[before[name]] == 0).sum()) >= changed
    for _ in range(19):
        steps.take()
        for name, _, mask in method.masked():
            assert int(mask.sum()) == method.counts[name]


def test_nothing_moves_late_or_where_a_step_is_skipped():
    """Checks 4 and 13 of the pitfalls."""
    method = build("method=svite", "svite.interval=1")
    steps = Steps(method)
    held = masks_of(method)
    steps.take(skip=True)
    assert all(torch.equal(mask, held[name]) for name, mask in masks_of(method).items())
    assert not method._growth
    for _ in range(14):
        steps.take()
    assert steps.step == 15
    held = masks_of(method)
    for _ in range(5):  # 16 of 20 steps are done
        steps.take()
    assert all(torch.equal(mask, held[name]) for name, mask in masks_of(method).items())


def test_what_is_masked_is_zero_and_has_no_moments():
    """Check 2: with weight decay, and in the moving average."""
    method = build("method=svite", "svite.interval=3")
    steps = Steps(method)
    for _ in range(7):
        steps.take()
        for name, weight, mask in method.masked():
            assert (weight[~mask] == 0).all()
            assert (weight[mask] != 0).float().mean() > 0.5
            state = steps.optimizer.state[weight]
            assert (state["exp_avg"][~mask] == 0).all()
            assert (state["exp_avg_sq"][~mask] == 0).all()
            average = steps.average.model.get_parameter(name)
            assert (average[~steps.average.masks.get_buffer(name)] == 0).all()


def test_what_grows_begins_at_zero_without_moments_and_learns():
    """Check 6: and it is where the gradient of all weights was largest."""
    method = build("method=svite", "svite.interval=4", "svite.regrow=false", "svite.density=0.3")
    steps, growth = Steps(method), {}
    for _ in range(3):
        steps.take()
    before = masks_of(method)
    steps.take(before_end=lambda: growth.update(method._growth))
    grown = {name: mask & ~before[name] for name, mask in masks_of(method).items()}
    for name, weight, mask in method.masked():
        new = grown[name]
        assert new.any()
        assert (weight[new] == 0).all()
        state = steps.optimizer.state[weight]
        assert (state["exp_avg"][new] == 0).all()
        assert (state["exp_avg_sq"][new] == 0).all()
        stayed = mask & before[name]
        assert (state["exp_avg"][stayed] != 0).any()
        left_out = ~before[name] & ~mask
        assert growth[name][new].min() >= growth[name][left_out].max()
    steps.take()
    for name, weight, _ in method.masked():
        assert (weight[grown[name]] != 0).float().mean() > 0.9


def test_a_weight_that_comes_back_at_once_keeps_its_value():
    method = build("method=svite", "svite.interval=1", "svite.density=0.9")
    steps, weights = Steps(method), {}
    steps.take(before_end=lambda: weights.update({name: one.detach().clone() for name, one, _ in method.masked()}))
    for name, weight, mask in method.masked():
        stayed = mask & (weights[name] != 0)
        assert torch.equal(weight[stayed], weights[name][stayed])


def test_what_was_saved_goes_on_to_the_bit():
    """Check 10, the last part: masks, rate and the next update are those of a run that went on."""
    one = Steps(build("method=svite", "svite.interval=2", "svite.keep=0.5"))
    for _ in range(3):
        one.take()
    other = Steps(build("method=svite", "svite.interval=2", "svite.keep=0.5", "train.seed=9"))
    other.method.load_state_dict(copy.deepcopy(one.method.state_dict()))
    other.optimizer.load_state_dict(copy.deepcopy(one.optimizer.state_dict()))
    other.step = one.step
    one.take()
    other.take()
    for name, value in one.method.state_dict().items():
        assert torch.equal(value, other.method.state_dict()[name]), name


def test_the_authors_code_lets_averages_of_masked_weights_go_on():
    method = build("method=svite", "svite.interval=3", "svite.reference=true")
    steps = Steps(method)
    for _ in range(4):
        steps.take()
    for name, weight, mask in method.masked():
        assert (weight[~mask] == 0).all()
        assert (steps.optimizer.state[weight]["exp_avg"][~mask] != 0).any()
        average = steps.average.model.get_parameter(name)
        assert (average[~steps.average.masks.get_buffer(name)] != 0).any()


# The token selector.


def test_how_many_tokens_are_selected():
    """Check 10."""
    assert [1 + num_selected(keep, 196, 1) for keep in (1.0, 0.95, 0.9, 0.7, 0.5)] == [197, 187, 177, 138, 99]
    assert num_selected(0.5, 196, 1, "aligned") == 95
    assert num_selected(1e-6, 196, 1) == 1
    method = on_paper("svite-plus-s", "svite.keep=0.9")
    assert method.tokens(0.9) == (177,) * 12
    assert method.training_tokens(Stage(0.9)) == (177,) * 12
    assert method.training_tokens(Stage(0.9), 160) == (91,) * 12  # 0.9 of 101 tokens
    assert (temperature(0, 100), temperature(99, 100)) == (10.0, pytest.approx(0.1))
    assert temperature(33, 100) == pytest.approx(10 - 9.9 / 3)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_training_sees_the_selected_tokens_alone(pool):
    method = build("method=svite", "svite.keep=0.5", f"model.global_pool={pool}").train()
    seen, steps = [], Steps(method)
    trunk = method.model.trunk
    method.model.trunk = lambda tokens, kept: seen.append((tokens, kept)) or trunk(tokens, kept)
    images = images_of(method)
    images.requires_grad_()
    method(images, torch.zeros(6, dtype=torch.int64), steps.at())["loss"].backward()
    ((tokens, kept),) = seen
    prefix = method.model.num_prefix_tokens
    assert tokens.shape[1] == method.tokens(0.5)[0] == prefix + kept.shape[1]
    reached = images.grad.unfold(2, 8, 8).unfold(3, 8, 8).abs().sum((1, 4, 5)).flatten(1) > 0
    assert reached.all()  # those that are left out by their scores alone
    assert method.selector.scorer.weight.grad.abs().sum() > 0


def test_the_choice_is_noisy_in_training_and_follows_step_and_rank():
    method = build("method=svite", "svite.keep=0.5")
    images = images_of(method)
    steps = Steps(method)

    def chosen(step, rank=0):
        tokens = method.model.embed(images)
        return method._draw(method.selector, tokens, None, steps.at(step)._replace(rank=rank))[1]

    assert torch.equal(chosen(3), chosen(3))
    assert not torch.equal(chosen(3), chosen(4))
    assert not torch.equal(chosen(3), chosen(3, rank=1))
    method.eval()
    with torch.inference_mode():
        assert torch.equal(method.predict(images, 0.5), method.predict(images, 0.5))
        kept = method._select(images, 0.5)[1]
        scores = method.selector(method.model.embed(images)[:, method.model.num_prefix_tokens :])
        worst = scores.gather(1, kept).amin(1)
        left = scores.scatter(1, kept, -torch.inf).amax(1)
        assert (worst >= left).all()
        # At the full share it is the model without a selector.
        torch.testing.assert_close(method.predict(images, 1.0), method.model(images))


def test_patches_of_small_images_keep_their_places():
    method = build("method=svite", "svite.keep=0.5").train()
    seen, steps = [], Steps(method)
    trunk = method.model.trunk
    method.model.trunk = lambda tokens, kept: seen.append(kept) or trunk(tokens, kept)
    method(images_of(method)[..., :16, :16], torch.zeros(6, dtype=torch.int64), steps.at())
    assert seen[0].shape == (6, method.training_tokens(Stage(0.5), 16)[0] - 1)
    assert set(seen[0].flatten().tolist()) == {0, 3, 12, 15}  # the corners of a grid of 4 x 4


def test_the_derivative_of_the_choice_is_that_of_its_softmax():
    selector = Selector(4)
    patches = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    factors, kept = selector.draw(patches, 2, 0.7, torch.Generator().manual_seed(5))
    assert torch.equal(factors, torch.ones(2, 2))
    weights = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    (found,) = torch.autograd.grad((factors * weights).sum(), selector.scorer.weight)
    noise = -torch.empty(2, 5).exponential_(generator=torch.Generator().manual_seed(5)).log()
    soft = ((selector(patches).log_softmax(-1) + noise) / 0.7).softmax(-1)
    assert torch.equal(kept.sort(1).values, soft.topk(2).indices.sort(1).values)
    (wanted,) = torch.autograd.grad((soft.gather(1, kept) * weights).sum(), selector.scorer.weight)
    torch.testing.assert_close(found, wanted)


def test_the_authors_selector_leaves_zeros_in_the_sequence():
    method = build("method=svite", "svite.keep=0.5", "svite.reference=true", "model.global_pool=token")
    images = images_of(method)
    tokens = method.model.embed(images)
    drawn, kept = method._draw(method.selector, tokens, None, Steps(method).at())
    assert kept is None
    assert drawn.shape == tokens.shape
    zeros = (drawn == 0).all(2).sum(1)
    count = tokens.shape[1] - method.num_patches(0.5) - 1
    assert ((zeros == count) | (zeros == count - 1)).all()  # the class token may be among them, or comes on top
    assert (drawn[:, 0] == tokens[:, 0]).all()
    assert method.cost(0.5).backbone == method.cost(1.0).backbone


# Costs, plans, deployment.


def test_what_sparse_weights_would_save_is_told_and_not_counted():
    """A mask that covers all saves all but both products, the stem and the classifier."""
    method = on_paper("svite-s")
    dense = on_paper("svite-s", "svite.density=1")
    assert method.cost().forward == dense.cost().forward == dense.theoretical_macs()
    saved = (dense.theoretical_macs() - method.theoretical_macs()) / 197
    assert saved == pytest.approx(21_233_664 / 2, rel=1e-6)
    assert method.facts()["theoretical_gflops"] == method.theoretical_macs() / 1e9
    assert dense.num_active - method.num_active == 21_233_664 // 2
    release = on_paper("svite-s", "svite.weights=release")
    hidden = {name: release.masks.get_buffer(name).numel() - count for name, count in release.counts.items()}
    of_blocks = sum(count for name, count in hidden.items() if name.startswith("blocks"))
    wanted = 197 * of_blocks + 196 * hidden["patch_embed.proj.weight"] + hidden["head.weight"]
    assert release.cost().forward - release.theoretical_macs() == wanted


def test_it_is_planned_as_it_is_computed():
    config = recipes.get("digits").with_settings([*TINY, "method=svite", "svite.keep=0.5"])
    (level,) = plan(config, num_images=80, num_classes=4).levels
    method = build("method=svite", "svite.keep=0.5")
    assert level.cost == method.training_cost(level.stage)
    assert level.cost.forward == method.cost(0.5).forward
    assert level.cost.extra == method.model.num_patches * method.model.embed_dim
    assert level.stage.rho == 0.5
    assert (
        "50% of the blocks' weights, moved every 22 steps until step 1,782"
        in build("method=svite", "train.epochs=50", steps_per_epoch=45).course()
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    output = tmp_path_factory.mktemp("svite")
    config = recipes.get("digits").with_settings([*TINY, "method=svite", "train.ema_decay=0.9", "train.batch_size=8"])
    fit(config, output)
    return output


@pytest.mark.parametrize("ema", [False, True])
def test_what_is_deployed_is_a_plain_sparse_model(run, tmp_path, ema):
    opened = load_run(run, HERE.device, ema=ema)
    assert opened.method.name == "dense"
    assert opened.config.method == "svite"
    facts = read_rows(run, "epoch")[-1]
    assert opened.method.facts() == {name: facts[name] for name in ("active_params", "theoretical_gflops")}
    hidden = [block.mlp.fc1.weight for block in opened.method.model.blocks]
    assert all(int((weight != 0).sum()) == round(0.46875 * weight.numel()) for weight in hidden)
    hub.save(tmp_path / "pushed", opened.published(), "# A card")
    images = images_of(opened.method)
    torch.testing.assert_close(hub.load(tmp_path / "pushed").model(images), opened.method.predict(images))


def test_weights_that_training_starts_from_are_masked(run):
    method = stir(trained_head(build("method=svite")))
    for _, weight, mask in method.masked():
        assert torch.equal(weight != 0, mask)
    full = build("method=svite")
    with torch.no_grad():
        for _, weight, _ in full.masked():
            weight.fill_(1)
    full.begin_phase(full.phases()[0])
    assert all(torch.equal(weight != 0, mask) for _, weight, mask in full.masked())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("svite.density=0", "svite.density is '0'; it must be above 0"),
        ("svite.min_drop=0.6", r"svite.min_drop is 0.6 and svite.drop 0.5, which falls to it; set svite.min_drop"),
        ("svite.keep=1.5", "svite.keep is '1.5'; it must be at most 1"),
    ],
)
def test_settings_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        recipes.get("digits").with_settings(["method=svite", wrong])


def test_settings_that_nothing_reads_and_intervals_that_are_too_long():
    with pytest.raises(ValueError, match=r"svite.interval is 3, which nothing reads .* a density below 1"):
        recipes.get("digits").with_settings(["method=svite", "svite.density=1", "svite.interval=3"])
    with pytest.raises(ValueError, match=r"svite.drop is 0.3, which nothing reads"):
        recipes.get("digits").with_settings(["method=svite", "svite.end=0", "svite.drop=0.3"])
    config = recipes.get("digits").with_settings([*TINY, "method=svite", "svite.interval=16"])
    (own,) = config.own
    with pytest.raises(ValueError, match=r"svite.interval is 16 steps, and masks move in the first 16 of the run's 20"):
        own.check_steps(config, 5)
    own.check_steps(config, 6)
