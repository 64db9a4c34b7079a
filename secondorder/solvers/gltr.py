"""The trust-region subproblem in a Krylov space: the generalized Lanczos trust-region method.

Reference: Gould, Lucidi, Roma and Toint (1999), Solving the trust-region subproblem using the Lanczos method.
"""

from __future__ import annotations

import math
from typing import Any

import scipy.linalg
import torch
from torch import Tensor

from secondorder.solvers._checks import check_limits, check_radius, check_system
from secondorder.solvers._probes import gaussian
from secondorder.solvers._result import SolveResult, by_columns
from secondorder.solvers._scale import check_range, rescaled
from secondorder.solvers.trust_region import minimise_diagonal, within
from secondorder.vectors.host import read

# Each iteration keeps a vector.
DEFAULT_MAX_ITER = 1000
# The small problem is solved after every product up to here, then after each further tenth of them: it costs
# k^3 operations on the host.
CHECKED_EACH_TIME = 50


@by_columns
@rescaled
def gltr(
    A: Any,
    b: Tensor,
    radius: float,
    *,
    rtol: float = 1e-5,
    atol: float = 0.0,
    max_iter: int | None = None,
) -> SolveResult:
    """Minimise ``x^T A x / 2 - b^T x`` over ``norm(x) <= radius`` for any symmetric ``A`` by products alone.

    Where ``steihaug`` stops at the first exit from the ball, this goes on along the boundary: the
    problem is solved exactly in the growing Krylov space, until ``(A + shift I) x = b`` holds to the
    tolerance.
    Where the space closes, or ``b`` is zero, it goes on from another vector until the lowest eigenvalue is
    known: so the hard case is found where ``b`` and what it reaches have no part in the lowest eigenspace.
    Where the tolerance is met before, that is not looked for.

    Args:
        A: Anything with ``A @ v`` for ``v`` of shape (n,), symmetric.
        b: Right-hand side, shape (n,) or (n, k): minus the gradient of the quadratic at zero.
        radius: Trust radius, Euclidean, positive.
        rtol: Stop when ``norm(b - A x - shift x) <= max(rtol * norm(b), atol)``. Dimensionless.
        atol: See ``rtol``; in units of ``b``.
        max_iter: Number of products allowed; ``min(n, 1000)`` when None.

    Returns:
        ``SolveResult`` with ``status`` "converged" (interior), "boundary", "hard_case", "singular",
        "max_iter" (the best point of the space so far), "stagnated" or "non_finite", and ``shift``.
        ``norm(x)`` is never above ``radius``. ``direction`` is one of negative curvature where there is one.

    Raises:
        TypeError: ``b`` is not a floating-point tensor, or ``A`` has another dtype.
        ValueError: shapes do not fit; ``radius`` is not positive; a tolerance is negative.

    Cost: an iteration, one product, ``8 n k`` operations to keep the basis orthogonal and one host read; a
    vector of storage for each iteration.

    Example:
        >>> A = torch.tensor([[2.0, 0.0], [0.0, -1.0]])
        >>> result = gltr(A, torch.tensor([1.0, 0.1]), radius=1.0)
        >>> result.status, bool(result.shift > 1)
        ('boundary', True)
    """
    check_system(A, b)
    check_limits(rtol, atol, max_iter)
    check_radius(radius)
    n, size = b.shape[0], read(b.norm())[0]
    limit = min(n, DEFAULT_MAX_ITER if max_iter is None else max_iter)
    run = _Lanczos(A, b, size)
    small = _Small(size, radius, b.dtype)
    while math.isfinite(size) and run.k < limit and run.extend():
        if run.k <= CHECKED_EACH_TIME or run.k % (run.k // 10) == 0 or run.k == limit or run.is_closed:
            small.solve(run)
            if small.is_solved(run, max(rtol * size, atol), rtol):
                break
        if run.is_closed and run.k < limit:
            run.continue_elsewhere()
    return _result(A, b, run, small, radius, max(rtol * size, atol))


class _Lanczos:
    """An orthonormal basis in which ``A`` is tridiagonal, kept orthogonal to rounding."""

    def __init__(self, A: Any, b: Tensor, size: float) -> None:
        self._A, self._like = A, b
        self.k = 0
        self.diagonal: list[float] = []
        self.off_diagonal: list[float] = []
        self.is_closed = False
        # Whether the space of b was, or was nearly, exhausted: what comes then is not of b.
        self.is_exhausted = self.was_exhausted = False
        self.is_finite = True
        self._basis = b.new_empty(b.shape[0], 0)
        self._generator = torch.Generator("cpu").manual_seed(0)
        self._scale = 0.0
        if size > 0:
            self._next = b / b.norm()
        else:
            self.continue_elsewhere()
            self.off_diagonal.clear()

    @property
    def basis(self) -> Tensor:
        """Shape (n, k)."""
        return self._basis[:, : self.k]

    def extend(self) -> bool:
        """One product; False where it is not finite. Afterwards ``is_closed`` tells if the space is."""
        if self.k == self._basis.shape[1]:
            more = self._like.new_empty(self._like.shape[0], max(16, self.k))
            self._basis = torch.cat([self._basis, more], dim=1)
        self._basis[:, self.k] = self._next
        self.k += 1
        q = self._next
        w = self._A @ q
        alpha = q.dot(w)
        for _ in range(2):
            w = w - self.basis @ (self.basis.T @ w)
        values = read(alpha, w.norm())
        if self.k == 1:
            check_range(self._A, self.k, q.dtype, abs(values[0]) + values[1])
        if not all(map(math.isfinite, values)):
            self.k -= 1
            self.is_finite = False
            return False
        self.diagonal.append(values[0])
        self._scale = max(self._scale, abs(values[0]) + 2 * values[1])
        eps = torch.finfo(q.dtype).eps
        self.is_closed = values[1] <= self._like.shape[0] * eps * self._scale
        self.was_exhausted = self.is_exhausted
        self.is_exhausted |= values[1] <= eps**0.5 * self._scale
        self._beta = values[1]
        if not self.is_closed:
            self.off_diagonal.append(values[1])
            self._next = w / values[1]
        return True

    @property
    def beta(self) -> float:
        """The coupling of the space to the rest."""
        return 0.0 if self.is_closed else self._beta

    def continue_elsewhere(self) -> None:
        """Go on from a vector orthogonal to the closed space."""
        tiny, length = torch.finfo(self._like.dtype).eps ** 0.5, 0.0
        # Again where it happens to lie in the space, as one does whose numbers come from the same seed.
        while not length > tiny:
            w = gaussian(self._like, 1, self._generator)[:, 0]
            w = w / w.norm()
            w = w - self.basis @ (self.basis.T @ w)
            (length,) = read(w.norm())
        for _ in range(2):
            w = w / w.norm()
            w = w - self.basis @ (self.basis.T @ w)
        self._next = w / w.norm()
        self.is_exhausted = True
        self.off_diagonal.append(0.0)
        self.is_closed = False


class _Small:
    """The problem in the Krylov space: tridiagonal, solved on the host in float64."""

    def __init__(self, size: float, radius: float, dtype: torch.dtype) -> None:
        self._size, self._radius, self._dtype = size, radius, dtype
        self.coordinates = torch.zeros(0, dtype=torch.float64, device="cpu")
        self.lowest_vector = self.coordinates
        self.lowest, self.shift, self.status = 0.0, 0.0, "converged"

    def solve(self, run: _Lanczos) -> None:
        """The minimiser over the present space."""
        values, vectors = map(
            torch.from_numpy, scipy.linalg.eigh_tridiagonal(run.diagonal, run.off_diagonal[: run.k - 1])
        )
        rounding = torch.finfo(self._dtype).eps * run.k * float(values.abs().max())
        along = self._size * vectors[0]
        found = minimise_diagonal(values, along, self._radius, rounding, self._dtype)
        self.coordinates, self.shift, self.status = vectors @ found[0], found[1], found[2]
        self.lowest, self.lowest_vector = float(values[0]), vectors[:, 0]
        self._rounding = rounding

    def is_solved(self, run: _Lanczos, tolerance: float, rtol: float) -> bool:
        """Whether the residual is small, and, if need be, that of the lowest eigenvalue."""
        if run.k == run._like.shape[0]:
            return True
        if run.is_exhausted and not run.was_exhausted:
            return False
        if run.beta * abs(float(self.coordinates[-1])) > tolerance:
            return False
        if not run.is_exhausted:
            return True
        accuracy = max(rtol * max(abs(self.lowest), self.shift), self._rounding)
        return run.beta * abs(float(self.lowest_vector[-1])) <= accuracy

    @property
    def has_negative_curvature(self) -> bool:
        return len(self.lowest_vector) > 0 and self.lowest < -self._rounding


def _result(A: Any, b: Tensor, run: _Lanczos, small: _Small, radius: float, tolerance: float) -> SolveResult:
    """The point in the full space, with its true residual."""
    k = len(small.coordinates)
    basis = run.basis[:, :k]
    x = within(basis @ small.coordinates.to(b), radius)
    Ax = A @ x
    numbers = [(b - Ax - small.shift * x).norm(), x.dot(Ax), x.norm(), b.norm()]
    residual_norm, quadratic, length, size = read(*numbers)
    status = small.status
    if not run.is_finite or not math.isfinite(residual_norm):
        status = "non_finite"
    elif residual_norm > tolerance and status != "singular":
        scale = run._scale * length + size
        at_rounding = residual_norm <= 10 * b.shape[0] * torch.finfo(b.dtype).eps * scale
        status = "stagnated" if at_rounding else "max_iter"
    direction = basis @ small.lowest_vector.to(b) if small.has_negative_curvature else None
    return SolveResult(x, status, run.k, residual_norm, quadratic, run.k + 1, direction, shift=small.shift)
