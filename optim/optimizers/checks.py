"""What is wrong with what a closure gave, in words for a warning; empty where nothing is."""

from __future__ import annotations

import math
import sys
import warnings

import torch
import torch.distributed as dist

from ..closure.evaluate import ClosureEvaluator, Evaluation
from .report import NOT_TRIED

# Relative difference between the loss returned and the loss differentiated that is more than rounding; and
# between two runs in single precision, which autocast computes in half.
MISMATCH = 1e-3

# Of an optimizer, the option, and why.
UNSAMPLED = (
    "{} was asked for curvature_batch={}, but takes {}. Call one module that keeps samples apart, with a row"
    " for each in its inputs and outputs; or give curvature_batch a closure that evaluates the loss of a part"
    " of the data."
)


def processes(name: str) -> str:
    """Where there are several: gradients may be averaged over them, losses are not."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return ""
    return (
        f"{name} judges a step by the loss of its own process: parameters of several processes drift apart;"
        " train in one."
    )


def mismatch(evaluation: Evaluation) -> str:
    """When the loss that is judged is not the one that was differentiated."""
    if evaluation.is_loss:
        return ""
    # Both with the sign of what is minimised.
    differentiated = float(evaluation.objective.detach())
    difference = abs(evaluation.value - differentiated)
    if not difference > MISMATCH * max(abs(evaluation.value), abs(differentiated)):
        return ""
    return (
        f"closure returned a loss of {evaluation.value:.6g} but called backward on {differentiated:.6g}:"
        " steps are modelled on the one and judged by the other; return what backward was called on."
    )


def repetition(value: float, again: float, dtype: torch.dtype) -> str:
    """When two runs at the same parameters, which are of ``dtype``, gave different losses."""
    tolerance = math.sqrt(torch.finfo(dtype).eps)
    if dtype != torch.float64:
        tolerance = max(tolerance, MISMATCH)
    # What is not finite is dealt with in trials.
    if not math.isfinite(again) or abs(value - again) <= tolerance * max(abs(value), abs(again)):
        return ""
    return (
        f"closure gave a loss of {value:.6g} and then, at the same parameters, {again:.6g}: a step compares"
        " losses, and these are of different functions. Draw the batch, and random numbers of NumPy and"
        " Python, outside of the closure; torch's own are replayed, as are buffers that are written in place."
    )


class Notices:
    """Warnings of one optimizer: each kind is given once, at the line that called ``step``."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._given: set[str] = set()
        # Reasons for which a closure was run twice so far: each counts once.
        self._repeated: set[str] = set()

    def once(self, kind: str, text: str) -> None:
        """Warn; where there is no text, not."""
        if text and kind not in self._given:
            self._given.add(kind)
            warnings.warn(text, stacklevel=_level_of_caller())

    def check(self, evaluator: ClosureEvaluator, evaluation: Evaluation, dtype: torch.dtype) -> int:
        """Warn where the loss cannot judge steps along the gradient; what that cost, in evaluations.

        In the first step, and where its graph looks old, the closure runs again for it.
        """
        self.once("processes", processes(self._name))
        if evaluation.partial:
            self.once("partial", NOT_TRIED.format(self._name, evaluation.partial))
            return 0
        self.once("mismatch", mismatch(evaluation))
        reason = "old graph" if evaluator.is_suspect else "first step"
        again = None if reason in self._repeated else evaluator.repeated(evaluation.objective)
        if again is None:
            return 0
        self._repeated |= {"first step", reason}
        self.once("repetition", repetition(evaluation.value, again, dtype))
        return 1


def _level_of_caller() -> int:
    """The ``stacklevel`` of the first frame outside this library and torch, seen from the caller."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in ("optim", "torch"):
        level, frame = level + 1, frame.f_back
    return level
