"""Triton kernels: attention that looks the position bias up while it runs, and reductions of its gradient.

Tensors are `qkv` (3, B, H, K, head width) of any layout with adjacent features, `out` (B, K, H, head width)
contiguous, and per image, head and token the base-2 logarithm of the sum of exponentials, `lse`. `spread` is
`relpos.spread` of the table times log2(e), (H, entries) in float32, so that logits come out in base 2; at about
7 KB a head (224 pixels) it stays in the L1 cache. `positions` is (2, B or 1, K) int64. Tokens beyond the last one of a
block get the numbers of no patch, which keeps every lookup in range and every sum over pairs of patches clean.

The gradient of a table row is a sum over B * K * K / rows logit gradients. Atomic additions to the table would queue up
behind each other and make the sum depend on their order. Instead each program has a histogram of its own in global
memory with one line per token of its block: within a line all tokens of an image lie at different entries, so a tile of
logit gradients is added without collisions, and a barrier separates one tile from the next. The lines of a program
are summed at its end, the programs afterwards, always in the same order.
"""

# mypy: ignore-errors
# (Triton compiles these functions from their source; their types are not Python's.)

import triton
import triton.language as tl

# Numbers that differ between levels and batches: Triton would compile a kernel again for some of their values.
_VARYING = ("num_images", "num_tokens", "images_per_program", "stride_role", "stride_set")


@triton.jit
def spread_table(table, spread, factor, num_offsets, reach, num_entries, stride_row, stride_head, BLOCK: tl.constexpr):
    """`relpos.spread` of `table` (rows, H) times `factor`, in float32; one program per head and `BLOCK` entries."""
    head = tl.program_id(1)
    entries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.where(entries < num_offsets, entries, num_offsets + (entries - num_offsets) // (reach + 1))
    there = entries < num_entries
    values = tl.load(table + rows * stride_row + head * stride_head, mask=there, other=0.0)
    tl.store(spread + head * num_entries + entries, values.to(tl.float32) * factor, mask=there)


@triton.jit
def _query_numbers(positions, first, num_tokens, reach, BLOCK: tl.constexpr):
    tokens = first + tl.arange(0, BLOCK)
    return tl.load(positions + tokens, mask=tokens < num_tokens, other=3 * reach + 1).to(tl.int32)


@triton.jit
def _key_numbers(positions, first, num_tokens, BLOCK: tl.constexpr):
    tokens = first + tl.arange(0, BLOCK)
    return tl.load(positions + tokens, mask=tokens < num_tokens, other=-1).to(tl.int32)


@triton.jit
def _bias(table, entries, key_number):
    """What the logits get; minus infinity where there is no key. `key_number` has as many dimensions as `entries`."""
    return tl.load(table + entries, mask=key_number != -1, other=float("-inf"))


@triton.jit
def _rows(base, first, num_rows, stride, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """`BLOCK_ROWS` rows of a matrix of `num_rows` rows, zero outside."""
    rows = first + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_WIDTH)
    there = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=there, other=0.0)


