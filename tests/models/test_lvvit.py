"""LV-ViT: what its specification can be checked by on a CPU (the numbers are its checks')."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipelines.base import DataConfig
from pss.inference import hub
from pss.inference.opening import open_run
from pss.models import lvvit
from pss.models.create import create_model
from pss.models.flops import block_macs, macs
from pss.models.lvvit import LVViT
from pss.models.weights import load_weights, settings_of, start_from

SMALL: dict[str, Any] = {
    "num_classes": 4, "img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "stem_width": 8,
}  # fmt: skip


def small(seed: int = 0, name: str = "lvvit_s", **options: Any) -> LVViT:
    """With weights, and statistics, that tell everything apart."""
    torch.manual_seed(seed)
    model = create_model(name, **(SMALL | options)).eval()
    assert isinstance(model, LVViT)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
    return model


def on_paper(name: str, size: int = 224) -> LVViT:
    with torch.device("meta"):
        model = create_model(name, img_size=size)
    assert isinstance(model, LVViT)
    return model


def bare(model: nn.Module) -> dict[str, Tensor]:
    """Its state as the authors save it: tensors alone."""
    return {name: value for name, value in model.state_dict().items() if name != "_extra_state"}


def images(side: int = 32, count: int = 2) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(9))


# 1. Shapes and counts.


@pytest.mark.parametrize(
    ("name", "size", "parameters", "cost", "stem"),
    [
        ("lvvit_t", 224, 8_534_720, 2_868_017_664, 1_235_533_824),
        ("lvvit_s", 224, 26_151_824, 6_551_485_440, 1_351_139_328),
        ("lvvit_m", 224, 55_830_544, 12_678_045_696, 1_453_899_776),
        ("lvvit_s", 384, 26_297_744, 21_896_432_640, None),
        ("lvvit_m", 384, 56_025_104, 41_637_912_576, None),
        ("lvvit_m", 448, 56_131_600, None, None),
        ("lvvit_l", 288, None, 58_693_527_552, None),
        ("lvvit_l", 448, 150_473_552, 155_116_357_632, None),
        ("lvvit_l", 512, 150_657_872, None, None),
    ],
)
def test_published_sizes_and_costs(name: str, size: int, parameters: int, cost: int, stem: int) -> None:
    """Check 1: to the unit."""
    model = on_paper(name, size)
    assert parameters in (None, sum(value.numel() for value in model.parameters()))
    assert cost in (None, macs(model))
    assert stem in (None, model.stem_macs(model.num_patches))


def test_a_block_and_the_classifier_of_patches_cost_what_they_should() -> None:
    for name, block, patches in (
        ("lvvit_t", 132_100_320, 47_040_000),
        ("lvvit_s", 320_293_632, 75_264_000),
        ("lvvit_m", 556_164_096, 100_352_000),
    ):
        model = on_paper(name)
        assert block_macs(model.blocks[0], 197) == block  # type: ignore[arg-type]
        assert model.readout_macs(197) - model.head.weight.numel() == patches  # type: ignore[union-attr, operator]
    assert model.readout_macs(2) == 2 * 512 * 1000


@pytest.mark.parametrize("rho", [1.0, 0.4])
def test_costs_are_what_is_computed(rho: float) -> None:
    model = small()
    with FlopCounterMode(display=False) as counter:
        model(images(count=1), rho)
    assert counter.get_total_flops() == 2 * macs(model, rho)


def test_names_are_those_of_the_authors() -> None:
    """Check 1."""
    state = bare(on_paper("lvvit_s"))
    assert len(state) == 204
    block = [
        "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "attn.qkv.weight", "attn.proj.weight",
        "attn.proj.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias",
    ]  # fmt: skip
    norms = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert set(state) == {
        "cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias",
        *(f"{part}.{kind}" for part in ("norm", "head", "aux_head") for kind in ("weight", "bias")),
        *(f"patch_embed.conv{number}.weight" for number in (1, 2, 3)),
        *(f"patch_embed.bn{number}.{kind}" for number in (1, 2, 3) for kind in norms),
        *(f"blocks.{number}.{name}" for number in range(16) for name in block),
    }  # fmt: skip
    assert state["blocks.0.attn.qkv.weight"].shape == (3 * 384, 384)
    assert state["blocks.0.mlp.fc1.weight"].shape == (3 * 384, 384)
    assert state["pos_embed"].shape == (1, 197, 384)


# 2. The stem.


def test_the_stem_makes_a_grid_of_any_size() -> None:
    """Check 2."""
    for size, grid in ((224, (14, 14)), (384, (24, 24)), ((224, 448), (14, 28))):
        with torch.device("meta"):
            model = create_model("lvvit_s", img_size=size)
            assert model.grid_size == grid
            assert model.embed_patches(torch.zeros(2, 3, *model.image_size)).shape == (2, grid[0] * grid[1], 384)
    stem = model.patch_embed
    assert [type(part) for part in stem.modules()].count(nn.BatchNorm2d) == 3
    assert [conv.bias is None for conv in (stem.conv1, stem.conv2, stem.conv3, stem.proj)] == [True, True, True, False]
    assert [conv.stride for conv in (stem.conv1, stem.conv2, stem.conv3, stem.proj)] == [(2, 2), (1, 1), (1, 1), (8, 8)]


def test_patches_are_in_raster_order() -> None:
    model = small(patch_size=16)
    picture = torch.zeros(1, 3, 32, 32)
    before = model.embed_patches(picture)
    picture[:, :, 4:10, 20:28] = 5.0  # well inside the upper right patch
    moved = (model.embed_patches(picture) - before).abs().sum(-1)[0]
    assert moved.argmax() == 1
    assert moved[2] < moved[1] / 100


def test_initial_weights() -> None:
    torch.manual_seed(0)
    model = create_model("lvvit_t", img_size=64, depth=2)
    assert isinstance(model, LVViT)
    for weight in (model.cls_token, model.pos_embed, model.blocks[0].mlp.fc1.weight, model.aux_head.weight):  # type: ignore[union-attr]
        assert isinstance(weight, Tensor)
        assert weight.std().item() == pytest.approx(0.02, rel=0.15)
    assert (model.aux_head.bias == 0).all()  # type: ignore[union-attr, operator]
    assert model.patch_embed.conv2.weight.std().item() == pytest.approx((1 / (3 * 9 * 64)) ** 0.5, rel=0.05)


# 3. The residual divisor.


@pytest.mark.parametrize(("name", "added"), [("lvvit_t", 2.0), ("lvvit_s", 1.0), ("lvvit_l", 0.6667)])
def test_a_block_adds_both_branches_divided(name: str, added: float) -> None:
    """Check 3."""
    block: Any = small(name=name).blocks[0]
    for last in (block.attn.proj, block.mlp.fc2):
        nn.init.zeros_(last.weight)
        nn.init.ones_(last.bias)
    tokens = torch.randn(2, 5, 24)
    torch.testing.assert_close(block(tokens), tokens + added, atol=1e-4, rtol=0)


def test_other_constants_are_the_published_ones() -> None:
    model = on_paper("lvvit_t")
    block: Any = model.blocks[0]
    assert (block.norm1.eps, model.norm.eps, model.patch_embed.bn1.eps) == (1e-5, 1e-5, 1e-5)
    assert (block.attn.num_heads, block.attn.head_dim) == (4, 60)


# 4. The prediction.


def test_a_prediction_adds_half_of_the_largest_logit_of_a_patch() -> None:
    """Check 4."""
    model = small(num_classes=2, img_size=16)
    answers = torch.tensor([[1.0, 0.0]]), torch.tensor([[[0.0, 2.0], [4.0, 0.0]]])
    model.answers = lambda tokens: answers  # type: ignore[method-assign, assignment]
    assert model.readout(torch.zeros(1, 3, 24)).tolist() == [[3.0, 1.0]]


def test_the_order_of_patches_does_not_matter() -> None:
    """Check 4."""
    model = small()
    tokens = torch.randn(2, 17, 24)
    mixed = torch.cat((tokens[:, :1], tokens[:, 1:][:, torch.randperm(16)]), dim=1)
    torch.testing.assert_close(*(model.readout(model.trunk(some, None)) for some in (tokens, mixed)))


def test_fewer_patches_can_only_lower_the_maximum() -> None:
    model = small()
    tokens = torch.randn(2, 17, 24)
    fewer = model.readout(tokens[:, :9])
    assert (fewer <= model.readout(tokens)).all()
    assert (fewer < model.readout(tokens)).any()
    assert model.answers(tokens[:, :9])[1].shape == (2, 8, 4)  # type: ignore[union-attr]


def test_without_a_share_patches_are_neither_asked_nor_paid_for() -> None:
    model, tokens = small(), torch.randn(2, 17, 24)
    model.patch_share = 0.0
    assert model.answers(tokens)[1] is None
    assert torch.equal(model.readout(tokens), model.head(tokens[:, 0]))
    assert model.readout_macs(17) == 24 * 4


def test_features_come_out_where_there_are_no_classes() -> None:
    model, tokens = small(num_classes=0), torch.randn(2, 17, 24)
    assert torch.equal(model.readout(tokens), tokens[:, 0])
    assert model.readout_macs(17) == 0


# 15. A head 60 wide.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_head_60_wide_in_half_precision(dtype: torch.dtype) -> None:
    model = create_model("lvvit_t", img_size=64, depth=1, num_classes=3).eval()
    attention: Any = model.blocks[0].attn
    tokens = torch.randn(2, 17, 240, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        half = attention(tokens)
    exact = attention.double()(tokens.double())
    torch.testing.assert_close(half.double(), exact, atol=0.02 * exact.abs().max().item(), rtol=0)


# Patch sampling, and what else a backbone goes through.


@pytest.mark.parametrize("rel_pos", ["none", "bias", "separable", "rope"])
def test_all_patches_are_the_plain_model_to_the_bit(rel_pos: str) -> None:
    """Check 12."""
    model = small(embed_dim=48, rel_pos=rel_pos)
    whole = model.readout(model.trunk(model.embed(images()), None))
    assert torch.equal(model(images(), 1.0), whole)
    seen: list[Tensor] = []
    model.aux_head.register_forward_hook(lambda module, given, made: seen.append(made))
    model(images(), 0.5)
    assert seen[0].shape == (2, 7, 4)  # round(0.5 * 17) tokens, one of them the class token


def test_patches_that_are_kept_are_embedded_as_in_the_whole_image() -> None:
    model, kept = small(), torch.tensor([[0, 3, 9], [1, 2, 15]])
    some, whole = model.embed(images(), kept), model.embed(images())
    torch.testing.assert_close(some[:, 1:], whole[:, 1:].gather(1, kept[..., None].expand(-1, -1, 24)))


def test_smaller_images_are_seen_as_fewer_patches() -> None:
    model = small()
    tokens, places = model.see(images(16), 1.0, low_resolution=True)
    assert tokens.shape == (2, 5, 24)
    assert places is not None
    assert places.tolist() == [0, 3, 12, 15]
    assert model(images(16), 0.5, low_resolution=True).shape == (2, 4)
    assert macs(model, image_size=16) < macs(model)
    with pytest.raises(ValueError, match=r"takes images of 32 x 32 pixels, got 16 x 16"):
        model(images(16))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch_size": 5, "img_size": 35}, "patches of 5 pixels do not allow; set model.patch_size=6"),
        ({"patch_size": 6}, r"img_size \(32, 32\) is not a multiple of the patch size 6"),
        ({"global_pool": "avg"}, "class token and patches, got model.global_pool=avg; set it to token"),
        ({"init": "published"}, "initial weights of its own, got model.init=published; set it to none"),
        ({"num_heads": 5}, "cannot share model.embed_dim=24 evenly between 5 heads"),
        ({"residual_divisor": 0.0}, "residual_divisor is 0; it must be above 0"),
        ({"num_head": 3}, "lvvit_s has no setting 'num_head'; did you mean num_heads?"),
        ({"qk_norm": True}, "lvvit_s has no setting 'qk_norm'; it has embed_dim, depth"),
    ],
)
def test_mistakes_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**settings)


def test_a_name_that_is_nearly_right_is_suggested() -> None:
    with pytest.raises(ValueError, match=r"did you mean .*lvvit_s"):
        create_model("lvvit_small")


# 13. Files.


def save(state: Any, folder: Path, name: str = "weights.pth.tar") -> Path:
    torch.save(state, folder / name)
    return folder / name


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as the authors', of lvvit_t in its own width, which tells heads and divisor by the model's name."""
    model = small(3, "lvvit_t", embed_dim=240, num_heads=4, patch_size=16, img_size=64)
    return save(bare(model), tmp_path_factory.mktemp("published"))


