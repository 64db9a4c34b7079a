"""What a step did, for the user."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

# Of an optimizer, and why.
NOT_TRIED = (
    "{} took a damped step without trying it, as {}. If that was not meant, call zero_grad() before backward."
    " Otherwise let one closure make all passes, or give model= and no closure: the loss of one pass cannot"
    " judge the step, and damping or radius do not adapt."
)

# What bounds a step, and how a report says that something else does.
UNUSED = {"damping": 0.0, "radius": math.inf, "cubic_weight": 0.0}


class Seconds(NamedTuple):
    """Of a step, by part. Equal to any other: what took another time is not another step.

    Attributes:
        record: The closure, and the set-up of its curvature.
        products: With the curvature; in the space of residuals backward passes, of half a product each.
        trials: Evaluations of the loss.
        algebra: All else.
    """

    record: float
    products: float
    trials: float
    algebra: float

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Seconds)

    def __ne__(self, other: object) -> bool:
        return not isinstance(other, Seconds)

    def __hash__(self) -> int:
        return hash(Seconds)


class StepReport(NamedTuple):
    """What the last step did.

    Attributes:
        loss: What is minimised, before the step: the closure's loss (negated with ``maximize``) and the
            weight decay.
        new_loss: The same after it; equal to ``loss`` where no step was taken, NaN where it was not tried.
        accepted: Whether the parameters moved.
        rho: Reduction ratio, actual over predicted decrease, of the solution of the model that the step was
            made of, before any search or extension; NaN when there was none.
        damping: Damping for the next step; NaN until a step was tried; 0.0 where another number bounds steps.
        radius: Trust radius for the next step; NaN until a step was tried; infinity where another number
            bounds steps.
        cubic_weight: Weight of the cubic term for the next step, with ``bound="cubic"``; NaN until a step was
            tried; 0.0 where another number bounds steps.
        gradient_norm: Euclidean norm of the gradient before the step.
        step_norm: Euclidean norm of the step taken.
        status: Of the solver (see ``secondorder.solvers.STATUS_TEXT``; "enough": another product would not
            have paid), or "zero_gradient", "zero_lr", "non_finite" where there was nothing to solve;
            "noise_floor" where loss and gradients show no decrease that rounding would not hide.
        iterations: Dimension of the space in which the step was found, or iterations of CG in all trials.
        trials: Dampings, radii or weights that were tried.
        products: With the curvature; in the space of residuals backward passes, of half a product each.
        curvature: Which curvature was used, of how many samples, and why.
        form: "grown", "residual", "formed" or "cg", and why.
        noisy: Whether samples change from step to step: mini-batches, dropout.
        gradient_equivalents: Cost of the step, in gradients.
        host_reads: How often the step has waited for numbers of the device, beside what the closure reads
            itself; 0 on the CPU.
        seconds: By part; on a device those of the host, which waits at reads.
    """

    loss: float
    new_loss: float
    accepted: bool
    rho: float
    damping: float
    radius: float
    cubic_weight: float
    gradient_norm: float
    step_norm: float
    status: str
    iterations: int
    trials: int
    products: int
    curvature: str
    form: str
    noisy: bool
    gradient_equivalents: float
    host_reads: int
    seconds: Seconds

    def __repr__(self) -> str:
        size = next((name for name, unused in UNUSED.items() if getattr(self, name) != unused), "damping")
        noisy = ", noisy=True" if self.noisy else ""
        reads = f"host_reads={self.host_reads}, " if self.host_reads else ""
        return (
            f"StepReport(loss={self.loss:.6g} -> {self.new_loss:.6g}, accepted={self.accepted}, "
            f"rho={self.rho:.3g}, {size}={getattr(self, size):.3g}, gradient_norm={self.gradient_norm:.3g}, "
            f"step_norm={self.step_norm:.3g}, status={self.status!r}, iterations={self.iterations}, "
            f"trials={self.trials}, products={self.products}, curvature={self.curvature!r}, "
            f"form={self.form!r}{noisy}, gradient_equivalents={self.gradient_equivalents:.1f}, {reads}"
            f"seconds={sum(self.seconds):.3g})"
        )


class History(list[StepReport]):
    """The reports of all steps."""

    def columns(self) -> dict[str, list[Any]]:
        """One list for each attribute of the reports; for ``seconds`` one for each part."""
        *names, _ = StepReport._fields
        table: dict[str, list[Any]] = {name: [getattr(report, name) for report in self] for name in names}
        for part in Seconds._fields:
            table[f"seconds_{part}"] = [getattr(report.seconds, part) for report in self]
        return table
