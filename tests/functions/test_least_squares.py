"""Least squares against SciPy, dense algebra and its own invariances."""

import itertools
import math

import numpy as np
import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize

import optim
from optim.functions.robust import CURVED, Robust

DOUBLE = torch.float64
# Of minimisers that both sides solve to rounding.
TIGHT = 1e-8


def decay(seed=0, noise=0.05, outliers=0):
    """Two exponentials, some points far off."""
    random = np.random.default_rng(seed)
    t = torch.linspace(0, 4, 60, dtype=DOUBLE)
    y = 2 * torch.exp(-1.3 * t) + 0.5 * torch.exp(-0.2 * t) + noise * torch.tensor(random.standard_normal(60))
    y[torch.tensor(random.choice(60, outliers, replace=False), dtype=torch.long)] += 3.0

    def residual(p):
        return p[0] * torch.exp(-p[1] * t) + p[2] * torch.exp(-p[3] * t) - y

    return residual, torch.tensor([1.0, 1.0, 1.0, 0.1], dtype=DOUBLE)


def single(seed, outliers):
    """One exponential and a constant, which are well determined."""
    residual, x0 = decay(seed, outliers=outliers)
    return lambda p: residual(torch.cat([p, p.new_zeros(1)])), x0[:3]


def scipys(residual, x0, **options):
    """SciPy's, to the last digit."""

    def fun(x):
        return residual(torch.as_tensor(x, dtype=DOUBLE)).numpy()

    def jac(x):
        return torch.autograd.functional.jacobian(residual, torch.as_tensor(x, dtype=DOUBLE)).numpy()

    tight = dict(xtol=1e-15, ftol=None, gtol=1e-15, x_scale="jac", max_nfev=2000)
    return optimize.least_squares(fun, x0.numpy(), jac=jac, **{**tight, **options})


@pytest.mark.parametrize("seed", range(3))
def test_the_minimiser_is_scipys(seed):
    residual, x0 = decay(seed)
    result, theirs = optim.least_squares(residual, x0), scipys(residual, x0)
    assert result.success, result
    torch.testing.assert_close(result.x, torch.tensor(theirs.x), rtol=TIGHT, atol=0.0)
    assert result.cost == pytest.approx(theirs.cost, rel=1e-12)
    torch.testing.assert_close(result.fun, residual(result.x))
    torch.testing.assert_close(result.jac, torch.autograd.functional.jacobian(residual, result.x))
    torch.testing.assert_close(result.grad, result.jac.T @ result.fun)
    assert result.optimality <= 1e-6
    assert result.rank == 4


@pytest.mark.parametrize("loss", ["huber", "soft_l1", "cauchy"])
@pytest.mark.parametrize("f_scale", [0.1, 0.7])
def test_robust_losses_are_scipys(loss, f_scale):
    residual, x0 = single(1, outliers=6)
    result = optim.least_squares(residual, x0, loss=loss, f_scale=f_scale, xtol=1e-13, gtol=1e-13)
    theirs = scipys(residual, x0, loss=loss, f_scale=f_scale)
    assert result.success, result
    torch.testing.assert_close(result.x, torch.tensor(theirs.x), rtol=TIGHT, atol=0.0)
    assert result.cost == pytest.approx(theirs.cost, rel=1e-12)
    weights = Robust.of(loss, f_scale).slopes(result.fun)
    z = (torch.tensor(theirs.fun) / f_scale).square()
    expected = {"huber": z.clamp(min=1).rsqrt(), "soft_l1": (1 + z).rsqrt(), "cauchy": 1 / (1 + z)}[loss]
    torch.testing.assert_close(weights, expected, rtol=TIGHT, atol=0.0)
    assert float(weights.min()) < 0.5


