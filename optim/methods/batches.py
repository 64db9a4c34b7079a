"""Mini-batches: what samples that came later say about a step. Numbers in, numbers out.

The loss at the start of a step differs from the one that the last step left where the batch, or a dropout
mask, is another. The last step is then tried on these samples too: what it gained there, beside what it
gained on its own, is a ratio that its own trial cannot see.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from optim.methods.problem import Trial

# A loss that differs by more than this, relative, is of other samples.
CHANGE = 1e-3
# Where they differ, of the step that these samples ask for (measured: .3 to 1 are alike on digits).
RATE = 0.5
# Where they differ, the most that a space may leave: what a short solve leaves is not made up for on other
# samples.
GAIN = 0.3
# Where they differ, of the reduction ratio: a model that is wrong on its own samples is worse on others.
LEAST_RATIO = 0.5
# Of the average over steps, the part of their gains that steps are to keep, and what damping is multiplied by
# where steps lose on the samples that come next.
MEMORY, LEAST_KEPT, MORE = 0.7, 0.1, 2.0


class BatchNoise(NamedTuple):
    """What is remembered from step to step.

    Attributes:
        before: Loss before the last step; None where there was none.
        expected: Loss after it, on the same samples.
        kept: Average part of its gain that a step kept on the samples that came next, from -1 to 1.
        largest: Most outputs that a step was taken on.
        part: Outputs of this step, of that.
        is_seen: Whether the loss was of other samples when the last step began.
        is_news: Whether it was not when the one before began: batches, or another objective.
    """

    before: float | None = None
    expected: float | None = None
    kept: float = 1.0
    largest: int = 0
    part: float = 1.0
    is_seen: bool = False
    is_news: bool = False

    def observed(self, value: float, outputs: int) -> BatchNoise:
        """At the start of a step, with the loss there and of how many outputs it is (0: not known)."""
        largest = max(self.largest, outputs)
        now = self._replace(largest=largest, part=outputs / largest if outputs else 1.0)
        if self.before is None or self.expected is None:
            return now
        is_other = abs(value - self.expected) > CHANGE * max(abs(value), abs(self.expected))
        return now._replace(is_seen=is_other, is_news=is_other and not self.is_seen)

    def tested(self, before: float, after: float) -> BatchNoise:
        """With the losses before and after the last step on the samples of this one."""
        if self.before is None or self.expected is None or not self.before > self.expected:
            return self
        part = (before - after) / (self.before - self.expected)
        if not math.isfinite(part):
            return self
        return self._replace(kept=MEMORY * self.kept + (1 - MEMORY) * min(max(part, -1.0), 1.0))

    def stepped(self, before: float, trial: Trial | None) -> BatchNoise:
        """At the end of a step, with its losses on its own samples."""
        return self._replace(before=before, expected=before if trial is None else trial.value)

    @property
    def rate(self) -> float:
        """Of the step: less where others follow, in proportion to what this one knows."""
        return RATE * self.part if self.is_seen and not self.is_news else 1.0

    @property
    def loses(self) -> bool:
        """Whether steps lose on the samples that come next."""
        return self.is_seen and self.kept < LEAST_KEPT
