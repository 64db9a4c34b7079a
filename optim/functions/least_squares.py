"""Nonlinear least squares: the parameters that make residuals small, and how well they are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Never

from ..methods.options import (
    check_choice,
    check_count,
    check_positive,
    check_tolerances,
    given,
    refuse_arguments,
)
from .batched.fronts import dtype_of, least_squares_batch, refuse_options
from .batched.squares import Tolerances as BatchTolerances
from .bounds import Box
from .frame import scale_of
from .implicit import attach, depends, gradient_of
from .large_squares import LargeSquares
from .multistart import from_starts, shared
from .problem import Evaluation, Function
from .residuals import ResidualProblem, UserJacobian
from .results import OptimizeResult
from .robust import Robust
from .run import Callback, Limits, Run, check_call
from .squares import Squares, Tolerances
from .variables import Variables

# In double precision; in single precision they are near the rounding.
XTOL, GTOL = 1e-8, 1e-10
METHODS = ("auto", "direct", "lsmr")
# Entries of a Jacobian that is formed: half a gigabyte in double precision.
LARGEST = 2**26

# What to do in place of arguments that scipy.optimize.least_squares takes.
INSTEAD = {
    "diff_step": "Derivatives come from torch.",
    "tr_solver": "Leave it out: the form follows the shape.",
    "jac_sparsity": "Leave it out: products make no use of it.",
    "verbose": "Nothing is printed: print the result, or use a callback or progress=True.",
    "kwargs": "Let residual be lambda x: f(x, **kwargs).",
    "maxiter": "Give max_iter.",
}

MESSAGES = {
    "converged": "the residuals are zero, or orthogonal to the columns of the Jacobian, to a tolerance",
    "singular": "the cost is stationary, but the Jacobian has rank {rank} for {free} free parameters: some"
    " combination of them is not determined; fix parameters, add data, or add a penalty as further residuals",
    "noise_floor": "steps no longer come closer, and rounding hides what they gain; rescale residuals or use"
    " float64",
    "damping": "no step decreases the cost, however short; is residual smooth there, its derivative right?",
    "max_iter": "the limit on steps came first; raise max_iter",
    "max_nfev": "the limit on evaluations came first; raise max_nfev",
    "non_finite": "the Jacobian at x is not finite; choose another x0, or bounds that keep x where it is",
    "unbounded": "the cost fell without bound",
    "running": "an intermediate point, as a callback sees it",
    "stopped": "the callback asked to stop",
}


class LeastSquaresResult(OptimizeResult):
    """The result of ``least_squares``: an ``OptimizeResult`` with what statistics ask.

    Attributes:
        x: Solution, as ``x0`` was given.
        cost: Half the sum of squares of the residuals, or of their loss.
        fun: Residuals there, weighted, flat, shape (m,).
        jac: Their Jacobian, shape (m, n), in the order of the flat x; as the loss corrects it.
        grad: Gradient of the cost, flat, shape (n,).
        optimality: Largest entry of the gradient of what is free.
        active_mask: -1 at a lower bound, 1 at an upper one, 0 inside; flat, shape (n,).
        rank: Of the Jacobian, in the scale of the solver.
    """

    cost: float
    grad: Tensor
    optimality: float
    active_mask: Tensor
    rank: int

    def covariance(self, absolute_sigma: bool = False) -> Tensor:
        """Covariance of the parameters, shape (n, n): ``s^2 (J^T J)^-1``, ``s^2 = 2 cost / (m - rank)``.

        Parameters at a bound are taken as known: their rows are zero.

        Args:
            absolute_sigma: The residuals are in units of their standard deviations: ``s`` is one.

        Raises:
            RuntimeError: the Jacobian has not full rank, so that some variance is infinite, or there are no
                more residuals than parameters to take ``s`` from.
        """
        free = self.active_mask == 0
        m, n = self.jac.shape
        count = int(free.sum())
        if self.rank < count:
            raise RuntimeError(
                f"the covariance needs a Jacobian of full rank, got {self.rank} for {count} free parameters;"
                " fix the others."
            )
        if m <= count and not absolute_sigma:
            raise RuntimeError(
                f"the covariance needs more residuals than parameters, got {m} and {count}; use"
                " absolute_sigma=True where the residuals are in units of their standard deviations."
            )
        inverse = inverse_normal(self.jac[:, free])
        if not absolute_sigma:
            inverse = inverse * (2 * self.cost / (m - count))
        covariance = self.jac.new_zeros(n, n)
        at = free.nonzero()[:, 0]
        covariance[at.unsqueeze(1), at] = inverse
        return covariance

    def standard_errors(self, absolute_sigma: bool = False) -> Tensor:
        """Standard deviations of the parameters, flat, shape (n,): the root of the covariance's diagonal."""
        return self.covariance(absolute_sigma).diagonal().sqrt()


