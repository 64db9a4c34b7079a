"""Linear operators on flat vectors: ``A @ v``, algebra, ``dense()``, ``solve()``.

A subclass gives ``_matvec``, and ``_rmatvec`` where it is not symmetric; everything else follows. Vectors
have shape ``(n,)``, blocks of ``k`` vectors ``(n, k)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, overload

import scipy.sparse.linalg
import torch
from torch import Tensor

from secondorder.operators.convert import to_scipy
from secondorder.operators.products import Products
from secondorder.operators.solve import solve
from secondorder.solvers import SolveResult
from secondorder.vectors.flat import on_parts

Product = Callable[[Tensor], Tensor]


class LinearOperator(Products):
    """A linear map from vectors of shape ``(n,)`` to vectors of shape ``(m,)``.

    Attributes:
        shape: ``(m, n)``.
        dtype: Of the vectors it takes and gives.
        device: Of the vectors it takes and gives.
        is_symmetric: Whether it equals its transpose; solvers rely on it.

    ``A @ v``, or ``A(v)``, takes a vector or a block, ``A @ B`` composes; ``A.T`` is the transpose, ``v @ A``
    multiplies by it; ``A + B``, ``A - B``, ``c * A`` and ``-A`` are operators; ``A + c`` with a number adds
    ``c I``, with a vector of shape ``(n,)`` a diagonal. Nothing is computed before a product is asked for.
    """

    # NumPy leaves its operators with this to us, which refuse arrays instead of adding entry by entry.
    __array_ufunc__ = None

    # The tensors whose flat vectors it takes and gives, where it knows them.
    _parts: tuple[Tensor, ...] | None = None
    # The operator of which this is the transpose.
    _original: LinearOperator | None = None
    # The operators of which this is the product, where it is known to be one.
    _known_factors: tuple[LinearOperator, ...] | None = None

    @overload
    def __matmul__(self, v: Tensor) -> Tensor: ...

    @overload
    def __matmul__(self, v: LinearOperator) -> LinearOperator: ...

    @overload
    def __matmul__(self, v: Sequence[Tensor]) -> Sequence[Tensor]: ...

    def __matmul__(self, v: Tensor | LinearOperator | Sequence[Tensor]) -> Any:
        """``A @ v`` for ``v`` of shape (n,) or (n, k); the composition for an operator.

        Operators of parameters also take a list or tuple of tensors shaped like these, and give one.

        Raises:
            TypeError: ``v`` is not a tensor or an operator, or of another dtype.
            ValueError: ``v`` has another length, or is on another device.
        """
        if not isinstance(v, Tensor):
            if isinstance(v, LinearOperator):
                return _composed(self, v)
            return on_parts(self.__matmul__, v, self._parts)
        n = self.shape[1]
        if v.ndim not in (1, 2) or v.shape[0] != n:
            raise ValueError(f"v must have shape ({n},) or ({n}, k), got {tuple(v.shape)}.")
        if v.dtype != self.dtype:
            raise TypeError(f"v must have dtype {self.dtype}, got {v.dtype}; convert it with v.to(A.dtype).")
        if v.device != self.device:
            raise ValueError(f"v must be on {self.device}, got {v.device}; move it with v.to(A.device).")
        if v.ndim == 1:
            return self._matvec(v)
        return self._matmat(v) if v.shape[1] else v.new_zeros((self.shape[0], 0))

    __call__ = __matmul__

    def __rmatmul__(self, v: Any) -> Any:
        """``v @ A``, that is ``A.T @ v`` for ``v`` of shape (m,), for the rows of one of shape (k, m)."""
        m = self.shape[0]
        if isinstance(v, Tensor) and (v.ndim not in (1, 2) or v.shape[-1] != m):
            raise ValueError(f"v must have shape ({m},) or (k, {m}) for v @ A, got {tuple(v.shape)}.")
        return (self.T @ v.T).T if isinstance(v, Tensor) and v.ndim == 2 else self.T @ v

    @property
    def T(self) -> LinearOperator:  # noqa: N802 - as a tensor's
        """The transpose."""
        if self.is_symmetric:
            return self
        if self._original is not None:
            return self._original
        shape = (self.shape[1], self.shape[0])
        text = f"{_bracketed(self)}.T"
        transposed = _Derived(text, shape, self, self._times_transposed, self.__matmul__)
        # It knows this one, not the other way round: a cycle would keep graphs alive.
        transposed._original = self
        return transposed

    def solve(
        self,
        b: Tensor,
        *,
        solver: str = "auto",
        damping: float = 0.0,
        rtol: float = 1e-5,
        max_iter: int | None = None,
        M: Any = None,
    ) -> SolveResult:
        """Solve ``(A + damping I) x = b``; in the least-squares sense where ``A`` is not symmetric.

        Args:
            b: Right-hand side, shape (m,) or (m, k).
            solver: "cg" for a definite operator, "minres" for an indefinite one, "direct", which forms the
                matrix, "lsmr" for one that is not symmetric; "auto" takes "direct" for a symmetric operator
                of up to 500 rows, "cg" for a larger one, "lsmr" for the rest.
            damping: Multiple of the identity that is added; for "lsmr" of ``A^T A``.
            rtol: Stop when ``norm(b - A x) <= rtol * norm(b)``.
            max_iter: Iterations allowed; the solver's default when None.
            M: Preconditioner, ``M @ r`` close to the solution; for "cg" and "minres".

        Returns:
            ``SolveResult``; its ``status`` says what happened, for a block ``columns`` for each column.

        Raises:
            ValueError: ``solver`` is unknown or does not fit; ``damping`` is negative.

        Cost: that of the solver; "direct", ``n`` products and ``9 n^3`` operations.

        Example:
            >>> from secondorder import MatrixOperator
            >>> MatrixOperator(torch.tensor([[2.0, 0.0], [0.0, 4.0]])).solve(torch.ones(2)).x
            tensor([0.5000, 0.2500])
        """
        return solve(self, b, solver=solver, damping=damping, rtol=rtol, max_iter=max_iter, M=M)

    def to(self, dtype: torch.dtype) -> LinearOperator:
        """The operator for vectors of another dtype, which are converted for each product and back."""
        if dtype == self.dtype:
            return self
        forward = lambda v: (self @ v.to(self.dtype)).to(dtype)  # noqa: E731
        backward = None if self.is_symmetric else lambda u: (self.T @ u.to(self.dtype)).to(dtype)
        converted = _Derived(f"{_bracketed(self)}.to({dtype})", self.shape, self, forward, backward)
        converted.dtype = dtype
        return converted

    def to_scipy(self) -> scipy.sparse.linalg.LinearOperator:
        """A ``scipy.sparse.linalg.LinearOperator`` that takes and gives NumPy arrays, on the CPU."""
        return to_scipy(self)

    def __add__(self, other: LinearOperator | Tensor | float) -> LinearOperator:
        if isinstance(other, LinearOperator):
            _require_equal(self, other, "shape", "dtype", "device")
            is_symmetric = self.is_symmetric and other.is_symmetric
            backward = None if is_symmetric else lambda u: self.T @ u + other.T @ u
            text = f"{_label(self)} + {_label(other)}"
            like = other if self._parts is None else self
            return _Derived(text, self.shape, like, lambda v: self @ v + other @ v, backward)
        if isinstance(other, Tensor | float | int):
            return _shifted(self, other)
        return NotImplemented

    __radd__ = __add__

    def __sub__(self, other: LinearOperator | Tensor | float) -> LinearOperator:
        return self + (-1.0 * other)

    def __rsub__(self, other: Tensor | float) -> LinearOperator:
        return -self + other

    def __mul__(self, factor: Tensor | float) -> LinearOperator:
        if not isinstance(factor, float | int) and not (isinstance(factor, Tensor) and factor.ndim == 0):
            return NotImplemented
        backward = None if self.is_symmetric else lambda u: factor * (self.T @ u)
        text = f"{_number(factor)} * {_bracketed(self)}"
        return _Derived(text, self.shape, self, lambda v: factor * (self @ v), backward)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Tensor | float) -> LinearOperator:
        return self * (1 / divisor)

    def __neg__(self) -> LinearOperator:
        return -1.0 * self


class _Derived(LinearOperator):
    """An operator made of others: a function of vectors or blocks, and one for its transpose."""

    def __init__(
        self,
        text: str,
        shape: tuple[int, int],
        like: LinearOperator,
        forward: Product,
        backward: Product | None,
    ) -> None:
        super().__init__(shape, like.dtype, like.device)
        self._text = text
        self._parts = like._parts if shape == like.shape else None
        self.is_symmetric = backward is None
        self._forward, self._backward = forward, forward if backward is None else backward

    def _matvec(self, v: Tensor) -> Tensor:
        return self._forward(v)

    def _matmat(self, V: Tensor) -> Tensor:
        return self._forward(V)

    def _rmatvec(self, u: Tensor) -> Tensor:
        return self._backward(u)

    def _rmatmat(self, U: Tensor) -> Tensor:
        return self._backward(U)

    def __repr__(self) -> str:
        return f"LinearOperator({self._text}, shape={self.shape}, dtype={self.dtype}, device={self.device})"


def _shifted(A: LinearOperator, shift: Tensor | float) -> LinearOperator:
    """``A + diag(shift)``; a number stands for that multiple of the identity."""
    A._require_square("adding a number or a diagonal")
    _check_shift(shift, A.shape[0])
    if isinstance(shift, Tensor):
        # A copy of this dtype: what the caller does with the tensor later does not change the operator.
        shift = shift.detach().to(A.dtype, copy=True)

    def times(v: Tensor) -> Tensor:
        if isinstance(shift, Tensor) and shift.ndim == 1 and v.ndim == 2:
            return shift[:, None] * v
        return shift * v

    backward = None if A.is_symmetric else lambda u: A.T @ u + times(u)
    what = "diagonal" if isinstance(shift, Tensor) and shift.ndim else _number(shift)
    return _Derived(f"{_label(A)} + {what}", A.shape, A, lambda v: A @ v + times(v), backward)


def _check_shift(shift: Tensor | float, n: int) -> None:
    if not isinstance(shift, Tensor):
        if not math.isfinite(shift):
            raise ValueError(f"shift must be finite, got {shift}.")
    elif shift.ndim > 0 and tuple(shift.shape) != (n,):
        raise ValueError(
            f"shift must be a number or a diagonal of shape ({n},), got {tuple(shift.shape)}; wrap a"
            " matrix in MatrixOperator."
        )


def _composed(A: LinearOperator, B: LinearOperator) -> LinearOperator:
    """``A @ B``; known to be symmetric where the factors mirror one another, as in ``J.T @ D @ J``."""
    _require_equal(A, B, "dtype", "device")
    if A.shape[1] != B.shape[0]:
        raise ValueError(f"A and B must fit for A @ B, got shapes {A.shape} and {B.shape}.")
    factors = _factors(A) + _factors(B)
    pairs = zip(factors, reversed(factors), strict=True)
    is_symmetric = all(a is b.T or a.T is b for a, b in pairs)
    backward = None if is_symmetric else lambda u: B.T @ (A.T @ u)
    shape = (A.shape[0], B.shape[1])
    text = f"{_bracketed(A)} @ {_bracketed(B)}"
    product = _Derived(text, shape, A, lambda v: A @ (B @ v), backward)
    product._known_factors = factors
    return product


def _number(value: Tensor | float) -> str:
    """For a label; one on a device is not read for it."""
    is_elsewhere = isinstance(value, Tensor) and value.device.type != "cpu"
    return "number" if is_elsewhere else f"{float(value):.6g}"


def _label(A: LinearOperator) -> str:
    return A._text if isinstance(A, _Derived) else type(A).__name__


def _bracketed(A: LinearOperator) -> str:
    label = _label(A)
    return f"({label})" if " + " in label else label


def _factors(A: LinearOperator) -> tuple[LinearOperator, ...]:
    return (A,) if A._known_factors is None else A._known_factors


def _require_equal(first: LinearOperator, second: LinearOperator, *names: str) -> None:
    for name in names:
        ours, theirs = getattr(first, name), getattr(second, name)
        if ours != theirs:
            raise ValueError(f"A and B must have one {name}, got {ours} and {theirs}.")
