"""Counter-based random numbers: published values, agreement of the two twins, uniformity."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import crng

natural = st.integers(0, (1 << 63) - 1)


def test_mix_is_splitmix64() -> None:
    """The first outputs of splitmix64 seeded with 0: its state is a multiple of the golden constant."""
    golden = 0x9E3779B97F4A7C15
    states = [(n * golden) % (1 << 64) for n in range(3)]
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert crng.mix(np.array(states, dtype=np.uint64)).tolist() == expected


def test_values_never_change() -> None:
    """Resumed runs rely on these; a change needs a new ORDER_VERSION. From an evaluation in plain integers."""
    keys = crng.key(1, 2, np.array([0, 3, 1 << 40]), crng.CROP)
    assert [hex(k) for k in keys] == ["0x75693551cf81461c", "0x12588d809dce88a7", "0x592dfd724fcf4a3a"]
    assert crng.u01(keys, 5).tolist() == [0.34513347349832457, 0.39341937623895207, 0.39047747569008284]


@settings(max_examples=50)
@given(seed=natural, epoch=natural, index=st.lists(natural, min_size=1, max_size=8), n=st.integers(0, 100))
def test_torch_twin_agrees(seed: int, epoch: int, index: list[int], n: int) -> None:
    keys = crng.key(seed, epoch, np.array(index), crng.FLIP)
    twin = crng.key_torch(seed, epoch, torch.tensor(index), crng.FLIP)
    assert np.array_equal(twin.numpy().view(np.uint64), keys)
    assert np.array_equal(crng.u01_torch(twin, n).numpy(), crng.u01(keys, n))


def test_several_draws_at_once_are_those_of_one_at_a_time() -> None:
    keys = crng.key(7, 8, np.arange(100), crng.FLIP)
    before = keys.copy()
    numbers = np.array([[3, 0], [70, 1]])
    draws = crng.u01(keys, numbers[:, :, None])
    assert draws.shape == (2, 2, 100)
    for place, number in np.ndenumerate(numbers):
        assert np.array_equal(draws[place], crng.u01(keys, int(number)))
    assert np.array_equal(keys, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_torch_twin_agrees_on_the_gpu() -> None:
    index = torch.arange(10_000)
    keys = crng.key_torch(7, 8, index.cuda(), crng.FLIP)
    assert torch.equal(crng.u01_torch(keys, 3).cpu(), crng.u01_torch(crng.key_torch(7, 8, index, crng.FLIP), 3))


def test_draws_are_uniform_and_unrelated() -> None:
    """Over 100,000 samples: mean, variance and correlations within five standard errors."""
    index = np.arange(100_000)
    streams = {
        "draw 0": crng.u01(crng.key(0, 0, index, 0), 0),
        "draw 1": crng.u01(crng.key(0, 0, index, 0), 1),
        "stream 1": crng.u01(crng.key(0, 0, index, 1), 0),
        "epoch 1": crng.u01(crng.key(0, 1, index, 0), 0),
        "seed 1": crng.u01(crng.key(1, 0, index, 0), 0),
        "next sample": crng.u01(crng.key(0, 0, index + 1, 0), 0),
    }
    for draws in streams.values():
        assert draws.min() >= 0
        assert draws.max() < 1
        assert abs(draws.mean() - 1 / 2) < 5 * (1 / 12 / len(index)) ** 0.5
        assert abs(draws.var() - 1 / 12) < 5 * (1 / 180 / len(index)) ** 0.5
    correlation = np.corrcoef(list(streams.values())) - np.eye(len(streams))
    assert abs(correlation).max() < 5 / len(index) ** 0.5
