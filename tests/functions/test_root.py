"""``root`` beside SciPy's methods, and what it says where there is no root."""

import math

import pytest
import scipy.optimize
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st

import optim

PEERS = {"hybr": {"xtol": 1e-14}, "lm": {"xtol": 1e-15, "ftol": 1e-15}}


@pytest.fixture(params=zoo.EQUATIONS, ids=lambda equations: equations.name)
def equations(request):
    return request.param


def peer(equations, method, start=None):
    def jac(x):
        return torch.autograd.functional.jacobian(equations.residual, torch.tensor(x)).numpy()

    start = equations.start if start is None else start
    found = scipy.optimize.root(
        lambda x: equations.residual(torch.tensor(x)).numpy(),
        start.numpy(),
        jac=jac,
        method=method,
        options=PEERS[method],
    )
    return torch.tensor(found.x)


@pytest.mark.parametrize("method", PEERS)
def test_roots_are_scipys(equations, method):
    result = optim.root(equations.residual, equations.start)
    assert (result.success, result.status) == (True, "converged"), result
    torch.testing.assert_close(result.x, peer(equations, method), rtol=1e-8, atol=1e-14)
    torch.testing.assert_close(result.fun, equations.residual(result.x), rtol=0, atol=0)
    if equations.solution is not None:
        published = torch.tensor(equations.solution, dtype=torch.float64)
        torch.testing.assert_close(result.x, published, rtol=1e-6, atol=0)


def test_chandrasekhars_moment_is_known_in_closed_form():
    """Summing the equations gives a quadratic one for the mean of h, by the symmetry of the kernel."""
    equations = next(one for one in zoo.EQUATIONS if one.name == "chandrasekhar")
    h = optim.root(equations.residual, equations.start).x
    albedo = zoo.CHANDRASEKHAR_ALBEDO
    assert float(albedo / 2 * h.mean()) == pytest.approx(1 - math.sqrt(1 - albedo), rel=1e-13)


def test_hundreds_of_unknowns():
    equations = next(one for one in zoo.EQUATIONS if one.name == "broyden_tridiagonal")
    start = torch.full((300,), -1.0, dtype=torch.float64)
    result = optim.root(equations.residual, start)
    assert result.success
    assert result.nit <= 10
    torch.testing.assert_close(result.x, peer(equations, "hybr", start), rtol=1e-10, atol=0)


@pytest.mark.parametrize("case", zoo.NO_ROOTS, ids=lambda case: case[0].name)
def test_a_minimum_without_a_root_is_no_success(case):
    equations, sum_of_squares = case
    result = optim.root(equations.residual, equations.start)
    assert (result.success, result.status) == (False, "local_minimum"), result
    assert "another x0" in result.message
    assert float(result.fun.square().sum()) == pytest.approx(sum_of_squares, rel=1e-5)


def test_equations_without_a_root():
    result = optim.root(lambda x: x.square() + 1, torch.tensor([3.0, 1.0], dtype=torch.float64))
    assert (result.success, result.status) == (False, "local_minimum")


def test_a_double_root_is_a_root():
    """Newton's method is linear there, and the Jacobian singular."""
    result = optim.root(lambda x: (x - 1) ** 2, torch.tensor([3.0], dtype=torch.float64))
    assert result.success, result
    assert float(result.x) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_a_singular_root_is_a_root(seed):
    """Powell's function has one at zero, with a Jacobian of rank 2: no unit of x says what is small there."""
    powell = next(one for one in zoo.PROBLEMS if one.name == "powell_singular")
    x0 = powell.x0() + (zoo.vector(4, seed) * (1 + powell.x0().abs()) if seed else 0)
    result = optim.root(powell.residual, x0)
    assert result.success, result
    assert float(result.x.abs().max()) < 1e-10


def test_a_root_that_nothing_tells_from_none_needs_a_tolerance():
    """Powell's (1970) example, on which Newton's method fails: a double root at zero."""

    def fun(x):
        return torch.stack([x[0], 10 * x[0] / (x[0] + 0.1) + 2 * x[1] ** 2])

    x0 = torch.tensor([3.0, 1.0], dtype=torch.float64)
    result = optim.root(fun, x0)
    assert (result.success, result.status) == (False, "singular"), result
    assert "give atol" in result.message
    result = optim.root(fun, x0, atol=1e-12)
    assert result.success
    # The first equation bounds x0 by atol, the second then 2 x1^2 by 101 times it.
    assert float(result.x[0].abs()) <= 1e-12
    assert 2 * float(result.x[1]) ** 2 <= 1.02e-10


