"""An orthonormal basis with its products, grown one direction at a time."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from secondorder import LinearOperator
from secondorder.vectors.host import listed

# A direction of which a second orthogonalisation leaves less is rounding ("twice is enough", Parlett 1980).
INDEPENDENT = 0.5
FIRST_CAPACITY = 16


class Basis:
    """``V``, ``B V``, ``V^T B V`` and ``(B V)^T B V``. One product and one host read a direction.

    Args:
        B: Symmetric operator.
        first: A direction, shape (n,).
        max_size: Directions that may be added.

    Attributes:
        size: Directions, ``k``; 0 where the first product was not finite.
        products: That were made.
        seconds: In them.
        end: Why no direction can be added: "converged", as none is left that would not be rounding,
            "non_finite", as the last product was not finite, or "max_iter"; empty while one can.
        H: ``V^T B V`` and more, on the host in double precision, at least (k, k).
        G: ``(B V)^T B V`` likewise.
    """

    def __init__(self, B: LinearOperator, first: Tensor, max_size: int) -> None:
        self._B, self._max_size = B, min(max_size, first.numel())
        capacity = min(FIRST_CAPACITY, self._max_size)
        # As rows.
        self._V, self._W = (first.new_empty(capacity, first.numel()) for _ in range(2))
        self.H, self.G = (
            torch.zeros(capacity, capacity, dtype=torch.float64, device="cpu") for _ in range(2)
        )
        self._eigen: dict[int, tuple[Tensor, Tensor]] = {}
        self.size = self.products = 0
        self.seconds = 0.0
        self.end = ""
        self.add(first)

    def add(self, t: Tensor) -> None:
        """Another direction, made orthogonal to the others, and its product."""
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
        known = listed(torch.cat([V @ W[k], W @ W[k], lengths]))
        column, square, (once_length, length) = known[: k + 1], known[k + 1 : 2 * k + 2], known[-2:]
        is_finite = all(map(math.isfinite, column))
        if not is_finite or (k and not length > INDEPENDENT * once_length):
            self.end = "converged" if is_finite else "non_finite"
            return
        for matrix, entries in ((self.H, column), (self.G, square)):
            matrix[k, : k + 1] = matrix[: k + 1, k] = torch.tensor(entries, dtype=torch.float64, device="cpu")
        self.size = k + 1
        if self.size >= self._max_size:
            self.end = "converged" if self.size == t.numel() else "max_iter"

    def spectrum(self, k: int) -> tuple[Tensor, Tensor]:
        """Eigenvalues, ascending, and eigenvectors of ``V^T B V`` in the first ``k`` directions."""
        if k not in self._eigen:
            self._eigen[k] = torch.linalg.eigh(self.H[:k, :k])  # waits: for nothing, it is on the host
        return self._eigen[k]

    def combined(self, y: Tensor) -> Tensor:
        """``V y``, shape (n,); of a matrix (j, k) of coordinates its rows, shape (j, n)."""
        return uploaded(y, self._V) @ self._V[: self.size]

    def outside(self, y: Tensor) -> Tensor:
        """What ``B V y`` has outside of the space, shape (n,)."""
        k = self.size
        both = uploaded(torch.stack([self.H[:k, :k] @ y, y]), self._V)
        return torch.addmv(self._W[:k].T @ both[1], self._V[:k].T, both[0], alpha=-1.0)

    def _reserve(self, size: int) -> None:
        capacity = len(self._V)
        if size <= capacity:
            return
        more = max(min(2 * capacity, self._max_size), size) - capacity
        self._V, self._W = (torch.cat([M, M.new_empty(more, M.shape[1])]) for M in (self._V, self._W))
        self.H, self.G = (torch.nn.functional.pad(M, (0, more, 0, more)) for M in (self.H, self.G))


def uploaded(small: Tensor, like: Tensor) -> Tensor:
    """A small tensor of the host on the device, in the dtype there; the host does not wait."""
    return small.to(device=like.device, dtype=like.dtype, non_blocking=True)
