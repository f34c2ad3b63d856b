"""The checks of timm's own test suite (its `tests/test_models.py`), written anew for the models that pss registers.

Each check of that file is a test here under its name, or stands in `NOT_CHECKED` with the reason, which is tested too.
What goes beyond timm's models, a share of the patches, follows.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from timm.models import FeatureInfo, group_parameters, list_models
from torch import Tensor, nn

from pss import timm_models
from pss.models import create, lvvit
from pss.models.create import create_model, create_plain

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("pss_vit_tiny_patch16_224", {}),
    "bias": ("pss_deit_small_patch16_224", {"rel_pos": "bias"}),
    "separable": ("pss_deit_tiny_patch16_224", {"rel_pos": "separable"}),
    "rope": ("pss_vit_small_patch16_224", {"rel_pos": "rope"}),
    "distilled": ("pss_deit_tiny_distilled_patch16_224", {}),
    "registers": ("pss_vit_small_patch14_reg4_dinov2", {}),
    "average": ("pss_test_vit2", {}),
    "simmim": ("pss_simmim_base_patch16", {}),
    "lvvit": ("pss_lvvit_s", {}),
}
NOT_CHECKED = {
    "test_model_inference": "compares with outputs that are downloaded; here with timm's own model, in "
    "test_model_inference_is_timms",
    "test_model_default_cfgs": "for models whose features are maps; ViTs have test_model_default_cfgs_non_std",
    "test_model_load_pretrained with in_chans=1": "pss takes images of three channels",
    "test_model_features_pretrained": "for models with four feature levels; weights and features are tested apart",
    "test_model_forward_torchscript": "TorchScript knows no arguments by keyword alone; pss-eval --export has .pt2",
    "test_model_forward_fx": "symbolic tracing cannot follow checks of the image's size; torch.export can",
    "test_model_backward_fx": "as test_model_forward_fx",
    "test_model_forward_fx_torchscript": "as both",
}


def build(kind: str, **options: Any) -> Any:
    name, more = MODELS[kind]
    torch.manual_seed(0)
    return timm.create_model(name, **({"num_classes": 7} | SMALL | more | options))


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


every = pytest.mark.parametrize("kind", MODELS)


def test_every_name_that_pss_builds_is_registered_and_no_other() -> None:
    names = {name.removeprefix("pss_") for name in list_models("pss_*")}
    assert set(timm_models.OWN_NAMES) == set(lvvit.VARIANTS) | set(create._PRESETS)
    assert {name: crop for name, crop in timm_models.OWN_NAMES.items() if crop} == lvvit.CROP_SHARES
    theirs = {*list_models(module="vision_transformer"), *list_models(module="deit")}
    assert names - set(timm_models.OWN_NAMES) <= theirs
    assert len(names) > 150
    for name in sorted(theirs - names):
        with torch.device("meta"), pytest.raises(ValueError, match=r"not a plain Vision Transformer|not a multiple"):
            create_plain(name, depth=1)


def test_they_are_registered_once_timm_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks for timm before, without importing it, or fails to."""
    called: list[int] = []
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.setattr(timm_models, "_TIMM", "some_library")
    monkeypatch.setattr(timm_models, "_register", lambda: called.append(sys.modules["some_library"].answer))
    for _ in range(2):
        timm_models.install()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("some_library")
    (tmp_path / "some_library.py").write_text("raise RuntimeError")
    importlib.invalidate_caches()
    with pytest.raises(RuntimeError):
        importlib.import_module("some_library")
    (tmp_path / "some_library.py").write_text("answer = 42")
    assert importlib.util.find_spec("some_library") is not None
    before = len(sys.meta_path)
    library = importlib.import_module("some_library")
    assert called == [42]
    assert len(sys.meta_path) == before - 1
    assert "exec_module" not in vars(library.__loader__)
    timm_models.install()
    assert called == [42, 42]
    monkeypatch.delitem(sys.modules, "some_library")


