"""Triton kernels that augment a uint8 batch: counts of grey levels, tables of grey levels, one layer of operations.

`plan` is the table of `pipelines.augment.plan`, one row of `num_words` per image; `layer` is the first word of a layer
in it. `images` are the loader's pixels, uint8 (B, 3, S, S) with the strides given; `source` and `target` are what the
layer before has left and what this one leaves, contiguous. A program works on one image, so that the choice of its
step is a branch that all of its threads take together, and a launch on a part of the layer's list of images.

Results equal those of `point`, `geometric` and `neighbourhood`, which hold the reasons. To the last bit where
multiplications and additions are not fused: launch with `enable_fp_fusion=False`.
"""

# mypy: ignore-errors
# (Triton compiles these functions from their source; their types are not Python's.)

import triton
import triton.language as tl

from pipelines.augment import plan as plans
from pipelines.augment.operations import Op

_LIST = tl.constexpr(plans.LAYER - 1)
_FRESH = tl.constexpr(plans.FRESH)
_AUTO_CONTRAST = tl.constexpr(int(Op.AUTO_CONTRAST))
_EQUALIZE = tl.constexpr(int(Op.EQUALIZE))
_INVERT = tl.constexpr(int(Op.INVERT))
_POSTERIZE = tl.constexpr(int(Op.POSTERIZE))
_SOLARIZE = tl.constexpr(int(Op.SOLARIZE))
_SOLARIZE_ADD = tl.constexpr(int(Op.SOLARIZE_ADD))
_BRIGHTNESS = tl.constexpr(int(Op.BRIGHTNESS))
_CONTRAST = tl.constexpr(int(Op.CONTRAST))
_COLOR = tl.constexpr(int(Op.COLOR))
_SHARPNESS = tl.constexpr(int(Op.SHARPNESS))
_BLUR_ROWS = tl.constexpr(int(Op.BLUR))
_SHIFT_ROWS = tl.constexpr(int(Op.SHEAR_X))
_SHIFT_COLUMNS = tl.constexpr(int(Op.SHEAR_Y))
_ROTATE = tl.constexpr(int(Op.ROTATE))

_FLAT = tl.constexpr(2.0**-10)  # as in `geometric`
_COUNTS = tl.constexpr(plans.COUNTS)

# Numbers that differ between layers, image sizes and memory formats: each would compile the kernels again.
_STRIDES = ("stride_image", "stride_channel", "stride_row", "stride_column")
_VARYING = ("first_image", "num_words", "layer", "side", *_STRIDES)


@triton.jit
def _image(plan, index, num_words, layer):
    """Number `index` of the images listed for a layer."""
    return tl.load(plan + index * num_words + layer + _LIST)


@triton.jit
def _pixels(images, source, row, image, step, side, stride_image, stride_channel, stride_row, stride_column):
    """Where the pixels lie that a layer reads: the address of (0, 0), and the strides of channel, row and column."""
    if step >= _FRESH:
        base = images + image * stride_image
        channel, line, column = stride_channel, stride_row, stride_column
        if tl.load(row) != 0:  # flipped
            base += (side - 1) * column
            column = -column
    else:
        base = source + image * 3 * side * side
        channel, line, column = side * side, side, side * 0 + 1
    return base, channel, line, column


@triton.jit
def _luma(red, green, blue):
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


@triton.jit
def _blend(degenerate, level, factor):
    """float32 in, levels out."""
    return tl.minimum(tl.maximum((level - degenerate) * factor + degenerate, 0.0), 255.0).to(tl.int32)


@triton.jit
def _parameter(row, layer, number):
    return tl.load(row + layer + 1 + number).to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=_VARYING)
