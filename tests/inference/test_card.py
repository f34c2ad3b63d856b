"""The card of a pushed model: front matter that the hub reads, what is known and nothing else, code that runs."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from conftest import picture, write_folder
from huggingface_hub import ModelCard
from memory_loader import fit
from warm import ROOT

from pss import recipes
from pss.inference import hub
from pss.inference.opening import open_run
from pss.inference.publishing import card, facts
from pss.inference.publishing.pushing import write_model
from pss.runs.lock import SUMMARY

CPU = torch.device("cpu")


def row(rho: float | None, **more: Any) -> dict[str, Any]:
    names = ("images_per_second", "images_per_second_with_loader", "latency_ms")
    spread = {f"{key}{end}": 1.0 for key in names for end in ("", "_low", "_high")}
    return spread | {
        "run": "mine", "rho": rho, "knob": "ρ", "tokens": 3, "top1": 51.234, "top5": 90.0, "loss": 1.0, "gflops": 1.0,
        "gflops_low": None, "peak_memory_mib": None, "num_images": 5, "device": "x86_64 CPU", "torch": "2",
        "batch_size": 4,
    } | more  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    settings = [
        "train.epochs=2",
        "optim.warmup_epochs=0",
        "model.depth=2",
        "model.embed_dim=24",
        "model.num_heads=3",
        "train.batch_size=8",
    ]
    for name, rel_pos in (("biased", "bias"), ("plain", "none")):
        fit(recipes.get("digits").with_settings([*settings, f"model.rel_pos={rel_pos}"]), folder / name)
    return folder


@pytest.fixture(scope="module", params=["biased", "plain"])
def pushed(request: pytest.FixtureRequest, trained: Path) -> Path:
    run, target = open_run(str(trained / request.param), CPU), trained / f"{request.param} pushed"
    known = facts.of(run, dataset="my digits", split="val", licence="apache-2.0")
    write_model(target, run, request.param, [row(1.0), row(0.6)], known, {"rho.png": b"a picture", "rho.csv": "x"})
    return target


def test_the_hub_reads_the_front_matter(pushed: Path) -> None:
    found = ModelCard.load(pushed / "README.md").data
    biased = pushed.name.startswith("biased")
    assert (found.license, found.pipeline_tag) == ("apache-2.0", "image-classification")
    assert found.library_name == ("pss" if biased else "timm")
    assert found.base_model is None
    assert [(one.metric_name, one.metric_value, one.dataset_split) for one in found.eval_results] == [
        (f"{metric} at ρ = {rho}", value, "val")
        for rho in ("1", "0.6")
        for metric, value in (("top-1 %", 51.23), ("top-5 %", 90.0))
    ]
    assert {(one.dataset_type, one.dataset_name) for one in found.eval_results} == {("my-digits", "my digits")}
    assert sorted(path.name for path in pushed.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "rho.png",
    ]  # fmt: skip


def test_it_tells_what_the_run_tells(pushed: Path, trained: Path) -> None:
    shown = (pushed / "README.md").read_text(encoding="utf-8")
    run = trained / pushed.name.split()[0]
    seconds = json.loads((run / SUMMARY).read_text())["train_seconds"]
    for words in (
        "| recipe | digits |", "| epochs | 2 |", f"| trained for | {seconds:.1f} seconds |", "CPU |",
        "was trained with a Patch Sampling Schedule", "![Accuracy against", "| 0.6 |", "51.23",
        "of my digits, split val", "4 classes) for images of 32 × 32 pixels", "mean (0.3, 0.3, 0.3)",
    ):  # fmt: skip
        assert words in shown, words
    (command,) = re.findall(r"```sh\n(.*)\n```", shown, re.DOTALL)
    _, _, *words = [word for word in shlex.split(command) if word != "\n"]
    assert command.startswith("pss-train digits --data DATA --output RUN \\\n    --set ")
    settings = [value for option, value in zip(words[::2], words[1::2], strict=True) if option == "--set"]
    again = recipes.get("digits").with_settings(settings)
    assert again.to_dict() == open_run(str(run), CPU).config.to_dict()


def test_what_is_not_known_is_left_out(trained: Path) -> None:
    """Of a model that no run is behind, and of one whose folder has lost its summary and log."""
    published = open_run(str(trained / "biased"), CPU).published()
    hub.save(trained / "alone", published, "a card")
    alone = facts.of(open_run(str(trained / "alone"), CPU))
    shown = card.text("alone", rows=[row(None)], facts=alone, plain=False, picture=False)
    data = yaml.safe_load(shown.split("---\n")[1])
    assert set(data) == {"library_name", "pipeline_tag", "tags"}
    for word in ("recipe", "trained for", "Schedule", "None", "rho.png", "pss-train", "split", "licen"):
        assert word not in shown, word
    assert "| as trained |" in shown
    known = facts.of(open_run(str(trained / "biased"), CPU))
    assert (known.recipe, known.dataset, known.licence) == ("digits", None, None)
    for name in (SUMMARY, "log.jsonl"):
        (trained / "biased" / name).rename(trained / name)
    try:
        lost = facts.of(open_run(str(trained / "biased"), CPU))
    finally:
        for name in (SUMMARY, "log.jsonl"):
            (trained / name).rename(trained / "biased" / name)
    assert (lost.recipe, lost.epochs, lost.hours, lost.hardware) == ("digits", None, None, None)


def test_the_base_model_is_named_as_on_the_hub(trained: Path) -> None:
    config = recipes.get("deit-s-224").with_settings(["model.weights=timm:deit_small_patch16_224"])
    assert facts._base_model(config) == "timm/deit_small_patch16_224.fb_in1k"
    for recipe, words in (
        (None, "Its weights are those of timm/x"),
        ("mine", "Its training began with the weights of"),
    ):
        known = replace(facts.of(open_run(str(trained / "biased"), CPU)), base_model="timm/x", recipe=recipe)
        assert words in card.text("a", rows=[row(1.0)], facts=known, plain=True, picture=True)
    assert facts._base_model(config.with_settings(["model.weights=/home/me/w.pt"])) is None
    command = facts._command(config.with_settings(["model.weights=/home/me/w.pt"]))
    assert command is not None
    assert "--set model.weights=w.pt" in command  # and no folder of this machine


def test_a_duration_has_the_unit_that_suits_it() -> None:
    for hours, words in ((1234.5, "1,234.5 hours"), (1.0, "1.0 hours"), (0.5, "30.0 minutes"), (0.001, "3.6 seconds")):
        assert card._duration(hours) == words


def test_a_licence_is_one_that_the_hub_knows_the_form_of() -> None:
    facts.check_licence("cc-by-nc-4.0")
    facts.check_licence(None)
    for licence in ("Apache 2.0", "", "mit\ntags: x", "a" * 99):
        with pytest.raises(ValueError, match="is no identifier of a licence on the hub"):
            facts.check_licence(licence)


def test_its_code_runs_as_it_is_printed(pushed: Path, tmp_path: Path) -> None:
    """All of it in one process, which begins as a visitor's does, in the folder itself."""
    shown = (pushed / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", shown, re.DOTALL)
    assert len(blocks) == 3
    here = tmp_path / "clone"
    here.mkdir()
    for name in ("config.json", "model.safetensors"):
        (here / name).write_bytes((pushed / name).read_bytes())
    picture(60, 48, seed=3).save(here / "photo.jpg")
    program = "\n".join(
        [
            *blocks,
            "print([tuple(one.shape) for one in (logits, *maps)])",
            "print(type(model), tuple(model(images).shape))",
        ]
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=here, capture_output=True, text=True, timeout=280, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.splitlines()
    assert first.startswith("photo.jpg (('")
    assert second == "[(1, 4), (1, 24, 4, 4), (1, 24, 4, 4)]"
    assert third.endswith("(1, 4)")
    assert ("pss.models.vit" in third) == pushed.name.startswith("biased")


WITHOUT_PSS = """
import sys
sys.modules["pss"] = None
import timm, torch
plain = timm.create_model(f"local-dir:{sys.argv[1]}/plain pushed", pretrained=True).eval()
x = torch.full((1, 3, 32, 32), 0.5)
torch.save(plain(x), sys.argv[2])
try:
    timm.create_model(f"local-dir:{sys.argv[1]}/biased pushed", pretrained=True)
except RuntimeError as error:
    assert str(error).startswith("Unknown model (pss_"), error
else:
    raise AssertionError("it was built")
del sys.modules["pss"]
import pss
biased = timm.create_model(f"local-dir:{sys.argv[1]}/biased pushed", pretrained=True).eval()
torch.save(biased(x, rho=0.6), sys.argv[3])
"""


@pytest.mark.exhaustive
def test_timm_alone_refuses_a_bias_until_pss_is_imported(trained: Path, tmp_path: Path) -> None:
    runs = {name: open_run(str(trained / name), CPU) for name in ("plain", "biased")}
    for name, run in runs.items():
        write_model(trained / f"{name} pushed", run, name, [row(1.0)], facts.of(run))
    config = json.loads((trained / "biased pushed" / "config.json").read_text())
    assert config["requires"].startswith("pss: import it before timm.create_model")
    assert config["architecture"] == "pss_" + runs["biased"].config.model.name
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PSS, trained, tmp_path / "plain.pt", tmp_path / "biased.pt"],
        cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    x = torch.full((1, 3, 32, 32), 0.5)
    torch.testing.assert_close(torch.load(tmp_path / "plain.pt"), runs["plain"].method.predict(x))
    torch.testing.assert_close(torch.load(tmp_path / "biased.pt"), runs["biased"].method.predict(x, 0.6))


def test_timm_reads_the_checkpoint_of_a_run(trained: Path) -> None:
    run = open_run(str(trained / "biased"), CPU)
    model: Any = timm.create_model(
        f"pss_{run.config.model.name}", num_classes=4, img_size=32, **run.published().settings
    )
    (newest, *_) = sorted((trained / "biased" / "checkpoints").glob("*.pt"))[::-1]
    timm.models.load_checkpoint(model, str(newest))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(x, 0.6), run.method.predict(x, 0.6))
    assert model.pretrained_cfg["label_names"] == tuple("abcd")
    state = torch.load(newest, weights_only=True)
    state["method"]["head.weight"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"weights of its method beside those of the model \(head.weight, …\)"):
        model.load_state_dict(state)


def test_the_documentation_of_backbones_runs(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = open_run(str(trained / "biased"), CPU)
    write_model(tmp_path / "my-model", run, "mine", [row(1.0)], facts.of(run))
    write_folder(tmp_path / "photos", {"cat": 6, "dog": 6})
    for seed, name in enumerate(("one.jpg", "other.jpg")):
        picture(60, 48, seed).save(tmp_path / name)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "backbones.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "snippets"}
    for block in blocks:
        exec(compile(block, "docs/backbones.md", "exec"), names)
    similarity, probed, maps, pixels = capsys.readouterr().out.splitlines()
    assert -1 <= float(similarity) <= 1
    assert probed.endswith("of the images it was fitted to")
    assert maps == "[(2, 64, 8, 8), (2, 64, 4, 4), (2, 64, 2, 2)]"
    assert pixels == "(2, 21, 32, 32)"
    assert type(names["model"]).__module__ == "pss.models.vit"
