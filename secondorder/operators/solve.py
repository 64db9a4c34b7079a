"""The choice of a solver for a linear operator."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from secondorder.solvers import SolveResult, cg, direct, lsmr, minres

# Up to here an eigendecomposition is cheaper than CG on an ill-conditioned system, and says more.
DIRECT_LIMIT = 500


def solve(
    A: Any, b: Tensor, *, solver: str, damping: float, rtol: float, max_iter: int | None, M: Any
) -> SolveResult:
    """As ``LinearOperator.solve`` says."""
    if not damping >= 0:
        raise ValueError(f"damping must be non-negative, got {damping}.")
    if solver == "auto":
        small = A.shape[0] <= DIRECT_LIMIT
        solver = "lsmr" if not A.is_symmetric else "direct" if small and M is None else "cg"
    if M is not None and solver not in ("cg", "minres"):
        raise ValueError(f"M is for solver='cg' or 'minres', got solver={solver!r}; leave one of them out.")
    if solver == "direct":
        return direct(A, b, damping=damping)
    if solver == "lsmr":
        return lsmr(A, b, damping=damping, rtol=rtol, max_iter=max_iter)
    if solver not in ("cg", "minres"):
        raise ValueError(f"solver must be one of 'auto', 'cg', 'minres', 'direct', 'lsmr', got {solver!r}.")
    iterate = cg if solver == "cg" else minres
    return iterate(A + damping if damping else A, b, M=M, rtol=rtol, max_iter=max_iter)
