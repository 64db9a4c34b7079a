"""The trust-region solvers that need products alone, against the exact one."""

import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st

from secondorder import FunctionOperator
from secondorder.solvers import cg, gltr, steihaug, trust_region

RADII = (1e-3, 0.3, 3.0, 1e4)


def model(A, b, x):
    return float(0.5 * x @ A @ x - b @ x)


@pytest.mark.parametrize("radius", RADII)
def test_gltr_is_as_good_as_the_exact_solution(system, radius):
    exact = trust_region(system.A, system.b, radius)
    result = gltr(system.A, system.b, radius, rtol=1e-10)
    best = model(system.A, system.b, exact.x)
    size = abs(best) + float(system.A.norm()) * 1e-12
    # Lengths on the boundary are within a tenth, and steps that differ so in length differ so in decrease.
    assert model(system.A, system.b, result.x) <= best + 0.25 * size
    assert float(result.x.norm()) <= 1.1 * radius * (1 + 1e-9)
    rounding = 1e-12 * float(system.A.norm())
    assert (result.shift > rounding) == (exact.shift > rounding)
    if "indefinite" in system.kind:
        assert float(result.direction @ system.A @ result.direction) < 0
    if exact.status in ("converged", "hard_case"):
        assert result.status in (exact.status, "stagnated", "boundary")


@pytest.mark.parametrize("radius", RADII)
def test_optimality(system, radius):
    result = gltr(system.A, system.b, radius, rtol=1e-9)
    values = torch.linalg.eigvalsh(system.A)
    size = float(values.abs().max())
    assert result.shift >= 0
    if system is not zoo.SYSTEMS["hard_case"] or radius < 1e4:
        # There the space of b is solved to the tolerance before it is exhausted, as the docstring says.
        assert float(values[0]) + result.shift >= -1e-8 * max(size, result.shift)
    residual = system.b - system.A @ result.x - result.shift * result.x
    assert float(residual.norm()) == pytest.approx(
        result.residual_norm, abs=1e-9 * size * float(result.x.norm())
    )
    if result.shift > 1e-12 * size:
        assert float(result.x.norm()) == pytest.approx(radius, rel=0.1 + 1e-9)


def test_gltr_takes_few_products_where_the_spectrum_is_clustered():
    A = zoo.SYSTEMS["clustered"].A - 50 * torch.eye(30, dtype=torch.float64)
    b = zoo.vector(30, 1)
    result = gltr(A, b, 1.0, rtol=1e-8)
    assert result.status == "boundary"
    # Three distinct eigenvalues: the Krylov space closes after three, and is then searched for lower ones.
    assert result.iterations <= 8


def test_gltr_decreases_the_model_more_than_steihaug_and_never_less():
    gains = []
    for seed in range(20):
        A, b = zoo.indefinite_matrix(60, seed), zoo.vector(60, 100 + seed)
        ours, other = gltr(A, b, 1.0, rtol=1e-6), steihaug(A, b, 1.0, rtol=1e-6)
        # Both lengths are brought to the radius.
        values = [model(A, b, r.x / r.x.norm()) for r in (ours, other)]
        gains.append(values[0] / values[1])
    assert min(gains) >= 1 - 1e-6
    assert sum(gains) / len(gains) > 1.02


def test_limits_and_precision():
    A, b = zoo.indefinite_matrix(200, 1), zoo.vector(200, 2)
    short = gltr(A, b, 1.0, rtol=1e-12, max_iter=5)
    assert (short.status, short.iterations) == ("max_iter", 5)
    assert float(short.x.norm()) <= 1.1
    single = gltr(A.float(), b.float(), 1.0, rtol=1e-4)
    assert single.status == "boundary"
    assert single.x.dtype == torch.float32
    double = gltr(A, b, 1.0, rtol=1e-9)
    torch.testing.assert_close(single.x.double(), double.x, rtol=0.2, atol=1e-2)
    assert gltr(A, b * torch.nan, 1.0).status == "non_finite"
    assert gltr(FunctionOperator(lambda v: v * torch.nan, b), b, 1.0).status == "non_finite"
    calls = []
    breaks = FunctionOperator(lambda v: A @ v if calls.append(1) or len(calls) != 4 else v * torch.nan, b)
    assert gltr(breaks, b, 1.0, rtol=1e-12).status == "non_finite"


@given(n=st.integers(1, 30), seed=st.integers(0, 10_000), radius=st.floats(1e-3, 1e3))
def test_preconditioned_steihaug_is_steihaug_in_other_variables(n, seed, radius):
    """With ``M = S S^T`` the iterates are those for ``S^T A S`` and ``S^T b``, times ``S``."""
    A, b = zoo.indefinite_matrix(n, seed), zoo.vector(n, seed + 1)
    S = torch.diag(zoo.vector(n, seed + 2).exp())
    ours = steihaug(A, b, radius, M=S @ S.T, rtol=0, max_iter=3)
    plain = steihaug(S.T @ A @ S, S.T @ b, radius, rtol=0, max_iter=3)
    size = float(plain.x.norm())
    torch.testing.assert_close(torch.linalg.solve(S, ours.x), plain.x, rtol=1e-6, atol=1e-6 * size)


def test_cg_with_a_radius_is_steihaug_and_starts_anywhere_inside(indefinite_system):
    A, b = indefinite_system
    ours, other = cg(A, b, radius=0.5), steihaug(A, b, 0.5)
    torch.testing.assert_close(ours.x, other.x, rtol=1e-10, atol=1e-12)
    assert ours.status == other.status
    start = 0.4 * b / b.norm()
    warm = cg(A, b, radius=0.5, x0=start)
    assert float(warm.x.norm()) == pytest.approx(0.5, rel=1e-12)
    assert model(A, b, warm.x) <= model(A, b, start)
    with pytest.raises(ValueError, match="x0 must lie within the radius"):
        cg(A, b, radius=0.5, x0=b)
    with pytest.raises(ValueError, match="x0 must be None with a radius and M"):
        cg(A, b, radius=0.5, x0=start, M=torch.eye(30, dtype=b.dtype))
