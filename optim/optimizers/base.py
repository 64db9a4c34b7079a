"""The shared step: evaluate, model, solve, try, judge, commit.

A subclass says which curvature (``_curvature``), how to solve (``_solve``), how to adapt (``_adapt``) and
which options are allowed (``_check_options``); everything else is here.
"""

from __future__ import annotations

import contextlib
import math
import sys
import warnings
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from optim.closure.evaluate import ClosureEvaluator, Evaluation
from optim.closure.setting import moved
from optim.closure.source import Source
from optim.methods.control import ACCEPTANCE
from optim.methods.options import OF_GROUPS, check_flags, check_groups, check_joint, make_plain
from optim.optimizers import checks
from optim.optimizers.checkpoint import packed, unpack
from optim.optimizers.curvature import gauss_newton
from optim.optimizers.decay import WeightDecay, spread
from optim.optimizers.judge import FORWARD_COST, Counter, Judge, Proposal, QuadraticModel, Taken
from optim.optimizers.report import NOT_TRIED, StepReport
from optim.optimizers.scaling import scaled, unscaled
from secondorder import GaussNewton, Hessian, LinearOperator, MatrixOperator, SolveResult
from secondorder.autodiff.guard import surely
from secondorder.vectors.flat import is_finite

# Cost of a product on the kept graph, in gradients of a deep network.
PRODUCT_COST = {Hessian: 2.0, GaussNewton: 4 / 3}


