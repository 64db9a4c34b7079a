"""What keeps a step short, by name: a cubic term, and a ball with ``abs(B)``; against dense matrices."""

import math

import pytest
import torch
import zoo
from function_problems import function_problem
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from optim.methods.control import cubic as cubic_rule
from optim.methods.control import cubic_weight, trust_radius
from optim.methods.cubic import minimise_cubic
from optim.methods.formed import Formed
from optim.methods.grown import Grown, Growth
from optim.methods.step import Options, Step
from optim.methods.subspace import CUBIC, SADDLE_FREE, Bound, bounded

DOUBLE = torch.float64
# The root is found to 1e-14; products and eigenvectors of matrices of eight rows add rounding.
TOLERANCE = 1e-10


def grown(model, bound):
    """Until nothing is left to add."""
    return Grown(model, bound, Growth(-math.inf, 0.0, model.gradient.numel()))


SPACES = {"formed": Formed, "grown": grown}


@pytest.fixture(params=list(SPACES))
def space_of(request):
    return SPACES[request.param]


def quadratic(A, b):
    """At zero the gradient is ``-b``."""
    return function_problem(lambda x: 0.5 * x @ A @ x - b @ x, torch.zeros_like(b)).model()


def random_system(n, seed, kind):
    """A symmetric matrix and a right-hand side; where it is hard without a part in the lowest space."""
    generator = torch.Generator().manual_seed(seed)
    M = torch.randn(n, n, generator=generator, dtype=DOUBLE)
    Q, b = torch.linalg.qr(M)[0], torch.randn(n, generator=generator, dtype=DOUBLE)
    values = {
        "any": torch.linalg.eigvalsh(M + M.T),
        "convex": torch.linalg.eigvalsh(M @ M.T),
        "repeated": torch.tensor([-1.0, -1.0, 2.0, 2.0, 2.0, -1.0, 0.0, 0.0], dtype=DOUBLE)[:n],
        "zero": torch.zeros(n, dtype=DOUBLE),
        "hard": torch.linspace(-1.0, 3.0, n, dtype=DOUBLE),
    }[kind]
    if kind == "hard":
        b = b - Q[:, 0] * (Q[:, 0] @ b)
    A = Q @ torch.diag(values) @ Q.T
    return (A + A.T) / 2, b


def assert_minimises(A, b, weight, p, shift):
    """They hold for a global minimiser, and for no other point (Cartis, Gould, Toint 2011, theorem 3.1)."""
    size = float(torch.linalg.matrix_norm(A, 2))
    scale = float(b.norm()) + (size + shift) * float(p.norm())
    multiplier = weight * float(p.norm())
    assert float((A @ p + multiplier * p - b).norm()) <= TOLERANCE * scale
    assert float(torch.linalg.eigvalsh(A)[0]) + multiplier >= -TOLERANCE * (size + multiplier)
    assert shift == pytest.approx(multiplier, rel=1e-8)


@given(
    n=st.integers(2, 8),
    seed=st.integers(0, 10**6),
    exponent=st.floats(-6, 6),
    kind=st.sampled_from(["any", "convex", "repeated", "zero", "hard"]),
)
def test_cubic_conditions(n, seed, exponent, kind):
    A, b = random_system(n, seed, kind)
    weight = 10**exponent
    solution = Formed(quadratic(A, b), CUBIC).solve(weight)
    p = solution.step
    assert_minimises(A, b, weight, p, solution.shift)
    assert solution.predicted() == pytest.approx(float(b @ p - 0.5 * p @ A @ p), rel=1e-9)
    assert solution.predicted() > 0


@given(n=st.integers(1, 8), seed=st.integers(0, 10**6), exponent=st.floats(-4, 4))
def test_cubic_conditions_in_a_grown_space(n, seed, exponent):
    A, b = random_system(n, seed, "any")
    solution = grown(quadratic(A, b), CUBIC).solve(10**exponent)
    assert_minimises(A, b, 10**exponent, solution.step, solution.shift)


@pytest.mark.parametrize("part", [0.0, 1e-300, 1e-20, 1e-12, 1e-6])
def test_cubic_at_and_near_the_hard_case(part):
    """Near it the shift differs from its floor by less than numbers are spaced there."""
    values = torch.tensor([-2.0, -2.0, 1.0, 3.0], dtype=DOUBLE)
    target = torch.tensor([0.0, part, 1.0, -1.0], dtype=DOUBLE)
    weight = 0.1
    y, shift, status = minimise_cubic(values, target, weight)
    # Where squares of it vanish it is none.
    assert status == ("converged" if part > 1e-150 else "hard_case")
    assert float(y.norm()) == pytest.approx(shift / weight, rel=1e-12)
    assert shift == pytest.approx(2.0, rel=1e-5)
    torch.testing.assert_close((values + shift) * y, target, rtol=1e-7, atol=1e-14)
    assert float(y[:2].norm()) > 19


