"""Conjugate gradients for many right-hand sides that share one Krylov space.

Reference: O'Leary (1980), The block conjugate gradient algorithm and related methods; with orthonormal
factors of the residuals, so that dependent columns do no harm, as in Dubrulle (2001), Retooling the method of
block conjugate gradients, algorithm BCGrQ.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secondorder.solvers._checks import (
    check_count,
    check_limits,
    check_preconditioner,
    check_start,
    check_system,
)
from secondorder.solvers._result import SolveResult, of_columns
from secondorder.solvers._scale import Sizes, exponent_of, shifted, shifted_number
from secondorder.vectors.host import fetched, listed


def block_cg(
    A: Any,
    B: Tensor,
    *,
    X0: Tensor | None = None,
    M: Any = None,
    rtol: float = 1e-5,
    atol: float = 0.0,
    max_iter: int | None = None,
    check_every: int = 1,
) -> SolveResult:
    """Solve ``A X = B`` for a symmetric positive definite ``A`` and many right-hand sides at once.

    All columns share their search directions: each iteration minimises over the sum of the Krylov spaces of
    all columns, so it takes far fewer iterations than one column at a time. Columns that are dependent, or
    have converged, make new directions for the others.

    Args:
        A: Anything with ``A @ V`` for ``V`` of shape (n, k), symmetric.
        B: Right-hand sides, shape (n, k).
        X0: Start, shape (n, k); zeros when None.
        M: Preconditioner, ``M @ R`` close to ``A^-1 R``, symmetric positive definite; identity when None.
        rtol: A column has converged when ``norm(b - A x) <= max(rtol * norm(b), atol)``. Dimensionless.
        atol: See ``rtol``; in units of ``B``.
        max_iter: Number of block iterations allowed; ``10 * n`` when None.
        check_every: Iterations between two host reads. Those that turn out to be past the end are thrown
            away: results are the same, bit for bit, for up to ``check_every - 1`` block products more.

    Returns:
        ``SolveResult`` whose ``columns`` hold each column's own; "converged", "max_iter",
        "negative_curvature", "singular" (``direction`` is shared), "stagnated" or "non_finite". One column
        that is not finite makes all so.

    Raises:
        TypeError: ``B`` is not a floating-point tensor, or ``A`` has another dtype.
        ValueError: ``B`` is not a block; shapes do not fit; ``A`` is not symmetric; a tolerance is negative;
            ``M`` is not positive definite.

    Cost: an iteration, one product with a block of at most k columns and ``10 n k^2`` operations; four blocks
    of storage, and two for each of ``check_every``; one more product whenever the columns claim convergence.
    Host reads: one for ``check_every`` iterations, one with each such product, and one at the start; 16
    launches an iteration, 18 with ``M``.

    Example:
        >>> A = torch.diag(torch.tensor([1.0, 2.0, 4.0]))
        >>> block_cg(A, torch.eye(3)).iterations
        1
    """
    _check(A, B, X0, M, (rtol, atol, max_iter))
    check_count("check_every", check_every, 1)
    B = B.detach()
    # Columns whose squares would leave the range are solved at size one.
    largest = B.abs().amax(0) if B.shape[0] else B.new_zeros(B.shape[1])
    exponents = [exponent_of(size, B.dtype) for size in listed(largest)]
    atols = [shifted_number(atol, -exponent) for exponent in exponents]
    if X0 is not None:
        # The solution of a zero right-hand side is zero.
        X0 = _divided(torch.where(largest == 0, 0.0, X0.to(B)), exponents)
    limit = 10 * B.shape[0] if max_iter is None else max_iter
    run = _Block(A, _divided(B, exponents), X0, M, (rtol, atols), (check_every, limit))
    while True:
        status = run.iterate(limit)
        before = run.residual_norms
        run.measure()
        # Columns whose true residual belies the recurrence go on from it, as long as that helps.
        columns = zip(run.residual_norms, run.tolerances, before, strict=True)
        helps = any(norm > tolerance and norm < 0.5 * last for norm, tolerance, last in columns)
        if status != "converged" or not helps:
            break
    return run.result("stagnated" if status == "converged" else status, exponents)


def _check(A: Any, B: Tensor, X0: Tensor | None, M: Any, limits: tuple[Any, ...]) -> None:
    check_system(A, B)
    if B.ndim != 2:
        raise ValueError(f"B must have shape (n, k), got {tuple(B.shape)}; use cg for one right-hand side.")
    if X0 is not None:
        check_start(X0, B, B.shape[0])
    check_limits(*limits)
    check_preconditioner(M, B)


def _divided(B: Tensor, exponents: Sequence[int]) -> Tensor:
    """The columns over powers of two."""
    if not any(exponents):
        return B
    return torch.stack([shifted(b, -e) for b, e in zip(B.unbind(1), exponents, strict=True)], dim=1)


class _Ahead(NamedTuple):
    """An iteration that was made: where it ends, along which directions, and its numbers.

    Attributes:
        X: Solutions after it.
        P: Its directions.
        curvatures: ``P^T A P``, on the host.
        norms: Of the residuals after it, on the host.
        failed: Not zero where the curvatures have no Cholesky factor.
        least: Least ``q^T M q``.
    """

    X: Tensor
    P: Tensor
    curvatures: Tensor
    norms: list[float]
    failed: float
    least: float


class _Front(NamedTuple):
    """The iteration itself, ahead of what the host knows: residuals ``Q S``, inverse of the curvatures."""

    X: Tensor
    Q: Tensor
    S: Tensor
    P: Tensor | None = None
    AP: Tensor | None = None
    inverse: Tensor | None = None


class _Block:
    """The state of the iteration; directions are shared, residuals belong to the columns."""

    def __init__(
        self,
        A: Any,
        B: Tensor,
        X0: Tensor | None,
        M: Any,
        goals: tuple[float, list[float]],
        ahead: tuple[int, int],
    ) -> None:
        """``goals``: relative and absolute ones; ``ahead``: iterations between reads, and those allowed."""
        self._A, self._B, self._M, self._goals, self._ahead = A, B, M, goals, ahead
        self.tolerances: list[float] = []
        self.residual_norms = [math.inf] * B.shape[1]
        self.iteration, self.products = 0, 0
        self._X = self._start = torch.zeros_like(B) if X0 is None else X0.to(B)
        self._R = B if X0 is None else B - self._multiply(self._X)
        k = min(B.shape)
        self._identity = torch.eye(k, dtype=B.dtype, device=B.device)
        # Directions and their curvatures, of which one combination has the least.
        self._flat: tuple[Tensor, Tensor] | None = None

    def _multiply(self, V: Tensor) -> Tensor:
        self.products += V.shape[1]
        product: Tensor = self._A @ V
        return product

    def iterate(self, limit: int) -> str:
        """Iterate until all columns claim convergence or something stops it; the status says what."""
        self._front = _Front(self._X, *torch.linalg.qr(self._R))
        self._made: deque[_Ahead] = deque()
        norms = self._run([self._front.S.norm(dim=0), self._B.norm(dim=0)])
        columns, (rtol, atols) = self._B.shape[1], self._goals
        self.tolerances = [max(rtol * b, atol) for b, atol in zip(norms[columns:], atols, strict=True)]
        residuals, steepest, flattest, self._flat = norms[:columns], 0.0, math.inf, None
        while True:
            stopped_by = self._judge(residuals, limit)
            if stopped_by is not None:
                return stopped_by
            if not self._made:
                self._run([])
            made = self._made.popleft()
            self._check_preconditioner(made.least)
            if not bool(made.curvatures.isfinite().all()):
                return "non_finite"
            # On the host: nothing waits.
            values = torch.linalg.eigvalsh(made.curvatures)  # waits: for nothing, it is on the host
            lowest, highest = float(values[0]), float(values[-1])
            here = made.P, made.curvatures
            if lowest <= 0:
                self._flat = here
                return "negative_curvature"
            steepest = max(steepest, highest)
            if made.failed or min(lowest, flattest) <= torch.finfo(values.dtype).eps * steepest:
                # Along such a direction a step has no bound: those already made are undone.
                self._X = self._start if flattest < lowest else self._X
                self._flat = here if self._flat is None else self._flat
                return "singular"
            if lowest < flattest:
                flattest, self._flat = lowest, here
            self._X, residuals = made.X, made.norms
            self.iteration += 1

    def _run(self, first: list[Tensor]) -> list[float]:
        """Iterate ahead of what the host knows; the numbers are read together with ``first``."""
        check_every, limit = self._ahead
        made, numbers = [], list(first)
        for _ in range(min(check_every, limit - self.iteration)):
            self._front, rows = self._iterated(self._front)
            made.append(self._front)
            numbers += rows
        known = fetched(torch.cat([number.reshape(-1) for number in numbers]))
        rest, k = known[sum(number.numel() for number in first) :], self._B.shape[1]
        for front, row in zip(made, rest.chunk(len(made) or 1), strict=False):
            assert front.P is not None
            size = front.P.shape[1]
            matrix = row[: size**2].view(size, size).to(self._B.dtype)
            norms, others = row[size**2 : size**2 + k].tolist(), row[size**2 + k :].tolist()
            symmetric = (matrix + matrix.T) / 2
            self._made.append(
                _Ahead(front.X, front.P, symmetric, norms, others[0], min(others[1:], default=1.0))
            )
        return known[: len(known) - len(rest)].tolist()

    def _iterated(self, at: _Front) -> tuple[_Front, list[Tensor]]:
        """One iteration, and its numbers, all of it on the device."""
        Z: Tensor = at.Q if self._M is None else self._M @ at.Q
        least = [] if self._M is None else [(at.Q * Z).sum(0)]
        if at.P is not None and at.AP is not None and at.inverse is not None:
            Z = torch.addmm(Z, at.P, at.inverse @ (at.AP.T @ Z), alpha=-1)
        P = torch.linalg.qr(Z)[0]
        AP = self._multiply(P)
        # Of which the factor takes the lower half.
        curvatures = P.T @ AP
        L, failed = torch.linalg.cholesky_ex(curvatures)
        # Unlike cholesky_inverse it does not complain where there is none, which the host sees later.
        inverse = torch.cholesky_solve(self._identity, L)
        step = inverse @ (P.T @ at.Q)
        X = torch.addmm(at.X, P, step @ at.S)
        Q, C = torch.linalg.qr(torch.addmm(at.Q, AP, step, alpha=-1))
        S = C @ at.S
        return _Front(X, Q, S, P, AP, inverse), [curvatures, S.norm(dim=0), failed, *least]

    def _judge(self, norms: list[float], limit: int) -> str | None:
        """Whether residuals of these norms end the iteration."""
        if not all(map(math.isfinite, norms)):
            return "non_finite"
        if not any(norm > tolerance for norm, tolerance in zip(norms, self.tolerances, strict=True)):
            return "converged"
        return "max_iter" if self.iteration >= limit else None

    def _check_preconditioner(self, least: float) -> None:
        if least <= 0:
            raise ValueError(
                f"M must be symmetric positive definite, got r^T M r = {least:.3g} in iteration"
                f" {self.iteration}."
            )

    def measure(self) -> None:
        """True residuals, from which the iteration goes on: one product with the block."""
        AX = self._multiply(self._X)
        self._R = self._B - AX
        numbers = listed(torch.cat([self._R.norm(dim=0), (self._X * AX).sum(0)]))
        k = len(numbers) // 2
        self.residual_norms, self._quadratics = numbers[:k], numbers[k:]

    def result(self, otherwise: str, exponents: Sequence[int]) -> SolveResult:
        """Each column's result, in the given units: converged, or what stopped the iteration."""
        direction = None
        if self._flat is not None and otherwise in ("negative_curvature", "singular"):
            P, curvatures = self._flat
            lowest = torch.linalg.eigh(curvatures)[1][:, 0]  # waits: for nothing, it is on the host
            direction = P @ lowest.to(self._B.device, non_blocking=True)
        columns = [
            SolveResult(
                x,
                "non_finite" if not math.isfinite(norm) else "converged" if norm <= tolerance else otherwise,
                self.iteration,
                norm,
                quadratic,
                products=0,
                direction=direction,
            )
            for x, norm, tolerance, quadratic in zip(
                self._X.unbind(1), self.residual_norms, self.tolerances, self._quadratics, strict=True
            )
        ]
        columns = [
            Sizes(0, exponent, 0).restored(column, self._A, b)
            for column, exponent, b in zip(columns, exponents, self._B.unbind(1), strict=True)
        ]
        whole = of_columns(columns, self._B[:, :0].sum(1))
        direction = direction if whole.status in ("negative_curvature", "singular") else None
        return whole._replace(products=self.products, direction=direction)
