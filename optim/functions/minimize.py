"""Minimise a function of a tensor by Newton's method in a trust region."""

from __future__ import annotations

import math
from typing import Any

import torch

from optim.functions.problem import Evaluation, Function, FunctionProblem
from optim.functions.results import OptimizeResult
from optim.functions.run import Callback, Limits, Run, check_call
from optim.functions.saddle import LANCZOS_STEPS, Ends, Line, has_negative
from optim.functions.variables import Variables
from optim.methods.control import Rule, trust_radius
from optim.methods.formed import Formed
from optim.methods.options import check_choice, check_count, check_optional, refuse_arguments
from optim.methods.step import Options, Outcome
from optim.methods.subspace import Bound, Subspace, bounded
from optim.methods.truncated import Truncated, in_radius

METHODS = ("auto", "newton", "newton-cg")

# What to do in place of arguments that scipy.optimize.minimize takes.
INSTEAD = {
    "constraints": "Write x as a function of free variables, or add a penalty to fun.",
    "tol": "Give gtol, a bound on the entries of the gradient.",
    "options": "Give gtol, max_iter or radius themselves.",
    "maxiter": "Give max_iter.",
    "disp": "Nothing is printed: print the result, or use a callback or progress=True.",
}

# Up to here an eigendecomposition (about 9 n^3 operations a step) is cheaper than Steihaug's products.
DIRECT_LIMIT = 500

# The model within the radius alone. Another candidate, where the curvature is negative, costs an evaluation,
# and gained nothing on 188 problems (NIST, MGH, classic, networks): 148 solved for 150, a sixth more work.
BALL = Bound(bounded)

# Steps in a row that only the gradient calls a decrease. At a kink, or below the spacing of numbers, it calls
# all of them so.
MAX_STALLED = 5

MESSAGES = {
    "converged": "the gradient is within gtol, and no negative curvature was found: 'newton' looks at all"
    f" eigenvalues of the Hessian, 'newton-cg' at what {LANCZOS_STEPS} Lanczos steps show",
    "noise_floor": "no decrease is left that rounding would not hide; the gradient is above gtol",
    "radius": "the trust radius fell below the spacing of numbers at x; is fun smooth there?",
    "max_iter": "the iteration limit came first; raise max_iter",
    "max_nfev": "the limit on evaluations came first; raise max_nfev",
    "non_finite": "gradient or Hessian at x are not finite, or span more than the range of numbers",
    "unbounded": "fun fell by 1e30 times max(1, abs(fun(x0))): it seems to have no minimum",
    "running": "an intermediate point, as a callback sees it",
    "stopped": "the callback asked to stop",
}


