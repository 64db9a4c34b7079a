"""Operators from a matrix and from a function."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from secondorder.operators.linear import LinearOperator
from secondorder.solvers import Spectrum, spectrum
from secondorder.solvers._checks import looks_symmetric

Product = Callable[[Tensor], Tensor]


class MatrixOperator(LinearOperator):
    """An operator from a matrix.

    Args:
        matrix: Shape (m, n).
        is_symmetric: Whether it is; looked at when None, up to ``sqrt(eps)`` of the largest entry.

    Attributes:
        spectrum: Its eigendecomposition, where it is symmetric, computed once, when first asked for.

    Example:
        >>> A = MatrixOperator(torch.tensor([[2.0, 0.0], [0.0, 3.0]]))
        >>> A @ torch.ones(2)
        tensor([2., 3.])
    """

    def __init__(self, matrix: Tensor, is_symmetric: bool | None = None) -> None:
        if not isinstance(matrix, Tensor) or matrix.ndim != 2:
            shape = tuple(matrix.shape) if isinstance(matrix, Tensor) else type(matrix).__name__
            raise ValueError(f"matrix must be a tensor of shape (m, n), got {shape}.")
        if not (matrix.is_floating_point() or matrix.is_complex()):
            raise TypeError(
                f"matrix must have a floating-point dtype, got {matrix.dtype}; use matrix.float()."
            )
        super().__init__((matrix.shape[0], matrix.shape[1]), matrix.dtype, matrix.device)
        self.is_symmetric = looks_symmetric(matrix) if is_symmetric is None else is_symmetric
        self._matrix = matrix

    def _matvec(self, v: Tensor) -> Tensor:
        return self._matrix @ v

    def _matmat(self, V: Tensor) -> Tensor:
        return self._matrix @ V

    def _rmatvec(self, u: Tensor) -> Tensor:
        return self._matrix.T @ u

    def _rmatmat(self, U: Tensor) -> Tensor:
        return self._matrix.T @ U

    def dense(self, chunk_size: int = 128) -> Tensor:
        """The matrix itself; a sparse one is copied."""
        return self._matrix if self._matrix.layout is torch.strided else self._matrix.to_dense()

    def diagonal(self, chunk_size: int = 128) -> Tensor:
        """Its diagonal."""
        self._require_square("diagonal")
        return self.dense().diagonal()

    @cached_property
    def spectrum(self) -> Spectrum:
        """Eigendecomposition of the symmetric part."""
        matrix = self.dense()
        matrix = (matrix + matrix.T) / 2
        return spectrum(matrix, matrix.new_zeros(len(matrix)))


class FunctionOperator(LinearOperator):
    """An operator from a function ``v -> A v``.

    Args:
        function: Takes a vector of shape (n,), returns one of shape (m,).
        like: A vector of shape (n,) that gives length, dtype and device.
        transpose: Takes a vector of shape (m,), returns ``A^T u`` of shape (n,). None says that the operator
            is symmetric: solvers believe it.
        rows: ``m``; ``n`` when None.

    Example:
        >>> A = FunctionOperator(lambda v: 2 * v, torch.zeros(3))
        >>> (A + 1.0) @ torch.ones(3)
        tensor([3., 3., 3.])
    """

    def __init__(
        self, function: Product, like: Tensor, *, transpose: Product | None = None, rows: int | None = None
    ) -> None:
        if not isinstance(like, Tensor):
            raise TypeError(f"like must be a vector such as torch.zeros(n), got {type(like).__name__}.")
        n = like.numel()
        if transpose is None and rows not in (None, n):
            raise ValueError(f"transpose must be given for {rows} rows and {n} columns, got None.")
        super().__init__((n if rows is None else rows, n), like.dtype, like.device)
        self.is_symmetric = transpose is None
        self._function = function
        self._transposed = function if transpose is None else transpose

    def _matvec(self, v: Tensor) -> Tensor:
        return self._checked(self._function(v), "function", self.shape[0])

    def dense(self, chunk_size: int = 128) -> Tensor:
        """The matrix, ``n`` products.

        Raises:
            ValueError: no transpose was given, and the matrix is not symmetric.
        """
        matrix = super().dense(chunk_size)
        if self.is_symmetric and not looks_symmetric(matrix):
            raise ValueError("function must be symmetric where transpose is None, but its matrix is not.")
        return matrix

    def _rmatvec(self, u: Tensor) -> Tensor:
        return self._checked(self._transposed(u), "transpose", self.shape[1])

    def _checked(self, product: Tensor, name: str, length: int) -> Tensor:
        if (
            not isinstance(product, Tensor)
            or tuple(product.shape) != (length,)
            or product.dtype != self.dtype
        ):
            is_tensor = isinstance(product, Tensor)
            got = f"{tuple(product.shape)}, {product.dtype}" if is_tensor else type(product).__name__
            raise ValueError(f"{name} must return a tensor of shape ({length},), {self.dtype}, got {got}.")
        return product
