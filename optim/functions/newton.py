"""Newton's method for the loop over steps: scale, bounds, and what is a minimum.

Reference: Conn, Gould and Toint (2000), Trust-region methods; Bertsekas (1982), Projected Newton methods for
optimization problems with simple constraints.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from secondorder import MatrixOperator

from ..methods.control import Rule
from ..methods.formed import Formed
from ..methods.problem import QuadraticModel, norm
from ..methods.step import Options, Outcome
from ..methods.subspace import Bound, Solution, Subspace
from ..methods.truncated import Solver, Truncated
from .frame import Frame
from .problem import FunctionProblem
from .results import OptimizeResult
from .run import Run
from .saddle import Ends, Line, has_negative

# Steps in a row that only the gradient calls a decrease. At a kink, or below the spacing of numbers, it calls
# all of them so.
MAX_STALLED = 20
# The scale of a variable halves at most in a step, or one that was steep at the start would be held for ever.
DECAY = 0.5
# At the noise of the function a step of Newton that changes no variable by more than this is none.
NEAR = 1e-6


class Tolerances(NamedTuple):
    """When a point is a minimum: ``gtol``, and one of the others.

    Attributes:
        gtol: No entry of the gradient, of what is free, exceeds it.
        xtol: Newton's step changes no variable by more than this, relative.
        ftol: Newton's step promises less than this, relative to the value.
    """

    gtol: float
    xtol: float
    ftol: float


Report = Callable[["Newton", str, Run], OptimizeResult]


class Newton(ABC):
    """A step from the Hessian, for the loop over steps.

    Args:
        problem: A function.
        rule: How radius or weight follow the trials.
        tolerances: When to stop.
        report: Makes the result of a status.

    Attributes:
        model: At the present point, in the variables of the problem's frame; made by ``look``.
        follows: Whether the scale is that of the curvature.
        curved: Whether the curvature is known to be positive there, as far as it was looked at.
    """

    model: QuadraticModel
    curved = follows = False

    def __init__(self, problem: FunctionProblem, rule: Rule, tolerances: Tolerances, report: Report) -> None:
        self.problem, self.rule, self._tolerances, self._report = problem, rule, tolerances, report
        self._eps = torch.finfo(problem.point.x.dtype).eps
        self._stalled, self._least, self._x = 0, problem.point.value, problem.point.x

    @abstractmethod
    def look(self) -> None:
        """At the present point."""

    @abstractmethod
    def second_order(self) -> str:
        """What a point of small gradient is: "converged", "flat", "non_finite"; empty to go on."""

    @abstractmethod
    def space(self) -> Subspace | None:
        """Where the model is minimised; None where it is not finite."""

    def first_size(self) -> float:
        """A radius: as far as the origin; from there, a step of Newton along the gradient."""
        away = float(self.problem.frame.step(self.problem.point.x).norm())
        if self.follows:
            # Units are such that the curvature along each variable is one.
            return away or self.model.norm or 1.0
        return max(away, 1.0)

    def measure(self) -> float:
        """Largest entry of the gradient, of what is free, in the user's units."""
        return slope_of(self.problem)

    def verdict(self) -> str:
        """What the present point is, as far as is known or found; empty where steps go on from it."""
        largest = self.measure()
        if not math.isfinite(largest):
            return "non_finite"
        if not self.model.gradient.numel():
            return "converged"
        status = self.second_order() if largest <= self._tolerances.gtol else ""
        return status or ("noise_floor" if self._stalled >= MAX_STALLED else "")

    def options(self) -> Options:
        """Inside the bounds."""
        if self.problem.box is None:
            return Options()
        return Options(bend=lambda solution: inside(self.problem, self.model, solution))

    def refused(self, outcome: Outcome) -> str:
        """Why no step is left; empty where a smaller radius is."""
        if outcome.status in ("noise_floor", "non_finite"):
            return outcome.status
        lengths = self.problem.frame.step(self.problem.point.x)
        return "radius" if outcome.size <= self._eps * max(1e-300, float(lengths.norm())) else ""

    def taken(self, outcome: Outcome) -> str:
        """Count steps that only the gradient calls a decrease."""
        point = self.problem.point
        value = point.value
        self._stalled = 0 if value < self._least else self._stalled + 1
        if torch.equal(point.x, self._x):
            # Below the spacing of numbers nothing will change.
            self._stalled = MAX_STALLED
        self._x = point.x
        self._least = min(self._least, value)
        return ""

    def is_certified(self) -> bool:
        """Whether a point where rounding hides all decrease is known to be a minimum."""
        return False

    def result(self, status: str, run: Run) -> OptimizeResult:
        """The present point."""
        return self._report(self, status, run)


def free_of(problem: FunctionProblem) -> Tensor | None:
    """Which variables may move at the present point; None for all."""
    if problem.box is None:
        return None
    free = problem.box.free(problem.point.x, problem.gradient_at(problem.point))
    return None if bool(free.all()) else free


def slope_of(problem: FunctionProblem) -> float:
    """Largest entry of the gradient there, of what is free in the frame, in the user's units."""
    g, free = problem.gradient_at(problem.point), problem.frame.free
    g = g if free is None else g[free]
    return float(g.abs().max()) if g.numel() else 0.0


def is_near(problem: FunctionProblem, newton: Solution, tolerances: Tolerances) -> bool:
    """Whether a step of Newton, from a point of small gradient, is none."""
    size = abs(problem.point.value)
    if slope_of(problem) <= torch.finfo(newton.step.dtype).eps * max(1.0, size):
        return True
    return 0 <= newton.predicted() <= tolerances.ftol * size or is_short(problem, newton, tolerances.xtol)


