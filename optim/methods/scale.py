"""Variables in units of what they do to the residuals.

Reference: Moré (1978), The Levenberg-Marquardt algorithm: implementation and theory, section 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Steps for which a scale never shrinks, as Moré's; after them it may halve in each, or it would hold back a
# variable for ever that was steep only at the start.
GROWING = 200


def more_scale(columns: Tensor, before: Tensor | None, steps: int) -> Tensor:
    """The scale of each variable: the largest norm that its column of the Jacobian had.

    Args:
        columns: Norms of the columns, shape (n,).
        before: Of the last step; None in the first.
        steps: That were taken.
    """
    if before is None:
        # A variable that does nothing has no unit.
        return torch.where(columns > 0, columns, 1.0)
    return torch.maximum(columns, before if steps < GROWING else before / 2)