def least_squares(
    residual: Function,
    x0: Any,
    args: Any = (),
    *,
    loss: str | Callable[[Tensor], Any] = "linear",
    f_scale: float = 1.0,
    bounds: Any = None,
    x_scale: Any = "jac",
    weights: Any = None,
    method: str = "auto",
    jac: UserJacobian | None = None,
    ftol: float | None = None,
    xtol: float | None = None,
    gtol: float | None = None,
    max_iter: int | None = None,
    max_nfev: int | None = None,
    callback: Callback | None = None,
    has_aux: bool = False,
    progress: bool = False,
    batched: bool = False,
    in_dims: Any = None,
    implicit: bool = False,
    multistart: bool = False,
    **unsupported: Never,
) -> LeastSquaresResult | Any:
    """Minimise half the sum of squares of ``residual(x)``, or of a robust loss of it, near ``x0``.

    Levenberg and Marquardt's method: one Jacobian a step, decomposed once for every damping; Nielsen's
    control; Moré's scale, so that the units of x do not matter; steps bent along the second derivative of the
    residuals (geodesic acceleration, one evaluation), for squares. It stops where what is left of the way
    changes no parameter in its eighth digit, takes that last step, and says where a parameter is not
    determined.

    Args:
        residual: Called as ``residual(x, *args)`` with x as ``x0`` was given; returns a tensor of m numbers,
            of any shape, once differentiable.
        x0: Start: a tensor of any shape, float32 or float64; a tuple, list or dict of them; numbers or an
            array, which ``residual`` sees as a tensor of float64. Not changed; projected into the bounds.
        args: Further arguments, a tuple; anything else is one argument.
        loss: "linear" for squares; "huber", "soft_l1", "cauchy" as SciPy's; "tukey", the biweight, with
            ``rho(z) = (1 - (1 - z)^3) / 3`` up to z = 1 and 1/3 beyond; or a function of z, shape (m,), that
            returns rho and its first two derivatives, shape (3, m).
        f_scale: Residual beyond which it counts less, in its unit: ``z = (r / f_scale)^2``.
        bounds: (lower, upper), each a number or as ``x0``; pairs for each entry; ``scipy.optimize.Bounds``.
            Parameters at a bound are exactly there.
        x_scale: "jac", Moré's scale; "none", steps are short in the Euclidean norm of x; or the unit of each
            parameter, as ``x0`` or one number.
        weights: Inverse variances of the residuals, shape of ``residual(x0)``: their roots multiply them.
        method: "direct" forms the Jacobian; "lsmr" multiplies by it, without bounds, acceleration or Moré's
            scale: for as many unknowns and residuals that there is no room for it; "auto" does so from 2^26
            entries on.
        jac: ``jac(x, *args)``, shape (m, n) in the flat order of x, in place of torch's derivative.
        ftol: Stop when a step decreased the cost by less than this, relative. None: never, for a small
            decrease is no sign of a minimum.
        xtol: Stop when the step of Gauss and Newton, and all that follow it, change no parameter by more than
            this, relative; 1e-8 in float64 when None, 2e-4 in float32.
        gtol: Stop when the cosine between residuals and the columns of the Jacobian is below this; 1e-10 in
            float64 when None, 1e-4 in float32.
        max_iter: Steps allowed, taken or rejected; ``1000 + 100 n`` when None.
        max_nfev: Evaluations allowed; None for any number.
        callback: Called with the present result after each accepted step; stops by returning True or raising
            StopIteration.
        has_aux: ``residual`` returns ``(residuals, aux)``; the aux of the solution is ``result.aux``.
        progress: Show a progress bar.
        batched: Solve a problem for each row of ``x0``, a tensor, at once: ``residual`` takes and returns all
            of them, shape (B, ...) and (B, m). Fields of the result have a row, ``status`` an entry, for
            each.
        in_dims: ``residual`` is that of one problem, and mapped over the rows of ``x0``: for each of ``args``
            its dimension that goes with them, None for one that all share, as of ``torch.vmap``.
        multistart: ``x0`` holds starts in its first dimension. They are solved as a batch where that can be
            made of the function; the best one is the result, with ``minima``, a list of the different ones.
        implicit: ``result.x`` is differentiable, twice, in the tensors of ``args`` that require gradients, by
            one solve with the Hessian of the cost; ``result.implicit_error`` says to which part of x that is
            right.
        unsupported: Arguments of SciPy's that have another name here; an error.

    Returns:
        A ``LeastSquaresResult``, or an ``OptimizeResult`` where ``batched``; ``success`` says whether
        ``status`` is "converged". "singular": the cost is stationary, but some combination of parameters is
        not determined.

    Raises:
        TypeError: ``x0`` holds no floating-point numbers; ``residual`` returns no real tensor.
        RuntimeError: under ``torch.inference_mode``.
        ValueError: an option is out of range; residuals at ``x0`` are not finite or do not depend on it, or
            change their number; bounds are infeasible.

    Cost: a step, two evaluations and, where it is taken, a Jacobian: ``min(m, n)`` backward passes, in one
    batch where they are small, and ``14 m n^2`` operations or less.

    Reference: Moré (1978); Nielsen (1999); Transtrum and Sethna (2012); Triggs et al. (2000).

    Example:
        >>> t = torch.linspace(0, 1, 20, dtype=torch.float64)
        >>> y = 2 * torch.exp(-3 * t)
        >>> result = least_squares(lambda p: p[0] * torch.exp(-p[1] * t) - y, [1.0, 1.0])
        >>> result.status, result.x.round(6).tolist()
        ('converged', [2.0, 3.0])
    """
    arguments = given(locals())
    refuse_arguments(least_squares, unsupported, INSTEAD)
    check_call("least_squares", callback)
    check_choice(arguments, "method", METHODS)
    check_positive(arguments, "f_scale")
    check_tolerances(arguments, "ftol", "xtol", "gtol")
    check_count(arguments, *(name for name in ("max_iter", "max_nfev") if arguments[name] is not None))
    if multistart or batched or in_dims is not None:
        return _of_many(arguments)
    variables = Variables(x0)
    robust, box = Robust.of(loss, f_scale), Box.of(bounds, variables, two_by_two="sides")
    start = variables.start if box is None else box.project(variables.start)
    evaluation = Evaluation(residual, variables, args, has_aux)
    user_jacobian = _flat(jac, variables, evaluation.args)
    problem = ResidualProblem(evaluation, start, robust, box, _root(weights), user_jacobian)
    tolerances = _tolerances(start.dtype, ftol, xtol, gtol)
    scale = scale_of(x_scale, "jac", variables)
    is_large = method == "lsmr" or (method == "auto" and len(start) * len(problem.point.raw) > LARGEST)
    face: Squares | LargeSquares
    if is_large:
        _check_large(box, jac)
        fixed = None if isinstance(scale, str) else scale
        face = LargeSquares(problem, tolerances, fixed, large_report_of(variables))
    else:
        face = Squares(problem, scale, tolerances, robust.is_linear, report_of(variables))
    run = Run(face, Limits(max_iter or 1000 + 100 * len(start), max_nfev), callback, progress)
    result = run.to_the_end()
    if not implicit or not depends(evaluation.args):
        return result
    return _attached(result, evaluation, problem)


