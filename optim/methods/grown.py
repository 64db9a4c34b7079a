"""A space grown by products: generalised Davidson with the last step's space as preconditioner.

Reference: Davidson (1975), The iterative calculation of a few of the lowest eigenvalues; Morgan and Scott
(1986), Generalizations of Davidson's method. The stopping rule is measured (``tests/benchmarks``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .basis import Basis, uploaded
from .problem import QuadraticModel, norm
from .subspace import Bound, Coordinates, Diagonal, Solution, least_damping

# A residual below this, relative and squared, is lost in the products that it is a difference of.
RESOLUTION = 100.0
# A shift of which the quadratic form is this part of that of the curvature bounds no step.
NEGLIGIBLE = 1e-2


class Growth(NamedTuple):
    """When a space stops to grow.

    Attributes:
        gain: Stop where the last quarter of the products, two at least, gained less than this, each, of what
            a product gained on average.
        rtol: Stop where the residual is below this, relative to the gradient.
        max_size: Stop at this dimension.
        converges: Whether the model was right in the last step: where next to nothing bounds this one, only
            the residual stops it.
    """

    gain: float
    rtol: float
    max_size: int
    converges: bool = False


class Ritz(NamedTuple):
    """What is kept of a space: a preconditioner for the next.

    Attributes:
        vectors: Orthonormal Ritz vectors as rows, shape (k, n).
        values: Their Ritz values.
        rest: Curvature that is assumed across them.
    """

    vectors: Tensor
    values: Sequence[float]
    rest: float

    def precondition(self, r: Tensor, shift: float) -> Tensor:
        """``X^T (abs(T) + shift)^-1 X r + (I - X^T X) r / (rest + shift)``, times ``rest + shift``."""
        outside = max(self.rest + shift, torch.finfo(torch.float32).tiny)
        factors = [outside / max(abs(v) + shift, outside * 1e-12) - 1.0 for v in self.values]
        along = self.vectors @ r
        along *= uploaded(torch.tensor(factors, dtype=torch.float64, device="cpu"), r)
        return torch.addmv(r, self.vectors.T, along)


class Grown:
    """A space that grows by the residual of its solution, as far as that pays.

    It starts with the gradient, so that the residual of any solution in it is what ``B`` leads out of it.

    Args:
        model: Its gradient is not zero.
        bound: Damped, or within a radius.
        growth: When to stop.
        ritz: What the last space knew.
    """

    is_free = True

    def __init__(self, model: QuadraticModel, bound: Bound, growth: Growth, ritz: Ritz | None = None) -> None:
        self._bound, self._growth, self._ritz = bound, growth, ritz
        self._eps = torch.finfo(model.gradient.dtype).eps
        self._norm = model.norm
        self._basis = Basis(model.curvature, -model.gradient / self._norm, growth.max_size)

    @property
    def size(self) -> int:
        """Its dimension."""
        return self._basis.size

    @property
    def products(self) -> int:
        """That it cost."""
        return self._basis.products

    @property
    def seconds(self) -> float:
        """In products."""
        return self._basis.seconds

    def solve(self, size: float) -> Solution:
        """Grow until another product does not pay, and minimise there."""
        gains: dict[int, float] = {}
        while True:
            y, found = self._minimise(self._bound.minimise, size, self.size)
            gains[self.size] = found.gain
            if self._basis.end:
                return self._solution(y, found, size, self._basis.end)
            r = self._basis.outside(y)
            if status := self._stops(r, y, size, gains, found.shift):
                return self._solution(y, found, size, status)
            self._basis.add(r if self._ritz is None else self._ritz.precondition(r, found.shift))

    def steepest(self) -> float:
        """Curvature along the gradient."""
        return float(self._basis.H[0, 0])

    def least_damping(self) -> float:
        """Below it damping changes nothing."""
        return least_damping(float(self._basis.spectrum(self.size)[0][0]), self.steepest())

    def ritz(self) -> Ritz:
        """What the next space may know; this one grows no more."""
        self._ritz = None
        values, vectors = self._basis.spectrum(self.size)
        rest = abs(float(self._basis.H[self.size - 1, self.size - 1]))
        return Ritz(self._basis.combined(vectors.T), tuple(values.tolist()), rest)

    def _minimise(self, minimise: Diagonal, size: float, k: int) -> tuple[Tensor, Coordinates]:
        """In the first ``k`` directions: coordinates there, in units of the gradient's length."""
        values, vectors = self._basis.spectrum(k)
        # A product knows a direction of low curvature to its own precision, whatever the others are.
        found = minimise(values, self._norm * vectors[0], size, torch.float64)
        return vectors @ (found.values / self._norm), found

    def _stops(self, r: Tensor, y: Tensor, size: float, gains: dict[int, float], shift: float) -> str:
        """Why the space need not grow; empty where it shall."""
        k = self.size
        H, G = self._basis.H[:k, :k], self._basis.G[:k, :k]
        # The square of the residual, as a difference: no read.
        whole, inside = float(y @ G @ y), float((H @ y).square().sum())
        square, lost = whole - inside, RESOLUTION * self._eps * whole
        left = math.sqrt(square) if math.isfinite(square) and square > lost > 0 else norm(r)
        if left <= self._growth.rtol:
            return "converged"
        j = max(2, k // 4)
        # What is left of the system is left of the gradient.
        is_free = shift * float(y.square().sum()) <= NEGLIGIBLE * float(y @ H @ y)
        converges = self._growth.converges and is_free
        if not converges and k > max(j, 2):
            known = k - j in gains
            before = gains[k - j] if known else self._minimise(self._bound.minimise, size, k - j)[1].gain
            if (gains[k] - before) / j < self._growth.gain * gains[k] / (k + 2):
                return "enough"
        return ""

    def _solution(self, y: Tensor, found: Coordinates, size: float, status: str) -> Solution:
        solution, reflected = self._expanded(y, found, status), self._bound.reflected
        if reflected is None or not float(self._basis.spectrum(self.size)[0][0]) < 0:
            return solution
        other = self._minimise(reflected, size, self.size)
        return solution._replace(other=self._expanded(*other, status))

    def _expanded(self, y: Tensor, found: Coordinates, status: str) -> Solution:
        k, scale = self.size, self._norm
        return Solution(
            self._basis.combined(scale * y),
            scale * scale * float(y[0]),
            scale * scale * float(y @ self._basis.H[:k, :k] @ y),
            scale * float(y.norm()),
            status if found.status == "converged" else found.status,
            found.shift,
            coordinates=scale * y,
        )
