"""A closure at the present parameters as a ``Problem``: with weight decay, and in scaled variables.

Groups may have their own ``damping_scale``. With ``q = sqrt(scale) p``, entry by entry, ``damping *
norm(q)^2`` is the damping of each group times its scale, and a ball of ``q`` an ellipsoid in which entries of
a large scale move less. All vectors that a method sees are of ``q``.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from optim.closure.evaluate import ClosureEvaluator, Evaluation
from optim.closure.setting import moved, trial
from optim.methods import control
from optim.methods.problem import QuadraticModel, Trial
from optim.optimizers.decay import WeightDecay
from optim.optimizers.groups import Groups, of_groups
from secondorder import FunctionOperator, LinearOperator


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
        scale = of_groups(groups, "damping_scale", gradient)
        # Of p = factor * q.
        self._factor = scale.rsqrt() if isinstance(scale, Tensor) else scale**-0.5
        self._is_plain = not isinstance(self._factor, Tensor) and self._factor == 1.0
        self._model = QuadraticModel(value, self._scaled(gradient), self._conjugated(curvature))
        self.spent = Spent()

    def model(self) -> QuadraticModel:
        """As a function of ``q``."""
        return self._model

    def evaluate(self, step: Tensor) -> Trial:
        """The objective after the step."""
        start = time.perf_counter()
        with trial(self._decay.parameters, self._scaled(step)):
            value = self._evaluator.value() + self._decay.value()
        self._spend(start, evaluations=1)
        return Trial(step, value if math.isfinite(value) else math.nan)

    def decrease(self, trial: Trial) -> float:
        """Of the values."""
        return self._model.value - trial.value

    def noise(self, trial: Trial) -> float:
        """Rounding of the loss."""
        return control.noise_of(self._model.value, self._eps)

    def gradient(self, tried: Trial) -> Tensor:
        """After the step, by another run of the closure."""
        start, step = time.perf_counter(), self._scaled(tried.step)
        with trial(self._decay.parameters, step):
            gradient = self._evaluator.gradient()
            if self._decay:
                gradient = gradient + self._decay.gradient(step)
        self._spend(start, gradients=1)
        return self._scaled(gradient)

    def move(self, trial: Trial | None, then: Callable[[], None] = lambda: None) -> None:
        """Take the step, where there is one, unless ``then`` raises."""
        step = None if trial is None else self._scaled(trial.step)
        with contextlib.nullcontext() if step is None else moved(self._decay.parameters, step):
            then()

    def length(self, trial: Trial | None) -> float:
        """Euclidean norm of a step in the units of the parameters."""
        return 0.0 if trial is None else float(self._scaled(trial.step).norm())

    def slope(self) -> float:
        """Euclidean norm of the gradient in the units of the parameters."""
        gradient = self._model.gradient
        return float((gradient if self._is_plain else gradient / self._factor).norm())

    def outputs(self) -> int:
        """How many outputs the loss is of; 0 where no known loss was called."""
        blocks = self._evaluation.coverage.blocks
        return sum(output.numel() for block in blocks for output in getattr(block, "outputs", ()))

    def _spend(self, start: float, evaluations: int = 0, gradients: int = 0) -> None:
        old = self.spent
        seconds = old.seconds + time.perf_counter() - start
        self.spent = Spent(old.evaluations + evaluations, old.gradients + gradients, seconds)

    def _scaled(self, v: Tensor) -> Tensor:
        """``factor * v``: a gradient of ``p`` as one of ``q``, a step of ``q`` as one of ``p``."""
        return v if self._is_plain else self._factor * v

    def _conjugated(self, curvature: LinearOperator) -> LinearOperator:
        factor = self._factor
        if isinstance(factor, float):
            return curvature if factor == 1.0 else curvature * factor**2
        diagonal = FunctionOperator(lambda v: factor * v, factor)
        return diagonal @ curvature @ diagonal
