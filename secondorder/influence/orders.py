"""Changes of what is measured on test samples after edits: to first order, by a Newton step, by a refit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from tqdm import tqdm

from secondorder.influence.base import Base
from secondorder.influence.edits import Edit, Moved, edit_gradient, newton
from secondorder.influence.first_order import Tests
from secondorder.influence.inverse import Solved
from secondorder.influence.refit import refit
from secondorder.influence.result import TEXTS, InfluenceResult
from secondorder.influence.samples import Measure, at

ORDERS = (1, "newton", "refit")
Order = int | str


def check_order_of(base: Base, order: Any, steps: Any, allowed: Sequence[Order] = ORDERS) -> None:
    """Raise unless changes of this order can be had at this point."""
    if isinstance(order, bool) or order not in allowed:
        raise ValueError(f"order must be one of {', '.join(map(repr, allowed))}, got {order!r}.")
    if isinstance(steps, bool) or not (isinstance(steps, int) and steps >= 0):
        raise ValueError(f"steps must be a non-negative integer, got {steps!r}.")
    if order != 1 and not base.is_stationary:
        raise ValueError(
            f"order {order!r} needs parameters that are stationary, got a gradient of norm"
            f" {base.gradient_norm:.2g} beside {base.push:.2g} of a sample; train further, or use order=1."
        )
    base.check()


def move(base: Base, edit: Edit, order: Order, steps: int = 0) -> Moved:
    """Parameters after an edit."""
    if order == "refit":
        return refit(base, edit)
    if order == "newton":
        return newton(base, edit, steps)
    solved = base.inverse.solve(edit_gradient(base, edit).unsqueeze(1))
    return Moved(base.point - solved.x[:, 0], solved.status, math.nan, math.nan, solved.residual_norm)


def measured(base: Base, moved: Moved, measure: Callable[[], Tensor]) -> Tensor:
    """What a function of the parameters gives at those of an edit; NaN where there are none."""
    if not bool(moved.point.isfinite().all()):
        return torch.full_like(measure(), math.nan)
    with at(base.objective.parameters, moved.point):
        return measure()


def changes(
    base: Base, edits: Sequence[Edit], tests: Tests, order: Order, *, steps: int = 0, progress: bool = False
) -> tuple[Tensor, list[Moved], Solved | None]:
    """Of each test's value after each edit, shape (tests, edits), and how they were found."""
    if order == 1:
        solved = base.inverse.solve(tests.gradients().T)
        pushes = torch.stack([edit_gradient(base, edit) for edit in edits], dim=1)
        return -(solved.x.T @ pushes), [], solved
    columns, found = [], []
    bar = tqdm(edits, desc=f"influence ({order})", unit="point", leave=False, disable=not progress)
    for edit in bar:
        moved = move(base, edit, order, steps)
        columns.append(measured(base, moved, tests.measured) - tests.values)
        # Not its point: all of them are as large as all samples times all parameters.
        found.append(moved._replace(point=moved.point[:0]))
    return torch.stack(columns, dim=1), found, None


def result_of(
    base: Base, scores: Tensor, names: Tensor, order: Order, found: Sequence[Moved], solved: Solved | None
) -> InfluenceResult:
    """The result of changes by edits with these names."""
    statuses, rank = tuple(moved.status for moved in found), list(TEXTS)
    worst = solved.status if solved else max(statuses, key=rank.index, default="converged")
    return InfluenceResult(
        scores,
        worst,
        solved.residual_norm if solved else max(moved.residual_norm for moved in found),
        order=str(order),
        train=names,
        gradient_norm=base.gradient_norm,
        is_stationary=base.is_stationary,
        damping=base.inverse.damping,
        leverage=scores.new_tensor([m.leverage for m in found]) if order == "newton" else None,
        indicator=scores.new_tensor([m.indicator for m in found]) if found else None,
        statuses=statuses,
    )


def edited(
    base: Base,
    edits: Sequence[Edit],
    names: Tensor,
    test: Any,
    order: Order,
    measure: Measure | None,
    steps: int,
) -> InfluenceResult:
    """Changes by edits with these names."""
    check_order_of(base, order, steps)
    scores, found, solved = changes(base, edits, Tests(base, test, measure), order, steps=steps)
    return result_of(base, scores, names, order, found, solved)


def perturbation(base: Base, tests: Tests, index: int) -> Any:
    """Derivatives of the tests' values in a training sample's inputs, with a leading dimension of tests."""
    batch = base.samples.pick([index])[index]
    leaves, spec = pytree.tree_flatten(batch[0])
    live = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.is_floating_point()]
    if not live:
        raise ValueError(
            "train must have inputs of a floating-point dtype for their derivative, got none; embed them"
            " first."
        )
    solved = base.inverse.solve(tests.gradients().T).x
    with torch.enable_grad():
        free = [x.detach().clone().requires_grad_() if i in live else x for i, x in enumerate(leaves)]
        loss = base.samples.loss((pytree.tree_unflatten(free, spec), batch[1]))
        gradients = torch.autograd.grad(
            loss, base.objective.parameters, create_graph=True, materialize_grads=True
        )
        flat = torch.cat([g.reshape(-1) for g in gradients])
        inputs = [free[i] for i in live]
        rows = [
            torch.autograd.grad(flat @ v, inputs, retain_graph=True, materialize_grads=True) for v in solved.T
        ]
    parts = [-base.share * torch.stack([part[0] for part in column]) for column in zip(*rows, strict=True)]
    if isinstance(batch[0], Tensor):
        return parts[0]
    found = dict(zip(live, parts, strict=True))
    return pytree.tree_unflatten([found.get(i) for i in range(len(leaves))], spec)
