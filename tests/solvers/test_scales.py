"""Systems of any size: what is solved at size one is solved at every other (issue 13, entry 21)."""

import math
from itertools import pairwise

import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st

from secondorder import FunctionOperator
from secondorder.solvers import (
    RelativeProgress,
    block_cg,
    cg,
    cholesky,
    direct,
    eigsh,
    gltr,
    lsmr,
    minres,
    modified_cholesky,
    steihaug,
    trust_region,
)

RTOL = 1e-4
FAR = 1e3  # a radius that many times the solution is not reached


def start(b, size):
    return min(size, torch.finfo(b.dtype).max / 10)


LINEAR = {
    "cg": lambda A, b, size: cg(A, b, rtol=RTOL),
    "cg_x0": lambda A, b, size: cg(A, b, rtol=RTOL, x0=torch.full_like(b, start(b, size))),
    "cg_M": lambda A, b, size: cg(A, b, rtol=RTOL, M=torch.diag(1 / A.diagonal())),
    "block_cg": lambda A, b, size: block_cg(A, b[:, None], rtol=RTOL).columns[0],
    "minres": lambda A, b, size: minres(A, b, rtol=RTOL),
    "minres_x0": lambda A, b, size: minres(A, b, rtol=RTOL, x0=torch.full_like(b, start(b, size))),
    "minres_M": lambda A, b, size: minres(A, b, rtol=RTOL, M=torch.diag(1 / A.diagonal())),
    "lsmr": lambda A, b, size: lsmr(A, b, rtol=RTOL),
    "steihaug": lambda A, b, size: steihaug(A, b, FAR * size, rtol=RTOL),
    "gltr": lambda A, b, size: gltr(A, b, FAR * size, rtol=RTOL),
    "trust_region": lambda A, b, size: trust_region(A, b, FAR * size),
    "direct": lambda A, b, size: direct(A, b),
    "cholesky": lambda A, b, size: cholesky(A, b),
    "modified_cholesky": lambda A, b, size: modified_cholesky(A, b),
}
BOUNDED = {
    "steihaug": steihaug,
    "gltr": gltr,
    "trust_region": lambda A, b, radius, **_: trust_region(A, b, radius),
}
# Decimal exponents of A and of b.
RANGES = {torch.float32: 30, torch.float64: 150}


@st.composite
def scales(draw, margin=0):
    """A data type and the exponents of ``A`` and ``b``, the solution in range with a margin to both ends."""
    dtype = draw(st.sampled_from(list(RANGES)))
    end = RANGES[dtype]
    of_A, of_b = draw(st.integers(-end, end)), draw(st.integers(-end, end))
    # The condition number and the radius need some digits.
    room = math.log10(torch.finfo(dtype).max) - 8
    if margin is not None:
        of_b = max(min(of_b, of_A + int(room)), of_A - int(room))
        of_b = max(min(of_b, end), -end)
    return dtype, of_A, of_b


def system(n, condition, seed, scale, indefinite=False):
    """Both at size one in double precision, and as the solver gets them, in its own."""
    dtype, of_A, of_b = scale
    A, b = zoo.spd_matrix(n, condition, seed), zoo.vector(n, seed + 1)
    if indefinite:
        A = zoo.indefinite_matrix(n, seed)
        A = A / A.abs().max()
    given_A, given_b = (A * 10.0**of_A).to(dtype), (b * 10.0**of_b).to(dtype)
    return given_A.double() / 10.0**of_A, given_b.double() / 10.0**of_b, given_A, given_b


def relative_residual(A, b, result, scale):
    """Of the system at size one, whatever the solution's own."""
    _, of_A, of_b = scale
    x = result.x.double() * 10.0 ** (of_A - of_b)
    shift = result.shift / 10.0**of_A
    return float((b - A @ x - shift * x).norm() / b.norm())


SYSTEMS = {"n": st.integers(1, 12), "condition": st.floats(1, 300), "seed": st.integers(0, 2**16)}


@pytest.mark.parametrize("name", LINEAR)
@given(**SYSTEMS, scale=scales())
def test_definite_systems_are_solved_at_every_scale(name, n, condition, seed, scale):
    A, b, given_A, given_b = system(n, condition, seed, scale)
    result = LINEAR[name](given_A, given_b, 10.0 ** (scale[2] - scale[1]))
    assert result.status == "converged"
    residual = relative_residual(A, b, result, scale)
    assert residual <= 1.01 * RTOL
    assert result.residual_norm / 10.0 ** scale[2] == pytest.approx(residual * float(b.norm()), abs=2e-4)


