"""The benchmarks of attention and of a training step: that they run, compare like with like, and count memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pss.models.create import create_model
from pss.models.vit import VisionTransformer
from pss.schedules import histogram
from tools.benchmarks import attention as bench_attention
from tools.benchmarks import step as bench_step


def small_model() -> VisionTransformer:
    model = create_model("deit_small_patch16_224", rel_pos="bias", depth=2)
    for block in model.blocks:
        nn.init.normal_(block.attn.get_parameter("relative_position_bias_table"))
    return model


@pytest.mark.parametrize("rho", [0.4, 1.0])
def test_the_naive_way_computes_the_same(rho: float) -> None:
    model, images = small_model(), torch.randn(2, 3, 224, 224)
    results = []
    for way in (model, bench_step.naive_model(model)):
        logits = way(images, rho)
        tables = [block.attn.get_parameter("relative_position_bias_table") for block in way.blocks]
        results.append((logits, *torch.autograd.grad(logits.square().sum(), tables)))
    for ours, naive in zip(*results, strict=True):
        torch.testing.assert_close(ours, naive, rtol=1e-4, atol=1e-4)


def test_attention_takes_less_than_half_of_the_naive_ways_memory() -> None:
    model = small_model()
    models = {"ours": model, "naive": bench_step.naive_model(model)}
    images, labels = torch.randn(4, 3, 224, 224), torch.zeros(4, dtype=torch.long)
    memory = bench_step.attention_memory(models, images, labels, half=False)
    assert 0 < 2 * memory["ours"]["attention"] < memory["naive"]["attention"]


def test_peak_memory_counts_what_is_there_at_a_time() -> None:
    def step() -> None:
        first = torch.empty(1000)
        del first
        torch.empty(500).sum()
        torch.empty(600) + torch.empty(600)

    device = torch.device("cpu")
    assert bench_step.peak_bytes(step, device) == 4 * 3 * 600 == bench_step.peak_bytes(step, device)


def test_a_dry_run_times_every_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--dry-run", "--device", "cpu", "--batch", "2", "--rounds", "1", "--threads", "1"]
    files = ["--json", str(tmp_path / "step.json"), "--markdown", str(tmp_path / "step.md")]
    beside = ["none", "naive", "patch-drop"]
    bench_step.main(["--model", "deit-s-224", "deit-s-384", "--beside", *beside, *options, *files])
    assert (tmp_path / "step.md").read_text() == capsys.readouterr().out
    result: dict[str, Any] = json.loads((tmp_path / "step.json").read_text())
    rhos = [str(rho) for rho in histogram(bench_step.CYCLE, bench_step.STEPS)]
    for name, pixels in (("deit-s-224", 224), ("deit-s-384", 384)):
        measured = result["models"][name]
        assert measured["img_size"] == pixels
        cases = {f"{prefix}rho {rho}" for prefix in ("", *(f"{name}, " for name in beside)) for rho in rhos}
        assert set(measured["seconds"]) == {"timm", *cases}
        assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in measured["seconds"].values())
        cyclic = sum(measured["cycle"][rho] * measured["seconds"][f"rho {rho}"][0] for rho in rhos)
        (ratio,) = measured["ratios"][bench_step.CYCLIC]
        assert ratio == pytest.approx(cyclic / measured["seconds"]["rho 1.0"][0])


def test_a_dry_run_times_every_implementation(tmp_path: Path) -> None:
    options = ["--dry-run", "--device", "cpu", "--threads", "1", "--lengths", "39", "577"]
    bench_attention.main([*options, "--json", str(tmp_path / "attention.json")])
    result: dict[str, Any] = json.loads((tmp_path / "attention.json").read_text())
    for length in ("39", "577"):
        measured = result["seconds"][length]
        assert {"no bias", "reference", "materialised"} <= set(measured)
        assert all(len(seconds[way]) == 1 for seconds in measured.values() for way in ("forward", "backward"))
