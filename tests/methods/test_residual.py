"""Steps in the space of residuals against dense linear algebra."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optim.methods import decomposition
from optim.methods.acceleration import Acceleration
from optim.methods.problem import QuadraticModel, Residuals
from optim.methods.residual import Residual
from secondorder import MatrixOperator

# Of float64, times the condition of the systems here.
TIGHT = 1e-10


class Rows(MatrixOperator):
    """A matrix; its parts are counted."""

    passes, fits = 3, True

    def __init__(self, matrix):
        super().__init__(matrix, is_symmetric=False)

    def gram(self):
        return self.dense() @ self.dense().T


def drawn(m, n, seed, condition=1e2):
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(k, k, generator=generator, dtype=torch.float64))[0] for k in (m, n))
    values = torch.logspace(0, -math.log10(condition), min(m, n), dtype=torch.float64)
    A = U[:, : min(m, n)] * values @ V[:, : min(m, n)].T
    return A, *(torch.randn(k, generator=generator, dtype=torch.float64) for k in (m, n, n))


def model_of(A, target, rest, shift):
    g = -(A.T @ target) - (0 if rest is None else rest)
    B = A.T @ A + shift * torch.eye(A.shape[1], dtype=A.dtype)
    return QuadraticModel(0.0, g, MatrixOperator(B), float(g.norm())), B


@pytest.mark.parametrize("large", [0, 400], ids=["by gram matrix", "by singular values"])
@given(
    m=st.integers(1, 9),
    n=st.integers(1, 9),
    seed=st.integers(0, 99),
    has_rest=st.booleans(),
    has_before=st.booleans(),
    shift=st.sampled_from([0.0, 0.3]),
    damping=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_the_step_is_that_of_the_damped_system(large, m, n, seed, has_rest, has_before, shift, damping):
    A, target, rest, before = drawn(m, n, seed)
    rest, before = rest if has_rest else None, before if has_before else None
    model, B = model_of(A, target, rest, shift)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decomposition, "LARGE", large)
        space = Residual(model, Residuals(Rows(A), target, rest, shift), damping, before)
    assert space.agrees()
    solution = space.solve(damping)
    b = -model.gradient + (0 if before is None else damping * before)
    expected = torch.linalg.solve(B + damping * torch.eye(n, dtype=A.dtype), b)
    scale = float(expected.norm()) + float(b.norm()) / damping
    torch.testing.assert_close(solution.step, expected, rtol=0, atol=TIGHT * scale)
    assert math.isclose(solution.norm, float(expected.norm()), rel_tol=1e-6, abs_tol=1e-7 * scale)
    linear, quadratic = float(-model.gradient @ expected), float(expected @ B @ expected)
    assert math.isclose(solution.linear, linear, rel_tol=1e-7, abs_tol=1e-8 * model.norm * scale)
    assert math.isclose(solution.quadratic, quadratic, rel_tol=1e-7, abs_tol=1e-8 * scale**2)
    torch.testing.assert_close(space.moved(damping), A @ expected, rtol=1e-7, atol=1e-8 * scale)
    steepest = float(model.gradient @ B @ model.gradient / model.gradient.square().sum())
    assert math.isclose(space.steepest(), steepest, rel_tol=1e-7)


def test_small_singular_values_keep_their_digits():
    """Where those of A^T A are rounding, residuals still say where their minimum is."""
    A, target, *_ = drawn(12, 8, 0, condition=1e9)
    model, B = model_of(A, target, None, 0.0)
    step = Residual(model, Residuals(Rows(A), target, None, 0.0)).solve(1e-26).step
    expected = torch.linalg.lstsq(A, target[:, None]).solution[:, 0]
    torch.testing.assert_close(step, expected, rtol=1e-5, atol=1e-5 * float(expected.norm()))
    normal = torch.linalg.solve(B, A.T @ target)
    assert float((normal - expected).norm()) > 0.01 * float(expected.norm())


def test_a_gram_matrix_gives_way_to_singular_values_for_little_damping(monkeypatch):
    monkeypatch.setattr(decomposition, "LARGE", 0)
    A, target, *_ = drawn(6, 9, 0, condition=1e7)
    model, _ = model_of(A, target, None, 0.0)
    expected = torch.linalg.lstsq(A, target[:, None], driver="gelsd").solution[:, 0]
    for damping, is_close in ((1e-12, False), (1e-22, True)):
        step = Residual(model, Residuals(Rows(A), target, None, 0.0), damping).solve(1e-22).step
        assert (float((step - expected).norm()) < 1e-6 * float(expected.norm())) == is_close


def test_what_is_rank_deficient():
    A, target, *_ = drawn(5, 4, 1)
    A[:, 3] = A[:, 0]
    model, _ = model_of(A, target, None, 0.0)
    step = Residual(model, Residuals(Rows(A), target, None, 0.0)).solve(1e-30).step
    expected = torch.linalg.lstsq(A, target[:, None], driver="gelsd").solution[:, 0]
    torch.testing.assert_close(step, expected, rtol=TIGHT, atol=TIGHT)


def test_zero_and_non_finite_matrices():
    A, target, rest, _ = drawn(3, 4, 1)
    model, _ = model_of(0 * A, target, rest, 0.0)
    solution = Residual(model, Residuals(Rows(0 * A), target, rest, 0.0)).solve(0.5)
    torch.testing.assert_close(solution.step, rest / 0.5)
    assert Residual(model, Residuals(Rows(A * math.nan), target, rest, 0.0)).size == 0


def test_a_gradient_of_something_else_is_noticed():
    A, target, *_ = drawn(6, 4, 0)
    model, _ = model_of(A, target, None, 0.0)
    clipped = model._replace(gradient=0.5 * model.gradient, norm=0.5 * model.norm)
    assert not Residual(clipped, Residuals(Rows(A), target, None, 0.0)).agrees()


def test_the_acceleration_is_the_second_derivative_of_the_geodesic():
    """Of r(x) = (x_1, x_2 + x_1^2): along v its second derivative is (0, 2 v_1^2)."""
    A = torch.eye(2, dtype=torch.float64)
    target = torch.tensor([0.1, 0.2], dtype=torch.float64)
    model, _ = model_of(A, target, None, 0.0)
    space = Residual(model, Residuals(Rows(A), target, None, 0.0))
    change = lambda p: torch.stack([p[0], p[1] + p[0] ** 2])  # noqa: E731
    solution = space.solve(1.0)
    bent = Acceleration(space, change, 0.0)(solution)
    velocity = target / 2
    acceleration = torch.tensor([0.0, -2 * float(velocity[0]) ** 2 / 2], dtype=torch.float64)
    torch.testing.assert_close(bent.step, velocity + acceleration / 2, rtol=1e-12, atol=1e-12)
    assert math.isclose(bent.norm, float(bent.step.norm()), rel_tol=1e-12)
    # In the rounding of the loss there is none, and one as long as the step is not trusted.
    assert Acceleration(space, change, 1.0)(solution) is solution
    assert Acceleration(space, lambda p: 100 * change(p), 0.0)(solution) is solution
    assert Acceleration(space, lambda p: None, 0.0)(solution) is solution