def minimize(
    fun: Function,
    x0: Any,
    args: Any = (),
    method: str = "auto",
    *,
    gtol: float | None = None,
    max_iter: int = 500,
    max_nfev: int | None = None,
    radius: float | None = None,
    callback: Callback | None = None,
    has_aux: bool = False,
    progress: bool = False,
    **unsupported: Any,
) -> OptimizeResult:
    """Find a local minimiser of ``fun`` near ``x0``.

    "newton" solves the trust-region subproblem exactly from the eigenvalues of the Hessian: it leaves
    saddle points, and does not call a point with a negative eigenvalue converged. "newton-cg" needs only
    products: where the gradient is within ``gtol`` it looks for negative curvature by a few Lanczos steps,
    and goes on along it. Where decreases fall below rounding of ``fun``, steps are judged by the gradient.

    Args:
        fun: Called as ``fun(x, *args)`` with x as ``x0`` was given; returns a tensor with a single element;
            twice differentiable.
        x0: Start: a tensor of any shape, float32 or float64; a tuple, list or dict of them; numbers or an
            array, which ``fun`` sees as a tensor of float64. Not changed.
        args: Further arguments of ``fun``, a tuple; anything else is one argument.
        method: "newton", "newton-cg", or "auto": "newton" up to 500 unknowns.
        gtol: Stop when no entry of the gradient exceeds this; the square root of the precision of
            ``x0`` when None (1.5e-8 in float64, 3.5e-4 in float32).
        max_iter: Steps allowed, taken or rejected.
        max_nfev: Evaluations allowed; None for any number.
        radius: First trust radius; ``max(1, norm(x0))`` when None.
        callback: Called with the present ``OptimizeResult`` after each accepted step; stops by
            returning True or raising StopIteration.
        has_aux: ``fun`` returns ``(value, aux)``; the aux of the solution is ``result.aux``.
        progress: Show a progress bar.
        unsupported: Arguments of other minimisers; an error.

    Returns:
        An ``OptimizeResult``; ``success`` says whether ``status`` is "converged".

    Raises:
        TypeError: ``x0`` holds no floating-point numbers; ``fun`` returns no tensor; an argument is unknown.
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
    variables = Variables(x0)
    check_call("minimize", callback)
    options = {"method": method, "max_iter": max_iter, "gtol": gtol, "radius": radius, "max_nfev": max_nfev}
    check_choice(options, "method", METHODS)
    check_count(options, "max_iter", *(["max_nfev"] if max_nfev is not None else []))
    check_optional(options, "gtol", "radius")
    start = variables.start
    direct = method == "newton" or (method == "auto" and len(start) <= DIRECT_LIMIT)
    tolerance = math.sqrt(torch.finfo(start.dtype).eps) if gtol is None else gtol
    problem = FunctionProblem(Evaluation(fun, variables, args, has_aux), start)
    face = _Newton(problem, variables, direct, tolerance)
    run = Run(face, Limits(max_iter, max_nfev), callback, progress)
    return run.to_the_end(max(1.0, float(start.norm())) if radius is None else radius)


class _Newton:
    """Newton's method in a trust region, for the loop over steps."""

    def __init__(self, problem: FunctionProblem, variables: Variables, direct: bool, gtol: float) -> None:
        self.problem, self._variables, self._direct, self._gtol = problem, variables, direct, gtol
        self._eps = torch.finfo(problem.point.x.dtype).eps
        self.rule: Rule = trust_radius
        self._stalled = 0
        self._least = problem.point.value

    def look(self) -> None:
        """At the present point. The space is made when it is needed, and stays until there is another."""
        self.model = self.problem.model()
        self._space: Subspace | None = None

    def measure(self) -> float:
        """Largest entry of the gradient."""
        g = self.model.gradient
        return float(g.abs().max()) if g.numel() else 0.0

    def verdict(self) -> str:
        """What the present point is, as far as is known or found; empty where steps go on from it."""
        largest = self.measure()
        if not math.isfinite(largest):
            return "non_finite"
        if self._space is not None or largest > self._gtol:
            return "noise_floor" if self._stalled >= MAX_STALLED else ""
        return "converged" if not self.model.gradient.numel() else self._second_order()

    def space(self) -> Subspace | None:
        """All of it, or what CG grows; None where the Hessian is not finite."""
        self._space = self._space or self._whole_space()
        return self._space

    def options(self) -> Options:
        """Smaller radii where the model is wrong."""
        return Options()

    def refused(self, outcome: Outcome) -> str:
        """Why no step is left; empty where a smaller radius is."""
        if outcome.status in ("noise_floor", "non_finite"):
            return outcome.status
        is_small = outcome.size <= self._eps * max(1.0, float(self.problem.point.x.norm()))
        return "radius" if is_small else ""

    def taken(self, outcome: Outcome) -> str:
        """Count steps that only the gradient calls a decrease."""
        value = self.problem.point.value
        self._stalled = 0 if value < self._least else self._stalled + 1
        self._least = min(self._least, value)
        return ""

    def result(self, status: str, run: Run) -> OptimizeResult:
        """The present point as a result."""
        problem = self.problem
        point, counts = problem.point, problem.counts()
        return OptimizeResult(
            x=self._variables.restore(point.x),
            fun=point.value,
            jac=self._variables.restore(problem.gradient_at(point)),
            status=status,
            success=status == "converged",
            message=MESSAGES[status],
            nit=run.nit,
            **counts._asdict(),
            history=tuple(run.history),
            **({} if point.aux is None else {"aux": point.aux}),
        )

    def _second_order(self) -> str:
        """Where the gradient is small: a minimum, or a way down."""
        if self._direct:
            self._space = formed = self._formed()
            if formed is None:
                return "non_finite"
            return "" if has_negative(formed.values, self._eps) else "converged"
        ends = Ends(self.model)
        self.problem.nhev += ends.products
        if not len(ends.values):
            return "non_finite"
        if not has_negative(ends.values, self._eps):
            return "converged"
        self._space = Line(self.model, ends.lowest, float(ends.values[0]))
        return ""

    def _whole_space(self) -> Subspace | None:
        if self._direct:
            return self._formed()
        g = self.model.gradient
        # Superlinear convergence (Nocedal and Wright, section 7.1).
        rtol = min(0.5, math.sqrt(float(g.norm())))
        return Truncated(self.model, in_radius(rtol, 10 * g.numel()), damps=False)

    def _formed(self) -> Formed | None:
        """None where the Hessian is not finite."""
        self.problem.nhev += 1
        space = Formed(self.model, BALL)
        return space if space.size else None
