"""The reduction ratio of a trial, from the loss or, where that is too coarse, from gradients."""

from __future__ import annotations

import math
from typing import NamedTuple

from secondorder.vectors.host import read

from . import control
from .problem import Problem, QuadraticModel, Trial


class Judgement(NamedTuple):
    """What a trial says about the model.

    Attributes:
        rho: Reduction ratio; minus infinity where there is none.
        is_quiet: It is that of gradients: what the step changes is rounding of the loss.
        is_seen: Ten thousand times as much decrease would be seen in the loss.
    """

    rho: float
    is_quiet: bool = False
    is_seen: bool = True

    @property
    def is_accepted(self) -> bool:
        """Whether the step is worth taking."""
        return self.rho > control.ACCEPTANCE

    def for_control(self, holds_back: bool) -> float:
        """``rho``, or what it may tell the control where only gradients told it.

        Args:
            holds_back: Whether damping or radius is what limits the step.
        """
        return control.quiet_ratio(self.rho, holds_back and self.is_seen) if self.is_quiet else self.rho


def judge(problem: Problem, model: QuadraticModel, trial: Trial, predicted: float) -> Judgement:
    """Compare a trial with the decrease that the model predicts for it.

    Where the predicted decrease lies below the rounding of the loss, or loss and model disagree by no more
    than a loss with cancelling terms rounds away, the actual decrease is that of the trapezoid rule,
    ``-(g + g_new) . step / 2``: one more gradient.
    """
    actual, noise = problem.decrease(trial), problem.noise(trial)
    rho, limit = control.reduction_ratio(actual, predicted), control.CANCELLATION * noise
    is_seen = control.REACH * predicted > noise
    if not control.is_noise(actual, predicted, noise):
        if control.is_doubtful(actual, predicted, problem.doubt()):
            by_gradients = _by_gradients(problem, model, trial, predicted)
            if abs(by_gradients - 1) <= control.AGREES:
                return Judgement(by_gradients, True, is_seen)
        if not math.isfinite(actual) or not control.is_refused(actual, predicted):
            return Judgement(rho)
        if not control.is_unseen(actual, predicted, limit):
            # A refusal by a loss that is nothing but rounding is none to learn from.
            return Judgement(rho, abs(model.value) < control.SUNK * problem.rounding())
    by_gradients = _by_gradients(problem, model, trial, predicted)
    if by_gradients > control.ACCEPTANCE or predicted <= limit:
        return Judgement(by_gradients, True, is_seen)
    # Both say that a large step gains nothing.
    return Judgement(rho)


def _by_gradients(problem: Problem, model: QuadraticModel, trial: Trial, predicted: float) -> float:
    trapezoid = -0.5 * read((model.gradient + problem.gradient(trial)).dot(trial.step))[0]
    return control.reduction_ratio(trapezoid, predicted)
