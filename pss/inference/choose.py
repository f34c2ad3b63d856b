"""Choose ρ for a machine: the largest that is fast enough, or the smallest that is accurate enough.

What an exhaustive sweep over the counts of kept tokens would pick, with fewer measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch

from pss.inference.opening import Run
from pss.inference.sweep import predict
from pss.inference.timing import Spread, enough_memory, latencies, rates
from pss.methods import mean_tokens

_WINDOW = 8


@dataclass(frozen=True)
class Choice:
    """The ρ that meets a demand."""

    rho: float
    tokens: int | float
    measured: Spread
    """What the demand is about: milliseconds of one batch, or images per second."""


def levels(run: Run, rhos: Sequence[float] | None = None) -> list[float]:
    """One rho for every count of tokens that can be kept, ascending; if `rhos` are given, for every one of theirs.

    Raises:
        ValueError: the method has no rho to choose.
    """
    method = run.method
    wanted = method.fine_points() if rhos is None else sorted(rhos)
    for rho in wanted:
        method.check_point(rho)
    by_cost = {(method.tokens(rho), method.cost(rho).forward): rho for rho in wanted}
    return [by_cost[cost] for cost in sorted(by_cost)]


def fast_enough(
    run: Run,
    *,
    batch: int,
    device: torch.device,
    budget_ms: float | None = None,
    target_ips: float | None = None,
    rhos: Sequence[float] | None = None,
) -> Choice:
    """The largest rho that is fast enough on this machine.

    Args:
        run: What to run.
        batch: Images per batch.
        device: Where.
        budget_ms: A single batch may take so many milliseconds, until its result is there; or:
        target_ips: a stream of batches must pass at so many images per second.
        rhos: Choose from these; from every count of tokens that can be kept if None.

    Raises `ValueError` where not even the smallest rho is, or a batch takes more memory than there is.
    """
    assert (budget_ms is None) != (target_ips is None)
    candidates = levels(run, rhos)
    size = run.config.data.img_size
    with enough_memory(f"batches of {batch} images (--batch)"), torch.inference_mode():
        images = torch.randn(batch, 3, size, size, device=device)
        predict(run, images, candidates[-1])

    @cache
    def measure(place: int) -> Spread:
        calls = [partial(predict, run, images, candidates[place])]
        if budget_ms is not None:
            return latencies(calls, device=device)[0]
        return rates(calls, num_images=batch, device=device)[0]

    def meets(place: int) -> bool:
        median = measure(place).median
        return median <= budget_ms if budget_ms is not None else median >= (target_ips or 0)

    found = largest(len(candidates), meets)
    if found is None:
        wish = f"under {budget_ms:g} ms" if budget_ms is not None else f"to {target_ips:g} images/s"
        got = f"{measure(0).median:.3g} {'ms' if budget_ms is not None else 'images/s'}"
        raise ValueError(
            f"no ρ brings batches of {batch} {wish} on this machine, the smallest, {candidates[0]:.3g}, gives {got}; "
            "ask for less, or take a smaller model"
        )
    return Choice(candidates[found], mean_tokens(run.method.tokens(candidates[found])), measure(found))


def largest(count: int, meets: Callable[[int], bool]) -> int | None:
    """The largest number below `count` that `meets`; None if there is none.

    `meets` holds up to some number and fails beyond it, but may hold again within eight of the last that did: multiples
    of 8 tokens can be faster than slightly fewer. It may also hold for the very largest alone, the whole model, which a
    method that chooses patches on the way can be slower than. Called for few numbers.
    """
    if count and meets(count - 1):
        return count - 1
    low, high = -1, count - 1  # -1 meets, the last does not
    while high - low > 1:
        middle = (low + high) // 2
        if meets(middle):
            low = middle
        else:
            high = middle
    while further := [place for place in range(low + 1, min(low + _WINDOW, count - 1) + 1) if meets(place)]:
        low = further[-1]
    return None if low < 0 else low


def accurate_enough(rhos: Sequence[float], top1: Sequence[float], *, max_drop: float) -> float:
    """The smallest of `rhos` whose top-1 is at most `max_drop` points below that of the largest.

    Args:
        rhos: Shares of patches, in any order.
        top1: Of each, in percent.
        max_drop: In points.
    """
    reference = dict(zip(rhos, top1, strict=True))[max(rhos)]
    # A millionth of a point is less than one image of any set: rounding, which must not decide.
    return min(rho for rho, value in zip(rhos, top1, strict=True) if reference - value <= max_drop + 1e-6)
