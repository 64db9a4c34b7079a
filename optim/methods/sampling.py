"""Curvature on part of the samples: how many, and which. Gradient and trials are of all of them.

Samples are drawn by what their losses curve: where a network is sure of most, few are left that matter.

Reference: Byrd, Chin, Neveitt and Nocedal (2011), On the use of stochastic Hessian information in
    optimization methods for machine learning, for the part; Xu et al. (2016), Sub-sampled Newton methods with
    non-uniform sampling, for the draw.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .control import LOW

# As measured: the part of the samples that a first step takes, and how few; of fewer than this all are taken.
FIRST_SHARE, FEWEST, WORTH_IT = 1 / 16, 64, 256
# Twice as many after a step whose model was so wrong that it is damped more, too (measured: 1/2 is more work
# on all networks, 1/10 about the same).
ENOUGH, GROWTH = LOW, 2.0
# The part of the draw that goes by curvature; the rest is even, which bounds weights: the curvature of a
# sample is an estimate, and after a step another.
BY_CURVATURE = 0.8


class Draw(NamedTuple):
    """Some of the samples.

    Attributes:
        rows: Their positions, ascending, shape (m,).
        weights: One over the probability to be drawn, shape (m,), in double precision: so weighted, their sum
            estimates that of all.
    """

    rows: Tensor
    weights: Tensor


def share_of(last: float | None, count: int) -> float:
    """The part of ``count`` samples that the curvature is to be computed on; ``last``: None at first."""
    return 1.0 if count < WORTH_IT else min(1.0, max(last or FIRST_SHARE, FEWEST / count))


def next_share(share: float, rho: float) -> float:
    """After a step with reduction ratio ``rho``; NaN, where it was not tried, says nothing."""
    return min(1.0, GROWTH * share) if rho <= ENOUGH else share


def size_of(share: float, count: int) -> int:
    """How many samples that is."""
    return min(count, max(1, math.ceil(share * count)))


def draw(curvatures: Tensor, size: int, generator: torch.Generator) -> Draw:
    """Draw ``size`` different samples, as likely as they are curved.

    Args:
        curvatures: Of each sample's loss, shape (N,), on the CPU.
        size: Less than ``N``.
        generator: Of the CPU.

    Reference: Madow (1949), On the theory of systematic sampling, II.
    """
    known = torch.where(curvatures.isfinite(), curvatures.clamp(min=0), 0).double()
    total, even = float(known.sum()), torch.full_like(known, 1 / len(known))
    likely = torch.lerp(even, known / total, BY_CURVATURE) if 0 < total < math.inf else even
    chances = _chances(likely, size)
    order = torch.randperm(len(chances), generator=generator, device="cpu")
    ends = chances[order].cumsum(0)
    start = torch.rand((), generator=generator, dtype=torch.float64, device="cpu")
    # The last one is the size, but for rounding.
    points = (start + torch.arange(size, device="cpu")) * (ends[-1] / size)
    rows = order[torch.searchsorted(ends, points)].sort()[0]
    return Draw(rows, 1 / chances[rows])


def _chances(likely: Tensor, size: int) -> Tensor:
    """In proportion to ``likely``, at most 1, with the sum ``size``."""
    largest = likely.sort(descending=True)[0]
    tails = largest.flip(0).cumsum(0).flip(0)[:size]
    # With the first k of them certain.
    factors = (size - torch.arange(size, device="cpu")) / tails
    first = int((factors * largest[:size] <= 1 + 1e-12).byte().argmax())
    return (factors[first] * likely).clamp(max=1)
