"""Changes of an objective by a few samples, and what they do to its minimiser.

An edit adds ``sum_k w_k l_k`` to the objective: removing a sample adds its loss with weight minus its share.
With the samples' Jacobian ``J`` and the Hessians ``S`` of their losses in the outputs, the curvature changes
by ``J^T W J``, ``W = diag(w_k S_k)``, and its inverse by the Woodbury formula.

Reference: Pregibon (1981), Logistic regression diagnostics; Cook and Weisberg (1982), Residuals and influence
in regression.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from secondorder.autodiff.backward import pull_rows
from secondorder.data.batches import Batch, call, count_samples
from secondorder.influence.base import Base
from secondorder.influence.samples import at, join
from secondorder.operators.parameters import Jacobian, tried
from secondorder.operators.rows import rows

# A curvature that an edit makes this nearly singular has no step.
SINGULAR = 1e-8
# Gradients of this many roundings are zero.
ZERO = 450
# Of a chord step.
MOST_HALVINGS = 3


class Term(NamedTuple):
    """Samples whose losses are added with a weight."""

    batch: Batch
    weight: float


Edit = tuple[Term, ...]


class Moved(NamedTuple):
    """Parameters after an edit.

    Attributes:
        point: Flat.
        status: "converged", or what is wrong by name.
        leverage: The largest of the edit; NaN where it was not asked for.
        indicator: ``norm(grad R(point)) / norm(push)``.
        residual_norm: True residual of the systems solved, relative to their right-hand sides; of a refit
            the indicator, for what it solves is the gradient.
    """

    point: Tensor
    status: str
    leverage: float
    indicator: float
    residual_norm: float


def removals(base: Base, groups: Sequence[Sequence[int]]) -> list[Edit]:
    """Of each group of training samples, together; in one pass over the data."""
    picked = base.samples.pick([i for group in groups for i in group])
    return [tuple(Term(batch, -base.share) for batch in join([picked[i] for i in group])) for group in groups]


def relabelling(base: Base, index: int, new_target: Any) -> Edit:
    """Another target for a training sample."""
    batch = base.samples.pick([index])[index]
    old = batch[1]
    if not isinstance(old, Tensor):
        raise TypeError(f"relabel needs targets that are one tensor, got {type(old).__name__}.")
    new = torch.as_tensor(new_target, dtype=old.dtype, device=old.device)
    if new.shape != old.shape[1:]:
        raise ValueError(f"new_target must have shape {tuple(old.shape[1:])}, got {tuple(new.shape)}.")
    return Term((batch[0], new.unsqueeze(0)), base.share), Term(batch, -base.share)


def edit_gradient(base: Base, edit: Edit) -> Tensor:
    """Of the edit's own terms, at the present parameters."""
    return torch.stack([term.weight * base.samples.gradient(term.batch) for term in edit]).sum(0)


class _Update:
    """The inverse of the curvature after an edit."""

    def __init__(self, base: Base, edit: Edit) -> None:
        found = [_rows_and_roots(base, term) for term in edit]
        self._base = base
        # R^T J, with W = R D R^T, and D of signs.
        self._rows = torch.cat([rows for rows, _ in found])
        signs = torch.cat([signs for _, signs in found])
        solved = base.inverse.solve(self._rows.T)
        self.status, self.residual_norm, self._columns = solved.status, solved.residual_norm, solved.x
        inner = self._rows @ solved.x * signs
        # waits: once an edit
        values = (
            torch.linalg.eigvalsh((inner + inner.T) / 2)
            if bool((signs < 0).all())
            else torch.linalg.eigvals(inner).real  # waits: once an edit
        )
        self.leverage = max(0.0, -float(values.min())) if len(values) else 0.0
        if not 1 - self.leverage > SINGULAR:
            self.status = "leverage"
        inner.diagonal().add_(1)
        self._inner, self._signs = inner, signs

    def solve(self, g: Tensor) -> Tensor:
        """``(B + damping I + J^T W J)^-1 g``, shape (n,)."""
        x = self._base.inverse.solve(g.unsqueeze(1)).x[:, 0]
        # What is singular was refused above.
        middle = torch.linalg.solve_ex(self._inner, self._rows @ x).result
        return x - self._columns @ (self._signs * middle)


