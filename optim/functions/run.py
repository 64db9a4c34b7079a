"""The loop over steps that every functional front end runs; what a step does is in ``optim.methods.step``."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from tqdm import tqdm

from ..methods.control import Rule
from ..methods.problem import Problem, QuadraticModel
from ..methods.step import Options, Outcome, Step
from ..methods.subspace import Subspace
from .problem import Counts
from .results import OptimizeResult, Record

Callback = Callable[[OptimizeResult], Any]

# A value below this, relative to the start, has no minimum near it.
UNBOUNDED = -1e30
# Radii or dampings that are tried before the status is looked at again.
MAX_TRIALS = 10


class Limits(NamedTuple):
    """When a run ends at the latest.

    Attributes:
        max_iter: Steps, taken or rejected.
        max_nfev: Evaluations; None for any number.
    """

    max_iter: int
    max_nfev: int | None = None


class Face(Protocol):
    """What a front end brings to the loop.

    Attributes:
        problem: What is minimised, with ``counts()`` and ``nhev``.
        model: At the present point; made by ``look``.
        rule: How radius or damping follow.
    """

    problem: Any
    model: QuadraticModel
    rule: Rule

    def look(self) -> None:
        """At the present point, which is new: make its model."""

    def first_size(self) -> float:
        """Radius or damping of the first step, after the first look."""

    def verdict(self) -> str:
        """The status that the present point deserves; empty where steps go on from it."""

    def space(self) -> Subspace | None:
        """Where the model is minimised, the same until the next ``look``; None where it is not finite."""

    def options(self) -> Options:
        """Of the next step."""

    def refused(self, outcome: Outcome) -> str:
        """The status where no step was worth taking; empty where another size may be."""

    def taken(self, outcome: Outcome) -> str:
        """Called after the move, before ``look``: a status that ends the run; empty to go on."""

    def measure(self) -> float:
        """Largest entry of the gradient here, as a ``Record`` has it."""

    def result(self, status: str, run: Run) -> OptimizeResult:
        """The present point."""


class Run:
    """Steps from the present point of a face until something ends them.

    Args:
        face: What is minimised, and how.
        limits: When it ends at the latest.
        callback: Called with the present result after each accepted step; ends the run by returning True or
            raising StopIteration.
        progress: Show a bar.

    Attributes:
        nit: Steps tried.
        history: A record for each point.
    """

    def __init__(self, face: Face, limits: Limits, callback: Callback | None, progress: bool) -> None:
        self._face, self._limits, self._callback = face, limits, callback
        self._progress = progress
        self.nit = 0
        self.history: list[Record] = []

    def to_the_end(self, size: float | None = None) -> OptimizeResult:
        """With radius or damping ``size`` first; the face's own where None."""
        face = self._face
        face.look()
        size = face.first_size() if size is None else size
        self._record(0.0, math.nan)
        least = UNBOUNDED * max(1.0, abs(face.model.value))
        bar = tqdm(total=self._limits.max_iter, unit="step", leave=False, disable=not self._progress)
        with contextlib.closing(bar):
            while True:
                status = face.verdict() or self._limit()
                if status:
                    return face.result(status, self)
                outcome = self._step(size)
                if outcome is None:
                    return face.result("non_finite", self)
                size = outcome.size
                status = face.refused(outcome) if outcome.trial is None else self._move(outcome, least)
                bar.update(outcome.trials)
                bar.set_postfix(fun=face.model.value, refresh=False)
                if status:
                    return face.result(status, self)

    def _limit(self) -> str:
        if self.nit >= self._limits.max_iter:
            return "max_iter"
        return "" if self._left() > 0 else "max_nfev"

    def _left(self) -> float:
        most = self._limits.max_nfev
        return math.inf if most is None else most - self._counts().nfev

    def _counts(self) -> Counts:
        counts: Counts = self._face.problem.counts()
        return counts

    def _step(self, size: float) -> Outcome | None:
        """None where the model is not finite."""
        face, left = self._face, min(MAX_TRIALS, self._limits.max_iter - self.nit, self._left())
        space = face.space()
        if space is None:
            return None
        problem: Problem = face.problem
        options = face.options()._replace(max_trials=int(left))
        evaluations = self._counts().nfev
        products = space.products
        outcome = Step(problem, face.model, space, face.rule, options).take(size)
        self.nit += outcome.trials
        # A dense Hessian was counted when it was made.
        face.problem.nhev += space.products - products
        if self._counts().nfev == evaluations and outcome.status != "non_finite":
            # Nothing promised a decrease.
            return outcome._replace(status="noise_floor")
        return outcome

    def _move(self, outcome: Outcome, least: float) -> str:
        """Take the step, and say why to stop there; empty to go on."""
        face, trial = self._face, outcome.trial
        assert trial is not None
        face.problem.move(trial)
        status = face.taken(outcome)
        face.look()
        self._record(trial.norm, outcome.size)
        if not status and self._is_asked_to_stop():
            status = "stopped"
        return status or ("unbounded" if trial.value < least else "")

    def _record(self, step_norm: float, size: float) -> None:
        face = self._face
        self.history.append(Record(face.model.value, face.measure(), step_norm, size))

    def _is_asked_to_stop(self) -> bool:
        if self._callback is None:
            return False
        try:
            return bool(self._callback(self._face.result("running", self)))
        except StopIteration:
            return True


def check_call(name: str, callback: Any) -> None:
    """Raise where a front end is called with what is no callback, or where torch takes no derivatives."""
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be a function of an OptimizeResult, got {type(callback).__name__}.")
    if torch.is_inference_mode_enabled():
        raise RuntimeError(f"{name} needs derivatives, which torch.inference_mode() takes away; leave it.")
