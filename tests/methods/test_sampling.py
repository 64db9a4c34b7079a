"""Which samples are drawn, and how many."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optim.methods import sampling
from optim.methods.sampling import draw, next_share, share_of, size_of


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@given(
    count=st.integers(2, 200), part=st.floats(0.01, 0.99), spread=st.floats(0, 20), seed=st.integers(0, 99)
)
def test_a_draw_is_of_different_samples_and_weights_are_fair(count, part, spread, seed):
    size = min(count - 1, max(1, math.ceil(part * count)))
    curvatures = (spread * torch.randn(count, generator=generator(seed))).exp()
    rows, weights = draw(curvatures, size, generator(seed))
    assert len(rows) == size == len(set(rows.tolist()))
    assert torch.equal(rows, rows.sort()[0])
    # A sample stands for itself, and for others where it is not certain to be drawn.
    assert bool((weights >= 1).all())
    assert bool((weights <= count / (size * (1 - sampling.BY_CURVATURE)) * (1 + 1e-9)).all())


def test_sums_are_estimated_without_bias_and_better_than_by_even_draws():
    count, size, draws = 60, 12, 4000
    curvatures = torch.randn(count, generator=generator()).mul(2).exp().double()
    numbers = curvatures * (1 + 0.3 * torch.randn(count, generator=generator(1), dtype=torch.float64))

    def spread_of(given):
        sums = []
        for seed in range(draws):
            rows, weights = draw(given, size, generator(seed))
            sums.append((weights * numbers[rows]).sum())
        sums = torch.stack(sums)
        error = sums.std() / math.sqrt(draws)
        assert abs(sums.mean() - numbers.sum()) < 4 * error
        return sums.std()

    assert spread_of(curvatures) < 0.3 * spread_of(torch.ones(count))


def test_every_sample_is_drawn_as_often_as_its_weight_says():
    curvatures = torch.tensor([0.0, 1.0, 1.0, 2.0, 100.0])
    counts, sums, draws = torch.zeros(5), torch.zeros(5, dtype=torch.float64), 4000
    for seed in range(draws):
        rows, weights = draw(curvatures, 3, generator(seed))
        counts[rows] += 1
        sums[rows] += weights
    assert counts[4] == draws  # alone it has all the curvature
    torch.testing.assert_close(sums / draws, torch.ones(5, dtype=torch.float64), rtol=0.1, atol=0.0)


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, -1.0])
def test_without_curvature_draws_are_even(bad):
    _, weights = draw(torch.full((40,), bad), 10, generator())
    torch.testing.assert_close(weights, torch.full((10,), 4.0, dtype=torch.float64))


def test_a_draw_is_that_of_its_seed():
    curvatures = torch.rand(50, generator=generator())
    state = torch.get_rng_state()
    first, second, other = (draw(curvatures, 10, generator(seed)).rows for seed in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_share_starts_small_and_doubles_where_the_model_was_wrong():
    assert share_of(None, 255) == 1.0
    assert share_of(None, 256) == 0.25
    assert share_of(None, 16000) == 1 / 16
    assert share_of(0.5, 16000) == 0.5
    assert share_of(0.5, 100) == 1.0
    assert next_share(0.1, 0.26) == 0.1
    assert next_share(0.1, 0.25) == 0.2
    assert next_share(0.1, -math.inf) == 0.2
    assert next_share(0.1, math.nan) == 0.1
    assert next_share(0.7, 0.0) == 1.0
    assert [size_of(share, 10) for share in (1e-9, 0.25, 0.3, 1.0)] == [1, 3, 3, 10]
