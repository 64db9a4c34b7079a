"""The inverse of an objective's curvature: which matrix, how much damping, and how systems are solved."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secondorder.data.batches import Batch, count_samples
from secondorder.data.objective import Objective
from secondorder.influence.ekfac import Ekfac
from secondorder.influence.samples import Samples
from secondorder.operators.curvature import GaussNewton
from secondorder.operators.linear import LinearOperator
from secondorder.operators.residual import ResidualJacobian
from secondorder.solvers import block_cg, eigsh, minres

CURVATURES = ("ggn", "hessian", "fisher")
SOLVERS = ("auto", "dense", "dual", "block_cg", "minres", "ekfac")
PRECONDITIONERS = (None, "ekfac")
# Rows of the largest matrix that is factorised: 3000^3 / 3 operations take about a second.
DENSE_LIMIT = 3000
# Samples whose graphs are kept between products: those of one batch by default.
KEPT_SAMPLES = 1024
# Bytes of the Jacobian of residuals.
DUAL_MEMORY = 2.0**31
# Lanczos finds the ends of a spectrum to this, relative to its largest value, and is allowed these steps.
LANCZOS_RTOL, LANCZOS_STEPS = 1e-3, 300


class Solved(NamedTuple):
    """Solutions of a block of systems.

    Attributes:
        x: Shape (n, k).
        status: A key of ``STATUS_TEXT``.
        residual_norm: The largest true residual of a column, relative to its right-hand side.
    """

    x: Tensor
    status: str
    residual_norm: float


class Inverse:
    """``(B + damping I)^-1`` at the objective's present parameters.

    Args:
        objective: Gives the curvature, its L2 term included.
        curvature: "ggn", "hessian", "fisher", or an operator of shape (n, n).
        damping: Shift, loss over parameter squared. None: zero where the matrix is positive definite, else
            the least that lifts its lowest eigenvalue to ``sqrt(eps)`` of the largest.
        solver: "dense", "dual", "block_cg", "minres", "ekfac", or "auto".
        rtol: Of the iterative solvers.
        count: Samples of the objective.
        preconditioner: "ekfac", of "block_cg", or None.

    Attributes:
        operator: ``B``.
        damping: As used.
        solver: As used.
        rtol: As given.
    """

    def __init__(
        self,
        objective: Objective,
        curvature: Any,
        damping: float | None,
        solver: str,
        rtol: float,
        count: int,
        preconditioner: str | None = None,
    ) -> None:
        self._objective, self.rtol = objective, rtol
        self.operator = operator_of(objective, curvature, count)
        self.damping = damping or 0.0
        self._factor: Tensor | None = None
        self._ekfac: Any = None
        self._matrix: Tensor | None = None
        n, is_ggn = self.operator.shape[0], curvature == "ggn"
        shift = objective.l2 + self.damping
        residuals = None
        if solver == "dual" or (solver == "auto" and n > DENSE_LIMIT and is_ggn and shift > 0):
            residuals = _residuals(objective, count, DENSE_LIMIT if solver == "dual" else min(DENSE_LIMIT, n))
        if solver == "dual" and (residuals is None or not is_ggn or not shift > 0):
            raise ValueError(
                "solver 'dual' needs curvature='ggn' of a convex loss, few rows and damping or l2 above zero;"
                " use solver='auto'."
            )
        self.solver = solver
        if solver == "auto":
            self.solver = "dense" if n <= DENSE_LIMIT else "dual" if residuals is not None else "block_cg"
        if self.solver == "dense":
            self._factorise(damping)
        elif self.solver == "ekfac":
            self._ekfac = self._approximation(count, None if damping is None and not objective.l2 else shift)
            self.damping = self._ekfac.shift - objective.l2
        elif residuals is not None:
            self._shift, self._residuals = shift, residuals
            gram = residuals @ residuals.T
            gram.diagonal().add_(shift)
            self._factor = torch.linalg.cholesky(gram)  # waits: once
        elif damping is None and not (curvature in ("ggn", "fisher") and objective.l2 > 0):
            self.damping = _lanczos_shift(self.operator)
        if preconditioner is not None:
            self._ekfac = self._approximation(count, objective.l2 + self.damping)

    def _approximation(self, count: int, shift: float | None) -> Ekfac:
        share = 1 / count if self._objective.reduction == "mean" else 1.0
        return Ekfac(self._objective, share, shift)

    def _factorise(self, damping: float | None) -> None:
        """In double precision: a factor of single precision loses half of a score's digits."""
        matrix = self.operator.dense().double()
        self._matrix = matrix = (matrix + matrix.T) / 2
        if not bool(matrix.isfinite().all()):
            raise ValueError(
                "the curvature at the parameters must be finite; look for NaN or infinity in data and"
                " parameters."
            )
        if damping is None:
            values = torch.linalg.eigvalsh(matrix)  # waits: once
            self.damping = _least_shift(values, self.operator.dtype)
        matrix.diagonal().add_(self.damping)
        factor, info = torch.linalg.cholesky_ex(matrix)
        self._factor = None if int(info) else factor

    def solve(self, B: Tensor) -> Solved:
        """Solve for the columns of a block (n, k)."""
        if not bool(B.isfinite().all()):
            return Solved(torch.full_like(B, math.nan), "non_finite", math.nan)
        if not B.shape[1]:
            return Solved(B, "converged", 0.0)
        if self.solver == "dense":
            return self._solve_dense(B)
        if self.solver == "dual" and self._factor is not None:
            A, b = self._residuals, B.double()
            x = (b - A.T @ torch.cholesky_solve(A @ b, self._factor)) / self._shift
            return Solved(x.to(B), "converged", _relative(b - A.T @ (A @ x) - self._shift * x, b))
        operator = self.operator + self.damping
        if self.solver == "ekfac":
            x = self._ekfac @ B
            return Solved(x, "approximate", _relative(B - operator @ x, B))
        if self.solver == "minres":
            found = minres(operator, B, rtol=self.rtol)
        else:
            found = block_cg(operator, B, M=self._ekfac, rtol=self.rtol)
        if found.status in ("negative_curvature", "singular"):
            # The damping that was asked for leaves the matrix indefinite.
            found = minres(operator, B, rtol=self.rtol)
            found = found._replace(
                status="negative_curvature" if found.status == "converged" else found.status
            )
        norms = B.norm(dim=0).clamp_min(torch.finfo(B.dtype).tiny).tolist()
        columns = zip(found.columns, norms, strict=True)
        return Solved(found.x, found.status, max(c.residual_norm / norm for c, norm in columns))

    def _solve_dense(self, B: Tensor) -> Solved:
        matrix, b = self._matrix, B.double()
        assert matrix is not None
        if self._factor is not None:
            x = torch.cholesky_solve(b, self._factor)
        else:
            x, info = torch.linalg.solve_ex(matrix, b)
            if int(info):
                return Solved(torch.full_like(B, math.nan), "singular", math.nan)
        residual = _relative(b - matrix @ x, b)
        status = "converged" if residual <= torch.finfo(B.dtype).eps ** 0.5 else "stagnated"
        if self._factor is None and status == "converged":
            status = "negative_curvature"
        return Solved(x.to(B), status, residual)

    def __matmul__(self, v: Tensor) -> Tensor:
        """The inverse as a preconditioner, exact ones only."""
        return self.solve(v.reshape(len(v), -1)).x.reshape(v.shape)

    @property
    def is_exact(self) -> bool:
        """Whether solutions come from a factor, and do not need the graph."""
        return self._factor is not None


