"""What the README shows works as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
import typer.main
from safetensors.torch import save_file

import cli.convert
import cli.eval
import cli.train
from pss import recipes

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = timm.create_model("deit_small_patch16_224", num_classes=1000)
    save_file(plain.state_dict(), tmp_path / "deit_small.safetensors")
    names = {"images": torch.randn(2, 3, 224, 224), "step": 100}
    (example,) = blocks("python")
    exec(example, names)
    assert names["logits"].shape == (2, 1000)
    assert names["rho"] == 0.2 + 0.2 * (100 > 69)
    assert len(names["report"].loaded) == len(plain.state_dict())
    assert all("relative_position_bias_table" in key for key in names["report"].missing)


@pytest.mark.parametrize(
    "line", [line for block in blocks("sh") for line in block.splitlines() if "pss" in line or "cli." in line]
)
def test_every_command_line_parses(line):
    words = shlex.split(line, comments=True)
    name = next(word for word in words if word.startswith(("pss-", "cli."))).removeprefix("pss-").removeprefix("cli.")
    start = next(number for number, word in enumerate(words) if word in (f"pss-{name}", f"cli.{name}"))
    command = typer.main.get_command({"convert": cli.convert, "train": cli.train, "eval": cli.eval}[name].app)
    context = command.make_context(name, words[start + 1 :])
    if name == "train":
        recipes.get(context.params["recipe"])
    if name == "eval":
        assert cli.eval.parse_rhos(context.params["rho"] or "1.0")


def test_the_make_targets_exist():
    targets = re.findall(r"^make (\w+)", "\n".join(blocks("sh")), flags=re.MULTILINE)
    makefile = (Path(__file__).parent.parent / "Makefile").read_text(encoding="utf-8")
    assert targets == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)