@triton.jit
def _store_rows(
    base, values, first, num_rows, stride, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):
    rows = first + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_WIDTH)
    there = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
    tl.store(base + rows[:, None] * stride + columns[None, :], values.to(base.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=_VARYING)
def attend_forward(
    qkv,
    spread,
    positions,
    out,
    lse,
    factor,
    num_heads,
    num_tokens,
    reach,
    stride_part,
    stride_image,
    stride_head,
    stride_token,
    stride_role,
    stride_set,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program computes `BLOCK_QUERIES` rows of `out` for one image and head. `factor` is log2(e) / sqrt(width)."""
    num_blocks = tl.cdiv(num_tokens, BLOCK_QUERIES)
    first = tl.program_id(0) % num_blocks * BLOCK_QUERIES
    pair = tl.program_id(0) // num_blocks
    head = pair % num_heads
    image = (pair // num_heads).to(tl.int64)

    queries = qkv + image * stride_image + head * stride_head
    keys = queries + stride_part
    values = keys + stride_part
    table = spread + head * (5 * reach + 4)
    query_numbers = positions + image * stride_set
    key_numbers = query_numbers + stride_role

    q = _rows(queries, first, num_tokens, stride_token, WIDTH, BLOCK_QUERIES, BLOCK_WIDTH)
    query_number = _query_numbers(query_numbers, first, num_tokens, reach, BLOCK_QUERIES)
    largest = tl.full((BLOCK_QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_QUERIES,), tl.float32)
    attended = tl.zeros((BLOCK_QUERIES, BLOCK_WIDTH), tl.float32)
    for start in range(0, num_tokens, BLOCK_KEYS):
        k = _rows(keys, start, num_tokens, stride_token, WIDTH, BLOCK_KEYS, BLOCK_WIDTH)
        key_number = _key_numbers(key_numbers, start, num_tokens, BLOCK_KEYS)
        bias = _bias(table, query_number[:, None] - key_number[None, :], key_number[None, :])
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor + bias
        new_largest = tl.maximum(largest, tl.max(logits, 1))
        weights = tl.exp2(logits - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
        v = _rows(values, start, num_tokens, stride_token, WIDTH, BLOCK_KEYS, BLOCK_WIDTH)
        attended = attended * shrink[:, None]
        attended = tl.dot(weights.to(v.dtype), v, attended, input_precision=PRECISION)
        total = total * shrink + tl.sum(weights, 1)
        largest = new_largest

    tokens = first + tl.arange(0, BLOCK_QUERIES)
    tl.store(lse + pair.to(tl.int64) * num_tokens + tokens, largest + tl.log2(total), mask=tokens < num_tokens)
    results = out + image * num_tokens * num_heads * WIDTH + head * WIDTH
    _store_rows(
        results, attended / total[:, None], first, num_tokens, num_heads * WIDTH, WIDTH, BLOCK_QUERIES, BLOCK_WIDTH
    )


@triton.jit(do_not_specialize=_VARYING)
def attend_backward_queries(
    qkv,
    spread,
    positions,
    out,
    grad_out,
    lse,
    delta,
    grad_qkv,
    factor,
    scale,
    num_heads,
    num_tokens,
    reach,
    stride_part,
    stride_image,
    stride_head,
    stride_token,
    stride_role,
    stride_set,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program computes `BLOCK_QUERIES` rows of the queries' gradient for one image and head.

    On the way it stores `delta`, each row's sum of `out * grad_out`, for the other kernel. `scale` is 1 / sqrt(width).
    """
    num_blocks = tl.cdiv(num_tokens, BLOCK_QUERIES)
    first = tl.program_id(0) % num_blocks * BLOCK_QUERIES
    pair = tl.program_id(0) // num_blocks
    head = pair % num_heads
    image = (pair // num_heads).to(tl.int64)

    queries = qkv + image * stride_image + head * stride_head
    keys = queries + stride_part
    values = keys + stride_part
    table = spread + head * (5 * reach + 4)
    query_numbers = positions + image * stride_set
    key_numbers = query_numbers + stride_role
    output_offset = image * num_tokens * num_heads * WIDTH + head * WIDTH
    output_stride = num_heads * WIDTH

    q = _rows(queries, first, num_tokens, stride_token, WIDTH, BLOCK_QUERIES, BLOCK_WIDTH)
    o = _rows(out + output_offset, first, num_tokens, output_stride, WIDTH, BLOCK_QUERIES, BLOCK_WIDTH)
    do = _rows(grad_out + output_offset, first, num_tokens, output_stride, WIDTH, BLOCK_QUERIES, BLOCK_WIDTH)
    query_number = _query_numbers(query_numbers, first, num_tokens, reach, BLOCK_QUERIES)
    tokens = first + tl.arange(0, BLOCK_QUERIES)
    there = tokens < num_tokens
    row_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta + pair.to(tl.int64) * num_tokens + tokens, row_delta, mask=there)
    row_lse = tl.load(lse + pair.to(tl.int64) * num_tokens + tokens, mask=there, other=float("inf"))

    grad_q = tl.zeros((BLOCK_QUERIES, BLOCK_WIDTH), tl.float32)
    for start in range(0, num_tokens, BLOCK_KEYS):
        k = _rows(keys, start, num_tokens, stride_token, WIDTH, BLOCK_KEYS, BLOCK_WIDTH)
        v = _rows(values, start, num_tokens, stride_token, WIDTH, BLOCK_KEYS, BLOCK_WIDTH)
        key_number = _key_numbers(key_numbers, start, num_tokens, BLOCK_KEYS)
        bias = _bias(table, query_number[:, None] - key_number[None, :], key_number[None, :])
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor + bias
        weights = tl.exp2(logits - row_lse[:, None])
        grad_weights = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        grad_logits = weights * (grad_weights - row_delta[:, None])
        grad_q = tl.dot(grad_logits.to(k.dtype), k, grad_q, input_precision=PRECISION)

    target = grad_qkv + image * stride_image + head * stride_head
    _store_rows(target, grad_q * scale, first, num_tokens, stride_token, WIDTH, BLOCK_QUERIES, BLOCK_WIDTH)


@triton.jit(do_not_specialize=_VARYING)
def attend_backward_keys(
    qkv,
    spread,
    positions,
    grad_out,
    lse,
    delta,
    grad_qkv,
    histograms,
    partial,
    factor,
    scale,
    num_images,
    num_heads,
    num_tokens,
    reach,
    images_per_program,
    stride_part,
    stride_image,
    stride_head,
    stride_token,
    stride_role,
    stride_set,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program computes `BLOCK_KEYS` rows of the keys' and values' gradients for one head and some images.

    `histograms` is (programs, BLOCK_KEYS, offsets) of float32, of any content; what one program contributes to the
    gradient of the table goes to `partial`, (programs / H, rows, H).
    """
    num_blocks = tl.cdiv(num_tokens, BLOCK_KEYS)
    program = tl.program_id(0)
    first = program % num_blocks * BLOCK_KEYS
    head = program // num_blocks % num_heads
    group = program // (num_blocks * num_heads)
    table = spread + head * (5 * reach + 4)
    output_stride = num_heads * WIDTH

    num_offsets = 2 * reach + 1
    histogram = histograms + program.to(tl.int64) * BLOCK_KEYS * num_offsets
    _clear(histogram, num_offsets, BLOCK_KEYS, BLOCK_ENTRIES)
    prefix_to_patch = 0.0  # what the last three rows of the table get
    patch_to_prefix = 0.0
    prefix_to_prefix = 0.0

    for number in range(group * images_per_program, tl.minimum((group + 1) * images_per_program, num_images)):
        image = tl.cast(number, tl.int64)
        queries = qkv + image * stride_image + head * stride_head
        keys = queries + stride_part
        values = keys + stride_part
        query_numbers = positions + image * stride_set
        key_numbers = query_numbers + stride_role
        grads = grad_out + image * num_tokens * num_heads * WIDTH + head * WIDTH
        statistics = (image * num_heads + head) * num_tokens

        k = _rows(keys, first, num_tokens, stride_token, WIDTH, BLOCK_KEYS, BLOCK_WIDTH)
        v = _rows(values, first, num_tokens, stride_token, WIDTH, BLOCK_KEYS, BLOCK_WIDTH)
        key_number = _key_numbers(key_numbers, first, num_tokens, BLOCK_KEYS)
        grad_k = tl.zeros((BLOCK_KEYS, BLOCK_WIDTH), tl.float32)
        grad_v = tl.zeros((BLOCK_KEYS, BLOCK_WIDTH), tl.float32)
        from_prefix = tl.zeros((BLOCK_KEYS,), tl.float32)
        from_patches = tl.zeros((BLOCK_KEYS,), tl.float32)
        for start in range(0, num_tokens, BLOCK_QUERIES):
            q = _rows(queries, start, num_tokens, stride_token, WIDTH, BLOCK_QUERIES, BLOCK_WIDTH)
            do = _rows(grads, start, num_tokens, output_stride, WIDTH, BLOCK_QUERIES, BLOCK_WIDTH)
            query_number = _query_numbers(query_numbers, start, num_tokens, reach, BLOCK_QUERIES)
            tokens = start + tl.arange(0, BLOCK_QUERIES)
            row_lse = tl.load(lse + statistics + tokens, mask=tokens < num_tokens, other=float("inf"))
            row_delta = tl.load(delta + statistics + tokens, mask=tokens < num_tokens, other=0.0)
            entries = query_number[None, :] - key_number[:, None]
            bias = _bias(table, entries, key_number[:, None])
            logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * factor + bias
            weights = tl.exp2(logits - row_lse[None, :])
            grad_v = tl.dot(weights.to(do.dtype), do, grad_v, input_precision=PRECISION)
            grad_weights = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            grad_logits = weights * (grad_weights - row_delta[None, :])
            grad_k = tl.dot(grad_logits.to(q.dtype), q, grad_k, input_precision=PRECISION)

            is_patch = query_number <= 2 * reach
            patches = is_patch[None, :] & (key_number >= 0)[:, None]
            _add_tile(histogram, grad_logits, entries, patches, num_offsets, BLOCK_KEYS)
            if tl.max(query_number) > 2 * reach:
                from_prefix += tl.sum(tl.where(is_patch[None, :], 0.0, grad_logits), 1)
            if tl.min(key_number) < 0:
                from_patches += tl.sum(tl.where(is_patch[None, :], grad_logits, 0.0), 1)

        prefix_to_patch += tl.sum(tl.where(key_number >= 0, from_prefix, 0.0))
        patch_to_prefix += tl.sum(tl.where(key_number < -1, from_patches, 0.0))
        prefix_to_prefix += tl.sum(tl.where(key_number < -1, from_prefix, 0.0))
        target = grad_qkv + image * stride_image + head * stride_head + stride_part
        _store_rows(target, grad_k * scale, first, num_tokens, stride_token, WIDTH, BLOCK_KEYS, BLOCK_WIDTH)
        _store_rows(target + stride_part, grad_v, first, num_tokens, stride_token, WIDTH, BLOCK_KEYS, BLOCK_WIDTH)

    sums = partial + (group * num_blocks + program % num_blocks) * (num_offsets + 3) * num_heads + head
    _sum_lines(histogram, sums, num_offsets, num_heads, BLOCK_KEYS, BLOCK_ENTRIES)
    tl.store(sums + num_offsets * num_heads, prefix_to_patch)
    tl.store(sums + (num_offsets + 1) * num_heads, patch_to_prefix)
    tl.store(sums + (num_offsets + 2) * num_heads, prefix_to_prefix)


@triton.jit
def _clear(histogram, num_offsets, BLOCK_LINES: tl.constexpr, BLOCK_ENTRIES: tl.constexpr):
    lines = tl.arange(0, BLOCK_LINES)[:, None] * num_offsets
    for start in range(0, num_offsets, BLOCK_ENTRIES):
        entries = start + tl.arange(0, BLOCK_ENTRIES)[None, :]
        tl.store(
            histogram + lines + entries,
            tl.zeros((BLOCK_LINES, BLOCK_ENTRIES), tl.float32),
            mask=(entries < num_offsets) & (lines >= 0),
        )


@triton.jit
def _add_tile(histogram, tile, entries, there, num_offsets, BLOCK_LINES: tl.constexpr):
    """Add a tile of logit gradients, one line per key, where `there`; no two of a line may have the same entry."""
    slots = histogram + tl.arange(0, BLOCK_LINES)[:, None] * num_offsets + entries
    tl.debug_barrier()  # other threads may have written these slots, for the tile before
    tl.store(slots, tl.load(slots, mask=there, other=0.0) + tile, mask=there)


@triton.jit
def _sum_lines(histogram, sums, num_offsets, stride_sums, BLOCK_LINES: tl.constexpr, BLOCK_ENTRIES: tl.constexpr):
    tl.debug_barrier()
    lines = tl.arange(0, BLOCK_LINES)[:, None] * num_offsets
    for start in range(0, num_offsets, BLOCK_ENTRIES):
        entries = start + tl.arange(0, BLOCK_ENTRIES)
        there = entries < num_offsets
        block = tl.load(histogram + lines + entries[None, :], mask=there[None, :], other=0.0)
        tl.store(sums + entries * stride_sums, tl.sum(block, 0), mask=there)


@triton.jit(do_not_specialize=_VARYING)
def write_bias(
    spread,
    positions,
    bias,
    num_heads,
    num_tokens,
    reach,
    stride_role,
    stride_set,
    pitch,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """The bias of all pairs of tokens as a matrix, (1 or B, H, K, pitch); one program per `BLOCK_QUERIES` lines."""
    num_blocks = tl.cdiv(num_tokens, BLOCK_QUERIES)
    first = tl.program_id(0) % num_blocks * BLOCK_QUERIES
    pair = (tl.program_id(0) // num_blocks).to(tl.int64)
    table = spread + pair % num_heads * (5 * reach + 4)
    query_numbers = positions + pair // num_heads * stride_set
    query_number = _query_numbers(query_numbers, first, num_tokens, reach, BLOCK_QUERIES)
    lines = bias + pair * num_tokens * pitch
    tokens = first + tl.arange(0, BLOCK_QUERIES)
    for start in range(0, num_tokens, BLOCK_KEYS):
        key_number = _key_numbers(query_numbers + stride_role, start, num_tokens, BLOCK_KEYS)
        keys = start + tl.arange(0, BLOCK_KEYS)
        there = (tokens < num_tokens)[:, None] & (keys < num_tokens)[None, :]
        values = tl.load(table + (query_number[:, None] - key_number[None, :]))
        tl.store(lines + tokens[:, None] * pitch + keys[None, :], values.to(bias.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=_VARYING)
def reduce_bias(
    grad_bias,
    positions,
    histograms,
    partial,
    num_images,
    num_heads,
    num_tokens,
    reach,
    images_per_program,
    stride_image,
    stride_head,
    stride_query,
    stride_role,
    stride_set,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
):
    """What some images and `BLOCK_KEYS` columns of `grad_bias` (B, H, K, K) contribute to the gradient of the table.

    See `attend_backward_keys` for `histograms` and `partial`.
    """
    num_blocks = tl.cdiv(num_tokens, BLOCK_KEYS)
    program = tl.program_id(0)
    first = program % num_blocks * BLOCK_KEYS
    head = program // num_blocks % num_heads
    group = program // (num_blocks * num_heads)
    num_offsets = 2 * reach + 1
    histogram = histograms + program.to(tl.int64) * BLOCK_KEYS * num_offsets
    _clear(histogram, num_offsets, BLOCK_KEYS, BLOCK_ENTRIES)
    prefix_to_patch = 0.0
    patch_to_prefix = 0.0
    prefix_to_prefix = 0.0

    keys = first + tl.arange(0, BLOCK_KEYS)
    for number in range(group * images_per_program, tl.minimum((group + 1) * images_per_program, num_images)):
        image = tl.cast(number, tl.int64)
        query_numbers = positions + image * stride_set
        key_number = _key_numbers(query_numbers + stride_role, first, num_tokens, BLOCK_KEYS)
        from_prefix = tl.zeros((BLOCK_KEYS,), tl.float32)
        from_patches = tl.zeros((BLOCK_KEYS,), tl.float32)
        for start in range(0, num_tokens, BLOCK_QUERIES):
            queries = start + tl.arange(0, BLOCK_QUERIES)
            query_number = _query_numbers(query_numbers, start, num_tokens, reach, BLOCK_QUERIES)
            there = (queries < num_tokens)[None, :] & (keys < num_tokens)[:, None]
            offsets = image * stride_image + head * stride_head + queries[None, :] * stride_query + keys[:, None]
            grad_logits = tl.load(grad_bias + offsets, mask=there, other=0.0).to(tl.float32)
            entries = query_number[None, :] - key_number[:, None]
            is_patch = query_number <= 2 * reach
            _add_tile(
                histogram, grad_logits, entries, is_patch[None, :] & (key_number >= 0)[:, None], num_offsets, BLOCK_KEYS
            )
            if tl.max(query_number) > 2 * reach:
                from_prefix += tl.sum(tl.where(is_patch[None, :], 0.0, grad_logits), 1)
            if tl.min(key_number) < 0:
                from_patches += tl.sum(tl.where(is_patch[None, :], grad_logits, 0.0), 1)
        prefix_to_patch += tl.sum(tl.where(key_number >= 0, from_prefix, 0.0))
        patch_to_prefix += tl.sum(tl.where(key_number < -1, from_patches, 0.0))
        prefix_to_prefix += tl.sum(tl.where(key_number < -1, from_prefix, 0.0))

    sums = partial + (group * num_blocks + program % num_blocks) * (num_offsets + 3) * num_heads + head
    _sum_lines(histogram, sums, num_offsets, num_heads, BLOCK_KEYS, BLOCK_ENTRIES)
    tl.store(sums + num_offsets * num_heads, prefix_to_patch)
    tl.store(sums + (num_offsets + 1) * num_heads, patch_to_prefix)
    tl.store(sums + (num_offsets + 2) * num_heads, prefix_to_prefix)
