"""The loop and its spaces on functions, against dense solutions that share nothing with them."""

import math

import pytest
import torch
import zoo
from function_problems import function_problem
from hypothesis import given
from hypothesis import strategies as st

from optim.methods.control import marquardt, trust_radius
from optim.methods.formed import Formed
from optim.methods.grown import Grown, Growth
from optim.methods.problem import QuadraticModel
from optim.methods.step import Options, Step
from optim.methods.subspace import DAMPED, WITHIN, Bound, bounded
from secondorder import FunctionOperator

# Dense solutions in float64 of matrices with a condition of at most 1e3.
RTOL = 1e-9
BALL = Bound(bounded)


def grown(model, bound):
    """Until nothing is left to add."""
    return Grown(model, bound, Growth(-math.inf, 0.0, model.gradient.numel()))


SPACES = {"formed": Formed, "grown": grown}


@pytest.fixture(params=list(SPACES))
def space_of(request):
    return SPACES[request.param]


def quadratic(A, b):
    """At zero the gradient is ``-b``."""
    return function_problem(lambda x: 0.5 * x @ A @ x - b @ x, torch.zeros_like(b))


def steps_of(fun, x0, space_of, count=6, radius=1.0):
    """The accepted steps within a radius, and the ratios."""
    problem, steps, ratios = function_problem(fun, x0), [], []
    for _ in range(count):
        model = problem.model()
        outcome = Step(problem, model, space_of(model, WITHIN), trust_radius, Options()).take(radius)
        radius = outcome.size
        steps.append(outcome.trial.step)
        ratios.append(outcome.rho)
        problem.move(outcome.trial)
    return torch.stack(steps), ratios


@pytest.mark.parametrize(
    ("bound", "rule", "size"),
    [(BALL, trust_radius, 1e6), (WITHIN, trust_radius, 1e6), (DAMPED, marquardt, 1e-12)],
)
def test_one_step_on_a_quadratic_is_exact(spd_system, space_of, bound, rule, size):
    A, b = spd_system
    problem = quadratic(A, b)
    model = problem.model()
    outcome = Step(problem, model, space_of(model, bound), rule, Options()).take(size)
    assert outcome.rho == pytest.approx(1.0, abs=RTOL)
    assert outcome.trials == 1
    torch.testing.assert_close(outcome.trial.step, torch.linalg.solve(A, b), rtol=1e-8, atol=1e-8)
    problem.move(outcome.trial)
    assert problem.counts().nfev == 2
    assert float(problem.model().gradient.norm()) <= RTOL * float(b.norm())


def test_the_grown_space_ends_in_n_products(spd_system):
    A, b = spd_system
    space = grown(quadratic(A, b).model(), DAMPED)
    solution = space.solve(0.0)
    assert space.products == space.size == len(b)
    torch.testing.assert_close(solution.step, torch.linalg.solve(A, b), rtol=1e-8, atol=1e-8)
    assert solution.predicted() == pytest.approx(0.5 * float(b @ torch.linalg.solve(A, b)), rel=RTOL)


