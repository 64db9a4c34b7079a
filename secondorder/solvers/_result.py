"""What every solver returns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from secondorder.solvers._checks import check_right_hand_side, check_start
from secondorder.solvers._shown import shown

F = TypeVar("F", bound=Callable[..., Any])

# From harmless to grave: of a block, the gravest status counts.
STATUS_TEXT = {
    "converged": "the residual is within the tolerance",
    "least_squares": "the residual is orthogonal to the range of A to tolerance: no less is in sight",
    "boundary": "the step reached the trust radius",
    "hard_case": "b misses the lowest eigenspace; x is completed along it up to the trust radius",
    "stopped": "the callback asked to stop",
    "max_iter": "the iteration limit came first; raise max_iter or precondition",
    "stagnated": "rounding keeps the true residual above the tolerance; use a higher precision",
    "singular": "A vanishes to rounding in a direction in which b does not; see direction and residual_norm",
    "negative_curvature": "a direction with nonpositive curvature appeared; see direction",
    "non_finite": "a product or the right-hand side holds NaN or infinity",
}


class SolveResult(NamedTuple):
    """Solution of a linear system or of a quadratic model, and what happened.

    Attributes:
        x: Solution, shape (n,), or (n, k) for a block.
        status: A key of ``STATUS_TEXT``, which explains it; of a block the gravest of its columns.
        iterations: Iterations done; of a block, the most of its columns.
        residual_norm: ``norm(b - A x)``, recomputed at the end, not the recursive one; of a block, the
            largest of its columns.
        quadratic: ``x^T A x``, with the same product; of a block, the sum over its columns.
        products: Products of ``A`` with one vector spent, those for residuals included.
        direction: Direction ``d`` with ``d^T A d <= 0``, or zero to rounding, where one was met, else None.
        shift: For a trust region, the ``sigma`` of ``(A + sigma I) x = b``; 0.0 elsewhere.
        columns: Of a block, the result of each column; empty for a vector.
    """

    x: Tensor
    status: str
    iterations: int
    residual_norm: float
    quadratic: float
    products: int
    direction: Tensor | None = None
    shift: float = 0.0
    columns: tuple[SolveResult, ...] = ()

    @property
    def message(self) -> str:
        """One sentence on ``status``: the cause, and the remedy where there is one."""
        return STATUS_TEXT[self.status]

    def __repr__(self) -> str:
        note = "" if self.status == "converged" else f"  # {self.message}"
        statuses = [column.status for column in self.columns]
        counts = ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses))
        block = f" columns=({counts})," if counts else ""
        return (
            f"SolveResult(status={self.status!r}, iterations={self.iterations}, "
            f"residual_norm={self.residual_norm:.3g},{block}{note}\n  x={shown(self.x)})"
        )


def of_columns(columns: Sequence[SolveResult], like: Tensor) -> SolveResult:
    """The result of a block from those of its columns; ``like`` is a vector of the solution's space."""
    order = list(STATUS_TEXT)
    return SolveResult(
        torch.stack([c.x for c in columns], dim=1) if columns else like.new_zeros((like.shape[0], 0)),
        max((c.status for c in columns), key=order.index, default="converged"),
        max((c.iterations for c in columns), default=0),
        _largest([c.residual_norm for c in columns]),
        sum(c.quadratic for c in columns),
        sum(c.products for c in columns),
        columns=tuple(columns),
    )


def _largest(norms: Sequence[float]) -> float:
    """NaN where one is: ``max`` would pass it over."""
    return math.nan if any(map(math.isnan, norms)) else max(norms, default=0.0)


def by_columns(solve: F) -> F:
    """Let a solver for one right-hand side take a block (n, k): one column after another."""

    @wraps(solve)
    def solve_any(A: Any, b: Tensor, *args: Any, **options: Any) -> SolveResult:
        check_right_hand_side(b)
        b = b.detach()
        if b.ndim == 1:
            result: SolveResult = solve(A, b, *args, **options)
            return result
        starts = options.pop("x0", None)
        if starts is not None:
            check_start(starts, b, getattr(A, "shape", (0, b.shape[0]))[1])
        columns = []
        for index, column in enumerate(b.unbind(1)):
            start = {} if starts is None else {"x0": starts[:, index]}
            columns.append(solve(A, column, *args, **options, **start))
        n = b.shape[0] if getattr(A, "shape", None) is None else A.shape[1]
        return of_columns(columns, b.new_zeros(n))

    return cast(F, solve_any)
