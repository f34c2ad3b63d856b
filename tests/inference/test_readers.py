"""Every file that pss writes, of every kind of model, in every reader: the same logits, or refused in a sentence.

`PSS_TABLE=FILE.md` has the exhaustive test write what it found as a table.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from memory_loader import MemoryLoader
from torch import Tensor

from pipelines.base import DataConfig
from pss import methods, recipes
from pss.inference import hub
from pss.inference.export import export
from pss.inference.opening import Run, open_run
from pss.models.create import create_model
from pss.models.vit import VisionTransformer
from pss.models.weights import load_weights, start_from
from pss.runs import checkpoint
from pss.runtime.processes import World
from pss.training.trainer import Trainer

CPU = torch.device("cpu")
CLASSES = ["nil", "one", "two", "many"]
TINY: dict[str, Any] = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}

KINDS: dict[str, dict[str, Any]] = {
    "class token": {},
    "mean of patches": {"global_pool": "avg"},
    "distilled": {"name": "deit_tiny_distilled_patch16_224"},
    "bias": {"rel_pos": "bias"},
    "separable bias": {"rel_pos": "separable"},
    "rotary": {"rel_pos": "rope"},
    "no key bias": {"qkv_bias": "qv"},
    "four heads": {"num_heads": 4},
    "quick GELU": {"name": "vit_base_patch16_clip_quickgelu_224"},
    "SimMIM's": {"name": "simmim_base_patch16"},
    "random patches": {"sort": "random"},
    # No recipe has these; they are built from Python.
    "layer scale": {"init_values": 0.1},
    "registers": {"reg_tokens": 2, "no_embed_class": True},
    "4 x 9 patches": {"img_size": (32, 72)},
}
BY_HAND = ("layer scale", "registers", "4 x 9 patches")
QUICK = ("distilled", "rotary", "registers")

FILES = ("run", "checkpoint", "published", "state dict", ".pt2", ".onnx")
READERS = ("timm", "pss", "pss, as a plain model", "torch.export", "onnxruntime")


def settings_of(kind: str) -> tuple[str, dict[str, Any]]:
    settings = TINY | KINDS[kind]
    return settings.pop("name", "deit_tiny_patch16_224"), settings


def built(kind: str) -> VisionTransformer:
    name, settings = settings_of(kind)
    return create_model(name, num_classes=len(CLASSES), **({"img_size": 32} | settings)).eval()


def written(kind: str, folder: Path, files: tuple[str, ...]) -> Iterator[tuple[str, Path | ValueError]]:
    """What pss writes of a model of that kind, and the model as it is in the folder's `truth.pt`."""
    name, settings = settings_of(kind)
    if kind in BY_HAND:
        model = built(kind)
        spread(model)
        known = {"patch_size", "embed_dim", "depth", "num_heads"}
        config = recipes.get("digits").with_settings([f"model.{key}={settings[key]}" for key in known])
        model_config = replace(config.model, name=name, rel_pos=None, global_pool=None)
        config = replace(config, method="dense", model=model_config, own=())
        rest = {key: value for key, value in settings.items() if key not in {*known, "img_size"}}
        run = Run("mine", config, CLASSES, 1, methods.PLAIN(model, config, 1).eval(), settings=rest)
    else:
        options = [f"model.{key}={value}" for key, value in ({"global_pool": "token"} | settings).items()]
        if name == "simmim_base_patch16":
            options[0] = "model.global_pool=avg"
        config = recipes.get("digits").with_settings(
            [f"model.name={name}", *options, "train.max_steps=1", "train.epochs=1", "optim.warmup_epochs=0"]
        )
        config = replace(config, model=replace(config.model, rel_pos=settings.get("rel_pos")))
        run_folder = folder / "run"
        run_folder.mkdir()
        (run_folder / "config.json").write_text(config.to_json(), encoding="utf-8")
        loaders = MemoryLoader(), MemoryLoader(train=False)
        world = World(rank=0, size=1, device=CPU)
        trainer = Trainer(config, *loaders, classes=CLASSES, output=run_folder, world=world)
        spread(trainer.method.model)
        trainer.fit()
        run = open_run(str(run_folder), CPU)
        yield "run", run_folder
        yield "checkpoint", checkpoint.list_checkpoints(run_folder / "checkpoints")[0]
    torch.save(run.method.model, folder / "truth.pt")
    torch.save(run.method.model.state_dict(), folder / "state.pt")
    yield "state dict", folder / "state.pt"
    try:
        hub.save(folder / "published", run.published(), "a card")
        yield "published", folder / "published"
    except ValueError as error:
        yield "published", error
    for suffix in (".pt2", ".onnx"):
        if suffix in files:
            try:
                export(run, folder / f"model{suffix}", point=0.5 if run.method.model.sort == "random" else 1.0)
                yield suffix, folder / f"model{suffix}"
            except ValueError as error:
                yield suffix, error


