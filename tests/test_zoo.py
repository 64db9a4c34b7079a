"""The records of the zoo against their sources."""

import math

import oracles
import pytest
import torch
import zoo


def test_value_at_the_start_is_the_published_one(problem):
    assert float(problem.func(problem.x0())) == pytest.approx(problem.start_value, rel=1e-12)


def test_gradient_vanishes_at_the_minimizer(problem):
    x = torch.tensor(problem.minimizer, dtype=torch.float64)
    assert float(problem.func(x)) == pytest.approx(problem.minimum, abs=1e-25)
    # Central differences of a sum of squares near zero: h^4 times the fifth derivative.
    assert oracles.central_gradient(problem.func, x).abs().max() < 1e-8


def test_residual_form_is_the_scalar_form(problem):
    x = problem.x0()
    assert float(problem.residual(x).square().sum()) == float(problem.func(x))


@pytest.mark.parametrize(
    "equations", zoo.EQUATIONS + [one for one, _ in zoo.NO_ROOTS], ids=lambda one: one.name
)
def test_equations_at_start_and_solution(equations):
    r = equations.residual(equations.start)
    assert r.shape == equations.start.shape
    if not math.isnan(equations.start_value):
        assert float(r @ r) == pytest.approx(equations.start_value, rel=1e-6)
    if equations.solution is not None:
        x = torch.tensor(equations.solution, dtype=torch.float64)
        assert float(equations.residual(x).norm()) <= 1e-3 * float(r.norm())
