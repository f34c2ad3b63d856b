"""S²ViTE: what its specification can be checked by on a CPU, without ImageNet (the numbers are its checks')."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from memory_loader import fit
from sparse_steps import TINY, Steps, build, images_of, on_paper, stir, trained_head
from torch import nn

from pss import recipes
from pss.inference import export, hub
from pss.inference.opening import load_run
from pss.methods.parts.structure import ScoredAttention, owned
from pss.methods.parts.topology import move
from pss.models.block import prune
from pss.models.create import create_model
from pss.models.flops import macs
from pss.models.maps import attention_maps
from pss.runtime.processes import World

HERE = World(rank=0, size=1, device=torch.device("cpu"))
S2VITE = ["method=s2vite", "model.num_heads=6", "model.embed_dim=48", "s2vite.head_density=0.5"]
SHAPES = {
    "plain": ["model.rel_pos=none", "model.qkv_bias=full"],
    "bias": ["model.rel_pos=bias", "model.qkv_bias=qv"],
    "separable": ["model.rel_pos=separable"],
    "rope": ["model.rel_pos=rope"],
}


def sparse(*settings, **options):
    return build(*S2VITE, *settings, **options)


def masks_of(method):
    return [tuple(mask.clone() for mask in method.masks_of(number)) for number in range(len(method.blocks))]


def counts_of(method):
    return [tuple(int(mask.sum()) for mask in masks) for masks in masks_of(method)]


# What is there.


@pytest.mark.parametrize(
    ("recipe", "heads", "neurons", "full_projection", "published", "removed"),
    [("s2vite-ti", 2, 537, 4.21, 0.2367, 0.308), ("s2vite-s", 4, 921, 14.61, 0.319, 0.370),
     ("s2vite-b", 8, 1843, 56.84, 0.333, 0.374)],
)  # fmt: skip
def test_presets_have_the_published_sizes(recipe, heads, neurons, full_projection, published, removed):
    """Checks 7 and 9: counts, parameters and both ways to count what is saved."""
    method = on_paper(recipe)
    assert set(method.num_heads) == {heads}
    assert set(method.num_neurons) == {neurons}
    dense = macs(method.model)
    assert 1 - method.published_macs() / dense == pytest.approx(published, abs=5e-4)
    assert 1 - method.removed_macs() / dense == pytest.approx(removed, abs=6e-4)
    name, depth = method.config.model.name, len(method.blocks)
    with torch.device("meta"):
        small = create_model(name, block_heads=[heads] * depth, block_neurons=[neurons] * depth)
    parameters = sum(part.numel() for part in small.parameters())
    assert method.facts() == {
        "active_params": parameters,
        "deployed_gflops": macs(small) / 1e9,
        "published_gflops": method.published_macs() / 1e9,
    }
    for whole in method.blocks:
        gone = (whole.attn.num_heads - heads) * whole.attn.head_dim, whole.mlp.fc1.out_features - neurons
        parameters += gone[0] * whole.attn.proj.out_features  # the paper keeps these columns
        parameters += 3 * gone[0] + gone[1]  # and the authors' code these biases
    assert round(parameters / 1e6, 2) == full_projection


def test_other_presets():
    for densities, neurons, counted in (((0.5, 0.5), 768, 12.32), ((0.4, 0.3), 460, 8.60), ((0.7, 0.7), 1075, 16.03)):
        method = on_paper("s2vite-s", f"s2vite.head_density={densities[0]}", f"s2vite.mlp_density={densities[1]}")
        assert set(method.num_neurons) == {neurons}
        gone = 6 - method.num_heads[0]
        kept = 12 * (gone * 64 * (384 + 3) + 1536 - neurons)
        assert round((method.num_active() + kept) / 1e6, 2) == counted
    one = build("method=s2vite", "s2vite.head_density=0.1")
    assert counts_of(one) == [(1, 57)] * 2  # 57.6 of 96


def test_every_head_and_neuron_is_masked_with_its_biases():
    method = stir(sparse("model.qkv_bias=qv"))
    for block, (heads, neurons) in zip(method.blocks, masks_of(method), strict=True):
        width = block.attn.head_dim
        rows = block.attn.qkv.weight.view(3, 6, width, -1)
        assert torch.equal((rows != 0).any(3).any(2).all(0), heads)
        assert (rows[:, ~heads] == 0).all()
        for bias in (block.attn.q_bias, block.attn.v_bias):
            assert torch.equal((bias.view(6, width) != 0).any(1), heads)
        assert torch.equal((block.mlp.fc1.weight != 0).any(1), neurons)
        assert torch.equal((block.mlp.fc2.weight != 0).any(0), neurons)
        assert torch.equal(block.mlp.fc1.bias != 0, neurons)
        assert (block.attn.proj.weight != 0).all()


def test_blocks_that_nothing_can_be_taken_out_of_are_refused():
    model = create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, scale_mlp_norm=True, num_classes=4)
    config = recipes.get("digits").with_settings([*TINY, "method=s2vite"])
    with pytest.raises(ValueError, match=r"method s2vite cannot take heads and neurons out of blocks with .* a norm"):
        type(sparse())(model, config, 5)


# Masks that move.


def test_counts_are_constant_and_masks_move():
    """Check 7: neurons too, which the authors' code never exchanges."""
    method = sparse("s2vite.interval=2", "model.depth=4")
    steps, first = Steps(method, lr=1e-3), masks_of(method)
    for _ in range(20):
        steps.take()
        assert counts_of(method) == [(3, 115)] * 4
        for block, (heads, neurons) in zip(method.blocks, masks_of(method), strict=True):
            for parameter, mask in owned(block, heads, neurons):
                mask = mask.expand(parameter.shape)
                assert (parameter[~mask] == 0).all()
                assert (steps.optimizer.state[parameter]["exp_avg"][~mask] == 0).all()
        for number, block in enumerate(steps.average.blocks):
            for parameter, mask in owned(block, *steps.average.masks_of(number)):
                assert (parameter[~mask.expand(parameter.shape)] == 0).all()
        if steps.step == 2:
            for (heads, neurons), (old_heads, old_neurons) in zip(masks_of(method), first, strict=True):
                count = min(math.ceil(method.updates.share(2) * 115), 192 - 115)
                assert int((neurons & ~old_neurons).sum()) == count
                assert int((heads & ~old_heads).sum()) <= round(method.updates.share(2) * 3)
    assert any((new[0] != old[0]).any() for new, old in zip(masks_of(method), first, strict=True))


