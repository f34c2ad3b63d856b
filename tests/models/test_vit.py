"""The sampled model against timm's plain one, and against a reference that sees the kept patches only."""

import copy
import math
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pss.attention.attend import Attention
from pss.models.create import create_model
from pss.models.maps import attention_maps
from pss.models.sampling import gather, num_kept_tokens, step_generator
from pss.models.sampling import spread as spread_of_patches
from pss.models.vit import VisionTransformer

TINY: dict[str, Any] = {
    "num_classes": 7,
    "img_size": (16, 24),
    "patch_size": 4,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 3,
}


def tiny(name: str = "vit_tiny_patch16_224", *, spread: float = 0.0, **options: Any) -> VisionTransformer:
    """A model of a few thousand parameters on a 4 x 6 grid; `spread` moves every parameter off its initial value."""
    torch.manual_seed(0)
    model = create_model(name, **(TINY | options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return model.eval()


def images(count: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, 16, 24, generator=torch.Generator().manual_seed(1), dtype=dtype)


# Equal to timm at rho = 1.


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deit_tiny_patch16_224", {"depth": 3}),
        ("deit_small_patch16_224", {}),
        ("deit_tiny_distilled_patch16_224", {"depth": 2}),
        ("vit_tiny_patch16_224", {"depth": 2, "drop_rate": 0.2, "pos_drop_rate": 0.1, "attn_drop_rate": 0.1}),
        ("vit_tiny_patch16_224", {"depth": 2, "drop_path_rate": 0.5, "init_values": 0.1, "proj_drop_rate": 0.1}),
        ("vit_tiny_patch16_224", {"depth": 2, "global_pool": "avg", "reg_tokens": 3, "no_embed_class": True}),
        ("vit_tiny_patch16_224", {"depth": 2, "global_pool": "avgmax", "class_token": False, "pos_embed": "none"}),
        ("vit_tiny_patch16_224", {"depth": 2, "global_pool": "max", "pool_include_prefix": True, "qk_norm": True}),
        ("vit_base_patch16_clip_224", {"depth": 2, "embed_dim": 96, "num_heads": 3}),
    ],
)
def test_at_rho_1_logits_are_timms_bit_for_bit(name: str, options: dict[str, Any], training: bool) -> None:
    plain = timm.create_model(name, num_classes=10, **options)
    ours = create_model(name, num_classes=10, **options)
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 224, 224)
    logits = []
    for model in (plain, ours):
        model.train(training)
        torch.manual_seed(3)
        with torch.no_grad():
            logits.append(model(x))
    assert torch.equal(*logits)


def test_at_rho_1_gradients_are_timms_bit_for_bit() -> None:
    plain = timm.create_model("vit_tiny_patch16_224", **TINY)
    ours = tiny()
    ours.load_state_dict(plain.state_dict())
    for model in (plain, ours):
        F.cross_entropy(model(images()), torch.tensor([1, 2])).backward()
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter.grad, gradients[name]), name  # type: ignore[arg-type]


def test_same_seed_initialises_as_timm_does() -> None:
    torch.manual_seed(5)
    plain = timm.create_model("deit_tiny_patch16_224", depth=2)
    torch.manual_seed(5)
    ours = create_model("deit_tiny_patch16_224", depth=2)
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in plain.state_dict().items())


# Equal to a reference on the kept patches at rho < 1.


