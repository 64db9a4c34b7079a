"""The shared step: evaluate, model, solve, try, judge, commit.

A subclass says which curvature (``_curvature``), how to solve (``_solve``), how to adapt (``_adapt``) and
which options are allowed (``_check_options``); everything else is here.
"""

from __future__ import annotations

import math
import sys
import warnings
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optim._decay import WeightDecay, spread
from optim._judge import Counter, Judge, Proposal, QuadraticModel, Taken
from optim._options import check_not_negative
from optim.closure.evaluate import ClosureEvaluator, Evaluation
from secondorder import GaussNewton, Hessian, LinearOperator, MatrixOperator, SolveResult
from secondorder.flat import unflatten

# Cost of a product on the kept graph, in gradients of a deep network.
PRODUCT_COST = {Hessian: 2.0, GaussNewton: 4 / 3}

# Options that groups may differ in: of the rest there is one, as there is one model for all parameters.
OF_GROUPS = ("lr", "weight_decay", "damping_scale")

# Relative difference between the loss returned and the loss differentiated that is more than rounding.
MISMATCH = 1e-3


class StepReport(NamedTuple):
    """What the last step did.

    Attributes:
        loss: What is minimised, before the step: the closure's loss (negated with ``maximize``) and the
            weight decay.
        new_loss: The same after it; equal to ``loss`` where no step was taken.
        accepted: Whether the parameters moved.
        rho: Reduction ratio, actual over predicted decrease, of the last full solution of the model, before
            any line search; NaN when there was none.
        damping: Damping for the next step; 0.0 for a method with a radius.
        radius: Trust radius for the next step; infinity for a method with damping.
        gradient_norm: Euclidean norm of the gradient before the step.
        step_norm: Euclidean norm of the step taken.
        status: Of the solver (see ``secondorder.solvers.STATUS_TEXT``), or "zero_gradient", "zero_lr",
            "non_finite" where there was nothing to solve.
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

    def __repr__(self) -> str:
        size = f"damping={self.damping:.3g}" if self.radius == math.inf else f"radius={self.radius:.3g}"
        return (
            f"StepReport(loss={self.loss:.6g} -> {self.new_loss:.6g}, accepted={self.accepted}, "
            f"rho={self.rho:.3g}, {size}, gradient_norm={self.gradient_norm:.3g}, "
            f"step_norm={self.step_norm:.3g}, status={self.status!r}, iterations={self.iterations}, "
            f"trials={self.trials}, curvature={self.curvature!r}, "
            f"gradient_equivalents={self.gradient_equivalents:.1f})"
        )


class SecondOrderOptimizer(torch.optim.Optimizer):
    """Base of the optimizers: one ``step`` for all of them."""

    report: StepReport | None = None
    # Kinds of the warnings given so far: each is given once.
    _warned: frozenset[str] = frozenset()

    @abstractmethod
    def _curvature(self, evaluation: Evaluation) -> tuple[LinearOperator, str]:
        """The operator of the model, and what it is."""

    @abstractmethod
    def _solve(self, model: QuadraticModel) -> Proposal:
        """Minimise the model, damped or within the radius."""

    @abstractmethod
    def _adapt(self, rho: float, step_norm: float) -> None:
        """Set damping or radius after a trial."""

    @staticmethod
    @abstractmethod
    def _check_options(options: dict[str, Any]) -> None:
        """Raise ValueError for an option of a parameter group that is out of range."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group with its own ``lr``, ``weight_decay`` and ``damping_scale``.

        The other options are those of the first group.

        Raises:
            ValueError: an option is out of range, or differs from that of the first group: there is
                one model for all parameters.
        """
        if self.param_groups:
            for name in self.defaults:
                joint = self.param_groups[0][name]
                if name not in OF_GROUPS and param_group.setdefault(name, joint) != joint:
                    raise ValueError(
                        f"{name} must be the same in all parameter groups (there is one model for all"
                        f" parameters), got {joint!r} and {param_group[name]!r}."
                    )
        options = {**self.defaults, **param_group}
        check_not_negative(options, "weight_decay")
        self._check_options(options)
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore; options that a checkpoint of an older version lacks get their defaults."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Tensor:  # type: ignore[override]
        """One step: the loss does not increase beyond rounding, and parameters are never NaN.

        Args:
            closure: Evaluates the model and returns the loss, with or without calling ``backward``; or
                returns ``(loss, outputs)``. The closure of ``torch.optim.LBFGS`` works as it is.

        Returns:
            The loss before the step.

        Raises:
            TypeError: ``closure`` is not callable or returns something else; a parameter is complex.
            ValueError: parameters differ in dtype or device.
            RuntimeError: the loss at the current parameters is not finite, not a scalar, or does not
                depend on the parameters. Parameters, gradients and random state are unchanged.
        """
        if not callable(closure):
            raise TypeError(
                f"{type(self).__name__}.step needs a closure that evaluates the model and returns the loss,"
                f" got {type(closure).__name__}; the closure of torch.optim.LBFGS works as it is."
            )
        parameters = self._parameters()
        evaluator = ClosureEvaluator(closure, parameters, -1 if self.param_groups[0]["maximize"] else 1)
        with evaluator.restored_on_error():
            evaluation = evaluator.record()
            with torch.enable_grad():
                operator, description = self._curvature(evaluation)
            self._check_returned(evaluation)
            counter = Counter(PRODUCT_COST[type(operator)])
            decay = WeightDecay.of(self.param_groups)
            model = _model(evaluation, operator, decay)
            operator, outcome = model.curvature, self._nothing_to_do(model)
            if outcome is None and self._is_direct(operator):
                operator = MatrixOperator(operator.dense(), is_symmetric=True)
                counter.add_products(operator.shape[0])
                if not bool(operator.dense().isfinite().all()):
                    outcome = _Outcome("non_finite")
            if outcome is None:
                outcome = self._search(model._replace(curvature=operator), evaluator, decay, counter)
        if outcome.taken is not None:
            for parameter, part in zip(parameters, unflatten(outcome.taken.step, parameters), strict=True):
                parameter.add_(part.to(parameter.dtype))
        self.report = self._report(model, outcome, counter, description)
        return evaluation.loss

    def _check_returned(self, evaluation: Evaluation) -> None:
        """Warn once when the loss that is judged is not the one that was differentiated."""
        # Both with the sign of what is minimised.
        differentiated = float(evaluation.objective.detach())
        difference = abs(evaluation.value - differentiated)
        if difference > MISMATCH * max(abs(evaluation.value), abs(differentiated)):
            self._warn_once(
                "mismatch",
                f"closure returned a loss of {evaluation.value:.6g} but called backward on"
                f" {differentiated:.6g}: steps are modelled on the one and judged by the other;"
                " return what backward was called on.",
            )

    def _nothing_to_do(self, model: QuadraticModel) -> _Outcome | None:
        if not bool(model.gradient.any()):
            return _Outcome("zero_gradient")
        if not any(float(group["lr"]) > 0 for group in self.param_groups):
            return _Outcome("zero_lr")
        return None

    def _search(
        self, model: QuadraticModel, evaluator: ClosureEvaluator, decay: WeightDecay, counter: Counter
    ) -> _Outcome:
        """Solve and try, with more damping after each failure, until a step is worth taking."""
        judge = Judge(model, evaluator, decay, counter)
        status = ""
        for _ in range(self.param_groups[0]["max_trials"]):
            proposal = self._solve(model)
            counter.trials += 1
            counter.iterations += proposal.result.iterations
            counter.add_products(proposal.result.products)
            status = proposal.result.status
            taken = judge.try_out(proposal, self._learning_rates(model.gradient))
            self._adapt(judge.rho, judge.step_norm)
            if taken is not None:
                return _Outcome(status, judge.rho, taken)
        return _Outcome(status, judge.rho)

    def _parameters(self) -> list[Tensor]:
        """All parameters that can move; one joint model over all groups."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        name = type(self).__name__
        if not parameters:
            raise RuntimeError(f"{name} has no parameter that requires gradients; unfreeze at least one.")
        first = parameters[0]
        for parameter in parameters:
            if parameter.is_complex():
                raise TypeError(
                    f"{name} needs real parameters, got {parameter.dtype}; use torch.view_as_real."
                )
            if parameter.dtype != first.dtype or parameter.device != first.device:
                raise ValueError(
                    f"{name} needs parameters of one dtype on one device, got {first.dtype} on {first.device}"
                    f" and {parameter.dtype} on {parameter.device}."
                )
        return parameters

    def _learning_rates(self, like: Tensor) -> float | Tensor:
        """The factor of the step: a number where all groups agree, else one for each entry."""
        return self._of_groups("lr", like)

    def _of_groups(self, name: str, like: Tensor) -> float | Tensor:
        """An option of the groups: a number where all agree, else one for each entry, shape (n,)."""
        values = {float(group[name]) for group in self.param_groups}
        if len(values) == 1:
            return values.pop()
        pairs = [(float(g[name]), p) for g in self.param_groups for p in g["params"] if p.requires_grad]
        return spread([value for value, _ in pairs], [p for _, p in pairs], like)

    def _report(
        self, model: QuadraticModel, outcome: _Outcome, counter: Counter, curvature: str
    ) -> StepReport:
        group, taken = self.param_groups[0], outcome.taken
        return StepReport(
            loss=model.value,
            new_loss=model.value if taken is None else taken.value,
            accepted=taken is not None,
            rho=outcome.rho,
            damping=group.get("damping", 0.0),
            radius=group.get("radius", math.inf),
            gradient_norm=float(model.gradient.norm()),
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
        blocks, description, is_whole = evaluation.coverage
        name, parameters = type(self).__name__, self._parameters()
        operator = GaussNewton.of_blocks(blocks, parameters) if blocks else None
        if operator is not None and description.startswith("explicit") and not operator.has_curvature():
            operator = None
            description = "the loss is linear in the outputs that were returned (log-probabilities?)"
        if operator is not None:
            if not is_whole:
                self._warn_or_raise(
                    f"{name} was given outputs that do not carry the whole loss: {description}.",
                    "The curvature of what enters past them is left out.",
                )
            return operator, f"gauss-newton ({description})"
        self._warn_or_raise(
            f"{name} found no Gauss-Newton matrix for the whole objective: {description}. Use the losses of"
            " torch.nn.functional, or let the closure return (loss, outputs), with outputs the tensor that a"
            " convex loss is computed from.",
            "The exact Hessian is used instead.",
        )
        return Hessian(evaluation.objective, parameters), f"hessian ({description})"

    def _warn_or_raise(self, text: str, consequence: str) -> None:
        """An error in strict mode, else a warning, once, that points at the line that called ``step``."""
        if self.param_groups[0]["strict"]:
            raise RuntimeError(text)
        self._warn_once("coverage", f"{text} {consequence}")

    def _warn_once(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned |= {kind}
            warnings.warn(text, stacklevel=_level_of_caller())

    @staticmethod
    def _undamped(result: SolveResult, damping: float | Tensor) -> SolveResult:
        """With the quadratic of ``B`` in place of that of ``B + damping``, a number or a diagonal."""
        return result._replace(quadratic=result.quadratic - float(result.x.dot(damping * result.x)))

    def _damping(self, like: Tensor) -> float | Tensor:
        """The present damping, times the scale of each group: a number, or a diagonal of shape (n,)."""
        damping: float = self.param_groups[0]["damping"]
        return damping * self._of_groups("damping_scale", like)

    def _set_in_all_groups(self, **values: float) -> None:
        for group in self.param_groups:
            group.update(values)


def _model(evaluation: Evaluation, curvature: LinearOperator, decay: WeightDecay) -> QuadraticModel:
    """The model of loss and weight decay, in at least single precision."""
    gradient, value = evaluation.gradient, evaluation.value
    if curvature.dtype != gradient.dtype:
        curvature = curvature.to(gradient.dtype)
    if decay:
        curvature = curvature + decay.diagonal(gradient)
        gradient, value = gradient + decay.gradient(gradient), value + decay.value()
    return QuadraticModel(value, gradient, curvature)


class _Outcome(NamedTuple):
    status: str
    rho: float = math.nan
    taken: Taken | None = None


def _level_of_caller() -> int:
    """The ``stacklevel`` of the first frame outside this library and torch, seen from the caller."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in ("optim", "torch"):
        level, frame = level + 1, frame.f_back
    return level
