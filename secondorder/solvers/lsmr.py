"""Least squares with a rectangular operator, by products with it and with its transpose.

Reference: Fong and Saunders (2011), LSMR: an iterative algorithm for sparse least-squares problems,
section 2.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import torch
from torch import Tensor

from secondorder.solvers._checks import (
    check_count,
    check_limits,
    check_right_hand_side,
    check_start,
    check_together,
)
from secondorder.solvers._result import SolveResult, by_columns
from secondorder.solvers._scale import check_range, check_size, rescaled_late
from secondorder.vectors.host import read


@by_columns
@rescaled_late
def lsmr(
    A: Any,
    b: Tensor,
    *,
    x0: Tensor | None = None,
    damping: float = 0.0,
    rtol: float = 1e-6,
    max_iter: int | None = None,
    check_every: int = 1,
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
        check_every: Iterations between two host reads. Those that turn out to be past the end are thrown
            away: results are the same, bit for bit, for up to ``2 check_every - 2`` products more.

    Returns:
        ``SolveResult`` with ``status`` "converged" (the system is solved), "least_squares", "max_iter",
        "stagnated" or "non_finite". ``residual_norm`` is ``norm(b - A x)``; ``quadratic`` is
        ``norm(A x)^2``; ``products`` counts those with ``A`` and with ``A.T``.

    Raises:
        TypeError: ``b`` is not a floating-point tensor, or ``A`` has another dtype or no transpose.
        ValueError: shapes do not fit; ``damping`` or a tolerance is negative.

    Cost: one product with ``A`` and one with ``A.T`` an iteration; vectors of storage: three of length n and
    one for each of ``check_every``, one of length m. Host reads: one for ``check_every`` iterations, and one
    at the end; 12 launches an iteration, 16 with ``damping``.

    Example:
        >>> A = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> lsmr(A, torch.tensor([1.0, 1.0, 0.0])).x
        tensor([0.3333, 0.3333])
    """
    n = _check(A, b, damping)
    check_start(x0, b, n)
    check_limits(rtol, 0.0, max_iter)
    check_count("check_every", check_every, 1)
    limit = 10 * min(n, b.numel()) if max_iter is None else max_iter
    run = _Bidiagonalisation(A, b, x0, math.sqrt(damping), (check_every, limit))
    tolerance, goal = rtol * run.b_norm, rtol
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

    def __init__(self, A: Any, b: Tensor, x0: Tensor | None, shift: float, ahead: tuple[int, int]) -> None:
        """``ahead``: iterations between two reads, and those allowed."""
        self._A, self._b, self._x0, self._shift, self._ahead = A, b, x0, shift, ahead
        self.x = b.new_zeros(A.shape[1]) if x0 is None else x0.to(b)
        self.iteration, self.products, self.norm = 0, 0, 0.0
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
        is_first = self.iteration == 0
        target = torch.cat([self._b, self.x.new_zeros(self.x.shape)]) if self._shift else self._b
        residual = target if is_first and self._x0 is None else target - self._forward(self.x)
        beta, u = _normalised(residual)
        alpha, self._v = _normalised(self._backward(u))
        self._front = u, self._v, alpha
        self._made: deque[tuple[Tensor, float, float]] = deque()
        first = [beta, alpha]
        if is_first:
            largest = self._b.abs().max() if self._b.numel() else self._b.new_zeros(())
            first += [largest, self._b.norm()]
        beta_read, self._alpha, *sizes = self._run(first)
        if sizes:
            largest_read, self.b_norm = sizes
            check_size(largest_read, self.x.dtype, self.products, self._x0)
            if beta_read > 0:
                check_range(self._A, self.products, self.x.dtype, max(self._alpha, self._shift))
        self._begin(beta_read)

    def _begin(self, beta: float) -> None:
        """The numbers of the recurrence, for a first residual of this norm."""
        self._alpha_bar, self._zeta_bar = self._alpha, self._alpha * beta
        self._rho = self._rho_bar = self._c_bar = 1.0
        self._s_bar = self._zeta = 0.0
        self._h, self._h_bar = self._v, torch.zeros_like(self._v)
        # For the norm of the residual (section 5.1).
        self._beta_dd, self._beta_d, self._rho_d = beta, 0.0, 1.0
        self._tau_tilde = self._theta_tilde = 0.0
        self.residual_norm, self.gradient_norm = beta, abs(self._zeta_bar)

    def _run(self, first: list[Tensor]) -> list[float]:
        """Bidiagonalise ahead of what the host knows, and read the numbers together with ``first``."""
        vectors, numbers = [], list(first)
        check_every, limit = self._ahead
        for _ in range(min(check_every, limit - self.iteration)):
            u, v, alpha = self._front
            u = self._forward(v) - alpha * u
            beta = u.norm()
            # Where it is zero the numbers end the iteration, and no vector is used.
            u = u / beta
            v = self._backward(u) - beta * v
            alpha = v.norm()
            v = v / alpha
            self._front = u, v, alpha
            vectors.append(v)
            numbers += [beta, alpha]
        known = read(*numbers)
        pairs = zip(known[len(first) :: 2], known[len(first) + 1 :: 2], strict=True)
        self._made.extend((v, *pair) for v, pair in zip(vectors, pairs, strict=True))
        return known[: len(first)]

    def advance(self) -> None:
        """One step: a product with ``A``, one with its transpose."""
        if not self._made:
            self._run([])
        v, beta, alpha = self._made.popleft()
        alpha = alpha if beta else 0.0
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
        # Each in one pass, and one rounding.
        self._h_bar = torch.sub(self._h, self._h_bar, alpha=factor)
        scale = self._rho * self._rho_bar
        self.x = torch.add(self.x, self._h_bar, alpha=self._zeta / scale if scale else 0.0)
        self._h = torch.sub(v, self._h, alpha=theta / self._rho if self._rho else 0.0)
        self._alpha = alpha
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
        numbers = read(residual[:m].norm(), gradient.norm(), residual.norm(), Ax.dot(Ax))
        residual_norm, gradient_norm, full_norm, quadratic = numbers
        return residual_norm, gradient_norm, full_norm, quadratic


def _normalised(vector: Tensor) -> tuple[Tensor, Tensor]:
    """The norm, and the vector of norm one; a zero vector stays."""
    norm = vector.norm()
    return norm, vector / norm.clamp(min=torch.finfo(vector.dtype).tiny)


def _rotation(a: float, b: float) -> tuple[float, float, float]:
    """``r, c, s`` with ``c a + s b = r``."""
    r = math.hypot(a, b)
    return (r, a / r, b / r) if r > 0 else (0.0, 1.0, 0.0)