@pytest.mark.exhaustive
def test_all_registered_names_are_built() -> None:
    for name in list_models("pss_*"):
        with torch.device("meta"):
            model: Any = timm.create_model(name, depth=1)
            tokens = model.forward_features(torch.randn(1, 3, *model.image_size))
        assert tokens.shape == (1, model.num_tokens, model.num_features), name


@pytest.mark.parametrize("kind", ["plain", "distilled", "registers", "average"])
def test_model_inference_is_timms(kind: str) -> None:
    name = MODELS[kind][0].removeprefix("pss_")
    plain: Any = timm.create_model(name, num_classes=7, **SMALL).eval()
    model, x = build(kind).eval(), images()
    model.load_state_dict(plain.state_dict())
    features = model.forward_features(x)
    torch.testing.assert_close(features, plain.forward_features(x))
    torch.testing.assert_close(model.forward_head(features), plain(x))
    for pre_logits in (False, True):
        torch.testing.assert_close(model.forward_head(features, pre_logits), plain.forward_head(features, pre_logits))
    options: dict[str, Any]
    for options in (
        {},
        {"indices": 2, "norm": True, "output_fmt": "NLC"},
        {"indices": [0, -1], "return_prefix_tokens": True, "intermediates_only": True},
        {"indices": [1], "stop_early": True},
        {"output_dict": True, "return_prefix_tokens": True},
        {"output_dict": True, "intermediates_only": True},
    ):
        ours, theirs = model.forward_intermediates(x, **options), plain.forward_intermediates(x, **options)
        torch.testing.assert_close(ours, theirs)
    for options in ({}, {"n": 2, "reshape": True}, {"n": [0, 2], "return_prefix_tokens": True, "norm": True}):
        torch.testing.assert_close(
            model.get_intermediate_layers(x, **options), plain.get_intermediate_layers(x, **options)
        )
    assert model.feature_info == plain.feature_info
    assert model.no_weight_decay() == plain.no_weight_decay()


@every
def test_model_forward(kind: str) -> None:
    model, x = build(kind).eval(), images(1)
    logits = model(x)
    assert logits.shape == (1, 7)
    assert torch.isfinite(logits).all()
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(x), logits)


@every
@pytest.mark.parametrize("again", [False, True])
def test_model_backward(kind: str, again: bool) -> None:
    model = build(kind, num_classes=42).train()
    model.set_grad_checkpointing(again)
    logits = model(images())
    assert logits.shape == (2, 42)
    logits.mean().backward()
    assert [name for name, one in model.named_parameters() if one.grad is None] == []


@every
def test_model_default_cfgs_non_std(kind: str) -> None:
    model, x = build(kind).eval(), images()
    cfg, names = model.default_cfg, set(model.state_dict())
    assert cfg == model.pretrained_cfg
    assert cfg["input_size"] == (3, 32, 32)
    assert timm.data.resolve_data_config(model=model)["input_size"] == (3, 32, 32)
    classifiers = [cfg["classifier"]] if isinstance(cfg["classifier"], str) else cfg["classifier"]
    assert names.issuperset(f"{one}.weight" for one in (*classifiers, cfg["first_conv"]))
    got = model.get_classifier()
    assert [*(got if isinstance(got, tuple) else [got])] == [model.get_submodule(one) for one in classifiers]

    features = model.forward_features(x)
    assert features.shape == (2, model.num_tokens, model.num_features)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    model.reset_classifier(0)
    assert model.num_classes == 0
    torch.testing.assert_close(model(x), pooled)
    model.reset_classifier(0, "")
    assert model(x).shape == features.shape
    model.reset_classifier(5, "token" if model.cls_token is not None else "avg")
    assert model(x).shape == (2, 5)
    assert build(kind, num_classes=0).eval()(x).shape == (2, model.num_features)
    assert build(kind, num_classes=0, global_pool="").eval()(x).shape == features.shape