def tiny(seed: int = 1, **options: Any) -> LVViT:
    return small(seed, "lvvit_t", **({"embed_dim": 240, "num_heads": 4, "patch_size": 16, "img_size": 64} | options))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {f"module.{name}": value for name, value in state.items()},
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}},
        lambda state: {"state_dict_ema": state},
    ],
    ids=["bare", "module", "wrapped", "wrapped module", "average"],
)
def test_the_authors_files_load_whole(published: Path, tmp_path: Path, wrap: Any) -> None:
    """Check 13."""
    path = save(wrap(torch.load(published, weights_only=True)), tmp_path)
    model = tiny()
    report = load_weights(model, path)
    assert (report.resized, report.missing, report.unexpected) == ((), (), ())
    assert len(report.loaded) == len(bare(model))
    assert torch.equal(model(images(64)), tiny(3)(images(64)))


def test_a_larger_grid_resizes_the_position_embedding_alone(published: Path) -> None:
    """Check 13."""
    model = tiny(img_size=32)
    report = load_weights(model, published)
    assert (report.resized, report.missing, report.unexpected) == (("pos_embed",), (), ())
    assert "from 4 x 4 to 2 x 2 patches" in str(report)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residual_divisor": 2.0}, "residual_divisor 1.0, not 2.0"),
        ({"num_heads": 3}, "num_heads 4, not 3"),
    ],
)
def test_what_the_file_does_not_tell_is_that_of_the_name(published: Path, options: Any, message: str) -> None:
    """Check 13."""
    model = tiny(**options)
    before = {name: value.clone() for name, value in bare(model).items()}
    with pytest.raises(ValueError, match=message):
        load_weights(model, published)
    assert all(torch.equal(value, before[name]) for name, value in bare(model).items())


