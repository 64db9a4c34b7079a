"""Newton's method with a trust region, as a ``torch.optim.Optimizer``."""

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
from secondorder import Hessian, LinearOperator, MatrixOperator, steihaug, trust_region


class Newton(SecondOrderOptimizer):
    """Newton's method: the exact Hessian, in a trust region.

    Indefinite Hessians are no problem: the step minimises the quadratic model inside a ball, exactly
    (from an eigendecomposition) or by truncated CG.

    Args:
        params: Parameters or parameter groups, as for every torch optimizer.
        lr: Multiplies the step; 1.0 is the full Newton step. May differ between groups.
        radius: First trust radius, in units of the parameters; adapts, and lives in the group.
        solver: "direct" (dense Hessian), "cg" (Steihaug), or "auto": direct for float64 parameters, up
            to ``direct_limit`` of them; in lower precision small eigenvalues are rounding.
        direct_limit: Largest number of parameters for which "auto" forms the Hessian.
        rtol: Relative residual at which CG stops.
        max_iter: Iterations of CG in one solve.
        max_trials: Solves in one step, each with a smaller radius than the last.
        weight_decay: Weight of ``norm(w)^2 / 2`` in the objective, loss over parameter squared: in value,
            gradient and curvature, not in ``.grad``. May differ between groups.
        damping_scale: A step is measured by ``sqrt(sum_i damping_scale_i p_i^2)``: where it is large, entries
            move less. May differ between groups.
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

    Cost: one gradient and ``n`` products (direct) or up to ``max_iter`` products (cg), each 2 gradients.

    Reference: Conn, Gould and Toint (2000), Trust-region methods; Steihaug (1983).

    Example:
        >>> x = torch.tensor([-1.2, 1.0], dtype=torch.float64, requires_grad=True)
        >>> optimizer = Newton([x])
        >>> def closure():
        ...     return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
        >>> for _ in range(30):
        ...     loss = optimizer.step(closure)
        >>> x.detach().round(decimals=6)
        tensor([1., 1.], dtype=torch.float64)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        *,
        radius: float = 1.0,
        solver: str = "auto",
        direct_limit: int = 1000,
        rtol: float = 1e-2,
        max_iter: int = 250,
        max_trials: int = 10,
        weight_decay: float = 0.0,
        damping_scale: float = 1.0,
        maximize: bool = False,
        model: nn.Module | None = None,
        **unsupported: Any,
    ) -> None:
        refuse(type(self), unsupported)
        defaults: dict[str, Any] = dict(
            lr=lr,
            radius=radius,
            solver=solver,
            direct_limit=direct_limit,
            rtol=rtol,
            max_iter=max_iter,
            max_trials=max_trials,
            weight_decay=weight_decay,
            damping_scale=damping_scale,
            maximize=maximize,
        )
        super().__init__(params, defaults, model)

    @staticmethod
    def _check_options(options: dict[str, Any]) -> None:
        check_lr(options)
        check_not_negative(options, "weight_decay")
        check_positive(options, "radius", "damping_scale", "rtol")
        check_count(options, "direct_limit", "max_iter", "max_trials")
        check_choice(options, "solver", SOLVERS)

    def _curvature(self, evaluation: Evaluation) -> tuple[LinearOperator, str]:
        return Hessian(evaluation.objective, self._parameters()), "hessian"

    def _solve(self, model: QuadraticModel) -> Proposal:
        group = self.param_groups[0]
        radius = group["radius"]
        if isinstance(model.curvature, MatrixOperator):
            return Proposal(trust_region(model.curvature.spectrum, -model.gradient, radius))
        result = steihaug(
            model.curvature, -model.gradient, radius, rtol=group["rtol"], max_iter=group["max_iter"]
        )
        return Proposal(result, line_search=True)

    def _adapt(self, rho: float, step_norm: float) -> None:
        self._set_in_all_groups(radius=control.trust_radius(self.param_groups[0]["radius"], rho, step_norm))
