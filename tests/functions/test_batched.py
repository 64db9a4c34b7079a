"""Many problems at once: each as if it were alone."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize

import optim
from optim.functions.batched import control as batched_control
from optim.functions.batched.factors import cholesky_solve, least_squares_solve
from optim.methods import control

DOUBLE = torch.float64
T = torch.linspace(0, 4, 40, dtype=DOUBLE)


def decays(count, seed=0, dtype=DOUBLE):
    """Noisy decays, a row each, and starts."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(count, 3, generator=generator, dtype=DOUBLE) * torch.tensor([4.0, 2.0, 1.0]) + 0.3
    y = p[:, :1] * torch.exp(-p[:, 1:2] * T) + p[:, 2:]
    y = y + 0.01 * torch.randn(y.shape, generator=generator, dtype=DOUBLE)
    return y.to(dtype), torch.ones(count, 3, dtype=dtype)


def residual(p, y):
    """Of the batch."""
    t = T.to(p)
    return p[:, :1] * torch.exp(-p[:, 1:2] * t) + p[:, 2:] - y


def alone(p, y):
    """Of one problem."""
    return p[0] * torch.exp(-p[1] * T) + p[2] - y


def test_fits_are_scipys():
    y, x0 = decays(200)
    result = optim.least_squares(residual, x0, (y,), batched=True)
    assert bool(result.success.all()), result
    for i in range(0, 200, 10):

        def fun(p, i=i):
            return p[0] * np.exp(-p[1] * T.numpy()) + p[2] - y[i].numpy()

        theirs = optimize.least_squares(fun, np.ones(3), xtol=1e-14, ftol=1e-14, gtol=1e-14)
        np.testing.assert_allclose(result.x[i].numpy(), theirs.x, rtol=1e-6)
        assert float(result.cost[i]) == pytest.approx(theirs.cost, rel=1e-9)
    torch.testing.assert_close(result.fun, residual(result.x, y))
    gradient = torch.autograd.functional.vjp(lambda p: residual(p, y), result.x, result.fun)[1]
    torch.testing.assert_close(result.grad, gradient, rtol=1e-6, atol=1e-12)


def test_a_batch_of_one_is_the_problem():
    y, x0 = decays(5)
    for i in range(5):
        one = optim.least_squares(residual, x0[i : i + 1], (y[i : i + 1],), batched=True)
        single = optim.least_squares(alone, x0[i], (y[i],))
        torch.testing.assert_close(one.x[0], single.x, rtol=1e-8, atol=0.0)
        value = optim.minimize(lambda p, y: alone(p, y).square().sum(), x0[i], (y[i],))
        batch = optim.minimize(
            lambda p, y: residual(p, y).square().sum(1), x0[i : i + 1], (y[i : i + 1],), batched=True
        )
        assert bool(batch.success)
        torch.testing.assert_close(batch.x[0], value.x, rtol=1e-7, atol=0.0)


@pytest.mark.parametrize("front", ["least_squares", "minimize"])
def test_other_problems_change_nothing(front):
    """Their order, and one that is not finite."""
    y, x0 = decays(64)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))

    def solve(y, x0):
        if front == "least_squares":
            return optim.least_squares(residual, x0, (y,), batched=True)
        return optim.minimize(lambda p, y: residual(p, y).square().sum(1), x0, (y,), batched=True)

    plain, turned = solve(y, x0), solve(y[order], x0[order])
    torch.testing.assert_close(turned.x, plain.x[order], rtol=1e-12, atol=1e-14)
    assert turned.status == [plain.status[i] for i in order]
    spoilt = y.clone()
    spoilt[7, 3] = math.nan
    result = solve(spoilt, x0)
    assert result.status[7] == "non_finite"
    others = torch.arange(64) != 7
    assert bool(result.success[others].all())
    torch.testing.assert_close(result.x[others], plain.x[others], rtol=1e-12, atol=1e-14)
    assert "63 of 64 problems converged; 1 non_finite" in result.message


def test_a_function_of_one_problem_is_mapped():
    y, x0 = decays(32)
    batch = optim.least_squares(residual, x0, (y,), batched=True)
    mapped = optim.least_squares(lambda p, t, y: alone(p, y), x0, (T, y.T), in_dims=(None, 1))
    torch.testing.assert_close(mapped.x, batch.x, rtol=1e-10, atol=0.0)
    values = optim.minimize(lambda p, y: alone(p, y).square().sum(), x0, (y,), in_dims=0)
    torch.testing.assert_close(values.x, batch.x, rtol=1e-6, atol=0.0)


