"""Eigenpairs and spectral densities against dense decompositions and SciPy."""

import math

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st

from secondorder import FunctionOperator, GaussNewton, Hessian, MatrixOperator, eigsh, spectral_density
from secondorder.solvers import STATUS_TEXT
from secondorder.solvers.quadrature import gauss, tridiagonalize

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
WHICH = ["LM", "LA", "SA", "BE"]
# Their small eigenvalues lie closer together than 1e-5 of the norm: without inversion nobody finds them soon.
TINY_GAPS = ("condition_1e5", "condition_1e12", "badly_scaled")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def wanted(values, k, which):
    """Of ascending eigenvalues the k that ``which`` names, ascending; SciPy's rule."""
    if which == "LM":
        return values[values.abs().argsort(descending=True)[:k]].sort()[0]
    high = {"LA": k, "SA": 0, "BE": (k + 1) // 2}[which]
    return torch.cat([values[: k - high], values[len(values) - high :]])


def true_residuals(A, result):
    X = result.vectors.double()
    return (A.double() @ X - X * result.values.double()).norm(dim=0)


def check_claims(A, result, rtol):
    """Residuals, orthonormality and status are what the result says, whatever it says."""
    k, eps, norm = (
        len(result.values),
        torch.finfo(A.dtype).eps,
        float(torch.linalg.matrix_norm(A.double(), 2)),
    )
    rounding = 10 * len(A) * eps
    torch.testing.assert_close(
        result.residual_norms.double(), true_residuals(A, result), rtol=1e-3, atol=rounding * norm
    )
    identity = torch.eye(k, dtype=A.dtype)
    torch.testing.assert_close(result.vectors.T @ result.vectors, identity, rtol=0, atol=rounding)
    assert torch.equal(result.values, result.values.sort()[0])
    assert result.status in STATUS_TEXT
    assert result.message == STATUS_TEXT[result.status]
    if result.status == "converged":
        assert bool((result.residual_norms <= rtol * norm * (1 + rounding)).all())


@DTYPES
@pytest.mark.parametrize("which", WHICH)
def test_named_systems(system, which, dtype):
    A = system.A.to(dtype)
    exact = torch.linalg.eigvalsh(A.double())
    norm, eps = float(exact.abs().max()), torch.finfo(dtype).eps
    name = next(name for name, other in zoo.SYSTEMS.items() if other is system)
    for k in sorted({1, min(3, len(A)), len(A) // 2 or 1, len(A)}):
        is_hard = name in TINY_GAPS and which in ("SA", "BE") and len(A) > 20
        result = eigsh(A, k, which=which, generator=seeded(k), max_iter=800 if is_hard else None)
        check_claims(A, result, eps**0.5)
        assert result.values.shape == (k,)
        assert result.vectors.shape == (len(A), k)
        if not is_hard:
            assert result.status == "converged"
            # A residual of sqrt(eps) norm(A) is of second order in a value with a relative gap of 1e-3, of
            # first in a cluster that is narrower than the residual.
            error = float((result.values.double() - wanted(exact, k, which)).abs().max())
            assert error <= (1e3 * eps if name not in TINY_GAPS else eps**0.5) * norm


@DTYPES
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("name", [name for name in zoo.SPECTRA if name not in ("exp", "poly")])
def test_named_spectra(name, which, dtype):
    A = zoo.with_named_spectrum(name).to(dtype)
    exact, eps = zoo.SPECTRA[name].sort()[0], torch.finfo(dtype).eps
    for k in (1, 4, 7):
        result = eigsh(A, k, which=which, generator=seeded(k))
        check_claims(A, result, eps**0.5)
        assert result.status == "converged"
        # Multiple eigenvalues with all their copies: to the square of sqrt(eps) over the relative gap, 1e-3.
        norm = float(exact.abs().max())
        found, expected = result.values.double(), wanted(exact, k, which)
        if which == "LM":
            found, expected = found.abs().sort()[0], expected.abs().sort()[0]
        assert float((found - expected).abs().max()) <= 1e3 * eps * norm


def test_vectors_span_the_eigenspaces():
    A = zoo.with_named_spectrum("multiple")
    result = eigsh(A, 5, which="LA", rtol=1e-12, generator=seeded())
    space = torch.linalg.eigh(A)[1][:, -5:]
    # The five copies of 6, as a space; rtol over the gap of 1.
    assert float((result.vectors - space @ (space.T @ result.vectors)).norm()) < 1e-10


def test_the_same_as_scipy_and_about_as_many_products():
    A = zoo.with_named_spectrum("outliers")
    for which in WHICH:
        counted = Counted(A)
        expected = scipy.sparse.linalg.eigsh(counted.scipy(), 4, which=which, v0=np.ones(300), tol=1e-8)
        result = eigsh(A, 4, which=which, v0=torch.ones(300, dtype=A.dtype), rtol=1e-8, generator=seeded())
        np.testing.assert_allclose(result.values, expected[0], rtol=1e-10, atol=1e-10)
        agreement = torch.from_numpy(expected[1]).T @ result.vectors
        torch.testing.assert_close(agreement.abs(), torch.eye(4, dtype=A.dtype), rtol=0, atol=1e-5)
        # The search for copies comes on top, and one product each for the true residuals.
        assert result.products <= 3 * counted.products + 20


class Counted:
    """A matrix that counts its products with one vector, and knows nothing else."""

    def __init__(self, matrix):
        self.matrix, self.products = matrix, 0

    def __matmul__(self, v):
        self.products += 1 if v.ndim == 1 else v.shape[1]
        return self.matrix @ v

    def scipy(self):
        function = lambda v: (self @ torch.from_numpy(v)).numpy()  # noqa: E731
        return scipy.sparse.linalg.LinearOperator(self.matrix.shape, matvec=function, dtype=float)


def test_counts_and_limits():
    A = Counted(zoo.with_named_spectrum("flat"))
    for limit in (20, 21, 33, 60):
        A.products = 0
        result = eigsh(A, 3, v0=zoo.vector(300, 1), rtol=1e-13, max_iter=limit)
        assert (result.status, result.iterations, result.products) == ("max_iter", limit, limit + 3)
        assert A.products == result.products
        check_claims(A.matrix, result, 1e-13)
    A.products = 0
    result = eigsh(A, 3, v0=zoo.vector(300, 1), ncv=300)
    assert (result.status, result.iterations, result.products, A.products) == ("converged", 0, 300, 300)


def test_precision_that_cannot_be_reached_is_said():
    A = zoo.with_named_spectrum("outliers").float()
    result = eigsh(A, 3, rtol=0.0, generator=seeded())
    assert result.status in ("stagnated", "max_iter")
    check_claims(A, result, 0.0)
    assert eigsh(A[:9, :9], 3, rtol=0.0).status == "stagnated"


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5])
def test_multiples_of_the_identity(value):
    A = value * torch.eye(60, dtype=torch.float64)
    result = eigsh(A, 5, which="SA", generator=seeded())
    assert result.status == "converged"
    torch.testing.assert_close(result.values, torch.full((5,), value, dtype=A.dtype))
    check_claims(A, result, 1e-8)


def test_start_in_an_invariant_subspace():
    """From an eigenvector the space is exhausted at once; the rest is found from random vectors."""
    A = torch.diag(torch.arange(50, dtype=torch.float64))
    for index in (0, 49):
        result = eigsh(A, 3, which="LA", v0=torch.eye(50, dtype=A.dtype)[index], generator=seeded())
        assert result.status == "converged"
        torch.testing.assert_close(result.values, torch.tensor([47.0, 48, 49], dtype=A.dtype))


@pytest.mark.parametrize("kind", [Hessian, GaussNewton])
def test_curvature_of_a_network(kind):
    case = zoo.network("mlp_cross_entropy")
    outputs = case.outputs()
    loss, parameters = case.loss(outputs, case.targets), list(case.model.parameters())
    A = Hessian(loss, parameters) if kind is Hessian else GaussNewton(loss, outputs, parameters)
    result = eigsh(A, 4, which="BE", ncv=12, generator=seeded())
    assert result.status == "converged"
    expected = wanted(torch.linalg.eigvalsh(A.dense()), 4, "BE")
    torch.testing.assert_close(result.values, expected, rtol=1e-9, atol=1e-11)


def test_smallest_sizes():
    one = torch.full((1, 1), -3.0)
    result = eigsh(one, 1)
    assert (result.values.tolist(), result.vectors.abs().tolist()) == ([-3.0], [[1.0]])
    assert (result.products, result.status) == (0, "converged")
    result = eigsh(zoo.SYSTEMS["definite"].A, 2, ncv=3, which="LA", generator=seeded())
    torch.testing.assert_close(result.values, torch.linalg.eigvalsh(zoo.SYSTEMS["definite"].A)[-2:])


@given(
    st.integers(21, 60), st.integers(1, 8), st.integers(1, 4), st.sampled_from(WHICH), st.integers(0, 2**16)
)
def test_few_distinct_eigenvalues(n, distinct, k, which, seed):
    """Krylov spaces of dimension ``distinct``: breakdown everywhere, copies everywhere."""
    values = torch.arange(n, dtype=torch.float64).remainder(distinct) - 2
    A = zoo._with_spectrum(values, seed)
    result = eigsh(A, k, which=which, generator=seeded(seed))
    assert result.status == "converged"
    expected = wanted(values.sort()[0], k, which)
    if which == "LM":
        result, expected = result.values.abs().sort()[0], expected.abs().sort()[0]
    else:
        result = result.values
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-10)


