"""Run by test_fake_gpu.py in a process of its own: whole training steps on a GPU that is not there.

No mixture of devices, nothing that waits, and as many launches and bytes in each part as `launches.json` says. A change
that alters them says so there:

    PYTHONPATH=. python tests/training/on_a_fake_gpu.py
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from pss import recipes
from tools.benchmarks import launches
from tools.benchmarks.fake_gpu import OTHER, FakeGpu, Waits
from tools.benchmarks.launches import count, count_prediction, fake_run, uncompiled

TABLE = Path(__file__).with_name("launches.json")
SHORT = ["model.depth=2", "data.rand_augment=none", "data.erasing=0"]
SMALL = ["deit-s-224", *SHORT]
CASES: dict[str, list[str]] = {
    "deit-s-224": ["deit-s-224", *SHORT[1:]],
    "augmented": ["deit-s-224", SHORT[0]],
    "deit-s-224-plain": ["deit-s-224-plain", *SHORT],
    "deit-s-224-lowres": ["deit-s-224-lowres", *SHORT],
    "vit-b-simmim": ["vit-b-simmim", *SHORT, "model.weights=none"],
    "digits": ["digits"],
    "random": [*SMALL, "model.sort=random", "model.token_counts=aligned"],
    "dense, plain labels": [*SMALL, "method=dense", "loss.mixup=0", "loss.cutmix=0", "train.ema_decay=0"],
    "rope": [*SMALL, "model.rel_pos=rope", "optim.clip_grad=1"],
    "separable": [*SMALL, "model.rel_pos=separable", "loss.mix_mode=elem"],
    "accumulate": [*SMALL, "train.accumulate=2", "train.checkpoint_activations=true", "PSS_ATTENTION=materialised"],
    "toe": [*SMALL, "method=toe"],
    "dynamicvit": [*SMALL, "method=dynamicvit"],
    "avit": [*SMALL, "method=avit", "avit.gate_center=5", "loss.mixup=0", "loss.cutmix=0"],
}
"""By name: a recipe, and what is set besides."""
MORE: dict[str, list[str]] = {
    "cifar10": ["cifar10"],
    "3-Augment": [*SMALL, "data.three_augment=true"],
    "digits, in fp32": ["digits", "train.precision=fp32"],
    **{
        f"{recipe}, {', '.join(settings)}": [recipe, *settings, "model.weights=none"]
        for recipe in (
            "deit-s-224", "deit-s-224-plain", "deit-s-224-lowres", "deit-ti-224", "deit-s-384", "vit-b-simmim"
        )
        for settings in (
            ["method=sampled", "model.sort=random", "train.accumulate=2"],
            ["method=dense", "train.checkpoint_activations=true"],
            ["method=sampled", "model.rel_pos=rope", "loss.mix_mode=elem"],
            ["method=sampled", "model.rel_pos=bias", "PSS_ATTENTION=materialised", "optim.clip_grad=1"],
            ["method=sampled", "model.token_counts=aligned", "model.rel_pos=bias", "PSS_ATTENTION=reference"],
        )
        if (recipe, settings[1]) != ("vit-b-simmim", "model.rel_pos=rope")  # which has a bias
    },
}  # fmt: skip
Counts = dict[str, dict[str, dict[str, int]]]


def counted(words: list[str]) -> Counts:
    """Of a case: the parts' launches and bytes, by stage (the smallest share of the patches, and, of a model in full
    depth, the largest), and of validation."""
    recipe, *settings = words
    forced = dict(word.split("=") for word in settings if word.startswith("PSS_"))
    settings = [word for word in settings if not word.startswith("PSS_")]
    with (
        mock.patch.dict(os.environ, forced),
        fake_run(uncompiled(recipes.get(recipe).with_settings(settings))) as (
            gpu,
            run,
        ),
    ):
        stages = run.first_steps()
        chosen = (min(stages),) if SHORT[0] in settings else (min(stages), max(stages))
        found = {name: count(gpu, run, stages[name]) for name in dict.fromkeys(chosen)}
        with gpu.apart():
            point = run.trainer.method.points()[0]
        if not run.trainer.method.costs_vary:  # else what it does depends on the images, and may ask for it
            found["validation"] = count_prediction(gpu, run, point)
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_step_launches_and_moves_what_the_table_says_and_never_waits(name: str) -> None:
    expected = json.loads(TABLE.read_text(encoding="utf-8"))[name]
    assert counted(CASES[name]) == expected, f"if that is meant: PYTHONPATH=. python {Path(__file__).name}"


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", MORE)
def test_a_step_never_waits(name: str) -> None:
    for parts in counted(MORE[name]).values():
        assert sum(work["launches"] for work in parts.values()) > 50


WAITING: dict[str, Callable[[torch.Tensor], object]] = {
    "a number": lambda x: x.sum().item(),
    "a truth": lambda x: bool((x > 0).all()),
    "a list": lambda x: x.tolist(),
    "a mask": lambda x: x[x > 0],
    "places": lambda x: x.nonzero(),
    "indices on the host": lambda x: x[torch.tensor([0, 1])],
    "to the host": lambda x: x.cpu(),
    "to the host, without blocking": lambda x: x.to("cpu", non_blocking=True),
    "into memory of the host": lambda x: torch.zeros(4).copy_(x),
    "from pageable memory": lambda x: torch.ones(4).to("cuda", non_blocking=True),
    "from pinned memory, blocking": lambda x: torch.ones(4).pin_memory().to("cuda"),
    "into memory of the device": lambda x: x.copy_(torch.ones(4)),
    "a new tensor": lambda x: torch.tensor([1.0, 2.0], device="cuda"),
    "all that was asked": lambda x: torch.cuda.synchronize(),
    "an event": lambda x: torch.cuda.Event().synchronize(),
    "a list of counts": lambda x: torch._foreach_add_([x], x.sum()),
}


@pytest.mark.parametrize("what", WAITING)
def test_what_waits_for_the_device_is_found(what: str) -> None:
    with FakeGpu() as gpu:
        x = torch.zeros(4, device="cuda")
        with pytest.raises(Waits):
            WAITING[what](x)
        with gpu.apart():
            if "synchronize" not in WAITING[what].__code__.co_names and what not in ("a mask", "places"):
                WAITING[what](x)


def test_a_mixture_of_devices_is_found() -> None:
    with FakeGpu():
        x = torch.zeros(4, device="cuda")
        for mixed in (lambda: x + torch.ones(4), lambda: torch.rand(4, device="cuda", generator=torch.Generator())):
            with pytest.raises(RuntimeError, match="device"):
                mixed()


def test_launches_and_bytes_are_counted_as_the_module_says() -> None:
    with FakeGpu() as gpu:
        x = torch.zeros(100, 100, device="cuda")
        gpu.reset()
        with gpu.part("sum"):
            (x.view(-1)[None].expand(3, -1) + 1).sum()
        with gpu.part("lists"):
            torch._foreach_add_([torch.empty(10, device="cuda") for _ in range(111)], 1.0)
            torch._foreach_add_([torch.empty(65536 * 321, device="cuda")], 1.0)
        with gpu.part("copy"):
            torch.ones(8).pin_memory().to("cuda", non_blocking=True)
        with gpu.apart():
            x.sum()
    sizes = {name: (work.launches, work.moved) for name, work in gpu.work.items()}
    assert sizes["sum"] == (2, 4 * (10_000 + 30_000 + 30_000 + 1))
    assert sizes["lists"][0] == 2 + 2
    assert sizes["copy"] == (1, 64)
    assert list(gpu.work) == ["sum", "lists", "copy"]


def test_gradients_flow_and_the_host_stays_real() -> None:
    with FakeGpu():
        layer = nn.Linear(3, 2, device="cuda")
        layer(torch.zeros(5, 3, device="cuda")).sum().backward()
        assert layer.weight.grad is not None
        assert layer.weight.grad.shape == (2, 3)
        assert (torch.arange(3) * 2).tolist() == [0, 2, 4]
    assert torch.arange(3).sum() == 3


def test_the_tool_tells_launches_and_milliseconds_by_part(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--recipe", "digits", "--batch", "32", "--rounds", "2", "--set", "model.depth=1"]
    result = launches.main(words)
    own = {"guard", "clipping", "optimizer", "average", "meter", "rates", launches.TAKEN, OTHER}
    assert all(result["host_ms"][part] > 0 for part in {"forward: blocks", "backward", launches.FREED, *own})
    assert "| backward | " in capsys.readouterr().out


if __name__ == "__main__":
    chosen = sys.argv[1:] or list(CASES)
    table = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}
    table |= {name: counted(CASES[name]) for name in chosen}
    TABLE.write_text(
        json.dumps({name: table[name] for name in CASES if name in table}, indent=1) + "\n", encoding="utf-8"
    )
