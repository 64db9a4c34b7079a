"""A function as a problem: what it evaluates, and what it does not evaluate again."""

import torch
import zoo
from function_problems import function_problem

from optim.functions.saddle import Line, look_around


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


def test_the_way_down_from_a_saddle():
    """In units of the diagonal, by all eigenvalues or by those that Lanczos steps find."""
    generator = torch.Generator().manual_seed(0)
    n = 300
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    values = torch.cat(
        [-torch.ones(1, dtype=torch.float64), torch.linspace(0.1, 1, n - 1, dtype=torch.float64)]
    )
    units = torch.logspace(0, 6, n, dtype=torch.float64)
    A = units * ((Q * values) @ Q.T) * units[:, None]
    model = function_problem(lambda x: 0.5 * x @ A @ x, torch.zeros(n, dtype=torch.float64)).model()
    for spent, products in ((n, n), (0, n)):
        sight = look_around(model, spent)
        assert sight.kind == "negative"
        assert sight.products == products if spent else sight.products < products
        step = sight.line.solve(2.0).step
        torch.testing.assert_close(float(step.norm()), 2.0)
        assert float(step @ A @ step) < 0
        torch.testing.assert_close(
            sight.line.solve(2.0).quadratic, float(step @ A @ step), rtol=1e-6, atol=0.0
        )


def test_a_line_is_downhill_within_the_radius():
    A = zoo.indefinite_matrix(30, 1)
    model = function_problem(lambda x: 0.5 * x @ A @ x, torch.zeros(30, dtype=torch.float64)).model()
    values, vectors = torch.linalg.eigh(A)
    for g in (model.gradient, vectors[:, 0], -vectors[:, 0]):
        line = Line(model._replace(gradient=g), vectors[:, 0], float(values[0]))
        solution = line.solve(2.0)
        assert solution.norm == 2.0
        torch.testing.assert_close(float(solution.step.norm()), 2.0)
        torch.testing.assert_close(solution.linear, -float(g @ solution.step))
        torch.testing.assert_close(solution.quadratic, float(solution.step @ A @ solution.step))
        assert solution.linear >= 0
