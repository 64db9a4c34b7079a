"""The shared step: evaluate, model, solve, try, judge, commit.

A subclass says which curvature (``_curvature``), how to solve (``_solve``) and how to adapt
(``_adapt``); everything else is here.
"""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optim import _control
from optim.closure.evaluate import ClosureEvaluator, Evaluation, trial
from secondorder import GaussNewton, Hessian, LinearOperator, MatrixOperator, SolveResult
from secondorder.flat import unflatten

# Costs in gradients (one forward and one backward pass, the backward twice the forward).
FORWARD_COST = 1 / 3
PRODUCT_COST = {Hessian: 2.0, GaussNewton: 4 / 3}

# Armijo's constant and the shrinking of the step in the line search (Martens' Hessian-free code).
SUFFICIENT_DECREASE = 0.01
BACKTRACKING = 0.8
MAX_BACKTRACKS = 60


class QuadraticModel(NamedTuple):
    """``m(p) = value + gradient . p + p . curvature p / 2``.

    Attributes:
        value: Loss at the start of the step.
        gradient: Its gradient, flat, shape (n,).
        curvature: Operator on flat vectors, undamped; a ``MatrixOperator`` for a direct solver.
    """

    value: float
    gradient: Tensor
    curvature: LinearOperator

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


class StepReport(NamedTuple):
    """What the last step did.

    Attributes:
        loss: Loss before the step.
        new_loss: Loss after it; equal to ``loss`` where no step was taken.
        accepted: Whether the parameters moved.
        rho: Reduction ratio of the last trial; NaN when there was none.
        damping: Damping for the next step; 0.0 for a method with a radius.
        radius: Trust radius for the next step; infinity for a method with damping.
        gradient_norm: Euclidean norm of the gradient before the step.
        step_norm: Euclidean norm of the step taken.
        status: Of the solver (see ``secondorder.solvers.STATUS_TEXT``), or "zero_gradient".
        iterations: Of the solver, all trials together.
        trials: Systems solved.
        curvature: Which curvature was used, and why.
        gradient_equivalents: Cost of the step, in gradients.
    """

    loss: float
    new_loss: float
    accepted: bool
    rho: float
    damping: float
    radius: float
    gradient_norm: float
    step_norm: float
    status: str
    iterations: int
    trials: int
    curvature: str
    gradient_equivalents: float


class _Counter:
    """Counts the work of one step: the gradient itself, and that of setting up the curvature."""

    def __init__(self, product_cost: float = 0.0) -> None:
        self.cost = 2.0
        self.iterations = 0
        self.trials = 0
        self._product_cost = product_cost

    def add_products(self, number: int) -> None:
        self.cost += number * self._product_cost


