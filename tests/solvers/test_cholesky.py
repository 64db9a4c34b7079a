"""Cholesky and its modification, on the named systems and in the cases that decide."""

import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st

from secondorder import MatrixOperator
from secondorder.solvers import cholesky, modified_cholesky


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_a_definite_matrix_is_told_from_others(system, dtype):
    A, b = system.A.to(dtype), system.b.to(dtype)
    values = torch.linalg.eigvalsh(A.double())
    rounding = 10 * torch.finfo(dtype).eps * len(b) * float(values.abs().max())
    result = cholesky(A, b)
    if values[0] > 10 * rounding:
        assert result.status == "converged"
        return
    if values[0] < -rounding:
        assert result.status == "negative_curvature"
    if result.status != "converged":
        curvature = float(result.direction @ A @ result.direction)
        assert float(result.direction.norm()) == pytest.approx(1, rel=1e-5)
        assert curvature <= rounding
        assert not result.x.any()


@given(n=st.integers(1, 25), seed=st.integers(0, 10_000), damping=st.sampled_from([0.0, 0.1]))
def test_the_modified_solution_descends_and_its_shift_is_moderate(n, seed, damping):
    A, b = zoo.indefinite_matrix(n, seed), zoo.vector(n, seed + 1)
    result = modified_cholesky(A, b, damping=damping)
    shifted = A + (damping + result.shift) * torch.eye(n, dtype=A.dtype)
    values = torch.linalg.eigvalsh(A)
    assert float(torch.linalg.eigvalsh(shifted)[0]) > 0
    assert float(b @ result.x) > 0
    torch.testing.assert_close(shifted @ result.x, b, rtol=1e-8, atol=1e-8 * float(b.norm()))
    if values[0] + damping > 0:
        assert (result.status, result.shift) == ("converged", 0.0)
    else:
        assert result.status == "negative_curvature"
        assert result.shift <= 2 * float(-values[0] - damping) + 2e-3 * float(A.norm())
        assert float(result.direction @ A @ result.direction) < 0


def test_blocks_operators_and_damping():
    system = zoo.SYSTEMS["definite"]
    B = torch.stack([system.b, 2 * system.b], dim=1)
    result = cholesky(MatrixOperator(system.A), B, damping=0.5)
    expected = torch.linalg.solve(system.A + 0.5 * torch.eye(40, dtype=B.dtype), B)
    torch.testing.assert_close(result.x, expected)
    assert result.products == 40
    assert [column.status for column in result.columns] == ["converged"] * 2
    assert result.quadratic == pytest.approx(float((expected * (system.A @ expected)).sum()))


def test_zero_and_empty_matrices():
    zero = modified_cholesky(torch.zeros(3, 3), torch.ones(3))
    assert zero.status == "singular"
    assert zero.shift > 0
    assert cholesky(torch.zeros(0, 0), torch.zeros(0)).status == "converged"
    assert cholesky(torch.eye(2), torch.tensor([1.0, torch.nan])).status == "non_finite"
    with pytest.raises(ValueError, match="A must be finite"):
        cholesky(torch.full((2, 2), torch.nan), torch.ones(2))
