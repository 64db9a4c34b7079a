"""Levenberg and Marquardt's method for a batch of problems, each with its own damping."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...methods.acceleration import LARGEST, PART, SEEN
from ...methods.control import ACCEPTANCE
from ...methods.scale import GROWING
from . import control
from .evaluation import Batch, is_separable
from .factors import least_squares_solve, norms, row_sums
from .state import CODES, Ledger, Solved

FIRST_DAMPING, LEAST_DAMPING, MOST_DAMPING = 1e-3, 1e-20, 1e30
# Rounding of the residuals, in units of what one rounding of x and of each residual does to them.
NOISE = 10.0
# Steps of Gauss and Newton that converge shrink to less than this.
SHRINKS = 0.9
# Rounds before steps are bent: what is left then is hard, and where nothing is, that is an evaluation saved.
PLAIN = 15
# Damping that does not hold back a step, in units of the columns.
LOOSE = 1e-3


class Tolerances(NamedTuple):
    """As of ``least_squares``: relative to x, and the cosine between residuals and each column."""

    xtol: float
    gtol: float


class At(NamedTuple):
    """Points of the problems that are left.

    Attributes:
        x: Shape (L, n).
        residuals: Shape (L, m).
        columns: Of the Jacobian, n of shape (L, m).
        damping, growth: Of each, shape (L,).
        units: Scale of the variables, shape (L, n).
        sizes: Norms of the columns, shape (L, n).
        norm: Of the residuals, shape (L,).
        length: Of the last step, in these units, shape (L,).
    """

    x: Tensor
    residuals: Tensor
    columns: tuple[Tensor, ...]
    damping: Tensor
    growth: Tensor
    units: Tensor
    sizes: Tensor
    norm: Tensor
    length: Tensor

    def kept(self, index: Tensor) -> At:
        """Of some of them."""
        return At(
            self.x[index],
            self.residuals[index],
            tuple(column[index] for column in self.columns),
            self.damping[index],
            self.growth[index],
            self.units[index],
            self.sizes[index],
            self.norm[index],
            self.length[index],
        )


def solve(batch: Batch, x0: Tensor, tolerances: Tolerances, max_iter: int, accelerates: bool) -> Solved:
    """Minimise half the sum of squares of each problem.

    Args:
        batch: Residuals, (L, m).
        x0: Shape (B, n).
        tolerances: When a problem is done.
        max_iter: Rounds: a step of every problem that is left.
        accelerates: Whether steps are bent, for one more evaluation a round.
    """
    return _Run(batch, x0, tolerances, accelerates).to_the_end(max_iter)


def residuals_of(batch: Batch, x: Tensor) -> Tensor:
    """Flat for each problem, shape (L, m)."""
    return batch(x).flatten(1)


def jacobian(batch: Batch, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Residuals, and the columns of their Jacobian, from one kept graph of ``u -> J^T u``."""
    with torch.enable_grad():
        y = x.detach().requires_grad_()
        r = residuals_of(batch, y)
        if not r.requires_grad:
            return r, tuple(torch.zeros_like(r) for _ in range(x.shape[1]))
        u = torch.zeros_like(r, requires_grad=True)
        (g,) = torch.autograd.grad(r, y, u, create_graph=True)
        if not g.requires_grad:
            return r.detach(), tuple(torch.zeros_like(r) for _ in range(x.shape[1]))
        columns = [torch.autograd.grad(part, u, retain_graph=True)[0] for part in g.sum(0).unbind()]
    return r.detach(), tuple(columns)