def newton(base: Base, edit: Edit, steps: int = 0) -> Moved:
    """One Newton step from the base point with the edit's curvature, then guarded chord steps.

    What is left of the gradient at the base point is not followed: the answer is the change that the edit
    makes, not that of further training.

    Raises:
        ValueError: the model's outputs have no Jacobian by samples.
    """
    parameters = base.objective.parameters
    update, push = _Update(base, edit), edit_gradient(base, edit)
    if update.status == "leverage":
        return Moved(
            torch.full_like(base.point, torch.nan),
            "leverage",
            update.leverage,
            torch.nan,
            update.residual_norm,
        )

    def residual(point: Tensor) -> Tensor:
        with at(parameters, point):
            return base.objective.gradient() - base.gradient + edit_gradient(base, edit)

    point = base.point - update.solve(push)
    left = residual(point)
    for _ in range(steps):
        found = _shorter(residual, point, update.solve(left), left)
        if found is None:
            break
        point, left = found
    return Moved(point, update.status, update.leverage, indicator(left, push), update.residual_norm)


def _shorter(
    residual: Callable[[Tensor], Tensor], point: Tensor, step: Tensor, left: Tensor
) -> tuple[Tensor, Tensor] | None:
    """The first of halved steps after which less of the gradient is left; None where there is none."""
    for halvings in range(MOST_HALVINGS + 1):
        trial = point - step / 2**halvings
        after = residual(trial)
        # NaN is no decrease.
        if bool(after.norm() < left.norm()):
            return trial, after
    return None


def indicator(left: Tensor, push: Tensor) -> float:
    """``norm(left) / norm(push)``; zero where the push itself is rounding of the gradient."""
    size = float(push.norm())
    return float(left.norm()) / size if size > ZERO * torch.finfo(push.dtype).eps else 0.0


def _rows_and_roots(base: Base, term: Term) -> tuple[Tensor, Tensor]:
    """``R^T J``, shape (m, n), and the signs of its rows."""
    objective, batch, n = base.objective, term.batch, count_samples(term.batch)

    def build() -> tuple[list[Any], Any, Jacobian]:
        leaves, spec = pytree.tree_flatten(call(objective.model, batch[0]))
        if not all(isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == n for leaf in leaves):
            raise ValueError(
                "model must return tensors with samples in their first dimension for order 'newton'; use"
                " order=1 or 'refit'."
            )
        live = [leaf for leaf in leaves if leaf.requires_grad]
        return leaves, spec, tried(Jacobian(live, objective.parameters))

    with torch.enable_grad():
        leaves, spec, jacobian = base.samples.ladder.climb(build)
        live = [leaf for leaf in leaves if leaf.requires_grad]
        free = [leaf.detach().requires_grad_() if leaf.requires_grad else leaf for leaf in leaves]
        loss = objective.loss(pytree.tree_unflatten(free, spec), batch[1])
        curvature = _blocks(loss, [leaf for leaf in free if leaf.requires_grad])
    scale = term.weight * objective.passes.weight(n)
    values, vectors = torch.linalg.eigh((curvature + curvature.mT) / 2 * scale)  # waits: once a sample
    bound = torch.finfo(values.dtype).eps * values.shape[-1] * values.abs().amax()
    kept = values.abs() > bound
    J = _by_samples(rows(jacobian).matrix, live)
    half = torch.einsum("nek,nep->nkp", vectors * values.abs().sqrt().unsqueeze(1), J)
    return half[kept].to(J), values[kept].sign().to(J)


def _blocks(loss: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """The Hessian of a loss of samples in their outputs, shape (samples, E, E)."""
    n, sizes = len(parts[0]), [part[0].numel() for part in parts]
    gradients = torch.autograd.grad(loss, parts, create_graph=True, materialize_grads=True)
    units = torch.eye(sum(sizes), dtype=parts[0].dtype, device=parts[0].device)
    if not any(gradient.requires_grad for gradient in gradients):
        return units.new_zeros(n, len(units), len(units))
    # Of all samples at once: each has a block of its own.
    seeds = [
        unit.reshape(-1, 1, *part.shape[1:]).expand(-1, *part.shape)
        for unit, part in zip(units.split(sizes, 1), parts, strict=True)
    ]
    pairs = [(g, s) for g, s in zip(gradients, seeds, strict=True) if g.requires_grad]
    found = pull_rows([g for g, _ in pairs], parts, [s for _, s in pairs])
    return torch.cat([part.reshape(len(units), n, -1) for part in found], dim=2).permute(1, 0, 2)


def _by_samples(J: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """Rows of all outputs as (samples, E, n)."""
    blocks = J.split([part.numel() for part in parts])
    return torch.cat([b.view(len(p), -1, J.shape[1]) for b, p in zip(blocks, parts, strict=True)], dim=1)
