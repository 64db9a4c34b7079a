"""Preconditioners as matrices, and what they save."""

import math

import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st

from secondorder import (
    DiagonalPreconditioner,
    MatrixOperator,
    NystromPreconditioner,
    cg,
    diagonal_preconditioner,
    minres,
    nystrom,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def as_matrix(M):
    return M @ torch.eye(M.shape[0], dtype=M.dtype)


def check_definite(M):
    matrix = as_matrix(M)
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-12 * float(matrix.abs().max()))
    assert float(torch.linalg.eigvalsh((matrix + matrix.T) / 2)[0]) > 0


class TestDiagonal:
    def test_is_its_formula(self):
        d, r = zoo.vector(20, 1).square(), zoo.vector(60, 2).view(20, 3)
        M = diagonal_preconditioner(d, damping=0.1, power=0.75)
        torch.testing.assert_close(M @ r, r / (d[:, None] + 0.1) ** 0.75)
        torch.testing.assert_close(M @ r[:, 0], (M @ r)[:, 0])
        torch.testing.assert_close(M.with_damping(0.5) @ r, r / (d[:, None] + 0.5) ** 0.75)
        check_definite(M)
        assert (M.shape, M.dtype, M.device) == ((20, 20), d.dtype, d.device)
        assert repr(M) == "DiagonalPreconditioner(shape=(20, 20), damping=0.1, power=0.75)"

    def test_jacobi_on_a_badly_scaled_system(self):
        A, b, _ = zoo.SYSTEMS["badly_scaled"]
        plain = cg(A, b, rtol=1e-8)
        scaled = cg(A, b, M=diagonal_preconditioner(A.diagonal()), rtol=1e-8)
        assert (plain.status == "converged", scaled.status) in ((True, "converged"), (False, "converged"))
        assert 4 * scaled.iterations < plain.iterations

    def test_bad_input(self):
        for d, options, message in (
            (torch.ones(2, 2), {}, r"diagonal must have shape \(n,\), got \(2, 2\)"),
            (torch.tensor([1.0, 0.0]), {}, "lowest entry of 0; raise damping"),
            (torch.tensor([1.0, -2.0]), {"damping": 1.0}, "lowest entry of -1; raise damping"),
            (torch.tensor([1.0, math.nan]), {}, "lowest entry of nan"),
            (torch.tensor([1.0, math.inf]), {}, "positive and finite"),
            (torch.ones(2), {"damping": -1.0}, "damping must be non-negative, got -1"),
            (torch.ones(2), {"damping": math.nan}, "damping must be non-negative, got nan"),
            (torch.ones(2), {"power": 0.0}, "power must be positive, got 0"),
        ):
            with pytest.raises(ValueError, match=message):
                diagonal_preconditioner(d, **options)
        for d, message in (
            ([1.0], "must be a tensor, got list"),
            (torch.ones(2).int(), "floating-point dtype"),
        ):
            with pytest.raises(TypeError, match=message):
                diagonal_preconditioner(d)