def test_another_width_is_refused_until_heads_are_told(tmp_path: Path) -> None:
    source = small(0)
    path = save(bare(source), tmp_path)
    with pytest.raises(ValueError, match="does not tell how many heads"):
        load_weights(small(1), path)
    load_weights(model := small(1), path, told={"num_heads": 3})
    assert torch.equal(model(images()), source(images()))


def test_our_files_tell_it_all(tmp_path: Path) -> None:
    """Check 13: and another model of the same tensors is refused, whichever way they are loaded."""
    source = small(0)
    path = save(source.state_dict(), tmp_path)
    load_weights(model := small(1), path)
    assert torch.equal(model(images()), source(images()))
    assert settings_of(path) == {
        "num_classes": 4,
        "patch_size": 8,
        "img_size": 32,
        "num_heads": 3,
        "global_pool": "token",
    }
    for options, message in (
        ({"residual_divisor": 1.0}, r"residual_divisor 2.0, not 1.0"),
        ({"num_heads": 4}, r"num_heads 3, not 4"),
    ):
        with pytest.raises(ValueError, match=message):
            small(1, **options).load_state_dict(source.state_dict())
    other = small(1)
    for block in other.blocks:
        block.norm1.eps = 1e-6  # type: ignore[union-attr, assignment]
    with pytest.raises(ValueError, match=r"blocks.norm1 LayerNorm\(eps=1e-05\), not LayerNorm\(eps=1e-06\)"):
        load_weights(other, path)
    other = small(1)
    other.patch_share = 0.0
    with pytest.raises(ValueError, match=r"patch_share 0.5, not 0.0"):
        load_weights(other, path)


