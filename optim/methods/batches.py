"""Mini-batches: what samples that came later say about a step. Numbers in, numbers out.

The loss at the start of a step differs from the one that the last step left where the batch, or a dropout mask,
is another. The last step is then tried on these samples too: what it gained there, beside what it gained on its
own, is a ratio that its own trial cannot see.
"""

from __future__ import annotations

import math
from typing import NamedTuple

# A loss that differs by more than this, relative, is of other samples.
CHANGE = 1e-3
# Of the averages over steps.
MEMORY = 0.7
# A gain below this part of what was promised asks for more damping, above the other for less; the factors.
LITTLE, MUCH = 0.25, 0.6
MORE, LESS = 2.0, 1 / 1.5


class BatchNoise(NamedTuple):
    """What is remembered from step to step.

    Attributes:
        before: Loss before the last step; None where there was none.
        expected: Loss after it, on the same samples.
        gained: Average of what steps gained on the samples that came next.
        promised: Average of what they gained on their own.
        is_seen: Whether the loss was of other samples when the last step began.
    """

    before: float | None = None
    expected: float | None = None
    gained: float = 0.0
    promised: float = 0.0
    is_seen: bool = False

    def observed(self, value: float) -> BatchNoise:
        """At the start of a step, with the loss there."""
        if self.before is None or self.expected is None:
            return self
        is_other = abs(value - self.expected) > CHANGE * max(abs(value), abs(self.expected))
        return self._replace(is_seen=is_other)

    def tested(self, before: float, after: float) -> BatchNoise:
        """With the losses before and after the last step on the samples of this one."""
        if self.before is None or self.expected is None or not math.isfinite(before - after):
            return self
        return self._replace(
            gained=MEMORY * self.gained + before - after,
            promised=MEMORY * self.promised + self.before - self.expected,
        )

    def stepped(self, before: float, after: float) -> BatchNoise:
        """At the end of a step, with its losses on its own samples."""
        return self._replace(before=before, expected=after)

    @property
    def factor(self) -> float:
        """Of the damping, at the start of a step; of a radius its inverse."""
        if not self.is_seen or self.promised <= 0:
            return 1.0
        ratio = self.gained / self.promised
        return MORE if ratio < LITTLE else LESS if ratio > MUCH else 1.0