def count_levels(
    images,
    source,
    plan,
    counts,
    num_words,
    layer,
    side,
    stride_image,
    stride_channel,
    stride_row,
    stride_column,
    BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
):
    """Adds to `counts`, int64, a row for each image listed, what its step needs; a program looks at `NUM_BLOCKS`
    blocks of pixels.

    Sums of whole numbers: no order of the additions changes them.
    """
    num_parts = tl.cdiv(side * side, BLOCK * NUM_BLOCKS)
    index = tl.program_id(0) // num_parts
    image = _image(plan, index, num_words, layer)
    first = tl.program_id(0) % num_parts * (BLOCK * NUM_BLOCKS)
    row = plan + image * num_words
    word = tl.load(row + layer).to(tl.int32)
    step = word % _FRESH
    base, channel, line, column = _pixels(
        images, source, row, image, word, side, stride_image, stride_channel, stride_row, stride_column
    )
    own = counts + index * _COUNTS
    if step == _CONTRAST:
        total = tl.zeros((BLOCK,), tl.int32)
        for block in range(NUM_BLOCKS):
            pixel = first + block * BLOCK + tl.arange(0, BLOCK)
            there = pixel < side * side
            place = base + pixel // side * line + pixel % side * column
            red = tl.load(place, mask=there, other=0).to(tl.int32)
            green = tl.load(place + channel, mask=there, other=0).to(tl.int32)
            blue = tl.load(place + 2 * channel, mask=there, other=0).to(tl.int32)
            total += _luma(red, green, blue)
        tl.atomic_add(own + 768, tl.sum(total, 0).to(tl.int64), sem="relaxed")
    else:  # auto-contrast and equalisation
        levels = tl.arange(0, 256)
        for number in range(3):
            histogram = tl.zeros((256,), tl.int32)
            for block in range(NUM_BLOCKS):
                pixel = first + block * BLOCK + tl.arange(0, BLOCK)
                there = pixel < side * side
                place = base + number * channel + pixel // side * line + pixel % side * column
                histogram += tl.histogram(tl.load(place, mask=there, other=0).to(tl.int32), 256)
            beyond = tl.maximum(first + BLOCK * NUM_BLOCKS - side * side, 0)  # counted as black
            histogram -= tl.where(levels == 0, beyond, 0)
            tl.atomic_add(own + number * 256 + levels, histogram.to(tl.int64), mask=histogram != 0, sem="relaxed")


