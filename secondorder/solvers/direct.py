"""Dense direct solution of symmetric systems, definite or not, from an eigendecomposition."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secondorder.solvers._checks import check_damping, check_fit, check_symmetric, check_system, dense
from secondorder.solvers._result import SolveResult, by_columns
from secondorder.solvers._scale import rescaled
from secondorder.solvers._shown import in_lines
from secondorder.vectors.host import read


class Spectrum(NamedTuple):
    """Eigendecomposition ``A = vectors @ diag(values) @ vectors.T`` of a symmetric matrix.

    Attributes:
        values: Eigenvalues, ascending, shape (n,).
        vectors: Orthonormal eigenvectors as columns, shape (n, n).
        matrix: ``A`` itself, shape (n, n), for residuals that are true.
    """

    values: Tensor
    vectors: Tensor
    matrix: Tensor

    def __repr__(self) -> str:
        return in_lines(self)

    @property
    def shape(self) -> torch.Size:
        """``(n, n)``."""
        return self.matrix.shape

    @property
    def rounding(self) -> float:
        """The size below which an eigenvalue cannot be told from zero: ``eps * n * max(abs(values))``."""
        scale = read(self.values.abs().max())[0] if self.values.numel() else 0.0
        return torch.finfo(self.values.dtype).eps * self.values.numel() * scale


def spectrum(A: Any, like: Tensor) -> Spectrum:
    """Eigendecomposition of the symmetric part of ``A``.

    Args:
        A: A matrix of shape (n, n), an operator with ``dense()``, or anything with ``A @ v``.
        like: A vector of shape (n,) that gives dtype and device.

    Returns:
        A ``Spectrum``; ``direct`` and ``trust_region`` take it in place of ``A``.

    Raises:
        ValueError: ``A`` holds NaN or infinity.

    Cost: ``n`` products unless ``A`` is a matrix, and about ``9 n^3`` operations. Every further solve with
    another shift or radius takes ``O(n^2)``.

    Example:
        >>> spectrum(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.zeros(2)).values
        tensor([-1.,  1.])
    """
    if isinstance(A, Tensor):
        check_symmetric(A, "torch.linalg.eig is for others")
    matrix = dense(A, like)
    if not bool(matrix.isfinite().all()):
        raise ValueError("A must be finite, got a matrix with NaN or infinity.")
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)  # waits: once
    return Spectrum(values, vectors, matrix)


def eigen_of(A: Any, b: Tensor) -> tuple[Spectrum, int]:
    """The checked system's ``Spectrum``, and the products that it took."""
    if isinstance(A, Spectrum):
        # Its matrix was looked at, or comes from an operator that is symmetric but for rounding.
        check_fit(A.matrix, b)
        return A, 0
    check_system(A, b)
    return spectrum(A, b), 0 if isinstance(A, Tensor) else b.shape[0]


def direct(A: Any, b: Tensor, *, damping: float = 0.0) -> SolveResult:
    """Solve ``(A + damping I) x = b`` for a symmetric ``A``, definite, indefinite or singular.

    In directions where ``A + damping I`` vanishes to rounding, ``x`` is zero: the least-squares
    solution of least norm.

    Args:
        A: A matrix, an operator with ``dense()``, anything with ``A @ v``, or a ``Spectrum`` to reuse.
        b: Right-hand side, shape (n,) or (n, k).
        damping: Shift, loss over parameter squared.

    Returns:
        ``SolveResult`` with ``status`` "converged" (positive definite on the range of ``b``),
        "negative_curvature" (``x`` is a stationary point, not a minimiser; ``direction`` is the lowest
        eigenvector), "singular" (``b`` has a part outside the range: the residual is not zero) or
        "non_finite" (``b`` holds NaN or infinity). "converged" promises a residual of
        the size of rounding, ``eps * n * norm(A) * norm(x)``; ``residual_norm`` is what it really is, of
        the damped system. ``quadratic`` is ``x^T A x`` without damping.

    Raises:
        TypeError: ``b`` is not a floating-point tensor, or ``A`` has another dtype.
        ValueError: shapes do not fit; ``A`` holds NaN or infinity; ``damping`` is negative.

    Cost: that of ``spectrum``, or ``6 n^2`` operations when ``A`` is one.

    Example:
        >>> result = direct(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([1.0, 2.0]))
        >>> result.x, result.status
        (tensor([2.0000, 1.0000]), 'negative_curvature')
    """
    check_damping(damping)
    eigen, products = eigen_of(A, b)
    return _solve(eigen.matrix, b, eigen=eigen, shift=damping)._replace(products=products)


@by_columns
@rescaled
def _solve(matrix: Tensor, b: Tensor, *, eigen: Spectrum, shift: float) -> SolveResult:
    shifted = eigen.values + shift
    along = eigen.vectors.T @ b
    kept = shifted.abs() > eigen.rounding
    x = eigen.vectors @ torch.where(kept, along / torch.where(kept, shifted, 1.0), 0.0)
    Ax = matrix @ x
    residual_norm = float((b - Ax - shift * x).norm())
    dropped = float(along[~kept].norm())
    lowest = float(shifted[0]) if shifted.numel() else 0.0
    status = "converged"
    if not math.isfinite(residual_norm):
        status = "non_finite"
    elif lowest < -eigen.rounding:
        status = "negative_curvature"
    elif dropped > 10 * torch.finfo(b.dtype).eps * b.numel() * float(b.norm()):
        status = "singular"
    return SolveResult(
        x,
        status,
        iterations=0,
        residual_norm=residual_norm,
        quadratic=float(x.dot(Ax)),
        products=0,
        direction=eigen.vectors[:, 0] if status == "negative_curvature" else None,
    )
