"""A-ViT: each test names the acceptance check of its specification that it is."""

from __future__ import annotations

import copy
import logging
import math
import os

import pytest
import torch
from memory_loader import MemoryLoader
from torch import nn

from pss import methods, recipes
from pss.attention import packed
from pss.inference import export, report, sweep
from pss.inference.opening import load_run
from pss.methods import Progress
from pss.methods.parts.halting import Halting, prior_loss
from pss.models.flops import macs, macs_of_tokens
from pss.runs.log import read_rows
from pss.runtime.processes import World
from pss.training.setup import Interrupted
from pss.training.trainer import Trainer

HERE = World(rank=0, size=1, device=torch.device("cpu"))
TINY = ["model.embed_dim=24", "train.epochs=2", "train.batch_size=8", "optim.warmup_epochs=1", "data.prefetch_gb=0"]


def build(*settings, depth=12, pool="token", std=0.3):
    """A-ViT with random weights that are large enough for tokens to differ."""
    own = ["method=avit", f"model.depth={depth}", f"model.global_pool={pool}", *settings]
    method = methods.build(recipes.get("digits").with_settings([*TINY, *own]), num_classes=4, steps_per_epoch=5)
    generator = torch.Generator().manual_seed(0)
    for parameter in method.parameters():
        nn.init.normal_(parameter, std=std, generator=generator)
    return method.eval()


def images(count=5):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def masked(method, some):
    return method.masked(method.model.embed(some))


def at(step=0):
    return Progress(step=step, total_steps=10, epoch=0, epochs=2, seed=0, rank=0)


def trace(scores, num_blocks=12, dtype=torch.float32):
    """Weights, ponder and blocks of one token whose scores are given, the last one repeated."""
    scores = [*scores, *[scores[-1]] * (num_blocks - len(scores))]
    state, weights = Halting.begin((1,), torch.device("cpu")), []
    for number, score in enumerate(scores):
        state, weight = state.after(torch.tensor([score], dtype=dtype), last=number == num_blocks - 1, eps=0.01)
        weights.append(float(weight))
    return weights, float(state.ponder), int(state.blocks)


# The halting rule.


def test_check_1_neutral_gates():
    """A gate that never opens gives the dense model, to the bit; one that always does, its first block."""
    with torch.inference_mode():
        never = build("avit.gate_center=1e4")
        assert torch.equal(never.predict(images()), never.model(images()))
        assert torch.equal(never.predict_with_cost(images())[1], torch.full((5,), never.cost().forward).double())
        record = masked(never, images())
        torch.testing.assert_close(never.model.readout(never.model.norm(record.out)), never.model(images()))
        assert (record.blocks == 12).all()
        assert (record.ponder == 13).all()
        always = build("avit.gate_center=-1e4")
        model = always.model
        first = model.run_blocks(model.embed(images()), model.positions(None), stop=1)
        torch.testing.assert_close(always.predict(images()), model.readout(model.norm(first)))
        record = masked(always, images())
        assert (record.blocks == 1).all()
        assert (record.ponder == 2).all()


@pytest.mark.parametrize("center", [10, 0, -5])
def test_check_2_weights_add_up_to_1(center):
    record = masked(build(f"avit.gate_center={center}"), images())
    torch.testing.assert_close(record.weights.sum(1), torch.ones(5, 17), atol=1e-6, rtol=0)
    blocks = torch.arange(12)[:, None]
    assert (record.weights[blocks.expand(5, 12, 17) >= record.blocks[:, None]] == 0).all()


@pytest.mark.parametrize(
    ("scores", "weights", "ponder", "blocks"),
    [
        ((0.1, 0.3, 0.7), [0.1, 0.3, 0.6] + [0] * 9, 3.6, 3),
        ((0.2,), [0.2] * 5 + [0] * 7, 5.2, 5),
        ((0.05,), [0.05] * 11 + [0.45], 12.45, 12),
        ((0.995,), [1] + [0] * 11, 2, 1),
    ],
)
def test_check_3_traces_by_hand(scores, weights, ponder, blocks):
    found = trace(scores)
    assert found[0] == pytest.approx(weights, abs=1e-6)
    assert found[1:] == (pytest.approx(ponder, abs=1e-5), blocks)


