"""Order and sharding: every sample once, whatever the number of ranks."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipelines.base import DataError
from pipelines.loaders.order import (
    copy_numbers,
    draw_keys,
    epoch_order,
    evaluation_samples,
    keys_hash,
    sample_numbers,
    train_plan,
    train_steps,
)


def train_batches(*arguments: int, **settings: int) -> NDArray[np.int64]:
    """The keys of all batches of a plan, (steps, batch_size)."""
    return np.stack(list(train_plan(*arguments, **settings)))


def test_order_never_changes() -> None:
    """numpy may change its generators; resumed runs would then see other data, and ORDER_VERSION has to rise."""
    assert epoch_order(10, seed=1, epoch=2).tolist() == [1, 4, 5, 0, 7, 6, 8, 2, 3, 9]
    assert epoch_order(10, seed=2, epoch=1).tolist() == [6, 8, 9, 2, 0, 4, 1, 7, 3, 5]


@settings(max_examples=60)
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


@given(num_samples=st.integers(0, 100), world_size=st.integers(1, 7))
def test_evaluation_visits_every_sample_once(num_samples: int, world_size: int) -> None:
    ranks = [evaluation_samples(num_samples, rank, world_size) for rank in range(world_size)]
    assert sorted(np.concatenate(ranks).tolist()) == list(range(num_samples))
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1


@settings(max_examples=60)
@given(
    num_samples=st.integers(24, 200),
    per_rank=st.integers(1, 4),
    world_size=st.integers(1, 4),
    copies=st.integers(2, 4),
    epoch=st.integers(0, 1000),
)
def test_repeated_augmentation_deals_copies_out_as_deit_does(
    num_samples: int, per_rank: int, world_size: int, copies: int, epoch: int
) -> None:
    """DeiT: repeat every entry of the permutation, deal the list out to the ranks, keep the epoch's length."""
    steps = train_steps(num_samples, per_rank, world_size)
    dealt = np.repeat(epoch_order(num_samples, 3, epoch), copies)
    for rank in range(world_size):
        keys = train_batches(
            num_samples, 3, epoch, batch_size=per_rank, rank=rank, world_size=world_size, repeats=copies
        )
        assert keys.shape == (steps, per_rank)
        assert sample_numbers(keys).ravel().tolist() == dealt[rank::world_size][: keys.size].tolist()
        places = rank + world_size * np.arange(keys.size)
        assert copy_numbers(keys).ravel().tolist() == (places % copies).tolist()


@settings(max_examples=60)
@given(
    num_samples=st.integers(48, 200), images=st.integers(1, 4), world_size=st.integers(1, 4), copies=st.integers(2, 3)
)
def test_crops_of_one_decoded_image_stay_together(num_samples: int, images: int, world_size: int, copies: int) -> None:
    seen = []
    for rank in range(world_size):
        keys = train_batches(
            num_samples, 3, 1, batch_size=images * copies, rank=rank, world_size=world_size, decode_once=copies
        ).reshape(-1, images, copies)
        assert (copy_numbers(keys) == np.arange(copies)).all()
        samples = sample_numbers(keys)
        assert (samples == samples[..., :1]).all()
        seen.extend(samples[..., 0].ravel().tolist())
    assert len(seen) == len(set(seen)) == num_samples // (images * copies * world_size) * images * world_size


@given(st.lists(st.tuples(st.integers(0, 1 << 40), st.integers(0, 255)), min_size=2, max_size=30), st.randoms())
def test_a_hash_is_the_sum_of_its_parts(pairs: list[tuple[int, int]], chance: Random) -> None:
    index, copy = np.array(pairs, dtype=np.int64).T
    keys = draw_keys(index, copy)
    assert np.array_equal(sample_numbers(keys), index)
    assert np.array_equal(copy_numbers(keys), copy)
    cut = chance.randrange(len(keys))
    parts = keys_hash(keys[cut:]) + keys_hash(keys[:cut])
    assert keys_hash(keys) == parts % (1 << 32) == keys_hash(keys[::-1].copy())
    assert keys_hash(keys) != keys_hash(np.append(keys[1:], keys[0] + 1))
    assert keys_hash(index) == keys_hash(draw_keys(index, np.zeros_like(index)))


@settings(max_examples=60)
@given(
    part=st.integers(1, 4),
    parts=st.integers(1, 4),
    world_size=st.integers(1, 3),
    copies=st.sampled_from([(1, 1), (2, 1), (3, 1), (1, 2), (1, 3)]),
    epoch=st.integers(0, 1000),
)
def test_the_parts_of_a_batch_are_batches_of_as_many_ranks(
    part: int, parts: int, world_size: int, copies: tuple[int, int], epoch: int
) -> None:
    repeats, decode_once = copies
    options = {"repeats": repeats, "decode_once": decode_once}
    size = part * decode_once
    for rank in range(world_size):
        place = {"rank": rank, "world_size": world_size}
        whole = train_batches(150, 5, epoch, batch_size=size * parts, parts=parts, **place, **options)
        theirs = [
            train_batches(150, 5, epoch, batch_size=size, rank=other, world_size=world_size * parts, **options)
            for other in range(rank * parts, (rank + 1) * parts)
        ]
        assert np.array_equal(whole, np.concatenate(theirs, axis=1))
