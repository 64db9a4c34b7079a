"""The curvature of a step on part of its samples, as an option asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secondorder import LinearOperator

from ..closure.calls import Calls
from ..closure.coverage import Coverage
from ..closure.evaluate import ClosureEvaluator, Evaluation
from ..closure.samples import NoSamplesError, Samples
from ..methods import sampling
from ..methods.options import as_number

# Learned: the part of the samples, None before the first step, and how often they were drawn.
LEARNED: dict[str, Any] = {"curvature_share": None, "curvature_draws": 0}


def check_curvature_batch(options: Mapping[str, Any]) -> None:
    """Raise ValueError unless ``curvature_batch`` is "auto", a count, a fraction or None."""
    wanted = options["curvature_batch"]
    number = as_number(wanted)
    is_count = isinstance(number, int) and number >= 1
    is_fraction = isinstance(number, float) and 0 < number <= 1
    if not (wanted is None or wanted == "auto" or is_count or is_fraction):
        raise ValueError(
            'curvature_batch must be "auto", a number of samples, a fraction up to 1.0, a closure or None,'
            f" got {wanted!r}."
        )


def refuse_closure(closure: Callable[[], Any] | None, **options: Any) -> None:
    """Raise ValueError where options are on that need the samples of the loss itself."""
    on = [name for name, value in options.items() if value]
    if closure is not None and on:
        raise ValueError(f"{' and '.join(on)} must be off with a closure for curvature_batch.")


class Part(NamedTuple):
    """The Gauss-Newton matrix by a part of the samples.

    Attributes:
        operator: None for that of all.
        share: The part.
        note: Which part, or why there is none where one was asked for.
    """

    operator: LinearOperator | None = None
    share: float = 1.0
    note: str = ""


class Sampler:
    """Takes a part of the samples of one step.

    Args:
        evaluator: Of the step.
        group: Of the optimizer.
        closure: Evaluates the loss of a part of the data; None for none.
        parameters: In the order of the flat vectors.

    Attributes:
        wanted: The option; None where a closure takes its place.
        calls: To note those of the recorded run; None where no part is wanted.
    """

    def __init__(
        self,
        evaluator: ClosureEvaluator,
        group: Mapping[str, Any],
        closure: Callable[[], Any] | None,
        parameters: Sequence[Tensor],
    ) -> None:
        self.wanted = None if closure is not None else group.get("curvature_batch")
        self.calls = None if self.wanted is None else Calls([p.device for p in parameters])
        self._evaluator, self._group, self._closure = evaluator, group, closure
        self._parameters = parameters
        # Of "auto".
        self._share: float | None = None
        self._has_drawn = False

    def evaluation(self, evaluation: Evaluation) -> tuple[Evaluation, Part]:
        """What the curvature is of: the closure's own part, or the recorded loss."""
        if self._closure is None:
            return evaluation, Part()
        own = self._evaluator.elsewhere(evaluation, self._closure)
        count, whole = own.coverage.outputs, evaluation.coverage.outputs
        return own, Part(None, min(1.0, count / whole) if count and whole else 1.0, "part by a closure")

    def take_all(self) -> None:
        """No part of the samples, where no size was asked for."""
        self.calls = None

    @property
    def is_by_number(self) -> bool:
        """Whether a size was asked for."""
        return isinstance(self.wanted, int | float)

    def part(self, coverage: Coverage) -> Part:
        """A part of the samples behind the blocks of a Gauss-Newton matrix."""
        if self.calls is None or (self.wanted == "auto" and coverage.rows < sampling.WORTH_IT):
            return Part()
        try:
            samples = Samples.of(self.calls.made, coverage.blocks, self._parameters)
            size = self._size(samples.count)
            # Where it may have no curvature that matter is for all of them.
            is_doubtful = coverage.description.startswith("explicit") and not samples.middle.has_curvature()
            if size == samples.count or is_doubtful:
                return Part()
            generator = torch.Generator("cpu").manual_seed(self._group["curvature_draws"])
            self._has_drawn = True
            rows, weights = sampling.draw(samples.curvatures(generator), size, generator)
            operator = samples.gauss_newton(rows, weights, self._evaluator)
        except NoSamplesError as error:
            return Part(note=f"all samples: {error}")
        return Part(operator, size / samples.count, f"{size} of {samples.count} samples")

    def learned(self, rho: float) -> dict[str, Any]:
        """What the next step is to know, after one with reduction ratio ``rho``."""
        if not self._has_drawn:
            return {}
        draws = {"curvature_draws": self._group["curvature_draws"] + 1}
        if self._share is None:
            return draws
        return {**draws, "curvature_share": sampling.next_share(self._share, rho)}

    def _size(self, count: int) -> int:
        if isinstance(self.wanted, int):
            return min(self.wanted, count)
        if isinstance(self.wanted, float):
            return sampling.size_of(self.wanted, count)
        self._share = sampling.share_of(self._group["curvature_share"], count)
        return sampling.size_of(self._share, count)