def _attached(result: OptimizeResult, evaluation: Evaluation, problem: ResidualProblem) -> OptimizeResult:
    """With x in the graph of the arguments: by the exact Hessian of the cost."""

    def cost(x: Tensor, args: tuple[Any, ...]) -> Tensor:
        r = evaluation.at(x, args)[0].reshape(-1)
        return problem.robust.value(r if problem.root_weights is None else problem.root_weights * r)

    found = attach(problem.point.x, evaluation.args, gradient_of(cost), free=problem.frame.free)
    return result.changed(x=evaluation.variables.unpack(found.x), implicit_error=found.error)


# Options of one problem that a batch has not.
ALONE = ("loss", "bounds", "weights", "jac", "callback", "max_nfev", "has_aux")


def _of_many(arguments: dict[str, Any]) -> OptimizeResult:
    """Of a batch, or of several starts, from the arguments of ``least_squares``."""
    residual, x0, args = (arguments.pop(name) for name in ("residual", "x0", "args"))
    tolerances = {name: arguments[name] for name in ("ftol", "xtol", "gtol")}
    alone = {name: arguments[name] for name in ALONE}
    alone["loss"] = None if alone["loss"] == "linear" else alone["loss"]
    if arguments.pop("multistart"):
        can_be_batched = all(value is None or value is False for value in alone.values())
        alike = dict(in_dims=shared(args), **tolerances)
        return from_starts(
            x0,
            (lambda x: least_squares(residual, x, args, **alike)) if can_be_batched else None,
            lambda x: least_squares(residual, x, args, **arguments),
        )
    refuse_options("least_squares", alone)
    found = _tolerances(dtype_of(x0), **tolerances)
    in_dims, max_iter, implicit = (arguments[name] for name in ("in_dims", "max_iter", "implicit"))
    relative = BatchTolerances(found.xtol, found.gtol)
    return least_squares_batch(residual, x0, args, in_dims, relative, max_iter, implicit)


