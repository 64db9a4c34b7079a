"""Several starts: the best of all, and what else there is."""

import pytest
import torch

import optim

DOUBLE = torch.float64


def two_wells(x, tilt=0.1):
    """Minima near -1 and 1 in the first variable, the left one deeper."""
    return (x[0] ** 2 - 1) ** 2 + tilt * x[0] + (x[1] - 2) ** 2


def starts(count=12):
    generator = torch.Generator().manual_seed(0)
    return 4 * torch.rand(count, 2, generator=generator, dtype=DOUBLE) - 2


def test_the_deepest_minimum_is_returned_and_all_are_listed():
    result = optim.minimize(two_wells, starts(), multistart=True)
    assert result.success
    assert float(result.x[0]) < 0
    left, right = result.minima
    assert left.fun < right.fun
    assert left.starts + right.starts == 12
    torch.testing.assert_close(left.x, result.x)
    alone = optim.minimize(two_wells, torch.tensor([1.0, 2.0], dtype=DOUBLE))
    torch.testing.assert_close(right.x, alone.x, rtol=1e-6, atol=1e-8)
    assert result.starts == {"converged": 12}


def test_functions_that_branch_are_solved_one_by_one():
    def fun(x, tilt):
        return two_wells(x, tilt) if float(x[0].detach()) < 5 else x.square().sum()

    result = optim.minimize(fun, starts(), (0.1,), multistart=True)
    other = optim.minimize(two_wells, starts(), multistart=True)
    torch.testing.assert_close(result.x, other.x)
    assert [m.starts for m in result.minima] == [m.starts for m in other.minima]


def test_bounds_hold_for_every_start():
    result = optim.minimize(two_wells, starts(), multistart=True, bounds=[(0.0, None), (None, 1.5)])
    assert float(result.x[0]) > 0
    assert float(result.x[1]) == 1.5
    assert all(float(minimum.x[0]) >= 0 for minimum in result.minima)


def test_least_squares_of_a_sine():
    t = torch.linspace(0, 10, 50, dtype=DOUBLE)
    y = torch.sin(1.7 * t)
    x0 = torch.linspace(0.5, 3, 11, dtype=DOUBLE).unsqueeze(1)
    result = optim.least_squares(lambda p: torch.sin(p[0] * t) - y, x0, multistart=True)
    assert result.success
    assert abs(float(result.x)) == pytest.approx(1.7)
    assert result.cost == pytest.approx(0.0, abs=1e-20)
    assert len(result.minima) > 2
    assert result.minima[1].fun > 1


def test_starts_that_fail_lose_nothing():
    x0 = torch.tensor([[-1.0], [2.0], [0.5]], dtype=DOUBLE)
    result = optim.minimize(lambda x: (x - x.log()).sum(), x0, multistart=True)
    assert float(result.x) == pytest.approx(1.0)
    assert result.starts == {"converged": 2}


def test_what_starts_are_not():
    with pytest.raises(TypeError, match="a start in each row, got list"):
        optim.minimize(two_wells, [[1.0, 2.0]], multistart=True)
    with pytest.raises(ValueError, match=r"starts in its first dimension, got shape \(2,\)"):
        optim.minimize(two_wells, torch.ones(2), multistart=True)
    with pytest.raises(RuntimeError, match="no start led to a finite value"):
        optim.minimize(lambda x: x.sum() * torch.nan, torch.ones(2, 2), multistart=True)


def test_the_best_one_is_differentiable():
    c = torch.tensor([1.0, 2.0], dtype=DOUBLE, requires_grad=True)
    result = optim.minimize(
        lambda x, c: (x - c).square().sum(), starts(), (c,), multistart=True, implicit=True
    )
    (g,) = torch.autograd.grad(result.x.sum(), c)
    torch.testing.assert_close(g, torch.ones(2, dtype=DOUBLE))
    assert not result.minima[0].x.requires_grad
