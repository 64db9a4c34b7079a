"""A function as a problem: what it evaluates, and what it does not evaluate again."""

import torch
import zoo
from function_problems import function_problem

from optim.functions.saddle import Ends, Line


def test_an_accepted_trial_is_not_evaluated_again(problem):
    f = function_problem(problem.func, problem.x0())
    trial = f.evaluate(1e-3 * torch.ones_like(problem.x0()))
    gradient = f.gradient(trial)
    f.move(trial)
    model = f.model()
    assert f.counts()[:2] == (2, 2)
    x = problem.x0() + 1e-3
    torch.testing.assert_close(f.point.x, x)
    torch.testing.assert_close(model.value, float(problem.func(x)))
    torch.testing.assert_close(gradient, torch.autograd.functional.vjp(problem.func, x)[1])
    torch.testing.assert_close(model.gradient, gradient)
    hessian = torch.autograd.functional.hessian(problem.func, x)
    torch.testing.assert_close(model.curvature @ gradient, hessian @ gradient)


def test_a_refused_trial_leaves_the_point(problem):
    f = function_problem(problem.func, problem.x0())
    before = f.model()
    trial = f.evaluate(torch.ones_like(problem.x0()))
    assert f.decrease(trial) == before.value - trial.value
    assert torch.equal(f.point.x, problem.x0())
    assert f.model().value == before.value


def test_ends_of_a_spectrum_and_the_line_down():
    A = zoo.indefinite_matrix(30, 1)
    f = function_problem(lambda x: 0.5 * x @ A @ x, torch.zeros(30, dtype=torch.float64))
    model = f.model()
    ends = Ends(model)
    values, vectors = torch.linalg.eigh(A)
    torch.testing.assert_close(ends.values, values[[0, -1]], rtol=1e-6, atol=0.0)
    # The lowest eigenvalues lie apart by a tenth: the vector is known to less than its value.
    assert abs(float(vectors[:, 0] @ ends.lowest)) > 0.999
    for g in (model.gradient, vectors[:, 0], -vectors[:, 0]):
        line = Line(model._replace(gradient=g), vectors[:, 0], float(values[0]))
        solution = line.solve(2.0)
        assert solution.norm == 2.0
        torch.testing.assert_close(float(solution.step.norm()), 2.0)
        torch.testing.assert_close(solution.linear, -float(g @ solution.step))
        torch.testing.assert_close(solution.quadratic, float(solution.step @ A @ solution.step))
        assert solution.linear >= 0
