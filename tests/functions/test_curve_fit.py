"""``curve_fit`` beside SciPy's, and what it says of data that make no fit."""

import math
import warnings

import nist
import numpy as np
import pytest
import scipy.optimize
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

import optim

# Two fits of the same data stop this near to each other (xtol of least_squares).
XTOL = 1e-8
# SciPy's results with all tolerances at 1e-15 differ from the minimum by this at most on these sets.
PEER = 1e-6
TIGHT = {"ftol": 1e-15, "xtol": 1e-15, "gtol": 1e-15}
SETS = ("Misra1a", "Chwirut2", "DanWood", "Rat42", "Nelson", "MGH09", "Thurber", "Gauss1", "Eckerle4", "ENSO")


def decay(x, a, b, c):
    return a * torch.exp(-b * x) + c


def numpy_of(f):
    return lambda x, *p: f(torch.as_tensor(x), *map(torch.as_tensor, p)).numpy()


def peer(f, x, y, p0=(1.0, 1.0, 1.0), **options):
    """SciPy's, with exact derivatives and tight tolerances."""

    def jac(x, *p):
        columns = torch.autograd.functional.jacobian(lambda q: f(torch.as_tensor(x), *q), torch.tensor(p))
        return columns.numpy()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.optimize.OptimizeWarning)
        return scipy.optimize.curve_fit(
            numpy_of(f), np.asarray(x), np.asarray(y), p0, method="trf", jac=jac, **TIGHT, **options
        )


def assert_same(fit, reference, rtol=PEER):
    for ours, theirs in zip(fit[:2], reference, strict=True):
        torch.testing.assert_close(ours, torch.as_tensor(theirs), rtol=rtol, atol=0)


def noisy(seed, m=40):
    x = torch.linspace(0, 4, m, dtype=torch.float64)
    return x, decay(x, 2.5, 1.3, 0.5) + 0.05 * zoo.vector(m, seed)


@pytest.mark.parametrize("name", SETS)
def test_nist_as_scipy(name):
    data = nist.dataset(name)
    # From near the minimum: from Nelson's second start SciPy's ends elsewhere.
    reference = peer(data.model, data.x, data.y, p0=1.001 * data.certified.numpy(), max_nfev=10000)
    popt, pcov = optim.curve_fit(data.model, data.x, data.y, data.starts[1])
    signs = popt.sign() * torch.as_tensor(reference[0]).sign()
    assert_same((signs * popt, signs[:, None] * pcov * signs), reference)


@pytest.mark.parametrize("name", SETS)
def test_nist_as_certified(name):
    data = nist.dataset(name)
    popt, pcov = optim.curve_fit(data.model, data.x, data.y, data.starts[1])
    certified, deviations = data.same_fit(popt)
    torch.testing.assert_close(popt, certified, rtol=1e-6, atol=0)
    torch.testing.assert_close(pcov.diagonal().sqrt(), deviations, rtol=1e-4, atol=0)


@settings(max_examples=8)
@given(st.integers(0, 10**6), st.sampled_from(["none", "scalar", "vector", "matrix"]), st.booleans())
def test_random_fits_as_scipy(seed, kind, absolute):
    x, y = noisy(seed)
    sigma = 0.02 + 0.1 * zoo.vector(len(x), seed + 1).abs()
    correlated = sigma[:, None] * (0.7 ** (x[:, None] - x).abs()) * sigma
    given_sigma = {"none": None, "scalar": 0.3, "vector": sigma, "matrix": correlated}[kind]
    # SciPy takes a number since 1.12 only.
    theirs = 0.3 * torch.ones_like(y) if kind == "scalar" else given_sigma
    options = {"absolute_sigma": absolute}
    reference = peer(decay, x, y, sigma=None if theirs is None else theirs.numpy(), **options)
    assert_same(optim.curve_fit(decay, x, y, sigma=given_sigma, **options), reference)


@settings(max_examples=8)
@given(st.integers(0, 10**6))
def test_active_bounds_as_scipy(seed):
    x, y = noisy(seed)
    bounds = ([0.0, 0.0, 0.7], [10.0, 10.0, 5.0])
    popt, pcov, result = optim.curve_fit(decay, x, y, bounds=bounds, full_output=True)
    assert (float(popt[2]), result.success) == (0.7, True)
    # Without the parameter that is held there: SciPy's method for bounds stays a little inside of them.
    reference = peer(lambda x, a, b: decay(x, a, b, 0.7), x, y, p0=[2.0, 1.0])[0]
    torch.testing.assert_close(popt[:2], torch.tensor(reference), rtol=PEER, atol=0)
    J = torch.autograd.functional.jacobian(lambda p: decay(x, *p), popt)
    assert float(J[:, 2] @ (decay(x, *popt) - y)) > 0
    # As SciPy's: of all parameters, those at a bound too.
    variance = 2 * result.cost / (len(y) - 3)
    torch.testing.assert_close(pcov, torch.linalg.inv(J.T @ J) * variance, rtol=1e-6, atol=0)