def reference_logits(model: VisionTransformer, image: Tensor, patches: list[int]) -> Tensor:
    """One image (3, height, width) through `model`, as if the image consisted of these patches: parameters by name,
    plain arithmetic, nothing of the code under test."""
    p = dict(model.named_parameters())
    rows, columns, side = 4, 6, 4
    heads = 3

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]
        )

    embedded = []
    for patch in patches:
        top, left = patch // columns * side, patch % columns * side
        pixels = image[:, top : top + side, left : left + side].flatten()
        embedded.append(p["patch_embed.proj.weight"].flatten(1) @ pixels + p["patch_embed.proj.bias"])
    prefix = [token for name in ("cls_token", "dist_token", "reg_token") if name in p for token in p[name][0]]
    tokens = torch.stack(prefix + embedded)
    if "pos_embed" in p:
        tokens = tokens + p["pos_embed"][0, [*range(len(prefix)), *(len(prefix) + patch for patch in patches)]]

    places = [None] * len(prefix) + [divmod(patch, columns) for patch in patches]
    for number in range(len(model.blocks)):
        block = f"blocks.{number}"
        x = norm(tokens, f"{block}.norm1")
        projected = x @ p[f"{block}.attn.qkv.weight"].T
        if f"{block}.attn.q_bias" in p:
            width = tokens.shape[1]
            projected = projected + F.pad(p[f"{block}.attn.q_bias"], (0, 2 * width))
            projected = projected + F.pad(p[f"{block}.attn.v_bias"], (2 * width, 0))
        else:
            projected = projected + p[f"{block}.attn.qkv.bias"]
        outputs = []
        for head, (q, k, v) in enumerate(
            zip(*(part.chunk(heads, dim=1) for part in projected.chunk(3, 1)), strict=True)
        ):
            logits = q @ k.T / math.sqrt(q.shape[1])
            if f"{block}.attn.relative_position_bias_table" in p:
                table = p[f"{block}.attn.relative_position_bias_table"][:, head]
                offsets = table[:-3].reshape(2 * rows - 1, 2 * columns - 1)
                bias = [
                    [
                        table[-1]
                        if query is None and key is None
                        else table[-3]
                        if query is None
                        else table[-2]
                        if key is None
                        else offsets[query[0] - key[0] + rows - 1, query[1] - key[1] + columns - 1]
                        for key in places
                    ]
                    for query in places
                ]
                logits = logits + torch.stack([torch.stack(row) for row in bias])
            outputs.append(logits.softmax(1) @ v)
        x = torch.cat(outputs, 1) @ p[f"{block}.attn.proj.weight"].T + p[f"{block}.attn.proj.bias"]
        tokens = tokens + x * p.get(f"{block}.ls1.gamma", 1)
        x = norm(tokens, f"{block}.norm2") @ p[f"{block}.mlp.fc1.weight"].T + p[f"{block}.mlp.fc1.bias"]
        x = x * (1 + torch.erf(x / math.sqrt(2))) / 2
        x = x @ p[f"{block}.mlp.fc2.weight"].T + p[f"{block}.mlp.fc2.bias"]
        tokens = tokens + x * p.get(f"{block}.ls2.gamma", 1)

    if model.global_pool == "avg":
        features = norm(tokens[len(prefix) :].mean(0), "fc_norm")
        return p["head.weight"] @ features + p["head.bias"]
    tokens = norm(tokens, "norm")
    logits = p["head.weight"] @ tokens[0] + p["head.bias"]
    if "head_dist.weight" in p:
        logits = (logits + p["head_dist.weight"] @ tokens[1] + p["head_dist.bias"]) / 2
    return logits


@pytest.mark.parametrize("sort", ["magnitude", "random"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {"rel_pos": "bias", "reg_tokens": 2}),
        ("deit_tiny_distilled_patch16_224", {"rel_pos": "bias"}),
        (
            "vit_tiny_patch16_224",
            {"rel_pos": "bias", "pos_embed": "none", "global_pool": "avg", "qkv_bias": "qv", "init_values": 0.5},
        ),
    ],
)
def test_sampled_logits_and_all_gradients_equal_a_reference_on_the_kept_patches(
    name: str, options: dict[str, Any], sort: Any
) -> None:
    model = tiny(name, spread=0.2, sort=sort, **options).double()
    x = images(2, torch.float64)
    logits = model(x, rho=0.4, generator=step_generator(0, 0, 0))
    _, kept = model.sample(model.embed(x), 0.4, generator=step_generator(0, 0, 0))
    assert kept is not None
    assert kept.shape == (2, num_kept_tokens(0.4, 24, model.num_prefix_tokens) - model.num_prefix_tokens)
    expected = torch.stack([reference_logits(model, x[i], kept[i].tolist()) for i in range(2)])
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)

    direction = torch.randn_like(logits)
    parameters = dict(model.named_parameters())
    ours = torch.autograd.grad((logits * direction).sum(), list(parameters.values()))
    theirs = torch.autograd.grad((expected * direction).sum(), list(parameters.values()))
    for parameter, gradient, reference in zip(parameters, ours, theirs, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-9, msg=parameter)


