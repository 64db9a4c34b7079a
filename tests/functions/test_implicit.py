"""Gradients of solutions in what they were found from: closed forms, and finite differences of solves."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import optim

DOUBLE = torch.float64
TIGHT = dict(gtol=1e-13, xtol=1e-14, ftol=1e-30)


def data(rows=12, columns=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rows, columns, generator=generator, dtype=DOUBLE)
    return A, torch.randn(rows, generator=generator, dtype=DOUBLE)


def test_ridge_regression_is_its_closed_form():
    A, b = data()
    weight = torch.tensor(0.3, dtype=DOUBLE, requires_grad=True)
    A.requires_grad_()

    def fun(x, A, b, weight):
        return 0.5 * (A @ x - b).square().sum() + 0.5 * weight * x.square().sum()

    def solution(A, weight):
        return torch.linalg.solve(A.T @ A + weight * torch.eye(3, dtype=DOUBLE), A.T @ b)

    result = optim.minimize(fun, torch.zeros(3, dtype=DOUBLE), (A, b, weight), implicit=True)
    assert result.success
    assert result.implicit_error < 1e-12
    torch.testing.assert_close(result.x, solution(A, weight))
    probe = torch.tensor([1.0, -2.0, 0.5], dtype=DOUBLE)
    found = torch.autograd.grad(result.x @ probe, (A, weight), create_graph=True)
    expected = torch.autograd.grad(solution(A, weight) @ probe, (A, weight), create_graph=True)
    torch.testing.assert_close(found, expected)
    # And once more.
    seconds = torch.autograd.grad(found[0].sum() + found[1], (A, weight))
    closed = torch.autograd.grad(expected[0].sum() + expected[1], (A, weight))
    torch.testing.assert_close(seconds, closed, rtol=1e-8, atol=1e-10)


def logistic(w, X, y, options):
    return torch.nn.functional.softplus(-y * (X @ w)).sum() + 0.5 * options["l2"] * w.square().sum()


def test_a_logistic_regression_against_differences_of_solves():
    X, y = data(10, 2, 1)
    y = y.sign()
    l2 = torch.tensor(0.5, dtype=DOUBLE, requires_grad=True)

    def solve(X, l2):
        x0 = torch.zeros(2, dtype=DOUBLE)
        return optim.minimize(logistic, x0, (X, y, {"l2": l2}), implicit=True, **TIGHT).x

    assert gradcheck(solve, (X.requires_grad_(), l2), eps=1e-6, atol=1e-6)
    assert gradgradcheck(solve, (X, l2), eps=1e-5, atol=1e-4)


def test_residuals_that_stay_are_seen():
    """By the exact Hessian of the cost: with that of Gauss and Newton gradients would be wrong."""
    t = torch.linspace(0, 2, 9, dtype=DOUBLE)
    y = torch.exp(-t) + torch.tensor([0.3, -0.2, 0.1, 0.25, -0.3, 0.2, -0.1, 0.3, -0.2], dtype=DOUBLE)

    def residual(p, y):
        return p[0] * torch.exp(-p[1] * t) - y

    def solve(y):
        return optim.least_squares(residual, [1.0, 1.0], (y,), implicit=True, xtol=1e-14, gtol=1e-15).x

    assert gradcheck(solve, (y.requires_grad_(),), eps=1e-6, atol=1e-6)
    assert gradgradcheck(solve, (y,), eps=1e-5, atol=1e-4)


def test_robust_losses_are_differentiated():
    t = torch.linspace(0, 2, 9, dtype=DOUBLE)
    y = 2 * t + 1
    y[4] += 3.0
    y.requires_grad_()

    def solve(y):
        fit = optim.least_squares(
            lambda p, y: p[0] * t + p[1] - y,
            [1.0, 0.0],
            (y,),
            loss="cauchy",
            implicit=True,
            xtol=1e-13,
            gtol=1e-14,
        )
        return fit.x

    assert gradcheck(solve, (y,), eps=1e-6, atol=1e-6)


def test_roots():
    c = torch.tensor([2.0, 0.5], dtype=DOUBLE, requires_grad=True)

    def equations(x, c):
        return torch.stack([x[0] ** 2 + x[1] ** 2 - c[0], x[0] - c[1] * x[1].exp()])

    def solve(c):
        return optim.root(equations, torch.ones(2, dtype=DOUBLE), (c,), implicit=True).x

    assert gradcheck(solve, (c,), eps=1e-6, atol=1e-6)
    assert gradgradcheck(solve, (c,), eps=1e-5, atol=1e-4)


def test_what_is_at_a_bound_does_not_move():
    c = torch.tensor([2.0, 0.2, -3.0], dtype=DOUBLE, requires_grad=True)

    def fun(x, c):
        return ((x - c) ** 2).sum() + 0.5 * (x.sum() - 1) ** 2

    result = optim.minimize(fun, torch.zeros(3, dtype=DOUBLE), (c,), bounds=(-1.0, 1.0), implicit=True)
    assert result.active_mask.tolist() == [1, 0, -1]
    J = torch.stack([torch.autograd.grad(part, c, retain_graph=True)[0] for part in result.x])
    expected = torch.zeros(3, 3, dtype=DOUBLE)
    expected[1, 1] = 2 / 3
    torch.testing.assert_close(J, expected)


def test_many_unknowns_are_solved_by_products():
    n = 1500
    scale = torch.ones(n, dtype=DOUBLE, requires_grad=True)

    def fun(x, scale):
        return (scale * x.square()).sum() / 2 + 0.1 * (x[1:] * x[:-1]).sum() - x.sum()

    result = optim.minimize(fun, torch.zeros(n, dtype=DOUBLE), (scale,), implicit=True)
    assert result.success
    (found,) = torch.autograd.grad(result.x.sum(), scale)
    H = torch.eye(n, dtype=DOUBLE)
    H.diagonal(1).fill_(0.1)
    H.diagonal(-1).fill_(0.1)
    x = torch.linalg.solve(H, torch.ones(n, dtype=DOUBLE))
    torch.testing.assert_close(
        found, -x * torch.linalg.solve(H, torch.ones(n, dtype=DOUBLE)), rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("front", ["least_squares", "minimize"])
def test_batches(front):
    t = torch.linspace(0, 2, 5, dtype=DOUBLE)
    generator = torch.Generator().manual_seed(0)
    y = torch.exp(-t) + 0.1 * torch.randn(3, 5, generator=generator, dtype=DOUBLE)

    def residual(p, y):
        return p[:, :1] * torch.exp(-p[:, 1:] * t) - y

    def solve(y):
        x0 = torch.ones(3, 2, dtype=DOUBLE)
        if front == "least_squares":
            return optim.least_squares(
                residual, x0, (y,), batched=True, implicit=True, xtol=1e-14, gtol=1e-15
            ).x
        return optim.minimize(
            lambda p, y: residual(p, y).square().sum(1), x0, (y,), batched=True, implicit=True, **TIGHT
        ).x

    assert gradcheck(solve, (y.requires_grad_(),), eps=1e-6, atol=1e-5)
    result = solve(y)
    (g,) = torch.autograd.grad(result[0].sum(), y)
    assert not g[1:].any()
    assert g[0].any()


def test_structures_stay():
    c = torch.tensor(3.0, dtype=DOUBLE, requires_grad=True)
    result = optim.minimize(
        lambda x, c: (x["a"] - c).square().sum(), {"a": torch.zeros(2, dtype=DOUBLE)}, (c,), implicit=True
    )
    (g,) = torch.autograd.grad(result.x["a"].sum(), c)
    assert float(g) == pytest.approx(2.0)


def test_nothing_to_differentiate_is_nothing_done():
    result = optim.minimize(
        lambda x, c: (x - c).square().sum(), torch.zeros(2), (torch.ones(2),), implicit=True
    )
    assert not result.x.requires_grad
    assert "implicit_error" not in result


def test_a_flat_solution_is_no_function():
    c = torch.ones((), dtype=DOUBLE, requires_grad=True)
    with pytest.raises(RuntimeError, match="not a differentiable function of args.* Add a penalty"):
        optim.minimize(lambda x, c: (x[0] - x[1] - c) ** 2, torch.zeros(2, dtype=DOUBLE), (c,), implicit=True)