def test_check_4_at_equality_a_token_halts():
    weights, ponder, blocks = trace([0.99])
    assert (sum(weights), ponder, blocks) == (1, 2, 1)


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize(
    "settings", [[], ["model.rel_pos=none"], ["model.rel_pos=separable"], ["avit.early_exit=false"]]
)
@pytest.mark.parametrize("short", [0, 10**6])  # tokens of an image: attended to one by one, or padded
def test_check_5_masked_equals_gathered(pool, settings, short, monkeypatch):
    """Logits and depths, with images that leave at different blocks, one of them after the first."""
    monkeypatch.setattr(packed, "_SHORT", short)
    seen = set()
    for center in (30, 5, 0, -12):
        method = build(f"avit.gate_center={center}", *settings, pool=pool)
        with torch.inference_mode():
            logits, costs = method.predict_with_cost(images())
            depths = method.depths(images())
            method.packs = False
            torch.testing.assert_close(logits, method.predict(images()), atol=1e-5, rtol=1e-5)
            assert torch.equal(depths, method.depths(images()))
            assert torch.equal(costs, method.predict_with_cost(images())[1])
        seen |= set(depths.flatten().tolist())
    assert 1 in seen
    assert len(seen) > 4


def test_check_5_rotary_positions_go_with_their_tokens():
    seen = set()
    for center in (5, 0, -5):
        method = build(f"avit.gate_center={center}", "model.rel_pos=rope", "model.embed_dim=48", std=0.2)
        with torch.inference_mode():
            logits, depths = method._run(images())
            method.packs = False
            torch.testing.assert_close(logits, method.predict(images()), atol=1e-5, rtol=1e-5)
        seen |= set(depths.flatten().tolist())
    assert len(seen) > 4


def test_check_6_what_has_halted_is_seen_by_nothing():
    """Neither its vector nor a gradient passes, also where a whole image has halted."""
    method = build(depth=3)
    model, positions = method.model, method.model.positions(None)
    tokens = model.embed(images()).detach().requires_grad_()
    active = torch.ones(5, 17)
    active[:, 3] = active[1] = 0
    mask = -1000.0 * (1 - active)[:, None, None]

    def through(x):
        return model.run_blocks(x, positions, 0, 1, attn_mask=mask) * active[..., None]

    noise = tokens + 100 * (1 - active)[..., None] * torch.randn(tokens.shape)
    found = through(tokens)
    torch.testing.assert_close(through(noise), found, atol=1e-6, rtol=0)
    (found**2).sum().backward()
    assert found.isfinite().all()
    assert (tokens.grad[active == 0] == 0).all()
    assert (tokens.grad[active == 1] != 0).any()


def test_check_6_later_blocks_send_no_gradient_to_what_has_halted():
    """Into what a block returns for a patch that halts there, or has before; the classifier reads the class token. To
    the blocks after it the patch is a vector of zeros."""
    method, outputs, inputs = build("avit.gate_center=30"), [], []
    for block in method.model.blocks:
        block.register_forward_pre_hook(lambda block, given: inputs.append(given[0]))
        block.register_forward_hook(lambda block, given, output: (output.retain_grad(), outputs.append(output))[0])
    record = masked(method, images())
    record.out.pow(2).sum().backward()
    for number, output in enumerate(outputs[:-1]):
        halted = record.blocks[:, 1:] <= number + 1
        assert halted.any()
        assert (output.grad[:, 1:][halted] == 0).all()
        assert (output.grad[:, 1:][~halted] != 0).any()
        assert (inputs[number + 1][:, 1:][halted] == 0).all()


