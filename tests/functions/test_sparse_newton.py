"""Newton's method with a sparse Hessian: at sizes where a dense one would take minutes."""

import numpy as np
import pytest
import scipy.sparse
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st

import optim
from optim.methods.factored import Factored
from optim.methods.formed import Formed
from optim.methods.problem import QuadraticModel, norm
from optim.methods.subspace import Bound, bounded
from secondorder import MatrixOperator

DOUBLE = torch.float64


def bratu(side, strength):
    """The energy of ``-laplace u = strength exp(u)`` on a square, by five points: 4096 unknowns for 64."""
    h = 1 / (side + 1)

    def energy(u):
        u = torch.nn.functional.pad(u.view(side, side), (1, 1, 1, 1))
        gradient = (u[1:] - u[:-1]).square().sum() + (u[:, 1:] - u[:, :-1]).square().sum()
        return 0.5 * gradient - h**2 * strength * u[1:-1, 1:-1].exp().sum()

    return energy


@pytest.mark.parametrize("side", [32, pytest.param(64, marks=pytest.mark.slow)])
def test_bratu_with_thousands_of_unknowns(side):
    """The gradient is that of the five-point scheme, which SciPy's sparse algebra checks."""
    strength = 5.0
    result = optim.minimize(
        bratu(side, strength), torch.zeros(side**2, dtype=DOUBLE), method="newton-sparse", gtol=1e-12
    )
    assert result.success, result
    assert result.nit <= 12
    u, h = result.x.numpy(), 1 / (side + 1)
    ones = np.ones(side)
    T = scipy.sparse.diags([-ones[1:], 2 * ones, -ones[1:]], [-1, 0, 1])
    L = scipy.sparse.kron(T, np.eye(side)) + scipy.sparse.kron(np.eye(side), T)
    assert np.abs(L @ u - h**2 * strength * np.exp(u)).max() < 1e-12


def test_a_long_chain():
    n = 2000

    def fun(x):
        return (x - 1).square().sum() + 100 * (x[1:] - x[:-1].square()).square().sum() / n

    result = optim.minimize(fun, torch.full((n,), 0.5, dtype=DOUBLE), method="newton-sparse")
    assert result.success, result
    torch.testing.assert_close(result.x, torch.ones(n, dtype=DOUBLE), rtol=1e-6, atol=1e-6)


def test_steps_from_an_indefinite_start():
    n = 300

    def fun(x):
        return (x.square() - 1).square().sum() + 0.1 * (x[1:] - x[:-1]).square().sum()

    x0 = 0.01 * zoo.vector(n, 1)
    result = optim.minimize(fun, x0, method="newton-sparse")
    assert result.success, result
    H = torch.autograd.functional.hessian(fun, result.x)
    assert float(torch.linalg.eigvalsh(H)[0]) > 0


def test_a_saddle_is_left():
    n = 50

    def fun(x):
        return (x.square() - 1).square().sum() + 0.1 * (x[1:] - x[:-1]).square().sum()

    result = optim.minimize(fun, torch.zeros(n, dtype=DOUBLE), method="newton-sparse")
    assert result.success, result
    assert result.fun < 1.0


def test_bounds_take_rows_and_columns_out():
    n = 200
    target = torch.linspace(-2, 2, n, dtype=DOUBLE)

    def fun(x):
        return (x - target).square().sum() + 0.5 * (x[1:] - x[:-1]).square().sum() + 0.1 * x.pow(4).sum()

    x0 = torch.zeros(n, dtype=DOUBLE)
    found = optim.minimize(fun, x0, method="newton-sparse", bounds=(-1.0, 0.5))
    other = optim.minimize(fun, x0, method="newton", bounds=(-1.0, 0.5))
    assert found.success
    torch.testing.assert_close(found.x, other.x, rtol=1e-8, atol=1e-9)
    assert torch.equal(found.active_mask, other.active_mask)


def test_entries_that_come_with_another_branch_are_found():
    """Where the first variable is large, it is coupled to the last."""

    def fun(x):
        chain = (x[1:] - x[:-1]).square().sum() + 0.1 * x.pow(4).sum() - x.sum()
        return chain + torch.where(x[0] > 0.5, (x[0] - 0.5) ** 2 * x[-1] ** 2, 0.0) if x[0] > 0.5 else chain

    x0 = torch.zeros(20, dtype=DOUBLE)
    found = optim.minimize(fun, x0, method="newton-sparse")
    assert found.success
    torch.testing.assert_close(found.x, optim.minimize(fun, x0, method="newton").x, rtol=1e-6, atol=1e-8)


@given(n=st.integers(2, 12), seed=st.integers(0, 999), radius=st.sampled_from([1e-3, 0.1, 1.0, 100.0]))
def test_steps_are_those_of_eigenvalues(n, seed, radius):
    """On the boundary to a tenth of the radius: no worse a decrease than that allows."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(n, n, generator=generator, dtype=DOUBLE)
    H, g = A + A.T, torch.randn(n, generator=generator, dtype=DOUBLE)
    model = QuadraticModel(0.0, g, MatrixOperator(H, is_symmetric=True), norm(g))
    space = Factored(model, scipy.sparse.csc_matrix(H.numpy()))
    exact = Formed(model, Bound(bounded)).solve(radius)
    found = space.solve(radius)
    assert float(found.step.norm()) <= radius * (1 + 1e-12)
    assert found.predicted() >= 0.75 * exact.predicted()
    assert found.linear == pytest.approx(-float(g @ found.step))
    assert found.quadratic == pytest.approx(float(found.step @ H @ found.step), rel=1e-9, abs=1e-12)
    assert space.is_definite == bool(torch.linalg.eigvalsh(H)[0] > 0)
