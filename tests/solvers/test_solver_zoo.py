"""Every solver on every named system, in two precisions: what it claims is what it did."""

import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

from secondorder import FunctionOperator, MatrixOperator
from secondorder.solvers import (
    STATUS_TEXT,
    block_cg,
    cg,
    cholesky,
    direct,
    gltr,
    lsmr,
    minres,
    modified_cholesky,
    steihaug,
    trust_region,
)

RTOL = 1e-6
ITERATIVE = {
    "cg": lambda A, b: cg(A, b, rtol=RTOL),
    "block_cg": lambda A, b: block_cg(A, b[:, None], rtol=RTOL).columns[0],
    "minres": lambda A, b: minres(A, b, rtol=RTOL),
    "lsmr": lambda A, b: lsmr(A, b, rtol=RTOL, max_iter=4000),
}
CHOLESKY = {"cholesky": cholesky, "modified_cholesky": modified_cholesky}
ALL = {
    **ITERATIVE,
    "steihaug": lambda A, b: steihaug(A, b, 1e3, rtol=RTOL),
    "direct": direct,
    **CHOLESKY,
    "trust_region": lambda A, b: trust_region(A, b, 1e3),
    "gltr": lambda A, b: gltr(A, b, 1e3, rtol=RTOL),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", ALL)
def test_claims_are_true(system, name, dtype):
    A, b = system.A.to(dtype), system.b.to(dtype)
    result = ALL[name](A, b)
    x, exact_A, exact_b = result.x.double(), A.double(), b.double()
    true = float((exact_b - exact_A @ x - result.shift * x).norm())
    # The residual is computed in the solver's precision.
    rounding = 10 * len(b) * torch.finfo(dtype).eps * float(exact_A.norm() * x.norm() + exact_b.norm())
    assert result.residual_norm == pytest.approx(true, rel=1e-3, abs=rounding)
    assert result.status in STATUS_TEXT
    if result.status == "converged" and name in ITERATIVE:
        assert result.residual_norm <= RTOL * float(b.norm())
    if result.direction is not None:
        direction = result.direction.double() / result.direction.double().norm()
        limit = 100 * len(b) * torch.finfo(dtype).eps * float(torch.linalg.matrix_norm(exact_A, 2))
        assert float(direction @ exact_A @ direction) <= limit


@pytest.mark.parametrize(
    "name", ["cg", "block_cg", "minres", "lsmr", "direct", "cholesky", "modified_cholesky"]
)
def test_definite_systems_are_solved(name):
    for system in (s for s in zoo.SYSTEMS.values() if s.kind == "definite"):
        condition = float(torch.linalg.cond(system.A))
        if condition > 1e11:
            continue
        result = ALL[name](system.A, system.b)
        # LSMR works on the squared condition number.
        if name == "lsmr" and condition > 1e6:
            assert result.status in ("converged", "max_iter", "least_squares")
            continue
        assert result.status == "converged"
        expected = torch.linalg.solve(system.A, system.b)
        error = float((result.x - expected).norm())
        assert error <= condition * RTOL * float(expected.norm()) + 1e-12


@pytest.mark.parametrize("name", ["minres", "lsmr", "direct"])
def test_indefinite_systems_are_solved(name):
    for system in (s for s in zoo.SYSTEMS.values() if s.kind == "indefinite"):
        result = ALL[name](system.A, system.b)
        assert result.status == ("negative_curvature" if name == "direct" else "converged")
        expected = torch.linalg.solve(system.A, system.b)
        assert float((result.x - expected).norm()) <= 1e-4 * float(expected.norm())


@pytest.mark.parametrize("name", ["cg", "block_cg", "steihaug", "direct", *CHOLESKY])
def test_negative_curvature_is_never_stepped_over(name):
    for system in (s for s in zoo.SYSTEMS.values() if "indefinite" in s.kind):
        result = ALL[name](system.A, system.b)
        assert result.status == "negative_curvature"
        assert float(result.direction @ system.A @ result.direction) <= 0
    for name in ("negative", "saddle", "indefinite", "one_by_one_negative"):
        system = zoo.SYSTEMS[name]
        assert (
            float(minres(system.A, system.b).direction @ system.A @ minres(system.A, system.b).direction) <= 0
        )


@pytest.mark.parametrize("name", ["minres", "lsmr", "direct"])
def test_inconsistent_systems_give_least_squares_and_say_so(name):
    for system in (s for s in zoo.SYSTEMS.values() if "inconsistent" in s.kind):
        result = ALL[name](system.A, system.b)
        least = np.linalg.lstsq(system.A.numpy(), system.b.numpy(), rcond=1e-10)[0]
        least_norm = float((system.b - system.A @ torch.from_numpy(least)).norm())
        assert result.residual_norm == pytest.approx(least_norm, rel=1e-6)
        assert result.status in ("least_squares", "singular", "negative_curvature")
        if name == "lsmr":
            np.testing.assert_allclose(result.x.numpy(), least, atol=1e-4 * np.linalg.norm(least))


def test_cg_on_the_failure_case_of_curvlinops():
    """Condition 1e5 in single precision: 1e-4 is reached, or said not to be."""
    A, b = zoo.spd_matrix(200, 1e5, 1).float(), zoo.vector(200, 2).float()
    result = cg(A, b, rtol=1e-4)
    true = float((b.double() - A.double() @ result.x.double()).norm() / b.double().norm())
    assert (result.status == "converged") == (true <= 1e-4 * (1 + 1e-2))


class TestMinres:
    def test_residuals_never_increase_and_match_scipy(self):
        system = zoo.SYSTEMS["indefinite"]
        norms = [minres(system.A, system.b, max_iter=k).residual_norm for k in range(1, 41)]
        assert all(later <= earlier * (1 + 1e-9) for earlier, later in pairwise(norms))
        for k in (1, 5, 12):
            A, b = system.A.numpy(), system.b.numpy()
            expected = scipy.sparse.linalg.minres(A, b, rtol=1e-14, maxiter=k)[0]
            ours = minres(system.A, system.b, rtol=0, max_iter=k).x
            np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-8, atol=1e-10)

    @pytest.mark.parametrize("n", [30, 200])
    @pytest.mark.parametrize("kind", ["even", "few_small", "half_small", "few_large", "indefinite"])
    @given(digits=st.floats(2, 6), seed=st.integers(0, 2**16))
    @settings(max_examples=10)
    def test_the_residual_in_single_precision_is_as_small_as_rounding_allows(self, n, kind, digits, seed):
        """Not that of a long plateau, taken for the least, nor that of a recurrence that has drifted."""
        small = 10.0**-digits
        values = torch.linspace(0.5, 1, n, dtype=torch.float64)
        few = small * torch.linspace(1, 2, 5, dtype=torch.float64)
        if kind == "even":
            values = torch.linspace(small, 1, n, dtype=torch.float64)
        elif kind in ("few_small", "indefinite"):
            values[:5] = few if kind == "few_small" else few * torch.tensor([1, -1, 1, -1, 1])
        elif kind == "half_small":
            values[::2] *= small
        else:
            values[:-5] = small * torch.linspace(1, 2, n - 5, dtype=torch.float64)
        A, b = zoo._with_spectrum(values, seed).float(), zoo.vector(n, seed + 1).float()
        A = (A + A.T) / 2
        result = minres(A, b, rtol=1e-5)
        true = float((b.double() - A.double() @ result.x.double()).norm())
        assert result.status in ("converged", "stagnated")
        # A backward stable solver leaves eps norm(A) norm(x); norm(A) is one.
        assert true <= max(1.01e-5, 8 * n**0.5 * torch.finfo(b.dtype).eps * 10**digits) * float(b.norm())

    @given(n=st.integers(3, 40), seed=st.integers(0, 2**16), single=st.booleans(), zeros=st.integers(1, 3))
    def test_inconsistent_systems_give_the_least_residual(self, n, seed, single, zeros):
        values = torch.linspace(-1, 1, n + n % 2, dtype=torch.float64)[:n]
        values[: min(zeros, n - 2)] = 0
        dtype = torch.float32 if single else torch.float64
        A, b = zoo._with_spectrum(values, seed).to(dtype), zoo.vector(n, seed + 1).to(dtype)
        A = (A + A.T) / 2
        result = minres(A, b, rtol=1e-6, max_iter=50 * n)
        vectors = torch.linalg.eigh(A.double())[1]
        along = vectors.T @ b.double()
        least = float(along[torch.linalg.eigvalsh(A.double()).abs() < 1e-5].norm())
        assert result.status in ("least_squares", "stagnated")
        # Less where rounding of A made the eigenvalue a small one.
        assert 0.9 * least <= result.residual_norm <= (1 + 1e-3) * least
        assert (result.status == "least_squares") or least < 1e-2 * float(b.norm())

    def test_preconditioner_of_the_inverse_takes_one_iteration(self):
        system = zoo.SYSTEMS["definite"]
        result = minres(system.A, system.b, M=torch.linalg.inv(system.A), rtol=1e-9)
        assert (result.status, result.iterations) == ("converged", 1)

    def test_preconditioned_indefinite(self):
        system = zoo.SYSTEMS["badly_scaled"]
        A = system.A.clone()
        A[:20] *= -1
        A = (A + A.T) / 2
        plain = minres(A, system.b, rtol=1e-8)
        scaled = minres(A, system.b, M=torch.diag(1 / A.diagonal().abs().clamp(min=1e-12)), rtol=1e-8)
        assert scaled.status == "converged"
        assert scaled.iterations < plain.iterations

    def test_warm_start(self):
        system = zoo.SYSTEMS["indefinite"]
        solution = torch.linalg.solve(system.A, system.b)
        assert minres(system.A, system.b, x0=solution, rtol=1e-8).iterations == 0
        near = minres(system.A, system.b, x0=solution + 1e-6 * system.b, rtol=1e-8)
        assert near.status == "converged"
        assert near.iterations < minres(system.A, system.b, rtol=1e-8).iterations

    def test_stops_at_negative_curvature_when_asked(self):
        system = zoo.SYSTEMS["indefinite"]
        result = minres(system.A, system.b, stop_at_negative_curvature=True)
        assert result.status == "negative_curvature"
        direction = result.direction
        assert float(direction @ system.A @ direction) <= 0
        # It is the residual, and so a direction of descent for the quadratic (Liu and Roosta).
        torch.testing.assert_close(direction, system.b - system.A @ result.x, rtol=1e-8, atol=1e-10)

    @given(st.integers(1, 30), st.integers(0, 2**16), st.integers(0, 30))
    def test_certificate_is_right(self, n, seed, negative):
        """Indefinite: it is found unless ``b`` does not meet it; definite: never claimed."""
        values = torch.linspace(0.5, 3, n, dtype=torch.float64)
        values[: min(negative, n)] *= -1
        A, b = zoo._with_spectrum(values, seed), zoo.vector(n, seed + 1)
        result = minres(A, b, rtol=1e-9)
        assert result.status == "converged"
        assert (result.direction is not None) == (negative > 0)


