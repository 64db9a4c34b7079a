"""Search along a step that was refused, where another damping or radius would cost a solve."""

from __future__ import annotations

import math

from torch import Tensor

from secondorder.vectors.host import read

from .problem import Problem, QuadraticModel, Trial
from .subspace import Solution

# Armijo's constant and the shrinking of the step in the line search (Martens' Hessian-free code).
SUFFICIENT_DECREASE = 0.01
BACKTRACKING = 0.8
MAX_BACKTRACKS = 60


def search(
    problem: Problem, model: QuadraticModel, solution: Solution, full: Trial, rate: float, is_accepted: bool
) -> Trial | None:
    """The full step, an earlier iterate, or a shorter step; None where none decreases the objective.

    Args:
        problem: Evaluates.
        model: At its present point.
        solution: With the iterates before it.
        full: The trial of ``rate`` times its step.
        rate: Of all of them.
        is_accepted: Whether that trial is worth taking.
    """
    best = full
    for x in reversed(solution.earlier):
        candidate = problem.evaluate(rate * x)
        if math.isfinite(best.value) and not candidate.value < best.value - problem.noise(full):
            break
        best = candidate
    if best is full and is_accepted:
        return best
    (slope,) = read(model.gradient.dot(best.step))
    if decreases_enough(model, best, slope):
        return best
    return backtrack(problem, model, best.step, slope)


def decreases_enough(model: QuadraticModel, trial: Trial, slope: float) -> bool:
    """Armijo's condition (1966); ``slope`` along the step, ``gradient . step``."""
    bound = model.value + SUFFICIENT_DECREASE * min(slope, 0.0)
    return trial.value <= bound and trial.value < model.value


def backtrack(problem: Problem, model: QuadraticModel, step: Tensor, slope: float) -> Trial | None:
    """Shorten a descent step of this slope until the objective decreases enough, or none would show."""
    last = model.value
    for _ in range(MAX_BACKTRACKS):
        step, slope = BACKTRACKING * step, BACKTRACKING * slope
        trial = Trial(step, math.nan)
        if not slope < -problem.noise(trial):
            break
        trial = problem.evaluate(step)
        if decreases_enough(model, trial, slope):
            return trial
        if trial.value in (last, model.value):
            break
        last = trial.value
    return None
