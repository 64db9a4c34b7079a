"""Levenberg and Marquardt's method for the loop over steps: scale, damping, bounds, and when to stop.

Reference: Moré (1978), The Levenberg-Marquardt algorithm: implementation and theory; Bates and Watts (1981),
A relative offset orthogonality convergence criterion for nonlinear least squares.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..methods.acceleration import Acceleration
from ..methods.control import ACCEPTANCE, Nielsen, Rule
from ..methods.residual import Residual
from ..methods.scale import more_scale
from ..methods.step import Options, Outcome
from ..methods.subspace import Solution
from .frame import Frame
from .residuals import ResidualProblem, model_of
from .results import OptimizeResult
from .run import Run

# The first damping, in units of the squared norm of a column (Moré's scale), or of the largest one.
FIRST_DAMPING = 1e-3
# Rounding of the residuals, in units of what one rounding of x and of each residual does to them.
NOISE = 10.0
# Steps within rounding that do not come closer, in a row.
MAX_STALLED = 3


class Tolerances(NamedTuple):
    """When a point is the solution.

    Attributes:
        ftol: The last step decreased the cost by less than this, relative; minus infinity for never.
        xtol: The step of Gauss and Newton changes no variable by more than this, relative.
        gtol: The columns of the Jacobian can take no more than this from the residuals, relative to their
            norm: the cosine of the angle between them.
    """

    ftol: float
    xtol: float
    gtol: float


class Station:
    """What is known at a point: one Jacobian, one decomposition.

    Args:
        problem: Of residuals; takes the frame of this point.
        jacobian: Of the residuals as the loss corrects them, in the user's variables, shape (m, n).
        residuals: The same, shape (m,).
        units: Scale of the variables; None for ones.

    Attributes:
        model: In the variables of the frame.
        space: Where it is minimised; of size 0 where the Jacobian is not finite.
        noise: Rounding of the residuals, a norm.
        newton: The undamped step.
    """

    def __init__(
        self,
        problem: ResidualProblem,
        jacobian: Tensor,
        residuals: Tensor,
        units: Tensor | None,
    ) -> None:
        self.problem, self.jacobian, self.residuals = problem, jacobian, residuals
        x, box = problem.point.x, problem.box
        free = None if box is None else box.free(x, jacobian.T @ residuals)
        self.frame = Frame(units, None if free is None or bool(free.all()) else free)
        self.model, self.form = model_of(self.frame.gradient(jacobian), residuals, problem.point.value)
        self.norm = float(residuals.norm())
        self.noise = torch.finfo(x.dtype).eps * (float((jacobian.abs() @ x.abs()).norm()) + self.norm)
        problem.frame, problem.rounding_of_residuals = self.frame, self.noise
        self.is_empty = not self.model.gradient.numel() or not len(residuals)
        if self.is_empty:
            return
        self.space = Residual(self.model, self.form)
        if self.space.size:
            self.newton, self.projected = self.space.solve(0.0), self.space.projected

    @property
    def is_determined(self) -> bool:
        """Whether the residuals see all that is free."""
        return self.space.rank == self.model.gradient.numel()

    def inside(self, solution: Solution) -> Solution:
        """Within the bounds, with what the model says of the step that is left."""
        box, x = self.problem.box, self.problem.point.x
        if box is None:
            return solution
        step = self.frame.step(box.project(x + self.frame.displacement(solution.step)) - x)
        moved = self.form.rows @ step
        return solution._replace(
            step=step,
            linear=float(moved.dot(self.form.target)),
            quadratic=float(moved.dot(moved)),
            norm=float(step.norm()),
        )


class Squares:
    """Least squares for the loop over steps.

    Args:
        problem: Of residuals.
        scale: "jac", Moré's, that follows the columns of the Jacobian; or fixed, shape (n,); None for ones.
        tolerances: When to stop.
        accelerates: Whether steps are bent along the second derivative of the residuals.
        report: Makes the result of a status.
    """

    def __init__(
        self,
        problem: ResidualProblem,
        scale: str | Tensor | None,
        tolerances: Tolerances,
        accelerates: bool,
        report: Callable[[Squares, str, Run], OptimizeResult],
    ) -> None:
        self.problem, self._tolerances = problem, tolerances
        self._accelerates, self._report = accelerates, report
        self.rule: Rule = Nielsen(2.0)
        self._follows = isinstance(scale, str)
        self._units: Tensor | None = None if isinstance(scale, str) else scale
        self._eps = torch.finfo(problem.point.x.dtype).eps
        self._accepted = self._stalled = 0
        self._rate, self._length = 1.0, math.inf
        self._value, self._gain = problem.point.value, math.inf

    def first_size(self) -> float:
        """A damping."""
        J = self.at.frame.gradient(self.at.jacobian)
        largest = float(J.square().sum(0).max()) if J.numel() and not self._follows else 1.0
        return FIRST_DAMPING * (largest if 0 < largest < math.inf else 1.0)

    def look(self) -> None:
        """At the present point, and at how fast the steps of Gauss and Newton shrink."""
        problem = self.problem
        residuals, J = problem.robust.corrected(problem.point.residuals, problem.jacobian(problem.point))
        if self._follows:
            self._units = more_scale(J.norm(dim=0), self._units, self._accepted)
        self.at = at = Station(problem, J, residuals, self._units)
        self.model = at.model
        if at.is_empty or not at.space.size:
            return
        length = at.newton.norm
        self._rate = min(1.0, length / self._length) if self._length > 0 else 0.0
        is_below = at.projected**2 / 2 <= NOISE * at.noise * at.norm
        self._stalled = self._stalled + 1 if is_below and length >= self._length else 0
        self._length = length

    def measure(self) -> float:
        """Largest entry of the gradient, of what is free."""
        g = self.model.gradient
        return float(g.abs().max()) if g.numel() else 0.0

    def verdict(self) -> str:
        """What the present point is; empty where steps go on from it."""
        at, tolerances = self.at, self._tolerances
        if at.is_empty or at.norm <= NOISE * at.noise:
            return "converged"
        if at.space.size == 0:
            return "non_finite"
        is_stationary = at.projected <= max(tolerances.gtol * at.norm, NOISE * at.noise)
        if not is_stationary and self._is_near():
            at, is_stationary = self._finish(), True
        if is_stationary or self._gain < tolerances.ftol:
            return "converged" if at.is_determined else "singular"
        return "noise_floor" if self._stalled >= MAX_STALLED else ""

    def _is_near(self) -> bool:
        """Whether what is left of the way changes no variable."""
        # Steps that shrink by q leave q / (1 - q) times the last one.
        left = max(1.0, self._rate / (1 - self._rate)) if self._rate < 1 else math.inf
        step = self.at.frame.displacement(self.at.newton.step).abs()
        return bool((step * left <= self._tolerances.xtol * self.problem.point.x.abs()).all())

    def _finish(self) -> Station:
        """The last step is taken, where it leads down: it is paid for."""
        trial = self.problem.evaluate(self.at.inside(self.at.newton).step)
        if self.problem.decrease(trial) > 0:
            self.problem.move(trial)
            self._accepted += 1
            self.look()
        return self.at

    def space(self) -> Residual | None:
        """All that residuals see; None where the Jacobian is not finite."""
        return self.at.space

    def options(self) -> Options:
        """Accelerated, then inside the bounds; refused where a trial gains next to nothing."""
        at = self.at
        bends: list[Callable[[Solution], Solution]] = []
        if self._accelerates:
            bends.append(Acceleration(at.space, self.problem.change, at.noise * at.norm, refuses=True))
        if self.problem.box is not None:
            bends.append(at.inside)

        def bend(solution: Solution) -> Solution:
            for bent in bends:
                solution = bent(solution)
            return solution

        return Options(least_ratio=ACCEPTANCE, bend=bend if bends else None)

    def refused(self, outcome: Outcome) -> str:
        """Why no step is left; empty where more damping may find one."""
        if outcome.status in ("noise_floor", "non_finite"):
            return outcome.status
        return "damping" if outcome.size >= 1 / self._eps**2 else ""

    def taken(self, outcome: Outcome) -> str:
        """Remember what it gained."""
        value = self.problem.point.value
        self._gain = (self._value - value) / value if value > 0 else math.inf
        self._value, self._accepted = value, self._accepted + 1
        return ""

    def result(self, status: str, run: Run) -> OptimizeResult:
        """The present point."""
        return self._report(self, status, run)