class TestLsmr:
    @pytest.mark.parametrize("shape", [(30, 12), (12, 30), (20, 20)])
    @pytest.mark.parametrize("damping", [0.0, 0.7])
    def test_equals_dense_and_scipy(self, shape, damping):
        A, b = zoo.vector(shape[0] * shape[1], 1).view(shape), zoo.vector(shape[0], 2)
        result = lsmr(A, b, damping=damping, rtol=1e-11)
        stacked = torch.cat([A, damping**0.5 * torch.eye(shape[1], dtype=A.dtype)])
        target = torch.cat([b, b.new_zeros(shape[1])])
        expected = torch.from_numpy(np.linalg.lstsq(stacked.numpy(), target.numpy(), rcond=None)[0])
        torch.testing.assert_close(result.x, expected, rtol=1e-6, atol=1e-8)
        assert result.status == ("converged" if shape[0] <= shape[1] and not damping else "least_squares")
        found = scipy.sparse.linalg.lsmr(
            A.numpy(), b.numpy(), damp=damping**0.5, atol=1e-11, btol=1e-11, maxiter=500
        )
        assert result.iterations <= found[2] + 2

    def test_warm_start_with_damping(self):
        A, b = zoo.vector(200, 1).view(20, 10), zoo.vector(20, 2)
        expected = lsmr(A, b, damping=0.5, rtol=1e-12).x
        torch.testing.assert_close(lsmr(A, b, damping=0.5, rtol=1e-12, x0=zoo.vector(10, 3)).x, expected)

    def test_rectangular_operator(self):
        A, b = zoo.vector(200, 1).view(20, 10), zoo.vector(20, 2)
        operator = FunctionOperator(lambda v: A @ v, b[:10], transpose=lambda u: A.T @ u, rows=20)
        torch.testing.assert_close(lsmr(operator, b).x, lsmr(A, b).x)
        torch.testing.assert_close(
            operator.solve(b).x, torch.linalg.lstsq(A, b[:, None])[0][:, 0], rtol=1e-4, atol=1e-6
        )

    def test_bad_input(self):
        with pytest.raises(
            ValueError, match=r"as many rows as b: got A of shape \(3, 2\) and b of shape \(2,\)"
        ):
            lsmr(torch.ones(3, 2), torch.ones(2))
        with pytest.raises(ValueError, match="damping must be non-negative, got -1"):
            lsmr(torch.ones(3, 2), torch.ones(3), damping=-1)