def operator_of(objective: Objective, curvature: Any, count: int) -> LinearOperator:
    """The curvature by name, or as it is; graphs are kept where all data is not more than a batch."""
    keep = True if count <= KEPT_SAMPLES else None
    if isinstance(curvature, LinearOperator):
        n = sum(p.numel() for p in objective.parameters)
        if curvature.shape != (n, n):
            raise ValueError(f"curvature must have shape {(n, n)}, got {curvature.shape}.")
        return curvature
    if curvature == "fisher":
        return objective.fisher(keep_graph=keep)
    return (
        objective.hessian(keep_graph=keep)
        if curvature == "hessian"
        else objective.gauss_newton(keep_graph=keep)
    )


def _residuals(objective: Objective, count: int, most: int) -> Tensor | None:
    """``A`` with ``A^T A`` the Gauss-Newton matrix without L2; None where it has more than ``most`` rows."""
    samples, parts = Samples(objective), []
    rows, n = 0, sum(p.numel() for p in objective.parameters)

    def of(batch: Batch) -> Tensor | None:
        with torch.enable_grad():
            operator = ResidualJacobian.of(GaussNewton(*objective.passes.loss(batch), objective.parameters))
        if operator is None or not operator.fits or rows + operator.shape[0] > most:
            return None
        return operator.dense() * objective.passes.weight(count_samples(batch)) ** 0.5

    for _, batch in samples.walk():
        part = of(batch)
        if part is None or (rows + len(part)) * n * 8 > DUAL_MEMORY:
            return None
        rows += len(part)
        parts.append(part.double())
    scale = count if objective.reduction == "mean" else 1
    return torch.cat(parts) / scale**0.5


def _least_shift(values: Tensor, dtype: torch.dtype) -> float:
    """Of a spectrum, or its ends, ascending: what lifts its lowest end to ``sqrt(eps)`` of the largest."""
    lowest, highest = float(values[0]), float(values.abs().max())
    rounding = torch.finfo(dtype).eps * highest
    return 0.0 if lowest > 8 * rounding else torch.finfo(dtype).eps ** 0.5 * highest - min(lowest, 0.0)


def _lanczos_shift(operator: LinearOperator) -> float:
    generator = torch.Generator(operator.device).manual_seed(0)
    found = eigsh(operator, 2, which="BE", rtol=LANCZOS_RTOL, max_iter=LANCZOS_STEPS, generator=generator)
    # The lowest eigenvalue lies within its residual of what was found.
    values = found.values.double()
    values[0] = values[0] - found.residual_norms[0] if values[0] <= found.residual_norms[0] else values[0]
    return _least_shift(values, operator.dtype)


def _relative(residual: Tensor, b: Tensor) -> float:
    return float((residual.norm(dim=0) / b.norm(dim=0).clamp_min(torch.finfo(b.dtype).tiny)).max())
