"""Weights under everybody's names; files that are not what they seem."""

import argparse
import os
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pss.models.create import create_model
from pss.models.vit import VisionTransformer
from pss.models.weights import load_weights, settings_of, start_from

TINY: dict[str, Any] = {"num_classes": 7, "img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
NAME = "vit_tiny_patch16_224"
SIMMIM: dict[str, Any] = {
    "rel_pos": "bias",
    "qkv_bias": "qv",
    "pos_embed": "none",
    "global_pool": "avg",
    "init_values": 0.1,
}


def tiny(seed: int, **options: Any) -> VisionTransformer:
    torch.manual_seed(seed)
    model = create_model(options.pop("name", NAME), **(TINY | options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def bare(model: nn.Module) -> dict[str, Tensor]:
    """Its state as others save it: tensors alone."""
    return {name: value for name, value in model.state_dict().items() if name != "_extra_state"}


def images(side: int = 16) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(9))


def beit_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a model with bias tables, as BEiT and a fine-tuned SimMIM call it."""
    return {
        name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): value for name, value in state.items()
    }


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("name", [NAME, "deit_tiny_distilled_patch16_224"])
def test_timm_weights_load_whole(tmp_path: Path, name: str, suffix: str) -> None:
    plain = timm.create_model(name, **TINY).eval()
    path = tmp_path / f"weights{suffix}"
    (safetensors.torch.save_file if suffix == ".safetensors" else torch.save)(plain.state_dict(), path)
    model = tiny(1, name=name)
    with pytest.raises(
        ValueError, match=r"not tell how many heads .* and how many rows .*'pss': {'num_heads': 3, 'img_"
    ):
        load_weights(model, path)
    report = load_weights(model, path, told={"num_heads": 3, "img_size": 16})
    assert torch.equal(model(images()), plain(images()))
    assert set(report.loaded) == set(plain.state_dict())
    assert (report.resized, report.missing, report.unexpected) == ((), (), ())
    assert str(report) == f"loaded {len(report.loaded)} of {len(report.loaded)} tensors"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
        lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}},
        lambda state: {"model_ema": {f"module.model.{name}": value for name, value in state.items()}},
        lambda state: {"model": state, "model_ema": {name: value + 1 for name, value in state.items()}},
        lambda state: {"method": {f"model.{name}": value for name, value in state.items()}, "step": 8},
        lambda state: {f"_orig_mod.{name}": value for name, value in state.items()},
    ],
)
def test_wrapped_weights_load_whole(tmp_path: Path, wrap: Any) -> None:
    source, model = tiny(0), tiny(1)
    torch.save(wrap(source.state_dict()), tmp_path / "weights.pt")
    report = load_weights(model, tmp_path / "weights.pt")
    assert torch.equal(model(images()), source(images()))
    assert len(report.loaded) == len(list(source.parameters()))


def test_a_teacher_in_the_same_file_is_left_out(tmp_path: Path) -> None:
    source, teacher, model = tiny(0), tiny(2), tiny(1)
    state = {f"teacher.{name}": value for name, value in teacher.state_dict().items()}
    state |= {f"model.{name}": value for name, value in source.state_dict().items()}
    torch.save({"method": state}, tmp_path / "weights.pt")
    report = load_weights(model, tmp_path / "weights.pt")
    assert torch.equal(model(images()), source(images()))
    assert set(report.unexpected) == {f"teacher.{name}" for name in teacher.state_dict()}


def test_beit_names_load_whole(tmp_path: Path) -> None:
    source, model = tiny(0, **SIMMIM), tiny(1, **SIMMIM)
    state = beit_names(source.state_dict())
    state |= {f"blocks.{i}.attn.relative_position_index": torch.zeros(17, 17, dtype=torch.int64) for i in range(2)}
    torch.save({"module": state}, tmp_path / "weights.pt")
    report = load_weights(model, tmp_path / "weights.pt")
    for rho in (0.4, 1.0):
        assert torch.equal(model(images(), rho), source(images(), rho))
    assert (report.missing, report.unexpected) == ((), ())


def test_simmim_pretrained_encoder_loads_with_its_table_in_every_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, model = tiny(0, **SIMMIM), tiny(1, **SIMMIM)
    state = beit_names(source.state_dict())
    table = state["blocks.0.attn.relative_position_bias_table"]
    encoder = {
        f"encoder.{name}": value
        for name, value in state.items()
        if not name.startswith(("head", "fc_norm")) and "relative_position" not in name
    }
    encoder |= {
        "encoder.rel_pos_bias.relative_position_bias_table": table,
        "encoder.rel_pos_bias.relative_position_index": torch.zeros(17, 17, dtype=torch.int64),
        "encoder.mask_token": torch.zeros(1, 1, 24),
        "encoder.norm.weight": torch.ones(24),
        "decoder.0.weight": torch.zeros(48, 24, 1, 1),
    }
    # SimMIM's trainer saves its settings along, an object of a library that need not be installed to read the file.
    library = types.ModuleType("yacs.config")
    library.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", library)
        node = library.CfgNode(TRAIN=library.CfgNode(lr=0.1))
        node.__dict__["__immutable__"] = True
        torch.save({"model": encoder, "config": node}, tmp_path / "weights.pt")

    with pytest.raises(ValueError, match=r"lacks fc_norm.weight.* ignore_head=True"):
        load_weights(model, tmp_path / "weights.pt")
    head = model.head.weight.detach().clone()  # type: ignore[union-attr, operator]
    report = load_weights(model, tmp_path / "weights.pt", ignore_head=True)
    for block in model.blocks:
        assert torch.equal(block.attn.relative_position_bias_table, table)
    assert torch.equal(model.blocks[1].ls2.gamma, source.blocks[1].ls2.gamma)
    assert torch.equal(model.head.weight, head)  # type: ignore[arg-type]
    assert set(report.missing) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert set(report.unexpected) == {"mask_token", "norm.weight", "decoder.0.weight"}
    assert "not in the file: fc_norm.weight, fc_norm.bias, head.weight and 1 more" in str(report)


def test_bias_of_queries_keys_and_values_converts_both_ways(tmp_path: Path) -> None:
    full, qv = tiny(0), tiny(1, qkv_bias="qv")
    torch.save(full.state_dict(), tmp_path / "full.pt")
    load_weights(qv, tmp_path / "full.pt")
    torch.testing.assert_close(qv(images()), full(images()), rtol=0, atol=1e-5)
    again = tiny(2)
    torch.save(qv.state_dict(), tmp_path / "qv.pt")
    load_weights(again, tmp_path / "qv.pt")
    torch.testing.assert_close(again(images()), full(images()), rtol=0, atol=1e-5)


def test_position_bias_that_the_file_lacks_stays_zero(tmp_path: Path) -> None:
    plain = tiny(0)
    biased = create_model(NAME, **TINY, rel_pos="bias").eval()
    torch.save(plain.state_dict(), tmp_path / "weights.pt")
    report = load_weights(biased, tmp_path / "weights.pt")
    torch.testing.assert_close(biased(images()), plain(images()), rtol=0, atol=1e-5)
    assert report.missing == tuple(f"blocks.{i}.attn.relative_position_bias_table" for i in range(2))


@pytest.mark.parametrize("options", [{}, {"name": "deit_tiny_distilled_patch16_224"}, {"reg_tokens": 2}])
def test_position_embedding_follows_the_image_size(tmp_path: Path, options: dict[str, Any]) -> None:
    source, model = tiny(0, **options), tiny(1, **options, img_size=(24, 32))
    with torch.no_grad():
        source.pos_embed[0, source.num_prefix_tokens :] = 0.5  # type: ignore[index]
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    report = load_weights(model, tmp_path / "weights.pt")
    assert report.resized == ("pos_embed",)
    assert "resized: pos_embed" in str(report)
    prefix = source.num_prefix_tokens
    assert torch.equal(model.pos_embed[0, :prefix], source.pos_embed[0, :prefix])  # type: ignore[index]
    assert model.pos_embed[0, prefix:].detach() == pytest.approx(torch.full((48, 24), 0.5), abs=1e-5)  # type: ignore[index]


@pytest.mark.parametrize(
    "options",
    [
        {},
        SIMMIM,
        {"global_pool": "avg", "img_size": 24},
        {"rel_pos": "separable", "init_values": 0.1},
        {"num_classes": 0},
    ],
)
def test_a_model_can_be_built_by_what_its_file_tells(tmp_path: Path, options: dict[str, Any]) -> None:
    source = tiny(0, **options)
    torch.save({"model": beit_names(source.state_dict())}, tmp_path / "weights.pt")
    told = settings_of(tmp_path / "weights.pt")
    shape = {name: TINY[name] for name in ("embed_dim", "depth")}
    model = create_model(NAME, **shape, **told).eval()
    report = load_weights(model, tmp_path / "weights.pt")
    assert (report.resized, report.missing, report.unexpected) == ((), (), ())
    assert torch.equal(model(images(*source.image_size[:1]), 0.6), source(images(*source.image_size[:1]), 0.6))


def test_a_file_tells_no_more_than_it_holds(tmp_path: Path) -> None:
    torch.save(tiny(0).state_dict(), tmp_path / "plain.pt")
    plain = {"num_classes": 7, "img_size": 16, "patch_size": 4, "pos_embed": "learn", "init_values": None}
    assert settings_of(tmp_path / "plain.pt") == plain | {"num_heads": 3, "global_pool": "token"}
    torch.save(bare(tiny(0)), tmp_path / "bare.pt")
    assert settings_of(tmp_path / "bare.pt") == plain
    torch.save(tiny(0, rel_pos="rope", img_size=(8, 24)).state_dict(), tmp_path / "turned.pt")
    assert {"rel_pos": "rope", "img_size": (8, 24)}.items() <= settings_of(tmp_path / "turned.pt").items()
    torch.save(bare(tiny(0, img_size=(8, 24), **SIMMIM)), tmp_path / "wide.pt")
    assert settings_of(tmp_path / "wide.pt") == {
        "num_classes": 7,
        "patch_size": 4,
        "pos_embed": "none",
        "init_values": 1.0,
        "rel_pos": "bias",
        "qkv_bias": "qv",
        "global_pool": "avg",
    }
    with pytest.raises(ValueError, match=r"there is no weights file .*; name a file that exists"):
        settings_of(tmp_path / "none.pt")
    torch.save(tiny(0).state_dict() | {"pos_embed": torch.zeros(17)}, tmp_path / "flat.pt")
    with pytest.raises(ValueError, match=r"has pos_embed of shape \(17,\); build the model"):
        settings_of(tmp_path / "flat.pt")


def test_position_bias_follows_the_image_size(tmp_path: Path) -> None:
    source, model = tiny(0, **SIMMIM), tiny(1, **SIMMIM, img_size=24)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    report = load_weights(model, tmp_path / "weights.pt")
    assert report.resized == tuple(f"blocks.{i}.attn.relative_position_bias_table" for i in range(2))
    own, other = (m.blocks[0].attn.relative_position_bias_table for m in (model, source))
    assert torch.equal(own[-3:], other[-3:])
    centre_of = {6: 60, 4: 24}  # offset (0, 0) in tables of 11 x 11 and 7 x 7
    torch.testing.assert_close(own[centre_of[6]], other[centre_of[4]])


def test_weights_of_a_rectangular_grid_load_unchanged(tmp_path: Path) -> None:
    source, model = tiny(0, img_size=(8, 32), rel_pos="bias"), tiny(1, img_size=(8, 32), rel_pos="bias")
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    assert load_weights(model, tmp_path / "weights.pt").resized == ()
    assert torch.equal(model.pos_embed, source.pos_embed)  # type: ignore[arg-type]


def test_other_classes_need_to_be_asked_for(tmp_path: Path) -> None:
    source, model = tiny(0, num_classes=5), tiny(1)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="5 classes, the model into 7; pass ignore_head=True"):
        load_weights(model, tmp_path / "weights.pt")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    report = load_weights(model, tmp_path / "weights.pt", ignore_head=True)
    assert torch.equal(model.head.weight, before["head.weight"])  # type: ignore[arg-type]
    assert torch.equal(model.norm.weight, source.norm.weight)  # type: ignore[arg-type]
    assert set(report.unexpected) == {"head.weight", "head.bias"} == set(report.missing)


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ({"depth": 3}, {}, r"has blocks.2.norm1.weight, .* and 9 more, which this model does not"),
        ({}, {"depth": 3}, r"lacks blocks.2.norm1.weight, .* and 9 more; build"),
        ({"embed_dim": 48}, {}, r"cls_token of shape \(1, 1, 48\), the model needs \(1, 1, 24\)"),
        ({"patch_size": 8}, {}, r"shape .*, the model needs"),
        ({"init_values": 0.1}, {}, r"has blocks.0.ls1.gamma"),
        ({"rel_pos": "bias"}, {}, r"has blocks.0.attn.rel.* create it with rel_pos='bias'"),
        ({}, {"pos_embed": "none"}, r"has pos_embed, which this model does not"),
        ({}, {"global_pool": "avg"}, r"lacks fc_norm.weight, fc_norm.bias; build the model .*settings_of"),
        ({"global_pool": "avg"}, {}, r"lacks norm.weight, norm.bias; build the model"),
        ({"rel_pos": "separable"}, {}, r"has blocks.0.attn.sep.* create it with rel_pos='separable'"),
        ({"name": "deit_tiny_distilled_patch16_224"}, {"num_classes": 0}, "has dist_token, which"),
        ({"rel_pos": "separable"}, {"rel_pos": "separable", "img_size": 24}, r"table of shape \(17, 3\)"),
    ],
)
def test_another_model_is_refused(tmp_path: Path, source: dict[str, Any], target: dict[str, Any], message: str) -> None:
    torch.save(tiny(0, **source).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=message):
        load_weights(tiny(1, **target), tmp_path / "weights.pt")


def test_a_norm_without_a_place_is_refused(tmp_path: Path) -> None:
    """Left out, it would change what the classifier reads; with a new classifier that does not matter."""
    source, model = tiny(0), tiny(1)
    extra = {"fc_norm.weight": torch.ones(24), "fc_norm.bias": torch.zeros(24)}
    torch.save(bare(source) | extra, tmp_path / "weights.pt")
    assert "global_pool" not in settings_of(tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"has fc_norm.weight, fc_norm.bias, which this model does not; build the mod"):
        load_weights(model, tmp_path / "weights.pt")
    report = load_weights(model, tmp_path / "weights.pt", ignore_head=True, told={"num_heads": 3, "img_size": 16})
    assert set(extra) < set(report.unexpected)


class Payload:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    state = tiny(0).state_dict() | {"extra": Payload(tmp_path / "ran")}
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="cannot be read as plain weights"):
        load_weights(tiny(1), tmp_path / "weights.pt")
    (tmp_path / "old.pth").write_bytes(pickle.dumps(Payload(tmp_path / "ran"), protocol=2))
    with pytest.raises(ValueError, match="cannot be read as plain weights"):
        load_weights(tiny(1), tmp_path / "old.pth")
    assert not (tmp_path / "ran").exists()


def test_files_without_a_vit_are_refused(tmp_path: Path) -> None:
    for name in ("weights.pt", "a" * 300, "a\0b"):
        with pytest.raises(ValueError, match="there is no weights file"):
            load_weights(tiny(0), tmp_path / name)
        with pytest.raises(ValueError, match="there is no weights file"):
            start_from(tiny(0), str(tmp_path / name))
    for name in ("model.pt2", "model.onnx"):
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=r"for programs without pss.*name the run"):
            load_weights(tiny(0), tmp_path / name)
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pt")
    with pytest.raises(ValueError, match="holds no Vision Transformer"):
        load_weights(tiny(0), tmp_path / "linear.pt")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list"):
        load_weights(tiny(0), tmp_path / "list.pt")


@given(suffix=st.sampled_from([".pt", ".safetensors"]), data=st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files_give_one_clear_error(tmp_path: Path, suffix: str, data: st.DataObject) -> None:
    path = tmp_path / f"damaged{suffix}"
    state = {"patch_embed.proj.weight": torch.zeros(2, 2), "head.bias": torch.zeros(3)}
    (safetensors.torch.save_file if suffix == ".safetensors" else torch.save)(state, path)
    whole = path.read_bytes()
    if data.draw(st.booleans(), label="cut"):
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    else:
        path.write_bytes(data.draw(st.binary(max_size=64)))
    with pytest.raises(ValueError, match="damaged"):
        load_weights(tiny(0), path)


def test_timms_own_weights_are_asked_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model, asked = timm.create_model(NAME, **TINY), tiny(1), []

    def create(name: str, **options: Any) -> nn.Module:
        asked.append((name, options))
        if name != NAME:
            raise RuntimeError("no pretrained weights exist\nfor this model")
        return plain

    monkeypatch.setattr("pss.models.weights.timm.create_model", create)
    start_from(model, f"timm:{NAME}")
    assert asked[0] == (NAME, {"pretrained": True})
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in plain.state_dict().items())
    with pytest.raises(ValueError, match=r"no pretrained weights for vit_none \(no pretrained weights exist\)"):
        start_from(model, "timm:vit_none")
