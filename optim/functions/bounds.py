"""Box bounds: what they hold, and the part of a space that they leave free.

A variable at a bound is held there while the gradient points out of the box (Bertsekas 1982, Projected Newton
methods for optimization problems with simple constraints, equation 20); the others are free, and a step in
them is projected.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .variables import Variables


class Box:
    """Bounds on the entries of a flat vector.

    Args:
        lower: Shape (n,), minus infinity for none.
        upper: Shape (n,), infinity for none.

    Raises:
        ValueError: a lower bound exceeds the upper one, or is NaN.
    """

    def __init__(self, lower: Tensor, upper: Tensor) -> None:
        self.lower, self.upper = lower, upper
        wrong = ~(lower <= upper)
        if bool(wrong.any()):
            i = int(wrong.nonzero()[0])
            raise ValueError(
                f"bounds must have lower <= upper, got {float(lower[i])} and {float(upper[i])} at entry {i}."
            )

    @classmethod
    def of(cls, bounds: Any, variables: Variables, *, two_by_two: str = "entries") -> Box | None:
        """From what SciPy takes: a pair (lower, upper), pairs for each entry, or ``scipy.optimize.Bounds``.

        None where nothing is bounded.

        Args:
            bounds: One of these; None in place of a number is no bound.
            variables: Of ``x0``.
            two_by_two: What two pairs of numbers are for two unknowns: "entries", a pair for each entry, as
                SciPy's ``minimize`` reads them, or "sides", (lower, upper), as its ``least_squares`` does.

        Raises:
            ValueError: it is none of these, or has another shape than ``x0``.
        """
        if bounds is None:
            return None
        lower, upper = _sides(bounds, variables.start.numel(), two_by_two)
        box = cls(
            variables.pack(_without_none(lower, -np.inf), "bounds"),
            variables.pack(_without_none(upper, np.inf), "bounds"),
        )
        is_bounded = bool(box.lower.isfinite().any()) or bool(box.upper.isfinite().any())
        return box if is_bounded else None

    def project(self, x: Tensor) -> Tensor:
        """The nearest point inside."""
        return torch.minimum(torch.maximum(x, self.lower), self.upper)

    def free(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Which entries may move, of a point inside: Boolean, shape (n,)."""
        is_held = (x <= self.lower) & (gradient >= 0) | (x >= self.upper) & (gradient <= 0)
        return ~is_held

    def active(self, x: Tensor) -> Tensor:
        """-1 at a lower bound, 1 at an upper one, 0 inside; shape (n,)."""
        return (x >= self.upper).to(torch.int8) - (x <= self.lower).to(torch.int8)


def _sides(bounds: Any, n: int, two_by_two: str) -> tuple[Any, Any]:
    if hasattr(bounds, "lb") and hasattr(bounds, "ub"):
        return bounds.lb, bounds.ub
    is_pairs = isinstance(bounds, Sequence) and len(bounds) == n and all(map(_is_pair, bounds))
    if is_pairs and (n != 2 or two_by_two == "entries"):
        return [pair[0] for pair in bounds], [pair[1] for pair in bounds]
    if isinstance(bounds, Sequence) and len(bounds) == 2:
        return bounds[0], bounds[1]
    raise ValueError(
        f"bounds must be a pair (lower, upper), {n} pairs of numbers, or scipy.optimize.Bounds,"
        f" got {type(bounds).__name__}."
    )


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, Sequence) and len(value) == 2 and all(v is None or np.ndim(v) == 0 for v in value)
    )


def _without_none(side: Any, missing: float) -> Any:
    if side is None:
        return missing
    if isinstance(side, list | tuple):
        return [missing if value is None else value for value in side]
    return side
