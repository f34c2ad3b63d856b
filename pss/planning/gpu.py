"""A training step on a GPU that is not at hand, predicted from published rates and from what is counted without one.

A step's arithmetic, its bytes and its launches are worked out in closed form; what a card does with them, and what they
cost the interpreter, are the figures of `CARDS` and `Host`. The card computes and moves in turns; beside it one
interpreter launches, feeds and augments under one lock; beside both the loader decodes. The slowest of the three bounds
the step. Nothing here has been measured on a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from pss import methods
from pss.config import Config
from pss.methods import Method
from pss.models.flops import attention_macs
from pss.planning.plan import Plan
from pss.runtime.files import in_words


@dataclass(frozen=True)
class Card:
    """What a GPU sustains, per second."""

    matmul_flops: float
    """In the matrix products of a step, bf16."""
    attention_flops: float
    """In attention, bf16, without a position bias."""
    biased_attention_flops: float
    """In attention that looks a position bias up inside its kernel."""
    bytes: float
    """Read and written by what is neither."""
    decodes: float
    """JPEG images of ImageNet's size decoded by the GPU."""


_PRODUCTS, _ATTENTION, _BIASED, _BANDWIDTH = 0.8, 0.45, 0.3, 4.0 / 4.8
"""Shares of what one large product reaches, for attention also with a bias, and of the memory's stated rate."""
_DECODES = 7000  # published for an A100, which is the only card with a figure


def _card(large_product: float, memory: float) -> Card:
    """From TFLOP/s of one large bf16 product and TB/s of the memory as its maker states them."""
    return Card(
        matmul_flops=_PRODUCTS * large_product * 1e12,
        attention_flops=_ATTENTION * large_product * 1e12,
        biased_attention_flops=_BIASED * large_product * 1e12,
        bytes=_BANDWIDTH * memory * 1e12,
        decodes=_DECODES,
    )


CARDS = {"h100": _card(790, 3.35), "h200": _card(790, 4.8), "a100": _card(790 * 312 / 989, 2.04)}
"""By the names of `--gpu`."""


@dataclass(frozen=True)
class Host:
    """What the interpreter is busy with, beside launching the model; of one process."""

    us_per_image: Mapping[str, float] = field(default_factory=lambda: {"dali": 2.6, "ffcv": 2.4, "torch": 46.0})
    """Feeding and handing over an image, by loader."""
    augment_ms: float = 1.5
    """Augmentation and mixing of a batch."""
    augment_megabytes: float = 1.7
    """Read and written on the card for one image of 224 px by the same."""
    step_ms: float = 1.1
    """A step beside its model, augmentation and feeding."""
    eager_launches: float = 62.0
    """Kernels of a block that is not compiled, forward and backward."""
    compiled_launches: float = 30.0
    """The same of one that is: 12 products, 4 kernels of attention, 14 that fuse the rest."""
    source: str = "built in: interpreter time on 2 CPU cores, batch 1,024, and counts on fake CUDA tensors"
    """Where they are from."""


_LAUNCH_SECONDS = {"eager": 10e-6, "compiled": 6e-6, "replayed": 0.5e-6}
"""Of the thread that launches a kernel."""
_WIDTHS = {"eager": 95.0, "compiled": 64.0}
"""bf16 numbers that a block reads and writes for every token and channel beside products and attention, forward and
backward: two norms with a float32 residual, two sums, GELU four wide, and the sums of gradients of biases."""
_PIXEL_BYTES = 40  # for every pixel and channel: normalising, mixing, patches and their gradient
_PARAMETER_BYTES = 54  # of a step, for every parameter: AdamW 28, accumulation 8, half-precision copies 6, guard 12
_AVERAGE_BYTES = 12  # for every parameter where a moving average is kept


@dataclass(frozen=True)
class Work:
    """What one process's step asks for at a level."""

    matmul_flops: float
    """Per image, as the following two."""
    attention_flops: float
    bytes_per_image: float
    bytes_per_step: float
    blocks: int
    biased: bool
    """Attention looks up a position bias."""
    launching: str
    """How kernels are launched: `eager`, `compiled` or `replayed`."""