def test_operators_and_generators():
    A = zoo.with_named_spectrum("outliers")
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = eigsh(MatrixOperator(A), 3, generator=seeded(1))
    assert torch.equal(torch.get_rng_state(), state)
    again = eigsh(FunctionOperator(lambda v: A @ v, A[0]), 3, generator=seeded(1))
    torch.testing.assert_close(first.values, again.values)
    eigsh(A, 3)
    assert not torch.equal(torch.get_rng_state(), state)


def test_nothing_is_made_on_the_default_device():
    A, multiple = zoo.with_named_spectrum("outliers"), zoo.with_named_spectrum("multiple")
    expected = eigsh(A, 3, generator=seeded()).values
    density = spectral_density(A, steps=10, generator=seeded())
    with torch.device("meta"):
        torch.testing.assert_close(
            eigsh(A, 3, generator=torch.Generator("cpu").manual_seed(0)).values, expected
        )
        assert eigsh(multiple, 3, which="BE", v0=A[0]).status == "converged"
        assert eigsh(A, 3, ncv=300).status == "converged"
        found = spectral_density(A, steps=10, generator=torch.Generator("cpu").manual_seed(0))
        torch.testing.assert_close(found.evaluate(found.grid()), density.evaluate(density.grid()))
        assert spectral_density(A).is_exact