@pytest.mark.parametrize("kind", ["definite", "indefinite"])
def test_another_damping_costs_no_product(space_of, kind):
    A = zoo.spd_matrix(12, 1e3, 3) if kind == "definite" else zoo.indefinite_matrix(12, 3)
    b = zoo.vector(12, 4)
    problem = quadratic(A, b)
    space = space_of(problem.model(), DAMPED)
    space.solve(1.0)
    products = space.products
    values, vectors = torch.linalg.eigh(A)
    magnitude = vectors @ torch.diag(values.abs()) @ vectors.T
    for damping in (1e-6, 1e-2, 1.0, 1e2, 1e6):
        solution = space.solve(damping)
        expected = torch.linalg.solve(magnitude + damping * torch.eye(12, dtype=A.dtype), b)
        torch.testing.assert_close(solution.step, expected, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(solution.linear, float(b @ expected), rtol=RTOL, atol=0.0)
        torch.testing.assert_close(solution.quadratic, float(expected @ A @ expected), rtol=1e-7, atol=1e-12)
    assert space.products == products


def trust_region_problem(n, seed, is_hard):
    """A random symmetric matrix; where it is hard, ``b`` has no part in the lowest eigenvector."""
    generator = torch.Generator().manual_seed(seed)
    M = torch.randn(n, n, generator=generator, dtype=torch.float64)
    A, b = (M + M.T) / 2, torch.randn(n, generator=generator, dtype=torch.float64)
    if is_hard and n > 1:
        lowest = torch.linalg.eigh(A)[1][:, 0]
        b = b - lowest * (lowest @ b)
    return A, b


@given(
    n=st.integers(1, 8),
    seed=st.integers(0, 10**6),
    exponent=st.floats(-2, 2),
    is_hard=st.booleans(),
    form=st.sampled_from(list(SPACES)),
)
def test_trust_region_conditions(n, seed, exponent, is_hard, form):
    """They hold for a global minimiser, and for no other point (Moré and Sorensen 1983, lemma 2.1)."""
    A, b = trust_region_problem(n, seed, is_hard)
    radius, size = 10**exponent, float(torch.linalg.matrix_norm(A, 2))
    solution = SPACES[form](quadratic(A, b).model(), BALL).solve(radius)
    p, shift = solution.step, solution.shift
    scale = float(b.norm()) + (size + shift) * radius
    assert float(p.norm()) <= radius * (1 + 1e-10)
    assert float((A @ p + shift * p - b).norm()) <= 1e-7 * scale
    assert float(torch.linalg.eigvalsh(A)[0]) + shift >= -1e-7 * size
    assert shift >= 0
    assert shift * (radius - float(p.norm())) <= 1e-7 * scale
    assert solution.predicted() == pytest.approx(float(b @ p - 0.5 * p @ A @ p), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_steps_do_not_depend_on_the_unit_of_the_function(problem, space_of, factor):
    steps, ratios = steps_of(problem.func, problem.x0(), space_of)
    scaled, scaled_ratios = steps_of(lambda x: factor * problem.func(x), problem.x0(), space_of)
    torch.testing.assert_close(scaled, steps, rtol=1e-6, atol=1e-8)
    assert scaled_ratios == pytest.approx(ratios, rel=1e-6)


def test_steps_turn_with_the_variables(problem, space_of):
    x0 = problem.x0()
    Q = torch.linalg.qr(zoo.spd_matrix(len(x0), 10.0, 5) + torch.ones(len(x0), len(x0)))[0]
    steps, ratios = steps_of(problem.func, x0, space_of)
    turned, turned_ratios = steps_of(lambda z: problem.func(Q.T @ z), Q @ x0, space_of)
    torch.testing.assert_close(turned @ Q, steps, rtol=1e-6, atol=1e-8)
    assert turned_ratios == pytest.approx(ratios, rel=1e-6)


def test_a_refused_radius_costs_an_evaluation_and_no_more(space_of):
    """The Newton step leaves the domain of the logarithm."""
    f = function_problem(lambda x: (x - x.log()).sum(), torch.tensor([5.0, 7.0], dtype=torch.float64))
    model = f.model()
    space = space_of(model, BALL)
    space.solve(100.0)
    products = space.products
    outcome = Step(f, model, space, trust_radius, Options()).take(100.0)
    assert outcome.trials > 1
    assert (*f.counts()[:2], space.products) == (1 + outcome.trials, 1, products)
    assert outcome.trial.value < f.point.value
    assert float(outcome.trial.step.norm()) < 10


def test_without_a_decrease_nothing_is_taken():
    """Uphill in value, downhill in the gradient that it claims."""
    x0 = torch.ones(2, dtype=torch.float64)
    f = function_problem(lambda x: 2 * x.square().sum().detach() - x.square().sum(), x0)
    model = f.model()
    outcome = Step(f, model, Formed(model, BALL), trust_radius, Options(max_trials=3)).take(1.0)
    assert (outcome.trial, outcome.trials, f.counts().nfev) == (None, 3, 4)
    assert outcome.size == pytest.approx(1 / 64)
    assert torch.equal(f.point.x, x0)


def test_a_model_beyond_the_range_of_numbers_is_not_finite():
    f = function_problem(lambda x: 1e300 * x.square().sum(), torch.full((2,), 1e3, dtype=torch.float64))
    model = f.model()
    model = model._replace(gradient=model.gradient * math.inf)
    outcome = Step(f, model, Formed(model, BALL), trust_radius, Options()).take(1.0)
    assert (outcome.status, outcome.trial, f.counts().nfev) == ("non_finite", None, 1)


def test_a_product_that_is_not_finite_ends_the_space_and_is_said():
    """What was found before it stands; the status does not call it converged."""
    values = torch.linspace(1.0, 20.0, 12, dtype=torch.float64)
    calls = []

    def product(v):
        calls.append(1)
        return values * v * (float("nan") if len(calls) == 4 else 1.0)

    b = torch.ones(12, dtype=torch.float64)
    model = QuadraticModel(0.0, -b, FunctionOperator(product, b), float(b.norm()))
    solution = grown(model, DAMPED).solve(0.5)
    assert solution.status == "non_finite"
    assert len(calls) == 4
    assert bool(solution.step.isfinite().all())
    assert solution.predicted() > 0
