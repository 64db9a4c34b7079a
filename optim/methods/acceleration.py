"""Geodesic acceleration: the second-order part of a step on the manifold of residuals.

Reference: Transtrum and Sethna (2012), Improvements to the Levenberg-Marquardt algorithm for nonlinear
least-squares minimization, section 2.2.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .residual import Residual
from .subspace import Solution

# The part of a step at which residuals are looked at, and the largest ratio of twice the acceleration to the
# step at which the expansion is trusted (section 4 there).
PART, LARGEST = 0.1, 0.75
# Where what a step gains is not this many times the rounding of the value, so is the acceleration.
SEEN = 1e4


class Acceleration:
    """Bends the steps of a space of residuals.

    Args:
        space: Of them.
        change: Of the residuals by a step, which is not taken, shape (m,); None where it is not known. One
            evaluation.
        noise: Rounding of a decrease of the value.
        refuses: Whether a solution is given up, so that more damping is tried, where its acceleration is too
            large to be trusted; else it is tried as it is.
    """

    def __init__(
        self,
        space: Residual,
        change: Callable[[Tensor], Tensor | None],
        noise: float,
        refuses: bool = False,
    ) -> None:
        self._space, self._change, self._noise, self._refuses = space, change, noise, refuses

    def __call__(self, solution: Solution) -> Solution:
        """The solution with half its acceleration added, where that is not too large to be trusted.

        The step is tried as it is then: as measured on networks, to refuse it takes more of them.
        """
        if solution.predicted() <= SEEN * self._noise:
            return solution
        change = self._change(PART * solution.step)
        if change is None:
            return self._without(solution)
        bend = (change / PART - self._space.moved(solution.shift)) * (2 / PART)
        return self._space.bent(solution, bend, LARGEST) or self._without(solution)

    def _without(self, solution: Solution) -> Solution:
        # Nothing is promised by a step that is given up.
        return solution._replace(linear=0.0, quadratic=0.0) if self._refuses else solution
