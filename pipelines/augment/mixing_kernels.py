"""Triton kernels that mix a normalised batch with itself, in place, and make its targets.

A row of `plan`, int64 (B, 8), belongs to an image. It holds the number of the image's partner; the partner's share in
the image (bits of float64); the image's own in the target; top, bottom, left and right of the rectangle in which all is
the partner's; and the number of another image, which makes the column a list of the first image of each pair.
"""

# mypy: ignore-errors
# (Triton compiles these functions from their source; their types are not Python's.)

import triton
import triton.language as tl

_WORDS = tl.constexpr(8)


@triton.jit
def _share(plan, image, number):
    return tl.load(plan + image * _WORDS + number).to(tl.float64, bitcast=True).to(tl.float32)


@triton.jit
def _mixed(own, other, plan, image, value, side):
    """As `torch.lerp`: from the nearer end."""
    row = plan + image * _WORDS
    top, bottom, left, right = tl.load(row + 3), tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)
    share = tl.zeros(own.shape, tl.float32) + _share(plan, image, 1)
    if bottom > top:
        y, x = value // side % side, value % side
        inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)
        share = tl.where(inside, 1.0, share)
    near = share < 0.5
    return tl.fma(tl.where(near, share, share - 1), other - own, tl.where(near, own, other))


@triton.jit(do_not_specialize=("side",))
def mix_images(images, plan, side, BLOCK: tl.constexpr):
    """A pair of images of float32 (B, 3, S, S), contiguous; each program has `BLOCK` values of both."""
    num_blocks = tl.cdiv(3 * side * side, BLOCK)
    first = tl.load(plan + (tl.program_id(0) // num_blocks) * _WORDS + 7)
    second = tl.load(plan + first * _WORDS)
    value = tl.program_id(0) % num_blocks * BLOCK + tl.arange(0, BLOCK)
    there = value < 3 * side * side
    size = (3 * side * side).to(tl.int64)
    one, two = images + first * size + value, images + second * size + value
    a, b = tl.load(one, mask=there, other=0.0), tl.load(two, mask=there, other=0.0)
    tl.store(one, _mixed(a, b, plan, first, value, side), mask=there)
    tl.store(two, _mixed(b, a, plan, second, value, side), mask=there)


@triton.jit(do_not_specialize=("num_classes",))
def mix_targets(labels, plan, targets, num_classes, right, wrong, BLOCK: tl.constexpr):
    """`BLOCK` classes of a row of float32 (B, classes): labels as `right` among `wrong`, mixed like the images."""
    num_blocks = tl.cdiv(num_classes, BLOCK)
    image = (tl.program_id(0) // num_blocks).to(tl.int64)
    partner = tl.load(plan + image * _WORDS)
    share = _share(plan, image, 2)
    number = tl.program_id(0) % num_blocks * BLOCK + tl.arange(0, BLOCK)
    own = tl.where(number == tl.load(labels + image), right, wrong)
    other = tl.where(number == tl.load(labels + partner), right, wrong)
    tl.store(targets + image * num_classes + number, own * share + other * (1 - share), mask=number < num_classes)
