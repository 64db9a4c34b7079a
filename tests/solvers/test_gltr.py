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
    # In one the space of b is solved to the tolerance before it is exhausted, as the docstring says.
    is_missed = system is zoo.SYSTEMS["hard_case"] and radius == 1e4
    # What the model itself is rounded by, where it is evaluated here.
    noise = torch.finfo(system.A.dtype).eps * float(system.A.norm() * result.x.norm() ** 2)
    assert model(system.A, system.b, result.x) <= best + (0.25 if is_missed else 1e-6) * size + noise
    assert float(result.x.norm()) <= radius * (1 + 1e-15)
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
        assert float(result.x.norm()) == pytest.approx(radius, rel=1e-9)


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
    assert float(short.x.norm()) <= 1 + 1e-15
    single = gltr(A.float(), b.float(), 1.0, rtol=1e-4)
    assert single.status == "boundary"
    assert single.x.dtype == torch.float32
    double = gltr(A, b, 1.0, rtol=1e-9)
    torch.testing.assert_close(single.x.double(), double.x, rtol=1e-2, atol=1e-3)
    assert gltr(A, b * torch.nan, 1.0).status == "non_finite"
    assert gltr(FunctionOperator(lambda v: v * torch.nan, b), b, 1.0).status == "non_finite"
    calls = []
    breaks = FunctionOperator(lambda v: A @ v if calls.append(1) or len(calls) != 4 else v * torch.nan, b)
    assert gltr(breaks, b, 1.0, rtol=1e-12).status == "non_finite"


@pytest.mark.parametrize("solve", [gltr, steihaug], ids=["gltr", "steihaug"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@given(
    n=st.integers(1, 60),
    digits=st.floats(0, 12),
    seed=st.integers(0, 2**16),
    radius=st.floats(-4, 6),
    indefinite=st.booleans(),
)
def test_the_step_is_never_longer_than_the_radius(solve, dtype, n, digits, seed, radius, indefinite):
    """Also where rounding keeps the residual above the tolerance, or the iteration ends early."""
    values = torch.logspace(0, -digits, n, dtype=torch.float64)
    if indefinite:
        values[n // 2 :] *= -1
    A, b = zoo._with_spectrum(values, seed).to(dtype), zoo.vector(n, seed + 1).to(dtype)
    A = (A + A.T) / 2
    for rtol, max_iter in ((1e-12, None), (1e-3, None), (1e-12, 3)):
        x = solve(A, b, 10.0**radius, rtol=rtol, max_iter=max_iter).x
        assert float(x.double().norm()) <= 10.0**radius * (1 + 4 * torch.finfo(dtype).eps)


def test_a_vector_that_comes_from_the_seed_of_the_search_does_no_harm():
    for seed in range(8):
        b = torch.randn(2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        result = gltr(torch.eye(2, dtype=torch.float64), b, 10.0)
        assert result.status == "converged"
        torch.testing.assert_close(result.x, b)


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
