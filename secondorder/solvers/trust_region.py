"""The trust-region subproblem, solved exactly from an eigendecomposition.

Reference: Moré and Sorensen (1983), Computing a trust region step; Conn, Gould and Toint (2000),
Trust-region methods, chapter 7.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor

from secondorder.solvers._checks import check_radius
from secondorder.solvers._result import SolveResult, by_columns
from secondorder.solvers._scale import rescaled
from secondorder.solvers.direct import Spectrum, eigen_of
from secondorder.vectors.host import fetched, read

# The root is found to rounding, in float64: it costs a few passes over the eigenvalues.
LENGTH_TOLERANCE = 1e-12
MAX_ROOT_ITERATIONS = 100
# Where the shift lies too close to its floor for that, a length within a tenth is as good (Conn, Gould and
# Toint, section 7.3.10).
LEAST_LENGTH = 0.9


def trust_region(A: Any, b: Tensor, radius: float) -> SolveResult:
    """Minimise ``x^T A x / 2 - b^T x`` over ``norm(x) <= radius`` for any symmetric ``A``.

    The solution has ``(A + shift I) x = b`` with ``shift >= 0`` and ``A + shift I`` positive semidefinite;
    where ``shift > 0`` its length is ``radius``, never more. The hard case, in which ``b`` has
    no part in the lowest eigenspace, is completed along that eigenspace.

    Args:
        A: A matrix, an operator with ``dense()``, anything with ``A @ v``, or a ``Spectrum`` to reuse.
        b: Right-hand side, shape (n,) or (n, k): minus the gradient of the quadratic at zero.
        radius: Trust radius, Euclidean, positive.

    Returns:
        ``SolveResult`` with ``status`` "converged" (interior), "boundary", "hard_case", "singular" (interior,
        with the part of ``b`` left out along which ``A`` vanishes to rounding), or "non_finite"
        (``b`` holds NaN or infinity, or the numbers overflow), and ``shift``.
        ``residual_norm`` is that of the shifted system, recomputed; ``direction`` is the lowest eigenvector
        where its eigenvalue is negative.

    Raises:
        TypeError: ``b`` is not a floating-point tensor, or ``A`` has another dtype.
        ValueError: shapes do not fit; ``A`` holds NaN or infinity; ``radius`` is not positive.

    Cost: that of ``spectrum``, or ``6 n^2`` operations when ``A`` is one.

    Example:
        >>> A = torch.tensor([[2.0, 0.0], [0.0, -1.0]])
        >>> result = trust_region(A, torch.tensor([1.0, 0.0]), radius=1.0)
        >>> result.status, result.shift
        ('hard_case', 1.0)
    """
    check_radius(radius)
    eigen, products = eigen_of(A, b)
    return _solve(eigen.matrix, b, eigen=eigen, radius=radius)._replace(products=products)


@by_columns
@rescaled
def _solve(matrix: Tensor, b: Tensor, *, eigen: Spectrum, radius: float) -> SolveResult:
    along = eigen.vectors.T @ b
    # The root is scalar work: on the host, in float64, whatever the device.
    values, target = fetched(eigen.values.double()), fetched(along.double())
    coordinates, shift, status, iterations = minimise_diagonal(
        values, target, radius, eigen.rounding, b.dtype
    )
    x = within(eigen.vectors @ coordinates.to(b), radius)
    Ax = matrix @ x
    residual_norm, quadratic = read((b - Ax - shift * x).norm(), x.dot(Ax))
    lowest_is_negative = values.numel() > 0 and float(values[0]) < -eigen.rounding
    if not math.isfinite(residual_norm):
        status = "non_finite"
    return SolveResult(
        x,
        status,
        iterations,
        residual_norm,
        quadratic,
        products=0,
        direction=eigen.vectors[:, 0] if lowest_is_negative else None,
        shift=shift,
    )


def within(x: Tensor, radius: float) -> Tensor:
    """``x``, shortened where rounding made it longer than ``radius``."""
    largest = x.abs().max() if x.numel() else x.new_zeros(())
    # The square may leave the range.
    size, part = read(largest, (x / largest).norm())
    if not 0 < size < math.inf:
        return x
    length = size * part
    return x if length <= radius else x * (radius / length)


def minimise_diagonal(
    values: Tensor, target: Tensor, radius: float, rounding: float, dtype: torch.dtype
) -> tuple[Tensor, float, str, int]:
    """Solve the diagonal problem; returns coordinates, shift, status and root iterations."""
    if values.numel() == 0:
        return target, 0.0, "converged", 0
    # At size one: squares and cubes must not leave the range.
    size = float(values.abs().max())
    size = size if 0 < size < math.inf else 1.0
    scaled = max(radius * size, sys.float_info.min)
    found = _minimise_scaled(values / size, target, scaled, rounding / size, dtype)
    return found[0] / size, found[1] * size, *found[2:]


def _minimise_scaled(
    values: Tensor, target: Tensor, radius: float, rounding: float, dtype: torch.dtype
) -> tuple[Tensor, float, str, int]:
    """The same for eigenvalues of at most one."""
    lowest = float(values[0])
    if lowest > rounding:
        interior = target / values
        if float(interior.norm()) <= radius:
            return interior, 0.0, "converged", 0
    floor = max(0.0, -lowest)
    lowest_space = values - lowest <= 10 * rounding
    rest = torch.where(lowest_space, 0.0, target / torch.where(lowest_space, 1.0, values + floor))
    # Below this, the part of the target in the lowest space does not move the shift off its floor.
    part, precision = torch.where(lowest_space, target, 0.0), torch.finfo(dtype).eps * values.numel()
    missing = precision * float(target.norm())
    if lowest <= rounding and float(part.norm()) <= missing + rounding * radius:
        length = float(rest.norm())
        if lowest >= -rounding and length <= radius:
            return rest, floor, "converged" if float(part.norm()) <= missing else "singular", 0
        if length <= radius:
            return _complete(rest, part, radius), floor, "hard_case", 0
    shift, iterations = _find_shift(values, target, radius, floor)
    x = target / (values + shift)
    length = float(x.norm())
    if not length >= LEAST_LENGTH * radius and float(rest.norm()) <= radius:
        # The shift lies closer to its floor than numbers are spaced there: the hard case, to rounding.
        return _complete(rest, part, radius), floor, "hard_case", iterations
    return x * min(radius / length, 1.0), shift, "boundary", iterations


def _complete(rest: Tensor, part: Tensor, radius: float) -> Tensor:
    """``rest`` and, along ``part`` of the lowest space, as much as leads to the radius."""
    length, norm = float(rest.norm()), float(part.norm())
    missing = math.sqrt((radius - length) * (radius + length))
    if norm > 0:
        return rest + part * (missing / norm)
    rest[0] += missing
    return rest


def _find_shift(values: Tensor, target: Tensor, radius: float, floor: float) -> tuple[float, int]:
    """The shift at which ``norm(target / (values + shift))`` meets ``radius``: safeguarded Newton.

    Newton on ``1 / radius - 1 / norm(x)``, nearly linear in the shift (Moré and Sorensen, section 3). Where
    it does not meet it to rounding, the least shift found with a norm below.
    """
    low, high = floor, floor + float(target.norm()) / radius
    shift = high
    norm = float((target / (values + shift)).norm())
    iterations = 0
    while abs(norm - radius) > LENGTH_TOLERANCE * radius and iterations < MAX_ROOT_ITERATIONS:
        low, high = (shift, high) if norm > radius else (low, shift)
        slope = float((target.square() / (values + shift) ** 3).sum())
        shift += norm / slope * norm * (norm / radius - 1) if slope > 0 else math.inf
        if not low < shift < high:
            shift = math.sqrt(low * high) if low > 0 else 0.5 * (low + high)
        if not low < shift < high:
            return high, iterations
        norm = float((target / (values + shift)).norm())
        iterations += 1
    return (shift if norm <= (1 + LENGTH_TOLERANCE) * radius else high), iterations
