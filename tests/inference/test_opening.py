"""Weights files of others, opened for evaluation: what they tell of their model is seen, and nothing is made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from memory_loader import MemoryLoader
from safetensors.torch import save_file
from torch import Tensor

from pss import recipes
from pss.inference import hub
from pss.inference.opening import Run, open_run
from pss.models.create import create_model
from pss.models.settings import TrainedOn
from pss.models.vit import VisionTransformer
from pss.runtime.processes import World
from pss.training.trainer import Trainer

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
    for source in ("nowhere", "a" * 300):
        with pytest.raises(ValueError, match="not found; name the --output folder of a pss-train run"):
            open_run(source, CPU)
    with pytest.raises(ValueError, match=r"there is no weights file .*nowhere\.pth; name one, as in NAME=FILE"):
        open_run(f"{NAME}={tmp_path / 'nowhere.pth'}", CPU)


def test_safetensors_are_read_alike(tmp_path: Path) -> None:
    model = trained(**PUBLISHED)
    save_file(published_names(model), tmp_path / "weights.safetensors")
    run = open_run(f"{NAME}={tmp_path / 'weights.safetensors'}", CPU)
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        assert torch.equal(run.method.predict(images), model(images))


def test_the_average_that_a_file_holds_can_be_evaluated(tmp_path: Path) -> None:
    plain = trained()
    average = {name: value * 0.5 for name, value in published_names(plain).items()}
    file = tmp_path / "both.pth"
    torch.save({"state_dict": published_names(plain), "state_dict_ema": average}, file)
    images = torch.randn(1, 3, 224, 224)
    usual, averaged = (open_run(f"{NAME}={file}", CPU, ema=ema) for ema in (False, True))
    assert torch.equal(averaged.method.model.head.weight, 0.5 * usual.method.model.head.weight)  # type: ignore[arg-type, operator]
    with torch.inference_mode():
        assert torch.equal(usual.method.predict(images), plain(images))
    assert any("there is a moving average too" in note for note in usual.notes)
    assert any("; the moving average of the weights" in note for note in averaged.notes)
    torch.save({"state_dict": published_names(plain)}, file)
    with pytest.raises(ValueError, match="leave out --ema"):
        open_run(f"{NAME}={file}", CPU, ema=True)


def test_what_was_taken_to_be_so_is_said(tmp_path: Path) -> None:
    (note,) = opened(tmp_path, published_names(trained())).notes
    assert note.endswith(f"normalised as the weights of {NAME} in timm, mean 0.485,0.456,0.406".replace(",0", ", 0"))
    size, _ = opened(tmp_path, published_names(trained(img_size=288))).notes
    assert size.endswith(f"made for images of 288 pixels, taking its patches for a square, where {NAME} has 224")
    model = trained(img_size=(192, 192), rel_pos="rope", num_heads=4)
    model.trained_on = TrainedOn(("a", "b", "c", "d", "e"), (0.1,) * 3, (0.2,) * 3)
    run = opened(tmp_path, model.state_dict())
    (size,) = run.notes
    assert "images of 192 pixels, as its settings say" in size
    assert (run.classes, run.config.data.mean) == (["a", "b", "c", "d", "e"], (0.1,) * 3)
    images = torch.randn(1, 3, 192, 192)
    with torch.inference_mode():
        assert torch.equal(run.method.predict(images), model(images))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"img_size": (64, 144)}, "64 x 144 pixels; pss-eval takes square"),
        ({"act_layer": "relu"}, "mlp.act ReLU, not GE"),
    ],
)
def test_what_a_file_tells_and_cannot_be_is_refused(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        opened(tmp_path, trained(**settings).state_dict())


@pytest.mark.parametrize(
    ("classes", "mean", "words"),
    [
        ("abdc", 0.3, "other classes: the same ones in another order; --set model.own_head=true"),
        ("abcx", 0.3, "other classes: 'x' where the model has 'd'; --set model.own_head=true"),
        ("abcd", 0.5, "--set data.mean=0.5,0.5,0.5 --set data.std=0.35,0.35,0.35"),
    ],
)
def test_a_run_starts_from_weights_of_what_it_is_trained_on(
    tmp_path: Path, classes: str, mean: float, words: str
) -> None:
    small = ["model.embed_dim=24", "model.depth=1", "optim.warmup_epochs=0", "train.epochs=1"]
    config = recipes.get("digits").with_settings([*small, f"model.weights={tmp_path / 'weights.pt'}"])
    source = create_model(config.model.name, num_classes=4, img_size=32, **config.model.overrides())
    source.trained_on = TrainedOn(tuple(classes), (mean,) * 3, (0.35,) * 3)
    torch.save(source.state_dict(), tmp_path / "weights.pt")

    def begun(config: Any) -> Trainer:
        loaders = MemoryLoader(), MemoryLoader(train=False)
        return Trainer(config, *loaders, classes=list("abcd"), output=tmp_path / "run", world=World(0, 1, CPU))

    with pytest.raises(ValueError, match=words):
        begun(config)
    remedied = [word for word in words.replace("--set ", "").split("; ")[-1].split() if "=" in word]
    trainer = begun(config.with_settings(remedied))
    assert trainer.method.model.trained_on == TrainedOn(tuple("abcd"), (mean,) * 3, (0.35,) * 3, 1.0)