def _tolerances(dtype: torch.dtype, ftol: float | None, xtol: float | None, gtol: float | None) -> Tolerances:
    single = torch.finfo(dtype).eps / torch.finfo(torch.float64).eps
    return Tolerances(
        # A step that only the gradient tells from rounding may raise the value.
        ftol=-math.inf if ftol is None else ftol,
        xtol=XTOL * single**0.5 if xtol is None else xtol,
        gtol=GTOL * single**0.7 if gtol is None else gtol,
    )


def _check_large(box: Box | None, jac: Any) -> None:
    for name, value in (("bounds", box), ("jac", jac)):
        if value is not None:
            raise ValueError(
                f"{name} must be None where products take the place of the Jacobian; use method='direct'."
            )


def _root(weights: Any) -> Tensor | None:
    if weights is None:
        return None
    if not isinstance(weights, Tensor):
        weights = torch.as_tensor(weights, device="cpu")
    weights = weights.detach()
    if not bool((weights >= 0).all()) or not bool(weights.isfinite().all()):
        raise ValueError("weights must be finite and not negative, got others; they are inverse variances.")
    return weights.sqrt()


def _flat(jac: UserJacobian | None, variables: Variables, args: tuple[Any, ...]) -> UserJacobian | None:
    if jac is None:
        return None
    if not callable(jac):
        raise TypeError(f"jac must be a function of x, or None, got {jac!r}; derivatives come from torch.")
    return lambda x: jac(variables.unpack(x), *args)


def inverse_normal(J: Tensor) -> Tensor:
    """``(J^T J)^-1`` of full rank, shape (n, n), whatever the units of the columns; without ``J^T J``."""
    scale = J.norm(dim=0)
    R = torch.linalg.qr(J / scale, mode="r").R
    return torch.cholesky_inverse(R, upper=True) / scale / scale.unsqueeze(1)


def report_of(variables: Variables) -> Callable[[Squares, str, Run], LeastSquaresResult]:
    """What makes the result of a face."""

    def report(face: Squares, status: str, run: Run) -> LeastSquaresResult:
        problem, at, point = face.problem, face.at, face.problem.point
        box = problem.box
        free = face.model.gradient.numel()
        rank = 0 if at.is_empty or not at.space.size else at.space.rank
        return LeastSquaresResult(
            x=variables.restore(point.x),
            cost=point.value,
            fun=point.residuals,
            jac=at.jacobian,
            grad=at.jacobian.T @ at.residuals,
            optimality=face.measure(),
            active_mask=box.active(point.x)
            if box is not None
            else torch.zeros_like(point.x, dtype=torch.int8),
            rank=rank,
            status=status,
            success=status == "converged",
            message=MESSAGES[status].format(rank=rank, free=free),
            nit=run.nit,
            **problem.counts()._asdict(),
            history=tuple(run.history),
            **({} if point.aux is None else {"aux": point.aux}),
        )

    return report


def large_report_of(variables: Variables) -> Callable[[LargeSquares, str, Run], OptimizeResult]:
    """The same of a face without a matrix: no rank, no covariance."""

    def report(face: LargeSquares, status: str, run: Run) -> OptimizeResult:
        problem, point = face.problem, face.problem.point
        return OptimizeResult(
            x=variables.restore(point.x),
            cost=point.value,
            fun=point.residuals,
            grad=problem.frame.step(face.model.gradient),
            optimality=face.measure(),
            status=status,
            success=status == "converged",
            message=MESSAGES[status].format(rank="unknown", free=len(point.x)),
            nit=run.nit,
            **problem.counts()._asdict(),
            history=tuple(run.history),
            **({} if point.aux is None else {"aux": point.aux}),
        )

    return report
