"""The way out of a saddle whose Hessian is not formed: along a direction of negative curvature."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from secondorder.solvers import eigsh

from ..methods.problem import QuadraticModel
from ..methods.subspace import Solution

# Beside 1000 eigenvalues down to zero they find one that is negative by a hundredth of the largest, or more.
LANCZOS_STEPS = 60


def has_negative(values: Tensor, eps: float) -> bool:
    """Whether the lowest of ascending eigenvalues is negative beyond rounding."""
    return float(values[0]) < -math.sqrt(eps) * float(values.abs().max())


class Ends:
    """The lowest and the highest eigenvalue of a model, roughly, from a few Lanczos steps.

    Args:
        model: Its curvature is multiplied.

    Attributes:
        values: At most two, ascending; shape (0,) where the products are not finite.
        lowest: Eigenvector of the first of them, shape (n,).
        products: With the curvature.
    """

    def __init__(self, model: QuadraticModel) -> None:
        like, curvature = model.gradient, model.curvature
        generator = torch.Generator(like.device).manual_seed(0)
        start = torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
        self.values, self.lowest, self.products = like[:0], start, 1
        if not bool((curvature @ start).isfinite().all()):
            return
        k = min(2, len(like))
        found = eigsh(curvature, k, which="BE", v0=start, max_iter=LANCZOS_STEPS, generator=generator)
        self.values, self.lowest = found.values, found.vectors[:, 0]
        self.products += found.products


class Line:
    """A space of one direction, whose curvature is negative: any radius is reached, downhill.

    Args:
        model: Its gradient may vanish.
        direction: Of length one, shape (n,).
        curvature: Along it, negative.
    """

    is_free = True

    def __init__(self, model: QuadraticModel, direction: Tensor, curvature: float) -> None:
        self.products, self.seconds, self.size = 0, 0.0, 1
        slope = float(model.gradient.dot(direction))
        self._slope, self._curvature = -abs(slope), curvature
        self._direction = -direction if slope > 0 else direction

    def solve(self, size: float) -> Solution:
        """Within the radius."""
        return Solution(
            size * self._direction,
            -size * self._slope,
            size**2 * self._curvature,
            size,
            "boundary",
            -self._curvature,
        )

    def steepest(self) -> float:
        """Along the direction: of the gradient nothing is known."""
        return self._curvature

    def least_damping(self) -> float:
        """There is none."""
        return 0.0
