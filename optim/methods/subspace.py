"""The space in which a step decides everything: its products are paid once, every damping or radius is free.

Forms: grown by products (``grown``), all of it where the matrix is formed (``formed``), and three vectors of
CG where memory for more is short (``truncated``). They differ in what they cost, and in nothing that the loop
sees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from secondorder.solvers.trust_region import minimise_diagonal

from .cubic import minimise_cubic


class Solution(NamedTuple):
    """A minimiser of the model, damped, within a radius or with a cubic term.

    Attributes:
        step: Shape (n,).
        linear: ``-gradient . step``.
        quadratic: ``step . B step``, without damping.
        norm: Euclidean norm of the step.
        status: Of the solver.
        shift: What is added to the curvature: the damping, the multiplier of the radius, or the weight of the
            cubic term times the length.
        earlier: Iterates before it, shortest first, that may be better where it is refused.
        coordinates: In the vectors that the curvature has multiplied, shape (k,); None where there are none.
        other: Another candidate of the same bound, which may be better; None for none.
    """

    step: Tensor
    linear: float
    quadratic: float
    norm: float
    status: str
    shift: float
    earlier: tuple[Tensor, ...] = ()
    coordinates: Tensor | None = None
    other: Solution | None = None

    def predicted(self, factor: float = 1.0) -> float:
        """The decrease that the model promises for ``factor`` times the step."""
        return factor * self.linear - 0.5 * factor * factor * self.quadratic

    @property
    def is_held_back(self) -> bool:
        """Whether damping or radius limits the step more than the curvature does."""
        return self.shift * self.norm**2 >= self.quadratic


class Subspace(Protocol):
    """Where the model is minimised.

    Attributes:
        is_free: Another damping or radius costs no product.
    """

    is_free: bool

    @property
    def products(self) -> int:
        """With the curvature, so far."""

    @property
    def seconds(self) -> float:
        """In those products, as the host sees them."""

    @property
    def size(self) -> int:
        """Dimension, so far; 0 where the first products are not finite."""

    def solve(self, size: float) -> Solution:
        """Minimise with damping ``size``, or within that radius."""

    def steepest(self) -> float:
        """Curvature along the gradient, ``g . B g / g . g``."""

    def least_damping(self) -> float:
        """Below it damping changes nothing, or is rounding; zero where that is not known."""


class Coordinates(NamedTuple):
    """Solution of a small dense problem in its eigenvectors.

    Attributes:
        values: Shape (k,).
        shift: As of a ``Solution``.
        status: "converged", "boundary", "hard_case" or "singular".
        gain: Decrease of what is minimised: of the model with damping or cubic term, or within the radius.
    """

    values: Tensor
    shift: float
    status: str
    gain: float


# Eigenvalues (k,), ascending; minus the gradient in their eigenvectors; damping, radius or weight; precision.
Diagonal = Callable[[Tensor, Tensor, float, torch.dtype], Coordinates]


class Bound(NamedTuple):
    """What keeps a step short.

    Attributes:
        minimise: The model, damped, within a radius or with a cubic term.
        reflected: Another candidate, where the model has negative curvature; None for none.
    """

    minimise: Diagonal
    reflected: Diagonal | None = None


def damped(values: Tensor, target: Tensor, damping: float, dtype: torch.dtype) -> Coordinates:
    """``(abs(B) + damping) y = target``: downhill along negative curvature too, as far as it is strong.

    Zero where that vanishes to rounding.

    Reference: Dauphin et al. (2014), Identifying and attacking the saddle point problem, for ``abs(B)``.
    """
    stiffness = values.abs() + damping
    y = torch.where(stiffness > _rounding(values, dtype), target / stiffness, 0.0)
    return Coordinates(y, damping, "converged", 0.5 * float(target @ y))


def bounded(values: Tensor, target: Tensor, radius: float, dtype: torch.dtype) -> Coordinates:
    """The least value of the model within the radius, hard case included."""
    y, shift, status, _ = minimise_diagonal(values, target, radius, _rounding(values, dtype), dtype)
    return Coordinates(y, shift, status, float(target @ y) - 0.5 * float((values * y * y).sum()))


def reflected(values: Tensor, target: Tensor, radius: float, dtype: torch.dtype) -> Coordinates:
    """The same with ``abs(B)``: one negative eigenvalue does not stiffen all directions.

    Reference: Dauphin et al. (2014), Identifying and attacking the saddle point problem.
    """
    order = values.abs().argsort()
    found = bounded(values.abs()[order], target[order], radius, dtype)
    return found._replace(values=torch.empty_like(target).index_copy_(0, order, found.values))


def cubic(values: Tensor, target: Tensor, weight: float, _: torch.dtype) -> Coordinates:
    """The least value of the model and ``weight norm(y)^3 / 3``, hard case included."""
    y, shift, status = minimise_cubic(values, target, weight)
    gain = float(target @ y) - 0.5 * float((values * y * y).sum()) - weight / 3 * float(y.norm()) ** 3
    return Coordinates(y, shift, status, gain)


def _rounding(values: Tensor, dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps * len(values) * float(values.abs().max())


DAMPED, WITHIN = Bound(damped), Bound(bounded, reflected)
CUBIC, SADDLE_FREE = Bound(cubic), Bound(reflected)


# Damping below this part of the smallest eigenvalue changes nothing, as measured, nor, where that is zero,
# does it below this part of the curvature along the gradient.
OF_LOWEST, OF_STEEPEST = 0.1, 1e-12


def least_damping(lowest: float, steepest: float) -> float:
    """Below it damping changes nothing, by the lowest eigenvalue and the curvature along the gradient."""
    return max(OF_LOWEST * lowest, OF_STEEPEST * abs(steepest))
