"""Exported files compute what the model computes, at every share of patches, without pss."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from pss import methods, recipes
from pss.inference import export
from pss.inference.opening import Run

DOCS = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text(encoding="utf-8")


def made(rel_pos="bias", **changes):
    settings = [f"model.rel_pos={rel_pos}", "model.embed_dim=48", "model.depth=2"]
    config = recipes.get("digits").with_settings(
        [*settings, *(f"model.{key}={value}" for key, value in changes.items())]
    )
    torch.manual_seed(0)
    method = methods.build(config, 4, steps_per_epoch=1).eval()
    for name, weight in method.named_parameters():
        if name.endswith("table") or ".head." in name:  # zero at first, which would hide what they do
            torch.nn.init.normal_(weight)
    return Run("mine", config, ["nil", "one", "two", "many"], 7, method)


def opened(path):
    """A file as a function of images and the number of patches, and its metadata."""
    if path.suffix == ".pt2":
        about = {export.METADATA: ""}
        program = torch.export.load(path, extra_files=about).module()
        return lambda *inputs: program(*inputs).detach(), json.loads(about[export.METADATA])
    session = pytest.importorskip("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    metadata = session.get_modelmeta().custom_metadata_map
    about = {key: json.loads(value) if key not in ("rho", "pss_version", "interpolation") else value
             for key, value in metadata.items()}  # fmt: skip
    return lambda *inputs: torch.from_numpy(
        session.run(None, {name: np.asarray(value) for name, value in zip(names, inputs, strict=True)})[0]
    ), about


def need(suffix):
    if suffix == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")


@pytest.mark.parametrize(
    ("suffix", "rel_pos"),
    [
        ("pt2", "bias"),
        ("onnx", "bias"),
        pytest.param("onnx", "separable", marks=pytest.mark.exhaustive),
        ("onnx", "rope"),
    ],
)
def test_any_share_of_patches_in_one_file(tmp_path, suffix, rel_pos):
    need(suffix)
    run = made(rel_pos)
    if rel_pos == "bias":
        torch.nn.init.zeros_(run.method.model.pos_embed)
    path = tmp_path / f"model.{suffix}"
    assert export.export(run, path, point=None, dynamic=True) < 1e-4
    call, about = opened(path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    images[0] = 0.5  # without a position embedding its patches are all alike: of equals the first are kept
    seen = []
    for size in (2, 5):
        for rho in (0.2, 0.4, 0.6, 0.8, 1.0):
            with torch.inference_mode():
                expected = run.method.predict(images[:size], rho)
            found = call(images[:size], torch.tensor(about["num_patches"][f"{rho:g}"]))
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
            seen.append(expected[1])
    assert min((one - other).abs().max() for one, other in pairwise(seen)) > 1e-2


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_one_share_of_patches_and_what_the_file_says_of_itself(tmp_path, suffix):
    need(suffix)
    run = made()
    export.export(run, tmp_path / f"model.{suffix}", point=0.6)
    call, about = opened(tmp_path / f"model.{suffix}")
    images = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(call(images), run.method.predict(images, 0.6), atol=1e-4, rtol=0)
    assert about["classes"] == ["nil", "one", "two", "many"]
    assert (about["mean"], about["std"]) == ([0.3] * 3, [0.35] * 3)
    assert float(about["rho"]) == 0.6
    assert about["num_patches"] == {"0.6": 9}


def test_the_guide_says_which_onnxruntime_reads_a_file(tmp_path):
    """By the table of versions of ONNX: opset 18 and IR version 8 came with ONNX 1.13, and onnxruntime 1.14 read them
    first. Checked with 1.14.1 and 1.13.1 by hand, which no Python that pss runs on has."""
    onnx = pytest.importorskip("onnx")
    need("onnx")
    export.export(made("none"), tmp_path / "model.onnx", point=None, dynamic=True)
    model = onnx.load(tmp_path / "model.onnx")
    (opset,) = (one.version for one in model.opset_import if not one.domain)
    assert (opset, model.ir_version) == (18, 8)
    lowest = next(row for row in onnx.helper.VERSION_TABLE if row[2] >= opset)
    assert lowest[:2] == ("1.13.0", model.ir_version)
    assert "onnxruntime 1.14 or later" in DOCS
    assert f"opset {opset} and IR version {model.ir_version}" in DOCS


def test_a_model_too_large_for_onnx_is_told_before_it_is_traced(tmp_path, monkeypatch):
    need("onnx")
    monkeypatch.setattr(export, "_MOST_BYTES", 1000)
    with pytest.raises(ValueError, match=r"an ONNX file holds 2 at most; name a file that ends in \.pt2"):
        export.export(made(), tmp_path / "model.onnx", point=0.5)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_would_be_wrong_is_not_kept(tmp_path, monkeypatch):
    broken = made()
    monkeypatch.setattr(broken.method, "tokens", lambda point: (4,))
    with pytest.raises(ValueError, match="would differ from the model"):
        export.export(broken, tmp_path / "model.pt2", point=None, dynamic=True)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_said(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="add --sort magnitude"):
        export.export(made(sort="random"), tmp_path / "model.pt2", point=0.5)
    with pytest.raises(ValueError, match=r"\.onnx or \.pt2"):
        export.check_target(tmp_path / "model.pth")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ValueError, match=r"model\.onnx needs onnx; run: pip install .*\[export\]"):
        export.check_target(tmp_path / "model.onnx")