class TestBlockCG:
    @given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**16))
    def test_equals_dense(self, n, k, seed):
        A, B = zoo.spd_matrix(n, 1e3, seed), zoo.vector(n * k, seed + 1).view(n, k)
        result = block_cg(A, B, rtol=1e-10)
        assert [column.status for column in result.columns] == ["converged"] * k
        torch.testing.assert_close(result.x, torch.linalg.solve(A, B), rtol=1e-6, atol=1e-8)
        # In exact arithmetic once.
        assert result.iterations <= 2 * math.ceil(n / min(n, k))

    def test_dependent_and_zero_columns_do_not_break_it(self):
        A, b = zoo.spd_matrix(30, 1e4, 1), zoo.vector(30, 2)
        B = torch.stack([b, 2 * b, 0 * b, b + 1e-14 * zoo.vector(30, 3), zoo.vector(30, 4)], dim=1)
        result = block_cg(A, B, rtol=1e-9)
        assert result.status == "converged"
        torch.testing.assert_close(result.x, torch.linalg.solve(A, B), rtol=1e-5, atol=1e-7)
        assert torch.equal(result.x[:, 2], 0 * b)

    def test_shares_the_krylov_space(self):
        A, B = zoo.spd_matrix(400, 1e4, 1), zoo.vector(400 * 50, 2).view(400, 50)
        together, alone = block_cg(A, B, rtol=1e-6), cg(A, B, rtol=1e-6)
        assert together.status == alone.status == "converged"
        assert 8 * together.iterations < alone.iterations
        assert together.products < 0.25 * alone.products

    def test_preconditioner_and_start(self):
        A, B = zoo.spd_matrix(30, 1e4, 1), zoo.vector(90, 2).view(30, 3)
        assert block_cg(A, B, M=torch.linalg.inv(A), rtol=1e-8).iterations == 1
        assert block_cg(A, B, X0=torch.linalg.solve(A, B), rtol=1e-8).iterations == 0

    def test_single_precision_says_what_it_reached(self):
        A, B = zoo.spd_matrix(100, 1e6, 3).float(), zoo.vector(500, 4).view(100, 5).float()
        result = block_cg(A, B, rtol=1e-7, max_iter=2000)
        true = (B.double() - A.double() @ result.x.double()).norm(dim=0) / B.double().norm(dim=0)
        for column, residual in zip(result.columns, true.tolist(), strict=True):
            assert (column.status == "converged") == (residual <= 1.01e-7)
        assert result.status in ("stagnated", "max_iter")

    def test_bad_input(self):
        with pytest.raises(ValueError, match=r"B must have shape \(n, k\), got \(2,\); use cg"):
            block_cg(torch.eye(2), torch.ones(2))
        with pytest.raises(ValueError, match=r"x0 must have shape \(2, 3\), got \(2,\)"):
            block_cg(torch.eye(2), torch.ones(2, 3), X0=torch.ones(2))


