"""What a point of small gradient is, where no step formed the Hessian; and the way out of a saddle."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from secondorder import MatrixOperator
from secondorder.solvers import diagonal, eigsh

from ..methods.formed import Formed
from ..methods.problem import QuadraticModel, norm
from ..methods.subspace import Bound, Solution, bounded
from .frame import Frame, scale_by

# Beside 1000 eigenvalues down to zero they find one that is negative by a hundredth of the largest, or more.
LANCZOS_STEPS = 60

# Random signs that show the order of magnitude of the diagonal.
PROBES = 8

# Unknowns up to which all eigenvalues cost little more than those steps, and up to which they are looked at
# where the steps before took as many products as there are unknowns.
FEW, MANY = 250, 1000


def has_negative(values: Tensor, eps: float) -> bool:
    """Whether the lowest of ascending eigenvalues is negative beyond rounding."""
    return float(values[0]) < -math.sqrt(eps) * float(values.abs().max())


class Sight(NamedTuple):
    """What was seen of the curvature at a point.

    Attributes:
        kind: "positive", "flat", "negative" or "non_finite".
        products: With the curvature.
        line: A way down, where it is negative.
        newton: The stationary point of the model, where all eigenvalues were found.
    """

    kind: str
    products: int
    line: Line | None = None
    newton: Solution | None = None


def look_around(model: QuadraticModel, spent: int) -> Sight:
    """The signs of the eigenvalues, each variable in units in which its own curvature is one.

    Other units change no sign (Sylvester's law of inertia), but what rounding hides: along a variable whose
    curvature is small beside that of another, all of it.

    Args:
        model: Its curvature is multiplied.
        spent: Products that the steps before took: all eigenvalues may cost as much again.
    """
    n = model.gradient.numel()
    return _all(model) if n <= max(FEW, min(spent, MANY)) else _ends(model)


def _all(model: QuadraticModel) -> Sight:
    """By the matrix: ``n`` products."""
    n, H = model.gradient.numel(), model.curvature.dense()
    if not bool(H.isfinite().all()):
        return Sight("non_finite", n)
    frame = Frame(scale_by(H.diagonal(), None))
    g, scaled = frame.gradient(model.gradient), frame.gradient(frame.gradient(H).T)
    space = Formed(
        QuadraticModel(model.value, g, MatrixOperator(scaled, is_symmetric=True), norm(g)), Bound(bounded)
    )
    values, vector = space.values, space.lowest
    if has_negative(values, torch.finfo(H.dtype).eps):
        return Sight("negative", n, _down(model, frame.displacement(vector), float(values[0])))
    newton = space.newton()
    step = frame.displacement(newton.step)
    kind = "positive" if space.is_definite else "flat"
    return Sight(kind, n, newton=newton._replace(step=step, norm=float(step.norm())))


def _ends(model: QuadraticModel) -> Sight:
    """By a few Lanczos steps."""
    like, n = model.gradient, model.gradient.numel()
    generator = torch.Generator(like.device).manual_seed(0)
    start = torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
    if not bool((model.curvature @ start).isfinite().all()):
        return Sight("non_finite", 1)
    found = diagonal(model.curvature, num_products=PROBES, method="hutchinson", generator=generator)
    frame, eps = Frame(scale_by(found.estimate, None)), torch.finfo(like.dtype).eps
    scaled = frame.curvature(model.curvature)
    ends = eigsh(scaled, 2, which="BE", v0=start, max_iter=LANCZOS_STEPS, generator=generator)
    products = 1 + found.products + ends.products
    if has_negative(ends.values, eps):
        down = _down(model, frame.displacement(ends.vectors[:, 0]), float(ends.values[0]))
        return Sight("negative", products, down)
    is_flat = float(ends.values[0]) <= n * eps * float(ends.values[1])
    return Sight("flat" if is_flat else "positive", products)


def _down(model: QuadraticModel, direction: Tensor, curvature: float) -> Line:
    """Along a direction of any length, with the curvature for that length."""
    length = float(direction.norm())
    return Line(model, direction / length, curvature / length**2)


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
