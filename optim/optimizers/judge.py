"""Try steps and judge them: the quadratic model, the trials, the reduction ratio, the line search."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from optim.closure.evaluate import ClosureEvaluator, Evaluation
from optim.closure.setting import trial
from optim.methods import control
from optim.optimizers.decay import WeightDecay
from secondorder import LinearOperator, SolveResult

# Costs in gradients (one forward and one backward pass, the backward twice the forward).
FORWARD_COST = 1 / 3

# Armijo's constant and the shrinking of the step in the line search (Martens' Hessian-free code).
SUFFICIENT_DECREASE = 0.01
BACKTRACKING = 0.8
MAX_BACKTRACKS = 60


class QuadraticModel(NamedTuple):
    """``m(p) = value + gradient . p + p . curvature p / 2``.

    Attributes:
        value: Objective at the start of the step: the loss and the weight decay.
        gradient: Its gradient, flat, shape (n,).
        curvature: Operator on flat vectors, undamped; a ``MatrixOperator`` for a direct solver.
    """

    value: float
    gradient: Tensor
    curvature: LinearOperator

    @classmethod
    def of(cls, evaluation: Evaluation, curvature: LinearOperator, decay: WeightDecay) -> QuadraticModel:
        """That of loss and weight decay, in at least single precision."""
        gradient, value = evaluation.gradient, evaluation.value
        if curvature.dtype != gradient.dtype:
            curvature = curvature.to(gradient.dtype)
        if decay:
            curvature = curvature + decay.diagonal(gradient)
            gradient, value = gradient + decay.gradient(gradient), value + decay.value()
        return cls(value, gradient, curvature)

    def predicted(self, p: Tensor, quadratic: float) -> float:
        """The decrease that the model promises, given ``p . curvature p``."""
        return -float(self.gradient.dot(p)) - 0.5 * quadratic


class Proposal(NamedTuple):
    """What ``_solve`` gives: the solution of the model and, from CG, earlier iterates to fall back on.

    ``result.quadratic`` is ``x . B x`` with the undamped curvature.
    """

    result: SolveResult
    earlier: tuple[Tensor, ...] = ()
    line_search: bool = False


class Counter:
    """Counts the work of one step: the gradient itself, and that of setting up the curvature."""

    def __init__(self, product_cost: float = 0.0) -> None:
        self.cost = 2.0
        self.iterations = 0
        self.trials = 0
        self._product_cost = product_cost

    def add(self, result: SolveResult) -> None:
        """Count a system that was solved."""
        self.trials += 1
        self.iterations += result.iterations
        self.add_products(result.products)

    def add_products(self, number: int) -> None:
        """Count products with the curvature."""
        self.cost += number * self._product_cost


class Taken(NamedTuple):
    """A step worth taking, and the loss after it; NaN where that is not known."""

    step: Tensor
    value: float


class Judge:
    """Tries steps and says which one to take.

    Attributes:
        rho: Reduction ratio of the full solution of the model, before any line search.
        is_quiet: The loss cannot judge that solution, since what it changes is rounding: only gradients did.
    """

    def __init__(
        self,
        model: QuadraticModel,
        evaluator: ClosureEvaluator,
        decay: WeightDecay,
        counter: Counter,
    ) -> None:
        self._model, self._evaluator = model, evaluator
        self._decay, self._parameters = decay, decay.parameters
        self._eps = torch.finfo(decay.parameters[0].dtype).eps
        self._counter = counter
        self._predicted = math.nan
        self.rho = math.nan
        self.is_quiet = False

    @property
    def _noise(self) -> float:
        """Rounding of the loss."""
        return control.noise_of(self._model.value, self._eps)

    def try_out(self, proposal: Proposal, rate: float | Tensor) -> Taken | None:
        """The step to take, or None: the full one, an earlier iterate, or a shorter one along it."""
        result = proposal.result
        if isinstance(rate, Tensor):
            # Scaled entry by entry, the step is no longer the model's: the model is judged on its own.
            self._judge_model(result.x, result.quadratic)
            full = Taken(rate * result.x, self._value_at(rate * result.x))
        else:
            full = self._judge_model(rate * result.x, rate * rate * result.quadratic)
            if self.rho > control.ACCEPTANCE and (self.is_quiet or not proposal.earlier):
                return full
            if self.is_quiet:
                return None
        best = full
        for x in reversed(proposal.earlier):
            candidate = Taken(rate * x, self._value_at(rate * x))
            if math.isfinite(best.value) and not candidate.value < best.value - self._noise:
                break
            best = candidate
        if self._decreases_enough(best):
            return best
        if best is full and not isinstance(rate, Tensor) and self.rho > control.ACCEPTANCE:
            return best
        if isinstance(rate, Tensor):
            # Not those that do not move.
            smallest = float(rate[rate > 0].min())
            return self._backtrack(torch.where(rate > 0, smallest, 0.0) * result.x)
        return self._backtrack(best.step) if proposal.line_search else None

    def ratio_for_control(self, holds_back: bool) -> float:
        """``rho``, or what it may tell the control where only gradients told it.

        Args:
            holds_back: Whether the control is what limits the step.
        """
        if not self.is_quiet:
            return self.rho
        is_in_reach = control.REACH * self._predicted > self._noise
        return control.quiet_ratio(self.rho, holds_back and is_in_reach)

    def _judge_model(self, step: Tensor, quadratic: float) -> Taken:
        """Try a step of which the model knows the decrease; sets ``rho``."""
        self._predicted = predicted = self._model.predicted(step, quadratic)
        value = self._value_at(step) if math.isfinite(predicted) and predicted > 0 else math.nan
        self.rho, self.is_quiet = self._ratio(step, value, predicted)
        return Taken(step, value)

    def _value_at(self, step: Tensor) -> float:
        """The objective after the step; NaN, which no comparison prefers, where it is infinite too."""
        self._counter.cost += FORWARD_COST
        with trial(self._parameters, step):
            value = self._evaluator.value() + self._decay.value()
        return value if math.isfinite(value) else math.nan

    def _ratio(self, step: Tensor, value: float, predicted: float) -> tuple[float, bool]:
        """The reduction ratio, and whether it is that of the gradients, the loss being too coarse."""
        actual = self._model.value - value
        sizes = actual, predicted, self._model.value, self._eps
        ratio = control.reduction_ratio(actual, predicted)
        in_noise = control.is_noise(*sizes)
        if not in_noise and not control.is_unseen(*sizes):
            return ratio, False
        self._counter.cost += 1.0
        with trial(self._parameters, step):
            gradient = self._evaluator.gradient() + self._decay.gradient(step)
        # The trapezoid rule along the step.
        trapezoid = -0.5 * float((self._model.gradient + gradient).dot(step))
        by_gradients = control.reduction_ratio(trapezoid, predicted)
        if by_gradients > control.ACCEPTANCE or predicted <= control.CANCELLATION * self._noise:
            return by_gradients, True
        # Both say that a large step gains nothing; at a loss of zero there is no rounding to compare with.
        return ratio, value == 0

    def _decreases_enough(self, taken: Taken) -> bool:
        slope = float(self._model.gradient.dot(taken.step))
        bound = self._model.value + SUFFICIENT_DECREASE * min(slope, 0.0)
        return taken.value <= bound and taken.value < self._model.value

    def _backtrack(self, step: Tensor) -> Taken | None:
        """Shorten a descent step until the loss decreases enough (Armijo 1966), or no decrease would show."""
        slope, last = float(self._model.gradient.dot(step)), self._model.value
        for _ in range(MAX_BACKTRACKS):
            step, slope = BACKTRACKING * step, BACKTRACKING * slope
            if not slope < -self._noise:
                break
            taken = Taken(step, self._value_at(step))
            if self._decreases_enough(taken):
                return taken
            if taken.value in (last, self._model.value):
                break
            last = taken.value
        return None
