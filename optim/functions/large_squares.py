"""Least squares by products with the Jacobian, for the loop over steps: where there is no room for it.

Reference: Fong and Saunders (2011), LSMR; Nocedal and Wright (2006), Numerical optimization, section 10.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from secondorder import FunctionOperator, LinearOperator, SolveResult, lsmr

from ..methods.control import Nielsen, Rule
from ..methods.problem import QuadraticModel, norm
from ..methods.step import Options, Outcome
from ..methods.truncated import Solver, Truncated
from .frame import Frame
from .residuals import ResidualProblem, by_products
from .results import OptimizeResult
from .run import Run
from .squares import MAX_STALLED, NOISE, Tolerances

# The first damping, in units of the curvature along the gradient.
FIRST_DAMPING = 1e-3
# The gradient of the model after a solve, relative to that before.
SOLVED = 1e-3


class LargeSquares:
    """Levenberg and Marquardt's steps by LSMR.

    Args:
        problem: Of residuals, without bounds.
        tolerances: When to stop.
        scale: Fixed, shape (n,); None for ones.
        report: Makes the result of a status.

    Attributes:
        model: At the present point.
        jacobian: There, by products, of the residuals as the loss corrects them.
        residuals: The same, shape (m,).
    """

    def __init__(
        self,
        problem: ResidualProblem,
        tolerances: Tolerances,
        scale: Tensor | None,
        report: Callable[[LargeSquares, str, Run], OptimizeResult],
    ) -> None:
        self.problem, self._tolerances, self._report = problem, tolerances, report
        problem.frame = Frame(scale)
        self.rule: Rule = Nielsen(2.0)
        self._eps = torch.finfo(problem.point.x.dtype).eps
        self._stalled, self._gain, self._value = 0, math.inf, problem.point.value

    def look(self) -> None:
        """At the present point: the graph of the Jacobian's products."""
        problem = self.problem
        self.residuals, J = by_products(problem)
        frame = problem.frame
        self.jacobian: LinearOperator = FunctionOperator(
            lambda v: J @ frame.displacement(v),
            problem.point.x,
            transpose=lambda u: frame.gradient(J.T @ u),
            rows=len(self.residuals),
        )
        gradient = self.jacobian.T @ self.residuals
        self._norm, slope = float(self.residuals.norm()), norm(gradient)
        curvature = self.jacobian.T @ self.jacobian
        self.model = QuadraticModel(problem.point.value, gradient, curvature, slope)
        g = gradient / (slope or 1.0)
        self._steepest = float((self.jacobian @ g).square().sum())
        # LSMR measures the gradient of the model beside norm(J) norm(r), whatever it was at first.
        beside = math.sqrt(self._steepest) * self._norm
        self._rtol = max(SOLVED * slope / beside, self._eps) if beside > 0 else SOLVED
        solver = _by_lsmr(self.jacobian, self.residuals, self._rtol)
        self._space = Truncated(self.model, solver, damps=True, is_undamped=True)
        self._noise = self._eps * (float((self.jacobian @ frame.step(problem.point.x)).norm()) + self._norm)
        problem.rounding_of_residuals = self._noise

    def first_size(self) -> float:
        """A damping."""
        return FIRST_DAMPING * (self._steepest if 0 < self._steepest < math.inf else 1.0)

    def measure(self) -> float:
        """Largest entry of the gradient."""
        g = self.problem.frame.step(self.model.gradient)
        return float(g.abs().max()) if g.numel() else 0.0

    def verdict(self) -> str:
        """By what the range of the Jacobian holds of the residuals, from an undamped solve."""
        if not math.isfinite(self.model.norm):
            return "non_finite"
        if self.model.norm == 0 or self._norm <= NOISE * self._noise:
            return "converged"
        newton = lsmr(self.jacobian, -self.residuals, rtol=self._rtol)
        self.problem.nhev += newton.products
        seen = math.sqrt(max(newton.quadratic, 0.0))
        if seen <= max(self._tolerances.gtol * self._norm, NOISE * self._noise) or _is_short(
            self.problem, newton.x, self._tolerances.xtol
        ):
            return "converged"
        if self._gain < self._tolerances.ftol:
            return "converged"
        return "noise_floor" if self._stalled >= MAX_STALLED else ""

    def space(self) -> Truncated:
        """What LSMR grows."""
        return self._space

    def options(self) -> Options:
        """Of the loop."""
        return Options()

    def refused(self, outcome: Outcome) -> str:
        """Why no step is left; empty where more damping may find one."""
        if outcome.status in ("noise_floor", "non_finite"):
            return outcome.status
        return "damping" if outcome.size >= max(1.0, self.first_size()) / self._eps**2 else ""

    def taken(self, outcome: Outcome) -> str:
        """Remember what it gained."""
        value = self.problem.point.value
        self._gain = (self._value - value) / value if value > 0 else math.inf
        self._stalled = self._stalled + 1 if self._gain <= 0 else 0
        self._value = value
        return ""

    def result(self, status: str, run: Run) -> OptimizeResult:
        """The present point."""
        return self._report(self, status, run)


def _by_lsmr(jacobian: LinearOperator, residuals: Tensor, rtol: float) -> Solver:
    """On the Jacobian, whose square is never formed."""

    def solve(_: LinearOperator, __: Tensor, damping: float) -> tuple[SolveResult, tuple[Tensor, ...]]:
        return lsmr(jacobian, -residuals, damping=damping, rtol=rtol), ()

    return solve


def _is_short(problem: ResidualProblem, newton: Tensor, xtol: float) -> bool:
    step = problem.frame.displacement(newton).abs()
    return bool((step <= xtol * problem.point.x.abs()).all())