class SecondOrderOptimizer(torch.optim.Optimizer):
    """Base of the optimizers: one ``step`` for all of them."""

    report: StepReport | None = None
    # Kinds of the warnings given so far: each is given once.
    _warned: frozenset[str] = frozenset()
    # Reasons for which a closure was run twice so far: each counts once.
    _repeated: frozenset[str] = frozenset()
    _model: nn.Module | None = None

    def __init__(self, params: ParamsT, defaults: dict[str, Any], model: nn.Module | None = None) -> None:
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
        # Before torch looks at the parameters, as its own optimizers do.
        self._check_options(defaults)
        check_flags(defaults)
        make_plain(defaults, list(defaults))
        super().__init__(params, defaults)
        self._watch(model)

    def _watch(self, model: nn.Module | None) -> None:
        """Record the calls of the model from now on, for steps without a closure."""
        self._model = model
        itself = weakref.ref(self)
        self._source = Source(type(self).__name__, model, lambda: _parameters_of(itself()))

    @abstractmethod
    def _curvature(self, evaluation: Evaluation) -> tuple[LinearOperator, str]:
        """The operator of the model, and what it is."""

    @abstractmethod
    def _solve(self, model: QuadraticModel) -> Proposal:
        """Minimise the model, damped or within the radius."""

    def _make_state(self) -> None:
        """Fill ``state`` as a first step does: distributed checkpoints take one on zero gradients for it."""

    @abstractmethod
    def _adapt(self, rho: float, step_norm: float) -> None:
        """Set damping or radius after a trial."""

    @staticmethod
    @abstractmethod
    def _check_options(options: dict[str, Any]) -> None:
        """Raise ValueError for an option of a parameter group that is out of range."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's."""
        super().zero_grad(set_to_none)
        # To be seen apart from a backward pass, which writes to .grad too.
        self._source.mark(_parameters_of(self))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group with its own ``lr``, ``weight_decay`` and ``damping_scale``.

        The other options are those of the first group.

        Raises:
            ValueError: an option is out of range, or differs from that of the first group: there is
                one model for all parameters.
        """
        if isinstance(param_group, dict):  # torch says so otherwise
            for name in self.defaults if self.param_groups else ():
                if name not in OF_GROUPS:
                    param_group.setdefault(name, self.param_groups[0][name])
                    check_joint(self.param_groups[0], name, param_group[name])
            self._check_options({**self.defaults, **param_group})
            make_plain(param_group, self.defaults)
        super().add_param_group(param_group)

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but state keeps its own precision, and what does not fit is refused.

        Raises:
            ValueError: ``state_dict`` is of another optimizer, or of a model of other shapes, or an option in
                it is out of range. Nothing was changed.
        """

        def fitted(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            ours = packed(given, type(self).__name__, self.defaults, self.param_groups)
            for group in ours["param_groups"]:
                self._check_options({**self.defaults, **group})
            return ours

        # After those of the user, which may make it fit.
        handle = self.register_load_state_dict_pre_hook(fitted)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and copy take: the model too, but not what it was seen to do."""
        return {**super().__getstate__(), "report": self.report, "_model": self._model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore; options that a checkpoint of an older version lacks get their defaults."""
        unpack(state["state"])
        super().__setstate__(state)
        # Torch adds it, but a step does not have it.
        self.defaults.pop("differentiable", None)
        if "_model" in state:
            self._watch(self._model)
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Tensor | None:  # type: ignore[override]
        """One step: the loss does not increase beyond rounding, and parameters are never NaN.

        Where ``.grad`` holds more than the gradient of the loss that is evaluated (micro-batches outside of
        the closure), a damped step is taken along it that is not tried, with a warning. The first step runs
        the closure once more, at the same parameters, and warns where its loss is another one.

        Args:
            closure: Evaluates the model and returns the loss, with or without calling ``backward``; or
                returns ``(loss, outputs)``. The closure of ``torch.optim.LBFGS`` works as it is. None where
                the optimizer was given ``model=`` and ``backward`` was called already.

        Returns:
            The loss before the step; None where there is neither a closure nor a gradient, and so no step.

        Raises:
            TypeError: ``closure`` is not callable or returns something else; a parameter is complex.
            ValueError: parameters differ in dtype or device, or an option of a group is out of range.
            RuntimeError: the loss at the current parameters is not finite, not a scalar, does not depend on
                the parameters, or does so by what was computed outside of the closure. Parameters, gradients,
                buffers and random state are unchanged.
        """
        check_groups(self.param_groups, self.defaults, self._check_options)
        parameters = self._parameters()
        self._warn_once("processes", checks.processes(type(self).__name__))
        if self._has_nothing(closure, parameters):
            self._make_state()
            return None
        sign = -1 if self.param_groups[0]["maximize"] else 1
        evaluator = self._source.evaluator(closure, parameters, sign)
        with evaluator.restored_on_error(), self._stepping():
            evaluation = evaluator.record()
            spent = self._check_evaluation(evaluator, evaluation)
            with evaluator.differentiating():
                with torch.enable_grad():
                    operator, description = self._curvature(evaluation)
                counter = Counter(PRODUCT_COST[type(operator)])
                counter.cost += spent
                decay = WeightDecay.of(self.param_groups)
                model = QuadraticModel.of(evaluation, operator, decay)
                outcome = self._nothing_to_do(model)
                if outcome is None:
                    judge = None if evaluation.partial else Judge(model, evaluator, decay, counter)
                    outcome = self._minimise(model, judge, counter)
            report = self._report(model, outcome, counter, description)
            taken = outcome.taken
            with contextlib.nullcontext() if taken is None else moved(parameters, taken.step):
                self._source.close(parameters)
        self.report = report
        return evaluation.loss

    def _has_nothing(self, closure: Callable[[], Any] | None, parameters: list[Tensor]) -> bool:
        """Neither a closure nor a gradient. One of zeros counts where it was computed and weights decay."""
        grads = [p.grad for p in parameters if p.grad is not None]
        if closure is not None or any(bool(grad.any()) for grad in grads):
            return False
        return not (grads and self._source.has_seen() and WeightDecay.of(self.param_groups))

    @contextlib.contextmanager
    def _stepping(self) -> Iterator[None]:
        """Calls of the model are not recorded; after an exception state and groups are what they were."""
        groups = [dict(group) for group in self.param_groups]
        state = {parameter: dict(values) for parameter, values in self.state.items()}

        def restore() -> None:
            for group, before in zip(self.param_groups, groups, strict=True):
                group.update(before)
            self.state.clear()
            self.state.update(state)

        try:
            with self._source.suspended():
                yield
        except BaseException:
            surely(restore)
            raise

    def _check_evaluation(self, evaluator: ClosureEvaluator, evaluation: Evaluation) -> float:
        """Warn once where the loss cannot judge steps along the gradient; what that cost, in gradients.

        In the first step, and where its graph looks old, the closure runs again for it.
        """
        if evaluation.partial:
            self._warn_once("partial", NOT_TRIED.format(type(self).__name__, evaluation.partial))
            return 0.0
        self._warn_once("mismatch", checks.mismatch(evaluation))
        reason = "old graph" if evaluator.is_suspect else "first step"
        again = None if reason in self._repeated else evaluator.repeated(evaluation.objective)
        if again is None:
            return 0.0
        self._repeated |= {"first step", reason}
        dtype = self._parameters()[0].dtype
        self._warn_once("repetition", checks.repetition(evaluation.value, again, dtype))
        return FORWARD_COST

    def _nothing_to_do(self, model: QuadraticModel) -> _Outcome | None:
        if not bool(model.gradient.any()):
            return _Outcome("zero_gradient")
        if not any(float(group["lr"]) > 0 for group in self.param_groups):
            return _Outcome("zero_lr")
        return None

    def _minimise(self, model: QuadraticModel, judge: Judge | None, counter: Counter) -> _Outcome:
        """Solve and try, with more damping after each failure, until a step is worth taking.

        Without a judge the first solution is taken.
        """
        if self._is_direct(model.curvature):
            dense = MatrixOperator(model.curvature.dense(), is_symmetric=True)
            counter.add_products(len(dense.dense()))
            if not bool(dense.dense().isfinite().all()):
                return _Outcome("non_finite")
            model = model._replace(curvature=dense)
        rate, scale = self._of_groups("lr", model.gradient), self._of_groups("damping_scale", model.gradient)
        in_scale = scaled(model, scale)
        outcome = _Outcome("")
        for _ in range(self.param_groups[0]["max_trials"]):
            proposal = self._solve(in_scale)
            step_norm = float(proposal.result.x.norm())
            holds_back = self._holds_back(proposal.result.quadratic, step_norm)
            proposal = unscaled(proposal, scale)
            counter.add(proposal.result)
            status = proposal.result.status
            if judge is None:
                step = rate * proposal.result.x
                return _Outcome(status, taken=Taken(step, math.nan) if is_finite(step) else None)
            outcome = _Outcome(status, taken=judge.try_out(proposal, rate), rho=judge.rho)
            self._adapt(judge.ratio_for_control(holds_back), step_norm)
            # A model that is right has nothing better to give to groups whose rates differ.
            is_right = isinstance(rate, Tensor) and judge.rho > ACCEPTANCE
            if outcome.taken is not None or is_right:
                break
            if judge.is_quiet:
                # Less than this step changes, the loss shows even less.
                return outcome._replace(status="noise_floor")
        return outcome

    def _holds_back(self, quadratic: float, step_norm: float) -> bool:
        """Whether damping limits a step more than the curvature does; a radius is asked by its own rule."""
        damping = self.param_groups[0].get("damping")
        return damping is None or damping * step_norm**2 >= quadratic

    def _parameters(self) -> list[Tensor]:
        """All parameters that can move; one joint model over all groups."""
        parameters = _parameters_of(self)
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
        """The Gauss-Newton matrix, or the Hessian: then an error in strict mode, else a warning, once."""
        choice = gauss_newton(evaluation, self._parameters())
        if choice.complaint:
            text = f"{type(self).__name__} {choice.complaint}"
            if self.param_groups[0]["strict"]:
                raise RuntimeError(text)
            self._warn_once("coverage", f"{text} {choice.consequence}")
        return choice.operator, choice.description

    def _warn_once(self, kind: str, text: str) -> None:
        """A warning that points at the line that called ``step``; none where there is no text."""
        if text and kind not in self._warned:
            self._warned |= {kind}
            warnings.warn(text, stacklevel=_level_of_caller())

    @staticmethod
    def _undamped(result: SolveResult, damping: float) -> SolveResult:
        """With the quadratic of ``B`` in place of that of ``B + damping``."""
        return result._replace(quadratic=result.quadratic - damping * float(result.x.dot(result.x)))

    def _set_in_all_groups(self, **values: float) -> None:
        for group in self.param_groups:
            group.update(values)


def _parameters_of(optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
    groups = [] if optimizer is None else optimizer.param_groups
    return [p for group in groups for p in group["params"] if p.requires_grad]


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
