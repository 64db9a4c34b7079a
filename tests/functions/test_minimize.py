import math

import numpy as np
import pytest
import torch
import zoo

import optim


@pytest.mark.parametrize("method", ["newton", "newton-cg"])
def test_finds_the_published_minimizer(problem, method):
    result = optim.minimize(problem.func, problem.x0(), method=method, gtol=1e-9)
    assert result.success, result
    assert result.fun == pytest.approx(problem.minimum, abs=1e-9)
    # The Hessian of Powell's function is singular at the minimiser: x is known to gtol^(1/3) only.
    tolerance = 1e-2 if problem.name == "powell_singular" else 1e-6
    torch.testing.assert_close(
        result.x, torch.tensor(problem.minimizer, dtype=torch.float64), rtol=tolerance, atol=tolerance
    )
    assert float(result.jac.abs().max()) <= 1e-9
    torch.testing.assert_close(result.fun, problem.func(result.x).item())


def test_quadratic_in_one_step():
    A, b = zoo.spd_matrix(8, 100.0, 1), zoo.vector(8, 2)
    result = optim.minimize(lambda x: 0.5 * x @ A @ x - b @ x, torch.zeros_like(b), radius=1e3)
    assert (result.status, result.nit, result.nfev, result.nhev) == ("converged", 1, 2, 2)
    torch.testing.assert_close(result.x, torch.linalg.solve(A, b))


def test_leaves_an_exact_saddle():
    result = optim.minimize(lambda x: x[0] ** 2 + (x[1] ** 2 - 1) ** 2, torch.zeros(2, dtype=torch.float64))
    assert result.success
    assert result.x.abs().tolist() == pytest.approx([0.0, 1.0], abs=1e-8)


def test_shape_and_dtype_are_those_of_the_start():
    x0 = torch.zeros(2, 3)
    target = torch.arange(6.0).view(2, 3)
    result = optim.minimize(lambda x: (x - target).square().sum(), x0)
    assert result.x.shape == result.jac.shape == (2, 3)
    assert result.x.dtype == torch.float32
    torch.testing.assert_close(result.x, target, rtol=1e-3, atol=1e-3)
    assert torch.equal(x0, torch.zeros(2, 3))


def test_an_unreachable_tolerance_ends_at_the_noise_floor():
    A, b = zoo.spd_matrix(8, 1e4, 1).float(), zoo.vector(8, 2).float()
    result = optim.minimize(lambda x: 0.5 * x @ A @ x - b @ x, torch.zeros(8), gtol=1e-30)
    assert result.status == "noise_floor"
    assert not result.success
    assert "rounding" in result.message


def test_infinite_trials_are_survived():
    """Newton's step from 0.01 leaves the domain of the logarithm again and again."""
    result = optim.minimize(lambda x: (x - torch.log(x)).sum(), torch.full((2,), 5.0, dtype=torch.float64))
    assert result.success
    torch.testing.assert_close(result.x, torch.ones(2, dtype=torch.float64), rtol=1e-7, atol=1e-7)


def test_iteration_limit_and_callback():
    rosenbrock, seen = zoo.PROBLEMS[0], []
    assert optim.minimize(rosenbrock.func, rosenbrock.x0(), max_iter=2).status == "max_iter"

    def callback(state):
        seen.append(state.fun)
        return len(seen) == 3

    assert optim.minimize(rosenbrock.func, rosenbrock.x0(), callback=callback).status == "stopped"
    assert seen == sorted(seen, reverse=True)
    assert len(seen) == 3


def test_gradients_of_captured_tensors_are_untouched():
    captured = torch.ones(2, dtype=torch.float64, requires_grad=True)
    x0 = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optim.minimize(lambda x: (x - captured).square().sum(), x0)
    assert captured.grad is None
    assert x0.grad is None


def test_repr_is_readable():
    text = repr(optim.minimize(lambda x: x.square().sum(), torch.ones(2)))
    lines = dict(line.strip().split(": ", 1) for line in text.splitlines())
    assert lines["status"] == "converged"
    assert lines["x"].startswith("tensor([")
    counted = {"nit", "nfev", "njev", "nhev", "history"}
    assert set(lines) == {"x", "fun", "jac", "status", "success", "message"} | counted


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        ((lambda x: x.sum(), "ab"), {}, TypeError, "x0 must hold real floating-point numbers, .* got str"),
        ((lambda x: x.sum(), np.array([1])), {}, TypeError, "got int64"),
        ((lambda x: x.sum(), [[1.0], [1.0, 2.0]]), {}, TypeError, "got list"),
        ((lambda x: x.sum(), torch.ones(2) + 1j), {}, TypeError, "got torch.complex64"),
        ((lambda x: x.sum() * 1j, torch.ones(2)), {}, TypeError, "fun must return a real number"),
        ((lambda x: x.sum(), torch.ones(2).long()), {}, TypeError, "got torch.int64"),
        ((lambda x: x, torch.ones(2)), {}, ValueError, r"single element, got shape \(2,\)"),
        ((lambda x: 1.0, torch.ones(2)), {}, TypeError, "fun must return a tensor, got float"),
        ((lambda x: x.sum() * math.nan, torch.ones(2)), {}, ValueError, r"fun\(x0\) must be finite, got nan"),
        ((lambda x: torch.ones(()), torch.ones(2)), {}, ValueError, "must depend on x"),
        ((lambda x: x.sum(), torch.ones(2)), {"method": "bfgs"}, ValueError, "method must be one of 'auto'"),
        (
            (lambda x: x.sum(), torch.ones(2)),
            {"gtol": -1.0},
            ValueError,
            "gtol must be a non-negative number",
        ),
        (
            (lambda x: x.sum(), torch.ones(2)),
            {"max_iter": 0},
            ValueError,
            "max_iter must be a positive integer",
        ),
    ],
)
def test_bad_input(arguments, options, error, text):
    with pytest.raises(error, match=text):
        optim.minimize(*arguments, **options)


