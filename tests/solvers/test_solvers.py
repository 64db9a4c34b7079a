"""Each solver against dense linear algebra, in float64; statuses against what really happened."""

import math

import pytest
import scipy.sparse.linalg
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st

from secondorder import FunctionOperator, MatrixOperator
from secondorder.solvers import STATUS_TEXT, block_cg, cg, direct, spectrum, steihaug, trust_region
from secondorder.solvers.cg import ConjugateDirections

SIZES, SEEDS = st.integers(1, 20), st.integers(0, 2**16)


def matrix_of(n, seed, kind):
    """A symmetric matrix: "definite", "indefinite", "singular" or "zero"."""
    if kind == "zero":
        return torch.zeros(n, n, dtype=torch.float64)
    if kind == "definite" or n == 1:
        return zoo.spd_matrix(n, 100.0, seed)
    A = zoo.indefinite_matrix(n, seed)
    return A @ torch.diag((torch.arange(n) > 0).to(A)) @ A.T if kind == "singular" else A


KINDS = st.sampled_from(["definite", "indefinite", "singular", "zero"])


class TestCG:
    def test_solves_as_dense(self, spd_system):
        A, b = spd_system
        result = cg(A, b, rtol=1e-12)
        assert result.status == "converged"
        torch.testing.assert_close(result.x, torch.linalg.solve(A, b), rtol=1e-9, atol=1e-12)
        assert result.residual_norm == pytest.approx(float((b - A @ result.x).norm()), rel=1e-12)
        assert result.quadratic == pytest.approx(float(result.x @ A @ result.x), rel=1e-12)

    def test_iterations_do_not_exceed_scipys(self, spd_system):
        A, b = spd_system
        count = []
        scipy.sparse.linalg.cg(A.numpy(), b.numpy(), rtol=1e-10, atol=0.0, callback=count.append)
        # Scipy stops on the recursive residual as well; one more is a matter of rounding.
        assert cg(A, b, rtol=1e-10).iterations <= len(count) + 1

    @pytest.mark.parametrize("clusters", [1, 3, 5])
    def test_takes_one_iteration_for_each_distinct_eigenvalue(self, clusters):
        values = torch.arange(1, 31, dtype=torch.float64) % clusters + 1.0
        result = cg(zoo._with_spectrum(values, 0), zoo.vector(30, 1), rtol=1e-10)
        assert (result.status, result.iterations) == ("converged", clusters)

    def test_preconditioner_of_the_inverse_takes_one_iteration(self, spd_system):
        A, b = spd_system
        result = cg(A, b, M=torch.linalg.inv(A), rtol=1e-10)
        assert (result.status, result.iterations) == ("converged", 1)

    def test_warm_start_at_the_solution(self, spd_system):
        A, b = spd_system
        result = cg(A, b, x0=torch.linalg.solve(A, b), rtol=1e-10)
        assert (result.status, result.iterations) == ("converged", 0)

    def test_negative_curvature_is_found_and_returned(self, indefinite_system):
        A, b = indefinite_system
        result = cg(A, b)
        assert result.status == "negative_curvature"
        assert float(result.direction @ A @ result.direction) <= 0
        # Up to there CG has minimised: the model is not above its start.
        assert float(result.x @ A @ result.x / 2 - b @ result.x) <= 0

    def test_zero_right_hand_side(self, spd_system):
        result = cg(spd_system[0], torch.zeros(30, dtype=torch.float64))
        assert (result.status, result.iterations, float(result.x.norm())) == ("converged", 0, 0.0)

    def test_iteration_limit(self, spd_system):
        result = cg(*spd_system, max_iter=2, rtol=1e-12)
        assert (result.status, result.iterations) == ("max_iter", 2)
        assert result.residual_norm > 1e-12 * float(spd_system[1].norm())

    def test_singular_and_inconsistent(self):
        A = torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64))
        result = cg(A, torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64))
        assert result.status == "singular"
        assert (A @ result.direction).norm() < 1e-7 * result.direction.norm()
        assert result.residual_norm >= 1.0

    def test_single_precision_does_not_claim_what_it_has_not_reached(self):
        A, b = zoo.spd_matrix(100, 1e6, 3).float(), zoo.vector(100, 4).float()
        result = cg(A, b, rtol=1e-7, max_iter=2000)
        true = float((b.double() - A.double() @ result.x.double()).norm() / b.double().norm())
        assert result.status in ("stagnated", "max_iter")
        assert true > 1e-7

    def test_nan_in_a_product(self, spd_system):
        A, b = spd_system
        A = A.clone()
        A[3, 3] = math.nan
        assert cg(A, b).status == "non_finite"

    def test_callback_sees_the_model_and_stops(self, spd_system):
        A, b = spd_system
        seen = []

        def callback(state):
            seen.append(state)
            return state.iteration == 4

        assert cg(A, b, callback=callback).status == "stopped"
        for state in seen:
            model = float(state.x @ A @ state.x / 2 - b @ state.x)
            assert state.model == pytest.approx(model, rel=1e-10)
        values = [state.model for state in seen]
        assert values == sorted(values, reverse=True)