def test_a_step_that_is_skipped_moves_nothing_and_leaves_no_probe():
    method = sparse("s2vite.interval=1")
    steps, before = Steps(method), copy.deepcopy(method.state_dict())
    steps.take(skip=True)
    for name, value in method.state_dict().items():
        assert torch.equal(value, before[name]), name
    steps.take()
    assert any(not torch.equal(value, before[name]) for name, value in method.state_dict().items() if "masks" in name)


def test_the_probe_changes_no_answer_and_lets_neurons_be_told_apart():
    """Pitfall 1."""
    method = stir(trained_head(sparse("s2vite.interval=1")))
    steps, images = Steps(method), images_of(method)
    method.eval()
    before = method.predict(images)
    method.begin_step(steps.at())
    torch.testing.assert_close(method.predict(images), before, rtol=0, atol=1e-6)
    method(images, torch.arange(6) % 4, steps.at())["loss"].backward()
    for block, (_, neurons) in zip(method.blocks, masks_of(method), strict=True):
        assert (block.mlp.fc1.weight[~neurons] != 0).all()
        columns = block.mlp.fc2.weight.grad.abs().sum(0)
        assert (columns[~neurons] > 0).all()
        assert torch.equal(method._promise_of(block), columns)
    method.mask_gradients(steps.at())
    assert all((block.mlp.fc2.weight.grad[:, ~neurons] == 0).all() for block, (_, neurons) in
               zip(method.blocks, masks_of(method), strict=True))  # fmt: skip


def test_growth_changes_no_answer():
    """Check 8: grown without a drop."""
    method = stir(trained_head(sparse()))
    images, at = images_of(method), Steps(method).at()
    method.eval()
    before = method.predict(images)
    with torch.no_grad():
        for number, block in enumerate(method.blocks):
            heads, neurons = method.masks_of(number)
            method._begin_heads(block, ~heads, at, number)
            method._begin_neurons(block, ~neurons, at, number)
            assert (block.attn.qkv.weight.view(3, 6, -1)[:2] != 0).all()
            heads.fill_(True)
            neurons.fill_(True)
    method.apply_masks()
    torch.testing.assert_close(method.predict(images), before, rtol=0, atol=1e-6)


