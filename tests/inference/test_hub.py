"""A published folder is data: whatever somebody put into it, it is read, or refused in a sentence, and nothing more."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import safetensors.torch
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.base import DataConfig
from pss.inference import hub
from pss.inference.opening import open_run
from pss.models.create import create_model
from pss.models.weights import start_from

NAME = "vit_tiny_patch16_224"
TINY: dict[str, Any] = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("../../etc/passwd"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> NoReturn:
        pytest.fail("it asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "good"
    publish(folder, rel_pos="rope")
    return folder


def publish(folder: Path, name: str = NAME, **options: Any) -> hub.Published:
    built = TINY | options
    model = create_model(name, num_classes=3, img_size=32, **built)
    published = hub.Published(model, name, built, ["a", "b", "c"], DataConfig(img_size=32), 5)
    hub.save(folder, published, "a card")
    return published


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "made by somebody else"))


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def write(folder: Path, config: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def refused(folder: Path) -> str:
    with pytest.raises(ValueError, match="no model that") as raised:
        hub.load(folder)
    said = str(raised.value)
    assert "\n" not in said
    assert len(said) < 700
    return said


@pytest.mark.parametrize(
    "asked",
    [
        {"pretrained": True},
        {"pretrained": True, "pretrained_cfg_overlay": {"url": "http://127.0.0.1:9/any.pth", "hf_hub_id": None}},
        {"pretrained_cfg": {"file": "/etc/passwd"}},
        {"checkpoint_path": "/etc/passwd"},
        {"cache_dir": "/tmp"},
        {"norm_layer": "os:system"},
        {"depth": 1 << 30},
        {"embed_dim": 1 << 40},
        {"patch_size": 1},
        {"mlp_ratio": 1e9},
        {"num_heads": True},
        {"drop_path_rate": -1},
    ],
)
def test_a_folder_asks_for_nothing_else(folder: Path, asked: dict[str, Any]) -> None:
    config = config_of(folder)
    config["pss"]["settings"] |= asked
    write(folder, config)
    refused(folder)


@pytest.mark.parametrize(
    "name", ["os:system", "hf-hub:timm/vit_tiny_patch16_224", "local-dir:/", "resnet50", "x" * 9999]
)
def test_a_folder_names_a_model_and_no_code(folder: Path, name: str) -> None:
    config = config_of(folder)
    config["pss"]["name"] = name
    write(folder, config)
    refused(folder)


def places(tree: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield (*before, key)
        if isinstance(value, dict | list):
            yield from places(value, (*before, key))


@given(data=st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_configuration_holds(good: Path, folder: Path, data: st.DataObject) -> None:
    config = config_of(good)
    place = data.draw(st.sampled_from(list(places(config))))
    inner = config
    for key in place[:-1]:
        inner = inner[key]
    if data.draw(st.booleans(), label="left out"):
        del inner[place[-1]]
    else:
        inner[place[-1]] = data.draw(JUNK)
    write(folder, config)
    try:
        published = hub.load(folder)
    except ValueError as error:
        said = str(error)
    else:
        said = ""
        assert published.model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    assert "\n" not in said
    assert len(said) < 700


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no JSON in UTF-8"),
        (b"null", "not written by pss"),
        (b"\xff\xfe{}", "no JSON in UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"pss": {"step": NaN}}', "it holds NaN"),
        (b'{"pss": {"format": 2}}', "format '2', and this pss reads up to 1; update pss"),
        (b"1" * 5000, "no JSON"),
        (b'{"architecture": "vit_tiny_patch16_224"}', "not written by pss; for another model name MODEL=FILE"),
    ],
)
def test_a_file_that_is_no_configuration(folder: Path, content: bytes, words: str) -> None:
    (folder / "config.json").write_bytes(content)
    assert words in refused(folder)


@pytest.mark.parametrize("change", ["empty", "cut", "huge header", "integers", "not finite", "another model's", "link"])
def test_weights_that_are_none(good: Path, folder: Path, change: str) -> None:
    path = folder / "model.safetensors"
    whole, tensors = path.read_bytes(), safetensors.torch.load_file(path)
    if change in ("empty", "cut"):
        path.write_bytes(whole[: {"empty": 0, "cut": -7}[change]])
    elif change == "huge header":
        path.write_bytes((1 << 50).to_bytes(8, "little") + whole[8:])
    elif change == "integers":
        path.write_bytes(whole.replace(b'"F32"', b'"I32"'))
    elif change == "not finite":
        tensors["head.bias"][1] = float("nan")
        safetensors.torch.save_file(tensors, path)
    elif change == "another model's":
        safetensors.torch.save_file(tensors | {"_extra_state": create_model(NAME, **TINY).get_extra_state()}, path)
    else:
        path.unlink()
        path.symlink_to(good / "model.safetensors")
    refused(folder)


def test_the_cache_of_the_hub_consists_of_links(good: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--me--mine" / "blobs", tmp_path / "models--me--mine" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    shutil.copytree(good, blobs)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    assert hub.load(snapshot).step == 5


@pytest.mark.parametrize(
    "change",
    [{"mean": [0.1, 0.2, 0.3]}, {"std": [0.1, 0.2, 0.3]}, {"label_names": ["b", "a", "c"]}, {"label_names": None}],
)
def test_what_the_weights_were_made_with_cannot_be_edited(folder: Path, change: dict[str, Any]) -> None:
    config = config_of(folder)
    config["pretrained_cfg"] |= change
    write(folder, config)
    refused(folder)


@pytest.mark.parametrize("name", [NAME, "deit_tiny_distilled_patch16_224"])
def test_timm_is_told_what_computes_the_same(tmp_path: Path, name: str) -> None:
    published = publish(tmp_path / "mine", name)
    config = config_of(tmp_path / "mine")
    assert config["architecture"] == name
    classifier = ["head", "head_dist"] if "distilled" in name else "head"
    assert config["pretrained_cfg"]["classifier"] == classifier
    plain: Any = timm.create_model(f"local-dir:{tmp_path / 'mine'}", pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(plain(x), published.model.eval()(x))
    other: Any = timm.create_model(f"local-dir:{tmp_path / 'mine'}", pretrained=True, num_classes=7)
    assert other(x).shape[-1] == 7  # timm drops the classifiers that it is told of


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (NAME, {"rel_pos": "rope"}),
        (NAME, {"rel_pos": "bias", "sort": "random"}),
        (NAME, {"qkv_bias": "qv"}),
        ("lvvit_s", {}),
    ],
)
def test_timm_builds_with_pss_what_it_would_compute_differently(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    folder = tmp_path / "mine"
    published = publish(folder, name, **options)
    assert config_of(folder)["architecture"] == f"pss_{name}"
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(x, 0.5, sort="magnitude"), published.model.eval()(x, 0.5, sort="magnitude"))
    assert model.sort == published.model.sort
    assert model.pretrained_cfg["label_names"] == ("a", "b", "c")
    other: Any = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7, drop_path_rate=0.1)
    assert other(x).shape == (2, 7)
    torch.testing.assert_close(other.patch_embed.proj.weight, published.model.patch_embed.proj.weight)
    maps: Any = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True, out_indices=1)
    assert [one.shape for one in maps(x)] == [(2, 24, 4, 4)]
    with pytest.raises(RuntimeError, match="_extra_state"):  # as what it is not
        timm.create_model(
            NAME, **TINY, num_classes=3, img_size=32, checkpoint_path=str(tmp_path / "mine/model.safetensors")
        )


def test_timm_fetches_it_from_the_hub(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "cache" / "models--me--mine"
    shutil.copytree(good, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model: Any = timm.create_model("hf-hub:me/mine", pretrained=True, cache_dir=tmp_path / "cache").eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(x, 0.5), hub.load(good).model(x, 0.5))


@pytest.mark.parametrize(
    "asked",
    [
        {"checkpoint_path": "/etc/passwd"},
        {"depth": 1 << 30},
        {"img_size": 1 << 40},
        {"num_classes": -1},
        {"in_chans": "3"},
        {"norm_layer": ["os"]},
    ],
)
def test_timm_asks_for_nothing_else_either(folder: Path, asked: dict[str, Any]) -> None:
    config = config_of(folder)
    config["model_args"] |= asked
    write(folder, config)
    with pytest.raises((ValueError, RuntimeError)) as raised:
        timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert re.search("the published folder has|_extra_state", str(raised.value)), raised.value


def test_a_run_starts_from_a_published_folder(good: Path) -> None:
    model = create_model(NAME, num_classes=3, img_size=32, rel_pos="rope", **TINY)
    start_from(model, str(good))
    assert model.trained_on is not None
    assert model.trained_on.classes == ("a", "b", "c")
    with pytest.raises(ValueError, match="rel_pos rope, not none"):
        start_from(create_model(NAME, num_classes=3, img_size=32, **TINY), str(good))


def test_what_a_folder_cannot_tell_is_not_published(tmp_path: Path) -> None:
    model = create_model(NAME, num_classes=3, img_size=32, **TINY)
    data = DataConfig(img_size=32)
    with pytest.raises(ValueError, match="code of your own, which no published folder holds; --export"):
        hub.Published(model, "mine:vit", {}, None, data, 1)
    for settings_, words in (
        (TINY | {"num_heads": 4}, "build another model, with num_heads 3, not 4"),
        (TINY | {"depth": 2}, "build another model; pass those"),
        (TINY | {"norm_layer": torch.nn.LayerNorm}, "built with norm_layer=.*--export"),
    ):
        with pytest.raises(ValueError, match=words):
            hub.save(tmp_path / "mine", hub.Published(model, NAME, settings_, None, data, 1), "a card")
    assert not (tmp_path / "mine").exists()


def test_a_folder_of_the_first_version_is_read(folder: Path) -> None:
    """It told timm to build its models whatever they compute, and had no settings beside its weights."""
    config = config_of(folder)
    del config["pss"]["format"]
    config |= {"architecture": NAME, "model_args": TINY}
    write(folder, config)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    del tensors["_extra_state"]
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    run = open_run(str(folder), torch.device("cpu"))
    assert (run.step, run.classes, run.method.model.rel_pos) == (5, ["a", "b", "c"], "rope")