@pytest.mark.parametrize("name", LINEAR)
@given(**SYSTEMS, scale=scales(margin=None))
def test_claims_are_true_where_the_solution_is_out_of_range(name, n, condition, seed, scale):
    A, b, given_A, given_b = system(n, condition, seed, scale)
    exponent = scale[2] - scale[1]
    result = LINEAR[name](given_A, given_b, 10.0 ** max(min(exponent, 300), -300))
    # Digits are lost below the smallest normal number: then it says so.
    if result.status == "converged":
        assert bool(result.x.isfinite().all())
        assert relative_residual(A, b, result, scale) <= 1.01 * RTOL


@pytest.mark.parametrize("name", BOUNDED)
@given(**SYSTEMS, scale=scales(), part=st.floats(-3, 3), indefinite=st.booleans())
def test_the_radius_holds_at_every_scale(name, n, condition, seed, scale, part, indefinite):
    """And where it binds, the length is the radius."""
    A, b, given_A, given_b = system(n, condition, seed, scale, indefinite)
    radius = 10.0 ** (scale[2] - scale[1] + part)
    result = BOUNDED[name](given_A, given_b, radius, rtol=RTOL)
    length = float((result.x.double() / radius).norm())
    assert length <= 1 + 4 * torch.finfo(scale[0]).eps
    if result.status in ("boundary", "hard_case", "negative_curvature"):
        assert length >= 1 - 1e-4
    # Of size one: their product may be out of range.
    assert float((given_b.double() / given_b.abs().max()) @ (result.x.double() / radius)) >= 0
    if result.status in ("converged", "boundary") and name != "steihaug":
        size = float(A.norm()) + result.shift / 10.0 ** scale[1]
        length = length * 10.0**part / float(b.norm())
        rounding = 10 * torch.finfo(scale[0]).eps * size * length
        assert relative_residual(A, b, result, scale) <= 1.01 * RTOL + rounding


@pytest.mark.parametrize("solve", [cg, minres])
@given(**SYSTEMS, scale=scales())
def test_a_preconditioner_may_have_any_scale(solve, n, condition, seed, scale):
    A, b, _, _ = system(n, condition, seed, (scale[0], 0, 0))
    A, b = A.to(scale[0]), b.to(scale[0])
    M = (torch.diag(1 / A.diagonal()).double() * 10.0 ** scale[1]).to(A)
    result = solve(A, b, M=M, rtol=RTOL)
    assert result.status == "converged"
    assert relative_residual(A.double(), b.double(), result, (A.dtype, 0, 0)) <= 1.01 * RTOL


@given(**SYSTEMS, scale=scales(), indefinite=st.booleans())
def test_scaling_is_exact(n, condition, seed, scale, indefinite):
    """By powers of two: each number of the solution is the same, and so is what is said of it."""
    dtype, of_A, of_b = scale
    _, _, A, b = system(n, condition, seed, (dtype, 0, 0), indefinite)
    scaled_A, scaled_b = A * 2.0 ** (3 * of_A), b * 2.0 ** (3 * of_b)
    for solve in (cg, minres, lsmr):
        plain, other = solve(A, b, rtol=RTOL), solve(scaled_A, scaled_b, rtol=RTOL)
        assert (other.status, other.iterations) == (plain.status, plain.iterations)
        half = 3 * (of_b - of_A) // 2
        expected = plain.x * 2.0**half * 2.0 ** (3 * (of_b - of_A) - half)
        if bool((expected.abs() > torch.finfo(dtype).tiny).all() and expected.isfinite().all()):
            assert torch.equal(other.x, expected)


