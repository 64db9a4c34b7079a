"""Scale, derivatives of the user's own, methods by name, and what counts as a minimum."""

import itertools
import math

import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize

import optim

DOUBLE = torch.float64
METHODS = ["newton", "trust-exact", "cubic", "newton-cg", "trust-krylov"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_the_published_minimum(problem, method):
    result = optim.minimize(problem.func, problem.x0(), method=method)
    assert result.success or result.status == "flat", result
    assert result.fun == pytest.approx(problem.minimum, abs=1e-9)
    values = [record.fun for record in result.history]
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(values))


def test_units_of_the_variables_change_no_step(problem):
    """By the default scale, from a start where every variable is curved."""
    x0 = problem.x0() + 0.01
    units = torch.logspace(-4, 4, len(x0), dtype=DOUBLE)
    plain, scaled = [], []
    optim.minimize(
        problem.func, x0, method="newton", callback=lambda state: plain.append(state.x), max_iter=40
    )
    optim.minimize(
        lambda z: problem.func(z / units),
        x0 * units,
        method="newton",
        callback=lambda s: scaled.append(s.x / units),
        max_iter=40,
    )
    # Later they are near the minimum, where rounding rules.
    length = min(len(plain), len(scaled), 18) - 3
    assert length >= 3
    torch.testing.assert_close(
        torch.stack(scaled[:length]), torch.stack(plain[:length]), rtol=1e-6, atol=1e-8
    )


def test_units_given_are_the_scale():
    """A valley of variables that differ by 1e6: in their units it is round."""
    units = torch.tensor([1e3, 1e-3], dtype=DOUBLE)

    def fun(x):
        return ((x / units - 1) ** 2).sum() + ((x / units - 1) ** 4).sum()

    given_units = optim.minimize(fun, torch.zeros(2, dtype=DOUBLE), x_scale=units)
    assert given_units.success
    torch.testing.assert_close(given_units.x, units, rtol=1e-8, atol=0.0)


def test_derivatives_of_the_users_own():
    """Nothing is asked of torch then: the value has no graph."""
    problem = zoo.PROBLEMS[0]
    calls = {"jac": 0, "hess": 0, "hessp": 0}

    def detached(x, scale):
        return scale * problem.func(x).detach()

    def jac(x, scale):
        calls["jac"] += 1
        return scale * torch.autograd.functional.jacobian(problem.func, x)

    def hess(x, scale):
        calls["hess"] += 1
        return scale * torch.autograd.functional.hessian(problem.func, x)

    def hessp(x, v, scale):
        calls["hessp"] += 1
        return scale * torch.autograd.functional.hvp(problem.func, x, v)[1]

    dense = optim.minimize(detached, problem.x0(), (2.0,), "newton", jac=jac, hess=hess)
    assert dense.success
    assert (calls["jac"], calls["hess"]) == (dense.njev, dense.nhev)
    torch.testing.assert_close(dense.x, optim.minimize(lambda x: 2 * problem.func(x), problem.x0()).x)
    products = optim.minimize(detached, problem.x0(), (2.0,), "newton-cg", jac=jac, hessp=hessp)
    assert products.success
    assert calls["hessp"] == products.nhev
    mixed = optim.minimize(problem.func, problem.x0(), jac=lambda x: jac(x, 1.0))
    assert mixed.success


