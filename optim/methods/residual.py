"""The space of residuals: where there are fewer of them than parameters, or the other way round, it is small.

``B = A^T A + shift I`` for a Jacobian ``A`` of residuals, shape (m, n). One decomposition, of ``A`` or of
``A A^T``, serves every damping.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch
from torch import Tensor

from .decomposition import RESOLUTION, Decomposition, decomposed
from .problem import QuadraticModel, Residuals, norm
from .subspace import Solution, least_damping

# A gradient that differs from that of the residuals by more than this, relative, is of something else.
AGREEMENT = 1e-3


class Aside(NamedTuple):
    """What solutions hold beside combinations of rows of ``A``.

    Attributes:
        vectors: As rows, shape (k, n), at most two.
        moved: ``A`` times each, in coordinates.
        products: Of each with each, shape (k, k).
    """

    vectors: Tensor
    moved: Tensor
    products: Tensor

    @classmethod
    def of(cls, vectors: list[Tensor], residuals: Residuals, found: Decomposition) -> Aside:
        """Of some, or none."""
        target = found.coordinates(residuals.target)
        stacked = torch.stack(vectors) if vectors else residuals.target.new_zeros(0, residuals.rows.shape[1])
        moved = [found.coordinates(residuals.rows @ v) for v in vectors]
        double = stacked.double()
        products = (double @ double.T).to(target)
        return cls(stacked, torch.stack(moved) if moved else target.new_zeros(0, len(target)), products)


class Along(NamedTuple):
    """A solution ``weights @ aside + A^T a``, for damping and shift ``d`` in all; ``a`` in coordinates."""

    d: float
    weights: Tensor
    a: Tensor


class Residual:
    """All of the space that residuals see.

    Args:
        model: Its gradient is not zero.
        residuals: The same model by residuals.
        damping: The first one; None where it is not known.
        before: What steps are damped towards, in place of zero, shape (n,).

    Attributes:
        size: Singular values; 0 where ``A`` is not finite.
        rank: Those beyond rounding; all of them where they are not known. Where ``size`` is not 0.
        projected: Length of what the columns of ``A`` can take from the target: zero at a stationary point.
        products: Backward passes that made ``A``, or its Gram matrix.
        seconds: In these, and the decomposition.
    """

    is_free = True

    def __init__(
        self,
        model: QuadraticModel,
        residuals: Residuals,
        damping: float | None = None,
        before: Tensor | None = None,
    ) -> None:
        self._residuals, self._model = residuals, model
        # The last size that was solved for.
        self._last: tuple[float, Along] | None = None
        rows, start = residuals.rows, time.perf_counter()
        found = decomposed(rows, damping)
        self.products = rows.passes
        self.seconds = time.perf_counter() - start
        self.size = 0 if found is None else min(rows.shape)
        if found is None:
            return
        self._found, self._target = found, found.coordinates(residuals.target)
        self.rank, self.projected = found.rank, found.projected(self._target)
        self._aside = Aside.of([v for v in (residuals.rest, before) if v is not None], residuals, found)

    def agrees(self) -> bool:
        """Whether the residuals have the gradient of the model: it may have been clipped."""
        if self.size == 0:
            return False
        gradient = self._model.gradient + self._found.pulled(self._target)
        if self._residuals.rest is not None:
            gradient = gradient + self._residuals.rest
        size = math.sqrt(self._found.largest) * float(self._residuals.target.norm())
        rounding = torch.finfo(gradient.dtype).eps * size
        return norm(gradient) <= AGREEMENT * self._model.norm + RESOLUTION * rounding

    def solve(self, size: float) -> Solution:
        """Minimise with damping ``size``."""
        at = self._along(size)
        moved, length = self._moved(at), self._length(at)
        linear = float(moved @ self._target)
        if self._residuals.rest is not None:
            linear += float(self._aside.moved[0] @ at.a) + float(self._aside.products[0] @ at.weights)
        quadratic = float(moved @ moved) + self._residuals.shift * length**2
        return Solution(self._step(at), linear, quadratic, length, "converged", size)

    def moved(self, size: float) -> Tensor:
        """``A step`` for the solution with damping ``size``, shape (m,)."""
        return self._found.expanded(self._moved(self._along(size)))

    def bent(self, solution: Solution, bend: Tensor, largest: float) -> Solution | None:
        """A solution with half of what answers a second derivative of the residuals along it.

        Args:
            solution: Of this space.
            bend: That derivative, shape (m,).
            largest: None where twice the answer is more than this times as long as the step.
        """
        at = self._along(solution.shift)
        a = self._found.solved(-self._found.coordinates(bend), at.d)
        square = float(a @ self._found.times(a))
        if not 2 * math.sqrt(max(square, 0.0)) <= largest * solution.norm:
            return None
        bent = at._replace(a=at.a + a / 2)
        return solution._replace(step=self._step(bent), norm=self._length(bent))

    def steepest(self) -> float:
        """Curvature along the gradient."""
        # -gradient = A^T target + rest.
        whole = Along(1.0, self._weights(1.0, 0.0), self._target)
        square = self._length(whole) ** 2
        return float(self._moved(whole).square().sum()) / (square or 1.0) + self._residuals.shift

    def least_damping(self) -> float:
        """Below it damping changes nothing."""
        # What is left of the gradient beyond the residuals only damping holds back.
        lowest = self._found.smallest if len(self._aside.vectors) == 0 else 0.0
        return least_damping(lowest + self._residuals.shift, self.steepest() if lowest == 0 else 0.0)

    def _along(self, size: float) -> Along:
        if self._last is None or self._last[0] != size:
            d, target, weights = size + self._residuals.shift, self._target, self._target[:0]
            if len(self._aside.vectors):
                weights = self._weights(1 / d, size / d)
                target = target - weights @ self._aside.moved
            self._last = size, Along(d, weights, self._found.solved(target, d))
        return self._last[1]

    def _weights(self, rest: float, before: float) -> Tensor:
        """Of what is beside combinations of rows."""
        both = [rest] if self._residuals.rest is not None else []
        return self._target.new_tensor((both + [before])[: len(self._aside.vectors)])

    def _length(self, at: Along) -> float:
        square = at.a @ self._found.times(at.a)
        if len(at.weights):
            square = square + at.weights @ (2 * self._aside.moved @ at.a + self._aside.products @ at.weights)
        return math.sqrt(max(float(square), 0.0))

    def _moved(self, at: Along) -> Tensor:
        """``A step`` in coordinates."""
        moved = self._found.times(at.a)
        return moved + at.weights @ self._aside.moved if len(at.weights) else moved

    def _step(self, at: Along) -> Tensor:
        step = self._found.pulled(at.a)
        vectors = self._aside.vectors
        return torch.addmv(step, vectors.T, at.weights.to(step)) if len(vectors) else step