@given(SIZES, SEEDS, KINDS, st.floats(0.01, 10.0))
def test_trust_region_meets_the_optimality_conditions(n, seed, kind, radius):
    A, b = matrix_of(n, seed, kind), zoo.vector(n, seed + 1)
    check_trust_region(A, b, radius, trust_region(A, b, radius))


@given(st.integers(2, 12), SEEDS, st.floats(0.5, 10.0), st.sampled_from([0.0, 1e-14, 1e-10, 1e-6]))
def test_trust_region_in_and_near_the_hard_case(n, seed, radius, part):
    """``b`` has none, or hardly any, part in the lowest eigenspace."""
    A = matrix_of(n, seed, "indefinite")
    lowest = torch.linalg.eigh(A)[1][:, 0]
    b = zoo.vector(n, seed + 1)
    b = b - (lowest @ b) * lowest + part * lowest
    check_trust_region(A, b, radius, trust_region(A, b, radius))


def check_trust_region(A, b, radius, result):
    """Moré and Sorensen (1983), lemma 2.1, up to the ten percent of the length that are allowed."""
    n, x, shift = len(b), result.x, result.shift
    scale = float(torch.linalg.matrix_norm(A, 2)) + shift
    # Eigenvalues are known to n * eps * norm(A).
    rounding = 100 * n * torch.finfo(b.dtype).eps * (scale * float(x.norm()) + float(b.norm()))
    shifted = A + shift * torch.eye(n, dtype=b.dtype)
    assert float((shifted @ x - b).norm()) <= rounding
    assert shift >= 0
    assert float(torch.linalg.eigvalsh(shifted)[0]) >= -100 * n * torch.finfo(b.dtype).eps * scale
    assert float(x.norm()) <= 1.1 * radius * (1 + 1e-9)
    if shift > 1e-8 * max(scale, 1e-300):
        assert float(x.norm()) >= 0.9 * radius * (1 - 1e-9)
    assert result.quadratic == pytest.approx(float(x @ A @ x), rel=1e-8, abs=rounding * float(x.norm()))


def test_trust_region_at_a_saddle_steps_along_the_lowest_eigenvector():
    A = torch.diag(torch.tensor([2.0, -3.0, 1.0], dtype=torch.float64))
    result = trust_region(A, torch.zeros(3, dtype=torch.float64), 2.0)
    assert result.status == "hard_case"
    assert result.shift == pytest.approx(3.0)
    assert torch.equal(result.x.abs(), torch.tensor([0.0, 2.0, 0.0], dtype=torch.float64))


@given(SIZES, SEEDS, KINDS, st.floats(0.01, 10.0))
def test_steihaug_decreases_at_least_as_the_cauchy_point(n, seed, kind, radius):
    A, b = matrix_of(n, seed, kind), zoo.vector(n, seed + 1)
    result = steihaug(A, b, radius)
    assert float(result.x.norm()) <= radius * (1 + 1e-9)
    curvature, norm = float(b @ A @ b), float(b.norm())
    t = min(norm**2 / curvature, radius / norm) if curvature > 0 else radius / norm
    cauchy = 0.5 * t * t * curvature - t * norm**2
    assert 0.5 * result.quadratic - float(b @ result.x) <= cauchy + 1e-9 * abs(cauchy)
    if result.status in ("boundary", "negative_curvature"):
        assert float(result.x.norm()) == pytest.approx(radius, rel=1e-9)
    if result.status == "negative_curvature":
        assert float(result.direction @ A @ result.direction) <= 0


def test_steihaug_inside_the_ball_is_cg(spd_system):
    A, b = spd_system
    inside = steihaug(A, b, 1e6, rtol=1e-10)
    assert inside.status == "converged"
    torch.testing.assert_close(inside.x, torch.linalg.solve(A, b), rtol=1e-6, atol=1e-9)


