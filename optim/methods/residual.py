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

from secondorder.vectors.host import read

from .basis import uploaded
from .decomposition import RESOLUTION, Decomposition, decomposed
from .problem import QuadraticModel, Residuals
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
    def of(cls, vectors: list[Tensor], residuals: Residuals, found: Decomposition) -> tuple[Tensor, Aside]:
        """Of some, or none; and the target in coordinates, which is read with them."""
        if not vectors:
            (target,) = found.coordinates(residuals.target)
            none = target.new_zeros(0, len(target))
            return target, cls(none, none, target.new_zeros(0, 0))
        stacked = torch.stack(vectors)
        double = stacked.double()
        moved = [residuals.rows @ v for v in vectors]
        target, *moved, products = found.coordinates(residuals.target, *moved, beside=double @ double.T)
        return target, cls(stacked, torch.stack(moved), products)


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
        found, self._gap = decomposed(rows, damping, lambda A: _gap(model, residuals, A.T @ residuals.target))
        self.products = rows.passes
        self.seconds = time.perf_counter() - start
        self.size = 0 if found is None else min(rows.shape)
        if found is None:
            return
        aside = [v for v in (residuals.rest, before) if v is not None]
        self._found = found
        self._target, self._aside = Aside.of(aside, residuals, found)
        self.rank, self.projected = found.rank, found.projected(self._target)

    def agrees(self) -> bool:
        """Whether the residuals have the gradient of the model: it may have been clipped."""
        if self.size == 0:
            return False
        if not self._gap:
            self._gap = read(*_gap(self._model, self._residuals, self._found.pulled(self._target)))
        largest, part, size = self._gap
        rounding = torch.finfo(self._model.gradient.dtype).eps * math.sqrt(self._found.largest) * size
        gap = largest * part if 0 < largest < math.inf else largest
        return gap <= AGREEMENT * self._model.norm + RESOLUTION * rounding

    def solve(self, size: float) -> Solution:
        """Minimise with damping ``size``."""
        at = self._along(size)
        moved = self._moved(at)
        numbers = [moved @ self._target, moved @ moved, self._square(at)]
        if self._residuals.rest is not None:
            numbers += [self._aside.moved[0] @ at.a, self._aside.products[0] @ at.weights]
        linear, square, squared_length, *others = read(*numbers)
        linear, length = linear + sum(others), math.sqrt(max(squared_length, 0.0))
        quadratic = square + self._residuals.shift * length**2
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
        (coordinates,) = self._found.coordinates(bend)
        a = self._found.solved(-coordinates, at.d)
        bent = at._replace(a=at.a + a / 2)
        square, length = read(a @ self._found.times(a), self._square(bent))
        if not 2 * math.sqrt(max(square, 0.0)) <= largest * solution.norm:
            return None
        return solution._replace(step=self._step(bent), norm=math.sqrt(max(length, 0.0)))

    def steepest(self) -> float:
        """Curvature along the gradient."""
        # -gradient = A^T target + rest.
        whole = Along(1.0, self._weights(1.0, 0.0), self._target)
        moved, squared_length = read(self._moved(whole).square().sum(), self._square(whole))
        return moved / (math.sqrt(max(squared_length, 0.0)) ** 2 or 1.0) + self._residuals.shift

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

    def _square(self, at: Along) -> Tensor:
        """Of the length."""
        square = at.a @ self._found.times(at.a)
        if len(at.weights):
            square = square + at.weights @ (2 * self._aside.moved @ at.a + self._aside.products @ at.weights)
        return square

    def _moved(self, at: Along) -> Tensor:
        """``A step`` in coordinates."""
        moved = self._found.times(at.a)
        return moved + at.weights @ self._aside.moved if len(at.weights) else moved

    def _step(self, at: Along) -> Tensor:
        step = self._found.pulled(at.a)
        vectors = self._aside.vectors
        return torch.addmv(step, vectors.T, uploaded(at.weights, step)) if len(vectors) else step


def _gap(model: QuadraticModel, residuals: Residuals, pulled: Tensor) -> list[Tensor]:
    """How far the model is from having the gradient of the residuals, ``pulled`` and the rest, in numbers.

    The largest entry of the difference, its norm in units of that, and the norm of the target.
    """
    gap = model.gradient + pulled
    if residuals.rest is not None:
        gap = gap + residuals.rest
    largest = torch.linalg.vector_norm(gap, math.inf) if gap.numel() else gap.sum()
    # The squares may leave the range.
    return [largest, torch.linalg.vector_norm(gap / largest), residuals.target.norm()]
