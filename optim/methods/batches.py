"""Mini-batches: what samples that came later say about a step. Numbers in, numbers out.

The loss at the start of a step differs from the one that the last step left where the batch, or a dropout
mask, is another. The last step is then tried on these samples too: what it gained there, beside what it
gained on its own, is a ratio that its own trial cannot see.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from .problem import Trial

# A loss that differs by more than this, relative, is of other samples.
CHANGE = 1e-3
# Changes are counted with this memory of the steps before; more than that of them are batches, and not an
# objective that was changed once.
RECENT, BATCHES = 0.8, 1.2
# With batches, of the step that these samples ask for (measured: .3 to 1 are alike on digits).
RATE = 0.5
# With batches, the most of the mean gain that a product may leave: later steps do not make up for it.
GAIN = 0.3
# With batches, of the reduction ratio: a model that is wrong on its own samples is worse on others.
LEAST_RATIO = 0.5
# Of the average over steps, the part of their gains that steps are to keep, and what damping is multiplied by
# where they do not.
MEMORY, LEAST_KEPT, MORE = 0.7, 0.1, 2.0
# A step that gains less than this, relative, is too small to say anything against it.
SMALL = 1e-4
# Of the running average of batch sizes.
SIZES = 0.8


class BatchNoise(NamedTuple):
    """What is remembered from step to step.

    Attributes:
        before: Loss before the last step; None where there was none.
        expected: Loss after it, on the same samples.
        kept: Average part of its gain that a step kept on the samples that came next, from -1 to 1.
        outputs: Average number of outputs that a loss is of.
        part: Outputs of this step's loss over that, at most 1.
        changes: How often samples changed in the last steps.
        is_other: Whether this step's samples are others than the last one's.
    """

    before: float | None = None
    expected: float | None = None
    kept: float = 1.0
    outputs: float = 0.0
    part: float = 1.0
    changes: float = 0.0
    is_other: bool = False

    def observed(self, value: float, outputs: int) -> BatchNoise:
        """At the start of a step, with the loss there and of how many outputs it is (0: not known)."""
        average = SIZES * self.outputs + (1 - SIZES) * outputs if self.outputs else float(outputs)
        now = self._replace(outputs=average, part=min(1.0, outputs / average) if outputs else 1.0)
        if self.before is None or self.expected is None:
            return now
        is_other = abs(value - self.expected) > CHANGE * max(abs(value), abs(self.expected))
        return now._replace(is_other=is_other, changes=RECENT * self.changes + is_other)

    def tested(self, before: float, after: float) -> BatchNoise:
        """With the losses before and after the last step on the samples of this one."""
        if self.before is None or self.expected is None or not math.isfinite(before - after):
            return self
        promised = self.before - self.expected
        part = (before - after) / promised if promised > SMALL * abs(self.before) else 1.0
        return self._replace(kept=MEMORY * self.kept + (1 - MEMORY) * min(max(part, -1.0), 1.0))

    def stepped(self, before: float, trial: Trial | None) -> BatchNoise:
        """At the end of a step, with its losses on its own samples."""
        return self._replace(before=before, expected=before if trial is None else trial.value)

    @property
    def is_seen(self) -> bool:
        """Whether samples change from step to step, or every few steps."""
        return self.changes > BATCHES

    @property
    def is_news(self) -> bool:
        """Whether they changed for the first time in long: batches, or another objective."""
        return self.is_other and not self.is_seen

    @property
    def rate(self) -> float:
        """Of the step: less where other samples follow, in proportion to what these know."""
        return RATE * self.part if self.is_seen else 1.0

    @property
    def loses(self) -> bool:
        """Whether steps keep too little of their gains on the samples that come next."""
        return self.is_seen and self.kept < LEAST_KEPT
