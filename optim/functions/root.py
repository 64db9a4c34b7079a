"""Solve as many equations as unknowns, by their residuals' least squares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Never

from ..methods.options import check_optional, refuse_arguments
from .implicit import attach, depends
from .least_squares import LeastSquaresResult, least_squares
from .problem import Evaluation, Function
from .results import OptimizeResult
from .run import Callback
from .variables import Variables

INSTEAD = {
    "method": "Leave it out: it is Gauss-Newton's method, which is Newton's here, damped where that fails.",
    "tol": "Give atol, a bound on the entries of fun.",
    "options": "Give atol, max_iter or max_nfev themselves.",
    "bounds": "Use least_squares, which has bounds, and look at its cost.",
    "maxfev": "Give max_nfev.",
}

# Units of rounding that a residual may have at a root. Of what fun sums within, nothing is known.
AT_ROOT = 100.0
# Statuses of runs that ended before anything was found out about the point.
UNFINISHED = ("max_iter", "max_nfev", "stopped", "non_finite", "unbounded")

MESSAGES = {
    "converged": "fun is zero to its rounding or to atol, or Newton's step from x is within 1e-8 of x",
    "singular": "fun fell below the precision of fun(x0), but its Jacobian is singular at x, so that nothing"
    " says what is zero: a multiple root, most likely; give atol, what counts as zero",
    "local_minimum": "a minimum of the sum of squares that is no root: the Jacobian is singular there, or as"
    " good as; choose another x0, or use least_squares if a least sum of squares is what you want",
}


def root(
    fun: Function,
    x0: Any,
    args: Any = (),
    *,
    jac: Callable[..., Tensor] | None = None,
    atol: float | None = None,
    x_scale: Any = "jac",
    max_iter: int | None = None,
    max_nfev: int | None = None,
    callback: Callback | None = None,
    has_aux: bool = False,
    progress: bool = False,
    implicit: bool = False,
    **unsupported: Never,
) -> LeastSquaresResult:
    """Find x with ``fun(x) = 0``, as many equations as unknowns.

    The steps are those of ``least_squares``: Newton's near a root, damped where that does not lower the sum
    of squares. Where they end at a point that is a minimum of that sum, but no root, the status says so.

    Args:
        fun: Called as ``fun(x, *args)`` with x as ``x0`` was given; returns a tensor of any shape with as
            many elements as x; differentiable.
        x0: Start: a tensor of any shape, float32 or float64; a tuple, list or dict of them; numbers or an
            array, which ``fun`` sees as a tensor of float64. Not changed.
        args: Further arguments of ``fun``, a tuple; anything else is one argument.
        jac: Called as ``fun`` is; returns its Jacobian, shape (n, n). Taken by torch where None.
        atol: Stop when no entry of ``fun`` exceeds this; None for its rounding.
        x_scale: As of ``least_squares``.
        max_iter: Steps allowed, taken or rejected; None for the default of ``least_squares``.
        max_nfev: Evaluations allowed; None for any number.
        callback: Called with the present ``OptimizeResult`` after each accepted step; stops by returning True
            or raising StopIteration.
        has_aux: ``fun`` returns ``(values, aux)``; the aux of the solution is ``result.aux``.
        progress: Show a progress bar.
        implicit: ``result.x`` is differentiable, twice, in the tensors of ``args`` that require gradients, by
            one solve with the Jacobian; ``result.implicit_error`` says to which part of x that is right.
        unsupported: Arguments of other solvers; an error.

    Returns:
        The result of ``least_squares``, with ``fun`` the equations at x. ``success`` says whether ``status``
        is "converged": the equations hold to ``atol`` or to rounding, that of the largest of them, so bring
        them to similar units; or Newton's step from x changes no entry of x by more than a part of 1e-8.
        Neither "local_minimum" nor "singular", where a root is likely but not certain, is a success.

    Raises:
        TypeError: ``x0`` holds no floating-point numbers; ``fun`` returns no tensor; an argument is unknown.
        ValueError: there are more or fewer equations than unknowns; an option is out of range; ``fun(x0)`` is
            not finite.

    Cost: a step takes one or two evaluations; one that is taken also a Jacobian and its decomposition, about
    ``20 n^3`` operations.

    Example:
        >>> circle_and_line = lambda x: torch.stack([x.square().sum() - 2, x[0] - x[1]])
        >>> result = root(circle_and_line, torch.tensor([2.0, 0.5], dtype=torch.float64))
        >>> result.status, result.x.round(decimals=8)
        ('converged', tensor([1., 1.], dtype=torch.float64))
    """
    refuse_arguments(root, unsupported, INSTEAD)
    check_optional({"atol": atol}, "atol")
    if not callable(fun):
        raise TypeError(f"fun must be a function of x, got {type(fun).__name__}.")
    variables = Variables(x0)
    result = least_squares(
        _square(fun, variables.start.numel(), has_aux),
        x0,
        args,
        jac=jac,
        x_scale=x_scale,
        max_iter=max_iter,
        max_nfev=max_nfev,
        callback=callback if atol is None else _watch(callback, atol),
        has_aux=has_aux,
        progress=progress,
    )
    is_within = atol is not None and _largest(result) <= atol
    status = "converged" if is_within else _status(result, variables.pack(result.x, "x"))
    if status in MESSAGES:
        result = result.changed(status=status, success=status == "converged", message=MESSAGES[status])
    evaluation = Evaluation(fun, variables, args, has_aux)
    if not implicit or not depends(evaluation.args):
        return result
    x = variables.pack(result.x, "x")
    found = attach(
        x, evaluation.args, lambda x, args: evaluation.at(x, args)[0].reshape(-1), is_symmetric=False
    )
    return result.changed(x=variables.unpack(found.x), implicit_error=found.error)


def _watch(callback: Callback | None, atol: float) -> Callback:
    """Stops at ``atol``, after the user's."""

    def watch(result: OptimizeResult) -> bool:
        return bool(callback is not None and callback(result)) or _largest(result) <= atol

    return watch


def _largest(result: OptimizeResult) -> float:
    return float(result.fun.abs().max())


def _square(fun: Function, unknowns: int, has_aux: bool) -> Function:
    """``fun``, of which the number of values is looked at."""

    def equations(x: Any, *args: Any) -> Any:
        values = fun(x, *args)
        r = values[0] if has_aux and isinstance(values, tuple) and len(values) == 2 else values
        if isinstance(r, Tensor) and r.numel() != unknowns:
            raise ValueError(
                f"fun must return as many values as x has entries, {unknowns}, got {r.numel()}. Use"
                " least_squares for more or fewer equations than unknowns."
            )
        return values

    return equations


def _status(result: LeastSquaresResult, x: Tensor) -> str:
    """Of the point where the steps ended, flat, by what can be said of it."""
    r, J = result.fun.detach(), result.jac
    numbers = torch.finfo(r.dtype)
    noise = numbers.eps * (J.abs() @ x.abs() + r.abs())
    # Where squares leave the range of numbers nothing smaller is told from zero.
    if float(r.norm()) <= AT_ROOT * float(noise.norm()) or result.cost <= numbers.tiny:
        return "converged"
    if result.success or result.status in UNFINISHED:
        return result.status
    if result.cost <= numbers.eps**2 * result.history[0].fun:
        return "singular"
    # Nothing lowers the sum of squares. Near a root that rounding hides Newton's step would be short.
    units = J.norm(dim=0)
    newton = torch.linalg.solve_ex(J, r).result
    is_short = bool((units * newton).norm() <= (units * x).norm())
    return result.status if is_short and result.rank == len(x) else "local_minimum"