@pytest.mark.parametrize(("dtype", "exponent"), [(torch.float32, -25), (torch.float64, -150)])
def test_a_callback_sees_the_iterates_of_the_system_that_was_given(dtype, exponent):
    _, _, A, b = system(30, 1e4, 0, (dtype, exponent, exponent // 2))
    seen = []
    result = cg(A, b, rtol=1e-30, max_iter=60, callback=lambda state: seen.append(state) or len(seen) == 7)
    assert (result.status, [state.iteration for state in seen]) == ("stopped", list(range(1, 8)))
    assert torch.equal(seen[-1].x, result.x)
    assert all(later.model < earlier.model < 0 for earlier, later in pairwise(seen))
    progress = RelativeProgress(5e-2)
    assert cg(A, b, rtol=1e-30, callback=progress).status == "stopped"


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("dtype", "exponent"), [(torch.float32, 30), (torch.float64, 150)])
def test_negative_curvature_is_found_and_shown_at_every_scale(dtype, exponent, sign):
    for solve in (cg, lambda A, b: minres(A, b, stop_at_negative_curvature=True), direct, cholesky):
        for seed in range(5):
            A, _, given_A, b = system(12, 1, seed, (dtype, sign * exponent, 0), indefinite=True)
            result = solve(given_A, b)
            d = result.direction.double() / result.direction.double().abs().max()
            assert result.status == "negative_curvature"
            assert float(d @ A @ d) <= 1e-6 * float(d @ d)


@pytest.mark.parametrize("which", ["LM", "SA", "BE"])
@pytest.mark.parametrize(("dtype", "end"), [(torch.float32, 36), (torch.float64, 250)])
def test_eigenvalues_at_every_scale(dtype, end, which):
    generator = torch.Generator().manual_seed(0)
    for exponent in (-end, -end // 2, end // 2, end):
        A, _, given_A, _ = system(60, 100, 1, (dtype, exponent, 0))
        result = eigsh(given_A, 3, which=which, generator=generator)
        values, vectors = result.values.double() / 10.0**exponent, result.vectors.double()
        assert result.status == "converged"
        norm = float(torch.linalg.matrix_norm(A, 2))
        assert float((A @ vectors - vectors * values).norm(dim=0).max()) <= 1e-3 * norm
        exact = torch.linalg.eigvalsh(A)
        wanted = {"LM": exact[-3:], "SA": exact[:3], "BE": exact[[0, -2, -1]]}[which]
        torch.testing.assert_close(values, wanted, rtol=1e-3, atol=1e-5 * norm)


def test_products_are_counted_where_the_scale_was_found_out():
    A, b = zoo.spd_matrix(10, 10.0, 1).float() * 1e-25, zoo.vector(10, 2).float()
    calls = []

    def multiply(v):
        calls.append(1)
        return A @ v

    symmetric, general = FunctionOperator(multiply, b), FunctionOperator(multiply, b, transpose=multiply)
    for solve in (cg, minres, lsmr, lambda A, b: gltr(A, b, 1e30)):
        calls.clear()
        result = solve(general if solve is lsmr else symmetric, b)
        assert (result.status, result.products) == ("converged", len(calls))


ZERO = {
    "cg": lambda A, b, x0: cg(A, b, x0=x0),
    "minres": lambda A, b, x0: minres(A, b, x0=x0),
    "lsmr": lambda A, b, x0: lsmr(A, b, x0=x0),
    "lsmr_damped": lambda A, b, x0: lsmr(A, b, x0=x0, damping=0.5),
    "block_cg": lambda A, b, x0: block_cg(A, b[:, None], X0=x0[:, None]).columns[0],
    "radius": lambda A, b, x0: cg(A, b, x0=x0 / x0.norm(), radius=2.0),
}


@pytest.mark.parametrize("name", ZERO)
@pytest.mark.parametrize("kind", ["definite", "indefinite", "singular"])
def test_the_solution_for_zero_is_zero_whatever_the_start(name, kind):
    """As in SciPy, at once: no residual is small compared with nothing."""
    A = zoo.spd_matrix(20, 1e3, 1) if kind == "definite" else zoo.indefinite_matrix(20, 1)
    if kind == "singular":
        A = zoo._with_spectrum(torch.arange(20.0, dtype=torch.float64), 0)
    b = torch.zeros(20, dtype=torch.float64)
    result = ZERO[name](A, b, zoo.vector(20, 3))
    assert (result.status, result.iterations) == ("converged", 0)
    assert torch.equal(result.x, b)
    assert result.residual_norm == 0


def test_a_zero_column_beside_others_is_zero():
    A, B = zoo.spd_matrix(20, 1e3, 1), torch.stack([zoo.vector(20, 1), torch.zeros(20).double()], dim=1)
    result = block_cg(A, B, X0=zoo.vector(40, 2).view(20, 2), rtol=1e-8)
    assert result.status == "converged"
    torch.testing.assert_close(result.x, torch.linalg.solve(A, B), rtol=1e-5, atol=1e-8)
    assert not result.x[:, 1].any()