def test_check_7_gradient_of_the_ponder():
    scores = [torch.tensor([value], requires_grad=True) for value in (0.1, 0.3, 0.7)]
    state = Halting.begin((1,), torch.device("cpu"))
    for score in scores:
        state, _ = state.after(score, last=False, eps=0.01)
    assert float(state.active) == 0
    assert list(torch.autograd.grad(state.ponder.sum(), scores, materialize_grads=True)) == [-1, -1, 0]


# The prior.


def gaussian():
    target = torch.tensor([math.exp(-((number - 8) ** 2) / 2) for number in range(12)])
    return target / target.sum()


def test_check_8_values_of_the_prior():
    uniform = torch.full((1, 12, 5), 0.3)
    assert float(prior_loss(uniform, 8)) == pytest.approx(1.067125, abs=1e-5)
    assert float(prior_loss(uniform, 8, reference=True)) == pytest.approx(0.611067, abs=1e-5)
    right = gaussian()[None, :, None].expand(2, 12, 3)
    assert float(prior_loss(right, 8)) == pytest.approx(0, abs=1e-4)
    assert float(prior_loss(right, 8, reference=True)) > 0.3
    assert prior_loss(torch.zeros(1, 12, 5), 8).isfinite()


def test_check_8_the_prior_is_of_patches_that_are_there():
    method = build("avit.gate_center=0", pool="avg", std=0.2)
    prior = method(images(1), torch.tensor([1]), at())["prior"]
    record = masked(method, images(1))
    assert prior.isfinite()
    torch.testing.assert_close(prior, prior_loss(record.scores[:, :, 1:], 8))
    assert not torch.allclose(prior, prior_loss(record.scores, 8))  # the class token is not in it
    halted = torch.arange(12)[:, None] >= record.blocks[:, None]
    assert halted.any()
    assert (record.scores[halted] == 0).all()
    assert (record.scores[~halted] > 0.5).any()


def test_check_8_scores_of_halted_tokens_as_published():
    """With no queries, keys and values but their bias, attention returns the same for all."""
    method = build("avit.gate_center=0", "avit.reference=true", depth=3, std=0.2)
    last = method.model.blocks[2]
    nn.init.zeros_(last.attn.qkv.weight)
    values = last.attn.qkv.bias.chunk(3)[2]
    scores = masked(method, images())
    halted = scores.blocks < 3
    assert halted.any()
    assert not halted.all()
    with torch.no_grad():
        left = last.attn.proj(values) + last.mlp(torch.zeros(24))
        expected = torch.sigmoid(method.own.gate_scale * left[0] - method.gate_center)
    torch.testing.assert_close(scores.scores[:, 2][halted], expected.expand(int(halted.sum())), atol=1e-6, rtol=1e-6)
    usual = build("avit.gate_center=0", depth=3, std=0.2)
    usual.load_state_dict(method.state_dict())
    torch.testing.assert_close(masked(usual, images()).out, scores.out)
    assert (masked(usual, images()).scores[:, 2][halted] == 0).all()


def test_the_target_keeps_its_place_in_models_of_other_depths():
    assert build(depth=6).target_depth == pytest.approx(4)
    assert build("avit.target_depth=2", depth=6).target_depth == 2
    with pytest.raises(ValueError, match=r"avit.target_depth is 6, and the model's 6 blocks are numbered from 0"):
        build("avit.target_depth=6", depth=6)
    scores = torch.full((1, 4, 5), 0.3)
    assert float(prior_loss(scores, 8 / 3)) > 0
    assert prior_loss(scores, 0.5, reference=True).isfinite()


def test_settings_that_nothing_reads_are_refused():
    for setting in ("avit.reference=true", "avit.target_depth=2"):
        with pytest.raises(ValueError, match=r"avit.alpha_prior above 0"):
            build("avit.alpha_prior=0", setting)
    assert "prior" not in build("avit.alpha_prior=0")(images(), torch.zeros(5, dtype=torch.int64), at())
    with pytest.raises(ValueError, match=r"avit.reference takes blocks apart.*train.parallel=ddp"):
        build("avit.reference=true", "train.parallel=fsdp")


# Costs.


