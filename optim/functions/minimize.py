"""Minimise a function of a tensor by Newton's method in a trust region."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optim.functions.problem import Function, FunctionProblem
from optim.functions.saddle import LANCZOS_STEPS, Ends, Line, has_negative
from optim.methods.control import trust_radius
from optim.methods.formed import Formed
from optim.methods.options import check_choice, check_count, check_optional, refuse_arguments
from optim.methods.problem import Trial
from optim.methods.step import Options, Outcome, Step
from optim.methods.subspace import Bound, Subspace, bounded
from optim.methods.truncated import Truncated, in_radius

# A value below this, relative to the start, has no minimum near it.
UNBOUNDED = -1e30

METHODS = ("auto", "newton", "newton-cg")

# What to do in place of arguments that scipy.optimize.minimize takes.
_DERIVATIVE = "Derivatives of fun come from torch."
INSTEAD = {
    "args": "Let fun be a function of x alone, lambda x: fun(x, ...).",
    "jac": _DERIVATIVE,
    "hess": _DERIVATIVE,
    "hessp": _DERIVATIVE,
    "bounds": "Write x as a function of free variables: softplus(z), or a + (b - a) * sigmoid(z).",
    "constraints": "Write x as a function of free variables, or add a penalty to fun.",
    "tol": "Give gtol, a bound on the entries of the gradient.",
    "options": "Give gtol, max_iter or radius themselves.",
    "maxiter": "Give max_iter.",
    "disp": "Nothing is printed: print the result, or use a callback.",
}

# Up to here an eigendecomposition (about 9 n^3 operations a step) is cheaper than Steihaug's products.
DIRECT_LIMIT = 500

# The model within the radius alone. Another candidate, where the curvature is negative, costs an evaluation,
# and gained nothing on 188 problems (NIST, MGH, classic, networks): 148 solved for 150, a sixth more work.
BALL = Bound(bounded)

# Radii that are tried before the status is looked at again.
MAX_TRIALS = 10

# Steps in a row that only the gradient calls a decrease. At a kink, or below the spacing of numbers, it calls
# all of them so.
MAX_STALLED = 5

MESSAGES = {
    "converged": "the gradient is within gtol, and no negative curvature was found: 'newton' looks at all"
    f" eigenvalues of the Hessian, 'newton-cg' at what {LANCZOS_STEPS} Lanczos steps show",
    "noise_floor": "no decrease is left that rounding would not hide; the gradient is above gtol",
    "radius": "the trust radius fell below the spacing of numbers at x; is fun smooth there?",
    "max_iter": "the iteration limit came first; raise max_iter",
    "non_finite": "gradient or Hessian at x are not finite, or span more than the range of numbers",
    "unbounded": "fun fell by 1e30 times max(1, abs(fun(x0))): it seems to have no minimum",
    "running": "an intermediate point, as a callback sees it",
    "stopped": "the callback asked to stop",
}


class MinimizeResult(NamedTuple):
    """Where ``minimize`` stopped, and why.

    Attributes:
        x: Best point found, of the shape of ``x0``.
        fun: Value there.
        grad: Gradient there, of the shape of ``x0``.
        status: "converged", "noise_floor", "radius", "max_iter", "non_finite", "unbounded" or "stopped";
            "running" in what a callback sees.
        nit: Steps taken or rejected: each is the minimiser of a model within one radius.
        nfev: Evaluations of ``fun``.
        njev: Gradients.
        nhev: Dense Hessians ("newton") or products with the Hessian ("newton-cg").
        success: Whether ``status`` is "converged".
        message: One sentence on ``status``.
    """

    x: Tensor
    fun: float
    grad: Tensor
    status: str
    nit: int
    nfev: int
    njev: int
    nhev: int

    @property
    def success(self) -> bool:
        """Whether the gradient met the tolerance."""
        return self.status == "converged"

    @property
    def message(self) -> str:
        """One sentence on ``status``."""
        return MESSAGES[self.status]

    def __repr__(self) -> str:
        return (
            f"MinimizeResult(status={self.status!r}, fun={self.fun:.10g}, "
            f"grad_norm={float(self.grad.abs().max()) if self.grad.numel() else 0.0:.3g}, "
            f"nit={self.nit}, nfev={self.nfev}, njev={self.njev}, nhev={self.nhev})\n"
            f"{self.message}\nx = {self.x}"
        )


Callback = Callable[[MinimizeResult], bool | None]


def minimize(
    fun: Function,
    x0: Tensor,
    *,
    method: str = "auto",
    gtol: float | None = None,
    max_iter: int = 500,
    radius: float | None = None,
    callback: Callback | None = None,
    **unsupported: Any,
) -> MinimizeResult:
    """Find a local minimiser of ``fun`` near ``x0``.

    "newton" solves the trust-region subproblem exactly from the eigenvalues of the Hessian: it leaves
    saddle points, and does not call a point with a negative eigenvalue converged. "newton-cg" needs only
    products: where the gradient is within ``gtol`` it looks for negative curvature by a few Lanczos steps,
    and goes on along it. Where decreases fall below rounding of ``fun``, steps are judged by the gradient.

    Args:
        fun: Takes a tensor of the shape of ``x0``, returns one with a single element; twice differentiable.
        x0: Start, any shape, floating point. Not changed.
        method: "newton", "newton-cg", or "auto": "newton" up to 500 unknowns.
        gtol: Stop when no entry of the gradient exceeds this; the square root of the precision of
            ``x0`` when None (1.5e-8 in float64, 3.5e-4 in float32).
        max_iter: Steps allowed, taken or rejected.
        radius: First trust radius; ``max(1, norm(x0))`` when None.
        callback: Called with the present ``MinimizeResult`` after each accepted step; stops by
            returning True or raising StopIteration.
        unsupported: Arguments of other minimisers; an error.

    Returns:
        A ``MinimizeResult``; ``success`` says whether the gradient met ``gtol``.

    Raises:
        TypeError: ``x0`` is not a floating-point tensor; ``fun`` returns no tensor; an argument is unknown.
        RuntimeError: under ``torch.inference_mode``.
        ValueError: an option is out of range; ``fun(x0)`` is not one finite number or does not depend on x.

    Cost: "newton": a step takes one evaluation; one that is taken also a gradient and a Hessian (``n``
    products and about ``9 n^3`` operations), a rejected one nothing more. "newton-cg": a step takes up to
    ``n`` products, and one that is taken a gradient; a rejected one is shortened, an evaluation each, before
    another radius costs products. At its end about 60 more.

    Reference: Conn, Gould and Toint (2000), Trust-region methods; Steihaug (1983).

    Example:
        >>> rosenbrock = lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
        >>> result = minimize(rosenbrock, torch.tensor([-1.2, 1.0], dtype=torch.float64))
        >>> result.status, result.x.round(decimals=8)
        ('converged', tensor([1., 1.], dtype=torch.float64))
    """
    refuse_arguments(minimize, unsupported, INSTEAD)
    if not isinstance(x0, Tensor) or x0.dtype not in (torch.float64, torch.float32):
        kind = x0.dtype if isinstance(x0, Tensor) else type(x0).__name__
        remedy = "x0.float()" if isinstance(x0, Tensor) else "torch.tensor(...)"
        raise TypeError(f"x0 must be a tensor of float64 or float32, got {kind}; use {remedy}.")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be a function of a MinimizeResult, got {type(callback).__name__}.")
    if torch.is_inference_mode_enabled():
        raise RuntimeError("minimize needs derivatives, which torch.inference_mode() takes away; leave it.")
    options = {"method": method, "max_iter": max_iter, "gtol": gtol, "radius": radius}
    check_choice(options, "method", METHODS)
    check_count(options, "max_iter")
    check_optional(options, "gtol", "radius")
    direct = method == "newton" or (method == "auto" and x0.numel() <= DIRECT_LIMIT)
    tolerance = math.sqrt(torch.finfo(x0.dtype).eps) if gtol is None else gtol
    run = _Run(FunctionProblem(fun, x0.detach().clone()), direct, tolerance)
    first_radius = max(1.0, float(x0.detach().norm())) if radius is None else radius
    return run.result(run.iterate(first_radius, max_iter, callback))


class _Run:
    """One minimisation: the problem, its model at the present point, and where that is minimised."""

    def __init__(self, problem: FunctionProblem, direct: bool, gtol: float) -> None:
        self._problem, self._direct, self._gtol = problem, direct, gtol
        self._eps = torch.finfo(problem.point.x.dtype).eps
        self._unbounded = UNBOUNDED * max(1.0, abs(problem.point.value))
        self._nit = self._stalled = 0
        self._least = problem.point.value
        self._look()

    def _look(self) -> None:
        """At the present point. The space is made when it is needed, and stays until there is another."""
        self._model = self._problem.model()
        self._space: Subspace | None = None

    def iterate(self, radius: float, max_iter: int, callback: Callback | None) -> str:
        """Step until something stops it; the status says what."""
        while True:
            status = self._verdict()
            if status or self._nit >= max_iter:
                return status or "max_iter"
            space = self._space = self._space or self._whole_space()
            if space is None:
                return "non_finite"
            outcome = self._step(space, radius, max_iter - self._nit)
            radius = outcome.size
            if outcome.trial is None:
                status = self._refused(outcome, radius)
            else:
                status = self._taken(outcome.trial, callback)
            if status:
                return status

    def _verdict(self) -> str:
        """What the present point is, as far as is known or found; empty where steps go on from it."""
        g = self._model.gradient
        largest = float(g.abs().max()) if g.numel() else 0.0
        if not math.isfinite(largest):
            return "non_finite"
        if self._space is not None or largest > self._gtol:
            return "noise_floor" if self._stalled >= MAX_STALLED else ""
        return "converged" if not g.numel() else self._second_order()

    def _second_order(self) -> str:
        """Where the gradient is small: a minimum, or a way down."""
        if self._direct:
            self._space = formed = self._formed()
            if formed is None:
                return "non_finite"
            return "" if has_negative(formed.values, self._eps) else "converged"
        ends = Ends(self._model)
        self._problem.nhev += ends.products
        if not len(ends.values):
            return "non_finite"
        if not has_negative(ends.values, self._eps):
            return "converged"
        self._space = Line(self._model, ends.lowest, float(ends.values[0]))
        return ""

    def _whole_space(self) -> Subspace | None:
        if self._direct:
            return self._formed()
        g = self._model.gradient
        # Superlinear convergence (Nocedal and Wright, section 7.1).
        rtol = min(0.5, math.sqrt(float(g.norm())))
        return Truncated(self._model, in_radius(rtol, 10 * g.numel()), damps=False)

    def _formed(self) -> Formed | None:
        """None where the Hessian is not finite."""
        self._problem.nhev += 1
        space = Formed(self._model, BALL)
        return space if space.size else None

    def _step(self, space: Subspace, radius: float, left: int) -> Outcome:
        problem, products, evaluations = self._problem, space.products, self._problem.nfev
        options = Options(max_trials=min(MAX_TRIALS, left))
        outcome = Step(problem, self._model, space, trust_radius, options).take(radius)
        self._nit += outcome.trials
        problem.nhev += space.products - products
        if problem.nfev == evaluations and outcome.status != "non_finite":
            # Nothing promised a decrease.
            return outcome._replace(status="noise_floor")
        return outcome

    def _refused(self, outcome: Outcome, radius: float) -> str:
        """Why no step is left; empty where a smaller radius is."""
        if outcome.status in ("noise_floor", "non_finite"):
            return outcome.status
        is_small = radius <= self._eps * max(1.0, float(self._problem.point.x.norm()))
        return "radius" if is_small else ""

    def _taken(self, trial: Trial, callback: Callback | None) -> str:
        """Move, and say why to stop there; empty to go on."""
        self._stalled = 0 if trial.value < self._least else self._stalled + 1
        self._least = min(self._least, trial.value)
        self._problem.move(trial)
        self._look()
        if callback is not None and self._is_asked_to_stop(callback):
            return "stopped"
        return "unbounded" if trial.value < self._unbounded else ""

    def _is_asked_to_stop(self, callback: Callback) -> bool:
        try:
            return bool(callback(self.result("running")))
        except StopIteration:
            return True

    def result(self, status: str) -> MinimizeResult:
        """The present point as a result."""
        problem = self._problem
        return MinimizeResult(
            x=problem.point.x,
            fun=problem.point.value,
            grad=self._model.gradient.view(problem.point.x.shape),
            status=status,
            nit=self._nit,
            nfev=problem.nfev,
            njev=problem.njev,
            nhev=problem.nhev,
        )
