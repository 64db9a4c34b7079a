"""Truncated conjugate gradients for the trust-region subproblem.

Reference: Steihaug (1983), The conjugate gradient method and trust regions in large scale
optimization; Nocedal and Wright (2006), algorithm 7.2.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from secondorder.solvers._checks import check_limits, check_radius, check_system
from secondorder.solvers._result import SolveResult, by_columns
from secondorder.solvers.cg import ConjugateDirections


@by_columns
def steihaug(
    A: Any,
    b: Tensor,
    radius: float,
    *,
    rtol: float = 1e-5,
    atol: float = 0.0,
    max_iter: int | None = None,
) -> SolveResult:
    """Minimise ``x^T A x / 2 - b^T x`` over ``norm(x) <= radius`` for a symmetric ``A``, approximately.

    Follows CG from zero until it converges, leaves the ball, or meets nonpositive curvature; in the
    last two cases it goes on along the current direction to the boundary. The decrease is at
    least that of the Cauchy point. Without a preconditioner the norms of the iterates increase, so the
    first exit is the only one (Steihaug 1983, theorem 2.1).

    Args:
        A: Anything with ``A @ v`` for ``v`` of shape (n,), symmetric.
        b: Right-hand side, shape (n,) or (n, k): minus the gradient of the quadratic at zero.
        radius: Trust radius, Euclidean, positive.
        rtol: Stop when ``norm(b - A x) <= max(rtol * norm(b), atol)``. Dimensionless.
        atol: See ``rtol``; in units of ``b``.
        max_iter: Number of iterations allowed; ``10 * n`` when None.

    Returns:
        ``SolveResult`` with ``status`` "converged", "boundary", "negative_curvature" (on the boundary,
        along ``direction``), "max_iter", "stagnated" (the recursive residual claims convergence, the true
        one denies it) or "non_finite".

    Raises:
        TypeError: ``b`` is not a floating-point tensor, or ``A`` has another dtype.
        ValueError: shapes do not fit; ``radius`` is not positive; a tolerance is negative.

    Cost: one product and four host reads an iteration, five vectors of storage; one product at the end.

    Example:
        >>> A = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
        >>> steihaug(A, torch.tensor([1.0, 1.0]), radius=2.0).status
        'negative_curvature'
    """
    check_system(A, b)
    check_limits(rtol, atol, max_iter)
    check_radius(radius)
    limit = 10 * b.numel() if max_iter is None else max_iter
    tolerance = max(rtol * float(b.norm()), atol)
    run = ConjugateDirections(A, b, None, None)
    status = "max_iter"
    while True:
        if run.residual_norm <= tolerance:
            status = "converged"
        if status == "converged" or run.iteration >= limit:
            break
        curvature = run.curvature()
        if not math.isfinite(curvature) or not math.isfinite(run.residual_norm):
            status = "non_finite"
            break
        x, direction = run.x, run.direction
        if curvature > 0:
            run.advance()
        if curvature <= 0 or float(run.x.norm()) >= radius:
            status = "negative_curvature" if curvature <= 0 else "boundary"
            run.x = x + _distance_to_boundary(x, direction, radius) * direction
            break
    residual_norm, quadratic = run.measure()
    if status == "converged" and not residual_norm <= tolerance:
        status = "stagnated"
    if not math.isfinite(residual_norm):
        status = "non_finite"
    along = direction if status == "negative_curvature" else None
    return SolveResult(run.x, status, run.iteration, residual_norm, quadratic, run.products, along)


def _distance_to_boundary(x: Tensor, direction: Tensor, radius: float) -> float:
    """The positive ``tau`` with ``norm(x + tau * direction) == radius``, without cancellation."""
    a, half_b, c = (float(u.dot(v)) for u, v in ((direction, direction), (x, direction), (x, x)))
    c -= radius * radius
    root = math.sqrt(max(half_b * half_b - a * c, 0.0))
    return -c / (half_b + root) if half_b > 0 else (root - half_b) / a
