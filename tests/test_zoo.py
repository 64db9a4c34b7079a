"""The records of the zoo against their sources."""

import oracles
import pytest
import torch


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