class _Run:
    """One batch."""

    def __init__(self, batch: Batch, x0: Tensor, tolerances: Tolerances, accelerates: bool) -> None:
        self._batch, self._tolerances, self._accelerates = batch, tolerances, accelerates
        self._eps = torch.finfo(x0.dtype).eps
        r, columns = jacobian(batch, x0)
        self._nfev = self._njev = 1
        sizes, ones = _sizes(columns), torch.ones_like(x0[:, 0])
        units = torch.where(sizes > 0, sizes, 1.0)
        self._at = At(
            *(x0, r, columns, FIRST_DAMPING * ones, 2 * ones), units, sizes, norms(r), math.inf * ones
        )
        self._ledger = Ledger(x0)
        self._is_separable = is_separable(batch, x0, batch(x0).detach())

    def to_the_end(self, max_iter: int) -> Solved:
        """Rounds, until all are done."""
        self._settle(torch.zeros_like(self._at.damping, dtype=torch.bool), self._finite())
        for number in range(max_iter):
            kept = self._ledger.left(self._is_separable)
            if kept is not None:
                if not len(kept):
                    break
                self._at, self._batch = self._at.kept(kept), self._batch.at(kept)
            self._round(number)
        return self._ledger.solved(self._nfev, self._njev, 0)

    def _finite(self) -> Tensor:
        at = self._at
        return (at.norm + row_sums(at.sizes)).isfinite()

    def _round(self, number: int) -> None:
        """A step of every problem, taken or not."""
        at, eps = self._at, self._eps
        self._ledger.count()
        scaled = [column / at.units[:, i : i + 1] for i, column in enumerate(at.columns)]
        z, _ = least_squares_solve(scaled, -at.residuals, at.damping)
        norm = at.norm
        noise = eps * (row_sums(at.units * at.x.abs()) + norm)
        moved = _combination(scaled, z)
        linear, quadratic = -row_sums(moved * at.residuals), row_sums(moved.square())
        predicted = linear - 0.5 * quadratic
        bent, is_trusted = z, torch.ones_like(predicted, dtype=torch.bool)
        if self._accelerates and number >= PLAIN:
            bent, is_trusted = self._bent(scaled, z, moved, predicted > SEEN * noise * norm)
        step = bent / at.units
        trial, columns = jacobian(self._batch, at.x + step)
        self._nfev, self._njev = self._nfev + 1, self._njev + 1
        actual = 0.5 * row_sums((at.residuals - trial) * (at.residuals + trial))
        sizes = _sizes(columns)
        is_usable = is_trusted & (actual + row_sums(sizes)).isfinite() & (predicted > 0)
        rho = torch.where(is_usable, actual / predicted, -math.inf)
        limit = NOISE * noise * norm
        is_quiet = (predicted <= limit) & (actual.abs() <= 100 * limit)
        rho = torch.where(is_quiet & is_usable & (rho <= ACCEPTANCE), 0.5, rho)
        is_short = (bent.abs() <= self._tolerances.xtol * (at.units * at.x).abs()).all(1)
        length = norms(z)
        # Within rounding, steps go on as long as they shrink.
        done = is_short & (at.damping <= LOOSE) | is_quiet & ~(length <= SHRINKS * at.length)
        self._move(rho, at.x + step, trial, columns, sizes, number)
        self._at = self._at._replace(length=length)
        stuck = self._at.damping > MOST_DAMPING
        self._settle(done | stuck, self._finite(), is_stuck=stuck & ~done)

    def _bent(self, scaled: list[Tensor], z: Tensor, moved: Tensor, is_seen: Tensor) -> tuple[Tensor, Tensor]:
        """The step with half its acceleration; whether that was small enough to be trusted."""
        at = self._at
        with torch.no_grad():
            change = residuals_of(self._batch, at.x + PART * z / at.units) - at.residuals
        self._nfev += 1
        bend = (change / PART - moved) * (2 / PART)
        a, _ = least_squares_solve(scaled, -bend, at.damping)
        ratio = 2 * norms(a) / norms(z)
        is_bent = is_seen & (ratio <= LARGEST)
        return torch.where(is_bent.unsqueeze(1), z + a / 2, z), is_bent | ~is_seen

    def _move(
        self,
        rho: Tensor,
        x: Tensor,
        trial: Tensor,
        columns: tuple[Tensor, ...],
        sizes: Tensor,
        number: int,
    ) -> None:
        """Take what is accepted, with the control that follows."""
        at, taken = self._at, rho > ACCEPTANCE
        damping, growth = control.nielsen_damping(at.damping, at.growth, rho)
        row = taken.unsqueeze(1)
        columns = tuple(torch.where(row, new, old) for new, old in zip(columns, at.columns, strict=True))
        units = torch.maximum(sizes, at.units if number < GROWING else at.units / 2)
        self._at = At(
            torch.where(row, x, at.x),
            torch.where(row, trial, at.residuals),
            columns,
            damping.clamp(min=LEAST_DAMPING),
            growth,
            torch.where(row, units, at.units),
            torch.where(row, sizes, at.sizes),
            torch.where(taken, norms(trial), at.norm),
            at.length,
        )

    def _settle(self, done: Tensor, is_finite: Tensor, is_stuck: Tensor | None = None) -> None:
        """Write where everyone is, and who is done there."""
        at = self._at
        gradient = torch.stack([row_sums(column * at.residuals) for column in at.columns], 1)
        norm, sizes = at.norm, at.sizes
        noise = self._eps * (row_sums(at.units * at.x.abs()) + norm)
        is_orthogonal = (gradient.abs() <= self._tolerances.gtol * sizes * norm.unsqueeze(1)).all(1)
        done = done | is_orthogonal | (norm <= NOISE * noise) | ~is_finite
        status = torch.full_like(norm, CODES["converged"], dtype=torch.int8)
        if is_stuck is not None:
            status = torch.where(is_stuck & ~is_orthogonal, CODES["damping"], status)
        status = torch.where(self._is_singular() & (norm > NOISE * noise), CODES["singular"], status)
        status = torch.where(is_finite, status, CODES["non_finite"]).to(torch.int8)
        self._ledger.write(at.x, 0.5 * norm.square(), gradient, status, done)

    def _is_singular(self) -> Tensor:
        """Whether a column of the Jacobian vanishes beside the largest value it had."""
        return (self._at.sizes <= self._eps * self._at.units).any(1)


def _combination(columns: list[Tensor], weights: Tensor) -> Tensor:
    total = columns[0] * weights[:, :1]
    for i, column in enumerate(columns[1:], 1):
        total = torch.addcmul(total, column, weights[:, i : i + 1])
    return total


def _sizes(columns: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([norms(column) for column in columns], 1)