@pytest.mark.parametrize("kind", ["plain", "registers", "distilled", "bias"])
def test_model_load_pretrained(kind: str, tmp_path: Path) -> None:
    """From weights of timm's model at its own size, for another number of classes and a finer grid."""
    name, more = MODELS[kind]
    plain: Any = timm.create_model(name.removeprefix("pss_"), depth=1, img_size=64, patch_size=16, num_classes=1000)
    plain.eval()
    save_file(plain.state_dict(), tmp_path / "weights.safetensors")
    overlay = {"file": str(tmp_path / "weights.safetensors"), "input_size": (3, 64, 64)}
    options = more | {"pretrained": True, "pretrained_cfg_overlay": overlay}
    model: Any = timm.create_model(name, depth=1, img_size=64, patch_size=16, num_classes=1000, **options)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model.eval()(x), plain(x))  # a bias of zero changes nothing
    other: Any = timm.create_model(name, depth=1, img_size=96, patch_size=16, num_classes=5, **options)
    assert other(torch.randn(1, 3, 96, 96)).shape == (1, 5)
    torch.testing.assert_close(other.blocks[0].mlp.fc1.weight, plain.blocks[0].mlp.fc1.weight)
    none: Any = timm.create_model(name, depth=1, img_size=64, patch_size=16, num_classes=0, **options)
    torch.testing.assert_close(none.patch_embed.proj.weight, plain.patch_embed.proj.weight)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    plain = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32)
    save_file(plain.state_dict(), tmp_path / "weights.safetensors")
    overlay = {"file": str(tmp_path / "weights.safetensors"), "input_size": (3, 32, 32)}
    for options, words in (
        ({"depth": 1}, r"weights for vit_tiny_patch16_224 has blocks\.1"),
        ({"depth": 2, "rel_pos": "rope"}, "is of a model with rel_pos none, not rope"),
    ):
        with pytest.raises(ValueError, match=words):
            timm.create_model("pss_vit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay, **options)


@every
def test_model_forward_features(kind: str) -> None:
    """And `test_model_forward_intermediates_features`: timm's wrapper, which prunes what features do not take."""
    name, more = MODELS[kind]
    wrapped: Any = timm.create_model(name, features_only=True, out_indices=(0, 1), **(SMALL | more)).eval()
    maps = wrapped(images())
    assert len(wrapped.model.blocks) == 2
    assert (wrapped.feature_info.channels(), wrapped.feature_info.reduction()) == ([24, 24], [8, 8])
    assert [tuple(one.shape) for one in maps] == [(2, 24, 4, 4)] * 2
    last: Any = timm.create_model(name, features_only=True, **(SMALL | more))
    assert len(last.eval()(images())) == 3


@every
def test_model_forward_intermediates(kind: str) -> None:
    model, x = build(kind).eval(), images()
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    output, maps = model.forward_intermediates(x)
    assert [tuple(one.shape) for one in maps] == [
        (2, channels, 32 // reduction, 32 // reduction)
        for channels, reduction in zip(info.channels(), info.reduction(), strict=True)
    ]
    torch.testing.assert_close(output, model.forward_features(x))
    model.set_grad_checkpointing()
    again, _ = model.forward_intermediates(x)
    torch.testing.assert_close(again, output)

    kept = build(kind).eval()
    assert kept.prune_intermediate_layers([0, 1], prune_norm=True) == [0, 1]
    assert (len(kept.blocks), kept.num_classes) == (2, 0)
    pruned = kept.forward_intermediates(x, [0, 1], intermediates_only=True)
    torch.testing.assert_close(pruned, maps[:2])


def test_what_is_not_checked_has_a_reason_that_holds() -> None:
    model = build("bias").eval()
    with pytest.raises(ValueError, match="takes images of 3 channels, got in_chans=1"):
        build("plain", in_chans=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, too
        with pytest.raises(Exception, match="keyword-only"):
            torch.jit.script(model)
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(model)
    exported = torch.export.export(model, (images(),)).module()
    torch.testing.assert_close(exported(images()), model(images()))
    assert all(NOT_CHECKED.values())


# Beyond timm's models.


@pytest.mark.parametrize("kind", ["bias", "registers", "distilled", "lvvit"])
@settings(max_examples=12)
@given(rho=st.floats(0.1, 1.0), first=st.integers(-3, 2), norm=st.booleans())
def test_features_at_any_rho_are_those_that_are_classified(kind: str, rho: float, first: int, norm: bool) -> None:
    model, x = build(kind).eval(), images()
    with torch.inference_mode():
        features = model.forward_features(x, rho)
        assert features.shape == (2, model.num_kept_tokens(rho), 24)
        assert torch.equal(model.forward_head(features), model(x, rho))
        found = model.forward_intermediates(
            x, [first, -1], return_prefix_tokens=True, norm=norm, output_fmt="NLC", output_dict=True, rho=rho
        )
    assert torch.equal(found["image_features"], features)
    patches, prefix = found["image_intermediates"][-1], found["image_intermediates_prefix"][-1]
    last = torch.cat((prefix, patches), dim=1)
    torch.testing.assert_close(last if norm else model.norm(last), features)
    all_kept = model.num_kept_tokens(rho) == model.num_tokens
    assert ("image_kept" in found) == (not all_kept)
    if not all_kept:
        assert found["image_kept"].shape == patches.shape[:2]


def test_patches_are_where_image_kept_says() -> None:
    model, x = build("bias", depth=1).eval(), images()
    for block in model.blocks:  # so that a patch comes out as it went in
        nn.init.zeros_(block.attn.proj.weight)
        nn.init.zeros_(block.mlp.fc2.weight)
    (whole,) = model.get_intermediate_layers(x)
    found = model.forward_intermediates(x, output_fmt="NLC", output_dict=True, rho=0.5)
    index = found["image_kept"].unsqueeze(-1).expand(-1, -1, 24)
    assert torch.equal(found["image_intermediates"][0], whole.gather(1, index))


def test_what_has_no_meaning_is_refused_in_a_sentence() -> None:
    model, x = build("bias"), images()
    distilled, average = build("distilled"), build("average")
    for call, words in (
        (lambda: model.forward_intermediates(x, rho=0.5), "a map of features needs all patches, and rho is 0.5"),
        (lambda: model.get_intermediate_layers(x, reshape=True, rho=0.5), "set output_fmt to NLC"),
        (lambda: model.forward_intermediates(x, output_fmt="NHWC"), "must be NCHW or NLC, got 'NHWC'"),
        (lambda: model.forward_intermediates(x, 4), "4 blocks are asked for and the model has 3"),
        (lambda: model.forward_intermediates(x, [3]), r"indices \[3\] are no blocks of this model; it has 0 to 2"),
        (lambda: model.prune_intermediate_layers([-4]), "are no blocks of this model"),
        (lambda: model.forward_features(x, 0.0), "rho"),
        (lambda: model.reset_classifier(-1), "num_classes is -1"),
        (lambda: model.reset_classifier(3, "map"), "global_pool must be one of token, avg, max, avgmax, or empty"),
        (lambda: distilled.reset_classifier(3, "avg"), "head and head_dist of this model read tokens of their own"),
        (lambda: average.reset_classifier(3, "token"), "this model has no class token"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            call()
    assert (model.num_classes, distilled.global_pool) == (7, "token")


def test_layers_are_grouped_as_timm_asks() -> None:
    model = build("bias")
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        assert sorted(groups) == [0, 1, 2, 3, 4]
        assert "cls_token" in groups[0]
        assert all(name.startswith("blocks.1.") for name in groups[2])
        assert "head.weight" in groups[4]


def test_a_new_classifier_has_other_classes() -> None:
    from pss.models.settings import TrainedOn

    model = create_model("vit_tiny_patch16_224", num_classes=2, **SMALL).double()
    model.trained_on = TrainedOn(("a", "b"), (0.1, 0.2, 0.3), (1.0, 1.0, 1.0), 0.9)
    cfg = model.pretrained_cfg
    assert (cfg["label_names"], cfg["mean"], cfg["crop_pct"]) == (("a", "b"), (0.1, 0.2, 0.3), 0.9)
    model.reset_classifier(3)
    assert model(images().double()).dtype == torch.float64
    assert "label_names" not in model.pretrained_cfg
    assert model.pretrained_cfg["mean"] == (0.1, 0.2, 0.3)