def test_grown_heads_and_neurons_learn():
    """Check 7, the last part (pitfall 2)."""
    method = sparse("s2vite.interval=4")
    steps = Steps(method, lr=1e-3)
    for _ in range(3):
        steps.take()
    before = masks_of(method)
    steps.take()
    grown = [
        (heads & ~old[0], neurons & ~old[1]) for (heads, neurons), old in zip(masks_of(method), before, strict=True)
    ]
    assert any(heads.any() for heads, _ in grown)
    for block, (heads, neurons) in zip(method.blocks, grown, strict=True):
        q, k, v = block.attn.qkv.weight.view(3, 6, -1)
        assert (q[heads] != 0).all()
        assert (k[heads] != 0).all()
        assert (v[heads] == 0).all()
        assert (block.mlp.fc1.weight[neurons] != 0).all()
        assert (block.mlp.fc2.weight[:, neurons] == 0).all()
        for parameter, mask in owned(block, heads, neurons):
            assert (steps.optimizer.state[parameter]["exp_avg"][mask.expand(parameter.shape)] == 0).all()
    begun = [block.attn.qkv.weight.detach().view(3, 6, -1).clone() for block in method.blocks]
    for _ in range(3):  # values move first, and then queries and keys
        steps.take()
    for block, (heads, neurons), old in zip(method.blocks, grown, begun, strict=True):
        for role, rows in enumerate(block.attn.qkv.weight.view(3, 6, -1)):
            assert (rows[heads] != old[role][heads]).all()
            state = steps.optimizer.state[block.attn.qkv.weight]["exp_avg"].view(3, 6, -1)[role]
            assert (state[heads] != 0).all()
        assert (block.mlp.fc2.weight[:, neurons] != 0).all()


@pytest.mark.parametrize("again", [False, True])
def test_scores_of_heads_are_those_of_their_outputs(again):
    method = stir(trained_head(sparse("s2vite.interval=1"))).train()
    method.model.checkpoint_activations = again
    steps, images, labels = Steps(method), images_of(method), torch.arange(6) % 4
    method.begin_step(steps.at())
    method(images, labels, steps.at())["loss"].backward()
    found = [block.attn.scores.clone() for block in method.blocks]
    outputs = []
    method.model.checkpoint_activations = False

    def noting(self, x):
        x.retain_grad()
        outputs.append(x)
        return super(ScoredAttention, self).project_out(x)

    for block in method.blocks:
        block.attn.scores = None
        block.attn.project_out = noting.__get__(block.attn)
    method.classification_loss(method.model(images), labels).backward()
    for scores, x in zip(found, outputs, strict=True):
        torch.testing.assert_close(scores[0], (x * x.grad).sum((2, 3)).abs().sum(0))
        torch.testing.assert_close(scores[1], x.grad.abs().sum((2, 3)).sum(0))
    mask = method.masks_of(0)[0]
    assert (found[0][1] > 0).all()  # also of heads that are not there
    assert torch.equal(found[0][0] > 0, mask)


def test_heads_are_dropped_and_grown_by_their_scores():
    method = sparse("s2vite.interval=1")
    steps = Steps(method)
    steps.take()
    before, scores = masks_of(method), []
    steps.take(before_end=lambda: scores.extend(block.attn.scores.clone() for block in method.blocks))
    for number, (heads, _) in enumerate(before):
        count = round(method.updates.share(2) * 3)
        assert count > 0
        wanted = move(heads, scores[number][0], scores[number][1], count)
        assert torch.equal(method.masks_of(number)[0], wanted.mask)
    assert all(block.attn.scores is None for block in method.blocks)


def test_the_authors_code_never_exchanges_neurons():
    """Pitfall 1, as published: those that were never there have no gradient, and growth takes what was just dropped."""
    method = sparse("s2vite.interval=1", "s2vite.reference=true")
    steps, first = Steps(method), masks_of(method)
    for _ in range(6):
        steps.take()
    assert all(torch.equal(new[1], old[1]) for new, old in zip(masks_of(method), first, strict=True))
    assert counts_of(method)[0][0] == 3


# What is deployed.


