"""Hessian-free optimization: the damped Gauss-Newton matrix by products, as an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from optim.closure.evaluate import Evaluation
from optim.methods.control import marquardt, martens
from optim.methods.options import (
    check_choice,
    check_fraction,
    check_optional,
    check_positive,
    check_shared,
    given,
    refuse,
)
from optim.methods.subspace import DAMPED
from optim.methods.truncated import truncated_gradients
from optim.optimizers.base import SecondOrderOptimizer
from optim.optimizers.curvature import Curvature, gauss_newton
from optim.optimizers.groups import moving
from optim.optimizers.kept import SOLUTION, Kept
from optim.optimizers.report import StepReport
from optim.optimizers.stepping import Method

SOLVERS = ("auto", "subspace", "cg")
# Relative residual that leaves little to gain, as measured. A tenth is too much where one stiff direction is
# most of the gradient, as through time in recurrent networks: nothing else was ever solved for.
RTOL = 0.01


class HessianFree(SecondOrderOptimizer):
    """Hessian-free optimization (Martens 2010) in a space in which another damping costs no product.

    A step grows a space by products with the Gauss-Newton matrix, preconditioned by the space of the last
    step, as far as that pays; damping, a shorter or a longer step are then decided by evaluations of the loss
    alone.

    Mini-batches are noticed where the loss is not the one that the last step left (``report.noisy``). Then a
    step is halved, more so on a smaller batch than the last ones; it must gain half of what its model
    promises; and the last step is tried on the new samples, for one evaluation, where it must have kept a
    tenth of its gain, or damping grows.

    Args:
        params: Parameters or parameter groups, as for every torch optimizer.
        lr: Multiplies the step; 1.0 is the full step. May differ between groups.
        damping: First damping, loss over parameter squared; adapts, and lives in the group. None takes it
            from the function: a tenth of the curvature along the gradient.
        solver: "subspace" is the above; "cg" Martens' own recipe: CG from the decayed last solution, stopped
            when the model no longer decreases, a choice among its iterates, a line search. "auto" is
            "subspace", or "cg" where ``memory`` is short.
        memory: Bytes that the space may take: six vectors of the parameters' size for each direction. Where
            that is no room for eight directions "auto" is "cg", and ``report.form`` says so.
        rtol: Relative residual to which a step solves its system. None: a space grows as long as another
            product pays.
        gain: Another product pays where it gains this part, or more, of what products gained on average. With
            mini-batches 0.3, where that is less.
        max_iter: Products allowed in one space, iterations in one solve by CG.
        progress: With "cg": it stops when the model decreased by less than this, relative, an iteration.
        decay: With "cg": factor of the last solution, from which it starts.
        max_trials: Dampings tried in one step.
        max_extension: Multiples of the step up to this one are tried, as long as the loss falls, where the
            model was right or too careful. 1.0 for none; there are none with mini-batches, nor with another
            ``lr`` than one, nor in a first step whose damping was given.
        strict: Raise, instead of falling back to the Hessian, where no Gauss-Newton matrix of the whole
            objective is found. Terms of parameters alone, as a lasso, are in it with their Hessian.
        weight_decay: Weight of ``norm(w)^2 / 2`` in the objective, loss over parameter squared: in value,
            gradient and curvature, not in ``.grad``. May differ between groups.
        damping_scale: Factor of the damping; may differ between groups.
        maximize: Maximise the closure's loss instead.
        model: The module that is trained, for steps without a closure: its calls are watched, and what
            ``backward`` was called on since the last step is computed again. Its parameters may be more, or
            fewer, than ``params``.
        history: Keep the reports of all steps in ``history``.
        callback: Called with the ``StepReport`` after each step.
        unsupported: Options of torch's other optimizers; an error, unless they are off.

    Attributes:
        report: What the last step did, a ``StepReport``; None before the first.
        history: With ``history=True`` a list of the reports; ``history.columns()`` is a dict of lists.

    Raises:
        TypeError: an option is unknown or, as ``fused``, not supported.
        ValueError: an option is out of range.

    Cost: one gradient, 5 to 15 products of 4/3 gradients each, a few evaluations of the loss.

    Reference: Martens (2010), Deep learning via Hessian-free optimization; Davidson (1975) for the space.

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
        damping: float | None = None,
        solver: str = "auto",
        memory: float = 2.0**32,
        rtol: float | None = None,
        gain: float = 1.0,
        max_iter: int = 250,
        progress: float = 5e-4,
        decay: float = 0.95,
        max_trials: int = 10,
        max_extension: float = 16.0,
        strict: bool = False,
        weight_decay: float = 0.0,
        damping_scale: float = 1.0,
        maximize: bool = False,
        model: nn.Module | None = None,
        history: bool = False,
        callback: Callable[[StepReport], Any] | None = None,
        **unsupported: Any,
    ) -> None:
        options = given(locals())
        refuse(type(self), unsupported)
        super().__init__(params, options)

    @staticmethod
    def _check_options(options: dict[str, Any]) -> None:
        check_shared(options)
        check_optional(options, "damping")
        check_positive(options, "progress")
        check_fraction(options, "decay")
        check_choice(options, "solver", SOLVERS)

    def _curvature(self, evaluation: Evaluation) -> Curvature:
        strict = self.param_groups[0]["strict"]
        return gauss_newton(evaluation, moving(self.param_groups), type(self).__name__, strict, self._notices)

    def _method(self) -> Method:
        groups = self.param_groups
        progress, decay, max_iter = (groups[0][name] for name in ("progress", "decay", "max_iter"))
        last = Kept(self.state, groups, moving(groups)).vector(SOLUTION)
        solver = truncated_gradients(progress, max_iter, None if last is None else decay * last)
        rule = martens if groups[0]["solver"] == "cg" else marquardt
        return Method("damping", DAMPED, rule, solver, RTOL, keeps_solution=True)
