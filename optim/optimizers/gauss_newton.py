"""The Levenberg-Marquardt method on the generalised Gauss-Newton matrix, as an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT
from typing_extensions import Never

from ..closure.evaluate import Evaluation
from ..methods.control import Nielsen, marquardt
from ..methods.options import (
    check_choice,
    check_count,
    check_fraction,
    check_optional,
    check_positive,
    check_shared,
    given,
    refuse,
)
from ..methods.subspace import DAMPED
from ..methods.truncated import conjugate_gradients
from .base import SecondOrderOptimizer
from .curvature import Curvature, gauss_newton
from .groups import moving
from .report import StepReport
from .sampling import LEARNED, Sampler, check_curvature_batch, refuse_closure
from .stepping import Method, prefers_residuals

SOLVERS = ("auto", "subspace", "direct", "cg")
# Relative residuals that leave little to gain: of a space, as measured, and of CG.
RTOL, CG_RTOL = 0.03, 1e-2
RULES = ("marquardt", "nielsen")
SCALINGS = ("identity", "more")


class GaussNewton(SecondOrderOptimizer):
    """Gauss-Newton with Levenberg-Marquardt damping.

    The step of ``HessianFree`` with systems that are solved further, for residuals that go to zero: fits, and
    physics-informed networks. The matrix of a small model in double precision is formed where that is
    cheaper.

    Mini-batches are noticed where the loss is not the one that the last step left (``report.noisy``), as by
    ``HessianFree``.

    Args:
        params: Parameters or parameter groups, as for every torch optimizer.
        lr: Multiplies the step; 1.0 is the full step. May differ between groups.
        damping: First damping, loss over parameter squared; adapts, and lives in the group. None takes it
            from the function: a tenth of the curvature along the gradient.
        rule: How damping adapts: "marquardt", by factors of 4, or "nielsen", smoothly.
        solver: "subspace" grows a space by products, in which another damping costs none; "direct" decomposes
            the Jacobian of the residuals, or forms the matrix where the loss shows none; "cg" solves each
            damped system by CG, three vectors. "auto" is "direct" where the residuals are worth less products
            than the space has been costing, or where the columns of the matrix of a model in float64, up to
            ``direct_limit``, are; else "subspace". See ``report.form``.
        direct_limit: Largest number of parameters for which "auto" forms the matrix.
        memory: Bytes that the space may take: six vectors of the parameters' size for each direction, or
            three times the Jacobian of the residuals, or its Gram matrix. Where that is no room for eight
            directions "auto" is "cg", and ``report.form`` says so.
        rtol: Relative residual to which a step solves its system. None: a space grows as long as another
            product pays (CG: to 1e-2).
        gain: Another product pays where it gains this part, or more, of what products gained on average. With
            mini-batches 0.3, where that is less.
        max_iter: Products allowed in one space, iterations in one solve by CG.
        max_trials: Dampings tried in one step.
        max_extension: Multiples of the step up to this one are tried, as long as the loss falls, where the
            model was right or too careful. 1.0 for none; there are none with mini-batches, nor with another
            ``lr`` than one, nor in a first step whose damping was given.
        acceleration: Bend steps in the space of residuals by the second derivative of these, where the loss
            is a sum of their squares: one evaluation each. Where that would be too large a part of a step it
            is left out.
        scaling: Of the variables: "identity", or "more", by the largest norm that each column of the Jacobian
            of the residuals had, for variables of different units, as in fits of curves. Without
            ``weight_decay``.
        spring: Damp steps towards this part of the last one, in place of zero: for fresh, few samples in each
            step, as the points of a physics-informed network. 0.9 to 0.99 as published. It is in the space of
            residuals.
        curvature_batch: The samples whose curvature a step uses; its gradient and its trials are of all. They
            are drawn anew in each step, as likely as their losses are curved, and weighted so that they stand
            for all. A number of samples, a fraction (1.0 and None: all), or a closure that returns the loss
            of a part of the data. "auto" starts with a sixteenth, at least 64, and doubles it after each step
            whose ``rho`` is at most 1/4; of fewer than 256 samples it is all. Samples are the rows of what
            one module makes in the closure; it is called again on some of them. Where their outputs are not
            the same then, as with BatchNorm in training or with dropout, or the loss is not of one module's
            outputs, it is all of them, and ``report.curvature`` says why.
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
        ValueError: an option is out of range, or ``scaling`` or ``spring`` do not fit ``solver``.

    Cost: one gradient, 10 to 30 products of 4/3 gradients each, times the part of the samples, a few
    evaluations of the loss; in the space of residuals a backward pass for each output of a sample, and the
    algebra of a matrix of as many rows as there are residuals, or parameters.

    Reference: Marquardt (1963); Nielsen (1999), Damping parameter in Marquardt's method; Schraudolph (2002).
    In the space of residuals: Transtrum and Sethna (2012), Improvements to the Levenberg-Marquardt algorithm,
    for acceleration; Moré (1978) for scaling; Goldshlager, Abrahamsen and Lin (2024), A Kaczmarz-inspired
    approach to accelerate the optimization of neural network wavefunctions, for ``spring``.

    Example:
        >>> w = torch.zeros(2, requires_grad=True)
        >>> optimizer = GaussNewton([w])
        >>> t = torch.tensor([0.0, 1.0, 2.0])
        >>> def closure():
        ...     return torch.nn.functional.mse_loss(w[0] + w[1] * t, 1 + 2 * t)
        >>> for _ in range(10):
        ...     loss = optimizer.step(closure)
        >>> w.detach().round(decimals=3)
        tensor([1., 2.])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        *,
        damping: float | None = None,
        rule: str = "marquardt",
        solver: str = "auto",
        direct_limit: int = 1000,
        memory: float = 2.0**32,
        rtol: float | None = None,
        gain: float = 0.3,
        max_iter: int = 250,
        acceleration: bool = True,
        scaling: str = "identity",
        spring: float = 0.0,
        max_trials: int = 10,
        max_extension: float = 16.0,
        curvature_batch: str | float | Callable[[], Any] | None = "auto",
        strict: bool = False,
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
        learned = {**LEARNED, "damping_growth": 2.0, "residual_cost": None, "scale_steps": 0}
        super().__init__(params, {**options, **learned})
        refuse_closure(self._part, spring=spring, scaling=scaling != "identity")

    @staticmethod
    def _check_options(options: dict[str, Any]) -> None:
        check_shared(options)
        check_optional(options, "damping")
        check_curvature_batch(options)
        check_positive(options, "damping_growth")
        check_count(options, "direct_limit")
        check_choice(options, "rule", RULES)
        check_choice(options, "solver", SOLVERS)
        check_choice(options, "scaling", SCALINGS)
        check_fraction(options, "spring")
        for name, off in (("scaling", "identity"), ("spring", 0.0)):
            if options[name] != off and options["solver"] not in ("auto", "direct"):
                raise ValueError(
                    f"{name}={options[name]!r} needs the space of residuals, got"
                    f' solver={options["solver"]!r}; use solver="auto".'
                )
            if options[name] != off and options["curvature_batch"] not in ("auto", None):
                raise ValueError(
                    f"{name}={options[name]!r} needs all residuals, got"
                    f" curvature_batch={options['curvature_batch']!r}; leave it out."
                )
        if options["scaling"] != "identity" and float(options["weight_decay"]) > 0:
            raise ValueError(
                f"scaling={options['scaling']!r} takes no weight_decay, got {options['weight_decay']}; add"
                " the penalty to the loss."
            )

    def _curvature(self, evaluation: Evaluation, sampler: Sampler) -> Curvature:
        strict = self.param_groups[0]["strict"]
        parameters, name = moving(self.param_groups), type(self).__name__
        if prefers_residuals(evaluation, self.param_groups, self._method()):
            sampler.take_all()
        return gauss_newton(evaluation, parameters, name, strict, self._notices, sampler)

    def _method(self) -> Method:
        group = self.param_groups[0]
        rule = Nielsen(group["damping_growth"]) if group["rule"] == "nielsen" else marquardt
        solver = conjugate_gradients(group["rtol"] or CG_RTOL, group["max_iter"])
        return Method("damping", DAMPED, rule, solver, RTOL, by_residuals=True)