@dataclass(frozen=True)
class Parts:
    """Seconds of one step, by what is busy with it."""

    compute: float
    memory: float
    launches: float
    host: float
    loader: float

    @property
    def step(self) -> float:
        """Of a step whose data is at hand."""
        return max(self.compute + self.memory, self.launches + self.host)

    @property
    def fed(self) -> float:
        """Of a step in a long stretch of its like, where no queue helps."""
        return max(self.step, self.loader)

    @property
    def bound(self) -> str:
        """The largest part of what the step waits for."""
        if self.loader > self.step:
            return "loader"
        names = ("compute", "memory") if self.compute + self.memory >= self.step else ("launches", "host")
        return max(names, key=lambda name: float(getattr(self, name)))


def predict(work: Work, card: Card, host: Host, *, batch: int, backend: str, decodes: float) -> Parts:
    """The parts of a step.

    Args:
        work: Of the step.
        card: The GPU.
        host: What its process is busy with.
        batch: Images that the process trains in the step.
        backend: The loader.
        decodes: Images per second that the loader decodes for this process.
    """
    attention = card.biased_attention_flops if work.biased else card.attention_flops
    per_block = host.eager_launches if work.launching == "eager" else host.compiled_launches
    return Parts(
        compute=batch * (work.matmul_flops / card.matmul_flops + work.attention_flops / attention),
        memory=(batch * work.bytes_per_image + work.bytes_per_step) / card.bytes,
        launches=work.blocks * per_block * _LAUNCH_SECONDS[work.launching],
        host=(host.step_ms + host.augment_ms) / 1e3 + batch * host.us_per_image[backend] / 1e6,
        loader=batch / decodes,
    )


def works(config: Config, planned: Plan, num_classes: int, host: Host) -> tuple[Work, ...]:
    """What a step asks for at each of the plan's levels, and last what one of dense training at full size does."""
    with torch.device("meta"):
        method = methods.build(config, num_classes, planned.steps_per_epoch)
    levels = [
        _work(
            config,
            method,
            host,
            level.img_size,
            method.training_tokens(level.stage, level.img_size),
            level.cost.training,
        )
        for level in planned.levels
    ]
    tokens = (method.model.num_kept_tokens(1.0),) * len(method.model.blocks)
    dense = _work(config, method, host, config.data.img_size, tokens, planned.dense.training)
    return (*levels, dense)


def _work(config: Config, method: Method, host: Host, size: int, tokens: Iterable[int], macs: int) -> Work:
    blocks: list[Any] = list(method.model.blocks)
    tokens = tuple(tokens)
    products = sum(
        attention_macs(number, number, block.attn.num_heads * block.attn.product_width)
        for number, block in zip(tokens, blocks, strict=True)
    )
    attention = min(3 * products, macs)  # forward, and twice that backward
    compiled = method.compiles and config.compile.mode != "off" and config.train.parallel != "fsdp"
    width = method.model.embed_dim
    mode = "compiled" if compiled else "eager"
    pixels = 3 * size**2
    parameters = sum(parameter.numel() for parameter in method.parameters() if parameter.requires_grad)
    return Work(
        matmul_flops=2 * (macs - attention),
        attention_flops=2 * attention,
        bytes_per_image=2 * _WIDTHS[mode] * width * sum(tokens)
        + pixels * (_PIXEL_BYTES + host.augment_megabytes * 1e6 / (3 * 224**2)),
        bytes_per_step=parameters * (_PARAMETER_BYTES + _AVERAGE_BYTES * (config.train.ema_decay > 0)),
        blocks=len(blocks),
        biased=method.model.rel_pos == "bias",
        launching="replayed" if compiled and config.compile.cuda_graphs else mode,
    )