def test_a_loss_of_the_users_own_is_scipys():
    def loss(z):
        z = z.numpy()
        rho = [np.arctan(z), 1 / (1 + z**2), -2 * z / (1 + z**2) ** 2]
        return np.stack([np.asarray(part) for part in rho])

    residual, x0 = single(2, outliers=3)
    result = optim.least_squares(residual, x0, loss=loss, f_scale=0.5)
    theirs = scipys(residual, x0, loss="arctan", f_scale=0.5)
    torch.testing.assert_close(result.x, torch.tensor(theirs.x), rtol=TIGHT, atol=0.0)


def test_the_biweight_leaves_outliers_out():
    """The minimiser is that of weighted squares, with the weights that it gives itself."""
    residual, x0 = decay(3, outliers=8)
    near = optim.least_squares(residual, x0, loss="soft_l1", f_scale=0.1).x
    result = optim.least_squares(residual, near, loss="tukey", f_scale=0.5)
    assert result.success, result
    weights = Robust.of("tukey", 0.5).slopes(result.fun)
    assert int((weights == 0).sum()) == 8
    weighted = optim.least_squares(residual, result.x, weights=weights)
    torch.testing.assert_close(weighted.x, result.x, rtol=1e-6, atol=0.0)


@given(
    loss=st.sampled_from(["huber", "soft_l1", "cauchy", "tukey"]),
    scale=st.floats(0.1, 10.0),
    seed=st.integers(0, 999),
)
def test_corrected_residuals_have_the_losses_gradient_and_curvature(loss, scale, seed):
    """Of one residual each: against torch's derivatives of the cost in r."""
    generator = torch.Generator().manual_seed(seed)
    r = torch.randn(6, generator=generator, dtype=DOUBLE)
    robust = Robust.of(loss, scale)
    scaled, factors = robust.corrected(r, torch.ones(6, 1, dtype=DOUBLE))

    def cost(r):
        z = (r / scale).square()
        rho = {
            "huber": torch.where(z <= 1, z, 2 * z.clamp(min=1).sqrt() - 1),
            "soft_l1": 2 * ((1 + z).sqrt() - 1),
            "cauchy": torch.log1p(z),
            "tukey": (1 - (1 - z).clamp(min=0).pow(3)) / 3,
        }[loss]
        return 0.5 * scale**2 * rho.sum()

    gradient = torch.autograd.functional.jacobian(cost, r)
    curvature = torch.autograd.functional.hessian(cost, r).diagonal()
    torch.testing.assert_close(factors[:, 0] * scaled, gradient, rtol=1e-9, atol=1e-12)
    slopes = robust.slopes(r)
    expected = torch.where(curvature > CURVED * slopes, curvature, slopes)
    torch.testing.assert_close(factors[:, 0].square(), expected, rtol=1e-7, atol=1e-9)
    assert robust.cost(r) == pytest.approx(float(cost(r)), rel=1e-12)
    after = r + 0.1
    assert robust.decrease(r, after) == pytest.approx(float(cost(r) - cost(after)), abs=1e-12)


BOUNDS = [
    ([0.0, 0.0, 0.0, 0.25], [10.0, 10.0, 10.0, 10.0]),
    ([0.0, 0.0, 0.6, 0.0], [1.9, 1.0, 10.0, 10.0]),
    ([-np.inf] * 4, [1.5, np.inf, np.inf, np.inf]),
    ([2.0, 3.0, 4.0, 0.0], [2.5, 3.5, 4.5, 0.05]),
]


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("loss", ["linear", "soft_l1"])
def test_bounds_are_scipys(bounds, loss):
    residual, x0 = decay(4)
    start = torch.clamp(x0, torch.tensor(bounds[0]), torch.tensor(bounds[1]))
    result = optim.least_squares(residual, x0, bounds=bounds, loss=loss)
    inside = np.clip(start.numpy(), np.array(bounds[0]) + 1e-3, np.array(bounds[1]) - 1e-3)
    theirs = scipys(residual, torch.tensor(inside), bounds=bounds, loss=loss)
    assert result.success, result
    assert result.cost <= theirs.cost * (1 + 1e-10)
    torch.testing.assert_close(result.x, torch.tensor(theirs.x), rtol=1e-5, atol=1e-5)
    lower, upper = (torch.tensor(side, dtype=DOUBLE) for side in bounds)
    assert bool(((result.x >= lower) & (result.x <= upper)).all())
    mask = result.active_mask
    assert bool(mask.any())
    # Exactly there, and pushed outwards: the conditions of a minimum.
    assert torch.equal(result.x[mask < 0], lower[mask < 0])
    assert torch.equal(result.x[mask > 0], upper[mask > 0])
    assert bool((result.grad * mask <= 0).all())
    assert result.optimality <= 1e-6


