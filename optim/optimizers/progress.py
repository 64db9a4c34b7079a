"""What the last steps say together: whether they still gain something, and what to try where they do not."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from .report import History, StepReport

# Steps that are looked back at, and those in a row that gained nothing, for a verdict and for a warning.
RECENT, ENOUGH, WASTED = 40, 3, 20

# A change of the loss below this many units of its rounding is none.
ROUNDING = 4.0

# Statuses of steps for which there is nothing to do.
AT_REST = ("zero_gradient", "noise_floor")

TEXTS = {
    "new": "no step was taken yet",
    "running": "steps lower the loss: the last from {last.loss:.6g} to {last.new_loss:.6g}, rho"
    " {last.rho:.2g}. Go on, or stop when that is enough",
    "converged": "the last {count} steps changed the loss, {last.loss:.8g}, by no more than its rounding; the"
    " norm of the gradient is {last.gradient_norm:.2g}. Stop here{more}",
    "stalled": "the last {count} steps were refused, whatever the {size}; the norm of the gradient is"
    " {last.gradient_norm:.2g}. Is the closure the same function each time it is called, its loss the one"
    " that backward was called on, and smooth? Then try torch.float64",
    "non_finite": "the last {count} steps met numbers that are not finite. Start from other parameters, or"
    " scale the data",
    "not_tried": "the last {count} steps were taken without trying them, for .grad is not the gradient of"
    " one loss: see the warning",
    "zero_lr": "lr is zero: no step is taken",
    "noisy": "the samples change from step to step, and the mean loss of the last {half} steps, {new:.4g},"
    " is lower than that of the {half} before, {old:.4g}: go on",
    "stalled by noise": "the samples change from step to step, and the mean loss of the last {half} steps,"
    " {new:.4g}, is not lower than that of the {half} before, {old:.4g}. Try larger batches, a smaller lr,"
    " or weights that are averaged over steps (torch.optim.swa_utils)",
}


class Progress(NamedTuple):
    """The last reports of an optimizer.

    Attributes:
        reports: At most ``RECENT``.
        eps: Rounding of their losses.
    """

    reports: tuple[StepReport, ...] = ()
    eps: float = 0.0

    def after(self, report: StepReport, eps: float) -> Progress:
        """With one more."""
        return Progress((*self.reports, report)[-RECENT:], eps)

    @property
    def status(self) -> str:
        """A word, as ``Reporting.explain`` has them."""
        return self._verdict()[0].partition(" ")[0]

    def explain(self) -> str:
        """The same in a sentence, with what to try."""
        kind, count = self._verdict()
        last, means = (self.reports or (None,))[-1], _means(self.reports)
        size = "damping" if last is None or math.isinf(last.radius) else "radius"
        more = "; for more digits use torch.float64" if self.eps > torch.finfo(torch.float64).eps else ""
        text = TEXTS[kind].format(
            last=last, count=count, size=size, more=more, half=RECENT // 2, old=means[0], new=means[1]
        )
        return f"{kind.partition(' ')[0]}: {text}."

    def wasted(self) -> str:
        """A warning once steps have not paid for long; else empty."""
        kind, count = self._verdict()
        if count < WASTED or kind not in ("converged", "stalled"):
            return ""
        return f"{self.explain()} Look at optimizer.converged after a step to end the loop."

    def _verdict(self) -> tuple[str, int]:
        """And of how many steps it is."""
        if not self.reports:
            return "new", 0
        last = self.reports[-1]
        if last.status == "zero_lr":
            return "zero_lr", 1
        if last.noisy:
            old, new, error = _means(self.reports)
            kinds = ("noisy", "stalled by noise") if len(self.reports) == RECENT else ("running",) * 2
            return kinds[not new < old - error], len(self.reports)
        for kind, least in (("non_finite", 1), ("not_tried", 1), ("converged", ENOUGH), ("stalled", ENOUGH)):
            count = self._in_a_row(kind)
            if count >= least or (kind == "converged" and last.status == "zero_gradient"):
                return kind, max(count, 1)
        return "running", 1

    def _in_a_row(self, kind: str) -> int:
        count = 0
        for report in reversed(self.reports):
            if not self._is(report, kind):
                break
            count += 1
        return count

    def _is(self, report: StepReport, kind: str) -> bool:
        change = abs(report.loss - report.new_loss)
        if kind == "non_finite":
            return report.status == "non_finite"
        if kind == "not_tried":
            return report.accepted and math.isnan(report.new_loss)
        if kind == "converged":
            is_rounding = report.accepted and change <= ROUNDING * self.eps * abs(report.loss)
            return is_rounding or report.status in AT_REST
        return not report.accepted


def _means(reports: Iterable[StepReport]) -> tuple[float, float, float]:
    """Of the losses of the earlier and the later half, and the standard error of their difference."""
    losses = [report.loss for report in reports]
    half = len(losses) // 2
    if not half:
        return math.nan, math.nan, math.nan
    old, new = losses[:half], losses[half:]
    error = math.sqrt((statistics.pvariance(old) + statistics.pvariance(new)) / half)
    return statistics.fmean(old), statistics.fmean(new), error


class Reporting(torch.optim.Optimizer):
    """An optimizer that says what its steps did.

    Attributes:
        report: Of the last step; None before it.
        history: Of all steps, where it was asked for.
    """

    # None at first, or without history=True; with Any a type checker lets their fields be read all the same.
    report: StepReport | Any = None
    history: History | Any = None
    _callback: Callable[[StepReport], Any] | None = None

    def _report_to(self, history: bool, callback: Callable[[StepReport], Any] | None) -> None:
        """Keep all reports; call with each."""
        if callback is not None and not callable(callback):
            raise TypeError(f"callback must be a function of a StepReport, got {type(callback).__name__}.")
        self.history, self._callback = History() if history else None, callback
        self._progress = Progress()

    @property
    def converged(self) -> bool:
        """Whether the last steps changed the loss by no more than its rounding: another will not either.

        Of samples that change from step to step it is never known.
        """
        return self._progress.status == "converged"

    def explain(self) -> str:
        """What the last steps say together, and what to try: a status, and a sentence.

        The status is "new", "running", "converged", "stalled" (steps are refused, or the mean loss of
        changing samples does not fall), "noisy" (it does), "non_finite", "not_tried" or "zero_lr".
        """
        return self._progress.explain()


class LogTo:
    """A ``callback=`` that writes each report to a logger or to TensorBoard.

    Args:
        target: A ``logging.Logger``, which gets the report's line at level INFO; or an object with
            ``add_scalar(name, value, step)``, as ``torch.utils.tensorboard.SummaryWriter``.
        prefix: Of the names of scalars.

    Raises:
        TypeError: ``target`` is neither.

    Example:
        >>> from torch.utils.tensorboard import SummaryWriter  # doctest: +SKIP
        >>> HessianFree(model.parameters(), callback=LogTo(SummaryWriter()))  # doctest: +SKIP
    """

    def __init__(self, target: Any, prefix: str = "optim/") -> None:
        if not isinstance(target, logging.Logger) and not callable(getattr(target, "add_scalar", None)):
            name = type(target).__name__
            raise TypeError(
                f"target must be a logging.Logger, or have add_scalar as a SummaryWriter, got {name}."
            )
        self._target, self._prefix, self._steps = target, prefix, 0

    def __call__(self, report: StepReport) -> None:
        """Write it."""
        if isinstance(self._target, logging.Logger):
            self._target.info("step %d: %s", self._steps, report)
        else:
            for name, value in report._asdict().items():
                if isinstance(value, int | float):
                    self._target.add_scalar(self._prefix + name, float(value), self._steps)
        self._steps += 1
