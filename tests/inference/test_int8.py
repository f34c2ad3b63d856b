"""ONNX files of 8 bits: what is in them, that they answer as the float ones do, and what the command says of them."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
import torch

import cli.eval
import pipelines
from cli.errors import run as run_command
from pss import methods, recipes
from pss.api import exporting
from pss.inference import export
from pss.inference.accuracy import evaluation_inputs
from pss.inference.opening import Run
from pss.inference.quantised import making
from pss.inference.quantised.sessions import Session

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


def model(classes=("cat", "dog", "emu"), **data):
    small = ["model.embed_dim=48", "model.depth=1", *(f"data.{key}={value}" for key, value in data.items())]
    config = recipes.get("digits").with_settings(small)
    torch.manual_seed(0)
    method = methods.build(config, len(classes), steps_per_epoch=1).eval()
    torch.nn.init.normal_(method.model.head.weight, std=0.3)
    return Run("mine", config, list(classes), 7, method)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A file of any ρ."""
    content, _ = export.made(model(), tmp_path_factory.mktemp("int8") / "model.onnx", point=None, dynamic=True)
    return content


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).standard_normal((24, 3, 32, 32), dtype=np.float32)


def operators(content):
    return {node.op_type for node in onnx.load_model_from_string(content).graph.node}


def test_both_kinds_hold_small_weights_and_answer_alike(exported, images):
    quantised = making.quantise(exported, images, threads=1)
    assert (quantised.num_calibrated, quantised.num_compared) == (12, 12)
    assert quantised.agreement.keys() == {"static", "dynamic"}
    assert min(quantised.agreement.values()) > 0.8
    assert len(quantised.content) < 0.75 * len(exported)
    written = onnx.load_model_from_string(quantised.content)
    onnx.checker.check_model(written)
    assert (written.ir_version, {one.version for one in written.opset_import if not one.domain}) == (8, {18})
    whole, plain = Session(quantised.content, 1), Session(exported, 1)
    assert whole.counts == plain.counts
    for rho in whole.counts:
        found, expected = (one.logits(images, rho) for one in (whole, plain))
        assert 0 < abs(found - expected).max() < 0.15 * abs(expected).max()


@pytest.mark.parametrize(
    ("agreement", "kind"), [((1.0, 1.0), "static"), ((0.5, 0.9), "dynamic"), ((0.9, 0.905), "static")]
)
def test_dynamic_ranges_are_taken_only_where_they_agree_better(exported, images, monkeypatch, agreement, kind):
    """By a point at least."""
    shares = dict(zip((b"static", b"dynamic"), agreement, strict=True))

    class Pretended:
        def __init__(self, content, threads):
            self.content = content

        def feeds(self, images, batch):
            return iter(())

        def classes(self, images, batch):
            right = round(1000 * shares.get(self.content, 1.0))
            return np.array([1] * right + [0] * (1000 - right))

    monkeypatch.setattr(making, "Session", Pretended)
    monkeypatch.setattr(making, "_quantised", lambda content, kind, feeds: kind)
    monkeypatch.setattr(making, "_told", lambda model, kind, count: kind.encode())
    assert making.quantise(b"float", images, threads=1).kind == kind


def test_what_is_in_each_kind_and_what_it_says_of_itself(exported, images):
    session = Session(exported, 1)
    kinds = ("static", "QuantizeLinear", "MatMulInteger"), ("dynamic", "MatMulInteger", "QuantizeLinear")
    for kind, expected, other in kinds:
        content = making._told(making._quantised(exported, kind, session.feeds(images, 8)), kind, 12)
        assert expected in operators(content)
        assert other not in operators(content)
        words = {one.key: one.value for one in onnx.load_model_from_string(content).metadata_props}
        assert words.keys() == json.loads(words[export.METADATA]).keys() | {export.METADATA}
        assert json.loads(words["quantised"])["kind"] == kind
        assert json.loads(words["classes"]) == ["cat", "dog", "emu"]


def test_it_is_written_calibrated_and_measured_on_a_data_set(image_root, tmp_path, monkeypatch):
    seen = {}

    def quantise(content, images, threads):
        seen["images"] = images
        return making.quantise(content, images, threads)

    monkeypatch.setattr(exporting, "quantise", quantise)
    said, path = [], tmp_path / "model.onnx"
    made = exporting.export_int8(model(), path, image_root, point=0.6, loader="torch", batch_size=8, say=said.append)
    assert [one.name for one in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_bytes() == made.quantised.content
    assert seen["images"].shape == (53, 3, 32, 32)
    assert said[0].startswith(f"wrote {path}: int8 with {made.quantised.kind} ranges")
    assert "27 images of train" in said[0]
    plain, small = made.found
    assert (plain.file, small.file) == ("float32", f"int8 {made.quantised.kind}")
    assert (plain.rho, plain.accuracy.num_images, plain.agreement) == ("0.6", 23, 1.0)
    run = model()
    settings = {"config": run.config.data, "batch_size": 23, "train": False, "loader": "torch"}
    with contextlib.closing(pipelines.build(image_root, "val", **settings)) as loader, torch.inference_mode():
        (shown,) = evaluation_inputs(loader, run.config.data, torch.device("cpu"))
        right = int((run.method.predict(shown.images, 0.6).argmax(1) == shown.batch.labels).sum())
    assert plain.accuracy.top1 == pytest.approx(100 * right / 23)
    lines = made.table().splitlines()
    assert lines[0].split()[:3] == ["ρ", "file", "top-1"]
    assert len(lines) == 3
    assert "times the images a second of float32" in made.verdict()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--int8", "--rho", "1"], "--int8 goes with --export FILE.onnx"),
        (
            ["--int8", "--export", "m.pt2", "--rho", "1", "--data", "DATA"],
            "only ONNX files are quantised; name a file that",
        ),
        (["--int8", "--export", "m.onnx", "--rho", "1"], "--data is missing"),
        (["--int8", "--predict", "a.jpg"], "--int8 does not go with --predict"),
    ],
)
def test_what_cannot_be_is_said_before_a_model_is_opened(options, words, image_root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = [str(image_root) if word == "DATA" else word for word in options]
    with pytest.raises(SystemExit) as done:
        run_command(cli.eval.app, ["no-run", *given])
    assert done.value.code == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