def spread(model: VisionTransformer) -> None:
    """Take all parameters away from their initial values, zero among them, which would hide what they do."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))


def by_timm(kind: str, path: Path) -> Callable[[Tensor], Tensor]:
    if path.is_dir():
        model: Any = timm.create_model(f"local-dir:{path}", pretrained=True)
    else:
        name, settings = settings_of(kind)
        own = ("rel_pos", "qkv_bias", "sort")
        settings = {key: value for key, value in settings.items() if key not in own}
        name = "vit_base_patch16_224" if name.startswith("simmim") else name
        options = {"num_classes": len(CLASSES), "img_size": 32} | settings
        model = timm.create_model(name, checkpoint_path=str(path), **options)
    found: Callable[[Tensor], Tensor] = model.eval()
    return found


def by_pss(kind: str, path: Path) -> Callable[[Tensor], Tensor]:
    if path.is_dir() or path.parent.name == "checkpoints":
        return open_run(str(path), CPU).method.predict
    model = built(kind)
    load_weights(model, path)
    return model


def by_pss_as_plain(kind: str, path: Path) -> Callable[[Tensor], Tensor]:
    model = built("class token")
    start_from(model, str(path))
    return model


def by_torch(kind: str, path: Path) -> Callable[[Tensor], Tensor]:
    found: Callable[[Tensor], Tensor] = torch.export.load(path).module()
    return found


def by_onnxruntime(kind: str, path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


READ = dict(zip(READERS, (by_timm, by_pss, by_pss_as_plain, by_torch, by_onnxruntime), strict=True))


@torch.inference_mode()
def outcome(kind: str, file: str, path: Path | ValueError, reader: str, truth: VisionTransformer, x: Tensor) -> str:
    if isinstance(path, ValueError):
        return f"not written: {path}"
    try:
        logits = READ[reader](kind, path)(x)
    except Exception as error:
        if reader.startswith("pss") and not isinstance(error, ValueError):
            raise
        return f"refused: {type(error).__name__}: {' '.join(str(error).split())}"
    difference = float((logits - truth(x)).abs().max())
    return "equal" if difference < 1e-4 * max(1, float(truth(x).abs().max())) else f"DIFFERS by {difference:.2g}"


def outcomes(kind: str, folder: Path, files: tuple[str, ...] = FILES) -> dict[tuple[str, str], str]:
    folder.mkdir()
    paths = dict(written(kind, folder, files))
    truth = torch.load(folder / "truth.pt", weights_only=False).eval()
    x = torch.randn(3, 3, *truth.image_size, generator=torch.Generator().manual_seed(5))
    return {
        (file, reader): outcome(kind, file, paths[file], reader, truth, x)
        for file in files
        if file in paths
        for reader in READERS
        if reader != "onnxruntime" or find_spec("onnxruntime")
    }


def check(kind: str, found: dict[tuple[str, str], str]) -> None:
    wrong = {cell: text for cell, text in found.items() if text.startswith("DIFFERS")}
    assert not wrong, f"{kind}: {wrong}"
    for file in ("run", "checkpoint", "state dict"):
        assert found.get((file, "pss"), "equal") == "equal", (kind, file, found[file, "pss"])
    if kind != "4 x 9 patches":
        assert found["published", "pss"] == "equal", found["published", "pss"]
        assert found["published", "timm"] == "equal", found["published", "timm"]  # it knows our models by now
    same = kind in ("class token", "random patches", "no key bias")  # no bias is one of zero
    assert (found["state dict", "pss, as a plain model"] == "equal") == same, found[
        "state dict", "pss, as a plain model"
    ]
    for cell, text in found.items():
        if cell[1].startswith("pss") and text != "equal":
            assert "\n" not in text
            assert len(text) < 600


@pytest.mark.parametrize("kind", QUICK)
def test_logits_are_the_same_or_refused(tmp_path: Path, kind: str) -> None:
    check(kind, outcomes(kind, tmp_path / "one", FILES[:4]))


@pytest.mark.exhaustive
def test_every_file_of_every_kind_in_every_reader(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    lines = ["| model | file | " + " | ".join(READERS) + " |", "|---" * (2 + len(READERS)) + "|"]
    for number, kind in enumerate(KINDS):
        found = outcomes(kind, tmp_path / str(number))
        check(kind, found)
        assert found[".pt2", "torch.export"] == found[".onnx", "onnxruntime"]
        assert (found[".pt2", "torch.export"] == "equal") == (kind != "random patches")
        for file in FILES:
            cells = [found[file, reader] for reader in READERS if (file, reader) in found]
            if cells:
                shown = (cell.replace(str(tmp_path), "").replace("|", "/") for cell in cells)
                lines.append(f"| {kind} | {file} | " + " | ".join(cell[:140] for cell in shown) + " |")
    if target := os.environ.get("PSS_TABLE"):
        Path(target).write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_images_that_are_not_square_are_not_published(tmp_path: Path) -> None:
    model = create_model("vit_tiny_patch16_224", num_classes=2, img_size=(32, 72), **TINY)
    published = hub.Published(model, "vit_tiny_patch16_224", TINY, None, DataConfig(img_size=32), 1)
    with pytest.raises(ValueError, match=r"32 x 72 pixels and data\.img_size is 32"):
        hub.save(tmp_path / "hub", published, "a card")
    assert not (tmp_path / "hub").exists()