class TestDirect:
    @pytest.mark.parametrize("damping", [0.0, 0.3])
    def test_indefinite(self, indefinite_system, damping):
        A, b = indefinite_system
        result = direct(A, b, damping=damping)
        assert result.status == "negative_curvature"
        torch.testing.assert_close(A @ result.x + damping * result.x, b, rtol=1e-10, atol=1e-10)
        assert float(result.direction @ A @ result.direction) < 0
        assert result.quadratic == pytest.approx(float(result.x @ A @ result.x))

    def test_definite(self, spd_system):
        A, b = spd_system
        result = direct(A, b)
        assert result.status == "converged"
        torch.testing.assert_close(result.x, torch.linalg.solve(A, b), rtol=1e-10, atol=1e-12)

    def test_singular_gives_the_least_squares_solution_and_says_so(self):
        A = torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64))
        result = direct(A, torch.tensor([1.0, 1.0, 3.0], dtype=torch.float64))
        assert result.status == "singular"
        assert result.residual_norm == pytest.approx(3.0)
        assert result.x.tolist() == pytest.approx([1.0, 0.5, 0.0])
        consistent = direct(A, torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))
        assert consistent.status == "converged"

    def test_spectrum_is_reused(self, indefinite_system):
        A, b = indefinite_system
        eigen = spectrum(A, b)
        torch.testing.assert_close(direct(eigen, b, damping=0.1).x, direct(A, b, damping=0.1).x)
        torch.testing.assert_close(trust_region(eigen, b, 1.0).x, trust_region(A, b, 1.0).x)

    def test_anything_with_a_product(self, spd_system):
        A, b = spd_system
        operator = FunctionOperator(lambda v: A @ v, b)
        assert direct(operator, b).products == 30
        torch.testing.assert_close(direct(operator, b).x, direct(A, b).x)


@pytest.mark.parametrize("condition", [1e2, 1e5, 1e7])
@pytest.mark.parametrize("solver", [direct, lambda A, b: trust_region(A, b, 1e9)], ids=["direct", "tr"])
def test_dense_solvers_claim_the_residual_that_they_have(solver, condition):
    """The one in coordinates of eigenvectors is smaller than the true one by the rounding of those."""
    A, b = zoo.spd_matrix(100, condition, 3).float(), zoo.vector(100, 4).float()
    result = solver(A, b)
    true = (b.double() - A.double() @ result.x.double()).norm()
    assert result.residual_norm == pytest.approx(float(true), rel=0.2)


@given(st.integers(1, 5), SEEDS, st.floats(-8, 8), st.floats(-8, 8), st.floats(-6, 6), st.booleans())
def test_trust_region_stays_within_the_radius_at_any_scale(n, seed, size_of_A, size_of_b, size, single):
    dtype = torch.float32 if single else torch.float64
    A, b = matrix_of(n, seed, "indefinite").to(dtype), zoo.vector(n, seed + 1).to(dtype)
    radius = 10.0**size
    result = trust_region(A * 10.0**size_of_A, b * 10.0**size_of_b, radius)
    length = float(result.x.norm())
    assert length <= 1.101 * radius
    if result.status in ("boundary", "hard_case"):
        assert length >= 0.899 * radius


def test_trust_region_whose_root_lies_closer_to_the_floor_than_numbers_are_spaced():
    """It once gave a step a quarter longer than the radius."""
    A = torch.tensor([[-3044168.7325322544]], dtype=torch.float64)
    b = torch.tensor([-9.848018728895867e-09], dtype=torch.float64)
    result = trust_region(A, b, 8.220020199380697)
    assert (result.status, float(result.x)) == ("hard_case", pytest.approx(-8.220020199380697))


def test_trust_region_says_that_it_left_out_a_part_of_the_right_hand_side():
    A = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    result = trust_region(A, torch.tensor([1.0, 1e-13], dtype=torch.float64), 1e3)
    assert result.status == "singular"
    assert result.residual_norm == pytest.approx(1e-13)


SOLVERS = {
    "cg": cg,
    "steihaug": lambda A, b: steihaug(A, b, 1.0),
    "direct": direct,
    "trust_region": lambda A, b: trust_region(A, b, 1.0),
}


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
class TestBadInput:
    def test_wrong_length(self, solver):
        with pytest.raises(ValueError, match=r"A must be square and fit b: got A of shape \(3, 3\)"):
            solver(torch.eye(3), torch.ones(2))

    def test_three_dimensions(self, solver):
        with pytest.raises(ValueError, match=r"b must have shape \(n,\) or \(n, k\), got \(3, 1, 1\)"):
            solver(torch.eye(3), torch.ones(3, 1, 1))

    def test_mixed_dtypes(self, solver):
        with pytest.raises(TypeError, match=r"one dtype, got torch.float32 and torch.float64"):
            solver(torch.eye(3), torch.ones(3, dtype=torch.float64))

    def test_integers(self, solver):
        with pytest.raises(TypeError, match=r"floating-point dtype, got torch.int64"):
            solver(torch.eye(3), torch.ones(3, dtype=torch.int64))

    def test_not_a_tensor(self, solver):
        with pytest.raises(TypeError, match="b must be a tensor, got list"):
            solver(torch.eye(3), [1.0, 2.0, 3.0])