def test_other_classes_take_neither_classifier(published: Path) -> None:
    model = tiny(num_classes=7)
    with pytest.raises(ValueError, match="classifies into 4 classes, the model into 7"):
        load_weights(model, published)
    report = load_weights(model, published, ignore_head=True)
    assert set(report.missing) == {"head.weight", "head.bias", "aux_head.weight", "aux_head.bias"}
    assert set(report.unexpected) == set(report.missing)


def test_a_broken_count_is_named(published: Path, tmp_path: Path) -> None:
    state = torch.load(published, weights_only=True)
    state["patch_embed.bn1.num_batches_tracked"] = torch.ones((), dtype=torch.complex64)
    with pytest.raises(ValueError, match=r"num_batches_tracked as torch.complex64"):
        load_weights(tiny(), save(state, tmp_path))


def test_a_file_is_evaluated_at_the_share_of_its_name(tmp_path: Path) -> None:
    """One as the authors': bare, and for images of another size than most."""
    torch.manual_seed(0)
    source = create_model("lvvit_t", img_size=64, num_classes=4).eval()
    run = open_run(f"lvvit_t={save(bare(source), tmp_path)}", torch.device("cpu"))
    assert (run.config.data.crop_pct, run.config.data.img_size) == (lvvit.CROP_SHARES["lvvit_t"], 64) == (0.9, 64)
    assert "taking its patches for a square" in run.notes[0]
    with torch.inference_mode():
        assert torch.equal(run.method.predict(images(64), 1.0), source(images(64)))
    with pytest.raises(ValueError, match="timm has no weights for lvvit_s; name a file of its authors, lvvit_s=FILE"):
        open_run("timm:lvvit_s", torch.device("cpu"))


def test_a_published_folder_is_read_back(tmp_path: Path) -> None:
    """With its buffers, and not as a model of timm's; a folder that shows another share of images is refused."""
    torch.manual_seed(0)
    model = create_model("lvvit_s", img_size=32, num_classes=4, patch_size=8, embed_dim=24, depth=2, num_heads=3).eval()
    settings = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    data = DataConfig(img_size=32, crop_pct=0.9)
    hub.save(tmp_path / "pushed", hub.Published(model, "lvvit_s", settings, list("abcd"), data, 7), "A card.")
    found = hub.load(str(tmp_path / "pushed"))
    with torch.inference_mode():
        assert torch.equal(found.model(images()), model(images()))
    config = tmp_path / "pushed" / "config.json"
    config.write_text(config.read_text().replace('"crop_pct": 0.9', '"crop_pct": 0.8'))
    with pytest.raises(ValueError, match=r"has crop_pct 0.8 and model.safetensors was made with 0.9; restore it"):
        hub.load(str(tmp_path / "pushed"))


def test_averages_and_statistics_start_from_a_file(published: Path) -> None:
    model = tiny()
    start_from(model, str(published))
    assert torch.equal(model.patch_embed.bn1.running_mean, tiny(3).patch_embed.bn1.running_mean)
