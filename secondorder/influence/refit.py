"""Training again after an edit: Newton's method from where the parameters are, to the last digits.

Reference: Nocedal and Wright (2006), Numerical optimization, algorithm 7.1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from secondorder.influence.base import Base
from secondorder.influence.edits import ZERO, Edit, Moved, Term, edit_gradient, indicator
from secondorder.influence.samples import at
from secondorder.operators.curvature import Hessian
from secondorder.operators.linear import LinearOperator
from secondorder.operators.parameters import tried
from secondorder.solvers import cg

# A gradient of this size beside the push of the edit is zero, as is one of ``ZERO`` roundings.
RELATIVE = 1e-9
MAX_STEPS = 60
# Armijo's constant, and halvings of a step.
DECREASE, HALVINGS = 1e-4, 30
# Newton's equations are solved to this, or to the root of the gradient's own ratio where that is less.
FORCING = 1e-2


def refit(base: Base, edit: Edit, start: Tensor | None = None) -> Moved:
    """The minimiser of the edited objective near the base point, or near ``start``.

    The curvature is the Hessian, whatever the base's, without its damping; where the base has a factor, it
    preconditions.

    Returns:
        "converged", "max_iter", "stagnated" (rounding allows no more) or "non_finite"; the indicator is
        what is left of the gradient.
    """
    objective, point = base.objective, base.point if start is None else start
    pushed = edit_gradient(base, edit)
    push = float(pushed.norm())
    target = max(RELATIVE * push, ZERO * torch.finfo(point.dtype).eps)
    value, gradient = _value_and_gradient(base, edit, point)
    status = "max_iter"
    for _ in range(MAX_STEPS):
        norm = float(gradient.norm())
        if not math.isfinite(norm) or norm <= target:
            status = "converged" if norm <= target else "non_finite"
            break
        with at(objective.parameters, point):
            step = _direction(base, edit, gradient, min(FORCING, (norm / max(push, norm)) ** 0.5))
        found = _search(base, edit, point, step, value, gradient)
        if found is None:
            status = "stagnated"
            break
        point, value, gradient = found
    left = indicator(gradient, pushed)
    return Moved(point, status, math.nan, left, left)


def _value_and_gradient(base: Base, edit: Edit, point: Tensor) -> tuple[float, Tensor]:
    with at(base.objective.parameters, point):
        value, gradient = base.objective.value_and_gradient()
        with torch.no_grad():
            change = sum(term.weight * float(base.samples.loss(term.batch)) for term in edit)
        return float(value) + change, gradient + edit_gradient(base, edit)


def _direction(base: Base, edit: Edit, gradient: Tensor, rtol: float) -> Tensor:
    """Of Newton's method, truncated where curvature is not positive."""
    curvature: LinearOperator = base.objective.hessian(keep_graph=True)
    for term in edit:
        curvature = curvature + term.weight * _hessian(base, term)
    M = base.inverse if base.inverse.is_exact else None
    step = cg(curvature, -gradient, M=M, rtol=rtol).x
    if bool(step.any()) and float(step @ gradient) < 0:
        return step
    return -gradient if M is None else -(M @ gradient)


def _hessian(base: Base, term: Term) -> LinearOperator:
    """Of the losses of an edit's samples; by other means where an operation has no second derivative."""

    def build() -> Hessian:
        return tried(Hessian(base.samples.loss(term.batch), base.objective.parameters))

    with torch.enable_grad():
        return base.samples.ladder.climb(build)


def _search(
    base: Base, edit: Edit, point: Tensor, step: Tensor, value: float, gradient: Tensor
) -> tuple[Tensor, float, Tensor] | None:
    """The first of halved steps that decreases the value; or, where that is rounding, the gradient."""
    slope, norm = float(step @ gradient), float(gradient.norm())
    noise = 64 * torch.finfo(point.dtype).eps * max(abs(value), 1e-3)
    scale = 1.0
    for _ in range(HALVINGS):
        trial = point + scale * step
        after, left = _value_and_gradient(base, edit, trial)
        decreases = after <= value + DECREASE * scale * slope
        if decreases and abs(scale * slope) > noise:
            return trial, after, left
        if after <= value + noise and float(left.norm()) < norm:
            return trial, after, left
        scale /= 2
    return None