def test_options_out_of_range():
    with pytest.raises(ValueError, match="rtol must be non-negative, got -1"):
        cg(torch.eye(2), torch.ones(2), rtol=-1)
    with pytest.raises(ValueError, match="radius must be positive, got 0"):
        steihaug(torch.eye(2), torch.ones(2), 0)
    with pytest.raises(ValueError, match="A must be finite"):
        direct(torch.full((2, 2), math.nan), torch.ones(2))
    with pytest.raises(ValueError, match="M must be symmetric positive definite"):
        cg(torch.eye(2), torch.ones(2), M=-torch.eye(2))
    with pytest.raises(ValueError, match=r"x0 must have shape \(2,\), got \(3,\)"):
        cg(torch.eye(2), torch.ones(2), x0=torch.ones(3))


def test_every_status_has_a_message(spd_system):
    assert cg(*spd_system).message == STATUS_TEXT["converged"]
    assert "status='converged'" in repr(cg(*spd_system))


@pytest.mark.parametrize(
    "solver", [direct, lambda A, b: trust_region(A, b, 1.0), cg], ids=["direct", "tr", "cg"]
)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_right_hand_side_that_is_not_finite(solver, bad):
    assert solver(torch.eye(2), torch.tensor([bad, 1.0])).status == "non_finite"


def test_cg_goes_on_from_the_true_residual_until_it_agrees():
    """In single precision the recursive residual claims convergence too early."""
    A, b = zoo.spd_matrix(100, 1e3, 3).float(), zoo.vector(100, 4).float()
    first, seen = ConjugateDirections(A, b, None, None), []
    while first.residual_norm > 1e-6 * float(b.norm()):
        first.curvature()
        first.advance()
    claimed = first.iteration
    assert first.measure()[0] > 1e-6 * float(b.norm())
    result = cg(A, b, rtol=1e-6, callback=seen.append)
    assert result.iterations > claimed
    assert result.residual_norm < first.measure()[0]
    assert (result.status == "converged") == (result.residual_norm <= 1e-6 * float(b.norm()))


def test_steihaug_does_not_claim_what_it_has_not_reached():
    A, b = zoo.spd_matrix(100, 1e4, 3).float(), zoo.vector(100, 4).float()
    result = steihaug(A, b, 1e6, rtol=1e-5, max_iter=2000)
    true = float((b - A @ result.x).norm())
    assert result.residual_norm == pytest.approx(true, rel=1e-3)
    assert (result.status == "converged") == (true <= 1e-5 * float(b.norm()))
    assert result.status == "stagnated"


def test_options_reach_the_iteration(spd_system):
    A, b = spd_system
    loose = steihaug(A, b, 1e6, rtol=0.0, atol=0.5 * float(b.norm()))
    assert loose.status == "converged"
    assert loose.iterations < steihaug(A, b, 1e6, rtol=1e-8).iterations
    result = MatrixOperator(A).solve(b, solver="cg", max_iter=3)
    assert (result.status, result.iterations) == ("max_iter", 3)
    assert MatrixOperator(A).solve(b, solver="minres", max_iter=3).iterations == 3
    assert MatrixOperator(A).solve(b, solver="lsmr", max_iter=3).iterations == 3


def test_a_step_to_the_boundary_of_a_large_ball_does_not_cancel():
    """``x`` near the boundary, and a direction along it: the positive root loses no digits."""
    A = torch.diag(torch.tensor([1.0, -1e-6], dtype=torch.float64))
    b = torch.tensor([1.0, 1e-7], dtype=torch.float64)
    for radius in (1e3, 1e8):
        result = steihaug(A, b, radius, rtol=1e-12)
        assert float(result.x.norm()) == pytest.approx(radius, rel=1e-12)


def test_block_tolerance_is_the_larger_of_the_two():
    A, B = zoo.spd_matrix(30, 1e3, 1), torch.stack([zoo.vector(30, 2), 1e-3 * zoo.vector(30, 3)], dim=1)
    result = block_cg(A, B, rtol=1e-2, atol=0.5)
    tight = block_cg(A, B, rtol=1e-9)
    assert result.iterations < tight.iterations
    limits = (1e-2 * B.norm(dim=0)).clamp(min=0.5)
    assert all(c.residual_norm <= limit for c, limit in zip(result.columns, limits.tolist(), strict=True))
    # The small column meets the absolute one at once.
    assert result.columns[1].residual_norm > 1e-2 * float(B[:, 1].norm())