def is_short(problem: FunctionProblem, newton: Solution, xtol: float) -> bool:
    """Whether a step changes no variable by more than this, relative."""
    step = problem.frame.displacement(newton.step).abs()
    return bool((step <= xtol * problem.point.x.abs()).all())


def inside(problem: FunctionProblem, model: QuadraticModel, solution: Solution) -> Solution:
    """Within the bounds, with what the model says of the step that is left."""
    box, frame, x = problem.box, problem.frame, problem.point.x
    assert box is not None
    step = frame.step(box.project(x + frame.displacement(solution.step)) - x)
    return solution._replace(
        step=step,
        linear=-float(model.gradient.dot(step)),
        quadratic=float(step.dot(model.curvature @ step)),
        norm=float(step.norm()),
    )


class Dense(Newton):
    """By eigenvalues of the whole Hessian.

    Args:
        problem, rule, tolerances, report: As of ``Newton``.
        bound: What keeps a step short.
        scale: "auto", by the diagonal of the Hessian; or fixed, shape (n,); None for ones.
    """

    def __init__(
        self,
        problem: FunctionProblem,
        rule: Rule,
        tolerances: Tolerances,
        report: Report,
        bound: Bound,
        scale: str | Tensor | None,
    ) -> None:
        super().__init__(problem, rule, tolerances, report)
        self._bound, self.follows = bound, isinstance(scale, str)
        self._units: Tensor | None = None if isinstance(scale, str) else scale

    def look(self) -> None:
        """Gradient, Hessian and its eigenvalues."""
        problem, point = self.problem, self.problem.point
        gradient, H = problem.gradient_at(point), problem.hessian_at(point)
        if self.follows:
            self._units = scale_by(H.diagonal(), self._units)
        problem.frame = frame = Frame(self._units, free_of(problem))
        framed = frame.gradient(frame.gradient(H).T)
        g = frame.gradient(gradient)
        self.model = QuadraticModel(point.value, g, MatrixOperator(framed, is_symmetric=True), norm(g))
        self._space = Formed(self.model, self._bound) if g.numel() else None
        self.curved = self._space is not None and self._space.size > 0 and not self._has_negative()

    def _has_negative(self) -> bool:
        assert self._space is not None
        return has_negative(self._space.values, self._eps)

    def space(self) -> Subspace | None:
        """All of it."""
        return self._space if self._space is not None and self._space.size else None

    def second_order(self) -> str:
        """By all eigenvalues of the scaled Hessian."""
        space = self._space
        if space is None or not space.size:
            return "non_finite"
        if not self.curved or not is_near(self.problem, space.newton(), self._tolerances):
            return ""
        return "converged" if space.is_definite else "flat"

    def is_certified(self) -> bool:
        """Whether the curvature is positive, and a step of Newton changes no variable."""
        space = self._space
        if space is None or not space.size or not self.curved or not space.is_definite:
            return False
        return is_short(self.problem, space.newton(), NEAR)


class Products(Newton):
    """By products with the Hessian.

    Args:
        problem, rule, tolerances, report: As of ``Newton``.
        solver: Within a radius, for a relative residual.
        scale: Fixed, shape (n,); None for ones.
    """

    def __init__(
        self,
        problem: FunctionProblem,
        rule: Rule,
        tolerances: Tolerances,
        report: Report,
        solver: Callable[[float, int], Solver],
        scale: Tensor | None,
    ) -> None:
        super().__init__(problem, rule, tolerances, report)
        self._solver, self._units = solver, scale

    def look(self) -> None:
        """The gradient. The space is made when it is needed."""
        problem, point = self.problem, self.problem.point
        problem.frame = Frame(self._units, free_of(problem))
        g = problem.frame.gradient(problem.gradient_at(point))
        self.model = QuadraticModel(point.value, g, problem.frame.curvature(point.curvature), norm(g))
        self._space: Subspace | None = None
        self.curved = False

    def space(self) -> Subspace:
        """What CG grows."""
        if self._space is None:
            # Superlinear convergence (Nocedal and Wright, section 7.1).
            rtol = min(0.5, math.sqrt(self.model.norm))
            solver = self._solver(rtol, 10 * self.model.gradient.numel())
            self._space = Truncated(self.model, solver, damps=False)
        return self._space

    def second_order(self) -> str:
        """By what a few Lanczos steps show, and by one solve."""
        if self._space is not None:
            # It was looked at: steps go on.
            return ""
        ends = Ends(self.model)
        self.problem.nhev += ends.products
        if not len(ends.values):
            return "non_finite"
        if has_negative(ends.values, self._eps):
            self._space = Line(self.model, ends.lowest, float(ends.values[0]))
            return ""
        self.curved = True
        if self.measure() <= self._eps * max(1.0, abs(self.problem.point.value)):
            return "converged"
        space = self.space()
        newton = space.solve(math.inf)
        self.problem.nhev += space.products
        return "converged" if is_near(self.problem, newton, self._tolerances) else ""


def scale_by(diagonal: Tensor, before: Tensor | None) -> Tensor:
    """Units in which the curvature along each variable is one, shape (n,).

    Args:
        diagonal: Of the Hessian, shape (n,).
        before: Units of the last step; None in the first.
    """
    root = diagonal.abs().sqrt()
    # A variable without curvature has no unit of its own.
    largest = float(root.max()) if len(root) else 0.0
    missing = root.new_tensor(largest or 1.0) if before is None else before
    root = torch.where((root > 0) & root.isfinite(), root, missing)
    return root if before is None else torch.maximum(root, DECAY * before)
