"""Token counts, the choice of patches, and the gather."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pss.models import sampling
from pss.models.sampling import gather, num_kept_tokens, select, spread, step_generator


@pytest.mark.parametrize(("num_patches", "counts"), [(196, (39, 79, 118, 158, 197)), (576, (115, 231, 346, 462, 577))])
def test_published_token_counts(num_patches: int, counts: tuple[int, ...]) -> None:
    assert tuple(num_kept_tokens(rho, num_patches, 1) for rho in (0.2, 0.4, 0.6, 0.8, 1.0)) == counts


@given(
    decimals=st.integers(0, 4),
    numerator=st.integers(1, 10_000),
    num_patches=st.integers(1, 5000),
    num_prefix=st.integers(0, 5),
)
def test_count_rounds_the_decimal_share_half_to_even(
    decimals: int, numerator: int, num_patches: int, num_prefix: int
) -> None:
    share = Fraction(min(numerator, 10**decimals), 10**decimals)
    expected = max(num_prefix + 1, round(share * (num_patches + num_prefix)))
    assert num_kept_tokens(float(share), num_patches, num_prefix) == expected


@pytest.mark.parametrize(("num_patches", "counts"), [(196, (40, 80, 120, 160, 197)), (576, (112, 232, 344, 464, 577))])
def test_aligned_token_counts(num_patches: int, counts: tuple[int, ...]) -> None:
    assert tuple(num_kept_tokens(rho, num_patches, 1, "aligned") for rho in (0.2, 0.4, 0.6, 0.8, 1.0)) == counts


@given(rho=st.floats(0.001, 1), num_patches=st.integers(1, 5000), num_prefix=st.integers(0, 9))
def test_aligned_counts_are_near_multiples_of_8_or_everything(rho: float, num_patches: int, num_prefix: int) -> None:
    count = num_kept_tokens(rho, num_patches, num_prefix, "aligned")
    assert num_prefix < count <= num_patches + num_prefix
    assert count % 8 == 0 or count == num_patches + num_prefix
    published = num_kept_tokens(rho, num_patches, num_prefix)
    assert abs(count - published) <= 4 or count in (8, 16, num_patches + num_prefix)


def test_count_is_not_decided_by_float_noise() -> None:
    assert 0.7 * 45 < 31.5
    assert num_kept_tokens(0.7, 44, 1) == 32
    assert num_kept_tokens(0.5, 196, 1) == 98


@pytest.mark.parametrize("rho", [0.0, -0.2, 1.0001])
def test_share_outside_its_range_is_refused(rho: float) -> None:
    with pytest.raises(ValueError, match=str(rho)):
        num_kept_tokens(rho, 196, 1)


def tokens_of_norms(norms: list[list[int]], num_prefix: int, width: int = 4) -> torch.Tensor:
    """Tokens (B, N, D) whose patches have these L1 norms, spread over channels of both signs; large prefix tokens."""
    values = torch.tensor(norms, dtype=torch.float32)
    signs = torch.tensor([1.0, -1.0] * (width // 2))
    patches = values.unsqueeze(-1) * signs / width
    return torch.cat((torch.full((len(norms), num_prefix, width), 1e6), patches), dim=1)


@given(data=st.data(), num_prefix=st.integers(0, 3))
@settings(max_examples=50)
def test_magnitude_keeps_the_largest_norms_and_breaks_ties_by_index(data: st.DataObject, num_prefix: int) -> None:
    num_patches = data.draw(st.integers(1, 12))
    norms = data.draw(st.lists(st.lists(st.integers(0, 3), min_size=num_patches, max_size=num_patches), min_size=1))
    num_kept = data.draw(st.integers(1, num_patches))
    kept = select(tokens_of_norms(norms, num_prefix), num_kept + num_prefix, num_prefix, "magnitude")
    expected = [sorted(sorted(range(num_patches), key=lambda i: (-row[i], i))[:num_kept]) for row in norms]
    assert kept.dtype == torch.int64
    assert kept.tolist() == expected


def test_magnitude_is_the_l1_norm_not_the_l2_norm() -> None:
    flat, peaked = torch.full((4,), 1.0), torch.tensor([3.0, 0.0, 0.0, 0.0])  # L1: 4 > 3, L2: 2 < 3
    tokens = torch.stack((peaked, flat)).unsqueeze(0)
    assert select(tokens, 1, 0, "magnitude").tolist() == [[1]]


def test_half_precision_tokens_are_ranked_in_single_precision() -> None:
    """The norms 1024 and 1024.5 are the same number in bfloat16."""
    tokens = torch.full((1, 2, 2048), 0.5, dtype=torch.bfloat16)
    tokens[0, 1, 0] = 1.0
    assert tokens.abs().sum(-1)[0, 0] == tokens.abs().sum(-1)[0, 1]
    assert select(tokens, 1, 0, "magnitude").tolist() == [[1]]


def test_random_keeps_every_patch_equally_often() -> None:
    tokens = torch.zeros(4000, 11, 2)
    kept = select(tokens, 4 + 1, 1, "random", torch.Generator().manual_seed(0))
    assert (kept.diff(dim=1) > 0).all()
    assert kept.unique(dim=0).shape[0] == 210  # all subsets of 4 out of 10: each image draws its own
    shares = torch.bincount(kept.flatten(), minlength=10) / 4000
    assert shares == pytest.approx(torch.full((10,), 0.4), abs=0.04)


def test_generator_depends_on_seed_step_and_rank_alone() -> None:
    def draw(seed: int, step: int, rank: int) -> tuple[int, ...]:
        tokens = torch.zeros(2, 50, 1)
        return tuple(select(tokens, 20, 0, "random", step_generator(seed, step, rank)).flatten().tolist())

    torch.manual_seed(1)
    first = draw(0, 5, 3)
    torch.manual_seed(2)
    assert draw(0, 5, 3) == first
    triples = [(0, 5, 3), (0, 3, 5), (5, 0, 3), (0, 53, 0), (0, 5, 4), (1, 5, 3)]
    assert len({draw(*triple) for triple in triples}) == len(triples)


@pytest.mark.parametrize("num_prefix", [0, 1, 5])
def test_gather_is_the_prefix_and_the_named_patches(num_prefix: int) -> None:
    tokens = torch.randn(3, num_prefix + 6, 4, dtype=torch.float64, requires_grad=True)
    kept = torch.tensor([[0, 2], [1, 5], [3, 4]])
    dense = gather(tokens, kept, num_prefix)
    for image, row in enumerate(kept.tolist()):
        positions = [*range(num_prefix), *(num_prefix + patch for patch in row)]
        assert torch.equal(dense[image], tokens[image, positions])

    weights = torch.randn_like(dense)
    (dense * weights).sum().backward()
    assert tokens.grad is not None
    for image, row in enumerate(kept.tolist()):
        positions = [*range(num_prefix), *(num_prefix + patch for patch in row)]
        dropped = sorted(set(range(num_prefix + 6)) - set(positions))
        assert torch.equal(tokens.grad[image, positions], weights[image])
        assert not tokens.grad[image, dropped].any()


@pytest.mark.parametrize("sort", ["magnitude", "random"])
def test_choice_has_no_gradient(sort: str) -> None:
    tokens = torch.randn(2, 6, 4, requires_grad=True)
    assert not select(tokens, 3, 1, sort).requires_grad  # type: ignore[arg-type]


def test_impossible_choices_are_refused() -> None:
    tokens = torch.zeros(1, 5, 2)
    with pytest.raises(ValueError, match="'largest'"):
        select(tokens, 3, 1, "largest")  # type: ignore[arg-type]
    for num_kept in (1, 6):
        with pytest.raises(ValueError, match="of 4 patches"):
            select(tokens, num_kept, 1, "magnitude")


@given(st.data())
def test_a_coarse_grid_is_spread_evenly(data: st.DataObject) -> None:
    fine = data.draw(st.tuples(st.integers(1, 30), st.integers(1, 30)))
    coarse = data.draw(st.tuples(*(st.integers(1, side) for side in fine)))
    places = spread(coarse, fine)
    rows, columns = (places // fine[1]).reshape(coarse), (places % fine[1]).reshape(coarse)
    for lines, side in ((rows[:, 0], fine[0]), (columns[0], fine[1])):
        steps = lines.diff()
        assert bool((steps >= 1).all())
        assert not len(steps) or int(steps.max() - steps.min()) <= 1
        exact = torch.arange(len(lines)) * (side - 1) / max(1, len(lines) - 1)
        assert len(lines) == 1 or bool(((lines - exact).abs() <= 0.5 + 1e-4).all())
        assert (int(lines[0]), int(lines[-1])) == ((0, side - 1) if len(lines) > 1 else (side // 2, side // 2))
    assert torch.equal(places, (rows[:, :1] * fine[1] + columns[:1]).flatten())
    assert spread(fine, fine).tolist() == list(range(fine[0] * fine[1])) or 1 in fine


@given(st.data())
def test_the_choice_is_that_of_a_stable_sort(data: st.DataObject) -> None:
    few = [0.0, 1e-45, 1e-38, 1.0, 1.0000001, 3.5, 3e38, float("inf"), float("nan")]  # ties are likely
    rows, columns = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 20))
    flat = data.draw(st.lists(st.sampled_from(few), min_size=rows * columns, max_size=rows * columns))
    scores, count = torch.tensor(flat).view(rows, columns), data.draw(st.integers(1, columns))
    ours, sorts = (sampling.highest(scores, count, never_negative=fast) for fast in (True, False))
    assert torch.equal(ours, sorts)
