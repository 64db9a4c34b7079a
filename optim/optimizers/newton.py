"""Newton's method, in a trust region or with a cubic term, as a ``torch.optim.Optimizer``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT
from typing_extensions import Never

from ..closure.evaluate import Evaluation
from ..methods.control import cubic, trust_radius
from ..methods.options import (
    check_choice,
    check_count,
    check_optional,
    check_shared,
    check_unused,
    given,
    refuse,
)
from ..methods.subspace import CUBIC, SADDLE_FREE, WITHIN
from ..methods.truncated import in_radius
from .base import SecondOrderOptimizer
from .curvature import Curvature, hessian
from .groups import moving
from .report import StepReport
from .sampling import Sampler
from .stepping import Method

SOLVERS = ("auto", "subspace", "direct", "cg")
BALLS = {"trust-region": WITHIN, "saddle-free": SADDLE_FREE}
BOUNDS = (*BALLS, "cubic")
# Relative residuals that leave little to gain: of a space, as measured, and of CG.
RTOL, CG_RTOL = 1e-2, 1e-2


class Newton(SecondOrderOptimizer):
    """Newton's method: the exact Hessian, in a trust region or with a cubic term.

    Indefinite Hessians are no problem: the step minimises the quadratic model inside a ball, exactly where
    the matrix is formed, else in a space that grows by products from the gradient, in which another radius
    costs none. Where the curvature is negative the minimiser of the model with ``abs(B)`` (Dauphin et al.
    2014) is tried too, and the better one taken. ``bound`` names other ways to keep a step short. A direction
    that the gradient does not see, near a saddle that is symmetric, only a matrix that is formed shows
    (``solver="direct"``); where the gradient vanishes there is no step.

    Mini-batches are noticed where the loss is not the one that the last step left (``report.noisy``). Then a
    step is halved, more so on a smaller batch than the last ones; it must gain half of what its model
    promises; and the last step is tried on the new samples, for one evaluation, where it must have kept a
    tenth of its gain, or radius shrinks.

    Args:
        params: Parameters or parameter groups, as for every torch optimizer.
        lr: Multiplies the step; 1.0 is the full Newton step. May differ between groups.
        bound: What keeps a step ``p`` short: "trust-region", as above; "cubic", a term ``cubic_weight *
            norm(p)^3 / 3`` in the model, of which the step is the exact minimiser too; or "saddle-free", the
            ball, with the minimiser of the model with ``abs(B)`` as the only candidate.
        radius: First trust radius, in units of the parameters; adapts, and lives in the group. None takes
            it from the function: the length of the first Newton step along the gradient.
        cubic_weight: With "cubic", the first weight, loss over parameter cubed; adapts, and lives in the
            group. None takes it from the function: a tenth of that which halves the first Newton step along
            the gradient.
        solver: "subspace" grows a space by products; "direct" forms the Hessian; "cg" is Steihaug's, three
            vectors, for the bound "trust-region" alone. "auto" is "subspace", or "direct" for float64
            parameters, up to ``direct_limit``, where their columns cost less than the space has been costing;
            see ``report.form``.
        direct_limit: Largest number of parameters for which "auto" forms the Hessian.
        memory: Bytes that the space may take: six vectors of the parameters' size for each direction. Where
            that is no room for eight directions "auto" is "cg", for "trust-region", and ``report.form`` says
            so.
        rtol: Relative residual to which a step solves its system. None: a space grows as long as another
            product pays (CG: to 1e-2).
        gain: Another product pays where it gains this part, or more, of what products gained on average. With
            mini-batches 0.3, where that is less.
        max_iter: Products allowed in one space, iterations in one solve by CG.
        max_trials: Radii, or weights, tried in one step.
        max_extension: Multiples of the step up to this one are tried, as long as the loss falls, where the
            model was right or too careful. 1.0 for none; there are none with mini-batches, nor with another
            ``lr`` than one, nor in a first step whose radius or weight was given.
        weight_decay: Weight of ``norm(w)^2 / 2`` in the objective, loss over parameter squared: in value,
            gradient and curvature, not in ``.grad``. May differ between groups.
        damping_scale: A step is measured by ``sqrt(sum_i damping_scale_i p_i^2)``: where it is large, entries
            move less. May differ between groups.
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

    Cost: one gradient, 5 to 30 products of 2 gradients each, a few evaluations of the loss.

    Reference: Conn, Gould and Toint (2000), Trust-region methods; Steihaug (1983); Cartis, Gould and Toint
    (2011), Adaptive cubic regularisation methods for unconstrained optimization.

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
        bound: str = "trust-region",
        radius: float | None = None,
        cubic_weight: float | None = None,
        solver: str = "auto",
        direct_limit: int = 1000,
        memory: float = 2.0**32,
        rtol: float | None = None,
        gain: float = 1.0,
        max_iter: int = 250,
        max_trials: int = 10,
        max_extension: float = 16.0,
        weight_decay: float = 0.0,
        damping_scale: float = 1.0,
        maximize: bool = False,
        model: nn.Module | None = None,
        history: bool = False,
        callback: Callable[[StepReport], Any] | None = None,
        **unsupported: Never,
    ) -> None:
        options = given(locals())
        refuse(type(self), unsupported)
        super().__init__(params, options)

    @staticmethod
    def _check_options(options: dict[str, Any]) -> None:
        check_shared(options)
        check_choice(options, "bound", BOUNDS)
        check_optional(options, "radius", "cubic_weight")
        unused = "radius" if options["bound"] == "cubic" else "cubic_weight"
        check_unused(options, unused, "bound")
        check_count(options, "direct_limit")
        check_choice(options, "solver", SOLVERS)
        if options["solver"] == "cg" and options["bound"] != "trust-region":
            raise ValueError(
                f"solver must not be 'cg' with bound={options['bound']!r}, which needs the eigenvectors of a"
                " space; use 'auto', 'subspace' or 'direct'."
            )

    def _curvature(self, evaluation: Evaluation, _: Sampler) -> Curvature:
        return hessian(evaluation, moving(self.param_groups))

    def _method(self) -> Method:
        group = self.param_groups[0]
        if group["bound"] == "cubic":
            return Method("cubic_weight", CUBIC, cubic, None, RTOL)
        solver = in_radius(group["rtol"] or CG_RTOL, group["max_iter"])
        is_default = group["bound"] == "trust-region"
        return Method("radius", BALLS[group["bound"]], trust_radius, solver if is_default else None, RTOL)
