"""Order and sharding: every sample once, whatever the number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.base import DataError
from pipelines.order import epoch_order, evaluation_samples, train_batches, train_steps


def test_order_never_changes() -> None:
    """numpy may change its generators; resumed runs would then see other data, and ORDER_VERSION has to rise."""
    assert epoch_order(10, seed=1, epoch=2).tolist() == [1, 4, 5, 0, 7, 6, 8, 2, 3, 9]
    assert epoch_order(10, seed=2, epoch=1).tolist() == [6, 8, 9, 2, 0, 4, 1, 7, 3, 5]


@settings(deadline=None, max_examples=60)
@given(
    num_samples=st.integers(1, 200),
    batch_size=st.integers(1, 9),
    world_size=st.integers(1, 5),
    seed=st.integers(0, (1 << 63) - 1),
    epoch=st.integers(0, 1000),
)
def test_training_visits_every_sample_at_most_once(
    num_samples: int, batch_size: int, world_size: int, seed: int, epoch: int
) -> None:
    total = batch_size * world_size
    if num_samples < total:
        with pytest.raises(DataError, match=f"{num_samples} samples.*{total}"):
            train_steps(num_samples, batch_size, world_size)
        return
    ranks = [
        train_batches(num_samples, seed, epoch, batch_size=batch_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert all(r.shape == (num_samples // total, batch_size) for r in ranks)
    steps = np.concatenate(ranks, axis=1)  # a row is one global batch
    assert len(np.unique(steps)) == steps.size == num_samples // total * total
    assert np.array_equal(steps.ravel(), epoch_order(num_samples, seed, epoch)[: steps.size])


def test_the_remainder_differs_between_epochs() -> None:
    left_out = [
        frozenset(range(50)) - set(train_batches(50, 3, epoch, batch_size=8, rank=0, world_size=1).ravel().tolist())
        for epoch in range(20)
    ]
    assert all(len(samples) == 2 for samples in left_out)
    assert len(set(left_out)) > 15


@settings(deadline=None)
@given(num_samples=st.integers(0, 100), world_size=st.integers(1, 7))
def test_evaluation_visits_every_sample_once(num_samples: int, world_size: int) -> None:
    ranks = [evaluation_samples(num_samples, rank, world_size) for rank in range(world_size)]
    assert sorted(np.concatenate(ranks).tolist()) == list(range(num_samples))
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1
