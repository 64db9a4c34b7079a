"""Newton's method for a batch of problems, each with its own damping."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...methods.control import ACCEPTANCE, CANCELLATION, NOISE_FACTOR
from . import control
from .evaluation import Batch, graph_of, is_separable, sample
from .factors import cholesky_solve
from .separable import SAME, Form, form_of, moved
from .state import CODES, Ledger, Solved

# In units of the curvature along each variable. A first step that is refused costs little.
FIRST_DAMPING, LEAST_DAMPING, MOST_DAMPING = 1e-6, 1e-20, 1e30
# Pivots of a matrix that is definite without damping, in units of this.
DEFINITE = 10.0
# Damping that does not hold back a step.
LOOSE = 1e-3
# The scale of a variable halves at most in a step.
DECAY = 0.5
# A value below this, relative to the start, has no minimum near it.
UNBOUNDED = -1e30


class Tolerances(NamedTuple):
    """As of ``minimize``."""

    gtol: float
    xtol: float
    ftol: float


class At(NamedTuple):
    """Points of the problems that are left.

    Attributes:
        x: Shape (L, n).
        value: Shape (L,).
        gradient: Shape (L, n).
        hessian: Shape (L, n, n).
        damping, growth: Of each, shape (L,).
        units: Scale of the variables, shape (L, n).
        floor: A value below which there is no minimum, shape (L,).
    """

    x: Tensor
    value: Tensor
    gradient: Tensor
    hessian: Tensor
    damping: Tensor
    growth: Tensor
    units: Tensor
    floor: Tensor

    def kept(self, index: Tensor) -> At:
        """Of some of them."""
        return At(*(part[index] for part in self))


def solve(batch: Batch, x0: Tensor, tolerances: Tolerances, max_iter: int) -> Solved:
    """Minimise the function of each problem.

    Args:
        batch: Values, (L,).
        x0: Shape (B, n).
        tolerances: When a problem is done.
        max_iter: Rounds: a step of every problem that is left.
    """
    return _Run(batch, x0, tolerances).to_the_end(max_iter)


def derivatives(batch: Batch, x: Tensor, form: Form | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Values, gradients and Hessians, from one graph of the sum over the problems.

    Args:
        batch: Values, (L,).
        x: Shape (L, n).
        form: Of the function, where it has one: its Hessians cost about as much as a gradient.
    """
    return _of_graph(*graph_of(batch, x), form)


def _of_graph(value: Tensor, y: Tensor, form: Form | None) -> tuple[Tensor, Tensor, Tensor]:
    if not value.requires_grad:
        zero = torch.zeros_like(y, requires_grad=False)
        return value, zero, zero.unsqueeze(2).expand(-1, -1, y.shape[1])
    closed = None if form is None else form.derivatives(value, y)
    if closed is not None:
        return value.detach(), *closed
    with torch.enable_grad():
        (g,) = torch.autograd.grad(value.sum(), y, create_graph=True)
        H = _rows(g, y)
    return value.detach(), g.detach(), (H + H.transpose(1, 2)) / 2


def _rows(g: Tensor, y: Tensor) -> Tensor:
    """Derivatives of each entry of the gradients, one backward pass for all problems."""
    zero, rows = torch.zeros_like(y, requires_grad=False), []
    for part in g.sum(0).unbind():
        row = (
            torch.autograd.grad(part, y, retain_graph=True, allow_unused=True)[0] if g.requires_grad else None
        )
        rows.append(zero if row is None else row)
    return torch.stack(rows, 1)


def form_at(batch: Batch, value: Tensor, y: Tensor) -> Form | None:
    """Of a batch with this graph, where a sample of the problems has its Hessians elsewhere too.

    Args:
        batch: Whose problems do not depend on each other.
        value: Of the batch, shape (L,).
        y: The leaf of its graph, shape (L, n).
    """
    if y.shape[1] < 2:
        # One backward pass is what it would save.
        return None
    x = y.detach()
    return form_of(value, y, batch.numel(x)) if has_form(batch, x) else None


def has_form(batch: Batch, x: Tensor) -> bool:
    """Whether a form is found for a sample of the problems, and has their Hessians near x."""
    index = sample(x)
    some, at = batch.at(index), x[index]
    form = form_of(*graph_of(some, at))
    if form is None:
        return False
    try:
        graph = graph_of(some, moved(at))
    except (RuntimeError, ValueError, IndexError):
        # The function is not defined there.
        return False
    closed = form.derivatives(*graph)
    if closed is None:
        return False
    expected = _of_graph(*graph, None)[2]
    error, size = (part.abs().amax((1, 2)) for part in (closed[1] - expected, expected))
    # Neither is true of what is not finite.
    return bool((error <= SAME * torch.finfo(x.dtype).eps * size).all())