@pytest.mark.parametrize("method", ["newton", "newton-cg"])
def test_nan_is_never_called_converged(method):
    with pytest.raises(ValueError, match="gradient of fun at x0 must be finite"):
        optim.minimize(lambda x: x.square().sum() + (0 * x).sqrt().sum(), torch.ones(2), method=method)
    result = optim.minimize(lambda x: x.abs().pow(1.5).sum(), torch.tensor([0.0, 1.0]), method=method)
    assert result.status == "non_finite"


def test_unbounded_functions_end():
    x0 = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    assert optim.minimize(lambda x: -x.square().sum(), x0).status == "unbounded"
    assert optim.minimize(lambda x: x.sum(), x0).status == "unbounded"


def test_a_constant_branch_is_not_entered():
    def fun(x):
        return (x - 3).square().sum() if x.sum() < 5 else torch.zeros(())

    result = optim.minimize(fun, torch.zeros(2), max_iter=20)
    assert result.fun < 18.0


def test_callback_sees_a_running_state():
    seen = []
    optim.minimize(zoo.PROBLEMS[0].func, zoo.PROBLEMS[0].x0(), callback=lambda s: seen.append(s.status))
    assert set(seen) == {"running"}


def stationary(name, dtype):
    """A function of 600 unknowns whose gradient at zero is zero, which is no minimum."""
    rates = torch.logspace(-2, 0, 599, dtype=dtype)

    def fun(x):
        if name == "maximum":
            return x.cos().sum()
        along = x[0].pow(4) / 4 - {"saddle": 1.0, "slight_saddle": 0.02}[name] * x[0].square()
        return along + (rates * x[1:].square()).sum()

    return fun


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("start", [0.0, 1e-12])
@pytest.mark.parametrize("name", ["maximum", "saddle", "slight_saddle"])
def test_products_leave_saddles_and_maxima(name, start, dtype):
    """By default, with as many unknowns; torch's random state stays what it was."""
    fun, random = stationary(name, dtype), torch.get_rng_state()
    result = optim.minimize(fun, torch.full((600,), start, dtype=dtype))
    assert result.success, result
    assert "60 Lanczos steps" in result.message
    assert torch.equal(torch.get_rng_state(), random)
    values = torch.linalg.eigvalsh(torch.autograd.functional.hessian(fun, result.x))
    assert float(values[0]) > -math.sqrt(torch.finfo(dtype).eps)
    assert result.fun < float(fun(torch.zeros(600, dtype=dtype)))


def test_a_start_at_the_minimum_is_one():
    for n in (1, 2, 30):
        x0 = torch.zeros(n, dtype=torch.float64)
        result = optim.minimize(lambda x: x.square().sum(), x0, method="newton-cg")
        assert (result.status, result.nit) == ("converged", 0)


def test_curvature_that_is_not_finite_is_no_minimum():
    """Found where the gradient is zero: ``|x|^1.5`` has none at zero that is finite."""
    result = optim.minimize(
        lambda x: x.abs().pow(1.5).sum(), torch.zeros(2, dtype=torch.float64), method="newton-cg"
    )
    assert result.status == "non_finite"


@pytest.mark.parametrize("method", ["newton", "newton-cg"])
def test_stop_iteration_in_the_callback_stops(method):
    rosenbrock, seen = zoo.PROBLEMS[0], []

    def callback(state):
        seen.append(state.fun)
        if len(seen) == 2:
            raise StopIteration

    result = optim.minimize(rosenbrock.func, rosenbrock.x0(), method=method, callback=callback)
    assert result.status == "stopped"
    assert not result.success
    assert len(seen) == 2
    assert result.fun == seen[-1]


def test_stop_iteration_in_the_function_is_an_error():
    values = iter([1.0])
    with pytest.raises(StopIteration):
        optim.minimize(lambda x: next(values) + x.square().sum(), torch.ones(2))


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("constraints", "Write x as a function of free variables"),
        ("tol", "Give gtol"),
        ("options", "Give gtol, max_iter or radius"),
        ("maxiter", "Give max_iter"),
        ("methods", "Did you mean method?"),
        ("frobnicate", ""),
    ],
)
def test_arguments_of_other_minimisers_are_named(name, remedy):
    text = f"minimize got an unexpected argument '{name}'; it takes args, "
    with pytest.raises(TypeError) as caught:
        optim.minimize(lambda x: x.sum(), torch.ones(2), **{name: None})
    assert str(caught.value).startswith(text)
    assert remedy in str(caught.value)


def test_tolerances_of_zero_are_met_by_no_point():
    """The run goes on to the noise floor, as the last digit of the minimum asks."""
    off = dict(gtol=0.0, xtol=0.0, ftol=0.0)
    x0 = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    result = optim.minimize(lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2 + 1, x0, **off)
    torch.testing.assert_close(result.x, torch.ones_like(x0), rtol=1e-10, atol=0)
    fit = optim.least_squares(lambda x: torch.stack([1 - x[0], 10 * (x[1] - x[0] ** 2)]), x0, **off)
    torch.testing.assert_close(fit.x, torch.ones_like(x0), rtol=1e-12, atol=0)
