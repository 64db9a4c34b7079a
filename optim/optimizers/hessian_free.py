"""Hessian-free optimization: a damped curvature matrix by products, as an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT
from typing_extensions import Never

from ..closure.evaluate import Evaluation
from ..closure.hidden import HiddenStates
from ..methods.control import marquardt, martens
from ..methods.options import (
    check_choice,
    check_count,
    check_fraction,
    check_not_negative,
    check_optional,
    check_positive,
    check_shared,
    given,
    refuse,
)
from ..methods.subspace import DAMPED
from ..methods.truncated import truncated_gradients
from .base import SecondOrderOptimizer
from .curvature import Curvature, Structured, fisher, gauss_newton, hessian, with_states
from .groups import moving
from .kept import SKETCH_VALUES, SOLUTION, Kept
from .report import StepReport
from .sampling import LEARNED, Sampler, check_curvature_batch, refuse_closure
from .stepping import Method

SOLVERS = ("auto", "subspace", "cg")
CURVATURES = {"gauss-newton": gauss_newton, "fisher": fisher}
PRECONDITIONERS = ("none", "nystrom")
# Relative residual that leaves little to gain, as measured. A tenth is too much where one stiff direction is
# most of the gradient, as through time in recurrent networks: nothing else was ever solved for.
RTOL = 0.01


class HessianFree(SecondOrderOptimizer):
    """Hessian-free optimization (Martens 2010) in a space in which another damping costs no product.

    A step grows a space by products with the Gauss-Newton matrix, preconditioned by the space of the last
    step, as far as that pays; evaluations of the loss alone then decide damping and length.

    Mini-batches are noticed where the loss is not the one that the last step left (``report.noisy``). Then a
    step is halved, more so on a smaller batch than the last ones; it must gain half of what its model
    promises; and the last step is tried on the new samples, for one evaluation, where it must have kept a
    tenth of its gain, or damping grows.

    Args:
        params: Parameters or parameter groups, as for every torch optimizer.
        lr: Multiplies the step; 1.0 is the full step. May differ between groups.
        damping: First damping, loss over parameter squared; adapts, and lives in the group. None takes it
            from the function: a tenth of the curvature along the gradient.
        curvature: "gauss-newton"; "fisher", for losses that are likelihoods (softmax, logistic, Gaussian and
            Poisson outputs): the exact Fisher matrix, which equals the Gauss-Newton matrix there, and a
            warning, or with ``strict`` an error, for others; or "hessian", with steps that go downhill along
            negative curvature too.
        structural_damping: Weight of the mean squared change of hidden states, beside the squared length of a
            step, in what damping multiplies, parameter squared over state squared: for recurrent networks,
            whose states a short step can throw far. It follows the damping from step to step; inside one it
            keeps that of its start; in the first it waits for one.
        structural: Modules whose outputs are these states; None for every ``nn.RNN``, ``nn.LSTM``, ``nn.GRU``
            and cell of theirs that the closure calls.
        solver: "subspace" is the above; "cg" Martens' own recipe: CG from the decayed last solution, stopped
            when the model no longer decreases, a choice among its iterates, a line search. "auto" is
            "subspace", or "cg" where ``memory`` is short.
        memory: Bytes of the space, six vectors of parameters a direction; without room for 8, "auto" is "cg".
        rtol: Relative residual to which a step solves its system. None: a space grows as long as another
            product pays.
        gain: Another product pays where it gains this part, or more, of what products gained on average. With
            mini-batches 0.3, where that is less.
        max_iter: Products in one space, iterations of one solve by CG.
        progress: With "cg": it stops when the model decreased by less than this, relative, an iteration.
        decay: With "cg": factor of the last solution, from which it starts.
        preconditioner: With "cg": "none", or "nystrom", that knows the largest eigenvalues from a sketch: for
            curvatures of which few are large (Frangella, Tropp and Udell 2023).
        preconditioner_rank: Products that a sketch takes, and vectors that it keeps.
        preconditioner_steps: Steps that a sketch is used in; another damping costs it no product.
        max_trials: Dampings tried in one step.
        max_extension: Multiples of the step up to this one are tried, as long as the loss falls, where the
            model was right or too careful. 1.0 for none; there are none with mini-batches, nor with another
            ``lr`` than one, nor in a first step whose damping was given.
        curvature_batch: The samples whose curvature a step uses; its gradient and its trials are of all. They
            are drawn anew in each step, as likely as their losses are curved, and weighted so that they stand
            for all. A number of samples, a fraction (1.0 and None: all), or a closure that returns the loss
            of a part of the data. "auto" starts with a sixteenth, at least 64, and doubles it after each step
            whose ``rho`` is at most 1/4; of fewer than 256 samples it is all. Samples are the rows of what
            one module makes in the closure; it is called again on some of them. Where that changes them
            (BatchNorm in training, dropout), or the loss is not of one module's outputs, it is all of them;
            ``report.curvature`` says why.
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
        ValueError: an option is out of range, or has no use with another.

    Cost: one gradient, 5 to 15 products of 4/3 times the part of the samples, a few evaluations.

    Reference: Martens (2010), Deep learning via Hessian-free optimization; Davidson (1975) for the space;
    Martens and Sutskever (2011), section 3.2, for structural damping.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> inputs = torch.randn(20, 2)
        >>> targets = inputs @ torch.tensor([[1.0], [2.0]]) - 3
        >>> optimizer = HessianFree(model.parameters())
        >>> closure = lambda: torch.nn.functional.mse_loss(model(inputs), targets)
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
        curvature: str = "gauss-newton",
        structural_damping: float = 0.0,
        structural: Sequence[nn.Module] | None = None,
        solver: str = "auto",
        memory: float = 2.0**32,
        rtol: float | None = None,
        gain: float = 1.0,
        max_iter: int = 250,
        progress: float = 5e-4,
        decay: float = 0.95,
        preconditioner: str = "none",
        preconditioner_rank: int = 20,
        preconditioner_steps: int = 20,
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
        self._hidden = HiddenStates(options.pop("structural") or ())
        super().__init__(params, {**options, **LEARNED, SKETCH_VALUES: ()})
        refuse_closure(self._part, structural_damping=structural_damping)

    @overload  # type: ignore[override]
    def step(self, closure: Callable[[], Any]) -> Tensor: ...

    @overload
    def step(self, closure: None = None) -> Tensor | None: ...

    def step(self, closure: Callable[[], Any] | None = None) -> Tensor | None:  # noqa: D102 - the base's
        # With structural damping the first call of the closure is watched.
        if self.param_groups[0].get("structural_damping"):
            closure = self._hidden.watching(closure)
        try:
            return super().step(closure)
        finally:
            self._hidden.clear()

    def __getstate__(self) -> dict[str, Any]:
        """With the modules that are watched."""
        return {**super().__getstate__(), "_hidden": self._hidden}

    @staticmethod
    def _check_options(options: dict[str, Any]) -> None:
        check_shared(options)
        check_optional(options, "damping")
        check_not_negative(options, "structural_damping")
        check_curvature_batch(options)
        check_positive(options, "progress")
        check_fraction(options, "decay")
        check_count(options, "preconditioner_rank", "preconditioner_steps")
        check_choice(options, "solver", SOLVERS)
        check_choice(options, "preconditioner", PRECONDITIONERS)
        check_choice(options, "curvature", (*CURVATURES, "hessian"))
        if options["preconditioner"] != "none" and options["solver"] != "cg":
            raise ValueError(
                f"preconditioner={options['preconditioner']!r} needs solver='cg', got"
                f" {options['solver']!r}, whose space is preconditioned by the last one."
            )
        if options["curvature"] == "hessian" and options["curvature_batch"] not in ("auto", None):
            raise ValueError(
                f"curvature_batch={options['curvature_batch']!r} is of the Gauss-Newton matrix, got"
                " curvature='hessian'; leave it out."
            )
        if options["structural_damping"] and options["curvature"] == "hessian":
            raise ValueError(
                "structural_damping must be 0 with curvature='hessian', got"
                f" {options['structural_damping']}: it is a part of the Gauss-Newton matrix."
            )

    def _curvature(self, evaluation: Evaluation, sampler: Sampler) -> Curvature:
        group, parameters = self.param_groups[0], moving(self.param_groups)
        if group["curvature"] == "hessian":
            return hessian(evaluation, parameters)
        weight = group["structural_damping"] * (group["damping"] or 0.0)
        if group["structural_damping"]:
            states = self._hidden.block(weight)
            evaluation = with_states(evaluation, states) if weight else evaluation
        find = CURVATURES[group["curvature"]]
        curvature = find(evaluation, parameters, type(self).__name__, group["strict"], self._notices, sampler)
        if isinstance(curvature.operator, Structured):
            # Solutions of CG have no coordinates in what it multiplied.
            curvature.operator.keeps = group["solver"] != "cg"
        return curvature

    def _method(self) -> Method:
        groups, group = self.param_groups, self.param_groups[0]
        kept = Kept(self.state, groups, moving(groups))
        last, sketch = kept.vector(SOLUTION), None
        if group["preconditioner"] == "nystrom":
            sketch = kept.sketch(group["preconditioner_rank"], group["preconditioner_steps"])
        start = None if last is None else group["decay"] * last
        solver = truncated_gradients(group["progress"], group["max_iter"], start, sketch)
        rule = martens if group["solver"] == "cg" else marquardt
        return Method("damping", DAMPED, rule, solver, RTOL, keeps_solution=True, sketch=sketch)