@pytest.mark.parametrize(("weight", "gradient"), [(1.0, 1.0), (1e-3, 40.0), (1e6, 1e-9)])
def test_cubic_without_curvature_has_a_closed_form(weight, gradient):
    values, target = torch.zeros(3, dtype=DOUBLE), torch.tensor([0.0, 0.6, -0.8], dtype=DOUBLE) * gradient
    y, shift, _ = minimise_cubic(values, target, weight)
    assert float(y.norm()) == pytest.approx(math.sqrt(gradient / weight), rel=1e-12)
    torch.testing.assert_close(y, target / shift, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("unit", [1e-30, 1e30])
def test_cubic_does_not_depend_on_units(unit):
    """Of the function, and of the variables."""
    values, target = torch.tensor([-1.0, 0.5, 4.0], dtype=DOUBLE), torch.tensor([0.1, 1.0, 2.0], dtype=DOUBLE)
    y, shift, _ = minimise_cubic(values, target, 0.3)
    again, other, _ = minimise_cubic(unit * values, unit * target, unit * 0.3)
    torch.testing.assert_close(again, y, rtol=1e-12, atol=0.0)
    assert other == pytest.approx(unit * shift, rel=1e-12)
    longer, _, _ = minimise_cubic(values / unit**2, target / unit, 0.3 / unit**3)
    torch.testing.assert_close(longer, y * unit, rtol=1e-12, atol=0.0)


def test_cubic_is_no_worse_than_what_a_search_finds():
    """From many starts, by an algorithm that knows nothing of eigenvectors."""
    for seed in range(5):
        A, b = random_system(4, seed, "any")
        solution = Formed(quadratic(A, b), CUBIC).solve(0.5)

        def model(p, A=A, b=b):
            return 0.5 * p @ A.numpy() @ p - b.numpy() @ p + 0.5 / 3 * (p @ p) ** 1.5

        generator = torch.Generator().manual_seed(seed)
        starts = 5 * torch.randn(20, 4, generator=generator, dtype=DOUBLE)
        found = min(minimize(model, start.numpy(), method="BFGS").fun for start in starts)
        assert model(solution.step.numpy()) == pytest.approx(found, rel=1e-6)


def test_another_weight_costs_no_product(space_of):
    A, b = zoo.indefinite_matrix(12, 3), zoo.vector(12, 4)
    space = space_of(quadratic(A, b), CUBIC)
    space.solve(1.0)
    products = space.products
    for weight in (1e-4, 1e-1, 1.0, 1e3):
        solution = space.solve(weight)
        assert_minimises(A, b, weight, solution.step, solution.shift)
    assert space.products == products


def test_the_weight_follows_the_ratio():
    assert cubic_weight(1.0, -math.inf) == cubic_weight(1.0, math.nan) == 10.0
    assert cubic_weight(1.0, 0.5) == 1.0
    assert cubic_weight(1.0, 1.0) == 0.1


def test_cubic_steps_reach_a_minimum_of_every_problem(problem, space_of):
    f = function_problem(problem.func, problem.x0())
    weight = 1.0
    for _ in range(200):
        model = f.model()
        if float(model.gradient.norm()) <= 1e-9:
            break
        outcome = Step(f, model, space_of(model, CUBIC), cubic_rule, Options()).take(weight)
        weight = outcome.size
        if outcome.trial is not None:
            assert outcome.trial.value <= f.point.value * (1 + 1e-15)
            f.move(outcome.trial)
    assert f.point.value <= problem.minimum + 1e-12


def test_saddle_free_is_newton_where_the_function_is_convex(spd_system, space_of):
    A, b = spd_system
    for radius in (1e-2, 1.0, 1e6):
        ours = space_of(quadratic(A, b), SADDLE_FREE).solve(radius)
        ball = space_of(quadratic(A, b), Bound(bounded)).solve(radius)
        torch.testing.assert_close(ours.step, ball.step, rtol=1e-12, atol=1e-14)
        assert ours.other is None
    torch.testing.assert_close(ours.step, torch.linalg.solve(A, b), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("radius", [0.1, 1e6])
def test_saddle_free_descends_along_each_eigenvector(space_of, radius):
    """Along each as far as ``abs(B)`` and one shift for all let it, uphill along none."""
    A, b = zoo.indefinite_matrix(12, 3), zoo.vector(12, 4)
    solution = space_of(quadratic(A, b), SADDLE_FREE).solve(radius)
    values, vectors = torch.linalg.eigh(A)
    expected = vectors @ ((vectors.T @ b) / (values.abs() + solution.shift))
    torch.testing.assert_close(solution.step, expected, rtol=1e-8, atol=1e-10)
    assert bool(((vectors.T @ solution.step) * (vectors.T @ b) > 0).all())
    assert float(solution.step.norm()) <= radius * (1 + 1e-12)
    # More than the model with abs(B) promises: the curvature is negative along some of it.
    magnitude = vectors @ torch.diag(values.abs()) @ vectors.T
    assert solution.predicted() > float(b @ expected - 0.5 * expected @ magnitude @ expected) > 0


def test_saddle_free_leaves_a_saddle():
    """Where Newton's own step leads to it."""

    def fun(x):
        return 0.5 * x[0] ** 2 - 0.5 * x[1] ** 2 + 0.25 * x[1] ** 4

    f, radius = function_problem(fun, torch.tensor([1.0, 1e-3], dtype=DOUBLE)), 1.0
    for _ in range(30):
        model = f.model()
        if float(model.gradient.norm()) < 1e-10:
            break
        outcome = Step(f, model, Formed(model, SADDLE_FREE), trust_radius, Options()).take(radius)
        radius = outcome.size
        if outcome.trial is not None:
            f.move(outcome.trial)
    assert f.point.value == pytest.approx(-0.25, abs=1e-12)
