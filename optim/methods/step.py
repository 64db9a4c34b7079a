"""The loop: solve in the space, try, judge, adapt, until a step is worth taking. It stands here once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from . import control
from .control import Rule
from .judge import Judgement, judge
from .problem import Problem, QuadraticModel, Trial
from .search import search
from .subspace import Solution, Subspace

# A model that was right to this says itself what twice the step would give.
RIGHT = 0.1


class Options(NamedTuple):
    """What a face asks of the loop.

    Attributes:
        rate: Multiplies the step.
        max_trials: Sizes that are tried.
        is_bold: While the model is right try bolder sizes, as long as the objective falls.
        longest: Try multiples of a step that the model was too careful about, up to this one.
        least_ratio: Below this reduction ratio safer sizes are tried.
        bend: Makes another step of a solution, that follows the problem further.
    """

    rate: float = 1.0
    max_trials: int = 10
    is_bold: bool = False
    longest: float = 1.0
    least_ratio: float = control.BAD
    bend: Callable[[Solution], Solution] | None = None


class Outcome(NamedTuple):
    """What a step came to.

    Attributes:
        status: Of the last solve, or why there was none.
        rho: Reduction ratio of the last solution, before any search or extension.
        size: The next damping or radius; NaN where nothing was tried.
        trial: To be taken; None where no step is worth it.
        trials: Solves.
    """

    status: str
    rho: float = math.nan
    size: float = math.nan
    trial: Trial | None = None
    trials: int = 0


class _Attempt(NamedTuple):
    """A size that was tried, and the size that its ratio asks for."""

    size: float
    solution: Solution
    trial: Trial
    judgement: Judgement
    following: float

    @property
    def rho(self) -> float:
        return self.judgement.rho

    @property
    def is_accepted(self) -> bool:
        return self.judgement.is_accepted

    @property
    def is_final(self) -> bool:
        """Where the loss shows nothing of this step, it shows even less of another."""
        return self.judgement.is_quiet

    def is_better(self, other: _Attempt | None) -> bool:
        return self.is_accepted and (other is None or self.trial.value < other.trial.value)


class Step:
    """One step from the present point of a problem.

    Args:
        problem: Evaluates.
        model: At that point.
        space: Where it is minimised.
        rule: How damping or radius follow.
        options: Of the face.
    """

    def __init__(
        self, problem: Problem, model: QuadraticModel, space: Subspace, rule: Rule, options: Options
    ) -> None:
        self._problem, self._model, self._space = problem, model, space
        self._rule, self._options = rule, options
        self._trials = 0

    def take(self, size: float) -> Outcome:
        """With damping or radius ``size`` first: what to take, and with which size to go on."""
        attempt = self._attempt(size)
        if not self._space.is_free:
            return self._searched(attempt)
        if attempt.is_final:
            best, following = attempt, attempt.following
        elif not attempt.rho > self._options.least_ratio:
            best, following = self._retreat(attempt)
        elif attempt.rho > control.GOOD and self._options.is_bold:
            best, following = self._advance(attempt)
        else:
            best, following = attempt, attempt.following
        return self._outcome(best, following, self._extended(best) if best.is_accepted else None)

    def _attempt(self, size: float) -> _Attempt:
        """Solve, try and judge; of two candidates keep the better."""
        self._trials += 1
        solution = self._solved(size)
        bend = self._options.bend
        attempt = self._judged(size, solution if bend is None else bend(solution))
        if solution.other is not None and not attempt.is_final:
            other = self._judged(size, solution.other)
            if other.is_accepted and not attempt.trial.value <= other.trial.value:
                attempt = other
        rho = attempt.judgement.for_control(attempt.solution.is_held_back)
        return attempt._replace(following=self._rule(size, rho, attempt.solution.norm))

    def _solved(self, size: float) -> Solution:
        """With the quadratic form of the objective alone."""
        solution, form = self._space.solve(size), self._model.form
        if form is None:
            return solution
        return solution._replace(quadratic=form(solution.step, solution.coordinates))

    def _judged(self, size: float, solution: Solution) -> _Attempt:
        rate = self._options.rate
        predicted = solution.predicted(rate)
        step = solution.step if rate == 1.0 else rate * solution.step
        if not (math.isfinite(predicted) and predicted > 0):
            return _Attempt(size, solution, Trial(step, math.nan), Judgement(-math.inf), size)
        trial = self._problem.evaluate(step)._replace(norm=abs(rate) * solution.norm)
        return _Attempt(size, solution, trial, judge(self._problem, self._model, trial, predicted), size)

    def _retreat(self, attempt: _Attempt) -> tuple[_Attempt, float]:
        """More damping, or a smaller radius, until the model is right enough; the best of what was tried."""
        best = attempt if attempt.is_accepted else None
        while self._trials < self._options.max_trials and not attempt.is_final:
            attempt = self._attempt(attempt.following)
            if not attempt.is_better(best):
                if best is not None:
                    return best, best.size
                continue
            best = attempt
            if attempt.rho > self._options.least_ratio:
                break
        if best is None or best.rho < control.LOW:
            return best or attempt, (best or attempt).following
        # No bolder than what was just refused.
        return best, best.size

    def _advance(self, best: _Attempt) -> tuple[_Attempt, float]:
        """Less damping, or a larger radius, while the model is right and the objective falls."""
        while best.rho > control.GOOD and best.following != best.size and not best.is_final:
            if self._trials >= self._options.max_trials:
                break
            attempt = self._attempt(best.following)
            if not attempt.is_better(best):
                return best, best.size
            best = attempt
        return best, best.following

    def _searched(self, attempt: _Attempt) -> Outcome:
        """Where another size costs a solve: search along each solution first."""
        while True:
            trial = attempt.trial if attempt.is_accepted else None
            if not attempt.is_final and (trial is None or attempt.solution.earlier):
                trial = search(
                    self._problem,
                    self._model,
                    attempt.solution,
                    attempt.trial,
                    self._options.rate,
                    attempt.is_accepted,
                )
            if self._options.is_bold and trial is attempt.trial and attempt.rho > control.GOOD:
                best, following = self._advance(attempt)
                return self._outcome(best, following, best.trial)
            if trial is not None or attempt.is_final or self._trials >= self._options.max_trials:
                return self._outcome(attempt, attempt.following, trial)
            attempt = self._attempt(attempt.following)

    def _extended(self, best: _Attempt) -> Trial:
        """Twice the step, four times ..., while the objective falls: the tail of an exponential."""
        solution, rate, trial = best.solution, self._options.rate, best.trial
        is_known = abs(best.rho - 1) < RIGHT and solution.predicted(2 * rate) <= solution.predicted(rate)
        if best.is_final or is_known or not best.rho > control.EXTEND:
            return trial
        factor = 2.0
        while factor <= self._options.longest:
            longer = self._problem.evaluate(factor * best.trial.step)
            if not longer.value < trial.value:
                break
            trial, factor = longer._replace(norm=factor * best.trial.norm), 2 * factor
        return trial

    def _outcome(self, best: _Attempt, following: float, trial: Trial | None) -> Outcome:
        status = best.solution.status
        if trial is None and best.is_final:
            status = "noise_floor"
        elif not math.isfinite(best.solution.predicted()):
            status = "non_finite"
        return Outcome(status, best.rho, following, trial, self._trials)
