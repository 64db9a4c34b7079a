"""Preconditioners: ``M @ r`` is close to ``(A + damping I)^-1 r``, up to a factor; ``M`` is definite.

Both keep what they learned of ``A`` apart from the damping, so that another damping costs nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from secondorder.solvers._checks import check_count, check_symmetric, domain
from secondorder.solvers._probes import gaussian, multiply


class _Preconditioner(ABC):
    """A symmetric operator of the shape of a system.

    Attributes:
        shape: ``(n, n)``.
        dtype: Of the vectors it takes and gives.
        device: Of the vectors it takes and gives.
        is_symmetric: True.
    """

    is_symmetric = True

    def __init__(self, like: Tensor) -> None:
        self.shape = (len(like), len(like))
        self.dtype, self.device = like.dtype, like.device

    @abstractmethod
    def _apply(self, r: Tensor) -> Tensor:
        """The product with a vector (n,) or a block (n, k), checked before."""

    def __matmul__(self, r: Tensor) -> Tensor:
        n = self.shape[0]
        if not isinstance(r, Tensor):
            raise TypeError(f"r must be a tensor, got {type(r).__name__}.")
        if r.ndim not in (1, 2) or r.shape[0] != n:
            raise ValueError(f"r must have shape ({n},) or ({n}, k), got {tuple(r.shape)}.")
        if r.dtype != self.dtype:
            raise TypeError(f"r must have dtype {self.dtype}, got {r.dtype}; convert one of them.")
        if r.device != self.device:
            raise ValueError(f"r must be on {self.device}, got {r.device}; move one of them.")
        return self._apply(r)


class DiagonalPreconditioner(_Preconditioner):
    """``M = (diag(d) + damping I)^-power``; see ``diagonal_preconditioner``.

    Attributes:
        diagonal: ``d``, shape (n,).
        damping: What is added to it.
        power: The exponent, without its sign.
    """

    def __init__(self, diagonal: Tensor, damping: float, power: float) -> None:
        super().__init__(diagonal)
        self.diagonal, self.damping, self.power = diagonal, damping, power
        self._factors = (diagonal + damping) ** -power

    def _apply(self, r: Tensor) -> Tensor:
        return self._factors * r if r.ndim == 1 else self._factors[:, None] * r

    def with_damping(self, damping: float) -> DiagonalPreconditioner:
        """The same with another damping: ``n`` operations."""
        return diagonal_preconditioner(self.diagonal, damping, self.power)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(shape={self.shape}, damping={self.damping:.3g}, power={self.power:.3g})"
        )


def diagonal_preconditioner(
    diagonal: Tensor, damping: float = 0.0, power: float = 1.0
) -> DiagonalPreconditioner:
    """A preconditioner from a diagonal: ``M @ r = r / (diagonal + damping)^power``.

    Args:
        diagonal: Shape (n,), with positive entries once the damping is added: of the matrix (Jacobi), or of
            the empirical Fisher matrix, the mean of squared gradients.
        damping: What is added to it, in its units.
        power: 1.0 for Jacobi; 0.75 is Martens' choice for the empirical Fisher matrix.

    Returns:
        ``DiagonalPreconditioner``.

    Raises:
        TypeError: ``diagonal`` is not a floating-point tensor.
        ValueError: it has another shape, or an entry that is not positive and finite once damped; ``damping``
            is negative or ``power`` is not positive.

    Cost: ``n`` operations and a host read; ``n`` a product.

    Reference: Martens (2010), Deep learning via Hessian-free optimization, ICML, section 4.7.

    Example:
        >>> diagonal_preconditioner(torch.tensor([1.0, 3.0]), damping=1.0) @ torch.ones(2)
        tensor([0.5000, 0.2500])
    """
    if not isinstance(diagonal, Tensor):
        raise TypeError(f"diagonal must be a tensor, got {type(diagonal).__name__}.")
    if not diagonal.is_floating_point():
        raise TypeError(f"diagonal must have a floating-point dtype, got {diagonal.dtype}.")
    if diagonal.ndim != 1:
        raise ValueError(f"diagonal must have shape (n,), got {tuple(diagonal.shape)}.")
    _check_damping(damping)
    if not power > 0:
        raise ValueError(f"power must be positive, got {power}.")
    damped = diagonal + damping
    if not bool(((damped > 0) & damped.isfinite()).all()):
        raise ValueError(
            f"diagonal must be positive and finite once damping is added, got a lowest entry of"
            f" {float(damped.min()):.3g}; raise damping."
        )
    return DiagonalPreconditioner(diagonal, damping, power)


class NystromPreconditioner(_Preconditioner):
    """``M = U diag((floor + damping) / (values + damping)) U^T + (I - U U^T)``; see ``nystrom``.

    ``floor`` is the smallest value: what is left of ``A`` is taken to lie about there.

    Attributes:
        values: Approximate eigenvalues of ``A``, descending, not negative, shape (rank,).
        vectors: Approximate eigenvectors ``U``, orthonormal columns, shape (n, rank).
        damping: The multiple of the identity in the system.
    """

    def __init__(self, values: Tensor, vectors: Tensor, damping: float) -> None:
        super().__init__(vectors)
        self.values, self.vectors, self.damping = values, vectors, damping
        self._changes = (values[-1] + damping) / (values + damping) - 1

    def _apply(self, r: Tensor) -> Tensor:
        along = self.vectors.T @ r
        return r + self.vectors @ (self._changes * along if r.ndim == 1 else self._changes[:, None] * along)

    def with_damping(self, damping: float) -> NystromPreconditioner:
        """The same sketch for another damping: no product with ``A``."""
        _check_sketch(self.values, damping)
        return NystromPreconditioner(self.values, self.vectors, damping)

    def __repr__(self) -> str:
        largest, smallest = self.values[[0, -1]].tolist()
        return (
            f"{type(self).__name__}(shape={self.shape}, rank={len(self.values)}, damping={self.damping:.3g},"
            f" values={largest:.3g} to {smallest:.3g})"
        )


def nystrom(
    A: Any,
    rank: int,
    *,
    damping: float,
    like: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> NystromPreconditioner:
    """The randomized Nyström preconditioner for ``A + damping I``, with ``A`` positive semidefinite.

    It flattens the upper end of the spectrum: for the condition number of the preconditioned system to be a
    constant, ``rank`` about twice the number of eigenvalues above ``damping`` suffices.

    Args:
        A: Anything with ``A @ V`` for ``V`` of shape (n, rank), symmetric positive semidefinite, undamped.
            Directions of the sketch along which it is not positive are left alone; ``M`` is definite anyway.
        rank: Columns of the sketch, from 1 to ``n``.
        damping: The multiple of the identity in the system to be solved; see ``with_damping``.
        like: A vector of shape (n,), where ``A`` has no ``shape`` and ``dtype``.
        generator: For the sketch; torch's global one when None.

    Returns:
        ``NystromPreconditioner``, for ``cg(A + damping, b, M=...)``.

    Raises:
        TypeError: ``A`` has no products, or is neither float32 nor float64.
        ValueError: ``A`` is not symmetric or square; ``rank`` is out of range; ``damping`` is negative, or
            zero where ``A`` has a lower rank than the sketch.
        RuntimeError: a product holds NaN or infinity.

    Cost: one product with a block of ``rank`` vectors, about ``10 n rank^2`` operations; ``4 n rank`` a
    product.

    Reference: Frangella, Tropp and Udell (2023), Randomized Nyström preconditioning, SIAM J. Matrix Anal.
    Appl. 44, algorithm 2.1 and equation 5.3.

    Example:
        >>> A = torch.diag(torch.tensor([100.0, 0.0, 0.0]))
        >>> nystrom(A, 2, damping=1.0) @ torch.tensor([101.0, 1.0, 1.0])
        tensor([1.0000, 1.0000, 1.0000])
    """
    like = domain(A, like)
    check_symmetric(A, "nystrom takes positive semidefinite ones")
    check_count("rank", rank, 1, like.shape[0])
    _check_damping(damping)
    omega = torch.linalg.qr(gaussian(like, rank, generator))[0]
    Y = multiply(A, omega)
    shift = torch.finfo(Y.dtype).eps * Y.norm()
    shifted = Y + shift * omega
    # waits: once
    vectors, roots, _ = torch.linalg.svd(_root(omega.T @ shifted, shifted), full_matrices=False)
    values = (roots.square() - shift).clamp(min=0)
    _check_sketch(values, damping)
    return NystromPreconditioner(values, vectors, damping)


def _root(core: Tensor, sketch: Tensor) -> Tensor:
    """``F`` with ``F F^T = sketch core^-1 sketch^T``; by Cholesky, or from the positive part of ``core``."""
    core = (core + core.T) / 2
    factor, info = torch.linalg.cholesky_ex(core)
    if int(info) == 0:
        return torch.linalg.solve_triangular(factor, sketch.T, upper=False).T
    values, vectors = torch.linalg.eigh(core)  # waits: once
    floor = len(values) * torch.finfo(values.dtype).eps * values.abs().amax()
    is_kept = values > floor
    return (sketch @ vectors) * torch.where(is_kept, torch.where(is_kept, values, 1.0).rsqrt(), 0.0)


def _check_damping(damping: float) -> None:
    if not damping >= 0:
        raise ValueError(f"damping must be non-negative, got {damping}.")


def _check_sketch(values: Tensor, damping: float) -> None:
    _check_damping(damping)
    if damping == 0 and not float(values[-1]) > 0:
        raise ValueError("damping must be positive where A has a lower rank than the sketch, got 0.")