@given(m=st.integers(1, 12), n=st.integers(1, 8), seed=st.integers(0, 999))
def test_a_linear_problem_is_that_of_lstsq(m, n, seed):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(m, n, generator=generator, dtype=DOUBLE)
    b = torch.randn(m, generator=generator, dtype=DOUBLE)
    result = optim.least_squares(lambda x: A @ x - b, torch.zeros(n, dtype=DOUBLE))
    expected = torch.linalg.lstsq(A, b, driver="gelsd").solution
    assert result.cost == pytest.approx(float((A @ expected - b).square().sum() / 2), abs=1e-12)
    if m >= n:
        assert result.success
        torch.testing.assert_close(result.x, expected, rtol=1e-5, atol=1e-7)
    else:
        assert result.rank == m


def test_units_of_the_parameters_change_no_step():
    residual, x0 = decay(5)
    units = torch.tensor([1e6, 1e-4, 1.0, 1e3], dtype=DOUBLE)
    plain = optim.least_squares(residual, x0)
    scaled = optim.least_squares(lambda z: residual(z / units), x0 * units)
    assert (scaled.nfev, scaled.njev) == (plain.nfev, plain.njev)
    torch.testing.assert_close(scaled.x / units, plain.x, rtol=1e-9, atol=0.0)


def test_a_rotation_changes_no_step_without_a_scale():
    residual, x0 = decay(6)
    Q = torch.linalg.qr(zoo.spd_matrix(4, 10.0, 5) + torch.ones(4, 4)).Q
    plain = optim.least_squares(residual, x0, x_scale="none")
    turned = optim.least_squares(lambda z: residual(Q.T @ z), Q @ x0, x_scale="none")
    assert abs(turned.nit - plain.nit) <= 1
    torch.testing.assert_close(Q.T @ turned.x, plain.x, rtol=1e-6, atol=0.0)


def test_units_given_are_the_scale(problem):
    result = optim.least_squares(problem.residual, problem.x0(), x_scale=10.0)
    assert result.cost == pytest.approx(0.0, abs=1e-12)


def test_the_cost_never_rises(problem):
    result = optim.least_squares(problem.residual, problem.x0())
    values = [record.fun for record in result.history]
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(values))
    assert result.cost == pytest.approx(problem.minimum, abs=1e-15)


def test_covariance_is_that_of_a_linear_regression():
    A, x = zoo.spd_matrix(5, 10.0, 1)[:, :3], torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE)
    b = A @ x + 0.1 * zoo.vector(5, 2)
    result = optim.least_squares(lambda x: A @ x - b, torch.zeros(3, dtype=DOUBLE))
    variance = float((A @ result.x - b).square().sum()) / 2
    expected = variance * torch.linalg.inv(A.T @ A)
    torch.testing.assert_close(result.covariance(), expected)
    torch.testing.assert_close(result.covariance(absolute_sigma=True), expected / variance)
    torch.testing.assert_close(result.standard_errors(), expected.diagonal().sqrt())


def test_parameters_at_a_bound_have_no_variance():
    residual, x0 = decay(4)
    result = optim.least_squares(residual, x0, bounds=BOUNDS[0])
    free = result.active_mask == 0
    assert not bool(free.all())
    covariance = result.covariance()
    assert not covariance[~free].any()
    J = result.jac[:, free]
    expected = torch.linalg.inv(J.T @ J) * 2 * result.cost / (60 - int(free.sum()))
    torch.testing.assert_close(covariance[free][:, free], expected, rtol=1e-6, atol=0.0)


