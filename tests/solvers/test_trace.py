"""Traces, diagonals and determinants from few products, against dense matrices."""

import math

import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st

from secondorder import FunctionOperator, MatrixOperator, diagonal, logdet, trace

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
METHODS = ["hutchinson", "hutch++", "xtrace"]
DIAGONALS = ["hutchinson", "xdiag"]
ESTIMATORS = {
    **{
        method: lambda A, m, g, method=method: trace(A, num_products=m, method=method, generator=g)
        for method in METHODS
    },
    "xdiag": lambda A, m, g: diagonal(A, num_products=m, generator=g),
    "diagonal": lambda A, m, g: diagonal(A, num_products=m, method="hutchinson", generator=g),
    "logdet": lambda A, m, g: logdet(A, num_probes=m // 4, steps=4, generator=g),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sample(estimate, exact, count):
    """Errors and standard errors over many seeds, shape (count, ...)."""
    results = [estimate(seeded(seed)) for seed in range(count)]
    errors = torch.stack([torch.as_tensor(r.estimate, dtype=torch.float64) - exact for r in results])
    return errors, torch.stack([torch.as_tensor(r.standard_error, dtype=torch.float64) for r in results])


def rms(errors):
    return float(errors.square().mean().sqrt())


@DTYPES
@pytest.mark.parametrize("method", METHODS)
def test_traces_of_named_systems_are_exact_at_n(system, method, dtype):
    A, n = system.A.to(dtype), len(system.A)
    for products in (max(n, 4), n + 50):
        result = trace(MatrixOperator(A), num_products=products, method=method)
        assert (result.status, result.standard_error, result.products) == ("exact", 0.0, n)
        rounding = n * torch.finfo(dtype).eps * float(A.diagonal().abs().sum())
        assert abs(result.estimate - float(A.diagonal().sum())) <= rounding


@pytest.mark.parametrize("method", DIAGONALS)
def test_diagonals_of_named_systems_are_exact_at_n(system, method):
    result = diagonal(MatrixOperator(system.A), num_products=max(4, len(system.A)), method=method)
    assert (result.status, result.products) == ("exact", len(system.A))
    assert torch.equal(result.standard_error, torch.zeros_like(result.estimate))
    torch.testing.assert_close(result.estimate, system.A.diagonal(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", zoo.SPECTRA)
@pytest.mark.parametrize("method", METHODS)
def test_traces_are_unbiased_and_their_errors_calibrated(name, method):
    A, exact, count = zoo.with_named_spectrum(name), float(zoo.SPECTRA[name].sum()), 100
    errors, claimed = sample(lambda g: trace(A, num_products=60, method=method, generator=g), exact, count)
    rounding = 300 * torch.finfo(A.dtype).eps * float(zoo.SPECTRA[name].abs().sum())
    # Three and a half standard deviations of the mean over the seeds: of 27 cases, 0.01 fail by chance.
    assert abs(float(errors.mean())) <= 3.5 * rms(errors) / count**0.5 + rounding
    # Two standard errors should cover 0.95; less three standard deviations of 100 draws. XTrace's samples
    # share their sketch: 0.85 where the eigenvalues decay fast.
    covered = float((errors.abs() <= 2 * claimed + rounding).double().mean())
    assert covered >= (0.70 if method == "xtrace" else 0.82)
    # Nor is the error far below the claim.
    assert rms(claimed) <= 2 * rms(errors) + rounding


@pytest.mark.parametrize(("name", "factor"), [("poly", 20), ("exp", 100), ("step", 100), ("low_rank", 1e9)])
def test_xtrace_gains_on_spectra_that_decay(name, factor):
    A, exact = zoo.with_named_spectrum(name), float(zoo.SPECTRA[name].sum())
    error = {
        m: rms(sample(lambda g, m=m: trace(A, num_products=48, method=m, generator=g), exact, 30)[0])
        for m in METHODS
    }
    assert factor * error["xtrace"] < error["hutchinson"]
    assert error["xtrace"] <= error["hutch++"] + 1e-12


def test_xtrace_loses_little_on_a_flat_spectrum():
    A, exact = zoo.with_named_spectrum("flat"), float(zoo.SPECTRA["flat"].sum())
    error = {
        m: rms(sample(lambda g, m=m: trace(A, num_products=48, method=m, generator=g), exact, 100)[0])
        for m in METHODS
    }
    # Half the products are spent on a sketch that is worth nothing: sqrt(2), and the noise of 100 seeds.
    assert error["xtrace"] < 1.4 * 1.2 * error["hutchinson"]


def test_variance_of_hutchinson():
    """Twice the squared Frobenius norm without the diagonal, over the number of probes."""
    A = zoo.with_named_spectrum("flat")
    errors, claimed = sample(
        lambda g: trace(A, num_products=20, method="hutchinson", generator=g), float(A.trace()), 400
    )
    expected = math.sqrt(2 * float((A - A.diagonal().diag()).square().sum()) / 20)
    # The standard deviation of a standard deviation from 400: 3.5 percent; three of these.
    assert rms(errors) == pytest.approx(expected, rel=0.11)
    assert rms(claimed) == pytest.approx(expected, rel=0.11)


def test_traces_of_unsymmetric_matrices():
    A = zoo.with_named_spectrum("exp") @ zoo.with_named_spectrum("indefinite", seed=1)
    operator = FunctionOperator(lambda v: A @ v, A[0], transpose=lambda u: A.T @ u)
    for method in METHODS:
        errors, _ = sample(
            lambda g, method=method: trace(operator, num_products=60, method=method, generator=g),
            float(A.trace()),
            20,
        )
        assert abs(float(errors.mean())) <= 3.5 * rms(errors) / 20**0.5
    assert rms(errors) < 1e-3


@given(st.integers(5, 30), st.integers(0, 4), st.integers(4, 29), st.integers(0, 2**16))
def test_xtrace_and_xdiag_are_exact_below_their_rank(n, rank, products, seed):
    """A sketch without any one vector still spans the range; that includes the zero operator."""
    values = torch.zeros(n, dtype=torch.float64)
    values[:rank] = torch.linspace(-1, 2, rank, dtype=torch.float64)
    A = zoo._with_spectrum(values, seed)
    if products // 2 > rank:
        # Random test vectors make the sketch as ill-conditioned as they are: 1e-8 covers 1e5 or so.
        found = trace(A, num_products=products, generator=seeded(seed))
        assert found.estimate == pytest.approx(float(values.sum()), abs=1e-8)
        found = diagonal(A, num_products=products, generator=seeded(seed)).estimate
        torch.testing.assert_close(found, A.diagonal(), rtol=0, atol=1e-8)


class TestDiagonal:
    @pytest.mark.parametrize("name", ["flat", "poly", "exp", "step", "indefinite"])
    @pytest.mark.parametrize("method", DIAGONALS)
    def test_unbiased_and_calibrated(self, name, method):
        A, count = zoo.with_named_spectrum(name), 100
        errors, claimed = sample(
            lambda g: diagonal(A, num_products=40, method=method, generator=g), A.diagonal(), count
        )
        # Five standard deviations of the mean, each entry by its own: 300 entries, ten cases.
        bound = 5 * errors.square().mean(0).sqrt() / count**0.5
        assert bool((errors.mean(0).abs() <= bound + 1e-14).all())
        # Together they show a bias that each one hides.
        assert abs(float(errors.sum(1).mean())) <= 3.5 * rms(errors.sum(1)) / count**0.5
        covered = float((errors.abs() <= 2 * claimed + 1e-14).double().mean())
        # As for traces; over 30000 entries the draws hardly vary.
        assert covered >= (0.80 if method == "xdiag" else 0.92)

    @pytest.mark.parametrize(("name", "factor"), [("poly", 20), ("exp", 100), ("step", 20)])
    def test_xdiag_gains_on_spectra_that_decay(self, name, factor):
        A = zoo.with_named_spectrum(name)
        error = {
            m: rms(
                sample(lambda g, m=m: diagonal(A, num_products=48, method=m, generator=g), A.diagonal(), 10)[
                    0
                ]
            )
            for m in DIAGONALS
        }
        assert factor * error["xdiag"] < error["hutchinson"]

    def test_hutchinson_is_exact_for_diagonal_matrices(self):
        A = zoo.SPECTRA["outliers"].diag()
        result = diagonal(A, num_products=2, method="hutchinson", generator=seeded())
        torch.testing.assert_close(result.estimate, A.diagonal(), rtol=0, atol=1e-13)


class TestLogdet:
    @DTYPES
    def test_named_systems(self, system, dtype):
        A, n = system.A.to(dtype), len(system.A)
        lowest = float(torch.linalg.eigvalsh(system.A)[0])
        condition = float(torch.linalg.cond(system.A))
        if "definite" not in system.kind.split() or condition > 0.01 / torch.finfo(dtype).eps:
            if lowest < -1e-3:
                with pytest.raises(
                    ValueError, match="A must be positive definite, got an eigenvalue of at most -"
                ):
                    logdet(MatrixOperator(A))
            return
        result = logdet(MatrixOperator(A))
        assert (result.status, result.standard_error, result.products) == ("exact", 0.0, n)
        # The smallest eigenvalue has a relative error of eps times the condition.
        expected = float(torch.logdet(system.A))
        assert result.estimate == pytest.approx(
            expected, abs=n * torch.finfo(dtype).eps * condition + 1e-6 * n
        )

    def test_unbiased_and_calibrated(self):
        A = zoo.spd_matrix(500, 50.0, 1)
        exact = float(torch.logdet(A))
        errors, claimed = sample(lambda g: logdet(A, num_probes=10, steps=25, generator=g), exact, 60)
        assert abs(float(errors.mean())) <= 3.5 * rms(errors) / 60**0.5
        # Two standard errors from 10 samples, Student's t: 0.92; less three deviations of 60 draws.
        assert float((errors.abs() <= 2 * claimed).double().mean()) >= 0.82
        result = logdet(A, num_probes=10, steps=25, generator=seeded())
        assert (result.status, result.products) == ("estimated", 250)

    def test_too_few_steps_are_said(self):
        """The quadrature is too high: derivatives of even order of the logarithm are negative."""
        A = zoo.spd_matrix(500, 1e6, 1)
        exact = float(torch.logdet(A))
        result = logdet(A, num_probes=8, steps=8, generator=seeded())
        assert result.status == "truncated"
        assert result.estimate > exact + 3 * result.standard_error
        assert logdet(A, num_probes=4, steps=1, generator=seeded()).estimate > exact

    @pytest.mark.parametrize("name", ["indefinite", "outliers", "low_rank"])
    def test_operators_that_are_not_definite(self, name):
        A = zoo.with_named_spectrum(name)
        with pytest.raises(
            ValueError, match=r"A must be positive definite, got an eigenvalue of at most .*; add damping"
        ):
            logdet(A - 1e-6 * torch.eye(300, dtype=A.dtype), num_probes=4, steps=40, generator=seeded())
        damped = logdet(MatrixOperator(A) + 2.0, num_probes=4, steps=30, generator=seeded())
        exact = float((zoo.SPECTRA[name] + 2).log().sum())
        assert abs(damped.estimate - exact) < 5 * damped.standard_error

    def test_identity(self):
        """Every probe ends after one step."""
        result = logdet(3 * torch.eye(1000, dtype=torch.float64), num_probes=3, steps=5, generator=seeded())
        assert result.estimate == pytest.approx(1000 * math.log(3), rel=1e-12)
        assert result.status == "estimated"


@pytest.mark.parametrize("name", ESTIMATORS)
class TestEveryEstimator:
    def test_counts_generators_and_devices(self, name):
        A, columns = zoo.with_named_spectrum("flat"), []

        def count(V):
            columns.append(V.shape[1])
            return A @ V

        operator = FunctionOperator(lambda v: A @ v, A[0])
        operator._matmat = count
        state = torch.get_rng_state()
        result = ESTIMATORS[name](operator, 40, seeded(3))
        assert torch.equal(torch.get_rng_state(), state)
        assert sum(columns) == result.products <= 40
        # Far fewer calls than products: they go in blocks.
        assert len(columns) <= 4
        with torch.device("meta"):
            again = ESTIMATORS[name](A, 40, torch.Generator("cpu").manual_seed(3))
            exact = ESTIMATORS[name](A, 1200, None)
        torch.testing.assert_close(
            torch.as_tensor(again.estimate), torch.as_tensor(result.estimate), rtol=1e-10, atol=0
        )
        assert exact.status == "exact"
        torch.manual_seed(1)
        first = ESTIMATORS[name](A, 40, None).estimate
        torch.manual_seed(1)
        torch.testing.assert_close(ESTIMATORS[name](A, 40, None).estimate, first)

    def test_single_precision(self, name):
        A = zoo.with_named_spectrum("flat")
        double = ESTIMATORS[name](A, 40, None if name == "none" else seeded(1))
        single = ESTIMATORS[name](A.float(), 40, seeded(1))
        # Other random numbers in another precision: both are within their errors of the same number.
        spread = 6 * (torch.as_tensor(double.standard_error) + torch.as_tensor(single.standard_error))
        gap = torch.as_tensor(double.estimate) - torch.as_tensor(single.estimate)
        assert bool((gap.abs() <= spread).all())
        assert torch.as_tensor(single.estimate).dtype == torch.float32 or isinstance(single.estimate, float)

    def test_nan_in_a_product(self, name):
        A = zoo.with_named_spectrum("flat").clone()
        A[7, 7] = math.nan
        for products in (40, 1200):
            with pytest.raises(RuntimeError, match="A @ v must be finite, got NaN or infinity"):
                ESTIMATORS[name](A, products, seeded())

    def test_bad_operators(self, name):
        for A, error, message in (
            (torch.ones(30, 2), ValueError, r"A must be square, got shape \(30, 2\)"),
            (lambda v: v, TypeError, "A must support A @ v, got function; wrap a function"),
            (torch.ones(30, 30, dtype=torch.int64), TypeError, "like must have a floating-point dtype"),
            (torch.ones(30, 30, dtype=torch.float16), TypeError, "float32 or float64, got torch.float16"),
        ):
            with pytest.raises(error, match=message):
                ESTIMATORS[name](A, 20, None)


def test_bad_input():
    A = torch.eye(30)
    for call, message in (
        (lambda: trace(A, num_products=3), "num_products must be at least 4, got 3"),
        (lambda: trace(A, num_products=3, method="hutch++"), "num_products must be at least 4, got 3"),
        (lambda: trace(A, num_products=1, method="hutchinson"), "num_products must be at least 2, got 1"),
        (
            lambda: trace(A, method="xnys"),
            r"method must be one of 'xtrace', 'hutch\+\+', 'hutchinson', got 'xnys'",
        ),
        (lambda: diagonal(A, num_products=3), "num_products must be at least 4, got 3"),
        (lambda: diagonal(A, method="bekas"), "method must be one of 'xdiag', 'hutchinson', got 'bekas'"),
        (lambda: logdet(A, num_probes=1), "num_probes must be at least 2, got 1"),
        (lambda: logdet(A, steps=0), "steps must be at least 1, got 0"),
        (lambda: diagonal(A.new_ones(30, 30).triu()), "A must be symmetric, got one that differs"),
        (lambda: logdet(A.new_ones(30, 30).triu()), "A must be symmetric, got one that differs"),
        (lambda: trace(A, like=torch.ones(29)), r"like must have shape \(30,\), got \(29,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="num_products must be an integer, got 20.0"):
        trace(A, num_products=20.0)
