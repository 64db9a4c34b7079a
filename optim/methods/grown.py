"""A space grown by products: generalised Davidson with the last step's space as preconditioner.

Reference: Davidson (1975), The iterative calculation of a few of the lowest eigenvalues; Morgan and Scott
(1986), Generalizations of Davidson's method. The stopping rule is measured (DESIGN, METHODS 12.1).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from optim.methods.problem import QuadraticModel
from optim.methods.subspace import Bound, Coordinates, Diagonal, Solution

# A residual below this, relative and squared, is lost in the products that it is a difference of.
RESOLUTION = 100.0
# A direction of which a second orthogonalisation leaves less is rounding ("twice is enough", Parlett 1980).
INDEPENDENT = 0.5


class Growth(NamedTuple):
    """When a space stops to grow.

    Attributes:
        gain: Stop where the last quarter of the products, two at least, gained less than this, each, of what
            a product gained on average.
        rtol: Stop where the residual is below this, relative to the gradient.
        max_size: Stop at this dimension.
    """

    gain: float
    rtol: float
    max_size: int


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
        along *= torch.tensor(factors, dtype=r.dtype).to(r.device, non_blocking=True)
        return torch.addmv(r, self.vectors.T, along)


class Grown:
    """``V``, ``B V`` and ``V^T B V``; grows by the residual of the solution, as far as that pays.

    ``V`` starts with the gradient, so that the residual of any solution in the space is what ``B`` leads out
    of it. One host read a product.

    Args:
        model: Its gradient is not zero.
        bound: Damped, or within a radius.
        growth: When to stop.
        ritz: What the last space knew.
    """

    is_free = True

    def __init__(self, model: QuadraticModel, bound: Bound, growth: Growth, ritz: Ritz | None = None) -> None:
        self._B, self._bound, self._growth, self._ritz = model.curvature, bound, growth, ritz
        b = -model.gradient
        self._dtype = b.dtype
        self._norm = norm(b)
        capacity = min(16, growth.max_size)
        self._V, self._W = b.new_empty(capacity, len(b)), b.new_empty(capacity, len(b))
        # On the host, in double precision: V B V^T and (B V) (B V)^T.
        self._H = torch.zeros(capacity, capacity, dtype=torch.float64)
        self._G = torch.zeros(capacity, capacity, dtype=torch.float64)
        self._eigen: dict[int, tuple[Tensor, Tensor]] = {}
        self.size = self.products = 0
        self.seconds = 0.0
        self._is_full = False
        self._add(b / self._norm)

    def solve(self, size: float) -> Solution:
        """Grow until another product does not pay, and minimise there."""
        gains: dict[int, float] = {}
        while True:
            y, found = self._minimise(size, self.size)
            gains[self.size] = found.gain
            r = None if self._is_full else self._residual(y)
            status = self._stops(r, y, size, gains)
            if status or r is None:
                return self._solution(y, found, size, status or "max_iter")
            self._add(r if self._ritz is None else self._ritz.precondition(r, found.shift))

    def steepest(self) -> float:
        """Curvature along the gradient."""
        return float(self._H[0, 0])

    def lowest(self) -> float:
        """The smallest Ritz value, not below zero."""
        return max(float(self._spectrum(self.size)[0][0]), 0.0)

    def ritz(self) -> Ritz:
        """What the next space may know."""
        values, vectors = self._spectrum(self.size)
        X = vectors.T.to(self._V) @ self._V[: self.size]
        return Ritz(X, tuple(values.tolist()), abs(float(self._H[self.size - 1, self.size - 1])))

    def _spectrum(self, k: int) -> tuple[Tensor, Tensor]:
        if k not in self._eigen:
            self._eigen[k] = torch.linalg.eigh(self._H[:k, :k])
        return self._eigen[k]

    def _minimise(self, size: float, k: int) -> tuple[Tensor, Coordinates]:
        """In the first ``k`` directions: coordinates there, in units of the gradient's length."""
        return self._coordinates(self._bound.minimise, size, k)

    def _coordinates(self, minimise: Diagonal, size: float, k: int) -> tuple[Tensor, Coordinates]:
        values, vectors = self._spectrum(k)
        # A product knows a direction of low curvature to its own precision, whatever the others are.
        found = minimise(values, self._norm * vectors[0], size, torch.float64)
        return vectors @ (found.values / self._norm), found

    def _residual(self, y: Tensor) -> Tensor:
        """What ``B`` leads out of the space, minus: ``V^T H y - W^T y``, shape (n,)."""
        k = self.size
        both = torch.stack([self._H[:k, :k] @ y, -y]).to(self._V)
        return torch.addmv(self._V[:k].T @ both[0], self._W[:k].T, both[1])

    def _stops(self, r: Tensor | None, y: Tensor, size: float, gains: dict[int, float]) -> str:
        """Why the space need not grow; empty where it shall."""
        k = self.size
        if r is None:
            return ""
        Hy = self._H[:k, :k] @ y
        whole = float(y @ self._G[:k, :k] @ y)
        square = whole - float(Hy @ Hy)
        lost = RESOLUTION * torch.finfo(self._dtype).eps * whole
        left = math.sqrt(square) if math.isfinite(square) and square > lost > 0 else norm(r)
        if left <= self._growth.rtol:
            return "converged"
        j = max(2, k // 4)
        if k > max(j, 2):
            before = gains[k - j] if k - j in gains else self._minimise(size, k - j)[1].gain
            if (gains[k] - before) / j < self._growth.gain * gains[k] / (k + 2):
                return "stopped"
        return ""

    def _solution(self, y: Tensor, found: Coordinates, size: float, status: str) -> Solution:
        solution = self._expanded(y, found, status)
        if self._bound.reflected is None or not float(self._spectrum(self.size)[0][0]) < 0:
            return solution
        other = self._coordinates(self._bound.reflected, size, self.size)
        return solution._replace(other=self._expanded(*other, status))

    def _expanded(self, y: Tensor, found: Coordinates, status: str) -> Solution:
        k, scale = self.size, self._norm
        return Solution(
            (scale * y).to(self._V) @ self._V[:k],
            scale * scale * float(y[0]),
            scale * scale * float(y @ self._H[:k, :k] @ y),
            scale * float(y.norm()),
            status if found.status == "converged" else found.status,
            found.shift,
        )

    def _add(self, t: Tensor) -> None:
        """Another direction, orthogonal to the others, and its product."""
        k = self.size
        self._reserve(k + 1)
        V, W = self._V[: k + 1], self._W[: k + 1]
        once = t
        for _ in range(2 if k else 0):
            once, t = t, torch.addmv(t, V[:k].T, V[:k] @ t, alpha=-1.0)
        lengths = torch.stack([torch.linalg.vector_norm(once), torch.linalg.vector_norm(t)])
        torch.div(t, lengths[1], out=V[k])
        start = time.perf_counter()
        W[k] = self._B @ V[k]
        self.products += 1
        self.seconds += time.perf_counter() - start
        read = torch.cat([V @ W[k], W @ W[k], lengths]).tolist()
        column, square, (first, second) = read[: k + 1], read[k + 1 : 2 * k + 2], read[-2:]
        is_finite = all(map(math.isfinite, column))
        if not is_finite or (k and not second > INDEPENDENT * first):
            # Nothing but rounding is left to add, or nothing at all.
            self._is_full = True
            return
        for matrix, entries in ((self._H, column), (self._G, square)):
            matrix[k, : k + 1] = matrix[: k + 1, k] = torch.tensor(entries, dtype=torch.float64)
        self.size = k + 1
        self._is_full = self.size >= min(self._growth.max_size, t.numel())

    def _reserve(self, size: int) -> None:
        capacity = len(self._V)
        if size <= capacity:
            return
        more = min(2 * capacity, max(self._growth.max_size, size)) - capacity
        self._V, self._W = (torch.cat([M, M.new_empty(more, M.shape[1])]) for M in (self._V, self._W))
        self._H, self._G = (torch.nn.functional.pad(M, (0, more, 0, more)) for M in (self._H, self._G))


def norm(v: Tensor) -> float:
    """Euclidean norm of a vector whose squares may leave the range."""
    largest = float(torch.linalg.vector_norm(v, math.inf))
    if not 0 < largest < math.inf:
        return largest
    return largest * float(torch.linalg.vector_norm(v / largest))
