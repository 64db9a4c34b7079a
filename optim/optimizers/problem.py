"""A closure at the present parameters as a ``Problem``: with weight decay, and in scaled variables."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from optim.closure.evaluate import ClosureEvaluator, Evaluation
from optim.closure.rounding import rounding
from optim.closure.setting import moved, trial
from optim.methods import control
from optim.methods.problem import QuadraticModel, Trial, norm
from optim.optimizers.decay import WeightDecay
from optim.optimizers.groups import Groups
from optim.optimizers.scaling import Scaling
from secondorder import LinearOperator


class Spent(NamedTuple):
    """Calls of the closure in a step, beside the one that is recorded, and their seconds."""

    evaluations: int = 0
    gradients: int = 0
    seconds: float = 0.0


class ClosureProblem:
    """What a step minimises: the closure's loss, negated with ``maximize``, and the weight decay.

    Args:
        evaluator: It recorded ``evaluation``.
        evaluation: At the present parameters.
        curvature: Of the loss, on flat vectors.
        groups: Of the optimizer.

    Attributes:
        spent: On trials, so far.
    """

    def __init__(
        self,
        evaluator: ClosureEvaluator,
        evaluation: Evaluation,
        curvature: LinearOperator,
        groups: Groups,
    ) -> None:
        self._evaluator, self._evaluation = evaluator, evaluation
        self._decay = WeightDecay.of(groups)
        self._eps = torch.finfo(self._decay.parameters[0].dtype).eps
        gradient, value = evaluation.gradient, evaluation.value
        if curvature.dtype != gradient.dtype:
            curvature = curvature.to(gradient.dtype)
        if self._decay:
            curvature = curvature + self._decay.diagonal(gradient)
            gradient, value = gradient + self._decay.gradient(gradient), value + self._decay.value()
        self._scaling = Scaling.of(groups, gradient)
        is_changed = bool(self._decay) or not self._scaling.is_plain
        plain, gradient = gradient, self._scaling.times(gradient)
        size = norm(gradient) if is_changed else evaluation.norm
        self._slope = size if self._scaling.is_plain else norm(plain)
        self._model = QuadraticModel(value, gradient, self._scaling.conjugated(curvature), size)
        self._rounding: float | None = None
        self.spent = Spent()

    def model(self) -> QuadraticModel:
        """As a function of ``q``."""
        return self._model

    def evaluate(self, step: Tensor) -> Trial:
        """The objective after the step."""
        start = time.perf_counter()
        with trial(self._decay.parameters, self._scaling.times(step)):
            value = self._evaluator.value() + self._decay.value()
        self._spend(start, evaluations=1)
        return Trial(step, value if math.isfinite(value) else math.nan)

    def decrease(self, trial: Trial) -> float:
        """Of the values."""
        return self._model.value - trial.value

    def noise(self, trial: Trial) -> float:
        """Rounding of the loss."""
        return control.noise_of(self._model.value, self._eps)

    def rounding(self) -> float:
        """Of the terms that the loss sums, or is a small difference of."""
        if self._rounding is None:
            self._rounding = self._eps * rounding(self._evaluation)
        return self._rounding

    def gradient(self, tried: Trial) -> Tensor:
        """After the step, by another run of the closure."""
        start, step = time.perf_counter(), self._scaling.times(tried.step)
        with trial(self._decay.parameters, step):
            gradient = self._evaluator.gradient()
            if self._decay:
                gradient = gradient + self._decay.gradient(step)
        self._spend(start, gradients=1)
        return self._scaling.times(gradient)

    def move(self, trial: Trial | None, then: Callable[[], None] = lambda: None) -> None:
        """Take the step, where there is one, unless ``then`` raises."""
        step = None if trial is None else self._scaling.times(trial.step)
        with contextlib.nullcontext() if step is None else moved(self._decay.parameters, step):
            then()

    def length(self, trial: Trial | None) -> float:
        """Euclidean norm of a step in the units of the parameters."""
        if trial is None:
            return 0.0
        is_known = self._scaling.is_plain and trial.norm == trial.norm
        return trial.norm if is_known else norm(self._scaling.times(trial.step))

    def slope(self) -> float:
        """Euclidean norm of the gradient in the units of the parameters."""
        return self._slope

    def outputs(self) -> int:
        """How many outputs the loss is of; 0 where no known loss was called."""
        return self._evaluation.coverage.outputs

    def _spend(self, start: float, evaluations: int = 0, gradients: int = 0) -> None:
        old = self.spent
        seconds = old.seconds + time.perf_counter() - start
        self.spent = Spent(old.evaluations + evaluations, old.gradients + gradients, seconds)
