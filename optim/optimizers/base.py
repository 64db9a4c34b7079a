"""The face of the optimizers: groups, state, checkpoints, reports around the one step of ``optim.methods``.

A subclass says which curvature (``_curvature``), how steps are bounded (``_method``) and which options are
allowed (``_check_options``).
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from secondorder.autodiff.guard import surely

from ..closure.evaluate import ClosureEvaluator, Evaluation
from ..closure.source import Source
from ..methods.options import OF_GROUPS, check_flags, check_groups, check_joint, make_plain
from .account import Clock, Cost, reported
from .checkpoint import packed, unpack
from .checks import Notices
from .curvature import Curvature
from .decay import WeightDecay
from .groups import Groups, joint, moving
from .kept import VALUES, Kept, column_scale
from .problem import ClosureProblem
from .progress import Progress, Reporting
from .report import StepReport
from .sampling import Sampler
from .stepping import Method, find_step, make_state

# Learned, in all groups: None before the first step.
LEARNED: dict[str, Any] = {"batch_noise": None, "gradient_norm": None, "usual_products": 0.0, VALUES: ()}


class SecondOrderOptimizer(Reporting):
    """Base of the optimizers: one ``step`` for all of them."""

    _model: nn.Module | None = None
    # Evaluates the loss of a part of the data, for its curvature.
    _part: Callable[[], Any] | None = None

    def __init__(self, params: ParamsT, options: dict[str, Any]) -> None:
        """``options``: those of groups, and ``model``, ``history`` and ``callback``."""
        defaults = {**options, **LEARNED}
        model, history, callback = (defaults.pop(name) for name in ("model", "history", "callback"))
        if callable(part := defaults.get("curvature_batch")):
            self._part, defaults["curvature_batch"] = part, None
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
        # Before torch looks at the parameters, as its own optimizers do.
        self._check_options(defaults)
        check_flags({**defaults, "history": history})
        make_plain(defaults, list(defaults))
        super().__init__(params, defaults)
        self._report_to(history, callback)
        self._watch(model)

    def _watch(self, model: nn.Module | None) -> None:
        """Record the calls of the model from now on, for steps without a closure."""
        self._model = model
        itself, name = weakref.ref(self), type(self).__name__
        self._source = Source(name, model, lambda: moving(getattr(itself(), "param_groups", ())))
        self._notices = Notices(name)

    @abstractmethod
    def _curvature(self, evaluation: Evaluation, sampler: Sampler) -> Curvature:
        """The operator of the model, of a part of the samples where that is asked for, and what it is."""

    @abstractmethod
    def _method(self) -> Method:
        """How steps are bounded, and how the bound follows."""

    @staticmethod
    @abstractmethod
    def _check_options(options: dict[str, Any]) -> None:
        """Raise ValueError for an option of a parameter group that is out of range."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's."""
        super().zero_grad(set_to_none)
        # To be seen apart from a backward pass, which writes to .grad too.
        self._source.mark(moving(self.param_groups))

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
        names = ("report", "history", "_progress", "_model", "_callback", "_part")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}}

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

    @overload  # type: ignore[override]
    def step(self, closure: Callable[[], Any]) -> Tensor: ...

    @overload
    def step(self, closure: None = None) -> Tensor | None: ...

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Tensor | None:
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
        if torch.is_inference_mode_enabled():
            name = type(self).__name__
            raise RuntimeError(
                f"{name} needs derivatives, which torch.inference_mode() takes away; leave it."
            )
        check_groups(self.param_groups, self.defaults, self._check_options)
        parameters = joint(self.param_groups, type(self).__name__)
        state = Kept(self.state, self.param_groups, parameters)
        if not _has_something(closure, self._source, self.param_groups, parameters):
            make_state(state, self.param_groups[0], self._method(), parameters)
            return None
        sign = -1 if self.param_groups[0]["maximize"] else 1
        evaluator = self._source.evaluator(closure, parameters, sign)
        with evaluator.restored_on_error(), _restored(self), self._source.suspended():
            loss, report, progress = self._step(evaluator, state, parameters)
        # No call that an interrupt could come in: the step is taken.
        self.report, self._progress = report, progress
        if self.history is not None:
            self.history.append(report)
        if self._callback is not None:
            self._callback(report)
        return loss

    def _step(
        self, evaluator: ClosureEvaluator, state: Kept, parameters: list[Tensor]
    ) -> tuple[Tensor, StepReport, Progress]:
        """Record, model, minimise, move."""
        clock = Clock()
        sampler = Sampler(evaluator, self.param_groups[0], self._part, parameters)
        evaluation = evaluator.record(sampler.calls)
        repeated = self._notices.check(evaluator, evaluation, parameters[0].dtype)
        with evaluator.differentiating():
            with torch.enable_grad():
                curvature = self._curvature(evaluation, sampler)
            operator, form = curvature.operator, curvature.form
            scale = None
            if self.param_groups[0].get("scaling") == "more":
                scale = functools.partial(column_scale, state, self.param_groups[0]["scale_steps"])
            problem = ClosureProblem(evaluator, evaluation, operator, self.param_groups, form, scale)
            clock.recorded()
            method = self._method()
            result = find_step(problem, self.param_groups, method, state, not evaluation.partial)
        if result.space is not None:
            state.learn(**sampler.learned(result.outcome.rho))
        cost = Cost(repeated, curvature.product, curvature.set_up)
        bounded = method.size, self.param_groups[0][method.size]
        report = reported(problem, result, bounded, curvature.description, cost, clock)
        progress = self._progress.after(report, torch.finfo(parameters[0].dtype).eps)
        self._notices.once("wasted", progress.wasted())
        problem.move(result.outcome.trial, then=lambda: self._source.close(parameters))
        return evaluation.loss, report, progress


def _has_something(
    closure: Callable[[], Any] | None, source: Source, groups: Groups, parameters: list[Tensor]
) -> bool:
    """A closure or a gradient. One of zeros counts where it was computed and weights decay."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if closure is not None or any(bool(grad.any()) for grad in grads):
        return True
    return bool(grads and source.has_seen() and WeightDecay.of(groups))


@contextlib.contextmanager
def _restored(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """After an exception state and groups are what they were."""
    groups = [dict(group) for group in optimizer.param_groups]
    state = {parameter: dict(values) for parameter, values in optimizer.state.items()}

    def restore() -> None:
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            group.update(before)
        optimizer.state.clear()
        optimizer.state.update(state)

    try:
        yield
    except BaseException:
        surely(restore)
        raise
