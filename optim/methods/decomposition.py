"""``A A^T`` of a Jacobian of residuals: its inverse for any damping, from singular values or by factoring."""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from .forms import LARGE
from .problem import Rows

# Units of rounding to which A A^T is known: below that damping needs the singular values of A itself.
RESOLUTION = 100.0


class Decomposition(Protocol):
    """``K = A A^T`` in coordinates of the residuals.

    Attributes:
        largest: At least the largest eigenvalue, and not much more.
        smallest: The smallest that is not rounding; 0 where it is not known.
        rank: Those that are not rounding; all where that is not known.
    """

    largest: float
    smallest: float
    rank: int

    def projected(self, b: Tensor) -> float:
        """Length of a vector's part in the range of ``A``, for coordinates ``b``."""

    def coordinates(self, u: Tensor) -> Tensor:
        """Of a vector of residuals, shape (m,)."""

    def expanded(self, a: Tensor) -> Tensor:
        """The vector of residuals with these coordinates."""

    def times(self, a: Tensor) -> Tensor:
        """``K a``."""

    def solved(self, b: Tensor, d: float) -> Tensor:
        """``(K + d)^-1 b``, zero where residuals see nothing."""

    def pulled(self, a: Tensor) -> Tensor:
        """``A^T a``, shape (n,)."""


class SingularValues:
    """Of a matrix, by the triangular factor of its tall side; coordinates are on the host."""

    def __init__(self, A: Tensor) -> None:
        m, n = A.shape
        Q, R = torch.linalg.qr(A if m >= n else A.T)
        # A = Q U S V^T, or V S U^T Q^T.
        U, self._s, Vt = torch.linalg.svd(R, full_matrices=False)
        self._left, self._right = (Q @ U, Vt.T) if m >= n else (Vt.T, Q @ U)
        host = self._s.double().cpu()
        # They fall: those that are not rounding come first.
        self.rank = int((host > torch.finfo(A.dtype).eps * max(m, n) * host[0]).sum())
        host[self.rank :] = 0.0
        self._squares = host.square()
        self.largest = float(self._squares[0])
        self.smallest = float(self._squares[self.rank - 1]) if self.rank else 0.0

    def projected(self, b: Tensor) -> float:
        """By what is seen."""
        return float(b[: self.rank].norm())

    def coordinates(self, u: Tensor) -> Tensor:
        """By left singular vectors."""
        return (self._left.T @ u).double().cpu()

    def expanded(self, a: Tensor) -> Tensor:
        """Their combination."""
        return self._left @ a.to(self._left)

    def times(self, a: Tensor) -> Tensor:
        """By squares."""
        return self._squares * a

    def solved(self, b: Tensor, d: float) -> Tensor:
        """Entry by entry."""
        solution = torch.zeros_like(b)
        torch.div(b[: self.rank], self._squares[: self.rank] + d, out=solution[: self.rank])
        return solution

    def pulled(self, a: Tensor) -> Tensor:
        """By right singular vectors."""
        return self._right @ (self._s * a.to(self._s))


class Triangular:
    """The triangular factor of a tall matrix ``A = Q R``: a twentieth of the time that singular values take.

    Each damping is a Cholesky factor of ``R R^T + d``; none, or next to none, two triangular solves.
    """

    smallest = 0.0

    def __init__(self, Q: Tensor, R: Tensor) -> None:
        self._Q, self._R, self.rank = Q, R, len(R)
        self.largest = float(torch.linalg.matrix_norm(R)) ** 2
        self._gram = R @ R.T
        self._last: tuple[float, Tensor] | None = None

    def coordinates(self, u: Tensor) -> Tensor:
        """By the columns of ``Q``."""
        return self._Q.T @ u

    def expanded(self, a: Tensor) -> Tensor:
        """Their combination."""
        return self._Q @ a

    def projected(self, b: Tensor) -> float:
        """All of it."""
        return float(b.norm())

    def times(self, a: Tensor) -> Tensor:
        """Twice by the factor."""
        return self._R @ (self._R.T @ a)

    def solved(self, b: Tensor, d: float) -> Tensor:
        """By Cholesky's factor, kept for the next, or by ``R`` itself where damping is rounding."""
        if d <= RESOLUTION * torch.finfo(b.dtype).eps * self.largest:
            half = torch.linalg.solve_triangular(self._R, b.unsqueeze(1), upper=True)
            return torch.linalg.solve_triangular(self._R.T, half, upper=False)[:, 0]
        if self._last is None or self._last[0] != d:
            shifted = self._gram.clone()
            shifted.diagonal().add_(d)
            self._last = d, torch.linalg.cholesky_ex(shifted).L
        return torch.cholesky_solve(b.unsqueeze(1), self._last[1])[:, 0]

    def pulled(self, a: Tensor) -> Tensor:
        """By the factor."""
        return self._R.T @ a


class GramMatrix:
    """``K`` itself, factored for each damping: a third of ``m^3``, where its eigenvalues take five times."""

    smallest = 0.0

    def __init__(self, K: Tensor, rows: Rows) -> None:
        self._K, self._rows, self.rank = K, rows, len(K)
        self.largest = float(torch.linalg.matrix_norm(K))
        self._last: tuple[float, Tensor] | None = None

    def projected(self, b: Tensor) -> float:
        """All of it."""
        return float(b.norm())

    def coordinates(self, u: Tensor) -> Tensor:
        """Itself."""
        return u

    def expanded(self, a: Tensor) -> Tensor:
        """Itself."""
        return a

    def times(self, a: Tensor) -> Tensor:
        """A product."""
        return self._K @ a

    def solved(self, b: Tensor, d: float) -> Tensor:
        """By Cholesky's factor, kept for the next; by eigenvalues where rounding leaves none."""
        if self._last is None or self._last[0] != d:
            shifted = self._K.clone()
            shifted.diagonal().add_(d)
            factor, info = torch.linalg.cholesky_ex(shifted)
            if bool(info):
                values, vectors = self._eigen
                return vectors @ ((vectors.T @ b) / (values.clamp(min=0) + d))
            self._last = d, factor
        return torch.cholesky_solve(b.unsqueeze(1), self._last[1])[:, 0]

    def pulled(self, a: Tensor) -> Tensor:
        """A backward pass."""
        return self._rows.T @ a

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self._K)
        return values, vectors


def decomposed(rows: Rows, damping: float | None) -> Decomposition | None:
    """That of a Jacobian, good for this damping where it is known; None where it is not finite."""
    is_wide = rows.shape[0] < rows.shape[1] and (rows.shape[0] > LARGE or not rows.fits)
    matrix = rows.gram() if is_wide else rows.dense()
    if not bool(matrix.isfinite().all()):
        return None
    if not is_wide:
        return _of_tall(matrix) if LARGE < matrix.shape[1] <= matrix.shape[0] else SingularValues(matrix)
    found = GramMatrix(matrix, rows)
    resolution = RESOLUTION * torch.finfo(matrix.dtype).eps * found.largest
    if damping is not None and damping < resolution and rows.fits:
        return SingularValues(rows.dense())
    return found


def _of_tall(A: Tensor) -> Triangular | SingularValues:
    """By its triangular factor, unless that is so near to singular that damping is lost in its square."""
    Q, R = torch.linalg.qr(A)
    diagonal = R.diagonal().abs()
    is_regular = float(diagonal.min()) > RESOLUTION * torch.finfo(A.dtype).eps ** 0.5 * float(diagonal.max())
    return Triangular(Q, R) if is_regular else SingularValues(A)