def read_host(paths: Iterable[Path]) -> Host:
    """The host's figures from files that `tools.benchmarks.host_cost` and `tools.benchmarks.launches` wrote.

    What no file tells is built in. Raises `ValueError` naming a file that holds none of it.
    """
    host, paths = Host(), tuple(paths)
    for path in paths:
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"--measured {path} cannot be read ({in_words(error)}); name a file of --json") from None
        try:
            found = _figures(raw)
        except (AttributeError, KeyError, TypeError, ValueError):
            found = {}
        if not found:
            raise ValueError(
                f"--measured {path} holds no figures of the host; name what tools.benchmarks.host_cost or "
                "tools.benchmarks.launches wrote with --json"
            )
        rates = {**host.us_per_image, **found.pop("us_per_image", {})}
        host = replace(host, us_per_image=rates, **found)
    if paths:
        host = replace(host, source=f"{', '.join(map(str, paths))}, else {Host().source}")
    return host


def _figures(raw: dict[str, Any]) -> dict[str, Any]:
    """Those fields of `Host` that a file tells."""
    found: dict[str, Any] = {}
    rates = {name: raw.get(f"{name}_us_per_image") for name in Host().us_per_image}
    if rates := {name: float(rate) for name, rate in rates.items() if isinstance(rate, float | int)}:
        found["us_per_image"] = rates
    if isinstance(raw.get("augment_ms_per_step"), float | int):
        found["augment_ms"] = float(raw["augment_ms_per_step"])
    if isinstance(raw.get("step_ms"), float | int):
        found["step_ms"] = float(raw["step_ms"])
    if isinstance(stages := raw.get("stages"), dict) and stages and "settings" in raw:
        found |= _counts([*stages.values()][-1], int(raw["settings"]["batch"]))
    if isinstance(parts := raw.get("host_ms"), dict) and parts:
        found["step_ms"] = sum(ms for part, ms in parts.items() if not part.startswith(_ELSEWHERE))
    return found


_MODEL_PARTS, _AUGMENT_PARTS = ("forward: blocks", "backward"), ("augmentation", "mixing")
_ELSEWHERE = ("forward", "backward", "inputs", *_AUGMENT_PARTS)
"""As `tools.benchmarks.launches` names them; the last ones are the model's, and those of another thread."""


def _counts(parts: Mapping[str, Mapping[str, float]], batch: int) -> dict[str, float]:
    """From launches and bytes of a step of twelve blocks, by part."""
    found = {}
    if "augmentation" in parts:
        moved = sum(parts[part]["bytes"] for part in _AUGMENT_PARTS if part in parts)
        found["augment_megabytes"] = moved / batch / 1e6
    if {*_MODEL_PARTS} <= parts.keys():
        launches = sum(parts[part]["launches"] for part in _MODEL_PARTS)
        found["eager_launches"] = launches / 12
    return found


def assumptions(card: Card, host: Host) -> list[str]:
    """What a prediction rests on, a line each."""
    rates = ", ".join(f"{name} {rate:g}" for name, rate in host.us_per_image.items())
    launch = {name: f"{1e6 * seconds:g}" for name, seconds in _LAUNCH_SECONDS.items()}
    return [
        f"products {card.matmul_flops / 1e12:,.0f} TFLOP/s ({_PRODUCTS:.0%} of one large one), attention "
        f"{card.attention_flops / 1e12:,.0f}, with a bias {card.biased_attention_flops / 1e12:,.0f}; bf16",
        f"all else {card.bytes / 1e12:.2f} TB/s, not beside the products; a block moves {_WIDTHS['compiled']:g} "
        f"numbers per token and channel, {_WIDTHS['eager']:g} uncompiled",
        f"launches per block {host.compiled_launches:g}, {host.eager_launches:.0f} uncompiled; µs for each "
        f"{launch['compiled']}, {launch['eager']} uncompiled, {launch['replayed']} replayed",
        f"interpreter, one lock a process: µs an image {rates}; ms a step {host.augment_ms:g} augmentation, "
        f"{host.step_ms:g} the rest",
        f"augmentation moves {host.augment_megabytes:.3g} MB an image of 224 px; decoding on the GPU takes nothing "
        "from the step; all-reduce is hidden",
        f"host figures: {host.source}",
    ]
