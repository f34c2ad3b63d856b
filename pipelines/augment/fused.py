"""Augmentation of a batch on a GPU in a few launches; see `pipelines.augment.kernels` for how.

Needs Triton and a CUDA device, or Triton's interpreter (TRITON_INTERPRET=1), which runs the kernels on a CPU, slowly.
Everything happens on the current stream of the batch's device.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import triton  # type: ignore[import-untyped,unused-ignore]
from torch import Tensor

from pipelines.augment import kernels, mixing_kernels
from pipelines.augment.plan import COUNTS, HEAD, LAYER, layers_of

_BLOCK, _GATHERED_BLOCK, _MIXED_BLOCK = 512, 256, 512
"""Pixels of a program: two or four for each thread, so that its registers leave room for many threads."""
_COUNTED_BLOCKS = 8
"""Blocks whose levels a program counts."""
EXACT = {"enable_fp_fusion": False}
"""A multiplication and an addition are two roundings, as torch's are."""


@torch.library.custom_op("pss::augment", mutates_args=())
def augment(
    images: Tensor,
    table: Tensor,
    noise: Tensor | None,
    ends: Sequence[int],
    scale: Sequence[float],
    shift: Sequence[float],
    fill: Sequence[int],
    bicubic: bool,
) -> Tensor:
    """A batch, augmented and normalised.

    Args:
        images: uint8 (B, 3, S, S) in any layout.
        table, ends: The two parts of a `pipelines.augment.plan.Plan`, the table on the device of `images`.
        noise: `RandomErasing.noise_table`, float32 (2^16,); None where nothing is erased.
        scale, shift: For each channel, what grey levels are multiplied by and what is then added.
        fill: Grey levels of R, G, B that come in from outside the image.
        bicubic: Whether moved pixels are interpolated so; bilinear otherwise.

    Returns:
        float32 (B, 3, S, S), contiguous.
    """
    num_images, side = len(images), images.shape[-1]
    assert images.dtype == torch.uint8
    assert images.shape[1:] == (3, side, side)
    out = images.new_empty(images.shape, dtype=torch.float32)
    if not num_images:  # there is no launching nothing
        return out
    layers, num_pixels = layers_of(ends), side * side
    # Layers write the two buffers in turn, and the last one the result.
    buffers = [images.new_empty(images.shape) for _ in layers[1:3]] or [images]
    num_counted = sum(counted for counted, *_ in layers)
    counts = table.new_zeros((num_counted, COUNTS)) if num_counted else table  # which is not read then
    tables = images.new_empty((num_images, 3, 256))
    num_words, strides = table.shape[1], images.stride()
    with _on_device_of(images):
        for number, (counted, tabled, pointwise, gathered) in enumerate(layers):
            layer, last = HEAD + LAYER * number, number == len(layers) - 1
            source = buffers[(number - 1) % len(buffers)]
            target = out if last else buffers[number % len(buffers)]
            if counted:
                kernels.count_levels[(triton.cdiv(num_pixels, _BLOCK * _COUNTED_BLOCKS) * counted,)](
                    images, source, table, counts, num_words, layer, side, *strides,
                    BLOCK=_BLOCK, NUM_BLOCKS=_COUNTED_BLOCKS, num_warps=4, **EXACT,
                )  # fmt: skip
            if tabled:
                kernels.write_tables[(3 * tabled,)](
                    table, counts, tables, num_words, layer, num_pixels, num_warps=1, **EXACT
                )
            if counted:
                counts = counts[counted:]
            parts = ((0, pointwise, False, _BLOCK), (pointwise, gathered, True, _GATHERED_BLOCK))
            for first, end, gather, block in parts:
                if first == end:
                    continue
                kernels.apply_layer[(3 * triton.cdiv(num_pixels, block) * (end - first),)](
                    images, source, target, table, tables, out if noise is None else noise,
                    first, num_words, layer, side, *strides, *fill, *scale, *shift,
                    BICUBIC=bicubic, GATHERED=gather, LAST=last, BLOCK=block, num_warps=4, **EXACT,
                )  # fmt: skip
    return out


@augment.register_fake
def _(
    images: Tensor,
    table: Tensor,
    noise: Tensor | None,
    ends: Sequence[int],
    scale: Sequence[float],
    shift: Sequence[float],
    fill: Sequence[int],
    bicubic: bool,
) -> Tensor:
    return images.new_empty(images.shape, dtype=torch.float32)


@torch.library.custom_op("pss::mix", mutates_args=("images",))
def mix(
    images: Tensor, labels: Tensor, table: Tensor, num_pairs: int, num_classes: int, right: float, wrong: float
) -> Tensor:
    """Mixes a batch in place and makes its targets.

    Args:
        images: float32 (B, 3, S, S), contiguous.
        labels: int64 (B,).
        table: int64 (B, 8), see `pipelines.augment.mixing_kernels`.
        num_pairs: Pairs of images to be mixed.
        num_classes: Classes of the targets.
        right, wrong: The target of a label's class, and of the others.

    Returns:
        float32 (B, classes).
    """
    num_images, side = len(images), images.shape[-1]
    assert images.dtype == torch.float32
    assert images.is_contiguous()
    assert images.shape[1:] == (3, side, side)
    targets = images.new_empty((num_images, num_classes))
    with _on_device_of(images):
        if num_pairs:
            blocks = triton.cdiv(3 * side * side, _MIXED_BLOCK)
            mixing_kernels.mix_images[(blocks * num_pairs,)](images, table, side, BLOCK=_MIXED_BLOCK, **EXACT)
        if num_images:
            blocks = triton.cdiv(num_classes, _MIXED_BLOCK)
            mixing_kernels.mix_targets[(blocks * num_images,)](
                labels.contiguous(), table, targets, num_classes, right, wrong, BLOCK=_MIXED_BLOCK, **EXACT
            )
    return targets


@mix.register_fake
def _(
    images: Tensor, labels: Tensor, table: Tensor, num_pairs: int, num_classes: int, right: float, wrong: float
) -> Tensor:
    return images.new_empty((len(images), num_classes))


def _on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever the tensors' is."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