class TestNystrom:
    @DTYPES
    @pytest.mark.parametrize("name", ["flat", "poly", "exp", "step", "low_rank"])
    def test_approximation_from_below(self, name, dtype):
        """``U diag(values) U^T`` lies between zero and ``A``, and near it where the spectrum decays."""
        A, values, rank = zoo.with_named_spectrum(name).to(dtype), zoo.SPECTRA[name], 40
        M = nystrom(A, rank, damping=1.0, generator=seeded())
        approximation = ((M.vectors * M.values) @ M.vectors.T).double()
        error = torch.linalg.eigvalsh(A.double() - approximation)
        # sqrt(eps) where a sketch of a lower rank is inverted: its small eigenvalues are rounding.
        rounding = 10 * torch.finfo(dtype).eps ** (0.5 if name in ("low_rank", "exp") else 0.9)
        assert float(error[0]) > -rounding * float(values.max())
        # Tropp, Yurtsever, Udell and Cevher (2017), theorem 4.1: 1 + p / (rank - p - 1) times the tail from
        # p on, here 20; in expectation, so a fifth more.
        tail = float(values.sort(descending=True)[0][20:].sum())
        assert float(error.sum()) < (1 + 20 / 19) * tail * 1.2 + 300 * rounding
        torch.testing.assert_close(
            M.vectors.T @ M.vectors, torch.eye(rank, dtype=dtype), rtol=0, atol=300 * torch.finfo(dtype).eps
        )
        assert torch.equal(M.values, M.values.sort(descending=True)[0])
        assert float(M.values[-1]) >= 0
        check_definite(nystrom(A.double(), rank, damping=1e-3, generator=seeded()))

    def test_is_its_formula(self):
        A, r = zoo.with_named_spectrum("poly"), zoo.vector(900, 1).view(300, 3)
        M = nystrom(MatrixOperator(A), 10, damping=0.01, generator=seeded())
        U, values = M.vectors, M.values
        expected = U @ torch.diag((values[-1] + 0.01) / (values + 0.01)) @ U.T @ r + r - U @ (U.T @ r)
        torch.testing.assert_close(M @ r, expected)
        torch.testing.assert_close(M @ r[:, 0], (M @ r)[:, 0])
        assert (M.shape, M.dtype, M.device) == ((300, 300), A.dtype, A.device)
        assert "shape=(300, 300), rank=10, damping=0.01, values=0.9" in repr(M)

    def test_another_damping_takes_no_product(self):
        A, columns = zoo.with_named_spectrum("poly"), []
        operator = MatrixOperator(A)
        operator._matmat = lambda V: columns.append(V.shape[1]) or A @ V
        M = nystrom(operator, 10, damping=0.01, generator=seeded())
        other = M.with_damping(2.0)
        assert columns == [10]
        assert (M.damping, other.damping) == (0.01, 2.0)
        torch.testing.assert_close(
            as_matrix(other), as_matrix(nystrom(A, 10, damping=2.0, generator=seeded()))
        )

    @DTYPES
    @pytest.mark.parametrize("name", ["exp", "poly", "step", "low_rank"])
    def test_cg_takes_far_fewer_iterations_where_the_spectrum_decays(self, name, dtype):
        A, b = zoo.with_named_spectrum(name).to(dtype), zoo.vector(300, 1).to(dtype)
        # In single precision the residual that can be reached is eps norm(x): about eps / damping.
        damping, rtol = (1e-4, 1e-6) if dtype == torch.float64 else (1e-3, 1e-3)
        system = MatrixOperator(A) + damping
        plain = cg(system, b, rtol=rtol)
        M = nystrom(A, 40, damping=damping, generator=seeded())
        fast = cg(system, b, M=M, rtol=rtol)
        assert plain.status == fast.status == "converged"
        assert fast.iterations <= 30
        # With the two eigenvalues of the steps plain CG is through in two iterations: nothing to gain.
        assert name == "step" or 3 * fast.iterations < plain.iterations

    def test_condition_number(self):
        A, damping = zoo.with_named_spectrum("exp"), 1e-6
        M = nystrom(A, 80, damping=damping, generator=seeded())
        half = torch.linalg.cholesky(as_matrix(M))
        condition = torch.linalg.cond(half.T @ (A + damping * torch.eye(300, dtype=A.dtype)) @ half)
        # 28 in expectation for twice the effective dimension (theorem 5.1); the matrix alone has 1e6.
        assert float(condition) < 28

    def test_solve_of_an_operator_and_minres(self):
        A, b = zoo.with_named_spectrum("exp"), zoo.vector(300, 1)
        M = nystrom(A, 60, damping=1e-3, generator=seeded())
        x = torch.linalg.solve(A + 1e-3 * torch.eye(300, dtype=A.dtype), b)
        result = MatrixOperator(A).solve(b, solver="cg", damping=1e-3, M=M, rtol=1e-10)
        torch.testing.assert_close(result.x, x, rtol=1e-6, atol=1e-6)
        found = minres(MatrixOperator(A) + 1e-3, torch.stack([b, 2 * b], dim=1), M=M, rtol=1e-10)
        torch.testing.assert_close(found.x[:, 1], 2 * x, rtol=1e-6, atol=1e-6)

    @given(st.integers(1, 25), st.integers(0, 25), st.integers(1, 25), st.integers(0, 2**16))
    def test_any_rank_of_matrix_and_sketch(self, n, rank, columns, seed):
        rank, columns = min(rank, n), min(columns, n)
        values = torch.zeros(n, dtype=torch.float64)
        values[:rank] = torch.linspace(1, 5, rank, dtype=torch.float64)
        A = zoo._with_spectrum(values, seed)
        M = nystrom(A, columns, damping=0.5, generator=seeded(seed))
        check_definite(M)
        if columns >= rank:
            # The sketch holds the range: on it, and on the rest, the preconditioned system is a multiple of
            # the identity.
            x = cg(MatrixOperator(A) + 0.5, torch.ones(n, dtype=A.dtype), M=M, rtol=1e-6)
            assert x.status == "converged"
            assert x.iterations <= 3

    @pytest.mark.parametrize("name", ["indefinite", "negative", "saddle", "zero", "singular_indefinite"])
    def test_operators_that_are_not_semidefinite(self, name):
        """Cholesky fails; the preconditioner leaves those directions alone and stays definite."""
        A = zoo.SYSTEMS[name].A
        M = nystrom(A, max(1, len(A) // 2), damping=0.1, generator=seeded())
        check_definite(M)
        result = cg(MatrixOperator(A) + 0.1, zoo.SYSTEMS[name].b, M=M)
        assert result.status == ("converged" if name == "zero" else "negative_curvature")

    def test_random_state_and_devices(self):
        A, state = zoo.with_named_spectrum("exp"), torch.get_rng_state()
        M = nystrom(A, 5, damping=1.0, generator=seeded())
        assert torch.equal(torch.get_rng_state(), state)
        with torch.device("meta"):
            again = nystrom(A, 5, damping=1.0, generator=torch.Generator("cpu").manual_seed(0))
            torch.testing.assert_close(again @ A[0], M @ A[0])
            torch.testing.assert_close(again.with_damping(2.0) @ A, M.with_damping(2.0) @ A)
            assert nystrom(-A, 5, damping=1.0).values.device == A.device
            diagonal_preconditioner(A.diagonal() + 1) @ A

    def test_bad_input(self):
        A = torch.eye(6)
        for call, message in (
            (lambda: nystrom(A, 0, damping=1.0), "rank must be from 1 to 6, got 0"),
            (lambda: nystrom(A, 7, damping=1.0), "rank must be from 1 to 6, got 7"),
            (lambda: nystrom(A, 2, damping=-1.0), "damping must be non-negative, got -1"),
            (lambda: nystrom(0 * A, 2, damping=0.0), "damping must be positive where A has a lower rank"),
            (lambda: nystrom(A.new_ones(6, 6).triu(), 2, damping=1.0), "A must be symmetric"),
            (lambda: nystrom(A[:, :2], 2, damping=1.0), "A must be square"),
        ):
            with pytest.raises(ValueError, match=message):
                call()
        with pytest.raises(TypeError, match="rank must be an integer"):
            nystrom(A, 2.0, damping=1.0)
        with pytest.raises(RuntimeError, match="A @ v must be finite"):
            nystrom(A * math.nan, 2, damping=1.0)
        assert nystrom(A, 6, damping=0.0).damping == 0.0


@pytest.mark.parametrize("kind", [DiagonalPreconditioner, NystromPreconditioner])
def test_vectors_that_do_not_fit(kind):
    A = torch.eye(4)
    M = diagonal_preconditioner(A[0] + 1) if kind is DiagonalPreconditioner else nystrom(A, 2, damping=1.0)
    assert isinstance(M, kind)
    with pytest.raises(ValueError, match=r"r must have shape \(4,\) or \(4, k\), got \(3,\)"):
        M @ torch.ones(3)
    with pytest.raises(TypeError, match="r must have dtype torch.float32, got torch.float64"):
        M @ torch.ones(4, dtype=torch.float64)
    with pytest.raises(TypeError, match="r must be a tensor, got list"):
        M @ [1.0]
    with pytest.raises(ValueError, match="r must be on cpu, got meta"):
        M @ torch.ones(4, device="meta")
    with pytest.raises(ValueError, match="damping must be non-negative, got -1"):
        M.with_damping(-1.0)
    assert (M @ torch.ones(4, 0)).shape == (4, 0)
