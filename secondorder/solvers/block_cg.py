"""Conjugate gradients for many right-hand sides that share one Krylov space.

Reference: O'Leary (1980), The block conjugate gradient algorithm and related methods; with orthonormal
factors of the residuals, so that dependent columns do no harm, as in Dubrulle (2001), Retooling the method of
block conjugate gradients, algorithm BCGrQ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from secondorder.solvers._checks import check_limits, check_preconditioner, check_start, check_system
from secondorder.solvers._result import SolveResult, of_columns
from secondorder.solvers._scale import Sizes, exponent_of, shifted, shifted_number


def block_cg(
    A: Any,
    B: Tensor,
    *,
    X0: Tensor | None = None,
    M: Any = None,
    rtol: float = 1e-5,
    atol: float = 0.0,
    max_iter: int | None = None,
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

    Returns:
        ``SolveResult`` whose ``columns`` hold each column's own; "converged", "max_iter",
        "negative_curvature", "singular" (``direction`` is shared), "stagnated" or "non_finite". One column
        that is not finite makes all so.

    Raises:
        TypeError: ``B`` is not a floating-point tensor, or ``A`` has another dtype.
        ValueError: ``B`` is not a block; shapes do not fit; ``A`` is not symmetric; a tolerance is negative;
            ``M`` is not positive definite.

    Cost: an iteration, one product with a block of at most k columns, ``10 n k^2`` operations and three host
    reads; four blocks of storage; one more product whenever the columns claim convergence.

    Example:
        >>> A = torch.diag(torch.tensor([1.0, 2.0, 4.0]))
        >>> block_cg(A, torch.eye(3)).iterations
        1
    """
    _check(A, B, X0, M, (rtol, atol, max_iter))
    B = B.detach()
    # Columns whose squares would leave the range are solved at size one.
    largest = B.abs().amax(0) if B.shape[0] else B.new_zeros(B.shape[1])
    exponents = [exponent_of(size, B.dtype) for size in largest.tolist()]
    atols = [shifted_number(atol, -exponent) for exponent in exponents]
    if X0 is not None:
        # The solution of a zero right-hand side is zero.
        X0 = _divided(torch.where(largest == 0, 0.0, X0.to(B)), exponents)
    limit = 10 * B.shape[0] if max_iter is None else max_iter
    run = _Block(A, _divided(B, exponents), X0, M, rtol, B.new_tensor(atols))
    while True:
        status = run.iterate(limit)
        before = run.verified
        run.measure()
        is_open = run.residual_norms > run.tolerances
        # Columns whose true residual belies the recurrence go on from it, as long as that helps.
        helps = bool((is_open & (run.residual_norms < 0.5 * before)).any())
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


class _Block:
    """The state of the iteration; directions are shared, residuals belong to the columns."""

    def __init__(self, A: Any, B: Tensor, X0: Tensor | None, M: Any, rtol: float, atol: Tensor) -> None:
        self._A, self._B, self._M = A, B, M
        self.tolerances = torch.maximum(rtol * B.norm(dim=0), atol)
        self.verified = torch.full_like(self.tolerances, math.inf)
        self.residual_norms = self.verified
        self.iteration, self.products = 0, 0
        self._X = self._start = torch.zeros_like(B) if X0 is None else X0.to(B)
        self._R = B if X0 is None else B - self._multiply(self._X)
        self._direction: Tensor | None = None

    def _multiply(self, V: Tensor) -> Tensor:
        self.products += V.shape[1]
        product: Tensor = self._A @ V
        return product

    def iterate(self, limit: int) -> str:
        """Iterate until all columns claim convergence or something stops it; the status says what."""
        Q, S = torch.linalg.qr(self._R)
        # The last directions, A times them, and the inverse of their curvatures.
        P, AP = (self._B.new_zeros(self._B.shape[0], 0) for _ in range(2))
        inverse = self._B.new_zeros(0, 0)
        steepest, flattest, self._direction = 0.0, math.inf, None
        while True:
            # The residuals are Q S.
            stopped_by = self._judge(S.norm(dim=0), limit)
            if stopped_by is not None:
                return stopped_by
            Z = Q if self._M is None else self._preconditioned(Q)
            P = torch.linalg.qr(Z - P @ (inverse @ (AP.T @ Z)))[0]
            AP = self._multiply(P)
            curvatures = (P.T @ AP + AP.T @ P) / 2
            if not bool(curvatures.isfinite().all()):
                return "non_finite"
            values, vectors = torch.linalg.eigh(curvatures)
            lowest, highest = values[[0, -1]].tolist()
            if lowest <= 0:
                self._direction = P @ vectors[:, 0]
                return "negative_curvature"
            steepest = max(steepest, highest)
            if min(lowest, flattest) <= torch.finfo(values.dtype).eps * steepest:
                # Along such a direction a step has no bound: those already made are undone.
                self._X = self._start if flattest < lowest else self._X
                self._direction = P @ vectors[:, 0] if self._direction is None else self._direction
                return "singular"
            if lowest < flattest:
                flattest, self._direction = lowest, P @ vectors[:, 0]
            # (P^T A P)^-1, by the eigenvectors that were needed anyway.
            inverse = (vectors / values) @ vectors.T
            step = inverse @ (P.T @ Q)
            self._X = self._X + P @ (step @ S)
            Q, C = torch.linalg.qr(Q - AP @ step)
            S = C @ S
            self.iteration += 1

    def _judge(self, norms: Tensor, limit: int) -> str | None:
        """Whether residuals of these norms end the iteration."""
        total, still_open = torch.stack([norms.sum(), (norms > self.tolerances).sum()]).tolist()
        if not math.isfinite(total):
            return "non_finite"
        if not still_open:
            return "converged"
        return "max_iter" if self.iteration >= limit else None

    def _preconditioned(self, Q: Tensor) -> Tensor:
        Z: Tensor = self._M @ Q
        least = float((Q * Z).sum(0).min())
        if least <= 0:
            raise ValueError(
                f"M must be symmetric positive definite, got r^T M r = {least:.3g} in iteration"
                f" {self.iteration}."
            )
        return Z

    def measure(self) -> None:
        """True residuals, from which the iteration goes on: one product with the block."""
        AX = self._multiply(self._X)
        self._R = self._B - AX
        self.verified = self.residual_norms = self._R.norm(dim=0)
        self._quadratics = (self._X * AX).sum(0)

    def result(self, otherwise: str, exponents: Sequence[int]) -> SolveResult:
        """Each column's result, in the given units: converged, or what stopped the iteration."""
        norms, tolerances = self.residual_norms.tolist(), self.tolerances.tolist()
        columns = [
            SolveResult(
                x,
                "non_finite" if not math.isfinite(norm) else "converged" if norm <= tolerance else otherwise,
                self.iteration,
                norm,
                quadratic,
                products=0,
                direction=self._direction if otherwise in ("negative_curvature", "singular") else None,
            )
            for x, norm, tolerance, quadratic in zip(
                self._X.unbind(1), norms, tolerances, self._quadratics.tolist(), strict=True
            )
        ]
        columns = [
            Sizes(0, exponent, 0).restored(column, self._A, b)
            for column, exponent, b in zip(columns, exponents, self._B.unbind(1), strict=True)
        ]
        whole = of_columns(columns, self._B[:, :0].sum(1))
        direction = self._direction if whole.status in ("negative_curvature", "singular") else None
        return whole._replace(products=self.products, direction=direction)
