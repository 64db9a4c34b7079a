"""Linear operators on flat vectors: ``A @ v``, algebra, ``dense()``, ``solve()``.

A subclass gives ``_matvec``, and ``_rmatvec`` where it is not symmetric; everything else follows. Vectors
have shape ``(n,)``, blocks of ``k`` vectors ``(n, k)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, overload

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor

from secondorder.operators.products import Products
from secondorder.solvers import SolveResult, cg, direct, lsmr, minres
from secondorder.vectors.flat import on_parts

Product = Callable[[Tensor], Tensor]

# Up to here an eigendecomposition is cheaper than CG on an ill-conditioned system, and says more.
DIRECT_LIMIT = 500


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
        if isinstance(v, LinearOperator):
            return self._composed(v)
        if not isinstance(v, Tensor):
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

    # The tensors whose flat vectors it takes and gives, where it knows them.
    _parts: tuple[Tensor, ...] | None = None

    # The operator of which this is the transpose.
    _original: LinearOperator | None = None

    def _times_transposed(self, u: Tensor) -> Tensor:
        return self._rmatvec(u) if u.ndim == 1 else self._rmatmat(u)

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
        if not damping >= 0:
            raise ValueError(f"damping must be non-negative, got {damping}.")
        if solver == "auto":
            small = self.shape[0] <= DIRECT_LIMIT
            solver = "lsmr" if not self.is_symmetric else "direct" if small and M is None else "cg"
        if M is not None and solver not in ("cg", "minres"):
            raise ValueError(
                f"M is for solver='cg' or 'minres', got solver={solver!r}; leave one of them out."
            )
        if solver == "direct":
            return direct(self, b, damping=damping)
        if solver == "lsmr":
            return lsmr(self, b, damping=damping, rtol=rtol, max_iter=max_iter)
        if solver not in ("cg", "minres"):
            raise ValueError(
                f"solver must be one of 'auto', 'cg', 'minres', 'direct', 'lsmr', got {solver!r}."
            )
        iterate = cg if solver == "cg" else minres
        system = self + damping if damping else self
        return iterate(system, b, M=M, rtol=rtol, max_iter=max_iter)

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
        products = {
            name: self._on_arrays(function)
            for name, function in (
                ("matvec", self.__matmul__),
                ("matmat", self.__matmul__),
                ("rmatvec", self.T.__matmul__),
                ("rmatmat", self.T.__matmul__),
            )
        }
        if self.dtype == torch.bfloat16:
            raise TypeError(
                "to_scipy needs a dtype that NumPy has, got torch.bfloat16; use A.to(torch.float32)."
            )
        dtype = torch.zeros(0, dtype=self.dtype, device="cpu").numpy().dtype
        return scipy.sparse.linalg.LinearOperator(self.shape, dtype=dtype, **products)

    def _on_arrays(self, function: Callable[[Tensor], Tensor]) -> Callable[[np.ndarray], np.ndarray]:
        def product(array: np.ndarray) -> np.ndarray:
            v = torch.as_tensor(np.ascontiguousarray(array)).to(device=self.device, dtype=self.dtype)
            result: np.ndarray = function(v).detach().cpu().numpy()
            return result

        return product

    def __add__(self, other: LinearOperator | Tensor | float) -> LinearOperator:
        if isinstance(other, LinearOperator):
            _require_equal(self, other, "shape", "dtype", "device")
            is_symmetric = self.is_symmetric and other.is_symmetric
            backward = None if is_symmetric else lambda u: self.T @ u + other.T @ u
            text = f"{self._label} + {other._label}"
            like = other if self._parts is None else self
            return _Derived(text, self.shape, like, lambda v: self @ v + other @ v, backward)
        if isinstance(other, Tensor | float | int):
            return self._shifted(other)
        return NotImplemented

    __radd__ = __add__

    def _shifted(self, shift: Tensor | float) -> LinearOperator:
        """``A + diag(shift)``; a number stands for that multiple of the identity."""
        self._require_square("adding a number or a diagonal")
        n = self.shape[0]
        if isinstance(shift, Tensor) and shift.ndim > 0 and tuple(shift.shape) != (n,):
            raise ValueError(
                f"shift must be a number or a diagonal of shape ({n},), got {tuple(shift.shape)}; wrap a"
                " matrix in MatrixOperator."
            )
        if isinstance(shift, Tensor):
            # A copy of this dtype: what the caller does with the tensor later does not change the operator.
            shift = shift.detach().to(self.dtype, copy=True)
        elif not math.isfinite(shift):
            raise ValueError(f"shift must be finite, got {shift}.")

        def times(v: Tensor) -> Tensor:
            if isinstance(shift, Tensor) and shift.ndim == 1 and v.ndim == 2:
                return shift[:, None] * v
            return shift * v

        backward = None if self.is_symmetric else lambda u: self.T @ u + times(u)
        what = "diagonal" if isinstance(shift, Tensor) and shift.ndim else f"{float(shift):.6g}"
        return _Derived(f"{self._label} + {what}", self.shape, self, lambda v: self @ v + times(v), backward)

    def _composed(self, other: LinearOperator) -> LinearOperator:
        """``A @ B``; known to be symmetric where the factors mirror one another, as in ``J.T @ D @ J``."""
        _require_equal(self, other, "dtype", "device")
        if self.shape[1] != other.shape[0]:
            raise ValueError(f"A and B must fit for A @ B, got shapes {self.shape} and {other.shape}.")
        factors = (*self._factors, *other._factors)
        pairs = zip(factors, reversed(factors), strict=True)
        is_symmetric = all(a is b.T or a.T is b for a, b in pairs)
        backward = None if is_symmetric else lambda u: other.T @ (self.T @ u)
        shape = (self.shape[0], other.shape[1])
        text = f"{_bracketed(self)} @ {_bracketed(other)}"
        product = _Derived(text, shape, self, lambda v: self @ (other @ v), backward)
        product._known_factors = factors
        return product

    # NumPy leaves its operators with this to us, which refuse arrays instead of adding entry by entry.
    __array_ufunc__ = None

    # The operators of which this is the product, where it is known to be one.
    _known_factors: tuple[LinearOperator, ...] | None = None

    @property
    def _factors(self) -> tuple[LinearOperator, ...]:
        return (self,) if self._known_factors is None else self._known_factors

    @property
    def _label(self) -> str:
        return type(self).__name__

    def __sub__(self, other: LinearOperator | Tensor | float) -> LinearOperator:
        return self + (-1.0 * other)

    def __rsub__(self, other: Tensor | float) -> LinearOperator:
        return -self + other

    def __mul__(self, factor: Tensor | float) -> LinearOperator:
        if not isinstance(factor, float | int) and not (isinstance(factor, Tensor) and factor.ndim == 0):
            return NotImplemented
        backward = None if self.is_symmetric else lambda u: factor * (self.T @ u)
        text = f"{float(factor):.6g} * {_bracketed(self)}"
        return _Derived(text, self.shape, self, lambda v: factor * (self @ v), backward)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Tensor | float) -> LinearOperator:
        return self * (1 / divisor)

    def __neg__(self) -> LinearOperator:
        return -1.0 * self


def _bracketed(operator: LinearOperator) -> str:
    return f"({operator._label})" if " + " in operator._label else operator._label


class _Derived(LinearOperator):
    """An operator made of others: a function of vectors or blocks, and one for its transpose."""

    @property
    def _label(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"LinearOperator({self._text}, shape={self.shape}, dtype={self.dtype}, device={self.device})"

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


def _require_equal(first: LinearOperator, second: LinearOperator, *names: str) -> None:
    for name in names:
        ours, theirs = getattr(first, name), getattr(second, name)
        if ours != theirs:
            raise ValueError(f"A and B must have one {name}, got {ours} and {theirs}.")