def test_a_gradient_that_comes_with_the_value():
    problem = zoo.PROBLEMS[0]

    def both(x):
        value = problem.func(x)
        return value, torch.autograd.grad(value, x, retain_graph=True)[0]

    result = optim.minimize(both, problem.x0(), jac=True)
    assert result.success
    assert "aux" not in result
    torch.testing.assert_close(result.x, torch.ones(2, dtype=DOUBLE), rtol=1e-7, atol=0.0)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"jac": "3-point"}, TypeError, "jac must be a function of x, or None, got '3-point'"),
        ({"hess": True}, TypeError, "hess must be a function of x"),
        ({"hess": lambda x: x}, ValueError, r"hess\(x\) must have shape \(2, 2\), got \(2,\)"),
        (
            {"jac": lambda x: x.sum().expand(3)},
            ValueError,
            r"jac\(x\) must have the shape of x0, \(2,\), got \(3,\)",
        ),
        ({"jac": True}, TypeError, r"fun must return \(value, aux\)"),
        ({"x_scale": "jac"}, ValueError, "x_scale must be 'auto', 'none' or units of x, got 'jac'"),
        ({"x_scale": 0.0}, ValueError, "x_scale must be positive"),
        ({"max_nfev": 0}, ValueError, "max_nfev must be a positive integer"),
        ({"bounds": [(1.0, 0.0), (0.0, 1.0)]}, ValueError, "lower <= upper"),
    ],
)
def test_bad_derivatives_and_scales(options, error, text):
    with pytest.raises(error, match=text):
        optim.minimize(lambda x: x.square().sum(), torch.ones(2, dtype=DOUBLE), **options)


def test_a_direction_without_curvature_is_flat():
    result = optim.minimize(lambda x: (x[0] - x[1]).square(), torch.tensor([1.0, 5.0], dtype=DOUBLE))
    assert (result.status, result.success) == ("flat", False)
    assert "not unique" in result.message


def test_a_saddle_is_seen_in_its_own_units():
    """Its negative eigenvalue is 1e-20 of the largest; with curvature one along each variable it is plain."""

    def fun(x):
        return 1e10 * x[0] ** 2 + 1e-10 * (x[1] ** 2 - 1) ** 2

    result = optim.minimize(fun, torch.tensor([0.0, 1e-3], dtype=DOUBLE), gtol=1e-16)
    assert result.x.abs().tolist() == pytest.approx([0.0, 1.0], abs=1e-6)


def test_a_small_gradient_alone_is_no_minimum():
    """It is within gtol at the start, and the value far from its minimum."""
    result = optim.minimize(lambda x: 1e-10 * (x - 3).square().sum(), torch.zeros(2, dtype=DOUBLE))
    assert result.success
    torch.testing.assert_close(result.x, torch.full_like(result.x, 3.0), rtol=1e-6, atol=0.0)


