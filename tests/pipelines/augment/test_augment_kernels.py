"""The Triton kernels against torch's operations, to the bit.

Without a GPU they run in Triton's interpreter, on tiny images, and are compiled for a GPU as far as an executable. The
interpreter must be chosen before Triton is first imported, and torchvision imports it, so there the tests of this file
run in a process of their own, which the last one starts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton_runs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_runs import DEVICE, ON_GPU, RESOURCES, needs_triton, not_within, printed_by, run_interpreted

from pipelines import Batch, DataConfig
from pipelines.augment import Mixing, MixingConfig, device, mixing
from pipelines.augment.device import DeviceTransform
from pipelines.augment.operations import Op, apply
from pipelines.augment.plan import make_plan, num_launches
from pipelines.base import Interpolation

EXAMPLES = int(os.environ.get("PSS_KERNEL_EXAMPLES", "5"))
"""How many examples are drawn of what a test is for."""

pytestmark = needs_triton
runs_kernels = triton_runs.runs_kernels("test_augmentation_in_tritons_interpreter")

FILL = (124, 116, 104)
EXTREMES: dict[Op, tuple[float, ...]] = {
    Op.NONE: (0,),
    Op.AUTO_CONTRAST: (0,),
    Op.EQUALIZE: (0,),
    Op.INVERT: (0,),
    Op.POSTERIZE: (1, 4, 8),
    Op.SOLARIZE: (0, 100, 256),
    Op.SOLARIZE_ADD: (0, 60, 128),
    Op.BRIGHTNESS: (0, 0.7, 1.9),
    Op.CONTRAST: (0, 0.7, 1.9),
    Op.COLOR: (0, 0.7, 1.9),
    Op.SHARPNESS: (0, 0.7, 1.9),
    Op.BLUR: (0.1, 0.9, 2.0),
    Op.SHEAR_X: (-0.3, 0, 0.3),
    Op.TRANSLATE_X: (-900, -2.5, 9.01),
    Op.SHEAR_Y: (-0.3, 0, 0.3),
    Op.TRANSLATE_Y: (-900, 3, 9.01),
    Op.ROTATE: (-30, 0, 180),
}
"""Arguments of every operation: at the ends of its range, beyond it, and in between."""


def pictures(num: int, side: int, seed: int = 0) -> Tensor:
    """uint8 (num, 3, side, side): some smooth, some with few levels, some noise, one of a single colour."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((num, 3, side // 5 + 2, side // 5 + 2), generator=generator) * 255
    images = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear").round().to(torch.uint8)
    images[1::4] = images[1::4] // 50 * 50
    images[2::4] = torch.randint(0, 256, images[2::4].shape, generator=generator, dtype=torch.uint8)
    images[3::4] = images[3::4, :, :1, :1]
    return images


def by_kernels(
    images: Tensor,
    operations: np.ndarray,
    arguments: np.ndarray,
    interpolation: Interpolation = "bicubic",
    **steps: Any,
) -> Tensor:
    """Grey levels as float32, back on the CPU."""
    from pipelines.augment import fused

    plan = make_plan(len(images), operations, arguments, **steps)
    table = torch.from_numpy(plan.table).to(DEVICE)
    no_change: Any = [1.0] * 3, [0.0] * 3
    result: Tensor = fused.augment(
        images.to(DEVICE), table, None, plan.ends, *no_change, FILL, interpolation == "bicubic"
    )
    return result.cpu()