@pytest.mark.parametrize(
    "name",
    ["cg", "minres", "lsmr", "steihaug", "direct", "trust_region", "cholesky", "modified_cholesky", "gltr"],
)
def test_blocks_are_columns(name):
    system = zoo.SYSTEMS["definite"]
    B = zoo.vector(120, 1).view(40, 3)
    result = ALL[name](system.A, B)
    assert result.x.shape == (40, 3)
    for index, column in enumerate(result.columns):
        alone = ALL[name](system.A, B[:, index])
        torch.testing.assert_close(column.x, alone.x)
        assert column.status == alone.status
    assert result.residual_norm == max(column.residual_norm for column in result.columns)
    assert "columns=(3 " in repr(result)
    empty = ALL[name](system.A, B[:, :0])
    assert (empty.x.shape, empty.status) == ((40, 0), "converged")


@pytest.mark.parametrize("solver", [cg, minres, direct, block_cg])
def test_unsymmetric_systems_are_refused(solver):
    A = torch.triu(torch.ones(3, 3))
    for matrix in (A, MatrixOperator(A)):
        with pytest.raises(ValueError, match="A must be symmetric, .*; use lsmr"):
            solver(matrix, torch.ones(3, 1))
    with pytest.raises(TypeError, match=r"A must support A @ v, got function; wrap a function in"):
        solver(lambda v: v, torch.ones(3, 1))
    with pytest.raises(ValueError, match="one device, got meta and cpu"):
        solver(torch.eye(3, device="meta"), torch.ones(3, 1))