def test_magnitude_reads_the_tokens_with_their_position_embedding() -> None:
    model = tiny()
    chosen = [3, 11, 20]
    with torch.no_grad():
        model.pos_embed[0, [1 + patch for patch in chosen]] += 100  # type: ignore[index]
    tokens, kept = model.sample(model.embed(images()), rho=4 / 25)
    assert kept is not None
    assert kept.tolist() == [chosen, chosen]
    assert tokens.shape == (2, 4, 24)


# Laws of the sampling.


@given(seed=st.integers(0, 2**31), rho=st.sampled_from([0.2, 0.4, 0.6, 0.8, 1.0]))
@settings(max_examples=20)
def test_permuting_patches_permutes_the_kept_ones_and_leaves_the_logits(seed: int, rho: float) -> None:
    model = tiny(spread=0.2, pos_embed="none")
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 3, 16, 24, generator=generator)
    order = torch.randperm(24, generator=generator)
    patches = x.view(1, 3, 4, 4, 6, 4).transpose(3, 4).flatten(2, 3)  # (1, 3, 24, 4, 4)
    permuted = patches[:, :, order].view(1, 3, 4, 6, 4, 4).transpose(3, 4).reshape(1, 3, 16, 24)

    torch.testing.assert_close(model(permuted, rho), model(x, rho), rtol=0, atol=1e-5)
    (_, kept), (_, kept_of_permuted) = (model.sample(model.embed(image), rho) for image in (x, permuted))
    if rho < 1:
        assert kept is not None
        assert kept_of_permuted is not None
        assert sorted(order[kept_of_permuted[0]].tolist()) == kept[0].tolist()


@pytest.mark.parametrize("sort", ["magnitude", "random"])
def test_dropped_patches_leave_no_trace_in_the_position_embedding(sort: Any) -> None:
    model = tiny(spread=0.1, sort=sort)
    x = images(1)
    model(x, rho=0.4, generator=step_generator(1, 2, 3)).sum().backward()
    _, kept = model.sample(model.embed(x), 0.4, generator=step_generator(1, 2, 3))
    assert kept is not None
    gradient = model.pos_embed.grad[0]  # type: ignore[union-attr, index]
    touched = {0, *(1 + patch for patch in kept[0].tolist())}
    assert {position for position in range(25) if gradient[position].any()} == touched


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reg_tokens": 2, "no_embed_class": True},
        {"pos_embed": "none", "rel_pos": "bias"},
        {"class_token": False, "global_pool": "avg", "pre_norm": True},
    ],
)
def test_embedding_only_what_a_random_choice_keeps_gives_the_same_tokens_and_gradients(options: dict[str, Any]) -> None:
    model = tiny(spread=0.2, sort="random", **options).double().train()
    x = images(3, torch.float64)
    results = []
    for few in (True, False):
        generator = step_generator(1, 2, 3)
        tokens, kept = (
            model.see(x, 0.4, generator=generator) if few else model.sample(model.embed(x), 0.4, generator=generator)
        )
        model.zero_grad()
        tokens.square().sum().backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        results.append((kept, tokens, *gradients))
    for ours, full in zip(*results, strict=True):
        torch.testing.assert_close(ours, full, rtol=1e-12, atol=1e-12)
    tokens, kept = model.see(x, 1.0)
    assert kept is None
    assert torch.equal(tokens, model.embed(x))