def test_check_9_multiply_accumulates():
    with torch.device("meta"):
        small, tiny = (
            methods.build(recipes.get(name).with_settings(["model.weights=none"]), 1000, 5)
            for name in ("avit-s", "avit-ti")
        )
    assert (macs(small.model), macs(tiny.model)) == (4_598_882_304, 1_253_683_200)
    assert small.cost().forward == 4_598_882_304
    depths = torch.full((2, 197), 12)
    depths[0, 99:] = 9
    depths[1], depths[1, 0] = 8, 12
    assert (small.macs_of(depths) / 1e9).tolist() == pytest.approx([4.0118, 3.0924], abs=5e-5)
    assert int(small.macs_of(depths)[0]) == macs_of_tokens(small.model, [197] * 9 + [99] * 3)
    assert tiny.macs_of(torch.full((1, 197), 12)).tolist() == [1_253_683_200]
    assert tiny.macs_of(torch.full((1, 197), 1)).tolist() == [29_093_376 + 102_049_152]


def test_costs_are_of_the_tokens_that_are_there():
    """An image leaves with its class token; the published code lets its patches go on."""
    method = build("avit.gate_center=-2", std=0.2)
    with torch.inference_mode():
        depths = method._run(images())[1]
        logits, costs = method.predict_with_cost(images())
    counts = [[int((one > number).sum()) for number in range(12)] for one in depths]
    assert costs.tolist() == [macs_of_tokens(method.model, count) for count in counts]
    assert len(set(costs.tolist())) > 1
    assert (depths[:, 0] == depths.amax(1)).all()
    published = build("avit.gate_center=-2", "avit.early_exit=false", std=0.2)
    with torch.inference_mode():
        same, more = published.predict_with_cost(images())
        assert torch.equal(published.depths(images()), masked(method, images()).blocks[:, 1:].long())
    torch.testing.assert_close(same, logits)
    assert (more > costs).all()


# In the harness.


def test_check_10_nothing_is_remembered():
    method = build("avit.gate_center=0").train()
    first = method(images(4), torch.tensor([0, 1, 2, 3]), at())
    method(images(3), torch.tensor([0, 1, 2]), at())
    again = method(images(4), torch.tensor([0, 1, 2, 3]), at())
    assert all(torch.equal(first[name], again[name]) for name in first)
    again["loss"].backward()
    copied = copy.deepcopy(method)
    assert torch.equal(copied(images(4), torch.tensor([0, 1, 2, 3]), at())["loss"], first["loss"])
    dense = methods.build(method.config.with_method("dense"), num_classes=4, steps_per_epoch=5)
    assert [p.shape for p in method.parameters()] == [p.shape for p in dense.parameters()]
    assert set(method.model.state_dict()) == set(dense.model.state_dict())


def test_activations_computed_twice_in_the_published_form():
    grads = []
    for again in (False, True):
        method = build("avit.gate_center=0", "avit.reference=true", depth=3).train()
        method.model.checkpoint_activations = again
        method(images(), torch.zeros(5, dtype=torch.int64), at())["loss"].backward()
        grads.append([parameter.grad for parameter in method.parameters()])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two)


def test_attention_weights_are_those_of_the_masked_blocks():
    method = build("avit.gate_center=0")
    first, last = method.attention_maps(images(), blocks=(0, 11))
    blocks = masked(method, images()).blocks
    hidden = (blocks <= 11) & (blocks.amax(1, keepdim=True) == 12)
    assert hidden.any()
    assert (last.amax((1, 2))[hidden] == 0).all()
    assert (first > 0).all()


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_centre_is_found_for_a_depth(share):
    method = build(f"avit.initial_depth={share}", pool="avg")
    before = masked(method, images()).blocks.mean() / 12
    method.train().begin_run(images())
    assert method.training
    found = float(masked(method.eval(), images()).blocks.mean()) / 12
    assert found == pytest.approx(share, abs=0.1)
    assert abs(found - share) < abs(float(before) - share)
    given = build("avit.gate_center=0", pool="avg")
    given.begin_run(images())
    assert given.gate_center == 0