class SecondOrderOptimizer(torch.optim.Optimizer):
    """Base of the optimizers: one ``step`` for all of them."""

    report: StepReport | None = None
    _warned = False

    @abstractmethod
    def _curvature(self, evaluation: Evaluation) -> tuple[LinearOperator, str]:
        """The operator of the model, and what it is."""

    @abstractmethod
    def _solve(self, model: QuadraticModel) -> Proposal:
        """Minimise the model, damped or within the radius."""

    @abstractmethod
    def _adapt(self, rho: float, step_norm: float) -> None:
        """Set damping or radius after a trial."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Tensor:  # type: ignore[override]
        """One step: the loss does not increase beyond rounding, and parameters are never NaN.

        Args:
            closure: Evaluates the model and returns the loss, with or without calling ``backward``; or
                returns ``(loss, outputs)``. The closure of ``torch.optim.LBFGS`` works as it is.

        Returns:
            The loss before the step.

        Raises:
            TypeError: ``closure`` is None or returns something else.
            RuntimeError: the loss at the current parameters is not finite, not a scalar, or does not
                depend on the parameters. Parameters and gradients are unchanged.
        """
        if closure is None:
            raise TypeError(
                f"{type(self).__name__}.step needs a closure that evaluates the model and returns the loss,"
                " got None; the closure of torch.optim.LBFGS works as it is."
            )
        parameters = self._parameters()
        evaluator = ClosureEvaluator(closure, parameters)
        evaluation = evaluator.record()
        gradient_norm = float(evaluation.gradient.norm())
        if gradient_norm == 0:
            self.report = self._report(evaluation, _Outcome("zero_gradient"), _Counter(), "none")
            return evaluation.loss
        with torch.enable_grad():
            operator, description = self._curvature(evaluation)
        counter = _Counter(PRODUCT_COST[type(operator)])
        if self._is_direct(operator):
            operator = MatrixOperator(operator.dense())
            counter.add_products(operator.shape[0])
        model = QuadraticModel(evaluation.value, evaluation.gradient, operator)
        outcome = self._search(model, evaluator, parameters, counter)
        if outcome.taken is not None:
            for parameter, part in zip(parameters, unflatten(outcome.taken.step, parameters), strict=True):
                parameter.add_(part.to(parameter.dtype))
        self.report = self._report(evaluation, outcome, counter, description)
        return evaluation.loss

    def _search(
        self, model: QuadraticModel, evaluator: ClosureEvaluator, parameters: list[Tensor], counter: _Counter
    ) -> _Outcome:
        """Solve and try, with more damping after each failure, until a step is worth taking."""
        judge = _Judge(model, evaluator, parameters, counter)
        status = ""
        for _ in range(self.param_groups[0]["max_trials"]):
            proposal = self._solve(model)
            counter.trials += 1
            counter.iterations += proposal.result.iterations
            counter.add_products(proposal.result.products)
            status = proposal.result.status
            taken = judge.try_out(proposal, self._learning_rates())
            self._adapt(judge.rho, judge.step_norm)
            if taken is not None:
                return _Outcome(status, judge.rho, taken)
        return _Outcome(status, judge.rho)

    def _parameters(self) -> list[Tensor]:
        """All parameters that can move; one joint model over all groups."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        if not parameters:
            raise RuntimeError(
                f"{type(self).__name__} has no parameter that requires gradients; unfreeze at least one."
            )
        return parameters

    def _learning_rates(self) -> float | Tensor:
        """The factor of the step: a number where all groups agree, else one for each entry."""
        rates = {float(group["lr"]) for group in self.param_groups}
        if len(rates) == 1:
            return rates.pop()
        return torch.cat(
            [
                p.new_full((p.numel(),), float(group["lr"]))
                for group in self.param_groups
                for p in group["params"]
                if p.requires_grad
            ]
        )

    def _report(
        self, evaluation: Evaluation, outcome: _Outcome, counter: _Counter, curvature: str
    ) -> StepReport:
        group, taken = self.param_groups[0], outcome.taken
        return StepReport(
            loss=evaluation.value,
            new_loss=evaluation.value if taken is None else taken.value,
            accepted=taken is not None,
            rho=outcome.rho,
            damping=group.get("damping", 0.0),
            radius=group.get("radius", math.inf),
            gradient_norm=float(evaluation.gradient.norm()),
            step_norm=0.0 if taken is None else float(taken.step.norm()),
            status=outcome.status,
            iterations=counter.iterations,
            trials=counter.trials,
            curvature=curvature,
            gradient_equivalents=counter.cost,
        )

    def _is_direct(self, operator: LinearOperator) -> bool:
        """Whether to form the matrix: as asked, or for a small one in double precision.

        In single precision the small eigenvalues of the formed matrix are rounding, while CG sees each
        direction as exactly as a product does: on a 49-parameter regression, 100 steps end at a loss of
        1e-5 with the matrix and 3e-8 with CG.
        """
        group = self.param_groups[0]
        solver = group.get("solver", "cg")
        if solver == "auto":
            return operator.dtype == torch.float64 and operator.shape[0] <= group["direct_limit"]
        return bool(solver == "direct")

    def _gauss_newton(self, evaluation: Evaluation) -> tuple[LinearOperator, str]:
        """The Gauss-Newton matrix, or the Hessian with a warning where it would miss a term."""
        blocks, description = evaluation.coverage
        if blocks:
            return GaussNewton(blocks, self._parameters()), f"gauss-newton ({description})"
        text = (
            f"{type(self).__name__} found no Gauss-Newton matrix for the whole objective: {description}."
            " Let the closure return (loss, outputs), with outputs the tensor that a convex loss is"
            " computed from."
        )
        if self.param_groups[0]["strict"]:
            raise RuntimeError(text)
        if not self._warned:
            self._warned = True
            warnings.warn(text + " The exact Hessian is used instead.", stacklevel=4)
        return Hessian(evaluation.objective, self._parameters()), f"hessian ({description})"

    @staticmethod
    def _undamped(result: SolveResult, damping: float) -> SolveResult:
        """With the quadratic of ``B`` in place of that of ``B + damping I``."""
        return result._replace(quadratic=result.quadratic - damping * float(result.x.dot(result.x)))

    def _set_in_all_groups(self, **values: float) -> None:
        for group in self.param_groups:
            group.update(values)


