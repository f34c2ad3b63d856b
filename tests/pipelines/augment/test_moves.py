"""What a view says of moved pixels, held against images whose pixels encode where they come from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.augment.device import DeviceTransform
from pipelines.augment.operations import Op, apply, moves
from pipelines.base import Batch, DataConfig, View

SIDE = 64
GEOMETRIC = (Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y, Op.ROTATE)
STRONGEST = {Op.SHEAR_X: 0.3, Op.SHEAR_Y: 0.3, Op.TRANSLATE_X: 20.0, Op.TRANSLATE_Y: 20.0, Op.ROTATE: 30.0}


def coordinates(count: int) -> Tensor:
    """Green is the row, blue the column, in steps of 3; red is 255, and 0 in what comes in from outside."""
    levels = 3 * torch.arange(SIDE, dtype=torch.uint8)
    image = torch.stack([torch.full((SIDE, SIDE), 255, dtype=torch.uint8), levels[:, None].expand(SIDE, SIDE)])
    return torch.cat([image, levels.expand(1, SIDE, SIDE)]).repeat(count, 1, 1, 1)


def sources(view_moves: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row and column of the pixel that each one shows, and how far within the image all of its way was, in pixels."""
    at = (torch.arange(SIDE) + 0.5) / SIDE
    y, x = (one.expand(len(view_moves), SIDE, SIDE) for one in torch.meshgrid(at, at, indexing="ij"))
    inside = torch.full((len(view_moves), SIDE, SIDE), 1.0)
    for move in reversed(view_moves.unbind(1)):
        (a, b, c), (d, e, f) = ([n[:, None, None] for n in row.unbind(1)] for row in move.unbind(1))
        x, y = a * x + b * y + c, d * x + e * y + f
        inside = torch.minimum(inside, torch.stack([x, 1 - x, y, 1 - y]).amin(0))
    return y * SIDE - 0.5, x * SIDE - 0.5, inside * SIDE


def check(images: Tensor, view_moves: Tensor, places: tuple[int, int] = (1, 2)) -> None:
    row, column, inside = sources(view_moves)
    shown = inside > 2  # away from edges, which are repeated
    assert shown.float().mean() > 0.3
    assert (images[:, 0][shown] == 255).all()
    assert (images[:, 0][inside < -2] == 0).all()
    for channel, expected in zip(places, (row, column), strict=True):
        assert (images[:, channel].float() / 3 - expected).abs()[shown].max() < 0.9  # levels are cut off, twice


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("op", GEOMETRIC, ids=lambda op: op.name)
def test_moves_say_where_pixels_come_from(op: Op, layers: int) -> None:
    """Also where another move follows, in this order."""
    rng = np.random.default_rng(int(op))
    strength = np.array([STRONGEST.get(one, 0.5) for one in Op])
    others = [other for other in (*GEOMETRIC, Op.NONE) if layers == 2] or [op]
    operations = np.array([[op] * len(others), others])[:layers].astype(np.int64)
    arguments = rng.choice((-1, 1), operations.shape) * strength[operations]
    images = apply(coordinates(len(others)), operations, arguments, interpolation="bilinear")
    found = torch.from_numpy(moves(operations, arguments, SIDE))
    assert found.shape == (len(others), layers, 2, 3)
    check(images, found)
    if layers == 2:  # the other order is another thing, for most
        with pytest.raises(AssertionError):
            check(images, found.flip(1))


def test_what_moves_nothing_is_the_identity() -> None:
    still = [op for op in Op if op not in GEOMETRIC]
    found = moves(np.array([still], dtype=np.int64), np.full((1, len(still)), 3.0), SIDE)
    assert (found == np.eye(3, dtype=np.float32)[:2]).all()


def test_the_view_of_a_prepared_batch_has_the_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that were drawn for its images, after the flip."""
    config = DataConfig(img_size=SIDE, rand_augment="rand-m9-inc1-n2", flip=1.0, mean=(0, 0, 0), std=(1, 1, 1))
    config = replace(config, interpolation="bilinear")
    transform = DeviceTransform(config, seed=3, train=True)
    operations = np.array([[Op.ROTATE, Op.SHEAR_X, Op.TRANSLATE_Y], [Op.NONE, Op.TRANSLATE_X, Op.SHEAR_Y]])
    arguments = np.array([[20.0, 0.2, 10.0], [0.0, -12.0, 0.3]])
    assert transform._augment is not None
    monkeypatch.setattr(transform._augment, "draw", lambda *_: (operations, arguments))
    view = View(torch.tensor([[0.0, 0, 1, 1]]).repeat(3, 1), torch.zeros(3, dtype=torch.bool))
    batch = Batch(coordinates(3), torch.zeros(3, dtype=torch.int64), torch.arange(3), view=view)
    values, told = transform.with_view(batch, 0)
    assert told.moves is not None
    assert told.flipped.all()
    pixels = (255 * values).round()
    pixels[:, 2] = torch.where(pixels[:, 0] == 255, 3 * (SIDE - 1) - pixels[:, 2], 0)  # as if it were not mirrored
    check(pixels, told.moves)
    for again, part in zip(told.chunk(3), range(3), strict=True):
        assert again.moves is not None
        assert torch.equal(again.moves, told.moves[part : part + 1])
    for other in (replace(config, rand_augment=None), replace(config, rand_augment=None, three_augment=True)):
        assert DeviceTransform(other, seed=3, train=True).with_view(batch, 0)[1].moves is None
    assert DeviceTransform(config, seed=3, train=False).with_view(batch, 0)[1].moves is None
