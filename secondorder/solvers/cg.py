"""Conjugate gradients, with detection of negative curvature and a residual that is true.

Reference: Hestenes and Stiefel (1952), Methods of conjugate gradients for solving linear systems,
section 3; preconditioned form as in Nocedal and Wright (2006), algorithm 5.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secondorder.solvers._checks import check_limits, check_start, check_system
from secondorder.solvers._result import SolveResult, by_columns


class CGState(NamedTuple):
    """What a callback sees after an iteration.

    Attributes:
        iteration: Iterations done, from 1.
        x: Current iterate, shape (n,). A new tensor each time: it may be kept.
        model: ``x^T A x / 2 - b^T x``, the quadratic that CG minimises.
    """

    iteration: int
    x: Tensor
    model: float


@by_columns
def cg(
    A: Any,
    b: Tensor,
    *,
    x0: Tensor | None = None,
    M: Any = None,
    rtol: float = 1e-5,
    atol: float = 0.0,
    max_iter: int | None = None,
    callback: Callable[[CGState], bool | None] | None = None,
) -> SolveResult:
    """Solve ``A x = b`` for a symmetric positive definite ``A``.

    Stops early when a direction of nonpositive curvature appears; ``x`` is then the last iterate
    before it, and ``direction`` that direction. The recursive residual of CG drifts away from the true
    one in finite precision: when it claims convergence, the true one is computed, and the
    iteration restarts from it until it agrees or no longer improves ("stagnated").

    Args:
        A: Anything with ``A @ v`` for ``v`` of shape (n,), symmetric.
        b: Right-hand side, shape (n,) or (n, k); columns are solved one after another, by ``block_cg``
            together.
        x0: Start, of the shape of ``b``; zeros when None.
        M: Preconditioner, ``M @ r`` close to ``A^-1 r``, symmetric positive definite; identity when None.
        rtol: Stop when ``norm(b - A x) <= max(rtol * norm(b), atol)``. Dimensionless.
        atol: See ``rtol``; in units of ``b``.
        max_iter: Number of iterations allowed; ``10 * n`` when None.
        callback: Called with a ``CGState`` after each iteration; stops the iteration by returning True.

    Returns:
        ``SolveResult`` with ``status`` "converged", "max_iter", "negative_curvature", "singular",
        "stopped", "stagnated" or "non_finite".

    Raises:
        TypeError: ``b`` is not a floating-point tensor, or ``A`` has another dtype.
        ValueError: shapes do not fit; ``A`` is not symmetric; a tolerance is negative; ``M`` is not positive
            definite.

    Cost: one product with ``A``, one with ``M`` and two host reads an iteration, five vectors of
    storage; one more product at the end, and one at the start when ``x0`` is given.

    Example:
        >>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
        >>> cg(A, torch.tensor([1.0, 2.0])).x
        tensor([0.0909, 0.6364])
    """
    check_system(A, b)
    check_start(x0, b, b.shape[0])
    check_limits(rtol, atol, max_iter)
    limit = 10 * b.numel() if max_iter is None else max_iter
    tolerance = max(rtol * float(b.norm()), atol)
    run = ConjugateDirections(A, b, x0, M)
    verified = math.inf
    while True:
        status = _iterate(run, tolerance, limit, callback)
        residual_norm, quadratic = run.measure()
        if status != "converged" or residual_norm <= tolerance:
            break
        if not residual_norm < 0.5 * verified:
            status = "stagnated"
            break
        verified = residual_norm
        run.restart()
    if not math.isfinite(residual_norm):
        status = "non_finite"
    direction = run.direction if status in ("negative_curvature", "singular") else None
    return SolveResult(run.x, status, run.iteration, residual_norm, quadratic, run.products, direction)


def _iterate(
    run: ConjugateDirections,
    tolerance: float,
    limit: int,
    callback: Callable[[CGState], bool | None] | None,
) -> str:
    """Iterate until something stops it; the status says what."""
    while True:
        if not math.isfinite(run.residual_norm):
            return "non_finite"
        if run.residual_norm <= tolerance:
            return "converged"
        if run.iteration >= limit:
            return "max_iter"
        curvature = run.curvature()
        if not math.isfinite(curvature):
            return "non_finite"
        if curvature <= 0:
            return "negative_curvature"
        if run.is_flat:
            return "singular"
        run.advance()
        if callback is not None and callback(run.state()):
            return "stopped"


class ConjugateDirections:
    """The recurrence of CG, without a decision: ``cg`` and ``steihaug`` drive it.

    Between ``curvature()`` and ``advance()`` the caller may look at ``direction`` and stop; ``x`` is then
    unchanged. Counts its products.
    """

    def __init__(self, A: Any, b: Tensor, x0: Tensor | None, M: Any) -> None:
        self._A, self._b, self._M = A, b, M
        self.iteration = 0
        self.products = 0
        self.is_flat = False
        self._steepest = 0.0
        if x0 is None:
            self.x = b.new_zeros(b.shape)
            self._residual = b
        else:
            self.x = x0.to(b)
            self._residual = b - self._multiply(self.x)
        self._aim()

    def _multiply(self, v: Tensor) -> Tensor:
        self.products += 1
        product: Tensor = self._A @ v
        return product

    def _aim(self) -> None:
        """Start a new sequence of directions from the current residual."""
        self.residual_norm = float(self._residual.norm())
        z = self._residual if self._M is None else self._M @ self._residual
        self.direction = z
        self._rz = self._residual.dot(z)
        self._check_preconditioner()

    def _check_preconditioner(self) -> None:
        rz = float(self._rz) if self._M is not None and self.residual_norm > 0 else 1.0
        if rz <= 0:
            raise ValueError(
                f"M must be symmetric positive definite, got r^T M r = {rz:.3g}"
                f" in iteration {self.iteration}."
            )

    def curvature(self) -> float:
        """``d^T A d`` of the next direction ``d``: one product.

        Afterwards ``is_flat`` says whether ``A`` vanishes along ``d`` to rounding, compared with the
        steepest direction so far: the system is singular, and a step along ``d`` has no bound.
        """
        self._Ad = self._multiply(self.direction)
        self._dAd = self.direction.dot(self._Ad)
        curvature, squared_norm = torch.stack([self._dAd, self.direction.dot(self.direction)]).tolist()
        quotient = curvature / squared_norm if squared_norm > 0 else 0.0
        self._steepest = max(self._steepest, quotient)
        self.is_flat = quotient <= torch.finfo(self._Ad.dtype).eps * self._steepest
        return float(curvature)

    def advance(self) -> None:
        """Step to the minimiser along the direction and choose the next one."""
        alpha = self._rz / self._dAd
        self.x = self.x + alpha * self.direction
        self._residual = self._residual - alpha * self._Ad
        z = self._residual if self._M is None else self._M @ self._residual
        previous, self._rz = self._rz, self._residual.dot(z)
        self.direction = z + (self._rz / previous) * self.direction
        self.residual_norm = float(self._residual.norm())
        self.iteration += 1
        self._check_preconditioner()

    def state(self) -> CGState:
        """The current iterate and its model value, from the recursive residual."""
        return CGState(self.iteration, self.x, -0.5 * float(self.x.dot(self._b + self._residual)))

    def measure(self) -> tuple[float, float]:
        """The true ``norm(b - A x)`` and ``x^T A x``: one product."""
        Ax = self._multiply(self.x)
        self._residual_true = self._b - Ax
        return float(self._residual_true.norm()), float(self.x.dot(Ax))

    def restart(self) -> None:
        """Go on from the true residual that ``measure`` found."""
        self._residual = self._residual_true
        self._aim()
