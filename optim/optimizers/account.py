"""What a step cost, and its report."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

from secondorder.vectors import host

from ..methods.forms import PASS_COST
from ..methods.residual import Residual
from .problem import ClosureProblem
from .report import UNUSED, Seconds, StepReport
from .stepping import Result

# In gradients: one forward and one backward pass, the backward twice the forward.
FORWARD_COST, RECORD_COST = 1 / 3, 1.0


class Clock:
    """Seconds of a step, and how often it waited for the device."""

    def __init__(self) -> None:
        self._reads = host.reads()
        self._start = self._recorded = time.perf_counter()

    def recorded(self) -> None:
        """The closure ran, and its curvature is set up."""
        self._recorded = time.perf_counter()

    def reads(self) -> int:
        """Since it was made."""
        return host.reads() - self._reads

    def parts(self, products: float, trials: float) -> Seconds:
        """With what the rest says of itself."""
        rest = time.perf_counter() - self._recorded - products - trials
        return Seconds(self._recorded - self._start, products, trials, max(rest, 0.0))


class Cost(NamedTuple):
    """Evaluations before the step, and what a product and the set-up of the curvature cost in gradients."""

    evaluations: int
    product: float
    set_up: float


def reported(
    problem: ClosureProblem,
    result: Result,
    bounded: tuple[str, float | None],
    curvature: str,
    cost: Cost,
    clock: Clock,
) -> StepReport:
    """The report of a step that is about to be taken; ``bounded``: what bounds the next, by its name."""
    outcome, space, spent = result.outcome, result.space, problem.spent
    trial, value = outcome.trial, problem.model().value
    products = 0 if space is None else space.products
    return StepReport(
        loss=value,
        new_loss=value if trial is None else trial.value,
        accepted=trial is not None,
        rho=outcome.rho,
        **{**UNUSED, bounded[0]: math.nan if bounded[1] is None else bounded[1]},
        gradient_norm=problem.slope(),
        step_norm=problem.length(trial),
        status=outcome.status,
        iterations=0 if space is None else space.size,
        trials=outcome.trials,
        products=products,
        curvature=curvature,
        form="" if result.form is None else f"{result.form.name} ({result.form.why})",
        noisy=result.is_noisy,
        gradient_equivalents=RECORD_COST
        + cost.set_up
        + products * cost.product * (PASS_COST if isinstance(space, Residual) else 1.0)
        + FORWARD_COST * (cost.evaluations + spent.evaluations)
        + spent.gradients,
        host_reads=clock.reads(),
        seconds=clock.parts(0.0 if space is None else space.seconds, spent.seconds),
    )
