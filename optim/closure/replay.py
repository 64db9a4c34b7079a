"""A step without a closure: what the user computed since the last step is computed again."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from secondorder.autodiff.guard import WriteGuard
from secondorder.vectors.host import read

from . import gradients
from .accumulation import Accumulation
from .calls import Calls
from .evaluate import Asked, ClosureEvaluator, Evaluation, evaluation_of
from .modes import Record
from .nodes import Passes
from .returned import root_of
from .runs import Closure
from .setting import evaluating

# Losses, and gradients, that differ by more than this, relative, are not the same; and gradients where parts
# are computed in half precision: with one kernel of attention and another they differ by 1e-2.
AGREEMENT, ROUGH = 1e-2, 0.1


class ReplayEvaluator(ClosureEvaluator):
    """Runs again what a tape has, in place of a closure.

    Args:
        passes: Those of the tape, with at least one root.
        closure: What ``step`` was given. Where it returns None without calling ``backward``, as Lightning's
            does in manual optimization, they are done again; else the closure is what counts.
        parameters: The parameters that the optimizer moves.
        sign: -1 where the loss is to be maximised.
        accumulation: Counts the backward passes that ``.grad`` holds before the closure runs.
    """

    def __init__(
        self,
        passes: Passes,
        closure: Closure | None,
        parameters: Sequence[Tensor],
        sign: int,
        accumulation: Accumulation,
    ) -> None:
        super().__init__(closure or passes.run, parameters, sign, accumulation)
        self._passes, self._is_given = passes, closure is not None

    def record(self, calls: Calls | None = None) -> Evaluation:
        """Run, leaving ``.grad`` as it is: the user has filled it.

        Args:
            calls: As of a closure.

        Raises:
            RuntimeError: the loss is not finite, or has no path to the parameters.
        """
        with torch.enable_grad(), evaluating():
            if self._is_given:
                returned, mode = self._runs.for_real(calls)
                if returned is not None or mode.roots:
                    return self._evaluated(returned, mode)
                self._runs.closure = self._passes.run
            return self._replayed(calls)

    def _replayed(self, calls: Calls | None) -> Evaluation:
        """Of the passes, done again."""
        gradient, gap = gradients.flat(self._parameters), self._passes.changed()
        with gradients.put_aside(self._parameters), WriteGuard() as guard:
            mode = Record(self._parameters, guard, self._runs.random)
            # Each call has its own random numbers.
            with self._runs.random.replayed(), mode, calls or contextlib.nullcontext():
                loss = self._passes.run()
            root = root_of(loss)
            self._note([root], mode)
            gradients.fill(self._parameters, loss)
            tolerance = ROUGH if self._is_rough() else AGREEMENT
            partial, scale = _compare(gradient, gradients.flat(self._parameters), tolerance)
        value, norm = gradients.measured(loss, gradient)
        before = self._passes.value()
        if abs(value - before) > AGREEMENT * max(abs(value), abs(before)):
            gap = gap or f"the loss was {before:.6g} and is {value:.6g} when it is computed again"
        asked = Asked(loss, value, norm, [root], (), gap or partial, scale)
        return evaluation_of(asked, mode, gradient, self._parameters, self._sign)

    def repeated(self, objective: Tensor) -> float | None:
        """As of a closure; what is run again instead of one was compared with the first run already."""
        return None if self._runs.closure == self._passes.run else super().repeated(objective)

    def _is_rough(self) -> bool:
        return self._parameters[0].dtype.itemsize < 4 or self._passes.is_rough()


def _compare(gradient: Tensor, again: Tensor, tolerance: float) -> tuple[str, float]:
    """Why the gradient in ``.grad`` is not that of the replayed loss, if so, and how many times it is.

    Clipped to a norm, it is a part of it: what is modelled is then still the loss.
    """
    along, own = gradient.dot(again), again.dot(again)
    rest = gradient - torch.where(own > 0, along / own, 0.0) * again
    product, square, size, left, is_there = read(along, own, gradient.norm(), rest.norm(), gradient.any())
    if square == 0 and not is_there:
        return "", 1.0
    factor = product / square if square > 0 else 0.0
    is_parallel = left <= tolerance * size
    if not is_parallel or factor <= 0:
        return "what .grad holds is not the gradient of the loss that was computed with model=", 1.0
    if factor > 1 + tolerance:
        times = f"{factor:.3g} times the gradient"
        return f"what .grad holds is {times} of the loss that was computed with model=", factor
    return "", 1.0
