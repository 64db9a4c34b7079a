"""Minimal residuals: symmetric systems that may be indefinite or singular.

Reference: Paige and Saunders (1975), Solution of sparse indefinite systems of linear equations, section 6;
certificate of nonpositive curvature: Liu and Roosta (2022), A Newton-MR algorithm with complexity
guarantees, lemma 3.1.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secondorder.solvers._checks import check_count, check_iteration
from secondorder.solvers._result import SolveResult, by_columns
from secondorder.solvers._scale import check_range, check_size, rescaled_late
from secondorder.vectors.host import read

# A residual that seems to be the least one must have become this much less after as many iterations again;
# and this much where the solution is so long that its rounding is more than the residual: where a system is
# singular but for rounding, a part of the residual is always to be had for a solution without bounds.
GOES_ON, GOES_ON_AT_ROUNDING = 0.9, 0.1
# The true residual is computed after so many iterations first, then after twice as many each time.
FIRST_CHECK = 16


@by_columns
@rescaled_late
def minres(
    A: Any,
    b: Tensor,
    *,
    x0: Tensor | None = None,
    M: Any = None,
    rtol: float = 1e-5,
    atol: float = 0.0,
    max_iter: int | None = None,
    stop_at_negative_curvature: bool = False,
    check_every: int = 1,
) -> SolveResult:
    """Solve ``A x = b`` for a symmetric ``A``, definite or not.

    The norm of the residual never increases; in finite precision the recurrence drifts from the truth, so
    the true residual is computed now and then, and the iteration restarts where the two differ. Where ``b``
    lies outside the range of a singular ``A`` the least residual is reached (``A r`` is zero to
    ``sqrt(eps)``), and the status says so. Nonpositive curvature is noticed from the numbers of the
    recurrence, without a product, and its direction returned.

    Args:
        A: Anything with ``A @ v`` for ``v`` of shape (n,), symmetric.
        b: Right-hand side, shape (n,) or (n, k); columns are solved one after another.
        x0: Start, of the shape of ``b``; zeros when None.
        M: Preconditioner, ``M @ r`` close to ``abs(A)^-1 r``, symmetric positive definite; none when None.
        rtol: Stop when ``norm(b - A x) <= max(rtol * norm(b), atol)``. Dimensionless.
        atol: See ``rtol``; in units of ``b``.
        max_iter: Number of iterations allowed; ``10 * n`` when None.
        stop_at_negative_curvature: Stop where curvature is nonpositive first, with the iterate before it,
            instead of going on to the solution.
        check_every: Iterations between two host reads. Those that turn out to be past the end are thrown
            away: results are the same, bit for bit, for up to ``check_every - 1`` products more.

    Returns:
        ``SolveResult`` with ``status`` "converged", "least_squares" (inconsistent system), "max_iter",
        "stagnated", "non_finite", or "negative_curvature" when asked to stop there. ``direction`` is the
        first residual (preconditioned, with ``M``) along which curvature was nonpositive, also when the
        iteration went on.

    Raises:
        TypeError: ``b`` is not a floating-point tensor, or ``A`` has another dtype.
        ValueError: shapes do not fit; ``A`` is not symmetric; a tolerance is negative; ``M`` is not positive
            definite.

    Cost: one product with ``A`` and one with ``M`` an iteration, eight vectors of storage, three of them in
    double precision, and two for each of ``check_every``; a product after 16, 32, 64, ... iterations and at
    the end, and one at the start when ``x0`` is given. Where the least residual seems to be reached, as many
    iterations again. Host reads: one for ``check_every`` iterations, and one for each of those products;
    15 launches an iteration, 16 with ``M``.

    Example:
        >>> A = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> minres(A, torch.tensor([1.0, 2.0])).x
        tensor([2., 1.])
    """
    check_iteration(A, b, x0, M, (rtol, atol, max_iter))
    check_count("check_every", check_every, 1)
    limit = 10 * b.numel() if max_iter is None else max_iter
    run = _Recurrence(_System(A, b, M), x0, (check_every, limit))
    return _solve(run, max(rtol * run.b_norm, atol), limit, stop_at_negative_curvature)


def _solve(run: _Recurrence, tolerance: float, limit: int, stop_at_negative_curvature: bool) -> SolveResult:
    """Iterate, verify, and start again from the best point, until that helps no more."""
    system, best, last_start = run.system, run.first, run.first._replace(norm=math.inf)
    check_at, goal = FIRST_CHECK, tolerance
    while True:
        status = _iterate(run, goal, min(check_at, limit), stop_at_negative_curvature)
        here = system.measure(run.x)
        has_drifted = not run.agrees(here)
        best = here if not here.norm >= best.norm else best
        if best.norm <= tolerance:
            return _result(run, best, here, "converged")
        if run.doubted and status != "negative_curvature" and not system.is_better(best, run.doubted):
            # Further on the iterates of an inconsistent system grow beyond bounds.
            best = best if system.is_stationary_at(best) else run.doubted
            return _result(run, best, best, "least_squares")
        if status in ("negative_curvature", "non_finite"):
            return _result(run, best, here, status)
        if status == "check" and run.iteration >= limit:
            return _result(run, best, here, "max_iter")
        run.doubted = None
        if status == "least_squares" and not system.is_stationary_at(here):
            # In the norm of M there is no less; in the Euclidean one there may be.
            system.M = None
        elif status == "least_squares" and run.is_closed():
            return _result(run, best, here, status)
        elif status == "least_squares":
            check_at = run.iteration + max(run.iteration, FIRST_CHECK)
            run.doubt(best)
            continue
        elif status == "check" and not has_drifted:
            check_at *= 2
            continue
        elif status == "converged" and system.M is not None and not has_drifted:
            # The norm of M says so, the Euclidean one does not yet.
            goal *= 0.5 * tolerance / here.norm
            continue
        if not best.norm < 0.5 * last_start.norm:
            return _result(run, best, here, "stagnated")
        last_start, check_at, goal = best, run.iteration + FIRST_CHECK, tolerance
        run.start(best, [])


def _result(run: _Recurrence, best: _Verified, last: _Verified, status: str) -> SolveResult:
    """The best point that was verified; the last one says whether the numbers are still finite."""
    if status in ("stagnated", "least_squares"):
        is_least = not run.system.is_at_rounding(best) and run.system.is_stationary_at(best)
        status = "least_squares" if is_least else "stagnated"
    if not math.isfinite(last.norm):
        status = "non_finite"
    return SolveResult(
        best.x, status, run.iteration, best.norm, best.quadratic, run.system.products, run.nonpositive
    )


def _iterate(run: _Recurrence, tolerance: float, limit: int, stop_at_negative_curvature: bool) -> str:
    """Iterate until something stops it; the status says what, "check" that the limit did."""
    while True:
        if not math.isfinite(run.phi):
            return "non_finite"
        if run.phi <= tolerance * run.scale:
            return "converged"
        if run.iteration >= limit:
            return "check"
        run.extend()
        if not math.isfinite(run.alpha):
            return "non_finite"
        if run.is_nonpositive() and run.nonpositive is None:
            run.nonpositive = run.residual_direction
            if stop_at_negative_curvature:
                return "negative_curvature"
        if run.is_stationary() and run.doubted is None:
            return "least_squares"
        run.advance()


class _Recurrence:
    """Lanczos with one Givens rotation an iteration; between ``extend`` and ``advance`` the caller may stop.

    Names as in Choi, Paige and Saunders (2011), table 2: ``phi`` is the residual's norm (in that of ``M``),
    ``gamma`` the diagonal, ``delta`` the off-diagonal of the triangular factor.
    """

    def __init__(self, system: _System, x0: Tensor | None, ahead: tuple[int, int]) -> None:
        """``ahead``: iterations between two reads, and those allowed."""
        self.system, self._ahead = system, ahead
        self.iteration = 0
        # Where the residual seemed to be the least one, and the iteration goes on to see.
        self.doubted: _Verified | None = None
        self.nonpositive: Tensor | None = None
        b = system.b
        largest = b.abs().max() if b.numel() else b.new_zeros(())
        zero = _Verified(b.new_zeros(b.shape), b, 0.0, 0.0, 0.0, 0.0)
        point = zero if x0 is None else system.measure(x0)
        largest_read, self.b_norm = self.start(point, [largest, b.norm()])
        check_size(largest_read, b.dtype, system.products, x0)
        self._check_start()
        self.first = point if x0 is not None else point._replace(norm=self.b_norm)

    def start(self, point: _Verified, first: list[Tensor]) -> list[float]:
        """Begin a Krylov space at the residual of a point; read ``first`` meanwhile."""
        self.x, residual = self.system.widened(point.x), point.residual
        y = self.system.precondition(residual)
        squared = residual.dot(y)
        beta = squared.sqrt()
        self._front = _Lanczos(residual, torch.zeros_like(residual), y, beta, torch.ones_like(beta))
        self._made: deque[tuple[Tensor, Tensor, list[float]]] = deque()
        self._squared, beta_read, norm, *rest = self._run([squared, beta, residual.norm(), *first])
        self.beta = self.phi = beta_read
        self._is_zero = norm == 0
        # From the norm of the residual to the norm in which phi is measured.
        self.scale = self.beta / norm if norm > 0 else 1.0
        self._cs, self._sn, self._dbar, self._epsilon = -1.0, 0.0, 0.0, 0.0
        # Times their gamma.
        self._w = self._w_old = torch.zeros_like(self.x)
        self._gamma = self._gamma_old = 1.0
        # The present residual, times M.
        self.residual_direction = y
        self._norm = 0.0
        if self.iteration:
            self._check_start()
        return rest

    def _check_start(self) -> None:
        if self.iteration == 0:
            self.system.check_range(self.scale)
        self._check_square(self._squared, self._is_zero)

    def _check_square(self, squared: float, is_zero: bool = True) -> None:
        if squared < 0 or (squared == 0 and not is_zero):
            raise ValueError(
                f"M must be symmetric positive definite, got r^T M r = {squared:.3g}"
                f" in iteration {self.iteration}."
            )

    def _run(self, first: list[Tensor]) -> list[float]:
        """Lanczos steps ahead of what the host knows; their numbers are read together with ``first``."""
        check_every, limit = self._ahead
        made, numbers = [], list(first)
        for _ in range(min(check_every, limit - self.iteration)):
            v, self._front, row = self._front.stepped(self.system)
            made.append((v, self._front.y))
            numbers += row
        known = read(*numbers)
        rest, width = known[len(first) :], len(numbers[len(first) :]) // max(len(made), 1)
        self._made.extend((v, y, rest[i * width : (i + 1) * width]) for i, (v, y) in enumerate(made))
        return known[: len(first)]

    def extend(self) -> None:
        """One Lanczos step: one product, and the entries of the next column of the triangular factor."""
        if not self._made:
            self._run([])
        self._v, self._y, (self.alpha, squared, beta, length, *own) = self._made.popleft()
        # Without M the vectors are of length one.
        own_length = own[0] if own else 1.0
        size = length / own_length if own_length > 0 else 0.0
        if self.iteration == 0:
            self.system.check_range(size)
        self.system.size = max(self.system.size, size)
        self._check_square(squared)
        self.beta = beta
        self._norm = max(self._norm, math.hypot(self.alpha, self.beta))
        self.delta = self._cs * self._dbar + self._sn * self.alpha
        self.gamma_bar = self._sn * self._dbar - self._cs * self.alpha
        self._next_dbar = -self._cs * self.beta

    def is_nonpositive(self) -> bool:
        """Whether ``r^T A r <= 0`` for the residual ``r`` before this iteration."""
        return self._cs * self.gamma_bar >= 0

    def is_stationary(self) -> bool:
        """Whether ``norm(A r)`` is below ``sqrt(eps) norm(A) norm(r)``: no iterate has a smaller residual.

        Closer the recurrence does not come before the iterates of an inconsistent system grow beyond bounds.
        """
        return math.hypot(self.gamma_bar, self._next_dbar) <= math.sqrt(self.system.eps) * self._norm

    def is_closed(self) -> bool:
        """Whether the Krylov space is whole: nothing is further on."""
        return self.beta <= self.system.eps * self._norm

    def agrees(self, point: _Verified) -> bool:
        """Whether the true residual is the recurrence's, to a tenth."""
        return math.sqrt(max(point.squared, 0.0)) <= 1.1 * self.phi

    def doubt(self, best: _Verified) -> None:
        """Go on where a residual seems to be the least one: or the system is ill-conditioned."""
        self.doubted = best
        self.advance()

    def advance(self) -> None:
        """Rotate, and step to the iterate of least residual."""
        gamma = max(math.hypot(self.gamma_bar, self.beta), self.system.eps * self._norm)
        cs, sn = self.gamma_bar / gamma, self.beta / gamma
        # Each sum in one pass, and one rounding.
        w = torch.sub(self._v, self._w_old, alpha=self._epsilon / self._gamma_old)
        w = torch.sub(w, self._w, alpha=self.delta / self._gamma)
        self.x = torch.add(self.x, w, alpha=cs * self.phi / gamma)
        # r_k = sn^2 r_{k-1} - phi_k cs v_{k+1} (Choi, Paige and Saunders 2011, lemma 3.3).
        kept = (sn * sn) * self.residual_direction
        self.residual_direction = torch.sub(kept, self._y, alpha=cs * self.phi / gamma)
        self._epsilon, self._dbar = self._sn * self.beta, self._next_dbar
        self.phi *= sn
        self._w_old, self._w = self._w, w
        self._gamma_old, self._gamma = self._gamma, gamma
        self._cs, self._sn = cs, sn
        self.iteration += 1


