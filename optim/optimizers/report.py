"""What a step did, for the user."""

from __future__ import annotations

import math
from typing import NamedTuple

# Of an optimizer, and why.
NOT_TRIED = (
    "{} took a damped step without trying it, as {}. If that was not meant, call zero_grad() before backward."
    " Otherwise let one closure make all passes, or give model= and no closure: the loss of one pass cannot"
    " judge the step, and damping or radius do not adapt."
)


class StepReport(NamedTuple):
    """What the last step did.

    Attributes:
        loss: What is minimised, before the step: the closure's loss (negated with ``maximize``) and the
            weight decay.
        new_loss: The same after it; equal to ``loss`` where no step was taken, NaN where it was not tried.
        accepted: Whether the parameters moved.
        rho: Reduction ratio, actual over predicted decrease, of the last full solution of the model, before
            any line search; NaN when there was none.
        damping: Damping for the next step; 0.0 for a method with a radius.
        radius: Trust radius for the next step; infinity for a method with damping.
        gradient_norm: Euclidean norm of the gradient before the step.
        step_norm: Euclidean norm of the step taken.
        status: Of the solver (see ``secondorder.solvers.STATUS_TEXT``), or "zero_gradient", "zero_lr",
            "non_finite" where there was nothing to solve; "noise_floor" where loss and gradients show no
            decrease that rounding would not hide.
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
