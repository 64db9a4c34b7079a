"""Where ``minimize`` stops, and what it counted until there."""

import pytest
import torch
import zoo

import optim


@pytest.mark.parametrize("method", ["newton", "newton-cg"])
@pytest.mark.parametrize("max_iter", [1, 2, 3, 7])
def test_rejected_steps_are_bounded_too(method, max_iter):
    """The first radii lead out of the domain of the logarithm."""
    x0 = torch.tensor([5.0, 70.0], dtype=torch.float64)
    result = optim.minimize(lambda x: (x - x.log()).sum(), x0, method=method, max_iter=max_iter, gtol=1e-12)
    assert (result.status, result.nit) == ("max_iter", max_iter)
    if method == "newton":
        assert result.nfev == 1 + max_iter
        assert result.nhev <= max_iter


@pytest.mark.parametrize("method", ["newton", "newton-cg"])
def test_what_is_counted_is_what_is_called(problem, method):
    calls = 0

    def fun(x):
        nonlocal calls
        calls += 1
        return problem.func(x)

    result = optim.minimize(fun, problem.x0(), method=method)
    assert result.success
    assert calls == result.nfev >= result.njev
    if method == "newton":
        assert result.nfev == result.nit + 1
        assert result.nhev == result.njev


@pytest.mark.parametrize("method", ["newton", "newton-cg"])
def test_steps_below_the_spacing_of_numbers_end(method):
    """At 0.2 the gradient is 6e-17, and the step half of the spacing."""
    x0 = torch.tensor([0.2], dtype=torch.float64)
    result = optim.minimize(
        lambda x: (x - 0.1).square().sum() + (x - 0.3).square().sum(), x0, method=method, gtol=1e-30
    )
    assert result.status == "noise_floor"
    assert result.nit <= 5
    assert torch.equal(result.x, x0)


@pytest.mark.parametrize("method", ["newton", "newton-cg"])
def test_a_kink_is_reached_and_left_alone(method):
    """There the gradient promises a decrease from either side, and the rounding of the value allows it."""
    x0 = torch.ones(1, dtype=torch.float64)
    result = optim.minimize(lambda x: (x - 0.3).abs().sum() + x.square().sum(), x0, method=method)
    assert result.status in ("noise_floor", "radius")
    assert result.nit < 150
    torch.testing.assert_close(result.x, torch.full_like(x0, 0.3), rtol=1e-12, atol=0.0)


def test_the_unit_of_the_function_changes_no_step(problem):
    """Of "newton"; Steihaug's CG is solved to the root of the gradient."""
    seen = []
    for factor in (1.0, 2.0**20):
        path = []
        optim.minimize(
            lambda x, factor=factor: factor * problem.func(x),
            problem.x0(),
            method="newton",
            gtol=factor * 1e-6,
            callback=lambda state, path=path: path.append(state.x),
        )
        seen.append(torch.stack(path))
    # The last steps depend on gradients that are zero to rounding of a value of about one.
    length = min(map(len, seen)) - 1
    assert length >= 5
    torch.testing.assert_close(seen[0][:length], seen[1][:length], rtol=1e-7, atol=1e-9)


def test_a_rotation_of_the_variables_turns_the_path(problem):
    x0 = problem.x0()
    Q = torch.linalg.qr(zoo.spd_matrix(len(x0), 10.0, 5) + torch.ones(len(x0), len(x0)))[0]
    results = [
        optim.minimize(problem.func, x0, x_scale="none"),
        optim.minimize(lambda z: problem.func(Q.T @ z), Q @ x0, x_scale="none"),
    ]
    assert abs(results[0].nit - results[1].nit) <= 1
    assert results[1].fun == pytest.approx(results[0].fun, abs=1e-12)


@pytest.mark.parametrize("method", ["newton", "newton-cg"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_hilltop_at_zero_is_left(method, dtype):
    """The first trial ends where the function is zero again: a smaller radius is asked for."""
    result = optim.minimize(lambda x: (x**4 - x**2).sum(), torch.zeros(3, dtype=dtype), method=method)
    assert result.success
    torch.testing.assert_close(result.x.abs(), torch.full((3,), 0.5**0.5, dtype=dtype), rtol=1e-3, atol=0.0)


def test_what_is_no_start_or_callback():
    with pytest.raises(TypeError, match=r"got torch.float16; use x0.float\(\)"):
        optim.minimize(lambda x: x.sum(), torch.zeros(1, dtype=torch.float16))
    with pytest.raises(TypeError, match="callback must be a function of an OptimizeResult, got int"):
        optim.minimize(lambda x: x.square().sum(), torch.ones(1), callback=3)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"inference_mode\(\) takes away"):
        optim.minimize(lambda x: x.square().sum(), torch.ones(1))
    assert optim.minimize(lambda x: x.sum() + 0 * x.square().sum(), torch.zeros(0)).status == "converged"
