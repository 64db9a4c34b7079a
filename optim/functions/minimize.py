"""Minimise a function by Newton's method in a trust region: to the last digit, or an account of why not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Never

from ..methods import control
from ..methods.options import (
    check_choice,
    check_count,
    check_optional,
    check_tolerances,
    given,
    refuse_arguments,
)
from ..methods.subspace import CUBIC, Bound, bounded
from ..methods.truncated import in_radius, on_boundary
from .batched.fronts import dtype_of, minimize_batch, refuse_options
from .batched.newton import Tolerances as BatchTolerances
from .bounds import Box
from .frame import scale_of
from .implicit import attach, depends, gradient_of
from .multistart import from_starts, shared
from .newton import Dense, Newton, Products, Report, Tolerances
from .problem import Derivatives, Evaluation, Function, FunctionProblem
from .results import OptimizeResult
from .run import Callback, Limits, Run, check_call
from .saddle import FEW, LANCZOS_STEPS
from .sparse import Sparse
from .variables import Variables

METHODS = ("auto", "newton", "trust-exact", "cubic", "newton-sparse", "newton-cg", "trust-krylov")
DENSE = ("newton", "trust-exact", "cubic")

# What to do in place of arguments that scipy.optimize.minimize takes.
INSTEAD = {
    "constraints": "Write x as a function of free variables, or add a penalty to fun.",
    "tol": "Give gtol, a bound on the entries of the gradient.",
    "options": "Give gtol, max_iter or radius themselves.",
    "maxiter": "Give max_iter.",
    "disp": "Nothing is printed: print the result, or use a callback or progress=True.",
}

# Up to here forming the Hessian and its eigenvalues is cheaper than the products of the same steps.
DIRECT_LIMIT = 100

# Up to here it is cheaper than steps that take more products than there are unknowns.
FORMED_LIMIT = 500

# The model within the radius alone. Another candidate, where the curvature is negative, costs an evaluation,
# and gained nothing on 188 problems (NIST, MGH, classic, networks): 148 solved for 150, a sixth more work.
BALL = Bound(bounded)

# In double precision; in single precision near the rounding.
XTOL = 1e-8

MESSAGES = {
    "converged": "the gradient is within gtol, Newton's step changes nothing, and no negative curvature was"
    " found: '{method}' looks at {seen}",
    "flat": "the gradient is within gtol, but along some direction the curvature is zero to rounding: the"
    " minimiser is not unique, or not determined; fix a variable, or add a penalty, 1e-8 * x.square().sum()",
    "noise_floor": "no decrease is left that rounding would not hide, but the gradient is above gtol or"
    " Newton's step goes on; rescale fun, use float64, or least_squares for a sum of squares",
    "radius": "the trust radius fell below the spacing of numbers at x; is fun smooth, its gradient right?",
    "max_iter": "the iteration limit came first; raise max_iter",
    "max_nfev": "the limit on evaluations came first; raise max_nfev",
    "non_finite": "gradient or Hessian at x are not finite, or span more than the range of numbers; choose"
    " another x0, or bounds that keep x where they are",
    "unbounded": "fun fell by 1e30 times max(1, abs(fun(x0))): it seems to have no minimum; look at its sign,"
    " or give bounds",
    "dear": "the products of a step cost more than the Hessian",
    "running": "an intermediate point, as a callback sees it",
    "stopped": "the callback asked to stop",
}
CERTIFIED = (
    "no decrease is left that rounding would not hide; the gradient may be above gtol, but the curvature is"
    " positive, and Newton's step changes no variable by more than 1e-6, relative"
)
SHOWN = {"auto": "newton-cg"}
SEEN = {
    **dict.fromkeys(DENSE, "all eigenvalues of the Hessian"),
    "newton-sparse": "the signs of all pivots of the Hessian",
    "": f"all eigenvalues up to {FEW} unknowns, beyond at least at what {LANCZOS_STEPS} Lanczos steps show",
}


def minimize(
    fun: Function,
    x0: Any,
    args: Any = (),
    method: str = "auto",
    *,
    jac: Any = None,
    hess: Callable[..., Any] | None = None,
    hessp: Callable[..., Any] | None = None,
    bounds: Any = None,
    x_scale: Any = "auto",
    gtol: float | None = None,
    xtol: float | None = None,
    ftol: float | None = None,
    max_iter: int | None = None,
    max_nfev: int | None = None,
    radius: float | None = None,
    callback: Callback | None = None,
    has_aux: bool = False,
    progress: bool = False,
    batched: bool = False,
    in_dims: Any = None,
    implicit: bool = False,
    multistart: bool = False,
    **unsupported: Never,
) -> OptimizeResult:
    """Find a local minimiser of ``fun`` near ``x0``.

    The dense methods form the Hessian and its eigenvalues: they leave saddle points, and call no point with
    a negative eigenvalue converged. The others need only products with it: where the gradient is within
    ``gtol`` they look for negative curvature, among many unknowns by a few Lanczos steps, and go on along it.
    Where decreases fall below rounding of ``fun``, steps are judged by the gradient.

    Args:
        fun: Called as ``fun(x, *args)`` with x as ``x0`` was given; returns a tensor with a single element;
            twice differentiable.
        x0: Start: a tensor of any shape, float32 or float64; a tuple, list or dict of them; numbers or an
            array, which ``fun`` sees as a tensor of float64. Not changed; projected into the bounds.
        args: Further arguments of ``fun``, a tuple; anything else is one argument.
        method: "newton" or "trust-exact", within a radius, by eigenvalues; "cubic", with a cubic term in
            place of the radius; "newton-sparse", by sparse factors on the host, for a Hessian of which most
            entries are zero: their places are found once, and a few products give all of it; "newton-cg",
            Steihaug's CG; "trust-krylov", Lanczos steps on along the boundary (GLTR); "auto": "newton" up to
            100 unknowns; "newton-cg" beyond, up to 500 until steps cost more than the Hessian would.
        jac: ``jac(x, *args)``, the gradient as ``x0``; True where ``fun`` returns ``(value, gradient)``; None
            for torch's.
        hess: ``hess(x, *args)``, the Hessian, shape (n, n), in the flat order of x; None for torch's.
        hessp: ``hessp(x, v, *args)``, its product with v, both as ``x0``; for the methods by products.
        bounds: Pairs for each entry; (lower, upper), each a number or as ``x0``; ``scipy.optimize.Bounds``.
            Variables at a bound are exactly there (``result.active_mask``).
        x_scale: "auto", units from the diagonal of the Hessian, for dense methods; "none": steps are short
            in the Euclidean norm of x; or the unit of each variable, as ``x0`` or one number.
        gtol: No entry of the gradient may exceed this; the square root of the precision of ``x0`` when
            None (1.5e-8 in float64, 3.5e-4 in float32). Needed, and enough with one of the next two:
        xtol: Newton's step changes no variable by more than this, relative; 1e-8 in float64 when None.
        ftol: Newton's step promises less than this, relative to the value; the precision of ``x0`` when None.
        max_iter: Steps allowed, taken or rejected; ``5000 + 10 n`` when None.
        max_nfev: Evaluations allowed; None for any number.
        radius: First trust radius, in scaled units; ``max(1, norm(x0))`` when None.
        callback: Called with the present ``OptimizeResult`` after each accepted step; stops by returning
            True or raising StopIteration.
        has_aux: ``fun`` returns ``(value, aux)``; the aux of the solution is ``result.aux``.
        progress: Show a progress bar.
        batched: Solve a problem for each row of ``x0``, a tensor, at once: ``fun`` takes all of them, shape
            (B, ...), and returns a value for each, shape (B,). Fields of the result have a row, ``status`` an
            entry, for each.
        in_dims: ``fun`` is that of one problem, and mapped over the rows of ``x0``: for each of ``args`` its
            dimension that goes with them, None for one that all share, as of ``torch.vmap``.
        multistart: ``x0`` holds starts in its first dimension. They are solved as a batch where that can be
            made of the function; the best one is the result, with ``minima``, a list of the different ones.
        implicit: ``result.x`` is differentiable, twice, in the tensors of ``args`` that require gradients, by
            one solve with the Hessian; ``result.implicit_error`` says to which part of x that is right.
        unsupported: Arguments of other minimisers; an error.

    Returns:
        An ``OptimizeResult``; ``success`` says whether ``status`` is "converged", or "noise_floor" at a point
        of positive curvature that Newton's step would not change in its sixth digit. "flat": a minimum to
        rounding, along some direction of which there is no curvature.

    Raises:
        TypeError: ``x0`` holds no floating-point numbers; ``fun`` returns no tensor; an argument is unknown.
        RuntimeError: under ``torch.inference_mode``.
        ValueError: an option is out of range; ``fun(x0)`` is not one finite number or does not depend on x.

    Cost: dense: a step takes one evaluation; one that is taken also a gradient and a Hessian (``n`` products
    and about ``9 n^3`` operations), a rejected one nothing more. By products: a step takes up to ``10 n``,
    and one that is taken a gradient; a rejected one is shortened, an evaluation each, before another radius
    costs products. At its end all eigenvalues, ``n`` products, up to 250 unknowns, or 1000 where the steps
    took more; else about 70.

    Reference: Conn, Gould and Toint (2000), Trust-region methods; Cartis, Gould and Toint (2011), Adaptive
    cubic regularisation methods; Steihaug (1983); Gould, Lucidi, Roma and Toint (1999).

    Example:
        >>> rosenbrock = lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
        >>> result = minimize(rosenbrock, torch.tensor([-1.2, 1.0], dtype=torch.float64))
        >>> result.status, result.x.round(decimals=8)
        ('converged', tensor([1., 1.], dtype=torch.float64))
    """
    arguments = given(locals())
    refuse_arguments(minimize, unsupported, INSTEAD)
    check_call("minimize", callback)
    _check(arguments)
    if multistart or batched or in_dims is not None:
        return _of_many(arguments)
    variables = Variables(x0)
    box = Box.of(bounds, variables)
    start = variables.start if box is None else box.project(variables.start)
    evaluation = Evaluation(fun, variables, args, has_aux or jac is True)
    evaluation.derivatives = _derivatives(jac, hess, hessp, evaluation)
    problem = FunctionProblem(evaluation, start, box)
    tolerances = _tolerances(start.dtype, gtol, xtol, ftol)
    scale = scale_of(x_scale, "auto", variables)

    def face(method: str) -> Newton:
        report = _report(variables, SHOWN.get(method, method), has_aux)
        return _face(method, problem, tolerances, report, scale)

    if method == "auto" and len(start) <= DIRECT_LIMIT:
        method = "newton"
    run = Run(face(method), Limits(max_iter or 5000 + 10 * len(start), max_nfev), callback, progress)
    result = run.to_the_end(1.0 if method == "cubic" and radius is None else radius)
    if result.status == "dear":
        result = run.go_on(face("newton"))
    if not implicit or not depends(evaluation.args):
        return result
    return _attached(result, evaluation, problem)


def _attached(result: OptimizeResult, evaluation: Evaluation, problem: FunctionProblem) -> OptimizeResult:
    """With x in the graph of the arguments."""

    def value(x: Tensor, args: tuple[Any, ...]) -> Tensor:
        return evaluation.at(x, args)[0]

    found = attach(problem.point.x, evaluation.args, gradient_of(value), free=problem.frame.free)
    return result.changed(x=evaluation.variables.unpack(found.x), implicit_error=found.error)


# Options of one problem that a batch has not.
ALONE = ("jac", "hess", "hessp", "bounds", "radius", "callback", "max_nfev", "has_aux")


def _of_many(arguments: dict[str, Any]) -> OptimizeResult:
    """Of a batch, or of several starts, from the arguments of ``minimize``."""
    fun, x0, args = (arguments.pop(name) for name in ("fun", "x0", "args"))
    tolerances = {name: arguments[name] for name in ("gtol", "xtol", "ftol")}
    if arguments.pop("multistart"):
        can_be_batched = all(arguments[name] is None or arguments[name] is False for name in ALONE)
        return from_starts(
            x0,
            (lambda x: minimize(fun, x, args, in_dims=shared(args), **tolerances))
            if can_be_batched
            else None,
            lambda x: minimize(fun, x, args, **arguments),
        )
    refuse_options("minimize", {name: arguments[name] for name in ALONE})
    found = BatchTolerances(*_tolerances(dtype_of(x0), **tolerances))
    in_dims, max_iter, implicit = (arguments[name] for name in ("in_dims", "max_iter", "implicit"))
    return minimize_batch(fun, x0, args, in_dims, found, max_iter, implicit)


def _tolerances(dtype: torch.dtype, gtol: float | None, xtol: float | None, ftol: float | None) -> Tolerances:
    double = torch.finfo(torch.float64).eps
    eps = torch.finfo(dtype).eps
    return Tolerances(
        gtol=math.sqrt(eps) if gtol is None else gtol,
        xtol=XTOL * math.sqrt(eps / double) if xtol is None else xtol,
        ftol=eps if ftol is None else ftol,
    )


def _check(options: dict[str, Any]) -> None:
    check_choice(options, "method", METHODS)
    check_count(options, *(name for name in ("max_iter", "max_nfev") if options[name] is not None))
    check_tolerances(options, "gtol", "xtol", "ftol")
    check_optional(options, "radius")


def _face(
    method: str, problem: FunctionProblem, tolerances: Tolerances, report: Report, scale: str | Tensor | None
) -> Newton:
    if method == "cubic":
        return Dense(problem, control.cubic, tolerances, report, CUBIC, scale)
    if method == "newton-sparse":
        return Sparse(problem, control.trust_radius, tolerances, report, problem.fun, scale)
    if method in DENSE:
        return Dense(problem, control.trust_radius, tolerances, report, BALL, scale)
    solver = on_boundary if method == "trust-krylov" else in_radius
    fixed = None if isinstance(scale, str) else scale
    may_give_up = method == "auto" and len(problem.point.x) <= FORMED_LIMIT
    return Products(problem, control.trust_radius, tolerances, report, solver, fixed, may_give_up)


def _derivatives(jac: Any, hess: Any, hessp: Any, evaluation: Evaluation) -> Derivatives:
    """Those of flat vectors, from those of the user."""
    variables, args = evaluation.variables, evaluation.args
    for name, derivative in (("jac", jac), ("hess", hess), ("hessp", hessp)):
        if derivative is not None and not callable(derivative) and not (name == "jac" and derivative is True):
            raise TypeError(
                f"{name} must be a function of x, or None, got {derivative!r}; derivatives come from torch."
            )

    def gradient(x: Tensor) -> Tensor:
        return variables.pack(jac(variables.unpack(x), *args), "jac(x)")

    def hessian(x: Tensor) -> Tensor:
        matrix = torch.as_tensor(hess(variables.unpack(x), *args), device=x.device).to(x)
        if matrix.shape != (len(x), len(x)):
            raise ValueError(f"hess(x) must have shape {(len(x), len(x))}, got {tuple(matrix.shape)}.")
        return matrix

    def product(x: Tensor, v: Tensor) -> Tensor:
        return variables.pack(hessp(variables.unpack(x), variables.unpack(v), *args), "hessp(x, v)")

    return Derivatives(
        gradient if callable(jac) else jac,
        None if hess is None else hessian,
        None if hessp is None else product,
    )


def _report(variables: Variables, method: str, is_returned: bool) -> Report:
    def report(face: Newton, status: str, run: Run) -> OptimizeResult:
        problem = face.problem
        point, counts, box = problem.point, problem.counts(), problem.box
        is_certified = status in ("noise_floor", "radius") and face.is_certified()
        more = {} if box is None else {"active_mask": variables.unpack(box.active(point.x))}
        if is_returned:
            more["aux"] = point.aux
        return OptimizeResult(
            x=variables.restore(point.x),
            fun=point.value,
            jac=variables.restore(problem.gradient_at(point)),
            status=status,
            success=status == "converged" or is_certified,
            message=(CERTIFIED if is_certified else MESSAGES[status]).format(
                method=method, seen=SEEN.get(method, SEEN[""])
            ),
            nit=run.nit,
            **counts._asdict(),
            history=tuple(run.history),
            **more,
        )

    return report