def test_at_rho_1_the_tokens_pass_untouched() -> None:
    model = tiny(rel_pos="bias")
    tokens = model.embed(images())
    for sort in ("magnitude", "random"):
        same, kept = model.sample(tokens, 1.0, sort)  # type: ignore[arg-type]
        assert same is tokens
        assert kept is None
    assert model.positions(None).shape == (2, 1, 25)  # type: ignore[union-attr]


def test_aligned_counts_are_what_the_blocks_see() -> None:
    model = tiny(token_counts="aligned")
    for rho, count in ((0.2, 8), (0.6, 16), (0.9, 24), (1.0, 25)):
        tokens, kept = model.sample(model.embed(images()), rho)
        assert tokens.shape[1] == model.num_kept_tokens(rho) == count
        assert (kept is None) == (rho == 1)


def test_training_and_evaluation_obey_rho_and_nothing_is_remembered() -> None:
    model = tiny(spread=0.1)
    x = images()
    dense = model(x)
    sampled = model(x, rho=0.4)
    assert not torch.allclose(dense, sampled)
    assert torch.equal(model(x), dense)
    assert torch.equal(model.train()(x, rho=0.4), sampled)
    assert torch.equal(copy.deepcopy(model)(x, rho=0.4), sampled)


def test_random_sort_draws_from_the_given_or_the_default_generator() -> None:
    model = tiny(spread=0.1)
    x = images()

    def logits(step: int) -> Tensor:
        result: Tensor = model(x, rho=0.4, sort="random", generator=step_generator(0, step, 0))
        return result

    assert torch.equal(logits(1), logits(1))
    assert not torch.equal(logits(1), logits(2))
    torch.manual_seed(7)
    first = model(x, rho=0.4, sort="random")
    second = model(x, rho=0.4, sort="random")
    torch.manual_seed(7)
    assert torch.equal(model(x, rho=0.4, sort="random"), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("rel_pos", ["bias", "separable"])
def test_a_new_position_bias_changes_nothing_until_it_is_trained(rel_pos: str) -> None:
    plain, biased = tiny(), tiny(rel_pos=rel_pos)
    assert biased.rel_pos == rel_pos
    biased.load_state_dict(plain.state_dict(), strict=False)
    for rho in (0.4, 1.0):
        torch.testing.assert_close(biased(images(), rho), plain(images(), rho), rtol=0, atol=1e-6)
    biased(images(), 0.4).sum().backward()
    (new,) = {name for name, _ in biased.blocks[0].named_parameters()} - set(dict(plain.blocks[0].named_parameters()))
    for block in biased.blocks:
        assert block.get_parameter(new).grad.any()  # type: ignore[union-attr]


def test_rotary_embedding_turns_the_kept_patches_by_their_own_position() -> None:
    plain, turned = tiny(spread=0.2, reg_tokens=2), tiny(spread=0.2, reg_tokens=2, rel_pos="rope")
    assert turned.state_dict().keys() == plain.state_dict().keys()
    x = images()
    for rho in (0.4, 1.0):
        assert not torch.allclose(plain(x, rho), turned(x, rho), atol=1e-3)
    every = turned.positions(None)
    kept = torch.tensor([[1, 2, 23], [0, 5, 6]])
    some = turned.positions(kept)
    assert every is not None
    assert some is not None
    assert every.shape == (1, 27, 16)
    assert torch.equal(some[:, :3], every[:, :3].expand(2, -1, -1))
    assert torch.equal(some[:, 3:], every[0, 3 + kept])
    assert torch.equal(every[0, 0], torch.cat((torch.zeros(8), torch.ones(8))))


# Building models.


def test_size_properties() -> None:
    model = tiny(reg_tokens=2)
    assert (model.grid_size, model.num_patches, model.num_prefix_tokens, model.num_tokens) == ((4, 6), 24, 3, 27)
    assert (model.embed_dim, model.num_classes, model.rel_pos) == (24, 7, "none")
    assert model.no_weight_decay() == timm.create_model("vit_tiny_patch16_224", **TINY).no_weight_decay()


@pytest.mark.parametrize("img_size", [224, 384])
def test_simmim_preset(img_size: int) -> None:
    model = create_model("simmim_base_patch16", num_classes=10, img_size=img_size, depth=2)
    names = dict(model.named_parameters())
    grid = img_size // 16
    assert model.grid_size == (grid, grid)
    assert names["blocks.1.attn.relative_position_bias_table"].shape == ((2 * grid - 1) ** 2 + 3, 12)
    assert not names["blocks.1.attn.relative_position_bias_table"].any()
    assert "pos_embed" not in names
    assert {"fc_norm.weight", "cls_token", "blocks.0.attn.q_bias", "blocks.0.attn.v_bias"} <= names.keys()
    assert "norm.weight" not in names
    assert "blocks.0.attn.qkv.bias" not in names
    assert names["blocks.0.ls2.gamma"].unique().item() == pytest.approx(0.1)
    assert model(torch.randn(1, 3, img_size, img_size), rho=0.2).shape == (1, 10)


def test_published_initialisation() -> None:
    torch.manual_seed(0)
    model = create_model("deit_small_patch16_224", depth=8, init="published", rel_pos="bias")
    for number, block in enumerate(model.blocks, start=1):
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            assert weight.std().item() == pytest.approx(0.02 / math.sqrt(2 * number), rel=0.02)
        assert block.attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert not block.attn.relative_position_bias_table.any()
        assert not block.mlp.fc1.bias.any()
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.02)
    assert not model.head.bias.any()  # type: ignore[operator]
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.2)  # type: ignore[union-attr]
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.02)  # type: ignore[union-attr]
    assert model.patch_embed.proj.weight.std().item() == pytest.approx(0.02, rel=0.02)  # torch's default: 0.0208
    assert model.patch_embed.proj.weight.abs().max() > 0.06  # and no uniform one, which ends at 0.036
    assert not model.patch_embed.proj.bias.any()  # type: ignore[union-attr]


