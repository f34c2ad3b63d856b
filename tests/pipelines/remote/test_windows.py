"""The windowed order: each sample at most once, the same for every number of ranks, and few tars at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import pipelines
from pipelines.base import DataConfig, DataError
from pipelines.loaders.order import copy_numbers, draw_keys, sample_numbers
from pipelines.remote.uses import Uses
from pipelines.remote.windows import Windows, deal

DIVISORS = {4: (1, 2, 4), 6: (1, 2, 3, 6), 8: (1, 2, 4, 8)}


@st.composite
def orders(draw, decode_once=st.just(1)):
    groups = draw(st.sampled_from([4, 6, 8]))
    counts = np.array(draw(st.lists(st.integers(1, 30), min_size=groups, max_size=40)), dtype=np.int64)
    crops, smallest = draw(decode_once), min(int(counts[hand].sum()) for hand in deal(counts, groups))
    assume(smallest >= crops)
    share = draw(st.integers(1, min(4, smallest // crops)))
    return Windows(
        counts,
        seed=draw(st.integers(0, (1 << 63) - 1)),
        groups=groups,
        window=draw(st.integers(1, 7)),
        batch_size=groups * share * crops,
        decode_once=crops,
    )


def keys_of(order, epoch, groups):
    """(steps, images of these groups)."""
    samples, crops = order.samples(epoch, groups)
    found = samples.astype(np.int64) if crops is None else draw_keys(samples.astype(np.int64), crops.astype(np.int64))
    return found.reshape(order.steps_per_epoch, -1)


def whole(order, epoch, ranks=1):
    """The global batches as so many ranks have them together, (steps, batch)."""
    return np.concatenate([keys_of(order, epoch, order.groups_of(rank, ranks)) for rank in range(ranks)], axis=1)


def tars_of(order, samples):
    return np.searchsorted(np.cumsum(order.counts), samples, side="right")


def test_the_order_never_changes():
    """Resumed runs would see other data; `ORDER_VERSION` would have to rise."""
    order = Windows(np.array([3, 3, 3, 2]), seed=1, groups=2, window=1, batch_size=2)
    assert [hand.tolist() for hand in order.group_tars] == [[0, 2], [1, 3]]
    assert whole(order, 2).tolist() == [[2, 5], [1, 4], [0, 3], [7, 9], [6, 10]]


@settings(max_examples=60)
@given(orders(), st.integers(0, 1000))
def test_every_sample_at_most_once_and_as_many_as_are_said(order, epoch):
    keys = whole(order, epoch)
    assert keys.shape == (order.steps_per_epoch, order.batch_size)
    assert len(np.unique(keys)) == keys.size == order.counts.sum() - order.left_out
    assert (keys >= 0).all()
    assert (keys < order.counts.sum()).all()
    smallest = min(order.counts[hand].sum() for hand in order.group_tars)
    assert order.left_out < order.counts.sum() - order.num_groups * smallest + order.batch_size


@settings(max_examples=60)
@given(orders(st.sampled_from([1, 2, 3])), st.integers(0, 3))
def test_any_number_of_ranks_that_divides_the_groups_has_the_same_batches(order, epoch):
    alone = whole(order, epoch)
    for ranks in DIVISORS[order.num_groups]:
        assert np.array_equal(whole(order, epoch, ranks), alone)


@settings(max_examples=60)
@given(orders(st.sampled_from([1, 2])), st.integers(0, 3), st.data())
def test_a_rank_needs_the_tars_of_its_groups_when_it_says_so(order, epoch, data):
    ranks = data.draw(st.sampled_from(DIVISORS[order.num_groups]))
    for rank in range(ranks):
        groups = order.groups_of(rank, ranks)
        uses, own = order.uses(epoch, groups), np.concatenate([order.group_tars[group] for group in groups])
        tars = tars_of(order, sample_numbers(keys_of(order, epoch, groups)))
        assert set(tars.ravel().tolist()) <= set(own.tolist())
        for tar in np.unique(tars):
            steps = np.flatnonzero((tars == tar).any(axis=1))
            assert uses.first[tar] <= steps[0]
            assert steps[-1] <= uses.last[tar]
        for step in range(order.steps_per_epoch):
            present = (uses.first <= step) & (step <= uses.last)
            assert set(tars[step].tolist()) <= set(np.flatnonzero(present).tolist())
            if order.counts.min() >= order.per_step:  # a batch takes of two windows at most
                for group in groups:
                    assert present[order.group_tars[group]].sum() <= 2 * order.window


def test_a_window_is_read_whole_before_the_next():
    order = Windows(np.full(24, 8), seed=5, groups=4, window=3, batch_size=16)
    for group in range(4):
        tars = tars_of(order, order.samples(1, range(group, group + 1))[0])
        seen = [set(tars[begin : begin + 24].tolist()) for begin in (0, 24)]
        assert [len(one) for one in seen] == [3, 3]
        assert seen[0] | seen[1] == set(order.group_tars[group].tolist())
        assert len(np.unique(tars[:6])) > 1, "the samples of a window are permuted"


@given(orders(), st.integers(0, 5))
@settings(max_examples=30)
def test_another_epoch_seed_or_window_is_another_order(order, epoch):
    def anew(**changed):
        about = {"seed": order.seed, "groups": order.num_groups, "window": order.window, "batch_size": order.batch_size}
        return Windows(order.counts, **about | changed)

    assert np.array_equal(whole(anew(), epoch), whole(order, epoch)), "nothing but these decides"
    assume(order.counts.sum() >= 60)
    assert not np.array_equal(whole(order, epoch + 1), whole(order, epoch))
    assert not np.array_equal(whole(anew(seed=order.seed ^ 1), epoch), whole(order, epoch))


def test_crops_of_an_image_stay_together():
    order = Windows(np.full(8, 10), seed=1, groups=4, window=2, batch_size=24, decode_once=3)
    keys = whole(order, 0)
    assert keys.shape == (3, 24)
    assert np.array_equal(copy_numbers(keys), np.tile([0, 1, 2], (3, 8)))
    rows = sample_numbers(keys).reshape(3, 8, 3)
    assert (rows == rows[..., :1]).all()
    assert len(np.unique(rows)) == 24, "an epoch has as many steps, and shows a third of the samples"


def test_equal_tars_are_dealt_in_turn_and_others_evenly():
    assert [hand.tolist() for hand in deal(np.full(7, 5), 3)] == [[0, 3, 6], [1, 4], [2, 5]]
    sizes = [int(np.array([9, 1, 1, 5, 4, 4])[hand].sum()) for hand in deal(np.array([9, 1, 1, 5, 4, 4]), 3)]
    assert sorted(sizes) == [7, 8, 9]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"groups": 5}, r"data.groups is 5, which does not divide .* of 16 .*set data.groups=4"),
        ({"groups": 16}, r"has 12 tars for 16 groups; set data.groups to 8, or convert again with a smaller --shard"),
        ({"decode_once": 3}, r"data.decode_once is 3 and each of 4 groups \(data.groups\) gives 4 images"),
        ({"batch_size": 400}, r"smallest of 4 groups \(data.groups\) has 30 samples, .* lower train.batch_size"),
    ],
)
def test_what_cannot_be_is_one_sentence(changed, message):
    with pytest.raises(ValueError, match=message):
        Windows(np.full(12, 10), **{"seed": 0, "groups": 4, "window": 2, "batch_size": 16} | changed)


@settings(max_examples=60)
@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=12), world=st.integers(1, 4), batch=st.integers(1, 5))
def test_when_evaluation_reads_tars(counts, world, batch):
    total = sum(counts)
    for rank in range(world):
        uses = Uses.in_turn(np.array(counts), rank, world, batch)
        own = np.searchsorted(np.cumsum(counts), np.arange(rank, total, world), side="right")
        for tar in range(len(counts)):
            steps = np.flatnonzero(own == tar) // batch
            expected = (steps[0], steps[-1]) if len(steps) else (-1, -1)
            assert (uses.first[tar], uses.last[tar]) == expected


# In the loaders.


SETTINGS = {"batch_size": 8, "train": True, "seed": 3, "num_workers": 0}


def built(root, loader="torch", rank=0, world_size=1, **changed):
    config = DataConfig(**{"img_size": 32, "window": 2, "groups": 2} | changed)
    options = SETTINGS | {"batch_size": 8 // world_size, "rank": rank, "world_size": world_size}
    return pipelines.build(root, "train", config=config, loader=loader, **options)


def test_a_loader_delivers_it_and_resumes(tarred):
    loader = built(tarred)
    batches = list(loader)
    order = Windows(loader.table.tar_counts(), seed=3, groups=2, window=2, batch_size=8)
    assert np.array_equal(np.stack([batch.index.numpy() for batch in batches]), whole(order, 0))
    loader.set_epoch(0, 2)
    later = list(loader)
    assert all((a.images == b.images).all() for a, b in zip(later, batches[2:], strict=True))
    assert loader.delivered_hash == loader.planned_hash(0)


def test_two_ranks_have_the_batches_of_one(tarred):
    alone = [batch.images for batch in built(tarred)]
    halves = [[batch.images for batch in built(tarred, rank=rank, world_size=2)] for rank in range(2)]
    for batch, parts in zip(alone, zip(*halves, strict=True), strict=True):
        assert (np.concatenate([part.numpy() for part in parts]) == batch.numpy()).all()


def test_parts_of_a_batch_are_those_of_as_many_ranks(tarred):
    loader = built(tarred)
    loader.set_parts(2)
    ranks = [list(built(tarred, rank=rank, world_size=2)) for rank in range(2)]
    for batch, *parts in zip(loader, *ranks, strict=True):
        for own, part in zip(batch.index.chunk(2), parts, strict=True):
            assert (own == part.index).all()
    with pytest.raises(ValueError, match=r"data.groups is 2, which 4 parts of a batch.*train.accumulate"):
        loader.set_parts(4)


@pytest.mark.parametrize("loader", ["dali", "ffcv"])
def test_every_loader_has_the_same_order(tarred, loader):
    pytest.importorskip("nvidia.dali" if loader == "dali" else "ffcv")
    found, expected = ([batch.index.tolist() for batch in built(tarred, name)] for name in (loader, "torch"))
    assert found == expected


def test_a_run_does_not_go_on_in_another_order(tarred):
    state = built(tarred).state_dict()
    built(tarred).load_state_dict(state)
    for other in ({"window": 1}, {"groups": 1}, {"window": None, "groups": 64}):
        with pytest.raises(DataError, match=r"config.(window|groups) was"):
            built(tarred, **other).load_state_dict(state)


def test_runs_of_the_usual_order_know_nothing_of_it(tarred):
    loader = built(tarred, window=None, groups=64)
    assert "window" not in loader.state_dict()["config"]
    assert "groups" not in loader.state_dict()["config"]


def test_a_plain_folder_has_no_tars(image_root):
    with pytest.raises(DataError, match=r"data.window deals out the tars of a converted set; convert yours first"):
        built(image_root)


def test_a_set_for_ffcv_alone_has_no_tars(tmp_path, image_root):
    pytest.importorskip("ffcv")
    from conftest import convert_folder

    convert_folder(image_root, tmp_path / "set", "ffcv")
    with pytest.raises(DataError, match=r"train split of .* has no tars, which data.window deals out; leave that out"):
        built(tmp_path / "set", "ffcv")


def test_processes_that_do_not_share_the_groups_evenly(tarred):
    with pytest.raises(ValueError, match=r"data.groups is 2, which 4 processes cannot share evenly; .*data.groups=4"):
        built(tarred, rank=0, world_size=4)


def test_how_many_samples_an_epoch_has_batches_for(tarred):
    dataset, config = pipelines.open_dataset(tarred), DataConfig(window=1, groups=2)
    assert dataset.epoch_samples(DataConfig(), 8) == 53
    assert dataset.epoch_samples(config, 8) == 8 * built(tarred, window=1).steps_per_epoch