class _Lanczos(NamedTuple):
    """The three-term recurrence, all of it on the device; ``y`` is ``M r``, of norm ``beta`` in that of M."""

    r: Tensor
    r_old: Tensor
    y: Tensor
    beta: Tensor
    beta_old: Tensor

    def stepped(self, system: _System) -> tuple[Tensor, _Lanczos, list[Tensor]]:
        """The vector that was multiplied, the next state, and the numbers of the step."""
        v = self.y / self.beta
        Av = system.multiply(v)
        y = torch.addcmul(Av, self.r_old, self.beta / self.beta_old, value=-1)
        alpha = v.dot(y)
        r = torch.addcmul(y, self.r, alpha / self.beta, value=-1)
        y = system.precondition(r)
        squared = r.dot(y)
        beta = squared.sqrt()
        numbers = [alpha, squared, beta, Av.norm()] + ([] if system.M is None else [v.norm()])
        return v, _Lanczos(r, self.r, y, beta, self.beta), numbers


class _Verified(NamedTuple):
    """An iterate with its true residual: that, its norm, its square in the norm of M, and that of x."""

    x: Tensor
    residual: Tensor
    norm: float
    quadratic: float
    squared: float
    length: float


class _System:
    """What is solved, and what true residuals say about it; counts its products.

    Attributes:
        M: The preconditioner, as long as it is of use.
        size: Largest ``norm(A v) / norm(v)`` that the iteration has seen.
    """

    def __init__(self, A: Any, b: Tensor, M: Any) -> None:
        self._A, self.b, self.M = A, b, M
        self.products, self.size = 0, 0.0
        self.eps = torch.finfo(b.dtype).eps

    def multiply(self, v: Tensor) -> Tensor:
        """``A v``."""
        self.products += 1
        product: Tensor = self._A @ v
        return product

    def precondition(self, r: Tensor) -> Tensor:
        """``M r``."""
        return r if self.M is None else self.M @ r

    def widened(self, x: Tensor) -> Tensor:
        """In double precision, where there is one.

        Rounding in the recurrence of w counts with the square of the condition number (Sleijpen, van der
        Vorst and Modersitzki 2000, Differences in the effects of rounding errors in Krylov solvers).
        """
        return x if x.device.type == "mps" else x.double()

    def check_range(self, size: float) -> None:
        """Raise where a number of this size leaves the range of the dtype."""
        check_range(self._A, self.products, self.b.dtype, size)

    def measure(self, x: Tensor) -> _Verified:
        """An iterate with its true residual: one product."""
        x = x.to(self.b)
        Ax = self.multiply(x)
        residual = self.b - Ax
        squared = residual.dot(self.precondition(residual))
        numbers = [residual.norm(), x.dot(Ax), squared, x.norm()]
        return _Verified(x, residual, *read(*numbers))

    def is_stationary_at(self, point: _Verified) -> bool:
        """Whether ``norm(A r)`` is small as in ``_Recurrence.is_stationary``, but with the true residual.

        Ten times as loose, in the Euclidean norm: one product.
        """
        limit = 10 * math.sqrt(self.eps) * self.size * point.norm
        return read(self.multiply(point.residual).norm())[0] <= limit

    def is_at_rounding(self, point: _Verified, times: float = 10) -> bool:
        """Whether the residual is that of a solution which is exact but for so many times its rounding."""
        return point.norm <= times * self.eps * self.size * point.length

    def is_better(self, point: _Verified, other: _Verified) -> bool:
        """Whether the residual is less to a degree that says that there is no least one yet."""
        factor = GOES_ON_AT_ROUNDING if self.is_at_rounding(point, 1) else GOES_ON
        return point.norm < factor * other.norm