def test_a_model_without_classes_returns_features() -> None:
    model = tiny(num_classes=0)
    assert isinstance(model.head, nn.Identity)
    assert model(images(), rho=0.4).shape == (2, 24)


def test_distilled_model_averages_its_heads() -> None:
    model = tiny("deit_tiny_distilled_patch16_224", spread=0.1)
    tokens = model.trunk(model.embed(images()), None)
    assert model.pooled(tokens).shape == (2, 24)
    expected = (model.head(tokens[:, 0]) + model.head_dist(tokens[:, 1])) / 2  # type: ignore[misc]
    torch.testing.assert_close(model.readout(tokens), expected)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("deit_smal_patch16_224", {}, "did you mean .*deit_small_patch16_224"),
        ("simmim_base_patch", {}, "simmim_base_patch16"),
        ("resnet50", {}, "'resnet50'"),
        ("vit_base_patch16_siglip_224", {"depth": 1}, "not a plain Vision Transformer"),
        ("vit_tiny_patch16_224", {"block_fn": timm.models.vision_transformer.ResPostBlock}, "not a plain"),
        ("vit_tiny_patch16_224", {"img_size": 230}, "230.* multiple .*16"),
        ("vit_tiny_patch16_224", {"img_size": (224, 100)}, "100.* multiple .*16"),
        ("vit_tiny_patch16_224", {"colour": "red"}, "colour"),
        ("vit_tiny_patch16_224", {"num_heads": 5}, "divisible by num_heads"),
        ("vit_tiny_patch16_224", {"patch_drop_rate": 0.5}, "patch_drop_rate .* ρ"),
        ("vit_tiny_patch16_224", {"dynamic_img_size": True}, "dynamic_img_size"),
        ("vit_tiny_patch16_224", {"rel_pos": "alibi"}, "rel_pos .* 'alibi'"),
        ("vit_tiny_patch16_224", {"rel_pos": "rope", "embed_dim": 18}, "multiple of 4 wide, got 6"),
        ("vit_tiny_patch16_224", {"sort": "largest"}, "sort .* 'largest'"),
        ("vit_tiny_patch16_224", {"token_counts": "even"}, "token_counts .* 'even'"),
        ("vit_tiny_patch16_224", {"qkv_bias": "k"}, "qkv_bias .* 'k'"),
        ("vit_tiny_patch16_224", {"init": "zero"}, "init .* 'zero'"),
        ("simmim_base_patch16", {"rel_pos": "none"}, "rel_pos='bias', got 'none'"),
    ],
)
def test_what_cannot_be_built(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(name, **options)


def test_what_forward_refuses() -> None:
    model = tiny()
    with pytest.raises(ValueError, match="16 x 24 pixels, got 24 x 16"):
        model(torch.zeros(1, 3, 24, 16))
    for rho in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"rho .* {rho}"):
            model(images(), rho)
    with pytest.raises(ValueError, match="'largest'"):
        model(images(), 0.5, sort="largest")  # type: ignore[arg-type]