class Plan(NamedTuple):
    """Steps of the problems that are left, before they are tried.

    Attributes:
        step: Shape (L, n).
        predicted: Decrease of the model, shape (L,).
        is_solved: The damped Hessian is definite.
        is_saddle: The gradient is small, and the Hessian not definite.
        status: Of what a step would not change; 0 elsewhere.
    """

    step: Tensor
    predicted: Tensor
    is_solved: Tensor
    is_saddle: Tensor
    status: Tensor

    def kept(self, index: Tensor) -> Plan:
        """Of some of them."""
        return Plan(*(part[index] for part in self))


class _Run:
    """One batch."""

    def __init__(self, batch: Batch, x0: Tensor, tolerances: Tolerances) -> None:
        self._batch, self._tolerances, self._eps = batch, tolerances, torch.finfo(x0.dtype).eps
        value, y = graph_of(batch, x0)
        self._is_separable = is_separable(batch, x0, value.detach())
        self._form = form_at(batch, value, y) if self._is_separable else None
        value, g, H = _of_graph(value, y, self._form)
        self._count = 1
        ones = torch.ones_like(value)
        self._at = At(
            *(x0, value, g, H, FIRST_DAMPING * ones, 2 * ones),
            units=_units(H, None),
            floor=UNBOUNDED * value.abs().clamp(min=1.0),
        )
        self._ledger = Ledger(x0)
        # What the last round found out, to be written with what the next step tells.
        self._status = torch.zeros_like(value, dtype=torch.int8)

    def to_the_end(self, max_iter: int) -> Solved:
        """Rounds, until all are done."""
        for _ in range(max_iter):
            plan = self._looked()
            kept = self._ledger.left(self._is_separable)
            if kept is not None:
                if not len(kept):
                    break
                self._keep(kept)
                plan = plan.kept(kept)
            self._round(plan)
        else:
            self._looked()
        count = self._count
        return self._ledger.solved(count, count, count)

    def _looked(self) -> Plan:
        """The next steps, with what is known now written down."""
        plan = self._plan()
        self._settle(torch.where(self._status > 0, self._status, plan.status))
        return plan

    def _keep(self, index: Tensor) -> None:
        """Only some of the problems."""
        self._at, self._batch, self._status = self._at.kept(index), self._batch.at(index), self._status[index]
        if self._form is not None:
            self._form = self._form.kept(index)

    def _plan(self) -> Plan:
        """Where every problem would step to. That a step is short needs no evaluation to be seen."""
        at = self._at
        g, inverse = at.gradient / at.units, at.units.reciprocal()
        scaled = at.hessian * (inverse.unsqueeze(1) * inverse.unsqueeze(2))
        damped = scaled.clone()
        damped.diagonal(dim1=1, dim2=2).add_(at.damping.unsqueeze(1))
        z, pivot = cholesky_solve(damped, -g)
        # Damping alone makes pivots of its own size.
        is_definite = pivot > DEFINITE * at.damping + self._eps * g.shape[1]
        predicted = -(g * z).sum(1) - 0.5 * (z * (scaled @ z.unsqueeze(2))[:, :, 0]).sum(1)
        step = z / at.units
        # Along an entry of the gradient that is zero no step goes, whatever the damping.
        is_saddle = self._is_small() & ~is_definite & ((at.damping <= LOOSE) | self._vanishes())
        status = self._verdict(step, predicted, is_definite)
        return Plan(step, predicted, pivot > 0, is_saddle, status.to(torch.int8))

    def _round(self, plan: Plan) -> None:
        """A step of every problem, taken or not."""
        at, step, predicted = self._at, plan.step, plan.predicted
        self._ledger.count()
        value, gradient, H = derivatives(self._batch, at.x + step, self._form)
        self._count += 1
        is_finite = value.isfinite() & gradient.sum(1).isfinite() & H.sum((1, 2)).isfinite()
        is_usable = is_finite & plan.is_solved & (predicted > 0)
        actual, limit = at.value - value, NOISE_FACTOR * self._eps * at.value.abs()
        trapezoid = -0.5 * ((at.gradient + gradient) * step).sum(1)
        is_quiet = (predicted <= limit) & (actual.abs() <= CANCELLATION * limit)
        rho = torch.where(is_usable, torch.where(is_quiet, trapezoid, actual) / predicted, -math.inf)
        stuck = is_quiet & is_usable & (rho <= ACCEPTANCE) & self._ledger.live
        status = torch.where(stuck, CODES["noise_floor"], 0)
        self._move(rho, ~stuck & ~plan.is_saddle & self._ledger.live, at.x + step, value, gradient, H)
        status = torch.where((status == 0) & (self._at.damping > MOST_DAMPING), CODES["damping"], status)
        status = torch.where((status == 0) & (self._at.value < at.floor), CODES["unbounded"], status)
        self._status = status.to(torch.int8)
        self._leave(plan.is_saddle & self._ledger.live)

    def _is_small(self) -> Tensor:
        return self._at.gradient.abs().amax(1) <= self._tolerances.gtol

    def _vanishes(self) -> Tensor:
        """Where nothing but rounding is left of the gradient."""
        size = self._at.value.abs().clamp(min=1.0)
        return self._at.gradient.abs().amax(1) <= self._eps * size

    def _verdict(self, step: Tensor, predicted: Tensor, is_definite: Tensor) -> Tensor:
        """What the points are that a step would not change."""
        at, tolerances = self._at, self._tolerances
        size = at.value.abs()
        is_near = (step.abs() <= tolerances.xtol * at.x.abs()).all(1) | (predicted <= tolerances.ftol * size)
        is_near |= self._vanishes()
        done = self._is_small() & is_near & (at.damping <= LOOSE) & is_definite
        return torch.where(done, CODES["converged"], 0)

    def _move(
        self, rho: Tensor, may: Tensor, x: Tensor, value: Tensor, gradient: Tensor, hessian: Tensor
    ) -> None:
        """Take what is accepted, with the control that follows."""
        at, taken = self._at, (rho > ACCEPTANCE) & may
        damping, growth = control.nielsen_damping(at.damping, at.growth, rho)
        row = taken.unsqueeze(1)
        H = torch.where(row.unsqueeze(2), hessian, at.hessian)
        self._at = At(
            torch.where(row, x, at.x),
            torch.where(taken, value, at.value),
            torch.where(row, gradient, at.gradient),
            H,
            damping.clamp(min=LEAST_DAMPING),
            growth,
            torch.where(row, _units(H, at.units), at.units),
            at.floor,
        )

    def _settle(self, status: Tensor) -> None:
        """Write where everyone is, and who is done there."""
        at = self._at
        is_finite = at.value.isfinite() & at.gradient.sum(1).isfinite() & at.hessian.sum((1, 2)).isfinite()
        status = torch.where(is_finite, status, CODES["non_finite"]).to(torch.int8)
        self._ledger.write(at.x, at.value, at.gradient, status, status > 0)

    def _leave(self, saddles: Tensor) -> None:
        """Leave stationary points that are no minima, along their lowest eigenvectors."""
        index = saddles.nonzero()[:, 0]
        if not len(index):
            return
        at = self._at
        units = at.units[index]
        scaled = at.hessian[index] / units.unsqueeze(1) / units.unsqueeze(2)
        values, vectors = torch.linalg.eigh(scaled)  # waits: once a step, for those that are not convex
        lowest = vectors[:, :, 0] / units
        size = values.abs().amax(1)
        is_flat = (values[:, 0] >= -(self._eps**0.5) * size) & (
            values[:, 0] <= self._eps * len(units.T) * size
        )
        is_minimum = values[:, 0] > self._eps * len(units.T) * size
        status = torch.zeros_like(at.value, dtype=torch.int8)
        status[index] = torch.where(is_flat, CODES["flat"], 0).to(torch.int8)
        self._settle(status)
        # A way that is downhill by its curvature: as far as the variables are from zero, or one unit.
        size = at.x[index].norm(dim=1).clamp(min=1.0) / lowest.norm(dim=1)
        up = torch.where((lowest * at.gradient[index]).sum(1) > 0, -1.0, 1.0)
        x = at.x.clone()
        for _ in range(TRIES):
            x[index] = at.x[index] + (up * size).unsqueeze(1) * lowest
            value, gradient, H = derivatives(self._batch, x, self._form)
            self._count += 1
            is_lower = value[index] < at.value[index]
            size = torch.where(is_lower, size, 0.1 * size)
            if bool(is_lower.all()):
                break
        ones = torch.zeros_like(saddles)
        ones[index] = is_lower & ~is_flat & ~is_minimum
        rho = torch.where(ones, 1.0, -math.inf)
        damping = at.damping.clone()
        # What is definite shows it without damping.
        damping[index] = torch.where(is_minimum, LEAST_DAMPING, damping[index])
        self._move(rho, ones, x, value, gradient, H)
        self._at = self._at._replace(damping=torch.where(ones, FIRST_DAMPING, damping))


# Lengths along a way out of a saddle, each a tenth of the last.
TRIES = 8


def _units(H: Tensor, before: Tensor | None) -> Tensor:
    """Units in which the curvature along each variable is one, shape (L, n)."""
    root = H.diagonal(dim1=1, dim2=2).abs().sqrt()
    if before is None:
        largest = root.amax(1, keepdim=True)
        missing = torch.where(largest > 0, largest, 1.0)
    else:
        missing = before
    root = torch.where((root > 0) & root.isfinite(), root, missing)
    return root if before is None else torch.maximum(root, DECAY * before)
