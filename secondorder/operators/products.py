"""What makes a linear operator: products with vectors and blocks, and the matrix that they add up to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from secondorder.solvers._probes import identity_blocks


class Products(ABC):
    """A linear map from vectors of shape ``(n,)`` to vectors of shape ``(m,)``, by its products.

    Attributes: see ``LinearOperator``, which adds the algebra.
    """

    is_symmetric = True

    # Whether complex vectors are pairs of real numbers to it.
    _is_real_linear = False

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        self.dtype = dtype
        self.device = device

    @abstractmethod
    def _matvec(self, v: Tensor) -> Tensor:
        """The product with one vector of shape (n,), checked before."""

    def _matmat(self, V: Tensor) -> Tensor:
        """The product with a block of shape (n, k), checked before."""
        return torch.stack([self._matvec(v) for v in V.T], dim=1)

    def _rmatvec(self, u: Tensor) -> Tensor:
        """The product of the transpose with one vector of shape (m,), checked before."""
        if self.is_symmetric:
            return self._matvec(u)
        raise NotImplementedError(f"{type(self).__name__} has no transpose; give it a method _rmatvec.")

    def _rmatmat(self, U: Tensor) -> Tensor:
        """The product of the transpose with a block of shape (m, k), checked before."""
        if self.is_symmetric:
            return self._matmat(U)
        return torch.stack([self._rmatvec(u) for u in U.T], dim=1)

    def _times_transposed(self, u: Tensor) -> Tensor:
        return self._rmatvec(u) if u.ndim == 1 else self._rmatmat(u)

    def dense(self, chunk_size: int = 128) -> Tensor:
        """The matrix, shape (m, n): ``n`` products, ``chunk_size`` at a time."""
        columns = [self._matmat(basis) for basis in self._basis(chunk_size)]
        if not columns:
            return torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        return torch.cat(columns, dim=1)

    def diagonal(self, chunk_size: int = 128) -> Tensor:
        """The diagonal of a square operator, shape (n,): ``n`` products, ``chunk_size`` at a time.

        Raises:
            ValueError: the operator is not square.
        """
        self._require_square("diagonal")
        parts = [(basis * self._matmat(basis)).sum(0) for basis in self._basis(chunk_size)]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=self.dtype, device=self.device)

    def _basis(self, chunk_size: int) -> Iterator[Tensor]:
        """The identity, ``chunk_size`` columns at a time."""
        if self._is_real_linear:
            raise TypeError(
                "for complex parameters the map is linear over the real numbers only, and has no complex"
                " matrix; use torch.view_as_real."
            )
        if not (isinstance(chunk_size, int) and chunk_size >= 1):
            raise ValueError(f"chunk_size must be a positive integer, got {chunk_size!r}.")
        like = torch.empty((), dtype=self.dtype, device=self.device).expand(self.shape[1])
        return (basis for _, basis in identity_blocks(like, chunk_size))

    def _require_square(self, what: str) -> None:
        if self.shape[0] != self.shape[1]:
            raise ValueError(f"{what} needs a square operator, got shape {self.shape}.")

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape}, dtype={self.dtype}, device={self.device})"