# What other methods build on.


def test_blocks_hand_extra_arguments_to_their_attention() -> None:
    model = tiny(spread=0.1, rel_pos="bias")
    tokens = model.embed(images())
    positions = model.positions(None)
    visible = torch.ones(2, 1, 1, 25, dtype=torch.bool)
    visible[..., 20:] = False
    block = model.blocks[0]
    masked = block(tokens, positions, attn_mask=visible)
    kept = torch.arange(19).expand(2, -1)
    alone = block(tokens[:, :20], model.positions(kept))
    torch.testing.assert_close(masked[:, :20], alone, rtol=0, atol=1e-5)
    by_branches = tokens + block.attention_branch(tokens, positions)
    torch.testing.assert_close(block(tokens, positions), by_branches + block.mlp_branch(by_branches))


@pytest.mark.parametrize(
    "options", [{}, {"rel_pos": "bias", "global_pool": "avg"}, {"rel_pos": "separable"}, {"rel_pos": "rope"}]
)
def test_compiles_and_exports_in_one_piece(options: dict[str, Any]) -> None:
    model = tiny(spread=0.1, depth=1, **options)
    x = images()
    for rho in (0.4, 1.0):
        expected = model(x, rho)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, rho), expected, rtol=0, atol=1e-5)
        with torch.no_grad():
            exported = torch.export.export(model, (x, rho)).module()
            torch.testing.assert_close(exported(x, rho), expected, rtol=0, atol=1e-5)


# Images of lower resolution.


def enlarged(small: Tensor, places: Tensor) -> Tensor:
    """A full image (B, 3, 16, 24) that has the patches of a small one, (B, 3, 8, 12), at `places`; noise elsewhere."""
    full = images(len(small))
    for number, place in enumerate(places.tolist()):
        (row, column), (into_row, into_column) = divmod(number, 3), divmod(place, 6)
        patch = small[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        full[:, :, 4 * into_row : 4 * into_row + 4, 4 * into_column : 4 * into_column + 4] = patch
    return full


@pytest.mark.parametrize("rel_pos", ["none", "bias", "separable", "rope"])
@pytest.mark.parametrize("sort", ["magnitude", "random"])
@pytest.mark.parametrize("rho", [1.0, 0.6])
def test_a_small_image_is_a_large_one_of_which_its_patches_are_left(rel_pos: Any, sort: Any, rho: float) -> None:
    model = tiny(rel_pos=rel_pos, sort=sort, spread=0.1)
    small = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(2))
    places = spread_of_patches((2, 3), (4, 6))
    assert places.tolist() == [0, 2, 5, 18, 20, 23]
    tokens, kept = model.see(small, rho, None, step_generator(0, 0, 0), low_resolution=True)
    assert kept is not None
    assert kept.shape == ((6,) if rho == 1 else (2, 3))  # of 7 tokens 4
    assert set(kept.flatten().tolist()) <= set(places.tolist())
    everywhere = kept.expand(2, -1)
    expected = gather(model.embed(enlarged(small, places)), everywhere, 1)
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-6)
    logits = model(small, rho, generator=step_generator(0, 0, 0), low_resolution=True)
    torch.testing.assert_close(logits, model.readout(model.trunk(expected, everywhere)), rtol=1e-4, atol=1e-5)