@triton.jit(do_not_specialize=("num_words", "layer", "num_pixels"))
def write_tables(plan, counts, tables, num_words, layer, num_pixels):
    """What becomes of every grey level of one image's channel: `tables`, uint8 (B, 3, 256)."""
    index = tl.program_id(0) // 3
    image = _image(plan, index, num_words, layer)
    number = tl.program_id(0) % 3
    row = plan + image * num_words
    step = tl.load(row + layer).to(tl.int32) % _FRESH
    argument = _parameter(row, layer, 0)
    levels = tl.arange(0, 256)
    value = levels
    if step == _INVERT:
        value = 255 - levels
    elif step == _POSTERIZE:
        value = levels & argument.to(tl.int32)
    elif step == _SOLARIZE:
        value = tl.where(levels >= argument.to(tl.int32), 255 - levels, levels)
    elif step == _SOLARIZE_ADD:
        value = tl.where(levels < 128, levels + argument.to(tl.int32), levels)
    elif step == _BRIGHTNESS:
        value = _blend(0.0, levels.to(tl.float32), argument.to(tl.float32))
    elif step == _CONTRAST:
        total = tl.load(counts + index * _COUNTS + 768)
        mean = ((2 * total + num_pixels) // (2 * num_pixels)).to(tl.float32)
        value = _blend(mean, levels.to(tl.float32), argument.to(tl.float32))
    else:  # auto-contrast and equalisation
        histogram = tl.load(counts + index * _COUNTS + number * 256 + levels).to(tl.int32)
        low = tl.min(tl.where(histogram > 0, levels, 255), 0)
        high = tl.max(tl.where(histogram > 0, levels, 0), 0)
        if step == _AUTO_CONTRAST:
            scale = 255.0 / tl.maximum(high - low, 1).to(tl.float64)
            stretched = levels.to(tl.float64) * scale + (-low).to(tl.float64) * scale
            stretched = tl.minimum(tl.maximum(stretched, 0.0), 255.0).to(tl.int32)
            value = tl.where(high > low, stretched, levels)
        else:
            brightest = tl.sum(tl.where(levels == high, histogram, 0), 0)
            width = (num_pixels - brightest) // 255
            darker = tl.cumsum(histogram, 0) - histogram
            even = tl.minimum((darker + width // 2) // tl.maximum(width, 1), 255)
            value = tl.where(width > 0, even, levels)
    tl.store(tables + (image * 3 + number) * 256 + levels, value.to(tl.uint8))


@triton.jit
def _of_channel(number, red, green, blue):
    return tl.where(number == 0, red, tl.where(number == 1, green, blue))


@triton.jit
def _sharpened(place, line, column, inner, factor):
    """`inner` says which pixels are smoothed; those at the border have no eight neighbours."""
    level = tl.load(place).to(tl.int32)
    total = level * 4
    for down in tl.static_range(-1, 2):
        for right in tl.static_range(-1, 2):
            total += tl.load(place + down * line + right * column, mask=inner, other=0).to(tl.int32)
    smooth = tl.where(inner, (2 * total + 13) // 26, level)
    return _blend(smooth.to(tl.float32), level.to(tl.float32), factor)


@triton.jit
def _blurred(start, stride, position, side, full, near, far):
    """Three boxes one after the other along a line; outside, each sees the border that the one before has left."""
    values = ()
    for offset in tl.static_range(-6, 7):
        where = tl.minimum(tl.maximum(position + offset, 0), side - 1)
        values = values + (tl.load(start + where * stride).to(tl.float32),)  # noqa: RUF005
    for reach in tl.static_range(4, -1, -2):
        filtered = ()
        for offset in tl.static_range(2 * reach + 1):
            total = values[offset + 2] * full
            total += (values[offset + 1] + values[offset + 3]) * near
            total += (values[offset] + values[offset + 4]) * far
            filtered = filtered + (tl.floor(total + 0.5),)  # noqa: RUF005
        # From the middle outwards: a place beyond the border becomes its inner neighbour, which may have become its.
        before = (filtered[reach],)
        for offset in tl.static_range(1, reach + 1):
            before = (tl.where(position - offset < 0, before[0], filtered[reach - offset]),) + before  # noqa: RUF005
        values = before
        for offset in tl.static_range(1, reach + 1):
            values = values + (  # noqa: RUF005
                tl.where(position + offset > side - 1, values[reach + offset - 1], filtered[reach + offset]),
            )
    return values[0].to(tl.int32)


@triton.jit
def _weights(fraction, BICUBIC: tl.constexpr):
    after = 1.0 - fraction
    if BICUBIC:
        product = fraction * after
        outer_before, outer_after = product * -after, product * -fraction
        return outer_before, after - outer_before, fraction - outer_after, outer_after
    else:
        return after, fraction


@triton.jit
def _shifted(start, stride, first, side, fraction, BICUBIC: tl.constexpr):
    weights = _weights(fraction, BICUBIC)
    value = tl.full(first.shape, _FLAT, tl.float32)
    for tap in tl.static_range(4 if BICUBIC else 2):
        where = tl.minimum(tl.maximum(first + tap - (1 if BICUBIC else 0), 0), side - 1)
        value += tl.load(start + where * stride).to(tl.float32) * weights[tap]
    return tl.minimum(tl.maximum(value, 0.0), 255.0).to(tl.int32)


@triton.jit
def _turned(start, line, column, first_y, first_x, side, fraction_y, fraction_x, BICUBIC: tl.constexpr):
    weights_y, weights_x = _weights(fraction_y, BICUBIC), _weights(fraction_x, BICUBIC)
    value = tl.full(first_x.shape, _FLAT, tl.float32)
    for down in tl.static_range(4 if BICUBIC else 2):
        y = tl.minimum(tl.maximum(first_y + down - (1 if BICUBIC else 0), 0), side - 1)
        for right in tl.static_range(4 if BICUBIC else 2):
            x = tl.minimum(tl.maximum(first_x + right - (1 if BICUBIC else 0), 0), side - 1)
            value += tl.load(start + y * line + x * column).to(tl.float32) * (weights_y[down] * weights_x[right])
    return tl.minimum(tl.maximum(value, 0.0), 255.0).to(tl.int32)


@triton.jit
def _position(along_x, along_y):
    """The sum of two float64, as a whole number and a fraction in float32; the two never meet in one float32."""
    whole_x, whole_y = tl.floor(along_x), tl.floor(along_y)
    fraction = (along_x - whole_x).to(tl.float32) + (along_y - whole_y).to(tl.float32)
    carry = tl.floor(fraction)
    return whole_x.to(tl.int32) + whole_y.to(tl.int32) + carry.to(tl.int32), fraction - carry


@triton.jit
def _mix(value):
    """`crng.mix` of uint64."""
    value += 0x9E3779B97F4A7C15
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB
    return value ^ (value >> 31)


@triton.jit(do_not_specialize=(*_VARYING, "fill_red", "fill_green", "fill_blue"))
def apply_layer(
    images,
    source,
    target,
    plan,
    tables,
    noise,
    first_image,
    num_words,
    layer,
    side,
    stride_image,
    stride_channel,
    stride_row,
    stride_column,
    fill_red,
    fill_green,
    fill_blue,
    scale_red,
    scale_green,
    scale_blue,
    shift_red,
    shift_green,
    shift_blue,
    BICUBIC: tl.constexpr,
    GATHERED: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One step of `BLOCK` pixels of an image's channel; the last one also normalises and erases, into float32.

    Three channels at a time would need so many registers for the heaviest steps that few threads had room.
    """
    number = tl.program_id(0) % 3
    num_blocks = tl.cdiv(side * side, BLOCK)
    image = _image(plan, first_image + tl.program_id(0) // (3 * num_blocks), num_words, layer)
    row = plan + image * num_words
    word = tl.load(row + layer).to(tl.int32)
    step = word % _FRESH
    pixel = tl.program_id(0) // 3 % num_blocks * BLOCK + tl.arange(0, BLOCK)
    there = pixel < side * side
    pixel = tl.minimum(pixel, side * side - 1)
    y, x = pixel // side, pixel % side
    base, channel, line, column = _pixels(
        images, source, row, image, word, side, stride_image, stride_channel, stride_row, stride_column
    )
    place = y * line + x * column
    first, second = _parameter(row, layer, 0), _parameter(row, layer, 1)
    factor, near, far = first.to(tl.float32), second.to(tl.float32), _parameter(row, layer, 2).to(tl.float32)
    plane = base + number * channel
    if GATHERED:
        if step == _ROTATE:
            middle = (side - 1).to(tl.float64) / 2
            across, down = x.to(tl.float64) - middle, y.to(tl.float64) - middle
            start_x, fraction_x = _position(first * across + middle, -second * down)
            start_y, fraction_y = _position(second * across, first * down + middle)
            nearest_x = start_x + (fraction_x >= 0.5).to(tl.int32)
            nearest_y = start_y + (fraction_y >= 0.5).to(tl.int32)
            inside = (nearest_x >= 0) & (nearest_x < side) & (nearest_y >= 0) & (nearest_y < side)
            value = _turned(plane, line, column, start_y, start_x, side, fraction_y, fraction_x, BICUBIC)
            value = tl.where(inside, value, _of_channel(number, fill_red, fill_green, fill_blue))
        elif (step == _SHIFT_ROWS) | (step == _SHIFT_COLUMNS):
            by_row = step == _SHIFT_ROWS
            across, along = tl.where(by_row, y, x), tl.where(by_row, x, y)
            start = plane + across * tl.where(by_row, line, column)
            shift = first * (across.to(tl.float64) + 0.5) + second
            whole = tl.floor(shift)
            nearest = along + tl.floor(shift + 0.5).to(tl.int32)
            fraction = (shift - whole).to(tl.float32)
            position = along + whole.to(tl.int32)
            value = _shifted(start, tl.where(by_row, column, line), position, side, fraction, BICUBIC)
            inside = (nearest >= 0) & (nearest < side)
            value = tl.where(inside, value, _of_channel(number, fill_red, fill_green, fill_blue))
        elif step == _SHARPNESS:
            inner = (y > 0) & (y < side - 1) & (x > 0) & (x < side - 1)
            value = _sharpened(plane + place, line, column, inner, factor)
        else:  # half a blur
            by_row = step == _BLUR_ROWS
            start = plane + tl.where(by_row, y * line, x * column)
            position = tl.where(by_row, x, y)
            value = _blurred(start, tl.where(by_row, column, line), position, side, factor, near, far)
    else:
        value = tl.load(plane + place).to(tl.int32)
        if step == _COLOR:
            red = tl.load(base + place).to(tl.int32)
            green = tl.load(base + channel + place).to(tl.int32)
            blue = tl.load(base + 2 * channel + place).to(tl.int32)
            value = _blend(_luma(red, green, blue).to(tl.float32), value.to(tl.float32), factor)
        elif step > 0:
            value = tl.load(tables + image * 768 + number * 256 + value).to(tl.int32)
    result = target + (image * 3 + number) * side * side + pixel
    if LAST:
        scale = _of_channel(number, scale_red, scale_green, scale_blue)
        value = value.to(tl.float32) * scale + _of_channel(number, shift_red, shift_green, shift_blue)
        height = tl.load(row + 3)
        if height > 0:
            top, left, width = tl.load(row + 1), tl.load(row + 2), tl.load(row + 4)
            erased = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
            bits = _mix((tl.load(row + 5) ^ pixel.to(tl.int64)).to(tl.uint64, bitcast=True))
            entry = (bits >> (16 * number).to(tl.uint64)) & 0xFFFF
            value = tl.where(erased, tl.load(noise + entry, mask=erased, other=0), value)
        tl.store(result, value, mask=there)
    else:
        tl.store(result, value.to(tl.uint8), mask=there)
