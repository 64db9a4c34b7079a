"""Linear operators on flat vectors: ``A @ v``, algebra, ``dense()``.

A subclass gives ``_matvec``; everything else follows from it. Vectors have shape ``(n,)``, blocks of
``k`` vectors ``(n, k)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from secondorder.solvers import Spectrum, spectrum


class LinearOperator(ABC):
    """A symmetric linear map on vectors of shape ``(n,)``.

    Attributes:
        shape: ``(n, n)``.
        dtype: Of the vectors it takes and gives.
        device: Of the vectors it takes and gives.

    ``A @ v`` takes a vector or a block; ``A + B``, ``A - B``, ``c * A`` and ``-A`` are operators;
    ``A + c`` with a number adds ``c I``, with a vector of shape ``(n,)`` adds a diagonal.
    """

    def __init__(self, n: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = (n, n)
        self.dtype = dtype
        self.device = device

    @abstractmethod
    def _matvec(self, v: Tensor) -> Tensor:
        """The product with one vector of shape (n,), checked before."""

    def _matmat(self, V: Tensor) -> Tensor:
        """The product with a block of shape (n, k), checked before."""
        return torch.stack([self._matvec(v) for v in V.T], dim=1)

    def __matmul__(self, v: Tensor) -> Tensor:
        """``A @ v`` for ``v`` of shape (n,) or (n, k).

        Raises:
            TypeError: ``v`` is not a tensor, or of another dtype.
            ValueError: ``v`` has another length, or is on another device.
        """
        if not isinstance(v, Tensor):
            raise TypeError(f"v must be a tensor, got {type(v).__name__}.")
        n = self.shape[1]
        if v.ndim not in (1, 2) or v.shape[0] != n:
            raise ValueError(f"v must have shape ({n},) or ({n}, k), got {tuple(v.shape)}.")
        if v.dtype != self.dtype:
            raise TypeError(f"v must have dtype {self.dtype}, got {v.dtype}; convert it with v.to(A.dtype).")
        if v.device != self.device:
            raise ValueError(f"v must be on {self.device}, got {v.device}; move it with v.to(A.device).")
        if v.ndim == 1:
            return self._matvec(v)
        return self._matmat(v) if v.shape[1] else v.new_zeros(v.shape)

    def dense(self, chunk_size: int = 128) -> Tensor:
        """The matrix, shape (n, n): ``n`` products, ``chunk_size`` at a time."""
        n = self.shape[1]
        columns = []
        for start in range(0, n, chunk_size):
            stop = min(start + chunk_size, n)
            basis = torch.zeros(n, stop - start, dtype=self.dtype, device=self.device)
            basis.diagonal(-start).fill_(1)
            columns.append(self @ basis)
        return (
            torch.cat(columns, dim=1) if columns else torch.zeros(0, 0, dtype=self.dtype, device=self.device)
        )

    def __add__(self, other: LinearOperator | Tensor | float) -> LinearOperator:
        if isinstance(other, LinearOperator):
            return _Sum(self, other)
        if isinstance(other, Tensor | float | int):
            return _Shifted(self, other)
        return NotImplemented

    __radd__ = __add__

    def __sub__(self, other: LinearOperator | Tensor | float) -> LinearOperator:
        return self + (-1.0 * other)

    def __mul__(self, factor: float) -> LinearOperator:
        return _Scaled(self, factor) if isinstance(factor, float | int) else NotImplemented

    __rmul__ = __mul__

    def __neg__(self) -> LinearOperator:
        return -1.0 * self

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape}, dtype={self.dtype}, device={self.device})"


class _Sum(LinearOperator):
    def __init__(self, first: LinearOperator, second: LinearOperator) -> None:
        for name in ("shape", "dtype", "device"):
            ours, theirs = getattr(first, name), getattr(second, name)
            if ours != theirs:
                raise ValueError(f"A and B must have one {name}, got {ours} and {theirs}.")
        super().__init__(first.shape[0], first.dtype, first.device)
        self._first, self._second = first, second

    def _matvec(self, v: Tensor) -> Tensor:
        return self._first @ v + self._second @ v

    def _matmat(self, V: Tensor) -> Tensor:
        return self._matvec(V)


class _Scaled(LinearOperator):
    def __init__(self, base: LinearOperator, factor: float) -> None:
        super().__init__(base.shape[0], base.dtype, base.device)
        self._base, self._factor = base, factor

    def _matvec(self, v: Tensor) -> Tensor:
        return self._factor * (self._base @ v)

    def _matmat(self, V: Tensor) -> Tensor:
        return self._matvec(V)


class _Shifted(LinearOperator):
    """``A + diag(shift)``; a number stands for that multiple of the identity."""

    def __init__(self, base: LinearOperator, shift: Tensor | float) -> None:
        n = base.shape[0]
        if isinstance(shift, Tensor) and shift.ndim > 0 and tuple(shift.shape) != (n,):
            raise ValueError(f"shift must be a number or have shape ({n},), got {tuple(shift.shape)}.")
        super().__init__(n, base.dtype, base.device)
        self._base, self._shift = base, shift

    def _matvec(self, v: Tensor) -> Tensor:
        return self._base @ v + self._shift * v

    def _matmat(self, V: Tensor) -> Tensor:
        shift = self._shift
        if isinstance(shift, Tensor) and shift.ndim == 1:
            shift = shift[:, None]
        return self._base @ V + shift * V


class MatrixOperator(LinearOperator):
    """An operator from a symmetric matrix.

    Args:
        matrix: Shape (n, n).

    Attributes:
        spectrum: Its eigendecomposition, computed once, when first asked for.

    Example:
        >>> A = MatrixOperator(torch.tensor([[2.0, 0.0], [0.0, 3.0]]))
        >>> A @ torch.ones(2)
        tensor([2., 3.])
    """

    def __init__(self, matrix: Tensor) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"matrix must have shape (n, n), got {tuple(matrix.shape)}.")
        super().__init__(matrix.shape[0], matrix.dtype, matrix.device)
        self._matrix = matrix

    def _matvec(self, v: Tensor) -> Tensor:
        return self._matrix @ v

    def _matmat(self, V: Tensor) -> Tensor:
        return self._matrix @ V

    def dense(self, chunk_size: int = 128) -> Tensor:
        """The matrix itself."""
        return self._matrix

    @cached_property
    def spectrum(self) -> Spectrum:
        """Eigendecomposition of the symmetric part."""
        return spectrum(self._matrix, self._matrix.new_zeros(len(self._matrix)))


class FunctionOperator(LinearOperator):
    """An operator from a function ``v -> A v``.

    Args:
        function: Takes and returns a vector of shape (n,).
        like: A vector of shape (n,) that gives length, dtype and device.

    Example:
        >>> A = FunctionOperator(lambda v: 2 * v, torch.zeros(3))
        >>> (A + 1.0) @ torch.ones(3)
        tensor([3., 3., 3.])
    """

    def __init__(self, function: Callable[[Tensor], Tensor], like: Tensor) -> None:
        super().__init__(like.numel(), like.dtype, like.device)
        self._function = function

    def _matvec(self, v: Tensor) -> Tensor:
        return self._function(v)