class _Taken(NamedTuple):
    step: Tensor
    value: float


class _Outcome(NamedTuple):
    status: str
    rho: float = math.nan
    taken: _Taken | None = None


class _Judge:
    """Tries steps and says which one to take; keeps the reduction ratio of the full step."""

    def __init__(
        self, model: QuadraticModel, evaluator: ClosureEvaluator, parameters: list[Tensor], counter: _Counter
    ) -> None:
        self._model, self._evaluator, self._parameters = model, evaluator, parameters
        self._counter = counter
        self.rho = math.nan
        self.step_norm = math.nan

    def try_out(self, proposal: Proposal, rate: float | Tensor) -> _Taken | None:
        """The step to take, or None: the full one, an earlier iterate, or a shorter one along it."""
        full = rate * proposal.result.x
        self.step_norm = float(full.norm())
        quadratic = self._quadratic(proposal.result, full, rate)
        predicted = self._model.predicted(full, quadratic)
        value = self._value_at(full) if math.isfinite(predicted) and predicted > 0 else math.nan
        self.rho = self._ratio(full, value, predicted)
        best = _Taken(full, value)
        for x in reversed(proposal.earlier):
            candidate = _Taken(rate * x, self._value_at(rate * x))
            if math.isfinite(best.value) and not candidate.value < best.value:
                break
            best = candidate
        if best.step is full and self.rho > _control.ACCEPTANCE:
            return best
        if self._decreases_enough(best):
            return best
        return self._backtrack(best.step) if proposal.line_search else None

    def _quadratic(self, result: SolveResult, full: Tensor, rate: float | Tensor) -> float:
        if isinstance(rate, float):
            return rate * rate * result.quadratic
        self._counter.add_products(1)
        return float(full.dot(self._model.curvature @ full))

    def _value_at(self, step: Tensor) -> float:
        self._counter.cost += FORWARD_COST
        with trial(self._parameters, step):
            return self._evaluator.value()

    def _ratio(self, step: Tensor, value: float, predicted: float) -> float:
        """The reduction ratio from the losses or, where their difference is rounding, from the gradients."""
        actual = self._model.value - value
        if not _control.is_noise(actual, predicted, self._model.value, torch.finfo(step.dtype).eps):
            return _control.reduction_ratio(actual, predicted)
        self._counter.cost += 1.0
        with trial(self._parameters, step):
            gradient = self._evaluator.gradient()
        # The trapezoid rule along the step.
        trapezoid = -0.5 * float((self._model.gradient + gradient).dot(step))
        return _control.reduction_ratio(trapezoid, predicted)

    def _decreases_enough(self, taken: _Taken) -> bool:
        slope = float(self._model.gradient.dot(taken.step))
        bound = self._model.value + SUFFICIENT_DECREASE * min(slope, 0.0)
        return taken.value <= bound and taken.value < self._model.value

    def _backtrack(self, step: Tensor) -> _Taken | None:
        """Shorten a descent step until the loss decreases enough (Armijo 1966)."""
        if not float(self._model.gradient.dot(step)) < 0:
            return None
        for _ in range(MAX_BACKTRACKS):
            step = BACKTRACKING * step
            taken = _Taken(step, self._value_at(step))
            if self._decreases_enough(taken):
                return taken
        return None
