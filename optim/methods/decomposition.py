"""``A A^T`` of a Jacobian of residuals: its inverse for any damping, from singular values or by factoring."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from secondorder.vectors.host import fetched, is_true, read, waits

from .basis import uploaded
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

    def coordinates(self, *vectors: Tensor, beside: Tensor | None = None) -> list[Tensor]:
        """Of vectors of residuals, shape (m,); and last what else is to be where coordinates are."""

    def expanded(self, a: Tensor) -> Tensor:
        """The vector of residuals with these coordinates."""

    def times(self, a: Tensor) -> Tensor:
        """``K a``."""

    def solved(self, b: Tensor, d: float) -> Tensor:
        """``(K + d)^-1 b``, zero where residuals see nothing."""

    def pulled(self, a: Tensor) -> Tensor:
        """``A^T a``, shape (n,)."""


class SingularValues:
    """Of a matrix, by the triangular factor of its tall side; coordinates are on the host.

    Args:
        shape: Of the matrix.
        Q: Orthonormal columns.
        R: The triangular factor, on the host, where the small algebra is.
    """

    def __init__(self, shape: torch.Size, Q: Tensor, R: Tensor) -> None:
        m, n = shape
        # A = Q U S V^T, or V S U^T Q^T.
        U, self._s, Vt = torch.linalg.svd(R, full_matrices=False)  # waits: for nothing, it is on the host
        U, V = uploaded(U, Q), uploaded(Vt.T, Q)
        self._left, self._right = (Q @ U, V) if m >= n else (V, Q @ U)
        host = self._s.double()
        # They fall: those that are not rounding come first.
        self.rank = int((host > torch.finfo(Q.dtype).eps * max(m, n) * host[0]).sum())
        host[self.rank :] = 0.0
        self._squares = host.square()
        self.largest = float(self._squares[0])
        self.smallest = float(self._squares[self.rank - 1]) if self.rank else 0.0

    def projected(self, b: Tensor) -> float:
        """By what is seen."""
        return float(b[: self.rank].norm())

    def coordinates(self, *vectors: Tensor, beside: Tensor | None = None) -> list[Tensor]:
        """By left singular vectors: one read for all."""
        along = torch.stack([self._left.T @ u for u in vectors]).double()
        if beside is None:
            return list(fetched(along))
        both = fetched(torch.cat([along.flatten(), beside.double().flatten()]))
        return [*both[: along.numel()].view(along.shape), both[along.numel() :].view(beside.shape)]

    def expanded(self, a: Tensor) -> Tensor:
        """Their combination."""
        return self._left @ uploaded(a, self._left)

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
        return self._right @ uploaded(self._s * a.to(self._s), self._right)


class Triangular:
    """The triangular factor of a tall matrix ``A = Q R``: a twentieth of the time that singular values take.

    Each damping is a Cholesky factor of ``R R^T + d``; none, or next to none, two triangular solves.
    """

    smallest = 0.0

    def __init__(self, Q: Tensor, R: Tensor, norm: float) -> None:
        self._Q, self._R, self.rank = Q, R, len(R)
        self.largest = norm**2
        self._gram = R @ R.T
        self._last: tuple[float, Tensor] | None = None

    def coordinates(self, *vectors: Tensor, beside: Tensor | None = None) -> list[Tensor]:
        """By the columns of ``Q``."""
        return [self._Q.T @ u for u in vectors] + ([] if beside is None else [beside.to(self._Q)])

    def expanded(self, a: Tensor) -> Tensor:
        """Their combination."""
        return self._Q @ a

    def projected(self, b: Tensor) -> float:
        """All of it."""
        return read(b.norm())[0]

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

    def __init__(self, K: Tensor, rows: Rows, norm: float) -> None:
        self._K, self._rows, self.rank = K, rows, len(K)
        self.largest = norm
        self._last: tuple[float, Tensor] | None = None

    def projected(self, b: Tensor) -> float:
        """All of it."""
        return read(b.norm())[0]

    def coordinates(self, *vectors: Tensor, beside: Tensor | None = None) -> list[Tensor]:
        """Themselves."""
        return [*vectors] + ([] if beside is None else [beside.to(self._K)])

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
            if is_true(info):
                values, vectors = self._eigen
                return vectors @ ((vectors.T @ b) / (values.clamp(min=0) + d))
            self._last = d, factor
        return torch.cholesky_solve(b.unsqueeze(1), self._last[1])[:, 0]

    def pulled(self, a: Tensor) -> Tensor:
        """A backward pass."""
        return self._rows.T @ a

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        waits(self._K)
        values, vectors = torch.linalg.eigh(self._K)  # waits: once, where rounding leaves no factor
        return values, vectors


def decomposed(
    rows: Rows, damping: float | None, beside: Callable[[Tensor], list[Tensor]]
) -> tuple[Decomposition | None, list[float]]:
    """That of a Jacobian, good for this damping where it is known; None where it is not finite.

    Args:
        rows: The Jacobian.
        damping: None where it is not known.
        beside: Numbers that are wanted of the matrix, if it is formed: read with the others, else not.
    """
    if rows.shape[0] < rows.shape[1] and (rows.shape[0] > LARGE or not rows.fits):
        return _of_gram(rows, damping), []
    matrix = rows.dense()
    if LARGE < matrix.shape[1] <= matrix.shape[0]:
        return _of_tall(matrix, beside(matrix))
    return _of_small(matrix, beside(matrix))


def _of_gram(rows: Rows, damping: float | None) -> Decomposition | None:
    K = rows.gram()
    is_finite, norm = read(K.isfinite().all(), torch.linalg.matrix_norm(K))
    if not is_finite:
        return None
    if damping is not None and damping < RESOLUTION * torch.finfo(K.dtype).eps * norm and rows.fits:
        return _of_small(rows.dense(), [])[0]
    return GramMatrix(K, rows, norm)


def _of_small(A: Tensor, beside: list[Tensor]) -> tuple[SingularValues | None, list[float]]:
    """By the singular values of its triangular factor, which comes to the host with the numbers beside."""
    Q, R = torch.linalg.qr(A if A.shape[0] >= A.shape[1] else A.T)
    known = fetched(torch.cat([R.flatten(), *(number.to(R).reshape(1) for number in beside)]))
    R = known[: R.numel()].view(R.shape)
    numbers: list[float] = known[R.numel() :].tolist()
    # A column that is not finite has a norm that is not.
    return (SingularValues(A.shape, Q, R) if bool(R.isfinite().all()) else None), numbers


def _of_tall(A: Tensor, beside: list[Tensor]) -> tuple[Decomposition | None, list[float]]:
    """By its triangular factor, unless that is so near to singular that damping is lost in its square."""
    Q, R = torch.linalg.qr(A)
    diagonal = R.diagonal().abs()
    own = [R.isfinite().all(), diagonal.min(), diagonal.max(), torch.linalg.matrix_norm(R)]
    is_finite, least, most, norm, *numbers = read(*own, *beside)
    if not is_finite:
        return None, numbers
    if least > RESOLUTION * torch.finfo(A.dtype).eps ** 0.5 * most:
        return Triangular(Q, R, norm), numbers
    return _of_small(A, [])[0], numbers