@contextmanager
def kernels_everywhere() -> Iterator[None]:
    """On the CPU too, where the interpreter runs them."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (device, mixing):
            patch.setattr(module, "kernels_serve", lambda _: True)
        yield


@runs_kernels
@pytest.mark.parametrize("operation", Op, ids=lambda operation: operation.name)
@pytest.mark.parametrize("thorough", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_every_operation_alone(operation: Op, thorough: bool) -> None:
    """With each of its arguments, at sizes that no block divides."""
    side = 33 if thorough or operation <= Op.COLOR else 17
    copies = 4 if operation == Op.CONTRAST else 1 + (operation <= Op.COLOR)  # many means, which round up and down
    arguments = np.repeat(np.array([EXTREMES[operation]], dtype=np.float64), copies, axis=1)
    images = pictures(arguments.shape[1], side)
    operations = np.full(arguments.shape, operation)
    for interpolation in ("bicubic", "bilinear") if operation >= Op.SHEAR_X else ("bicubic",):
        expected = apply(images, operations, arguments, fill=FILL, interpolation=interpolation)
        actual = by_kernels(images, operations, arguments, interpolation)
        assert actual.is_contiguous()
        assert torch.equal(actual, expected.float())


@runs_kernels
@given(
    data=st.data(),
    side=st.sampled_from([1, 2, 3, 7, 20, 33]),
    num_images=st.integers(1, 5),
    num_layers=st.integers(1, 4),
    channels_last=st.booleans(),
    interpolation=st.sampled_from(["bicubic", "bilinear"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=2 * EXAMPLES)
def test_flips_then_any_list_of_operations(
    data: st.DataObject,
    side: int,
    num_images: int,
    num_layers: int,
    channels_last: bool,
    interpolation: Interpolation,
    seed: int,
) -> None:
    drawn = [
        [data.draw(st.sampled_from([(op, value) for op, values in EXTREMES.items() for value in values]))] * num_images
        if data.draw(st.booleans())
        else [
            data.draw(st.sampled_from([(op, value) for op, values in EXTREMES.items() for value in values]))
            for _ in range(num_images)
        ]
        for _ in range(num_layers)
    ]
    operations, arguments = np.moveaxis(np.array(drawn, dtype=np.float64), 2, 0)
    operations = operations.astype(np.int64)
    flips = np.array(data.draw(st.lists(st.booleans(), min_size=num_images, max_size=num_images)))
    images = pictures(num_images, side, seed)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    before = images.clone()
    flipped = torch.where(torch.from_numpy(flips).view(-1, 1, 1, 1), images.flip(-1), images)
    expected = apply(flipped, operations, arguments, fill=FILL, interpolation=interpolation)
    assert torch.equal(by_kernels(images, operations, arguments, interpolation, flips=flips), expected.float())
    assert torch.equal(images, before)


CONFIGS = {
    "RandAugment": DataConfig(img_size=16, rand_augment="rand-m9-mstd0.5-inc1-n2", erasing=0.5),
    "bilinear": DataConfig(img_size=16, rand_augment="rand-m10-inc1-n3-p0.9", interpolation="bilinear"),
    "3-Augment": DataConfig(img_size=16, three_augment=True, erasing=0.3),
    "erasing": DataConfig(img_size=16, flip=0.0, erasing=1.0),
    "nothing": DataConfig(img_size=16, flip=0.0),
}


def prepared(config: DataConfig, batch: Batch, epoch: int, *, train: bool = True) -> tuple[Tensor, Tensor]:
    """By the kernels and by torch."""
    expected = DeviceTransform(config, seed=5, train=train)(batch, epoch)
    with kernels_everywhere():
        there = replace(batch, images=batch.images.to(DEVICE))
        actual = DeviceTransform(config, seed=5, train=train)(there, epoch)
    assert (actual.dtype, actual.is_contiguous()) == (torch.float32, True)
    return actual.cpu(), expected


@runs_kernels
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("num", "epochs"), [(6, [3]), pytest.param(12, [0, 1], marks=pytest.mark.exhaustive)])
def test_the_transform_of_a_batch(name: str, num: int, epochs: list[int]) -> None:
    images = pictures(num, 16).contiguous(memory_format=torch.channels_last)
    batch = Batch(images, torch.zeros(num, dtype=torch.int64), torch.arange(num) * 999_983)
    for epoch in epochs:
        actual, expected = prepared(CONFIGS[name], batch, epoch)
        assert torch.equal(actual, expected)
        rows = torch.arange(num)[1::3].flip(0)  # whatever else is in the batch, and where
        part = Batch(images[rows].contiguous(), batch.labels[rows], batch.index[rows])
        assert torch.equal(prepared(CONFIGS[name], part, epoch)[0], expected[rows])


@runs_kernels
@pytest.mark.parametrize("num", [0, 1])
def test_the_smallest_batches(num: int) -> None:
    batch = Batch(pictures(num, 16), torch.zeros(num, dtype=torch.int64), torch.arange(num))
    for train in (True, False):
        actual, expected = prepared(CONFIGS["RandAugment"], batch, 0, train=train)
        assert torch.equal(actual, expected)


@runs_kernels
def test_erasing_reaches_every_border() -> None:
    """One rectangle over everything, one of a single pixel, one of the last pixel, and none."""
    from pipelines.augment import fused

    side = 24
    rectangles = np.array([[0, 0, side, side], [3, 5, 1, 1], [side - 1, side - 1, 1, 1]])
    plan = make_plan(4, erased=(np.array([2, 0, 3]), rectangles, np.array([-1, 7, 1 << 62])))
    noise = torch.arange(1 << 16, dtype=torch.float32, device=DEVICE) + 1000  # unlike any level
    images, table = pictures(4, side).to(DEVICE), torch.from_numpy(plan.table).to(DEVICE)
    result = fused.augment(images, table, noise, plan.ends, [1.0] * 3, [0.0] * 3, FILL, True).cpu()
    expected = torch.zeros((4, side, side), dtype=torch.bool)
    expected[2], expected[0, 3, 5], expected[3, -1, -1] = True, True, True
    assert torch.equal(result >= 1000, expected.unsqueeze(1).expand_as(result))
    assert len(result[2].unique()) > 0.9 * 3 * side**2  # channels and pixels have noise of their own


@runs_kernels
def test_the_plan_says_how_much_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.augment import fused

    launched = []

    class Counted:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            launched.append(grid)
            return self.kernel[grid]

    names = ("count_levels", "write_tables", "apply_layer")
    kernels = SimpleNamespace(**{name: Counted(getattr(fused.kernels, name)) for name in names})
    monkeypatch.setattr(fused, "kernels", kernels)
    lists = ([[Op.CONTRAST, Op.NONE], [Op.ROTATE, Op.BLUR]], [[Op.NONE, Op.NONE]], [[Op.INVERT, Op.COLOR]])
    for operations in lists:
        plan = make_plan(2, np.array(operations), np.ones((len(operations), 2)))
        del launched[:]
        by_kernels(pictures(2, 4), np.array(operations), np.ones((len(operations), 2)))
        clears = any(plan.ends[::4])
        assert len(launched) + clears == num_launches(plan.ends)
        assert all(grid[0] > 0 for grid in launched)


# Mixing

BOTH = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}


@runs_kernels
@given(
    num=st.integers(0, 7),
    parts=st.integers(1, 3),
    mode=st.sampled_from(["batch", "elem"]),
    alphas=st.sampled_from([{}, BOTH, {"mixup_alpha": 0.2}, {"cutmix_alpha": 0.3, "correct_share": False}]),
    probability=st.sampled_from([0.5, 1.0]),
    step=st.integers(0, 1000),
    side=st.sampled_from([4, 23]),
)
@settings(max_examples=4 * EXAMPLES)
def test_mixing(
    num: int, parts: int, mode: Any, alphas: dict[str, Any], probability: float, step: int, side: int
) -> None:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn((num, 3, side, side), generator=generator)
    labels = torch.randint(0, 1500, (num,), generator=generator)
    config = MixingConfig(**alphas, mode=mode, probability=probability)
    mix = Mixing(config, 1500, seed=3, rank=2, label_smoothing=0.1, parts=min(parts, max(num, 1)))
    expected, expected_targets = mix(images.clone(), labels, step)
    with kernels_everywhere():
        given_images = images.to(DEVICE, copy=True)
        actual, targets = mix(given_images, labels.to(DEVICE), step)
    assert actual is given_images
    assert torch.equal(targets.cpu(), expected_targets)
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-6, atol=1e-6)
    untouched = expected == images
    assert torch.equal(actual.cpu()[untouched], images[untouched])


@runs_kernels
def test_the_operators_keep_torchs_rules() -> None:
    from pipelines.augment import fused  # noqa: F401

    plan = make_plan(2, np.array([[Op.EQUALIZE, Op.SHEAR_X]]), np.ones((1, 2)))
    table = torch.from_numpy(plan.table).to(DEVICE)
    images = pictures(2, 6).to(DEVICE).contiguous(memory_format=torch.channels_last)
    arguments: Any = (images, table, None, list(plan.ends), [1.0] * 3, [0.0] * 3, list(FILL), True)
    torch.library.opcheck(torch.ops.pss.augment.default, arguments)
    mix = Mixing(MixingConfig(**BOTH), 5, seed=0, rank=0)
    mix_table, num_pairs = mix._table(2, 6, 0)
    values, labels = torch.randn(2, 3, 6, 6, device=DEVICE), torch.tensor([1, 4], device=DEVICE)
    there = torch.from_numpy(mix_table).to(DEVICE)
    torch.library.opcheck(torch.ops.pss.mix.default, (values, labels, there, num_pairs, 5, 1.0, 0.0))


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no CUDA device")
@pytest.mark.parametrize("name", CONFIGS)
def test_a_whole_batch_on_a_gpu(name: str) -> None:
    """On a stream of its own, without waiting for it, and within a grey level of torch on the CPU; nearly all equal."""
    config = replace(CONFIGS[name], img_size=224)
    images = pictures(256, 224)
    batch = Batch(images, torch.zeros(256, dtype=torch.int64), torch.arange(256))
    expected = DeviceTransform(config, seed=5, train=True)(batch, 1)
    transform = DeviceTransform(config, seed=5, train=True)
    there = replace(batch, images=images.cuda().contiguous(memory_format=torch.channels_last))
    transform(there, 0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            result = transform(there, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    off = ((result.cpu() - expected) * torch.tensor(config.std).view(3, 1, 1) * 255).abs()
    assert off.max() < 1.01
    assert (off > 0.01).float().mean() < 1e-3


# Without running them


def test_a_batch_is_one_copy_and_one_operation() -> None:
    """On fake CUDA tensors; torch's form has hundreds."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not str(func).startswith(("prim.", "aten.lift_fresh")):  # what a tensor is, not what is done
                self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    index, numbers = torch.arange(64), np.arange(64)
    transform = DeviceTransform(replace(CONFIGS["RandAugment"], img_size=32), seed=0, train=True)
    mix = Mixing(MixingConfig(**BOTH), 10, seed=0, rank=0)
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True):
        patch.setattr(Tensor, "pin_memory", lambda tensor: tensor)  # no pinned memory without a GPU
        patch.setattr(device, "host_index", lambda _: numbers)  # torch calls every tensor fake here
        images = torch.empty((64, 3, 32, 32), dtype=torch.uint8, device="cuda")
        labels = torch.empty(64, dtype=torch.int64, device="cuda")
        transform(Batch(images, labels, index), 0)  # the table of noise is copied once
        with Seen() as seen:
            values = transform(Batch(images, labels, index), 1)
            assert (values.shape, values.dtype, values.device.type) == (images.shape, torch.float32, "cuda")
            mixed, targets = mix(values, labels, 1)
            assert (mixed is values, targets.shape) == (True, (64, 10))
    assert seen.names == ["aten._to_copy.default", "pss.augment.default", "aten._to_copy.default", "pss.mix.default"]


