"""MixToken (Jiang et al., NeurIPS 2021): images of a batch exchange a box of patches between the stem and the blocks.

Image i exchanges with image B - 1 - i, so that exchanging twice gives back what was there. Where a box lies is decided
on the device, and its patches are chosen by a mask: nothing waits, and shapes do not depend on the box.
"""

from __future__ import annotations

import torch
from torch import Tensor


def draw_boxes(count: int, grid: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Boxes in a grid of (rows, columns), each as a mask, bool (count, patches), on the generator's device.

    Sides are sqrt(1 - u) of the grid's, u uniform in [0, 1), rounded down to whole patches, then to an even number. The
    centre is any patch; what lies outside of the grid is cut off. A box may be empty.
    """
    device = generator.device
    side = (1 - torch.rand(count, generator=generator, device=device)).sqrt()
    inside = []
    for length in grid:
        half = (side * length).long() // 2
        centre = torch.randint(length, (count,), generator=generator, device=device)
        place = torch.arange(length, device=device)
        inside.append((place >= (centre - half)[:, None]) & (place < (centre + half)[:, None]))  # (count, length)
    rows, columns = inside
    return (rows[:, :, None] & columns[:, None, :]).flatten(1)


def exchanged(x: Tensor, box: Tensor) -> Tensor:
    """What a batch has at its patches, (B, patches, ...), with that of the other image where `box` (patches,) is."""
    return torch.where(box.view(1, -1, *[1] * (x.ndim - 2)), x.flip(0), x)


def own_share(box: Tensor) -> Tensor:
    """The share of its own patches that an image keeps, a scalar."""
    return 1 - box.float().mean()
