"""Batched ``minimize`` and ``least_squares``: what they take and return."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..implicit import attach, depends, gradient_of
from ..results import OptimizeResult
from ..run import check_call
from ..variables import DTYPES
from . import newton, squares
from .evaluation import Batch, batch_of
from .state import CODES, STATUSES, Solved

# Of small problems: what is not solved then is stuck.
MAX_ITER = 300

ADVICE = {
    "max_iter": "raise max_iter",
    "singular": "a parameter has no effect there: the data do not determine it",
    "flat": "along some direction the curvature is zero to rounding",
    "noise_floor": "no decrease is left that rounding would not hide",
    "damping": "no step decreases the objective, however short",
    "non_finite": "value or derivatives are not finite; choose another x0",
    "unbounded": "the value fell by 1e30: there is no minimum",
}


def minimize_batch(
    fun: Callable[..., Any],
    x0: Any,
    args: Any,
    in_dims: Any,
    tolerances: newton.Tolerances,
    max_iter: int | None,
    implicit: bool = False,
) -> OptimizeResult:
    """``minimize`` of each problem of a batch."""
    batch, start, restored = _prepared("minimize", fun, x0, args, in_dims)
    solved = newton.solve(batch, start, tolerances, max_iter or MAX_ITER)
    result = _result(solved, restored, fun=solved.value, jac=restored(solved.gradient))
    return _attached(result, batch, solved.x, lambda value: value) if implicit else result


def least_squares_batch(
    residual: Callable[..., Any],
    x0: Any,
    args: Any,
    in_dims: Any,
    tolerances: squares.Tolerances,
    max_iter: int | None,
    implicit: bool = False,
) -> OptimizeResult:
    """``least_squares`` of each problem of a batch."""
    batch, start, restored = _prepared("least_squares", residual, x0, args, in_dims)
    solved = squares.solve(batch, start, tolerances, max_iter or MAX_ITER, accelerates=True)
    with torch.no_grad():
        residuals = batch(solved.x)
    gradient = restored(solved.gradient)
    result = _result(solved, restored, cost=solved.value, fun=residuals, grad=gradient)
    return _attached(result, batch, solved.x, lambda r: 0.5 * r.square()) if implicit else result


def _attached(
    result: OptimizeResult, batch: Batch, x: Tensor, objective: Callable[[Tensor], Tensor]
) -> OptimizeResult:
    """With x in the graph of the arguments; each problem by its own Hessian."""
    if not depends(batch.args):
        return result

    def value(x: Tensor, args: tuple[Any, ...]) -> Tensor:
        return objective(batch._replace(args=args)(x))

    found = attach(x, batch.args, gradient_of(value))
    return result.changed(x=found.x.view(result.x.shape), implicit_error=found.error)


def dtype_of(x0: Any) -> torch.dtype:
    """Of the starts; float64 where they are none, which is an error later."""
    return x0.dtype if isinstance(x0, Tensor) and x0.dtype in DTYPES else torch.float64


def refuse_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError for options that one problem has, and a batch has not."""
    for option, value in options.items():
        if value is not None and value is not False:
            raise ValueError(f"batched {name} takes no {option}, got {value!r}; solve problems one by one.")


def _prepared(
    name: str, fun: Callable[..., Any], x0: Any, args: Any, in_dims: Any
) -> tuple[Batch, Tensor, Callable[[Tensor], Tensor]]:
    check_call(name, None)
    if not callable(fun):
        raise TypeError(f"fun must be a function of x, got {type(fun).__name__}.")
    if not isinstance(x0, Tensor):
        raise TypeError(f"x0 must be a tensor with a problem in each row, got {type(x0).__name__}.")
    if x0.dtype not in DTYPES:
        raise TypeError(f"x0 must be of float64 or float32, got {x0.dtype}; use x0.float().")
    if not x0.ndim or not x0.numel():
        raise ValueError(f"x0 must hold a problem in each row, got shape {tuple(x0.shape)}.")
    batch = batch_of(fun, x0, args if isinstance(args, tuple) else (args,), in_dims)
    return batch, x0.detach().reshape(len(x0), -1), lambda t: t.view(x0.shape)


def _result(solved: Solved, restored: Callable[[Tensor], Tensor], **fields: Any) -> OptimizeResult:
    names = [STATUSES[code] for code in solved.status.tolist()]
    counts = Counter(names)
    parts = [f"{counts.pop('converged', 0)} of {len(names)} problems converged"]
    parts += [f"{count} {status} ({ADVICE[status]})" for status, count in counts.most_common()]
    return OptimizeResult(
        x=restored(solved.x),
        **fields,
        status=names,
        success=solved.status == CODES["converged"],
        message="; ".join(parts),
        nit=solved.nit,
        nfev=solved.nfev,
        njev=solved.njev,
        nhev=solved.nhev,
    )