def test_what_is_not_determined_is_said():
    """The sum of two parameters alone is seen."""
    t = torch.linspace(0, 1, 10, dtype=DOUBLE)
    result = optim.least_squares(lambda p: (p[0] + p[1]) * t - t.sin(), [1.0, 2.0])
    assert (result.status, result.success, result.rank) == ("singular", False, 1)
    assert "rank 1 for 2 free parameters" in result.message
    with pytest.raises(RuntimeError, match="full rank, got 1 for 2 free parameters"):
        result.covariance()


def test_fewer_residuals_than_parameters_reach_zero():
    result = optim.least_squares(lambda x: x.square().sum().reshape(1) - 4, torch.ones(3, dtype=DOUBLE))
    assert result.cost == pytest.approx(0.0, abs=1e-20)
    with pytest.raises(RuntimeError, match="full rank, got 1 for 3"):
        result.covariance()


def test_single_precision():
    residual, x0 = decay(0)
    result = optim.least_squares(lambda p: residual(p.double()).float(), x0.float())
    assert result.success, result
    assert result.x.dtype == torch.float32
    torch.testing.assert_close(result.x.double(), optim.least_squares(residual, x0).x, rtol=1e-2, atol=1e-2)


def test_structures_arguments_and_what_comes_with_them():
    t = torch.linspace(0, 1, 20, dtype=DOUBLE)

    def residual(p, scale, shift):
        return p["a"] * torch.exp(-p["b"] * t) * scale - shift, p["a"].item()

    x0 = {"a": torch.ones(1, dtype=DOUBLE), "b": torch.ones((), dtype=DOUBLE)}
    result = optim.least_squares(residual, x0, (2.0, 6 * torch.exp(-2 * t)), has_aux=True)
    assert result.x["a"].tolist() == pytest.approx([3.0])
    assert float(result.x["b"]) == pytest.approx(2.0)
    assert result.aux == result.x["a"].item()


def test_a_jacobian_of_the_users_own():
    residual, x0 = decay(0)
    calls = []

    def jac(p):
        calls.append(p)
        return torch.autograd.functional.jacobian(residual, p)

    result = optim.least_squares(lambda p: residual(p).detach(), x0, jac=jac)
    torch.testing.assert_close(result.x, optim.least_squares(residual, x0).x, rtol=1e-7, atol=0.0)
    assert len(calls) == result.njev


def test_weights_are_inverse_variances():
    residual, x0 = decay(0)
    sigma = torch.linspace(0.1, 2, 60, dtype=DOUBLE)
    result = optim.least_squares(residual, x0, weights=sigma**-2)
    other = optim.least_squares(lambda p: residual(p) / sigma, x0)
    torch.testing.assert_close(result.x, other.x)
    torch.testing.assert_close(result.fun, other.fun)


def test_limits_and_callbacks():
    residual, x0 = decay(0)
    assert optim.least_squares(residual, x0, max_iter=2).status == "max_iter"
    limited = optim.least_squares(residual, x0, max_nfev=5)
    assert limited.status == "max_nfev"
    assert limited.nfev <= 7
    seen = []

    def callback(state):
        seen.append(state.cost)
        if len(seen) == 2:
            raise StopIteration

    assert optim.least_squares(residual, x0, callback=callback).status == "stopped"
    assert len(seen) == 2


def test_trials_outside_the_domain_are_refused():
    result = optim.least_squares(lambda x: x.log() - 1, torch.full((1,), 60.0, dtype=DOUBLE))
    assert result.success
    assert float(result.x) == pytest.approx(math.e)


