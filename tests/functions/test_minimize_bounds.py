"""Minima in a box: published problems, SciPy's solutions, and the conditions of a minimum."""

import math

import numpy as np
import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize

import optim

DOUBLE = torch.float64
INF = math.inf


@pytest.mark.parametrize("method", ["newton", "cubic", "newton-cg", "trust-krylov"])
@pytest.mark.parametrize("problem", zoo.BOXES, ids=lambda box: box.name)
def test_the_published_solution_is_found(problem, method):
    x0 = torch.tensor(problem.start, dtype=DOUBLE)
    result = optim.minimize(problem.func, x0, method=method, bounds=list(problem.bounds))
    assert result.success or result.status == "noise_floor", result
    assert result.fun == pytest.approx(problem.minimum, rel=1e-8, abs=1e-8)
    expected = torch.tensor(problem.minimizer, dtype=DOUBLE)
    torch.testing.assert_close(result.x, expected, rtol=1e-5, atol=1e-5)
    check_conditions(result, problem.bounds)


def check_conditions(result, bounds, tolerance=1e-6):
    """Inside, exactly at a bound where that is active, and pushed outwards there."""
    lower = torch.tensor([-INF if low is None else low for low, _ in bounds], dtype=DOUBLE)
    upper = torch.tensor([INF if high is None else high for _, high in bounds], dtype=DOUBLE)
    assert bool(((result.x >= lower) & (result.x <= upper)).all())
    mask, g = result.active_mask, result.jac
    assert torch.equal(result.x[mask < 0], lower[mask < 0])
    assert torch.equal(result.x[mask > 0], upper[mask > 0])
    assert bool((g * mask <= tolerance).all())
    free = g[mask == 0].abs()
    assert not len(free) or float(free.max()) <= tolerance


@given(n=st.integers(1, 8), seed=st.integers(0, 999))
def test_convex_quadratics_are_scipys(n, seed):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(n, n, generator=generator, dtype=DOUBLE)
    A = A @ A.T + 0.1 * torch.eye(n, dtype=DOUBLE)
    b = 3 * torch.randn(n, generator=generator, dtype=DOUBLE)
    lower = -torch.rand(n, generator=generator, dtype=DOUBLE)
    upper = torch.rand(n, generator=generator, dtype=DOUBLE)
    L = torch.linalg.cholesky(A)
    theirs = optimize.lsq_linear(
        L.T.numpy(),
        torch.linalg.solve(L, b).numpy(),
        (lower.numpy(), upper.numpy()),
        method="bvls",
        tol=1e-15,
    )
    result = optim.minimize(
        lambda x: 0.5 * x @ A @ x - b @ x, torch.zeros(n, dtype=DOUBLE), bounds=(lower, upper)
    )
    assert result.success, result
    torch.testing.assert_close(result.x, torch.tensor(theirs.x), rtol=1e-8, atol=1e-8)
    check_conditions(result, list(zip(lower.tolist(), upper.tolist(), strict=True)), 1e-7)


def test_many_unknowns_by_products():
    n = 500
    target = torch.linspace(-2, 2, n, dtype=DOUBLE)

    def fun(x):
        return (x - target).square().sum() + 0.5 * (x[1:] - x[:-1]).square().sum() + 0.1 * x.pow(4).sum()

    result = optim.minimize(fun, torch.zeros(n, dtype=DOUBLE), bounds=(-1.0, 0.5))
    assert result.success, result
    assert int((result.active_mask != 0).sum()) > 100

    def both(x):
        value = torch.tensor(x, requires_grad=True)
        loss = fun(value)
        return loss.item(), torch.autograd.grad(loss, value)[0].numpy()

    tight = dict(maxiter=5000, maxfun=50000, ftol=1e-16, gtol=1e-10)
    theirs = optimize.minimize(
        both, np.zeros(n), jac=True, bounds=[(-1.0, 0.5)] * n, method="L-BFGS-B", options=tight
    )
    torch.testing.assert_close(result.x, torch.tensor(theirs.x), rtol=1e-6, atol=1e-6)
    assert result.fun <= theirs.fun + 1e-10


def test_a_start_outside_is_projected():
    seen = []

    def fun(x):
        seen.append(x.detach().clone())
        return (x - 5).square().sum()

    result = optim.minimize(fun, torch.tensor([-3.0, 0.5], dtype=DOUBLE), bounds=(0.0, 1.0))
    assert seen[0].tolist() == [0.0, 0.5]
    assert all(bool(((x >= 0) & (x <= 1)).all()) for x in seen)
    assert result.x.tolist() == [1.0, 1.0]
    assert result.active_mask.tolist() == [1, 1]
    assert result.success


def test_a_saddle_on_a_face_is_left():
    """Along the face the gradient is zero, and the curvature negative."""

    def fun(x):
        return x[0] + (x[1] ** 2 - 1) ** 2

    result = optim.minimize(fun, torch.zeros(2, dtype=DOUBLE), bounds=[(0.0, None), (-3.0, 3.0)])
    assert result.success
    assert result.x.abs().tolist() == pytest.approx([0.0, 1.0], abs=1e-8)
    assert result.active_mask.tolist() == [-1, 0]


def test_structures_are_bounded_in_their_structure():
    x0 = {"a": torch.ones(2, dtype=DOUBLE), "b": torch.ones((), dtype=DOUBLE)}
    bounds = ({"a": torch.tensor([2.0, -1.0]), "b": -INF}, {"a": 3.0, "b": torch.tensor(0.5)})
    result = optim.minimize(lambda x: x["a"].square().sum() + (x["b"] - 2) ** 2, x0, bounds=bounds)
    assert result.x["a"].tolist() == pytest.approx([2.0, 0.0], abs=1e-8)
    assert float(result.x["b"]) == 0.5
    assert result.active_mask["a"].tolist() == [-1, 0]