def test_data_that_are_not_arguments_are_found_out():
    """They can not be cut down to the problems that are left."""
    y, x0 = decays(32)
    result = optim.least_squares(lambda p: residual(p, y), x0, batched=True)
    torch.testing.assert_close(result.x, optim.least_squares(residual, x0, (y,), batched=True).x)


def test_x_of_any_shape():
    y, x0 = decays(8)
    result = optim.least_squares(lambda p, y: residual(p[:, 0], y), x0.unsqueeze(1), (y,), batched=True)
    assert result.x.shape == result.grad.shape == (8, 1, 3)
    assert bool(result.success.all())


def test_single_precision():
    y, x0 = decays(32, dtype=torch.float32)
    result = optim.least_squares(residual, x0, (y,), batched=True)
    assert result.x.dtype == torch.float32
    assert float(result.success.float().mean()) > 0.9
    expected = optim.least_squares(residual, x0.double(), (y.double(),), batched=True).x
    torch.testing.assert_close(result.x.double(), expected, rtol=1e-3, atol=1e-3)


def test_saddles_are_left_and_flat_ones_named():
    x0 = torch.zeros(3, 2, dtype=DOUBLE)
    x0[1] = torch.tensor([1.0, 0.5])

    def fun(x):
        return x[:, 0] ** 2 + (x[:, 1] ** 2 - 1) ** 2

    result = optim.minimize(fun, x0, batched=True)
    assert bool(result.success.all())
    torch.testing.assert_close(
        result.x.abs(), torch.tensor([[0.0, 1.0]] * 3, dtype=DOUBLE), rtol=1e-6, atol=1e-6
    )
    flat = optim.minimize(lambda x: (x[:, 0] - x[:, 1]) ** 2, x0 + 1, batched=True)
    assert set(flat.status) == {"flat"}
    assert not bool(flat.success.any())


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_saddles_that_steps_lead_to_are_left(scale):
    """From there the gradient has no part along the negative curvature, small beside the other or not."""
    x0 = torch.tensor([[1.0, 0.0], [-3.0, 0.0], [1.0, 2.0]], dtype=DOUBLE)

    def fun(x):
        return x[:, 0] ** 2 / scale + scale * (x[:, 1] ** 4 / 4 - x[:, 1] ** 2)

    result = optim.minimize(fun, x0, batched=True)
    assert set(result.status) == {"converged"}
    expected = torch.tensor([[0.0, math.sqrt(2)]] * 3, dtype=DOUBLE)
    torch.testing.assert_close(result.x.abs(), expected, rtol=1e-6, atol=1e-6)


def test_what_has_no_minimum():
    x0 = torch.tensor([[1.0], [2.0]], dtype=DOUBLE)
    result = optim.minimize(
        lambda x: torch.where(x[:, 0] < 1.5, x[:, 0] ** 2, -(x[:, 0] ** 2)), x0, batched=True
    )
    assert result.status == ["converged", "unbounded"]


def test_a_parameter_without_effect_is_singular():
    y = decays(4)[0]
    result = optim.least_squares(
        lambda p, y: residual(p[:, :3], y), torch.ones(4, 4, dtype=DOUBLE), (y,), batched=True
    )
    assert set(result.status) == {"singular"}


@given(
    rho=st.lists(st.one_of(st.floats(-3, 3), st.just(-math.inf)), min_size=1, max_size=8),
    size=st.floats(1e-8, 1e8),
    growth=st.floats(2, 1e5),
    length=st.floats(0, 10),
)
def test_control_is_that_of_one_problem(rho, size, growth, length):
    ratios = torch.tensor(rho, dtype=DOUBLE)
    ones = torch.ones_like(ratios)
    dampings, growths = batched_control.nielsen_damping(size * ones, growth * ones, ratios)
    radii = batched_control.trust_radius(size * ones, ratios, length * ones)
    for i, ratio in enumerate(rho):
        assert (float(dampings[i]), float(growths[i])) == pytest.approx(
            control.nielsen_damping(size, growth, ratio)
        )
        assert float(radii[i]) == pytest.approx(control.trust_radius(size, ratio, length))


