"""Weights files of others, opened for evaluation: what they tell of their model is seen, and nothing is made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pss.inference import hub
from pss.inference.opening import Run, open_run
from pss.models.create import create_model
from pss.models.vit import VisionTransformer

CPU = torch.device("cpu")
NAME = "deit_tiny_patch16_224"
PUBLISHED: dict[str, Any] = {"rel_pos": "bias", "qkv_bias": "qv", "global_pool": "avg"}
SIMMIM: dict[str, Any] = PUBLISHED | {"pos_embed": "none", "init_values": 0.1}


def trained(**settings: Any) -> VisionTransformer:
    """A model whose every parameter has left its initial value."""
    torch.manual_seed(0)
    model = create_model(NAME, **({"num_classes": 5} | settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def published_names(model: VisionTransformer, *, shared: bool = False) -> dict[str, Tensor]:
    """Its state as BEiT's code, which SimMIM's and the patch sampling runs' is made of, calls it."""
    state = {
        name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): value
        for name, value in model.state_dict().items()
        if name != "_extra_state"
    }
    tables = [name for name in state if name.endswith(".relative_position_bias_table")]
    for name in tables:
        tokens = model.num_patches + 1
        state[name.replace("bias_table", "index")] = torch.zeros(tokens, tokens, dtype=torch.int64)
    if shared and tables:
        state["rel_pos_bias.relative_position_bias_table"] = state[tables[0]]
        for name in tables:
            del state[name]
    return state


def opened(tmp_path: Path, state: dict[str, Tensor], name: str = NAME) -> Run:
    torch.save({"model": state, "epoch": 299}, tmp_path / "weights.pth")
    return open_run(f"{name}={tmp_path / 'weights.pth'}", CPU)


@pytest.mark.parametrize(
    "settings",
    [
        PUBLISHED,
        PUBLISHED | {"img_size": 384},
        SIMMIM,
        SIMMIM | {"img_size": 192},
        {"rel_pos": "separable", "img_size": 192},
        {"global_pool": "avg", "init_values": 0.1},
        {"qkv_bias": "qv"},
        {"img_size": 288},
        {},
    ],
)
def test_a_weights_file_says_what_model_it_is_of(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = trained(**settings)
    run = opened(tmp_path, published_names(model))
    side = settings.get("img_size", 224)
    assert (run.config.data.img_size, run.num_classes) == (side, 5)
    images = torch.randn(1, 3, side, side)
    with torch.inference_mode():
        for rho in (0.4, 1.0):
            assert torch.equal(run.method.predict(images, rho), model(images, rho))


def test_one_table_for_all_layers_is_every_layers(tmp_path: Path) -> None:
    model = trained(**SIMMIM)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.relative_position_bias_table.copy_(model.blocks[0].attn.relative_position_bias_table)
    run = opened(tmp_path, published_names(model, shared=True))
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        assert torch.equal(run.method.predict(images), model(images))


@pytest.mark.parametrize("settings", [PUBLISHED, SIMMIM | {"img_size": 192}])
def test_what_was_seen_is_pushed_along(tmp_path: Path, settings: dict[str, Any]) -> None:
    run = opened(tmp_path, published_names(trained(**settings)))
    hub.save(tmp_path / "mine", run.published(), "a card")
    again = open_run(str(tmp_path / "mine"), CPU)
    side = run.config.data.img_size
    images = torch.randn(1, 3, side, side)
    with torch.inference_mode():
        assert torch.equal(again.method.predict(images), run.method.predict(images))
    assert again.published().settings == run.published().settings


@pytest.mark.parametrize(
    ("settings", "without", "message"),
    [
        (PUBLISHED, ("head",), "has no classifier; fine-tune it with pss-train"),
        ({}, ("head",), "has no classifier; fine-tune it with pss-train"),
        (PUBLISHED, ("fc_norm",), r"lacks norm\.weight, norm\.bias; fine-tune .* with pss-train"),
        ({"depth": 3}, (), r"lacks blocks\.3.*; name the model"),
        (PUBLISHED | {"depth": 13}, (), r"has blocks\.12.*; name the model"),
        ({"embed_dim": 96}, (), "shape .*; name the model"),
        ({}, ("pos_embed",), "how its model knows where patches lie.*name the run of pss-train"),
        ({}, ("cls_token",), "lacks cls_token; name the model"),
    ],
)
def test_what_a_file_does_not_tell_is_refused(
    tmp_path: Path, settings: dict[str, Any], without: tuple[str, ...], message: str
) -> None:
    state = published_names(trained(**settings))
    with pytest.raises(ValueError, match=message) as raised:
        opened(tmp_path, {name: value for name, value in state.items() if not name.startswith(without)})
    for not_here in ("ignore_head", "own_head", "--set", "create_model", "settings_of"):
        assert not_here not in str(raised.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no weights file .*nowhere\.pth; name one, as in NAME=FILE"):
        open_run(f"{NAME}={tmp_path / 'nowhere.pth'}", CPU)


def test_safetensors_are_read_alike(tmp_path: Path) -> None:
    model = trained(**PUBLISHED)
    save_file(published_names(model), tmp_path / "weights.safetensors")
    run = open_run(f"{NAME}={tmp_path / 'weights.safetensors'}", CPU)
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        assert torch.equal(run.method.predict(images), model(images))
