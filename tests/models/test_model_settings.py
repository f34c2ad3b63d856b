"""What no tensor shows travels with the weights, and is compared wherever they are loaded."""

from __future__ import annotations

import copy
import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as options_of
from hypothesis import strategies as st
from timm.models import list_models
from torch import Tensor

from pss.attention import relpos
from pss.models import grids, settings
from pss.models.create import create_model
from pss.models.settings import TrainedOn
from pss.models.vit import VisionTransformer
from pss.models.weights import load_weights, start_from
from pss.runs import checkpoint

NAME = "vit_tiny_patch16_224"
TINY: dict[str, Any] = {"num_classes": 4, "img_size": 48, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}
CLIP = "vit_base_patch16_clip_224"


def tiny(seed: int = 0, name: str = NAME, **options: Any) -> VisionTransformer:
    torch.manual_seed(seed)
    model = create_model(name, **(TINY | options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def bare(model: Any) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if name != settings.KEY}


def same(one: VisionTransformer, other: VisionTransformer) -> bool:
    x = torch.randn(2, 3, *one.image_size)
    return torch.allclose(one(x), other(x), atol=1e-5)


def sentence_of(call: Callable[[], Any]) -> str:
    """Why it was refused; nothing if it was not."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


PAIRS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"rel_pos": "rope"}, {}, "rel_pos rope, not none"),
    ({}, {"rel_pos": "rope"}, "rel_pos none, not rope"),
    ({"num_heads": 3}, {"num_heads": 4}, "num_heads 3, not 4"),
    ({"global_pool": "avg"}, {"global_pool": "max"}, "global_pool avg, not max"),
    ({"global_pool": "avg", "fc_norm": False}, {}, "global_pool avg, not token"),
    ({"global_pool": "avg"}, {"global_pool": "avg", "pool_include_prefix": True}, "pool_include_prefix False, not"),
    ({"name": CLIP}, {"name": "vit_base_patch16_clip_quickgelu_224"}, "mlp.act GELU.*, not QuickGELU"),
    ({}, {"name": "vit_tiny_patch16_224", "act_layer": "gelu_tanh"}, "mlp.act"),
    ({"norm_layer": "layernorm"}, {"norm_layer": torch.nn.LayerNorm}, "eps=1e-06.*, not .*eps=1e-05"),
]


@pytest.mark.parametrize(("source", "target", "words"), PAIRS)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_another_model_with_the_same_tensors_is_refused(
    tmp_path: Path, source: dict[str, Any], target: dict[str, Any], words: str, suffix: str
) -> None:
    theirs, ours = tiny(0, **source), tiny(1, **target)
    path = tmp_path / f"weights{suffix}"
    (torch.save if suffix == ".pt" else safetensors.torch.save_file)(theirs.state_dict(), path)
    before = copy.deepcopy(ours)
    with pytest.raises(ValueError, match=words):
        load_weights(ours, path)
    with pytest.raises(ValueError, match=words):
        ours.load_state_dict(theirs.state_dict())
    assert same(ours, before)
    with pytest.raises((RuntimeError, KeyError)):  # timm has no place for what it would not know
        timm.create_model(NAME, **TINY, checkpoint_path=str(path))
    again = tiny(2, **source)
    load_weights(again, path)
    assert same(again, theirs)


@pytest.mark.parametrize(("source", "target"), [((32, 72), (48, 48)), ((32, 72), (72, 32)), ((16, 64), (32, 32))])
@pytest.mark.parametrize("rel_pos", ["none", "bias"])
def test_as_many_patches_in_other_rows_are_resized_and_said(
    tmp_path: Path, source: tuple[int, int], target: tuple[int, int], rel_pos: str
) -> None:
    theirs, ours = tiny(0, img_size=source, rel_pos=rel_pos), tiny(1, img_size=target, rel_pos=rel_pos)
    with torch.no_grad():  # the same in each row, so that rows can be told
        theirs.pos_embed[0, 1:] = torch.arange(theirs.num_patches)[:, None] // theirs.grid_size[1]  # type: ignore[index]
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    report = load_weights(ours, tmp_path / "weights.pt")
    assert "pos_embed" in report.resized
    rows, columns = (side // 8 for side in source)
    assert f"from {rows} x {columns} to {target[0] // 8} x {target[1] // 8} patches" in str(report)
    by_row = ours.pos_embed[0, 1:].detach().view(*ours.grid_size, -1)  # type: ignore[index]
    torch.testing.assert_close(by_row, by_row[:, :1].expand_as(by_row), atol=1e-4, rtol=0)
    torch.save({"model": bare(theirs), "pss": {"num_heads": 3}}, tmp_path / "bare.pt")
    with pytest.raises(ValueError, match=r"how many rows its patches lie in; save it again with .*'img_size'"):
        load_weights(tiny(1, img_size=target, rel_pos=rel_pos, pos_embed="learn"), tmp_path / "bare.pt")
    with pytest.raises(ValueError, match="a grid of"):
        ours.load_state_dict(theirs.state_dict()) if rel_pos == "none" else tiny(1, img_size=target).load_state_dict(
            {**bare(tiny(img_size=source)), settings.KEY: theirs.get_extra_state()}
        )


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), rel_pos=st.sampled_from(["none", "bias", "separable"]))
@options_of(max_examples=60)
def test_the_grid_is_among_those_that_shapes_allow(rows: int, columns: int, rel_pos: Any) -> None:
    """With a table and a position embedding, no other grid is, but for the one that lies across."""
    tensors = {"pos_embed": torch.empty(1, rows * columns + 1, 1), "cls_token": torch.empty(1, 1, 1)}
    if rel_pos == "bias":
        tensors[f"blocks.0.attn.{grids.TABLE}"] = torch.empty(relpos.num_table_rows((rows, columns)), 1)
    elif rel_pos == "separable":
        tensors[f"blocks.0.attn.{grids.SEPARABLE_TABLE}"] = torch.empty(relpos.num_separable_rows((rows, columns)), 1)
    found = grids.candidates(tensors, 1)
    if rel_pos == "none":
        side = math.isqrt(rows * columns)
        assert found == ([(side, side)] if side * side == rows * columns else [])
        assert not grids.is_sure(tensors, found)
    else:
        assert set(found) == {(rows, columns), (columns, rows)}
        assert grids.is_sure(tensors, found) == (rows == columns)


def test_a_file_of_timms_is_taken_where_its_name_says_the_rest(tmp_path: Path) -> None:
    plain = timm.create_model(NAME, num_classes=4, depth=1)
    torch.save(plain.state_dict(), tmp_path / "plain.pt")
    usual = create_model(NAME, num_classes=4, depth=1)
    assert not load_weights(usual, tmp_path / "plain.pt").adapted
    larger = create_model(NAME, num_classes=4, depth=1, img_size=256)
    assert "from 14 x 14 to 16 x 16 patches" in str(load_weights(larger, tmp_path / "plain.pt"))
    for change, words in (
        ({"num_heads": 6}, "num_heads 3, not 6"),
        ({"rel_pos": "rope"}, "rel_pos none, not rope"),
        ({"act_layer": "gelu_tanh"}, "mlp.act"),
    ):
        with pytest.raises(ValueError, match=words):
            load_weights(create_model(NAME, num_classes=4, depth=1, **change), tmp_path / "plain.pt")
    told = {"num_heads": 6}
    load_weights(create_model(NAME, num_classes=4, depth=1, **told), tmp_path / "plain.pt", told=told)
    torch.save(larger.state_dict(), tmp_path / "larger.pt")
    torch.save(bare(larger), tmp_path / "bare.pt")
    assert "from 16 x 16 to 14 x 14" in str(load_weights(usual, tmp_path / "larger.pt"))
    with pytest.raises(ValueError, match="how many rows"):
        load_weights(usual, tmp_path / "bare.pt")


@pytest.mark.parametrize(
    ("theirs", "words"),
    [(("a", "b", "x", "d"), "'x' where the model has 'c'"), (("d", "c", "b", "a"), "in another order")],
)
def test_as_many_other_classes_are_refused(tmp_path: Path, theirs: tuple[str, ...], words: str) -> None:
    source, model = tiny(0), tiny(1)
    source.trained_on = TrainedOn(theirs)
    model.trained_on = TrainedOn(("a", "b", "c", "d"))
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=f"{words}; pass ignore_head=True"):
        load_weights(model, tmp_path / "weights.pt")
    report = load_weights(model, tmp_path / "weights.pt", ignore_head=True)
    assert set(report.unexpected) == {"head.weight", "head.bias"}
    assert model.trained_on == TrainedOn(("a", "b", "c", "d"))
    unnamed = tiny(2)
    load_weights(unnamed, tmp_path / "weights.pt")
    assert unnamed.trained_on == TrainedOn(theirs)
    torch.save(bare(source) | {settings.KEY: tiny(0).get_extra_state()}, tmp_path / "unnamed.pt")
    assert "does not tell what its classes are called" in str(load_weights(model, tmp_path / "unnamed.pt"))


@pytest.mark.parametrize("name", ["mean", "std"])
def test_images_normalised_in_another_way_are_refused(tmp_path: Path, name: str) -> None:
    source, model = tiny(0), tiny(1)
    usual = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    source.trained_on = TrainedOn(**usual)
    model.trained_on = TrainedOn(**usual | {name: (0.4, 0.5, 0.5)})
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    words = rf"data\.{name}=.*set data\.mean=0\.5,0\.5,0\.5 and data\.std=0\.25,0\.25,0\.25"
    for ignore_head in (False, True):
        with pytest.raises(ValueError, match=words):
            load_weights(model, tmp_path / "weights.pt", ignore_head=ignore_head)


def test_averages_and_best_ones_can_be_asked_for(tmp_path: Path) -> None:
    plain, average, model = tiny(0), tiny(1), tiny(2)
    for wrappers in (("state_dict", "state_dict_ema"), ("model", "model_ema"), ("method", "ema")):
        path = tmp_path / f"{wrappers[0]}#1.pt"
        torch.save(dict(zip(wrappers, (plain.state_dict(), average.state_dict()), strict=True)), path)
        assert f"there is a moving average too: {path}#ema" in str(start_from(model, str(path)))
        assert same(model, plain)
        assert "the moving average of the weights" in str(start_from(model, f"{path}#ema"))
        assert same(model, average)
        load_weights(model, path, ema=True)
    torch.save(plain.state_dict(), tmp_path / "one.pt")
    for where, words in (("#ema", "no average of them; leave out --ema, or #ema"), ("#best", "is for the folder of a")):
        with pytest.raises(ValueError, match=words):
            start_from(model, f"{tmp_path / 'one.pt'}{where}")

    folder = tmp_path / "run"
    folder.mkdir()
    for step, score in ((1, 9.0), (2, 5.0)):
        models = tiny(10 * step), tiny(10 * step + 1)
        state = {"method": models[0].state_dict(), "ema": models[1].state_dict()}
        checkpoint.save(folder / "checkpoints", state, step=step, keep=2)
        checkpoint.note_best(folder / "checkpoints", step=step, continuation=0, score=score, weights="method")
    for where, seed in (("", 20), ("#ema", 21), ("#best", 10), ("#best#ema", 11), ("#ema#best", 11)):
        start_from(model, f"{folder}{where}")
        assert same(model, tiny(seed)), where


def test_a_checkpoint_of_an_earlier_version_tells_by_its_configuration(tmp_path: Path) -> None:
    source = tiny(0, rel_pos="rope")
    config = {
        "model": {"name": NAME, "rel_pos": "rope", "weights": None, "own_head": False} | {
            key: TINY[key] for key in ("patch_size", "embed_dim", "depth", "num_heads")
        },
        "data": {"img_size": 48, "mean": [0.3, 0.3, 0.3], "std": [0.4, 0.4, 0.4]},
    }  # fmt: skip
    state = {f"model.{name}": value for name, value in bare(source).items()}
    torch.save({"method": state, "config": config, "classes": list("abcd")}, tmp_path / "old.pt")
    model = tiny(1, rel_pos="rope")
    load_weights(model, tmp_path / "old.pt")
    assert same(model, source)
    assert model.trained_on == TrainedOn(tuple("abcd"), (0.3,) * 3, (0.4,) * 3)
    with pytest.raises(ValueError, match="rel_pos rope, not none"):
        load_weights(tiny(1), tmp_path / "old.pt")


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(data=st.data())
@options_of(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_settings_that_are_not_are_refused_in_a_sentence(tmp_path: Path, data: st.DataObject) -> None:
    model = tiny()
    whole = json.loads(bytes(model.get_extra_state().tolist()))
    key = data.draw(st.sampled_from([*whole, "classes", "foo"]))
    changed = json.dumps(whole | {key: data.draw(JUNK)}).encode()
    if data.draw(st.booleans()):
        changed = changed[: data.draw(st.integers(0, len(changed)))]
    state = bare(model) | {settings.KEY: torch.tensor(list(changed), dtype=torch.uint8)}
    torch.save(state, tmp_path / "weights.pt")
    for load in (lambda: load_weights(model, tmp_path / "weights.pt"), lambda: model.load_state_dict(state)):
        said = sentence_of(load)
        assert "\n" not in said
        assert len(said) < 500


def test_a_state_dict_is_what_every_tool_takes() -> None:
    model = tiny(rel_pos="rope")
    state = model.state_dict()
    checkpoint.assert_plain(dict(state))
    assert all(isinstance(value, Tensor) for value in state.values())
    assert settings.KEY not in dict(model.named_buffers()) | dict(model.named_parameters())
    again = copy.deepcopy(model)
    again.load_state_dict(state)
    again.load_state_dict(bare(model))
    x = torch.randn(1, 3, 48, 48)
    torch.testing.assert_close(torch.func.functional_call(model, dict(state), (x,)), model(x))


# What is built, and not what was asked for.


def walk(names: list[str]) -> None:
    """Each is refused in a sentence, or takes any share of patches."""
    for name in names:
        with torch.device("meta"):
            if said := sentence_of(lambda name=name: create_model(name, depth=1, img_size=None)):
                assert re.search("is not a plain Vision Transformer|is not a multiple of the patch size", said), name
                continue
            model = create_model(name, depth=1, img_size=None)
            for rho in (1.0, 0.5):
                logits = model(torch.randn(2, 3, *model.image_size), rho)
                assert logits.shape == (2, model.num_classes or model.embed_dim), name


NAMES = [*list_models(module="vision_transformer"), *list_models(module="deit")]
DYNAMIC = ["test_vit", "test_vit2", "test_vit4", "vit_intern300m_patch14_448"]


def test_some_of_timms_names() -> None:
    walk([*DYNAMIC, *random.Random(0).sample(NAMES, 4)])


@pytest.mark.exhaustive
def test_all_of_timms_names() -> None:
    assert len(NAMES) > 170
    walk(NAMES)


@pytest.mark.parametrize("name", DYNAMIC[:3])
def test_models_of_any_image_size_are_built_for_one(name: str) -> None:
    plain = timm.create_model(name, num_classes=3, img_size=160).eval()
    model = create_model(name, num_classes=3, img_size=160, dynamic_img_size=False).eval()
    model.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 160, 160)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), plain(x))
        assert not torch.allclose(model(x, 0.5), plain(x))


@pytest.mark.parametrize(
    "options",
    [
        {"pretrained": True},
        {"checkpoint_path": "weights.pt"},
        {"pretrained_cfg_overlay": {"url": "x"}},
        {"num_head": 3},
    ],
)
def test_only_what_a_vit_is_made_of_can_be_set(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"has no setting '{next(iter(options))}'"):
        create_model(NAME, **options)


@pytest.mark.parametrize("options", [{"patch_drop_rate": 0.1}, {"dynamic_img_size": True}, {"dynamic_img_pad": True}])
def test_what_works_behind_the_sampling_cannot(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="cannot be combined with patch sampling"):
        create_model(NAME, **options)
