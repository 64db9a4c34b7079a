"""A closure at the present parameters as a ``Problem``: with weight decay, and in scaled variables."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from secondorder import LinearOperator

from ..closure.evaluate import ClosureEvaluator, Evaluation
from ..closure.rounding import rounding
from ..closure.setting import moved, trial
from ..methods import control
from ..methods.problem import Form, QuadraticModel, Trial, norm, norms
from .decay import WeightDecay
from .groups import Groups
from .meter import Meter
from .residuals import ClosureResiduals
from .scaling import Scaling


class ClosureProblem:
    """What a step minimises: the closure's loss, negated with ``maximize``, and the weight decay.

    Args:
        evaluator: It recorded ``evaluation``.
        evaluation: At the present parameters.
        curvature: Of the loss, on flat vectors.
        groups: Of the optimizer.
        form: As of a ``QuadraticModel``, of the loss alone.
        scale: Makes the scale of each variable from the norms of its residuals' columns; None for no such
            scale.

    Attributes:
        spent: On trials, so far.
        residuals: The same model by residuals, where it has that form.
        scaling: From ``q``, the variables of the model, to parameters.
    """

    def __init__(
        self,
        evaluator: ClosureEvaluator,
        evaluation: Evaluation,
        curvature: LinearOperator,
        groups: Groups,
        form: Form | None = None,
        scale: Callable[[Tensor | None], Tensor] | None = None,
    ) -> None:
        self._evaluator, self._evaluation = evaluator, evaluation
        self._decay = WeightDecay.of(groups)
        self._eps = torch.finfo(self._decay.parameters[0].dtype).eps
        gradient, value = evaluation.gradient, evaluation.value
        whole = curvature if curvature.dtype == gradient.dtype else curvature.to(gradient.dtype)
        if self._decay:
            whole = whole + self._decay.diagonal(gradient)
            gradient = gradient + self._decay.gradient(gradient)
        self.spent = Meter()
        memory = groups[0]["memory"]
        self.residuals = ClosureResiduals(evaluator, evaluation, curvature, self._decay, self.spent, memory)
        scaling = Scaling.of(groups, gradient)
        if scale is not None:
            scaling = scaling.divided(scale(self.residuals.columns()))
        self.scaling = self.residuals.scaling = scaling
        plain, gradient = gradient, self.scaling.times(gradient)
        size = self._slope = evaluation.norm
        decayed = self._decay.value()
        if decayed is not None or not self.scaling.is_plain:
            both = [gradient] if self.scaling.is_plain else [gradient, plain]
            sizes, (more,) = norms(*both, beside=[decayed if decayed is not None else gradient.new_zeros(())])
            value, size, self._slope = value + more, sizes[0], sizes[-1]
        curvature = self.scaling.conjugated(whole)
        judged = None if form is None else _with_decay(form, self._decay, self.scaling)
        self._model = QuadraticModel(value, gradient, curvature, size, judged)
        self._rounding: float | None = None

    def model(self) -> QuadraticModel:
        """As a function of ``q``."""
        return self._model

    def evaluate(self, step: Tensor) -> Trial:
        """The objective after the step."""
        with self.spent.evaluation(), trial(self._decay.parameters, self.scaling.times(step)):
            value = self._evaluator.value(beside=self._decay.value())
        return Trial(step, value if math.isfinite(value) else math.nan)

    def decrease(self, trial: Trial) -> float:
        """Of the values."""
        return self._model.value - trial.value

    def noise(self, trial: Trial) -> float:
        """Rounding of the loss."""
        return control.noise_of(self._model.value, self._eps)

    def doubt(self) -> float:
        """Nothing: the closure's terms are known."""
        return 0.0

    def rounding(self) -> float:
        """Of the terms that the loss sums, or is a small difference of."""
        if self._rounding is None:
            self._rounding = self._eps * rounding(self._evaluation)
        return self._rounding

    def gradient(self, tried: Trial) -> Tensor:
        """After the step, by another run of the closure."""
        step = self.scaling.times(tried.step)
        with self.spent.gradient(), trial(self._decay.parameters, step):
            gradient = self._evaluator.gradient()
            if self._decay:
                gradient = gradient + self._decay.gradient(step)
        return self.scaling.times(gradient)

    def move(self, trial: Trial | None, then: Callable[[], None] = lambda: None) -> None:
        """Take the step, where there is one, unless ``then`` raises."""
        step = None if trial is None else self.scaling.times(trial.step)
        with contextlib.nullcontext() if step is None else moved(self._decay.parameters, step):
            then()

    def length(self, trial: Trial | None) -> float:
        """Euclidean norm of a step in the units of the parameters."""
        if trial is None:
            return 0.0
        is_known = self.scaling.is_plain and trial.norm == trial.norm
        return trial.norm if is_known else norm(self.scaling.times(trial.step))

    def slope(self) -> float:
        """Euclidean norm of the gradient in the units of the parameters."""
        return self._slope

    def outputs(self) -> int:
        """How many outputs the loss is of; 0 where no known loss was called."""
        return self._evaluation.coverage.outputs


def _with_decay(form: Form, decay: WeightDecay, scaling: Scaling) -> Form:
    """That of the loss, and of the decay, of steps in scaled variables."""

    def judged(step: Tensor, coordinates: Tensor | None) -> float:
        step = scaling.times(step)
        own = float((decay.diagonal(step) * step).dot(step)) if decay else 0.0
        return own + form(step, coordinates)

    return judged