COMPILE = (
    RESOURCES
    + """
import json, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pipelines.augment import fused, kernels, mixing_kernels

pointers = {"plan": "*i64", "counts": "*i64", "labels": "*i64", "noise": "*fp32", "targets": "*fp32"}
for name, warps, constants in json.loads(sys.argv[1]):
    mixes = name.startswith("mix_")
    kernel = getattr(mixing_kernels if mixes else kernels, name)
    kinds = pointers | dict.fromkeys(("images", "source", "target", "tables"), "*u8")
    kinds |= {"images": "*fp32"} if mixes else {}
    kinds |= {"target": "*fp32"} if constants.get("LAST") else {}
    kinds |= {argument: "fp32" for argument in kernel.arg_names if re.match("scale_|shift_|right|wrong", argument)}
    kinds |= dict.fromkeys(constants, "constexpr")
    signature = {argument: kinds.get(argument, "i32") for argument in kernel.arg_names}
    source = ASTSource(kernel, signature, constants)
    options = {"num_warps": warps} | fused.EXACT
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    numbers = resources(compiled) | {"fma": len(re.findall("fma[.]", compiled.asm["ptx"]))}
    print(json.dumps([name, numbers]))
"""
)


def _layer(bicubic: bool, gathered: bool, last: bool) -> tuple[str, int, dict[str, Any]]:
    block = 256 if gathered else 512
    return "apply_layer", 4, {"BICUBIC": bicubic, "GATHERED": gathered, "LAST": last, "BLOCK": block}