def test_nan_in_a_product():
    A = zoo.with_named_spectrum("flat").clone()
    A[7, 7] = math.nan
    for call in (
        lambda: eigsh(A, 3),
        lambda: eigsh(A, 3, ncv=300),
        lambda: spectral_density(A, steps=5),
        lambda: spectral_density(A),
    ):
        with pytest.raises(RuntimeError, match="A @ v must be finite, got NaN or infinity"):
            call()


def test_bad_input():
    A, rectangular = torch.eye(30), torch.ones(3, 2)
    for options, message in (
        ({"k": 0}, "k must be from 1 to 30, got 0"),
        ({"k": 31}, "k must be from 1 to 30, got 31"),
        ({"which": "SM"}, "which must be one of 'LM', 'LA', 'SA', 'BE', got 'SM'"),
        ({"k": 4, "ncv": 4}, "ncv must be at least 5, got 4"),
        ({"rtol": -1.0}, "rtol must be non-negative, got -1"),
        ({"max_iter": 3}, "max_iter must be at least 20, got 3"),
        ({"v0": torch.zeros(30)}, "v0 must be finite and not zero"),
        ({"v0": torch.ones(29)}, r"v0 must have shape \(30,\), got \(29,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            eigsh(A, **options)
    with pytest.raises(TypeError, match="k must be an integer, got 2.0"):
        eigsh(A, 2.0)
    with pytest.raises(TypeError, match="float32 or float64, got torch.bfloat16"):
        eigsh(A.bfloat16(), 2)
    with pytest.raises(TypeError, match="A and v0 must have one dtype"):
        eigsh(A, 2, v0=torch.ones(30, dtype=torch.float64))
    for function in (eigsh, spectral_density):
        with pytest.raises(ValueError, match="A must be symmetric, got one that differs from its transpose"):
            function(torch.ones(30, 30).triu())
        with pytest.raises(ValueError, match=r"A must be square, got shape \(3, 2\)"):
            function(rectangular)
        with pytest.raises(TypeError, match="A must support A @ v, got function"):
            function(lambda v: v)
        with pytest.raises(
            ValueError, match=r"must be given for an A without shape and dtype; pass a vector"
        ):
            function(Counted(A))
    with pytest.raises(ValueError, match="num_probes must be at least 1, got 0"):
        spectral_density(A, num_probes=0)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        spectral_density(A, steps=0)
    with pytest.raises(ValueError, match="width must be positive, got 0"):
        spectral_density(A).evaluate(torch.zeros(3), width=0)


class TestQuadrature:
    @DTYPES
    def test_moments_along_a_probe_are_exact(self, dtype):
        """Gauss quadrature with s nodes integrates polynomials of degree 2 s - 1."""
        A, steps = zoo.with_named_spectrum("indefinite").to(dtype), 4
        starts = zoo.vector(900, 1).view(300, 3).to(dtype)
        nodes, weights = gauss(*tridiagonalize(A, starts, steps))
        unit, power = starts / starts.norm(dim=0), starts / starts.norm(dim=0)
        for degree in range(2 * steps):
            moment = (weights * nodes**degree).sum(1)
            torch.testing.assert_close(
                moment, (unit * power).sum(0), rtol=0, atol=300 * torch.finfo(dtype).eps
            )
            power = A @ power

    def test_a_block_is_its_columns_and_scales(self):
        A, starts = zoo.with_named_spectrum("flat"), zoo.vector(900, 1).view(300, 3)
        whole = tridiagonalize(A, starts, 12)
        for index in range(3):
            alone = tridiagonalize(1e-9 * A, 1e3 * starts[:, [index]], 12)
            for ours, theirs in zip(whole, alone, strict=True):
                torch.testing.assert_close(ours[[index]], 1e9 * theirs, rtol=1e-8, atol=1e-8)

    def test_columns_that_end_early(self):
        """One start an eigenvector, one a sum of three, one general: each keeps its own quadrature."""
        A = torch.diag(torch.arange(1, 41, dtype=torch.float64))
        starts = torch.stack([A[4], A[4] + A[9] + A[20], torch.ones(40, dtype=A.dtype)], dim=1)
        nodes, weights = gauss(*tridiagonalize(A, starts, 8))
        expected = (starts.square() * A.diagonal().log()[:, None]).sum(0) / starts.square().sum(0)
        torch.testing.assert_close((weights * nodes.log()).sum(1)[:2], expected[:2])
        torch.testing.assert_close(weights.sum(1), torch.ones(3, dtype=A.dtype))
        assert bool((nodes >= 1 - 1e-12).all())
        zero = gauss(*tridiagonalize(0 * A, starts, 5))
        assert torch.equal(zero[0], torch.zeros_like(zero[0]))

    def test_many_steps_without_reorthogonalisation(self):
        """Copies of outliers share their weight: the sum stays right long after orthogonality is lost."""
        A, start = zoo.with_named_spectrum("outliers"), zoo.vector(300, 3)
        nodes, weights = gauss(*tridiagonalize(A, start[:, None], 250))
        values, vectors = torch.linalg.eigh(A)
        along = (vectors.T @ start).square() / start.square().sum()
        near_top = (nodes[0] - 100).abs() < 1e-6
        assert int(near_top.sum()) > 1
        assert float(weights[0, near_top].sum()) == pytest.approx(float(along[-1]), rel=1e-9)
        assert float(weights[0] @ nodes[0].cos()) == pytest.approx(float(along @ values.cos()), abs=1e-9)


class TestDensity:
    def test_density_is_that_of_the_eigenvalues(self):
        A, values = zoo.with_named_spectrum("outliers"), zoo.SPECTRA["outliers"]
        found = spectral_density(A, num_probes=5, steps=40, generator=seeded())
        assert (found.nodes.shape, found.products, found.is_exact) == ((5, 40), 200, False)
        grid, width = torch.linspace(-20, 120, 3000, dtype=A.dtype), 3.0
        expected = spectral_density(torch.diag(values)).evaluate(grid, width)
        density = found.evaluate(grid, width)
        spacing = float(grid[1] - grid[0])
        assert float(density.sum()) * spacing == pytest.approx(1, abs=1e-6)
        # 5 probes of 300: the standard deviation of the share of an eigenvalue is sqrt(2 / 5) of it.
        assert float((density - expected).abs().sum()) * spacing < 0.05
        own = found.grid(2000)
        assert float(found.evaluate(own).sum() * (own[1] - own[0])) == pytest.approx(1, abs=1e-5)

    def test_means_are_unbiased_and_their_errors_calibrated(self):
        A = zoo.with_named_spectrum("indefinite")
        exact = float(zoo.SPECTRA["indefinite"].exp().mean())
        means = [
            spectral_density(A, num_probes=8, steps=12, generator=seeded(s)).mean(torch.exp)
            for s in range(60)
        ]
        values, errors = torch.tensor(means, dtype=torch.float64).T
        # Three standard deviations of the mean of 60.
        assert abs(float(values.mean()) - exact) < 3 * float(values.std()) / 60**0.5
        covered = float(((values - exact).abs() <= 2 * errors).double().mean())
        # Two standard errors from 8 samples, Student's t: 0.91; less three deviations of 60 draws.
        assert covered > 0.80

    def test_exact_when_the_products_would_reach_n(self):
        A = zoo.with_named_spectrum("flat")
        found = spectral_density(MatrixOperator(A), num_probes=10, steps=30)
        assert (found.is_exact, found.products, found.nodes.shape) == (True, 300, (1, 300))
        mean, error = found.mean(lambda values: values)
        assert (mean, error) == (pytest.approx(2.0, rel=1e-12), 0.0)
        assert spectral_density(A, num_probes=1, steps=20).mean(torch.exp)[1] == math.inf

    def test_grid_of_one_eigenvalue(self):
        for value in (0.0, 2.0):
            found = spectral_density(value * torch.eye(4, dtype=torch.float64))
            grid = found.grid(1000)
            assert float(found.evaluate(grid).sum() * (grid[1] - grid[0])) == pytest.approx(1, abs=1e-5)
