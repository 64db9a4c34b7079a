"""The Levenberg-Marquardt method on the generalised Gauss-Newton matrix, as an optimizer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from optim.methods import control
from optim.methods.options import (
    SOLVERS,
    check_choice,
    check_count,
    check_lr,
    check_not_negative,
    check_positive,
    refuse,
)
from optim.optimizers.base import Evaluation, SecondOrderOptimizer
from optim.optimizers.judge import Proposal, QuadraticModel
from secondorder import LinearOperator, MatrixOperator, cg, direct


class GaussNewton(SecondOrderOptimizer):
    """Gauss-Newton with Levenberg-Marquardt damping: every damped system is solved to ``rtol``.

    Args:
        params: Parameters or parameter groups, as for every torch optimizer.
        lr: Multiplies the step; 1.0 is the full step. May differ between groups.
        damping: First damping, loss over parameter squared; adapts, and lives in the group.
        solver: "direct" (dense matrix), "cg", or "auto": direct for float64 parameters, up to
            ``direct_limit`` of them; in lower precision small eigenvalues are rounding.
        direct_limit: Largest number of parameters for which "auto" forms the matrix.
        rtol: Relative residual at which CG stops.
        max_iter: Iterations of CG in one solve.
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

    Cost: one gradient and ``n`` products (direct) or up to ``max_iter`` products (cg), each 4/3 gradients.

    Reference: Nielsen (1999), Damping parameter in Marquardt's method; Schraudolph (2002).

    Example:
        >>> w = torch.zeros(2, requires_grad=True)
        >>> optimizer = GaussNewton([w], damping=1e-3)
        >>> t = torch.tensor([0.0, 1.0, 2.0])
        >>> def closure():
        ...     return torch.nn.functional.mse_loss(w[0] + w[1] * t, 1 + 2 * t)
        >>> for _ in range(5):
        ...     loss = optimizer.step(closure)
        >>> w.detach().round(decimals=3)
        tensor([1., 2.])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        *,
        damping: float = 1.0,
        solver: str = "auto",
        direct_limit: int = 1000,
        rtol: float = 1e-2,
        max_iter: int = 250,
        max_trials: int = 10,
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
            damping_growth=2.0,
            solver=solver,
            direct_limit=direct_limit,
            rtol=rtol,
            max_iter=max_iter,
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
        check_positive(options, "damping", "damping_growth", "damping_scale", "rtol")
        check_count(options, "direct_limit", "max_iter", "max_trials")
        check_choice(options, "solver", SOLVERS)

    def _curvature(self, evaluation: Evaluation) -> tuple[LinearOperator, str]:
        return self._gauss_newton(evaluation)

    def _solve(self, model: QuadraticModel) -> Proposal:
        group = self.param_groups[0]
        damping = group["damping"]
        if isinstance(model.curvature, MatrixOperator):
            return Proposal(direct(model.curvature.spectrum, -model.gradient, damping=damping))
        result = cg(
            model.curvature + damping, -model.gradient, rtol=group["rtol"], max_iter=group["max_iter"]
        )
        return Proposal(self._undamped(result, damping), line_search=True)

    def _adapt(self, rho: float, step_norm: float) -> None:
        group = self.param_groups[0]
        damping, growth = control.nielsen_damping(group["damping"], group["damping_growth"], rho)
        self._set_in_all_groups(damping=damping, damping_growth=growth)