@pytest.mark.parametrize(
    ("residual", "options", "error", "text"),
    [
        (lambda x: 1.0, {}, TypeError, "fun must return a tensor, got float"),
        (lambda x: x + 1j, {}, TypeError, "residual must return real numbers, got torch.complex128"),
        (lambda x: x.long(), {}, TypeError, "residual must return floating-point numbers, got torch.int64"),
        (lambda x: x * math.nan, {}, ValueError, r"residual\(x0\) must be finite"),
        (lambda x: torch.ones(3), {}, ValueError, "must depend on x"),
        (lambda x: x, {"loss": "l1"}, ValueError, "loss must be a function or one of 'linear', 'huber'"),
        (lambda x: x, {"loss": lambda z: z}, ValueError, r"shape \(3, 2\), got \(2,\)"),
        (lambda x: x, {"f_scale": 0.0}, ValueError, "f_scale must be a positive number"),
        (lambda x: x, {"weights": [1.0, -1.0]}, ValueError, "weights must be finite and not negative"),
        (lambda x: x, {"weights": [1.0] * 3}, ValueError, "one for each of 2 residuals, got shape"),
        (lambda x: x, {"x_scale": "unit"}, ValueError, "x_scale must be 'jac', 'none' or units"),
        (lambda x: x, {"x_scale": -1.0}, ValueError, "x_scale must be positive"),
        (lambda x: x, {"jac": "3-point"}, TypeError, "jac must be a function of x, or None, got '3-point'"),
        (lambda x: x, {"jac": lambda x: x}, ValueError, r"shape \(2, 2\), got \(2,\)"),
        (lambda x: x, {"bounds": ([1.0, 0.0], [0.0, 1.0])}, ValueError, "lower <= upper, got 1.0 and 0.0"),
        (lambda x: x, {"verbose": 2}, TypeError, "unexpected argument 'verbose'.* progress=True"),
        (lambda x: x, {"max_iter": 0}, ValueError, "max_iter must be a positive integer"),
    ],
)
def test_bad_input(residual, options, error, text):
    with pytest.raises(error, match=text):
        optim.least_squares(residual, torch.ones(2, dtype=DOUBLE), **options)


def test_residuals_that_change_their_number_are_an_error():
    counts = iter([3, 3, 2, 2, 2])
    with pytest.raises(ValueError, match="as many numbers in every call, got 3 at first and 2 now"):
        optim.least_squares(
            lambda x: (x - 3).square().sum().expand(next(counts)), torch.ones(1, dtype=DOUBLE)
        )


@pytest.mark.parametrize("loss", ["linear", "cauchy"])
def test_products_in_place_of_the_jacobian_find_the_same(loss):
    residual, x0 = single(0, outliers=3)
    weights = torch.linspace(0.5, 2, 60, dtype=DOUBLE)
    direct = optim.least_squares(residual, x0, loss=loss, weights=weights)
    products = optim.least_squares(residual, x0, loss=loss, weights=weights, method="lsmr")
    assert products.success, products
    torch.testing.assert_close(products.x, direct.x, rtol=1e-6, atol=0.0)
    assert products.cost == pytest.approx(direct.cost, rel=1e-10)
    torch.testing.assert_close(products.grad, direct.grad, rtol=0.0, atol=1e-6)
    assert products.nhev > 0


def test_a_jacobian_without_room_is_multiplied():
    """Of 8e8 entries; the chain has one zero."""
    n = 20_000

    def residual(x):
        return torch.cat([x[1:] - x[:-1] ** 2, 1 - x])

    result = optim.least_squares(residual, torch.full((n,), 0.5, dtype=DOUBLE))
    assert result.success, result
    torch.testing.assert_close(result.x, torch.ones(n, dtype=DOUBLE), rtol=1e-7, atol=0.0)
    with pytest.raises(ValueError, match="bounds must be None where products take the place"):
        optim.least_squares(residual, torch.ones(3, dtype=DOUBLE), bounds=(0.0, 2.0), method="lsmr")
    with pytest.raises(ValueError, match="method must be one of 'auto', 'direct', 'lsmr', got 'trf'"):
        optim.least_squares(residual, torch.ones(3, dtype=DOUBLE), method="trf")