def test_two_lists_of_two_are_lower_and_upper():
    x = torch.linspace(0, 1, 9, dtype=torch.float64)

    def line(x, a, b):
        return a * x + b

    popt, _ = optim.curve_fit(line, x, line(x, 2.0, 3.0), bounds=([0.0, 5.0], [1.0, 6.0]))
    reference = scipy.optimize.lsq_linear(
        torch.stack([x, torch.ones_like(x)], 1), line(x, 2.0, 3.0), ([0, 5], [1, 6]), tol=1e-14
    )
    torch.testing.assert_close(popt, torch.tensor(reference.x), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("bounds", "start"),
    [
        (None, [1.0, 1.0, 1.0]),
        (([0.0, -math.inf, 2.0], [4.0, 3.0, math.inf]), [2.0, 2.0, 3.0]),
        (scipy.optimize.Bounds([0.0, 0.0, 0.0], math.inf), [1.0, 1.0, 1.0]),
    ],
)
def test_first_guess_is_inside_of_bounds_as_scipys(bounds, start):
    seen = []

    def model(x, a, b, c):
        seen.append(torch.stack([a, b, c]).tolist())
        return decay(x, a, b, c)

    x, y = noisy(0)
    optim.curve_fit(model, x, y, bounds=bounds)
    assert seen[0] == start


@pytest.mark.parametrize("loss", ["soft_l1", "huber", "cauchy"])
def test_outliers_under_a_robust_loss_as_scipy(loss):
    """The covariance too, though outliers have negative curvature under Cauchy's loss."""
    x, y = noisy(1)
    y[::7] += 3.0
    ours = optim.curve_fit(decay, x, y, loss=loss, f_scale=0.1)
    reference = peer(decay, x, y, ours[0].numpy(), loss=loss, f_scale=0.1)
    assert_same(ours, reference)
    assert float((ours[0] - torch.tensor([2.5, 1.3, 0.5])).abs().max()) < 0.3


def test_lists_and_arrays_and_several_predictors():
    x = np.random.default_rng(0).random((2, 30))
    y = 1.5 * x[0] + 2.0 * x[1] ** 2

    def model(x, a, b):
        return a * x[0] + b * x[1] ** 2

    for predictors in (x, list(x), tuple(torch.tensor(x)), torch.tensor(x)):
        popt, pcov = optim.curve_fit(model, predictors, y.tolist(), [0.5, 0.5])
        assert popt.tolist() == pytest.approx([1.5, 2.0], abs=1e-12)
        assert pcov.shape == (2, 2)
    popt, _ = optim.curve_fit(lambda t, a: a * t["x"], {"x": torch.tensor(x[0])}, 3 * x[0])
    assert popt.tolist() == pytest.approx([3.0])


def test_dtype_is_that_of_the_data():
    x, y = noisy(2)
    popt, pcov = optim.curve_fit(decay, x.float(), y.float())
    assert popt.dtype == pcov.dtype == torch.float32
    reference = optim.curve_fit(decay, x, y)[0]
    torch.testing.assert_close(popt.double(), reference, rtol=1e-3, atol=1e-3)


def test_omitted_measurements_are_as_if_never_made():
    x, y = noisy(3)
    sigma = 0.1 + x.abs()
    kept = torch.ones(len(y), dtype=torch.bool)
    kept[[3, 11, 30]] = False
    holed_x, holed_y = x.clone(), y.clone()
    holed_x[3], holed_y[11], holed_y[30] = math.nan, math.nan, math.nan
    for s in (sigma, torch.diag(sigma)):
        ours = optim.curve_fit(decay, holed_x, holed_y, sigma=s, nan_policy="omit")
        part = s[kept] if s.dim() == 1 else s[kept][:, kept]
        reference = optim.curve_fit(decay, x[kept], y[kept], sigma=part)
        assert torch.equal(ours[0], reference[0])
        assert torch.equal(ours[1], reference[1])


def test_tolerances_are_those_of_least_squares():
    x, y = noisy(4)
    tight, loose = (
        optim.curve_fit(decay, x, y, xtol=xtol, gtol=xtol, full_output=True)[2] for xtol in (1e-12, 1e-2)
    )
    assert loose.nit < tight.nit
    early = optim.curve_fit(decay, x, y, ftol=0.1, full_output=True)[2]
    assert early.success
    assert early.nit < tight.nit


def test_own_derivatives_are_used():
    x, y = noisy(4)
    calls = []

    def jac(x, a, b, c):
        calls.append(1)
        e = torch.exp(-b * x)
        return torch.stack([e, -a * x * e, torch.ones_like(x)], dim=1)

    sigma = 0.1 + 0.1 * x
    for s in (sigma, torch.diag(sigma.square())):
        ours = optim.curve_fit(decay, x, y, sigma=s, jac=jac)
        assert_same(ours, optim.curve_fit(decay, x, y, sigma=s), rtol=10 * XTOL)
    assert calls