@pytest.mark.parametrize(("fun", "x0"), [(torch.atan, 5.0), (torch.sinh, 3.0), (lambda x: x**3, 1.0)])
def test_zero_is_a_root(fun, x0):
    result = optim.root(fun, torch.tensor([x0], dtype=torch.float64))
    assert result.success, result
    assert float(result.x.abs()) < 1e-50


@given(st.integers(1, 12), st.integers(0, 10**6))
def test_linear_equations_are_solved(n, seed):
    A, b = zoo.spd_matrix(n, 1e4, seed), zoo.vector(n, seed + 1)
    result = optim.root(lambda x: A @ x - b, torch.zeros(n, dtype=torch.float64))
    assert result.success
    torch.testing.assert_close(result.x, torch.linalg.solve(A, b), rtol=1e-9, atol=1e-9)


@given(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
def test_the_units_of_equations_and_unknowns_do_not_matter(unit, other):
    units = torch.tensor([unit, other], dtype=torch.float64)
    equations = zoo.EQUATIONS[0]
    result = optim.root(lambda x: equations.residual(x / units), equations.start * units)
    assert result.success
    torch.testing.assert_close(result.x / units, torch.ones_like(units), rtol=1e-9, atol=0)


def test_a_tolerance_ends_earlier():
    equations = next(one for one in zoo.EQUATIONS if one.name == "chandrasekhar")
    whole, early = (optim.root(equations.residual, equations.start, atol=atol) for atol in (None, 1e-2))
    assert early.success
    assert early.nit < whole.nit
    assert float(early.fun.abs().max()) <= 1e-2


def test_a_start_within_the_tolerance_is_a_root():
    result = optim.root(lambda x: x**2 - 2, 1.4, atol=0.1, max_nfev=1)
    assert (result.success, result.status, float(result.x)) == (True, "converged", 1.4)


def test_a_number_is_an_unknown():
    result = optim.root(torch.cos, 1.0)
    assert result.success
    assert float(result.x) == pytest.approx(math.pi / 2, rel=1e-15)


def test_float32_nests_arguments_and_aux():
    def fun(x, scale, shift):
        return torch.stack([scale * x["a"] - shift, x["b"] ** 2 - 4]), x["a"] + 1

    x0 = {"a": torch.tensor(0.5), "b": torch.tensor(1.0)}
    result = optim.root(fun, x0, (2.0, 3.0), has_aux=True)
    assert result.success
    assert {name: float(value) for name, value in result.x.items()} == pytest.approx({"a": 1.5, "b": 2.0})
    assert float(result.aux.detach()) == pytest.approx(2.5)
    assert result.x["a"].dtype == torch.float32


def test_own_jacobian_and_shapes():
    x0 = torch.full((2, 2), 2.0, dtype=torch.float64)
    calls = []

    def jac(x):
        calls.append(1)
        return torch.diag(3 * x.detach().flatten() ** 2)

    result = optim.root(lambda x: x**3 - 8 * torch.arange(1.0, 5.0).view(2, 2), x0, jac=jac)
    assert calls
    assert result.success
    expected = 2 * torch.arange(1.0, 5.0, dtype=torch.float64).view(2, 2) ** (1 / 3)
    torch.testing.assert_close(result.x, expected)


def test_callbacks_and_limits():
    equations, seen = zoo.EQUATIONS[2], []
    result = optim.root(equations.residual, equations.start, callback=lambda state: seen.append(state.cost))
    assert result.success
    assert len(seen) >= 2
    assert seen == sorted(seen, reverse=True)
    assert optim.root(equations.residual, equations.start, callback=lambda _: True).status == "stopped"
    assert optim.root(equations.residual, equations.start, max_nfev=2).status == "max_nfev"
    assert optim.root(equations.residual, equations.start, max_iter=1).status == "max_iter"


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (
            ValueError,
            "2, got 3. Use least_squares",
            lambda: optim.root(lambda x: x.new_ones(3) * x[0], [1.0, 1]),
        ),
        (ValueError, "2, got 1. Use least_squares", lambda: optim.root(torch.sum, [1.0, 1.0])),
        (TypeError, "fun must be a function", lambda: optim.root(3, [1.0])),
        (TypeError, "method.*Leave it out", lambda: optim.root(torch.sin, [1.0], method="hybr")),
        (TypeError, "tol.*Give atol", lambda: optim.root(torch.sin, [1.0], tol=1e-3)),
        (ValueError, "atol must be a positive", lambda: optim.root(torch.sin, [1.0], atol=-1.0)),
        (ValueError, "finite", lambda: optim.root(torch.log, [-1.0])),
        (TypeError, "tensor", lambda: optim.root(lambda x: 1.0, [1.0])),
    ],
)
def test_bad_input_is_named(error, match, call):
    with pytest.raises(error, match=match):
        call()