def test_the_centre_is_found_once_and_kept(tmp_path):
    config = configured("avit.gate_center=none", "train.ema_decay=0.9", "optim.lr=1e-2")
    whole = trainer(config, tmp_path / "whole")
    before = float(whole.method.gate_center)
    whole.fit()
    found = float(whole.method.gate_center)
    assert found != before
    assert float(whole.ema.module.gate_center) == found
    with pytest.raises(Interrupted):
        trainer(config, tmp_path / "parts", on_batch=lambda step: step == 3 and os.kill(os.getpid(), 15)).fit()
    resumed = trainer(config, tmp_path / "parts")
    assert float(resumed.method.gate_center) == found
    resumed.fit()
    assert float(resumed.method.gate_center) == found


def trainer(config, output, **options):
    output.mkdir(exist_ok=True)
    (output / "config.json").write_text(config.to_json(), encoding="utf-8")
    loaders = MemoryLoader(40, **options), MemoryLoader(40, train=False)
    return Trainer(config, *loaders, classes=["a", "b", "c", "d"], output=output, world=HERE)


def configured(*settings):
    own = ["model.depth=4", "method=avit", "avit.gate_center=1", *settings]
    return recipes.get("digits").with_settings([*TINY, *own])


def test_a_gate_that_does_not_suit_the_weights_is_said_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="pss.methods.avit"):
        trainer(configured("avit.gate_center=-20", "train.max_steps=3"), tmp_path / "low").fit()
        trainer(configured("avit.gate_center=8", "train.max_steps=3"), tmp_path / "high").fit()
    (told,) = [record for record in caplog.records if record.name == "pss.methods.avit"]
    assert "after 25% of the blocks in the first step already: raise avit.gate_center, which is -20, or" in told.message


def test_the_depth_of_an_epoch_is_in_its_row_also_where_it_was_interrupted(tmp_path):
    config = configured("train.log_every_steps=1")
    trainer(config, tmp_path / "whole").fit()
    rows = [row["train_depth"] for row in read_rows(tmp_path / "whole", "epoch")]
    steps = [row["depth"] for row in read_rows(tmp_path / "whole", "step")]
    assert rows == pytest.approx([sum(steps[:5]) / 5, sum(steps[5:]) / 5], abs=1e-4)
    assert all({"ponder", "prior"} <= row.keys() for row in read_rows(tmp_path / "whole", "step"))
    with pytest.raises(Interrupted):
        trainer(config, tmp_path / "cut", on_batch=lambda step: step == 7 and os.kill(os.getpid(), 15)).fit()
    trainer(config, tmp_path / "cut").fit()
    assert [row["train_depth"] for row in read_rows(tmp_path / "cut", "epoch")] == rows


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    output = tmp_path_factory.mktemp("avit")
    trainer(configured("train.max_steps=5"), output).fit()
    run = load_run(output, HERE.device)
    generator = torch.Generator().manual_seed(0)
    for parameter in run.method.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return run


def test_depths_are_shown_in_the_gallery(run, tmp_path):
    found = sweep.sweep(
        [run], names=["run"], points=None, batch_size=4, world=HERE,
        make_loader=lambda data: MemoryLoader(40, train=False),
    )  # fmt: skip
    (row,) = found.rows
    assert row["gflops_low"] < row["gflops_high"]
    (exhibit,) = found.exhibits
    assert any(len(set(picture.views[0].depths)) > 1 for picture in exhibit.pictures)
    report.write(found, [run], ["run"], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "as trained" in text


@pytest.mark.parametrize("suffix", ["pt2", pytest.param("onnx", marks=pytest.mark.exhaustive)])
def test_it_is_exported_with_tokens_that_halt(run, tmp_path, suffix):
    with torch.inference_mode():
        assert len(set(run.method.depths(images()).flatten().tolist())) > 1
    assert export.export(run, tmp_path / f"model.{suffix}", point=None) < 1e-4
