"""Hessian-free optimization: truncated CG on the damped Gauss-Newton matrix, as an optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from optim.methods import control
from optim.methods.options import (
    check_count,
    check_fraction,
    check_lr,
    check_not_negative,
    check_positive,
    refuse,
)
from optim.optimizers.base import Evaluation, SecondOrderOptimizer
from optim.optimizers.judge import Proposal, QuadraticModel
from secondorder import LinearOperator, cg
from secondorder.solvers import RelativeProgress
from secondorder.vectors.flat import flatten, is_finite, unflatten

# Below this relative residual CG has nothing left to gain (Martens' code).
RTOL = 1e-10


class HessianFree(SecondOrderOptimizer):
    """Hessian-free optimization (Martens 2010).

    CG on the damped Gauss-Newton matrix, started from the decayed last solution, stopped when the model
    no longer decreases; then a choice among its iterates and a line search on the loss.

    Args:
        params: Parameters or parameter groups, as for every torch optimizer.
        lr: Multiplies the step; 1.0 is the full step. May differ between groups.
        damping: First damping, loss over parameter squared; adapts, and lives in the group.
        max_iter: Iterations of CG in one solve.
        progress: CG stops when the model decreased by less than this, relative, an iteration.
        decay: Factor of the last solution from which CG starts.
        max_trials: Solves in one step, each with more damping than the last.
        strict: Raise, instead of falling back to the Hessian, where no Gauss-Newton matrix of the whole
            objective is found. Terms of parameters alone, as a lasso, are in it with their Hessian.
        weight_decay: Weight of ``norm(w)^2 / 2`` in the objective, loss over parameter squared: in value,
            gradient and curvature, not in ``.grad``. May differ between groups.
        damping_scale: Factor of the damping; may differ between groups.
        maximize: Maximise the closure's loss instead.
        model: The module that is trained, for steps without a closure: its calls are watched, and what
            ``backward`` was called on since the last step is computed again. Its parameters may be more, or
            fewer, than ``params``.
        unsupported: Options of torch's other optimizers; an error, unless they are off.

    Attributes:
        report: What the last step did, a ``StepReport``; None before the first.

    Raises:
        TypeError: an option is unknown or, as ``fused``, not supported.
        ValueError: an option is out of range.

    Cost: one gradient and up to ``max_iter`` products of 4/3 gradients; a few evaluations of the loss.

    Reference: Martens (2010), Deep learning via Hessian-free optimization.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> inputs = torch.randn(20, 2)
        >>> targets = inputs @ torch.tensor([[1.0], [2.0]]) - 3
        >>> optimizer = HessianFree(model.parameters())
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = torch.nn.functional.mse_loss(model(inputs), targets)
        ...     loss.backward()
        ...     return loss
        >>> for _ in range(30):
        ...     loss = optimizer.step(closure)
        >>> bool(loss < 1e-6)
        True
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        *,
        damping: float = 1.0,
        max_iter: int = 250,
        progress: float = 5e-4,
        decay: float = 0.95,
        max_trials: int = 5,
        strict: bool = False,
        weight_decay: float = 0.0,
        damping_scale: float = 1.0,
        maximize: bool = False,
        model: nn.Module | None = None,
        **unsupported: Any,
    ) -> None:
        refuse(type(self), unsupported)
        defaults: dict[str, Any] = dict(
            lr=lr,
            damping=damping,
            max_iter=max_iter,
            progress=progress,
            decay=decay,
            max_trials=max_trials,
            strict=strict,
            weight_decay=weight_decay,
            damping_scale=damping_scale,
            maximize=maximize,
        )
        super().__init__(params, defaults, model)

    @staticmethod
    def _check_options(options: dict[str, Any]) -> None:
        check_lr(options)
        check_not_negative(options, "weight_decay")
        check_positive(options, "damping", "damping_scale", "progress")
        check_count(options, "max_iter", "max_trials")
        check_fraction(options, "decay")

    def _curvature(self, evaluation: Evaluation) -> tuple[LinearOperator, str]:
        return self._gauss_newton(evaluation)

    def _solve(self, model: QuadraticModel) -> Proposal:
        group = self.param_groups[0]
        damping = group["damping"]
        stop = RelativeProgress(group["progress"])
        result = cg(
            model.curvature + damping,
            -model.gradient,
            x0=self._warm_start(group["decay"]),
            rtol=RTOL,
            max_iter=group["max_iter"],
            callback=stop,
        )
        self._keep(result.x)
        earlier = tuple(x for x in stop.kept if x is not result.x)
        return Proposal(self._undamped(result, damping), earlier, line_search=True)

    def _make_state(self) -> None:
        parameters = self._parameters()
        if any(p.grad is not None for p in parameters) and not any(self.state.get(p) for p in parameters):
            dtype = torch.promote_types(parameters[0].dtype, torch.float32)
            self._keep(parameters[0].new_zeros(sum(p.numel() for p in parameters), dtype=dtype))

    def _adapt(self, rho: float, step_norm: float) -> None:
        damping = control.levenberg_marquardt_damping(self.param_groups[0]["damping"], rho)
        self._set_in_all_groups(damping=damping)

    def _warm_start(self, decay: float) -> Tensor | None:
        parameters = self._parameters()
        # Not state[p], which would make an entry.
        states = [self.state.get(p, {}) for p in parameters]
        if not any("cg_solution" in state for state in states):
            return None
        pairs = zip(states, parameters, strict=True)
        parts = [state.get("cg_solution", torch.zeros_like(p)) for state, p in pairs]
        return decay * flatten([part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts])

    def _keep(self, x: Tensor) -> None:
        if not is_finite(x):
            x = torch.zeros_like(x)
        for parameter, part in zip(self._parameters(), unflatten(x, self._parameters()), strict=True):
            self.state[parameter]["cg_solution"] = part.clone()