def test_the_size_of_images_is_checked() -> None:
    model = tiny(rel_pos="bias")
    small = torch.zeros(1, 3, 8, 12)
    with pytest.raises(ValueError, match="takes images of 16 x 24 pixels, got 8 x 12"):
        model(small)
    assert torch.equal(model(images(), 0.6, low_resolution=True), model(images(), 0.6))
    for size in ((8, 13), (20, 24), (0, 12)):
        with pytest.raises(ValueError, match=f"images of {size[0]} x {size[1]} pixels do not suit this model"):
            model(torch.zeros(1, 3, *size), low_resolution=True)
    assert model.num_kept_tokens(0.6, (8, 12)) == num_kept_tokens(0.6, 6, 1) == 4


class Telling(Attention):
    """Attention that returns what it looked at, too."""

    def forward(self, x, positions=None):
        return super().forward(x, positions), self.weights(x, positions)


@pytest.mark.parametrize("rel_pos", ["none", "bias", "separable", "rope"])
@pytest.mark.parametrize("again", [False, True])
def test_attention_of_ones_own_may_tell_more(rel_pos, again):
    model = tiny(rel_pos=rel_pos).eval()
    model.checkpoint_activations = again
    seen = images()
    tokens, kept = model.see(seen, 0.5)
    plain = model.run_blocks(tokens, model.positions(kept))
    for block in model.blocks:
        block.attn = Telling(block.attn)
    extras = []
    told = model.run_blocks(tokens, model.positions(kept), extras=extras)
    torch.testing.assert_close(told, plain)
    assert len(extras) == len(model.blocks)
    for weights, alone in zip(extras, attention_maps(model, tokens, kept), strict=True):
        torch.testing.assert_close(weights, alone)
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


@pytest.mark.parametrize("rel_pos", ["none", "bias", "separable", "rope"])
def test_weights_are_those_that_attention_uses(rel_pos):
    model = tiny(rel_pos=rel_pos).eval()
    for name, table in model.named_parameters():
        if name.endswith("position_bias_table"):
            torch.nn.init.normal_(table)
    tokens, kept = model.see(images(), 0.5)
    positions, attention = model.positions(kept), model.blocks[0].attn
    _, _, v = attention.project_in(tokens, positions)
    by_weights = attention.project_out(attention.weights(tokens, positions) @ v)
    torch.testing.assert_close(by_weights, attention(tokens, positions), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("divisor", "added"), [(1.0, 2.0), (2.0, 1.0), (3.0, 2 / 3)])
def test_residual_branches_are_divided(divisor, added):
    """LV-ViT's scaling: with branches that are one everywhere, a block adds 2 / divisor."""
    block = tiny().blocks[0]
    block.residual_divisor = divisor
    for layer in (block.attn.proj, block.mlp.fc2):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.ones_(layer.bias)
    tokens = torch.randn(2, 5, block.norm1.weight.numel())
    torch.testing.assert_close(block(tokens) - tokens, torch.full_like(tokens, added))