@pytest.mark.parametrize("name", ITERATIVE)
def test_nan_in_a_product(name):
    A = torch.eye(4, dtype=torch.float64)
    A[2, 2] = math.nan
    assert ITERATIVE[name](A, torch.ones(4, dtype=torch.float64)).status == "non_finite"
    assert ITERATIVE[name](torch.eye(4), torch.tensor([1.0, math.nan, 1.0, 1.0])).status == "non_finite"


@pytest.mark.parametrize("name", [*ITERATIVE, "gltr"])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e-24), (torch.float64, 1e-165)])
def test_small_right_hand_sides_do_not_underflow(name, dtype, size):
    """Their squares are zero: the norm said so, and the solvers that there was nothing to do."""
    A, b = zoo.spd_matrix(8, 10.0, 1).to(dtype), (size * zoo.vector(8, 2)).to(dtype)
    result = ALL[name](A, b)
    exact = torch.linalg.solve(A.double(), b.double() / size)
    assert result.status == "converged"
    assert (result.x.double() / size - exact).norm() <= 1e-4 * exact.norm()
    assert 0 <= result.residual_norm <= 1e-5 * size


def test_overflow_is_not_convergence():
    result = block_cg(torch.eye(3), torch.full((3, 1), 1e20))
    assert result.status == "converged"
    assert float(result.x[0, 0]) == pytest.approx(1e20, rel=1e-6)
    result = block_cg(1e-25 * torch.eye(3), torch.full((3, 1), 1e20))
    assert result.status == "non_finite"


@pytest.mark.parametrize("name", ["cg", "block_cg", "minres"])
@pytest.mark.parametrize("seed", range(4))
def test_a_right_hand_side_in_the_null_space_does_not_blow_up(name, seed):
    """All of it is rounding to the operator; the first step along it has no bound."""
    A = zoo._with_spectrum(torch.arange(10.0, dtype=torch.float64), seed)
    b = torch.linalg.eigh(A)[1][:, 0]
    result = ALL[name](A, b)
    assert result.status in ("singular", "least_squares", "negative_curvature", "stagnated")
    assert result.residual_norm <= 1.01 * float(b.norm())
    assert float(result.x.norm()) <= 1e-3


def test_minres_with_a_preconditioner_converges_in_the_euclidean_norm():
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        A = torch.diag(torch.linspace(1, 10, 8, dtype=torch.float64))
        order = torch.randperm(8, generator=generator)
        M = torch.diag(torch.logspace(0, -3, 8, dtype=torch.float64)[order])
        b = torch.randn(8, generator=generator, dtype=torch.float64)
        for rtol in (1e-2, 1e-3, 1e-8):
            result = minres(A, b, M=M, rtol=rtol)
            assert (result.status, seed) == ("converged", seed)


def test_minres_least_squares_is_euclidean():
    A = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    M = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    result = minres(A, torch.tensor([0.0, 1.0], dtype=torch.float64), M=M)
    assert result.status == "least_squares"
    assert result.residual_norm == pytest.approx(1.0, rel=1e-6)


def test_claims_of_symmetry_are_checked_where_the_matrix_is_formed():
    N = torch.tensor([[3.0, 1.0], [0.0, 3.0]], dtype=torch.float64)

    class Bare:
        def __matmul__(self, v):
            return N @ v

    b = torch.ones(2, dtype=torch.float64)
    claims = FunctionOperator(lambda v: N @ v, b)
    for solve in (direct, cholesky, lambda A, b: trust_region(A, b, 1.0), lambda A, b: A.solve(b)):
        with pytest.raises(ValueError, match="must be symmetric"):
            solve(claims, b)
    with pytest.raises(ValueError, match="must be symmetric"):
        direct(Bare(), b)
    N = N + N.T
    assert direct(Bare(), torch.ones(2, 3, dtype=torch.float64)).x.shape == (2, 3)


def test_starts_and_preconditioners_of_blocks_are_checked():
    A, B = torch.eye(2), torch.ones(2, 2)
    for start in (torch.zeros(2, 5), torch.zeros(2)):
        with pytest.raises(ValueError, match=r"x0 must have shape \(2, 2\)"):
            cg(A, B, x0=start)
    with pytest.raises(ValueError, match="M must be symmetric positive definite"):
        block_cg(A, B, M=-torch.eye(2))
    mixed = cg(A, torch.tensor([[1.0, torch.nan], [1.0, 1.0]]))
    assert math.isnan(mixed.residual_norm)
