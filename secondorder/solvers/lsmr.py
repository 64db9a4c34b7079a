"""Least squares with a rectangular operator, by products with it and with its transpose.

Reference: Fong and Saunders (2011), LSMR: an iterative algorithm for sparse least-squares problems,
section 2.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from secondorder.solvers._checks import check_limits, check_right_hand_side, check_start, check_together
from secondorder.solvers._result import SolveResult, by_columns
from secondorder.solvers._scale import check_range, rescaled


@by_columns
@rescaled
def lsmr(
    A: Any,
    b: Tensor,
    *,
    x0: Tensor | None = None,
    damping: float = 0.0,
    rtol: float = 1e-6,
    max_iter: int | None = None,
) -> SolveResult:
    """Minimise ``norm(A x - b)^2 + damping norm(x)^2``; the solution of least norm, from zero.

    The norm of ``A^T r`` never increases, for ``r = b - A x``. Works for any shape and rank.

    Args:
        A: Anything with ``A @ v`` for ``v`` of shape (n,) and ``A.T @ u`` for ``u`` of shape (m,).
        b: Right-hand side, shape (m,) or (m, k); columns are solved one after another.
        x0: Start, shape (n,) or (n, k); zeros when None.
        damping: Tikhonov shift, non-negative, in units of ``A^T A``.
        rtol: Stop when ``norm(r) <= rtol * norm(b)`` or when ``A^T r - damping x`` is within ``rtol`` of
            zero, relative to ``norm(A) * norm(r)``. Dimensionless.
        max_iter: Number of iterations allowed; ``10 * min(m, n)`` when None.

    Returns:
        ``SolveResult`` with ``status`` "converged" (the system is solved), "least_squares", "max_iter",
        "stagnated" or "non_finite". ``residual_norm`` is ``norm(b - A x)``; ``quadratic`` is
        ``norm(A x)^2``; ``products`` counts those with ``A`` and with ``A.T``.

    Raises:
        TypeError: ``b`` is not a floating-point tensor, or ``A`` has another dtype or no transpose.
        ValueError: shapes do not fit; ``damping`` or a tolerance is negative.

    Cost: one product with ``A``, one with ``A.T`` and two host reads an iteration; vectors of storage:
        three of length n, one of length m.

    Example:
        >>> A = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> lsmr(A, torch.tensor([1.0, 1.0, 0.0])).x
        tensor([0.3333, 0.3333])
    """
    n = _check(A, b, damping)
    check_start(x0, b, n)
    check_limits(rtol, 0.0, max_iter)
    limit = 10 * min(n, b.numel()) if max_iter is None else max_iter
    run = _Bidiagonalisation(A, b, b.new_zeros(n) if x0 is None else x0.to(b), math.sqrt(damping))
    tolerance, goal = rtol * float(b.norm()), rtol
    while True:
        stopped_by = _iterate(run, tolerance * goal / rtol if rtol else 0.0, goal, limit)
        residual_norm, gradient_norm, full_norm, quadratic = run.measure()
        status = "stagnated" if stopped_by == "tolerance" else stopped_by
        if residual_norm <= tolerance:
            status = "converged"
        elif gradient_norm <= rtol * run.norm * full_norm:
            status = "least_squares"
        if status != "stagnated" or goal < rtol:
            break
        # The recurrence has drifted from the truth: once more, from there, for a stricter tolerance.
        goal = 0.1 * rtol
        run.start()
    if not math.isfinite(residual_norm + gradient_norm):
        status = "non_finite"
    return SolveResult(run.x, status, run.iteration, residual_norm, quadratic, run.products)


def _check(A: Any, b: Tensor, damping: float) -> int:
    """Raise for a system that does not fit; returns ``n``."""
    check_right_hand_side(b)
    check_together(A, b)
    if not damping >= 0:
        raise ValueError(f"damping must be non-negative, got {damping}.")
    if not hasattr(A, "T") or not hasattr(A, "shape"):
        raise TypeError(f"A must have a shape and a transpose A.T, got {type(A).__name__}.")
    if len(A.shape) != 2 or A.shape[0] != b.shape[0]:
        raise ValueError(
            f"A must have as many rows as b: got A of shape {tuple(A.shape)} and b of shape {tuple(b.shape)}."
        )
    return int(A.shape[1])


def _iterate(run: _Bidiagonalisation, tolerance: float, rtol: float, limit: int) -> str:
    """Iterate until something stops it: "tolerance", "max_iter" or "non_finite"."""
    while True:
        if not math.isfinite(run.residual_norm + run.gradient_norm):
            return "non_finite"
        if run.residual_norm <= tolerance or run.gradient_norm <= rtol * run.norm * run.residual_norm:
            return "tolerance"
        if run.iteration >= limit:
            return "max_iter"
        run.advance()


class _Bidiagonalisation:
    """Golub-Kahan bidiagonalisation of ``[A; sqrt(damping) I]`` with two rotations an iteration.

    Names as in the paper; ``residual_norm`` and ``gradient_norm`` are those of the recurrence, of the
    stacked system.
    """

    def __init__(self, A: Any, b: Tensor, x0: Tensor, shift: float) -> None:
        self._A, self._b, self._shift = A, b, shift
        self.x, self.iteration, self.products, self.norm = x0, 0, 0, 0.0
        self.start()

    def _forward(self, v: Tensor) -> Tensor:
        self.products += 1
        Av: Tensor = self._A @ v
        return torch.cat([Av, self._shift * v]) if self._shift else Av

    def _backward(self, u: Tensor) -> Tensor:
        self.products += 1
        m = self._b.shape[0]
        Atu: Tensor = self._A.T @ u[:m]
        return Atu + self._shift * u[m:] if self._shift else Atu

    def start(self) -> None:
        """Begin at the present ``x``."""
        is_zero = self.iteration == 0 and not bool(self.x.any())
        target = torch.cat([self._b, self.x.new_zeros(self.x.shape)]) if self._shift else self._b
        residual = target if is_zero else target - self._forward(self.x)
        beta, self._u = _normalised(residual)
        self._alpha, self._v = _normalised(self._backward(self._u))
        if self.iteration == 0 and beta > 0:
            check_range(self._A, self.products, self.x.dtype, max(self._alpha, self._shift))
        self._alpha_bar, self._zeta_bar = self._alpha, self._alpha * beta
        self._rho = self._rho_bar = self._c_bar = 1.0
        self._s_bar = self._zeta = 0.0
        self._h, self._h_bar = self._v, torch.zeros_like(self._v)
        # For the norm of the residual (section 5.1).
        self._beta_dd, self._beta_d, self._rho_d = beta, 0.0, 1.0
        self._tau_tilde = self._theta_tilde = 0.0
        self.residual_norm, self.gradient_norm = beta, abs(self._zeta_bar)

    def advance(self) -> None:
        """One step: a product with ``A``, one with its transpose."""
        beta, self._u = _normalised(self._forward(self._v) - self._alpha * self._u)
        alpha, v = _normalised(self._backward(self._u) - beta * self._v)
        self.norm = max(self.norm, math.hypot(self._alpha, beta))
        rho_old, rho_bar_old, zeta_old = self._rho, self._rho_bar, self._zeta
        self._rho, c, s = _rotation(self._alpha_bar, beta)
        theta = s * alpha
        self._alpha_bar = c * alpha
        theta_bar = self._s_bar * self._rho
        self._rho_bar, c_bar, self._s_bar = _rotation(self._c_bar * self._rho, theta)
        self._c_bar = c_bar
        self._zeta, self._zeta_bar = c_bar * self._zeta_bar, -self._s_bar * self._zeta_bar
        factor = theta_bar * self._rho / (rho_old * rho_bar_old) if rho_old * rho_bar_old else 0.0
        self._h_bar = self._h - factor * self._h_bar
        scale = self._rho * self._rho_bar
        self.x = self.x + (self._zeta / scale if scale else 0.0) * self._h_bar
        self._h = v - (theta / self._rho if self._rho else 0.0) * self._h
        self._alpha, self._v = alpha, v
        self.iteration += 1
        self._update_norms(c, s, theta_bar, zeta_old)

    def _update_norms(self, c: float, s: float, theta_bar: float, zeta_old: float) -> None:
        """The norms of the residual and of its gradient, by the paper's third rotation."""
        beta_hat, self._beta_dd = c * self._beta_dd, -s * self._beta_dd
        theta_tilde_old = self._theta_tilde
        rho_tilde, c_tilde, s_tilde = _rotation(self._rho_d, theta_bar)
        self._theta_tilde, self._rho_d = s_tilde * self._rho_bar, c_tilde * self._rho_bar
        self._beta_d = -s_tilde * self._beta_d + c_tilde * beta_hat
        self._tau_tilde = (zeta_old - theta_tilde_old * self._tau_tilde) / rho_tilde if rho_tilde else 0.0
        tau_d = (self._zeta - self._theta_tilde * self._tau_tilde) / self._rho_d if self._rho_d else 0.0
        self.residual_norm = math.hypot(self._beta_d - tau_d, self._beta_dd)
        self.gradient_norm = abs(self._zeta_bar)

    def measure(self) -> tuple[float, float, float, float]:
        """True norms of ``b - A x``, of the gradient, of the stacked residual, and ``norm(A x)^2``."""
        m = self._b.shape[0]
        product = self._forward(self.x)
        residual = -product
        residual[:m] += self._b
        gradient = self._backward(residual)
        Ax = product[:m]
        return (
            float(residual[:m].norm()),
            float(gradient.norm()),
            float(residual.norm()),
            float(Ax.dot(Ax)),
        )


def _normalised(vector: Tensor) -> tuple[float, Tensor]:
    """The norm, and the vector of norm one; a zero vector stays."""
    norm = float(vector.norm())
    return norm, vector / norm if norm > 0 else vector


def _rotation(a: float, b: float) -> tuple[float, float, float]:
    """``r, c, s`` with ``c a + s b = r``."""
    r = math.hypot(a, b)
    return (r, a / r, b / r) if r > 0 else (0.0, 1.0, 0.0)
