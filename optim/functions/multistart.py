"""Several starts: solved as one batch, the best one finished by itself, and the different minima listed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from .results import OptimizeResult

# Two solutions are one where no entry differs by more than this part of the largest, or of one.
APART = 1e-4

# Starts (k, *shape) -> solutions, values and statuses of all; and one start -> its result.
Batch = Callable[[Tensor], OptimizeResult]
Single = Callable[[Tensor], OptimizeResult]


class Minimum(NamedTuple):
    """A local minimum that starts led to.

    Attributes:
        x: As one of the starts.
        fun: Objective there.
        starts: That ended there.
    """

    x: Tensor
    fun: float
    starts: int


class _End(NamedTuple):
    """Where a start ended."""

    x: Tensor
    value: float
    status: str


def from_starts(x0: Any, batch: Batch | None, single: Single) -> OptimizeResult:
    """The best of several local solutions.

    Args:
        x0: Starts, shape (k, *shape).
        batch: Solves all of them at once; None where a batch cannot be asked for what is wanted.
        single: Solves one; where a batch cannot be made of the function, each of them.

    Returns:
        The result of the best one, with ``minima``, a list of ``Minimum``, the best first, and ``starts``,
        how many ended with each status.

    Raises:
        TypeError: ``x0`` is no tensor.
        ValueError: it has not two dimensions or more.
        RuntimeError: no start led to a finite value.
    """
    if not isinstance(x0, Tensor):
        raise TypeError(f"x0 must be a tensor with a start in each row, got {type(x0).__name__}.")
    if x0.ndim < 2 or not len(x0):
        raise ValueError(f"x0 must hold starts in its first dimension, got shape {tuple(x0.shape)}.")
    ends = [end for end in _ends(x0, batch, single) if end.value == end.value]
    if not ends:
        raise RuntimeError("no start led to a finite value; choose others.")
    ends.sort(key=lambda end: end.value)
    best = single(ends[0].x)
    found = [_End(best.x.detach(), float(_value(best)), best.status), *ends[1:]]
    return best.changed(minima=_distinct(found), starts=dict(Counter(end.status for end in ends)))


def _value(result: OptimizeResult) -> Any:
    return result["cost"] if "cost" in result else result["fun"]


def _ends(x0: Tensor, batch: Batch | None, single: Single) -> list[_End]:
    try:
        result = None if batch is None else batch(x0)
    except (RuntimeError, ValueError):
        result = None
    if result is None:
        # A function that cannot be mapped over a batch: a branch, or an operation without a rule.
        results = []
        for start in x0:
            try:
                results.append(single(start))
            except ValueError:
                # Not finite at this start.
                continue
        return [_End(r.x.detach(), float(_value(r)), r.status) for r in results]
    values = _value(result).tolist()
    return [_End(x, value, status) for x, value, status in zip(result.x, values, result.status, strict=True)]


def _distinct(ends: list[_End]) -> list[Minimum]:
    """Of ends sorted by value, those that differ: what is no minimum is left out."""
    minima: list[Minimum] = []
    for position, end in enumerate(ends):
        if end.status != "converged" and position > 0:
            continue
        for i, minimum in enumerate(minima):
            size = max(1.0, float(minimum.x.abs().max()))
            if float((minimum.x - end.x).abs().max()) <= APART * size:
                minima[i] = minimum._replace(starts=minimum.starts + 1)
                break
        else:
            minima.append(Minimum(end.x, end.value, 1))
    return minima


def shared(args: Any) -> tuple[None, ...]:
    """``in_dims`` of arguments that all starts have in common."""
    return (None,) * (len(args) if isinstance(args, tuple) else 1)