def test_constant_models_have_no_dimensions():
    y = zoo.vector(20, 5)
    popt, pcov = optim.curve_fit(lambda x, c: c, None, y)
    torch.testing.assert_close(popt, y.mean()[None])
    torch.testing.assert_close(pcov, (y.var() / 20)[None, None])


def test_undetermined_parameters_have_infinite_covariance():
    x, y = noisy(6)
    with pytest.warns(scipy.optimize.OptimizeWarning, match="rank 1 of 2"):
        _, pcov = optim.curve_fit(lambda x, a, b: (a + b) * x, x, y)
    assert bool(pcov.isinf().all())
    with pytest.warns(scipy.optimize.OptimizeWarning, match="3 measurements"):
        _, pcov = optim.curve_fit(decay, x[:3], torch.tensor([3.0, 1.5, 0.9], dtype=torch.float64))
    assert bool(pcov.isinf().all())


def test_no_convergence_is_an_error_or_a_status():
    x, y = noisy(7)
    with pytest.raises(RuntimeError, match="did not converge .*max_nfev.*full_output=True"):
        optim.curve_fit(decay, x, y, max_nfev=2)
    result = optim.curve_fit(decay, x, y, max_nfev=2, full_output=True)[2]
    assert (result.success, result.status) == (False, "max_nfev")


def broken(x, a):
    raise RuntimeError("theirs")


X, Y = noisy(8)
NAN = torch.where(X[2] == X, math.nan, Y)


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (TypeError, "f must be a function", lambda: optim.curve_fit(3, X, Y)),
        (TypeError, "maxfev.*Give max_nfev", lambda: optim.curve_fit(decay, X, Y, maxfev=9)),
        (ValueError, "ydata must not be empty", lambda: optim.curve_fit(decay, [], [])),
        (ValueError, "ydata must be an array", lambda: optim.curve_fit(decay, X, [[1.0], [1.0, 2.0]])),
        (TypeError, "ydata must be real", lambda: optim.curve_fit(decay, X, Y * 1j)),
        (ValueError, "ydata must be finite.*omit", lambda: optim.curve_fit(decay, X, NAN)),
        (
            ValueError,
            "ydata must be finite",
            lambda: optim.curve_fit(decay, X, NAN, check_finite=False, nan_policy="raise"),
        ),
        (ValueError, "xdata must be finite", lambda: optim.curve_fit(decay, X / 0, Y)),
        (ValueError, "nan_policy must be one", lambda: optim.curve_fit(decay, X, Y, nan_policy="drop")),
        (
            ValueError,
            "without NaN",
            lambda: optim.curve_fit(decay, X, torch.full_like(Y, math.nan), nan_policy="omit"),
        ),
        (
            ValueError,
            r"xdata must have 40 .* got shape \(40, 1\)",
            lambda: optim.curve_fit(decay, X[:, None], NAN, nan_policy="omit"),
        ),
        (ValueError, r"shape \(40,\).*got \(3,\)", lambda: optim.curve_fit(decay, X, Y, sigma=[1.0, 1, 1])),
        (ValueError, "sigma must be positive, got 0", lambda: optim.curve_fit(decay, X, Y, sigma=0 * Y)),
        (
            ValueError,
            "positive definite.*order 1 ",
            lambda: optim.curve_fit(decay, X, Y, sigma=-torch.eye(40)),
        ),
        (ValueError, "give p0", lambda: optim.curve_fit(lambda x, *p: x, X, Y)),
        (ValueError, "give p0", lambda: optim.curve_fit(torch.exp, X, Y)),
        (TypeError, "f must return a tensor, got float", lambda: optim.curve_fit(lambda x, a: 1.0, X, Y)),
        (
            TypeError,
            "torch.exp for numpy.exp",
            lambda: optim.curve_fit(lambda x, a, b: a * np.exp(-b * x), X, Y),
        ),
        (RuntimeError, "theirs", lambda: optim.curve_fit(broken, X, Y)),
        (
            ValueError,
            r"ydata, \(40,\), got \(40, 1\)",
            lambda: optim.curve_fit(lambda x, a: a * x[:, None], X, Y),
        ),
        (ValueError, "bounds must be", lambda: optim.curve_fit(decay, X, Y, bounds=3)),
        (
            ValueError,
            r"shape of p0, \(3,\), got \(2,\)",
            lambda: optim.curve_fit(decay, X, Y, bounds=([0, 0], 1)),
        ),
        (ValueError, "lower <= upper", lambda: optim.curve_fit(decay, X, Y, bounds=(1, 0))),
        (
            ValueError,
            r"jac must return shape \(40, 3\)",
            lambda: optim.curve_fit(decay, X, Y, jac=lambda x, a, b, c: x),
        ),
    ],
)
def test_bad_input_is_named(error, match, call):
    with pytest.raises(error, match=match):
        call()
