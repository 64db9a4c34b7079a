"""What every solver returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

STATUS_TEXT = {
    "converged": "the residual is within the tolerance",
    "max_iter": "the iteration limit came first; raise max_iter or precondition",
    "negative_curvature": "a direction with nonpositive curvature appeared; see direction",
    "boundary": "the step reached the trust radius",
    "hard_case": "b misses the lowest eigenspace; x is completed along it up to the trust radius",
    "stopped": "the callback asked to stop",
    "singular": "A vanishes to rounding in a direction in which b does not; see direction and residual_norm",
    "stagnated": "rounding keeps the true residual above the tolerance; use a higher precision",
    "non_finite": "a product or the right-hand side holds NaN or infinity",
}


class SolveResult(NamedTuple):
    """Solution of a linear system or of a quadratic model, and what happened.

    Attributes:
        x: Solution, shape (n,).
        status: "converged", "max_iter", "negative_curvature", "boundary", "hard_case", "stopped",
            "singular", "stagnated" or "non_finite"; ``STATUS_TEXT`` explains each.
        iterations: Iterations done.
        residual_norm: ``norm(b - A x)``, recomputed at the end, not the recursive one.
        quadratic: ``x^T A x``, with the same product.
        products: Products with ``A`` spent, the one for the residual included.
        direction: Direction ``d`` with ``d^T A d <= 0``, or zero to rounding, where one was met, else None.
        shift: For a trust region, the ``sigma`` of ``(A + sigma I) x = b``; 0.0 elsewhere.
    """

    x: Tensor
    status: str
    iterations: int
    residual_norm: float
    quadratic: float
    products: int
    direction: Tensor | None = None
    shift: float = 0.0

    @property
    def message(self) -> str:
        """One sentence on ``status``: the cause, and the remedy where there is one."""
        return STATUS_TEXT[self.status]

    def __repr__(self) -> str:
        note = "" if self.status == "converged" else f"  # {self.message}"
        return (
            f"SolveResult(status={self.status!r}, iterations={self.iterations}, "
            f"residual_norm={self.residual_norm:.3g},{note}\n  x={self.x})"
        )
