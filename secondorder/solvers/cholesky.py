"""Dense symmetric systems by Cholesky's factorization; modified by a shift where the matrix is not definite.

Reference: Nocedal and Wright (2006), Numerical optimization, section 3.4, algorithm 3.3.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secondorder.solvers._checks import check_damping, check_system, dense
from secondorder.solvers._result import SolveResult, by_columns
from secondorder.solvers._scale import Scaled, exponent_of, rescaled, shifted, shifted_number

# Nocedal and Wright take 1e-3 for matrices of size one; here it is relative to the Frobenius norm.
FIRST_SHIFT = 1e-3


def cholesky(A: Any, b: Tensor, *, damping: float = 0.0) -> SolveResult:
    """Solve ``(A + damping I) x = b`` for a symmetric positive definite ``A + damping I``.

    A ninth to a thirtieth of the cost of ``direct``, which also solves indefinite and singular systems.

    Args:
        A: A matrix, an operator with ``dense()``, or anything with ``A @ v``.
        b: Right-hand side, shape (n,) or (n, k).
        damping: Shift, loss over parameter squared.

    Returns:
        ``SolveResult`` with ``status`` "converged", or "non_finite" (``b`` holds NaN or infinity). Where the
        matrix is not definite, ``x`` is zero and ``status`` "negative_curvature" or "singular" (definite
        up to rounding), with a ``direction`` that shows it. ``quadratic`` is ``x^T A x`` without damping.

    Raises:
        TypeError: ``b`` is not a floating-point tensor, or ``A`` has another dtype.
        ValueError: shapes do not fit; ``A`` holds NaN or infinity; ``damping`` is negative.

    Cost: ``n`` products unless ``A`` is a matrix, and ``n^3 / 3`` operations.

    Example:
        >>> cholesky(torch.tensor([[2.0, 0.0], [0.0, 4.0]]), torch.ones(2)).x
        tensor([0.5000, 0.2500])
    """
    scaled, matrix, damping, products = _divided(A, b, damping)
    factor, direction, status = _factor(_shifted(matrix, damping))
    found = _Found(factor, direction, status, 0.0)
    return _solve(scaled, b, found=found, shift=damping)._replace(products=products)


def modified_cholesky(A: Any, b: Tensor, *, damping: float = 0.0) -> SolveResult:
    """Solve ``(A + damping I + shift I) x = b`` with a ``shift >= 0`` that makes the matrix definite.

    ``x`` is a direction of descent of ``x^T A x / 2 - b^T x`` whatever ``A``. The shift is zero where the
    matrix is definite, otherwise doubled until it is: not the least one; ``trust_region`` finds a better step
    at a higher price.

    Args:
        A: A matrix, an operator with ``dense()``, or anything with ``A @ v``.
        b: Right-hand side, shape (n,) or (n, k).
        damping: Shift in any case, loss over parameter squared.

    Returns:
        ``SolveResult`` with ``status`` "converged" (no shift), "negative_curvature" or "singular" (shifted;
        ``direction`` shows why), or "non_finite", and ``shift``. ``residual_norm`` is that of the shifted
        system; ``quadratic`` is ``x^T A x``.

    Raises:
        TypeError: ``b`` is not a floating-point tensor, or ``A`` has another dtype.
        ValueError: shapes do not fit; ``A`` holds NaN or infinity; ``damping`` is negative.

    Cost: ``n`` products unless ``A`` is a matrix, and ``n^3 / 3`` operations for each trial.

    Example:
        >>> result = modified_cholesky(torch.diag(torch.tensor([2.0, -1.0])), torch.ones(2))
        >>> result.status, bool(result.shift > 1)
        ('negative_curvature', True)
    """
    scaled, matrix, damping, products = _divided(A, b, damping)
    damped = _shifted(matrix, damping)
    factor, direction, status = _factor(damped)
    shift = 0.0
    if factor is None:
        step = FIRST_SHIFT * (float(damped.norm()) or 1.0)
        shift = max(0.0, -float(damped.diagonal().min())) + step
        while True:
            factor = _factor(_shifted(damped, shift))[0]
            if factor is not None:
                break
            shift = max(2 * shift, step)
    found = _Found(factor, direction, status, shift)
    return _solve(scaled, b, found=found, shift=damping + shift)._replace(products=products)


class _Found(NamedTuple):
    """A factor of the damped and shifted matrix, or None and why, and the shift besides the damping."""

    factor: Tensor | None
    direction: Tensor | None
    status: str
    shift: float


def _divided(A: Any, b: Tensor, damping: float) -> tuple[Scaled, Tensor, float, int]:
    """The matrix over a power of two, to multiply and as it is, the damping, and the products it took."""
    check_damping(damping)
    check_system(A, b)
    matrix = dense(A, b)
    if not bool(matrix.isfinite().all()):
        raise ValueError("A must be finite, got a matrix with NaN or infinity.")
    largest = max(float(matrix.abs().max()), damping) if matrix.numel() else 0.0
    exponent = exponent_of(largest, b.dtype)
    products = 0 if isinstance(A, Tensor) else b.shape[0]
    scaled = Scaled(matrix, exponent)
    return scaled, shifted(matrix, -exponent), shifted_number(damping, -exponent), products


def _shifted(matrix: Tensor, shift: float) -> Tensor:
    return matrix + shift * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def _factor(matrix: Tensor) -> tuple[Tensor | None, Tensor | None, str]:
    """The factor, or None with a direction along which ``matrix`` is not positive, and the status."""
    if not len(matrix):
        return matrix, None, "converged"
    matrix = (matrix + matrix.T) / 2
    factor, info = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal().square()
    failed, smallest, at, largest = torch.stack(
        [info.to(matrix), pivots.min(), pivots.argmin().to(matrix), matrix.diagonal().abs().max()]
    ).tolist()
    rounding = torch.finfo(matrix.dtype).eps * len(matrix) * largest
    if not failed and smallest > rounding:
        return factor, None, "converged"
    direction = _direction(matrix, int(failed) - 1 if failed else int(at))
    curvature = float(direction @ (matrix @ direction))
    if curvature >= -rounding:
        direction, curvature = _bend(matrix, direction, rounding)
    return None, direction, "negative_curvature" if curvature < -rounding else "singular"


def _direction(matrix: Tensor, k: int) -> Tensor:
    """``d`` of length one with ``d^T A d`` the pivot ``k``: all rows before it are eliminated."""
    d = matrix.new_zeros(len(matrix))
    d[k] = 1
    if k:
        factor = torch.linalg.cholesky_ex(matrix[:k, :k])[0]
        d[:k] = -torch.cholesky_solve(matrix[:k, k : k + 1], factor)[:, 0]
    return d / d.norm()


def _bend(matrix: Tensor, d: Tensor, rounding: float) -> tuple[Tensor, float]:
    """Where ``d^T A d`` vanishes but ``A d`` does not, a direction nearby of negative curvature, and that."""
    g = matrix @ d
    if not float(g.norm()) > 10 * rounding:
        return d, float(d @ g)
    # The curvature of d - t g is d^T A d - 2 t g^T g + t^2 g^T A g.
    bent = d - (g @ g) / torch.clamp(g @ (matrix @ g), min=float(g.norm() ** 3)) * g
    bent = bent / bent.norm()
    return bent, float(bent @ (matrix @ bent))


@by_columns
@rescaled
def _solve(matrix: Scaled, b: Tensor, *, found: _Found, shift: float) -> SolveResult:
    factor = found.factor
    x = torch.zeros_like(b) if factor is None else torch.cholesky_solve(b[:, None], factor)[:, 0]
    Ax = matrix @ x
    residual_norm = float((b - Ax - shift * x).norm())
    status = found.status if math.isfinite(residual_norm) else "non_finite"
    quadratic, direction = float(x.dot(Ax)), found.direction
    return SolveResult(x, status, 0, residual_norm, quadratic, 0, direction, shift=found.shift)
