"""Which patches a training step sees: token counts, sort functions and the gather (McDanel & Huynh 2022).

Prefix tokens (class, distillation, registers) come first in the sequence and are always kept. All images of a batch
keep the same number of patches, each its own set.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from hashlib import blake2b
from typing import Literal, get_args

import torch
from torch import Tensor

Sort = Literal["magnitude", "random"]
TokenCounts = Literal["published", "aligned"]

Draw = Callable[[int, int], Tensor | None]
"""(images, patches) to scores (images, patches) on any device: of each image the highest are kept."""

_draw: ContextVar[Draw | None] = ContextVar("draw", default=None)

ALIGNMENT = 8
"""Matrix products and attention in half precision read 8 numbers at a time; a length that is no multiple is padded."""


def num_kept_tokens(rho: float, num_patches: int, num_prefix: int, counts: TokenCounts = "published") -> int:
    """Tokens kept at share `rho`, prefix included: `rho * (num_patches + num_prefix)`, rounded half to even.

    At least one patch is kept. With `aligned` counts the product is rounded to the nearest multiple of 8 instead, the
    prefix counted, as that is the length of what the blocks see; all tokens stay all tokens, whatever their number.

    Raises:
        ValueError: rho is outside (0, 1].
    """
    if not 0 < rho <= 1:
        raise ValueError(f"rho must be in (0, 1], got {rho}")
    num_tokens = num_patches + num_prefix
    # The inner rounding removes the float noise of the product, which would decide ties: 0.7 * 45 < 31.5.
    wanted = round(rho * num_tokens, 9)
    if counts == "published" or wanted == num_tokens:
        return max(num_prefix + 1, round(wanted))
    fewest = -(-(num_prefix + 1) // ALIGNMENT) * ALIGNMENT
    return min(num_tokens, max(fewest, round(wanted / ALIGNMENT) * ALIGNMENT))


def select(
    tokens: Tensor, num_kept: int, num_prefix: int, sort: Sort, generator: torch.Generator | None = None
) -> Tensor:
    """Choose the patches of each image that stay.

    Args:
        tokens: Embedded tokens, (B, N, D), prefix first. No gradient flows into the choice.
        num_kept: Tokens to keep, prefix included (see `num_kept_tokens`).
        num_prefix: Leading tokens that are not patches.
        sort: `magnitude` keeps the tokens of largest L1 norm, the lower patch index winning a tie; `random`
            draws uniformly, independently per image.
        generator: Source of the random sort, on the device of the tokens; torch's default generator if None.

    Returns:
        Patch indices (0 is the first patch, not the first token), ascending in each row, (B, num_kept - num_prefix).

    Raises:
        ValueError: unknown sort, or no such number of patches.
    """
    patches = tokens.detach()[:, num_prefix:]  # (B, N - num_prefix, D)
    if sort == "magnitude":
        # Half-precision sums over D are too coarse to rank by.
        score_dtype = torch.promote_types(tokens.dtype, torch.float32)
        scores = torch.linalg.vector_norm(patches, ord=1, dim=-1, dtype=score_dtype)
    elif sort == "random":
        num_images, num_patches = patches.shape[:2]
        return select_at_random(num_images, num_patches, num_kept - num_prefix, generator, patches.device)
    else:
        raise ValueError(f"sort must be one of {', '.join(get_args(Sort))}, got {sort!r}")
    return highest(scores, num_kept - num_prefix)


def select_at_random(
    num_images: int,
    num_patches: int,
    num_kept_patches: int,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """What `select` returns for the random sort, which needs no tokens: (num_images, num_kept_patches)."""
    draw = _draw.get()
    scores = draw(num_images, num_patches) if draw is not None and generator is None else None
    if scores is not None:
        return highest(scores.to(device), num_kept_patches, never_negative=False)
    scores = torch.rand(num_images, num_patches, generator=generator, device=device)
    return highest(scores, num_kept_patches)


@contextmanager
def drawing(draw: Draw) -> Iterator[None]:
    """Within, the random sort takes its scores from `draw` where it is given no generator; from torch if that returns
    None."""
    before = _draw.set(draw)
    try:
        yield
    finally:
        _draw.reset(before)


def highest(scores: Tensor, num_kept_patches: int, *, never_negative: bool = True) -> Tensor:
    """The indices of the highest scores of each row of (B, N), ascending, (B, kept); the lower index wins a tie."""
    num_patches = scores.shape[1]
    if not 1 <= num_kept_patches <= num_patches:
        raise ValueError(f"cannot keep {num_kept_patches} of {num_patches} patches; keep one at least, and no more")
    if never_negative and scores.dtype == torch.float32 and not torch.compiler.is_exporting():
        # Which of two equal scores topk takes depends on the device. So no two are: their bits, which as whole numbers
        # are in the same order, come before the index. It takes a third to a half of the sort's time.
        before = torch.arange(num_patches - 1, -1, -1, device=scores.device)
        ranks = torch.add(before, scores.view(torch.int32), alpha=num_patches)  # int64
        order = ranks.topk(num_kept_patches, dim=1, sorted=False).indices
    else:
        order = scores.sort(dim=1, descending=True, stable=True).indices[:, :num_kept_patches]
    kept: Tensor = order.sort(dim=1).values
    return kept


def gather(tokens: Tensor, kept: Tensor, num_prefix: int) -> Tensor:
    """The prefix and the kept patches as one dense tensor.

    Args:
        tokens: (B, N, D), prefix first.
        kept: Patch indices as `select` returns them, (B, K - num_prefix).
        num_prefix: Leading tokens that are not patches.

    Returns:
        (B, K, D). Dropped tokens get no gradient, kept ones the ordinary one.
    """
    index = kept.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])  # (B, K - num_prefix, D)
    return torch.cat((tokens[:, :num_prefix], tokens[:, num_prefix:].gather(1, index)), dim=1)


def spread(grid: tuple[int, int], over: tuple[int, int], device: torch.device | str | None = None) -> Tensor:
    """Where the patches of a coarse (h, w) grid lie on a finer one that covers the same view.

    The first and the last row and column meet those of the finer grid, the others lie at equal distances, rounded to
    whole patches. A coarse grid of one row or column lies in the middle.

    Returns:
        Indices on the finer grid, ascending and all different, (h * w,).
    """
    rows, columns = (
        torch.tensor([fine // 2] if coarse == 1 else [round(i * (fine - 1) / (coarse - 1)) for i in range(coarse)])
        for coarse, fine in zip(grid, over, strict=True)
    )
    places = (rows[:, None] * over[1] + columns).flatten()
    if device is not None and torch.device(device).type == "cuda":  # a copy from pageable memory would wait for it
        return places.pin_memory().to(device, non_blocking=True)
    return places.to(device)


def step_generator(seed: int, step: int, rank: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A random source that depends on the three numbers alone: a resumed run draws what the first would have."""
    digest = blake2b(f"{seed} {step} {rank}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))