@given(
    n=st.integers(1, 7),
    m=st.integers(1, 20),
    seed=st.integers(0, 999),
    damping=st.sampled_from([0.0, 1e-8, 1.0]),
)
def test_factors_against_lapack(n, m, seed, damping):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(5, m, n, generator=generator, dtype=DOUBLE)
    b = torch.randn(5, m, generator=generator, dtype=DOUBLE)
    dampings = torch.full((5,), damping, dtype=DOUBLE)
    if m >= n or damping:
        x, _ = least_squares_solve(A.unbind(2), b, dampings)
        root = damping**0.5 * torch.eye(n, dtype=DOUBLE).expand(5, n, n)
        whole, target = torch.cat([A, root], 1), torch.cat([b, torch.zeros(5, n, dtype=DOUBLE)], 1)
        expected = torch.linalg.lstsq(whole, target.unsqueeze(2)).solution[:, :, 0]
        torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
    S = A.transpose(1, 2) @ A + torch.eye(n, dtype=DOUBLE)
    g = torch.randn(5, n, generator=generator, dtype=DOUBLE)
    solution, pivot = cholesky_solve(S, g)
    torch.testing.assert_close(solution, torch.linalg.solve(S, g))
    pivots = torch.linalg.cholesky(S).diagonal(dim1=1, dim2=2).square().amin(1)
    torch.testing.assert_close(pivot, pivots)


def test_nearly_dependent_columns_are_solved_as_lapack_does():
    """By squares of the condition a normal equation would lose all digits: 1e9 here."""
    generator = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(3, 12, 4, generator=generator, dtype=DOUBLE)).Q
    V = torch.linalg.qr(torch.randn(3, 4, 4, generator=generator, dtype=DOUBLE)).Q
    A = U @ torch.diag(torch.tensor([1.0, 1e-3, 1e-6, 1e-9], dtype=DOUBLE)) @ V.transpose(1, 2)
    x = torch.ones(3, 4, dtype=DOUBLE)
    b = (A @ x.unsqueeze(2))[:, :, 0]
    found, _ = least_squares_solve(A.unbind(2), b, torch.zeros(3, dtype=DOUBLE))
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


def test_no_tensor_is_made_without_a_device():
    """Under another default device, data on the CPU stay there."""
    y, x0 = decays(8)
    plain = optim.least_squares(residual, x0, (y,), batched=True)
    values = optim.minimize(lambda p, y: residual(p, y).square().sum(1), x0, (y,), batched=True)
    with torch.device("meta"):
        result = optim.least_squares(residual, x0, (y,), batched=True)
        other = optim.minimize(lambda p, y: residual(p, y).square().sum(1), x0, (y,), batched=True)
    assert torch.equal(result.x, plain.x)
    assert torch.equal(other.x, values.x)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"bounds": (0.0, 1.0)}, ValueError, "batched least_squares takes no bounds"),
        ({"loss": "huber"}, ValueError, "batched least_squares takes no loss, got 'huber'"),
        ({"in_dims": (0, None)}, ValueError, "in_dims must have an entry for each of 1 args, got 2"),
        ({"in_dims": 1}, ValueError, r"args\[0\] must have 4 problems in dimension 1, got \(4, 40\)"),
    ],
)
def test_what_a_batch_is_not(options, error, text):
    y, x0 = decays(4)
    with pytest.raises(error, match=text):
        optim.least_squares(residual, x0, (y,), batched=True, **options)


def test_what_a_batch_may_not_return():
    y, x0 = decays(4)
    with pytest.raises(
        ValueError, match=r"fun must return 4 rows, one for each problem, got shape \(40, 4\)"
    ):
        optim.least_squares(lambda p, y: residual(p, y).T, x0, (y,), batched=True)
    with pytest.raises(ValueError, match=r"one number for each problem, got shape \(4, 40\)"):
        optim.minimize(residual, x0, (y,), batched=True)
    with pytest.raises(TypeError, match="x0 must be of float64 or float32, got torch.int64"):
        optim.minimize(residual, x0.long(), (y,), batched=True)


def test_problems_that_are_done_are_not_evaluated_again():
    sizes = []

    def fun(x, a):
        sizes.append(len(x))
        return ((x - a) ** 4).sum(1) + (x - a).square().sum(1)

    x0 = torch.zeros(10, 2, dtype=DOUBLE)
    a = torch.zeros(10, 2, dtype=DOUBLE)
    a[0] = 3.0
    result = optim.minimize(fun, x0, (a,), batched=True)
    assert bool(result.success.all())
    # Nine are at their minimum: after the first look at all, and at samples, there is one.
    assert sizes[0] == 10
    assert max(sizes[1:]) <= 3
    assert sizes[-1] == 1
    assert result.nit.tolist() == [result.nfev - 1] + [0] * 9


def test_the_last_step_may_be_the_one_that_converges():
    x0 = torch.ones(3, 2, dtype=DOUBLE)
    quadratic = optim.minimize(lambda x: (x - 3).square().sum(1) + 1, x0, batched=True, max_iter=2)
    assert bool(quadratic.success.all()), quadratic.message
    short = optim.minimize(lambda x: (x - 3).cosh().sum(1), x0, batched=True, max_iter=2)
    assert set(short.status) == {"max_iter"}