def test_a_minimum_at_the_rounding_of_the_value_is_certified():
    """The sum of terms of 1e8 shows no decrease below 1e-7; the gradient does."""
    A, b = zoo.spd_matrix(4, 10.0, 1), zoo.vector(4, 2)
    result = optim.minimize(
        lambda x: 1e8 + 0.5 * x @ A @ x - b @ x,
        torch.zeros(4, dtype=DOUBLE),
        gtol=1e-30,
        xtol=1e-30,
        ftol=1e-30,
    )
    assert result.success
    torch.testing.assert_close(result.x, torch.linalg.solve(A, b), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("n", [400, pytest.param(600, marks=pytest.mark.slow)])
def test_long_valleys_are_walked_to_their_end(n):
    """The chained Rosenbrock function: thousands of steps, in one call."""

    def fun(x):
        return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()

    x0 = torch.full((n,), -1.0, dtype=DOUBLE)
    x0[0] = -1.2
    result = optim.minimize(fun, x0)
    assert result.success, result
    assert result.fun < 1e-10


def test_evaluations_are_limited():
    result = optim.minimize(zoo.PROBLEMS[0].func, zoo.PROBLEMS[0].x0(), max_nfev=7)
    assert (result.status, result.nfev) == ("max_nfev", 7)


@given(n=st.integers(1, 6), seed=st.integers(0, 999))
def test_logistic_regressions_are_scipys(n, seed):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(30, n, generator=generator, dtype=DOUBLE)
    y = torch.sign(torch.randn(30, generator=generator, dtype=DOUBLE))

    def fun(w):
        return torch.nn.functional.softplus(-y * (X @ w)).sum() + 0.05 * w.square().sum()

    result = optim.minimize(fun, torch.zeros(n, dtype=DOUBLE))
    assert result.success

    def both(w):
        w = torch.tensor(w, requires_grad=True)
        value = fun(w)
        return value.item(), torch.autograd.grad(value, w)[0].numpy()

    theirs = optimize.minimize(
        both, torch.zeros(n, dtype=DOUBLE).numpy(), jac=True, method="BFGS", options=dict(gtol=1e-9)
    )
    assert result.fun <= theirs.fun + 1e-12
    assert float(result.jac.abs().max()) <= 1.5e-8


def test_shapes_that_change_are_an_error():
    sizes = iter([1, 1, 2])
    with pytest.raises(ValueError, match=r"single element, got shape \(2,\)"):
        optim.minimize(lambda x: (x - 3).square().sum().expand(next(sizes)), torch.ones(1, dtype=DOUBLE))


def test_random_numbers_and_gradients_are_left_alone():
    w = torch.ones(2, dtype=DOUBLE, requires_grad=True)
    state = torch.get_rng_state()
    optim.minimize(lambda x: (x - w).square().sum(), torch.zeros(2, dtype=DOUBLE), method="trust-krylov")
    assert w.grad is None
    assert torch.equal(torch.get_rng_state(), state)


def test_progress_is_shown(capsys):
    optim.minimize(zoo.PROBLEMS[0].func, zoo.PROBLEMS[0].x0(), progress=True)
    assert "step" in capsys.readouterr().err
    assert math.isfinite(optim.minimize(zoo.PROBLEMS[0].func, zoo.PROBLEMS[0].x0()).fun)
    assert capsys.readouterr().err == ""


def chain(x):
    """All constants are minimisers."""
    return (x[1:] - x[:-1]).square().sum()


def tilted(x):
    """A saddle at 0 whose negative curvature is 1e-14 of the positive one."""
    return (torch.logspace(8, 6, len(x) - 1, dtype=DOUBLE) * x[:-1].square()).sum() + 1e-6 * (
        x[-1] ** 4 / 4 - x[-1].square()
    )


def monkey(x):
    """The Hessian vanishes at a saddle."""
    return x[0] ** 3 - 3 * x[0] * x[1] ** 2 + (x**4).sum()


ALL_METHODS = [*METHODS, "newton-sparse", "auto"]


@pytest.mark.parametrize("method", ALL_METHODS)
@pytest.mark.parametrize("n", [3, 130, 300])
def test_a_minimum_that_is_not_unique_is_flat(method, n):
    x0 = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=DOUBLE)
    result = optim.minimize(chain, x0, method=method)
    assert (result.status, result.success) == ("flat", False), result
    assert result.fun < 1e-12


@pytest.mark.parametrize("method", ALL_METHODS)
@pytest.mark.parametrize("n", [2, 40])
def test_no_saddle_is_a_minimum_however_small_its_curvature(method, n):
    x0 = torch.ones(n, dtype=DOUBLE)
    x0[-1] = 0.0
    result = optim.minimize(tilted, x0, method=method, max_iter=300)
    assert result.fun == pytest.approx(-1e-6, rel=1e-6) or not result.success, result
    if method not in ("newton-cg", "trust-krylov"):
        # They solve in the given units, in which the systems have a condition of 1e14.
        assert result.success


@pytest.mark.parametrize("method", ALL_METHODS)
def test_where_the_hessian_vanishes_nothing_is_certain(method):
    assert optim.minimize(monkey, torch.zeros(2, dtype=DOUBLE), method=method).status == "flat"


def test_auto_forms_the_hessian_where_products_are_dearer():
    weights = torch.logspace(8, -4, 150, dtype=DOUBLE)

    def fun(x):
        return (weights * (x - 1).square()).sum() + 1e-3 * (x**4).sum()

    result = optim.minimize(fun, torch.zeros(150, dtype=DOUBLE))
    assert result.success, result
    # Newton's method alone takes eight steps; CG alone more than 500 products a step.
    assert result.nhev < 5000
    best = optim.minimize(fun, torch.zeros(150, dtype=DOUBLE), method="newton")
    torch.testing.assert_close(result.x, best.x, rtol=1e-8, atol=0.0)
    assert len(result.history) <= result.nit + 1