@pytest.mark.parametrize("reference", ["false", "true"])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_left_out_is_taken_out(shape, reference):
    """Check 9: to 1e-5, with every kind of position, and at every share of the patches."""
    method = stir(trained_head(sparse(*SHAPES[shape], f"s2vite.reference={reference}"))).eval()
    small, images = method.deployed(), images_of(method)
    with torch.no_grad():
        for rho in (1.0, 0.5):
            expected = method.predict(images, rho)
            assert expected.std() > 0.1
            torch.testing.assert_close(small.predict(images, rho), expected, rtol=1e-5, atol=1e-5)
        heads = [masks[0] for masks in masks_of(method)]
        maps = attention_maps(method.model, method.model.embed(images), None)
        for kept, whole, few in zip(heads, maps, small.attention_maps(images), strict=True):
            torch.testing.assert_close(few, whole[:, kept])
    assert small.cost().forward == method.removed_macs()
    assert sum(part.numel() for part in small.parameters()) == method.num_active()
    assert [block.attn.num_heads for block in method.blocks] == [6, 6]  # it is a copy


def test_with_a_selector_it_stays_what_chooses():
    method = stir(trained_head(sparse("s2vite.keep=0.5"))).eval()
    small, images = method.deployed(), images_of(method)
    with torch.no_grad():
        for point in small.points():
            torch.testing.assert_close(small.predict(images, point), method.predict(images, point), atol=1e-5, rtol=0)
            assert small.tokens(point) == method.tokens(point)
    assert small.facts() == method.facts()
    assert small.facts()["deployed_gflops"] == small.cost(0.5).forward / 1e9
    assert not list(small.masks.buffers())


@pytest.fixture(scope="module", params=["", "s2vite.keep=0.5"])
def run(request, tmp_path_factory):
    output = tmp_path_factory.mktemp("s2vite")
    words = [
        word for word in (*TINY, "method=s2vite", "train.batch_size=8", "train.ema_decay=0.9", request.param) if word
    ]
    config = recipes.get("digits").with_settings(words)
    fit(config, output)
    return output


@pytest.mark.parametrize("ema", [False, True])
def test_a_run_is_opened_exported_and_pushed_as_the_smaller_model(run, tmp_path, ema):
    opened = load_run(run, HERE.device, ema=ema)
    selects = opened.method.name == "s2vite"
    assert opened.settings == {"block_heads": [2, 2], "block_neurons": [57, 57]}
    point = opened.method.points()[0]
    facts = opened.method.facts()
    assert facts["deployed_gflops"] == opened.method.cost(point).forward / 1e9 < facts["published_gflops"]
    if selects and not ema:
        assert export.export(opened, tmp_path / "model.pt2", point=point) < 1e-4
    if selects:
        with pytest.raises(ValueError, match="predicts in the way of method s2vite, which no published folder tells"):
            opened.published()
        return
    hub.save(tmp_path / "pushed", opened.published(), "# A card")
    again = hub.load(tmp_path / "pushed")
    images = images_of(opened.method)
    torch.testing.assert_close(again.model(images), opened.method.predict(images))
    assert again.settings["block_heads"] == [2, 2]


def test_models_are_pruned_block_by_block():
    with pytest.raises(ValueError, match="block_heads names 1 counts and block_neurons 2; both name one a block"):
        create_model("deit_tiny_patch16_224", depth=2, block_heads=[1], block_neurons=[10, 20])
    for heads, message in (
        ([1], r"tell of 1 blocks, and the model has 2"),
        ([1, 4], r"block_heads keeps 4 of 3 in a block; it must be 1 to 3"),
    ):
        with pytest.raises(ValueError, match=message):
            create_model("deit_tiny_patch16_224", depth=2, block_heads=heads, block_neurons=[10] * len(heads))
    model = create_model("deit_tiny_patch16_224", depth=2, block_heads=[1, 2], block_neurons=[10, 20])
    assert [block.attn.qkv.weight.shape for block in model.blocks] == [(3 * 64, 192), (6 * 64, 192)]
    assert [block.mlp.fc2.in_features for block in model.blocks] == [10, 20]
    assert isinstance(model.blocks[0].attn.proj, nn.Linear)
    with pytest.raises(ValueError, match="tell of 1 blocks"):
        prune(model, [(torch.tensor([0]), torch.tensor([0]))])
