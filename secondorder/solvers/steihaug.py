"""Truncated conjugate gradients for the trust-region subproblem.

Reference: Steihaug (1983), The conjugate gradient method and trust regions in large scale
optimization; Nocedal and Wright (2006), algorithm 7.2.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from secondorder.solvers._checks import check_radius
from secondorder.solvers._result import SolveResult
from secondorder.solvers.cg import cg


def steihaug(
    A: Any,
    b: Tensor,
    radius: float,
    *,
    M: Any = None,
    rtol: float = 1e-5,
    atol: float = 0.0,
    max_iter: int | None = None,
    check_every: int = 1,
) -> SolveResult:
    """Minimise ``x^T A x / 2 - b^T x`` over ``norm(x) <= radius`` for a symmetric ``A``, approximately.

    Follows CG from zero until it converges, leaves the ball, or meets nonpositive curvature; in the
    last two cases it goes on along the current direction to the boundary. The decrease is at
    least that of the Cauchy point. Without a preconditioner the norms of the iterates increase, so the
    first exit is the only one (Steihaug 1983, theorem 2.1).

    Args:
        A: Anything with ``A @ v`` for ``v`` of shape (n,), symmetric.
        b: Right-hand side, shape (n,) or (n, k): minus the gradient of the quadratic at zero.
        radius: Trust radius, positive; in the norm of ``M^-1``, Euclidean without ``M``.
        M: Preconditioner, ``M @ r`` close to ``A^-1 r``, symmetric positive definite; identity when None.
        rtol: Stop when ``norm(b - A x) <= max(rtol * norm(b), atol)``. Dimensionless.
        atol: See ``rtol``; in units of ``b``.
        max_iter: Number of iterations allowed; ``10 * n`` when None.
        check_every: Iterations between two host reads, as of ``cg``.

    Returns:
        ``SolveResult`` with ``status`` "converged", "boundary", "negative_curvature" (on the boundary,
        along ``direction``), "max_iter", "stagnated" (rounding keeps the true residual above the tolerance)
        or "non_finite".

    Raises:
        TypeError: ``b`` is not a floating-point tensor, or ``A`` has another dtype.
        ValueError: shapes do not fit; ``radius`` is not positive; a tolerance is negative; ``M`` is not
            positive definite.

    Cost: as of ``cg``; 14 launches an iteration.

    Example:
        >>> A = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
        >>> steihaug(A, torch.tensor([1.0, 1.0]), radius=2.0).status
        'negative_curvature'
    """
    check_radius(radius)
    return cg(
        A,
        b,
        M=M,
        radius=radius,
        rtol=rtol,
        atol=atol,
        max_iter=max_iter,
        check_every=check_every,
    )