SOME = [
    ("count_levels", 4, {"BLOCK": 512, "NUM_BLOCKS": 8}),
    ("write_tables", 1, {}),
    _layer(True, False, True),
    _layer(True, True, True),
    ("mix_images", 4, {"BLOCK": 512}),
    ("mix_targets", 4, {"BLOCK": 512}),
]
OTHERS = [
    _layer(bicubic, gathered, last)
    for bicubic in (True, False)
    for gathered in (True, False)
    for last in (True, False)
    if _layer(bicubic, gathered, last) not in SOME
]


@pytest.mark.parametrize("cases", [SOME, pytest.param(OTHERS, marks=pytest.mark.exhaustive)], ids=["some", "others"])
def test_kernels_compile_for_hopper(cases: list[tuple[str, int, dict[str, Any]]], tmp_path: Path) -> None:
    """As far as machine code, which needs no GPU: nothing spills, many threads have room, nothing is rounded once."""
    lines = [json.loads(line) for line in printed_by(COMPILE, cases, tmp_path)]
    assert [name for name, _ in lines] == [name for name, *_ in cases]
    for (name, _, constants), (_, usage) in zip(cases, lines, strict=True):
        assert usage["spilled"] == 0, (name, constants, usage)
        assert usage["registers"] <= (96 if constants.get("GATHERED") else 64), (name, constants, usage)
        assert usage["shared"] <= 4096, (name, usage)
        assert usage["fma"] == 0 or name == "mix_images", (name, constants, usage)


@pytest.mark.exhaustive
@not_within
@pytest.mark.parametrize("examples", ["2", "8"])
def test_augmentation_in_tritons_interpreter(examples: str) -> None:
    some = ["-m", "not exhaustive"] if examples == "2" else []
    run_interpreted(__file__, examples, "--durations=5", *some, "-k", "not hopper and not one_copy")
