"""The quadratic model with a cubic term, minimised exactly in the eigenvectors of its matrix.

Reference: Cartis, Gould and Toint (2011), Adaptive cubic regularisation methods for unconstrained
optimization, part I, Mathematical Programming 127, section 6.1; Nesterov and Polyak (2006).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The root is found to rounding: it costs a few passes over the eigenvalues.
TOLERANCE, MAX_ITERATIONS = 1e-14, 200
# Of the weight where eigenvalues and target have size one: cubes of what is in between stay in range.
LEAST_WEIGHT, LARGEST_WEIGHT = 1e-90, 1e90


def minimise_cubic(values: Tensor, target: Tensor, weight: float) -> tuple[Tensor, float, str]:
    """The global minimiser of ``y . values y / 2 - target . y + weight norm(y)^3 / 3``.

    It has ``(values + shift) y = target``, ``shift = weight norm(y)``, and ``values + shift`` not negative.
    Where ``target`` has no part in the lowest space, and that is not enough (the hard case), the rest of the
    length lies along that space.

    Args:
        values: Shape (k,), ascending.
        target: Shape (k,).
        weight: Positive.

    Returns:
        The minimiser, ``shift``, and "converged" or "hard_case".
    """
    # In units in which both have size one.
    size, length = _size(float(values.abs().max())), _size(float(target.norm()))
    unit_free = min(max(weight / size * (length / size), LEAST_WEIGHT), LARGEST_WEIGHT)
    y, shift, status = _minimise_scaled(values / size, target / length, unit_free)
    return y * (length / size), shift * size, status


def _size(value: float) -> float:
    return value if 0 < value < math.inf else 1.0


def _minimise_scaled(values: Tensor, target: Tensor, weight: float) -> tuple[Tensor, float, str]:
    floor = max(0.0, -float(values[0]))
    # From the floor: a shift that lies close to it is not lost in the spacing of numbers there.
    gaps = values + floor
    is_lowest = gaps == 0
    least = floor / weight
    part = float(target[is_lowest].norm())
    if part == 0:
        rest = torch.where(is_lowest, 0.0, target / torch.where(is_lowest, 1.0, gaps))
        length = float(rest.norm())
        if length <= least:
            rest[0] += least * math.sqrt((1 - length / least) * (1 + length / least)) if least else 0.0
            return rest, floor, "hard_case" if least else "converged"
    high = math.sqrt(weight)
    # At these ends lengths are at most ``1 / d``, for a target of length one, and at least ``part / d``.
    excess = _find_excess(gaps, target, weight, floor, (weight * part / (floor + high), high))
    return target / (gaps + excess), floor + excess, "converged"


def _find_excess(
    gaps: Tensor, target: Tensor, weight: float, floor: float, ends: tuple[float, float]
) -> float:
    """The ``d > 0`` at which ``norm(target / (gaps + d))`` is ``(floor + d) / weight``: safeguarded Newton.

    Newton on ``(floor + d) / norm(y) - weight``, which is linear where the length is that of the Newton step.
    """
    low, high = ends
    d = high
    for _ in range(MAX_ITERATIONS):
        y = target / (gaps + d)
        norm = float(y.norm())
        wrong = floor + d - weight * norm
        if abs(wrong) <= TOLERANCE * (floor + d):
            break
        low, high = (d, high) if wrong < 0 else (low, d)
        slope = float((y.square() / (gaps + d)).sum()) / norm
        d -= wrong / (1 + (floor + d) * slope / norm)
        if not low < d < high:
            d = math.sqrt(low * high) if low > 0 else 0.1 * high
        if not low < d < high:
            return high
    return d
