"""The point whose training samples are asked about: gradient, inverse curvature, samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from secondorder.data.batches import Batch, Batches
from secondorder.data.objective import Objective
from secondorder.influence.inverse import CURVATURES, PRECONDITIONERS, SOLVERS, Inverse
from secondorder.influence.samples import Samples, check_order, point_of
from secondorder.operators.linear import LinearOperator

# A point is stationary where the gradient is below this much of the push of removing a sample.
STATIONARY = 0.1
# Samples whose gradients say how large such a push is.
PROBED = 64


class Base:
    """An objective at its present parameters, and the inverse of its curvature there.

    Args: as of ``Influence``.

    Attributes:
        count: Training samples.
        share: Weight of a sample's loss in the objective: ``1 / n`` of a mean, 1 of a sum.
        gradient: Of the objective, flat.
        push: Root mean square, over some samples, of the norm of ``share`` times their gradients.
        point: The parameters, flat.
    """

    def __init__(
        self,
        objective: Objective,
        curvature: Any,
        damping: float | None,
        solver: str,
        rtol: float,
        preconditioner: str | None = None,
    ) -> None:
        _check(objective, curvature, damping, solver, rtol)
        _check_preconditioner(preconditioner, solver, curvature)
        check_order(objective.data)
        self.objective, self.samples = objective, Samples(objective)
        value, self.gradient = objective.value_and_gradient()
        if not bool(value.isfinite()) or not bool(self.gradient.isfinite().all()):
            raise ValueError(
                "the loss over train must be finite, and its gradient; look for NaN or infinity in data and"
                " parameters."
            )
        self.count = self.samples.count()
        self.share = 1.0 / self.count if objective.reduction == "mean" else 1.0
        self.point = point_of(objective.parameters)
        self.curvature = curvature if isinstance(curvature, str) else "operator"
        self.inverse = Inverse(objective, curvature, damping, solver, rtol, self.count, preconditioner)
        self.gradient_norm = float(self.gradient.norm())
        few = range(0, self.count, max(1, self.count // PROBED))
        batches = self.samples.pick(few).values()
        squares = [self.samples.gradient(batch).square().sum() for batch in batches]
        self.push = self.share * float(torch.stack(squares).mean().sqrt())

    @property
    def is_stationary(self) -> bool:
        """Whether the gradient is small beside the push of removing a sample."""
        rounding = torch.finfo(self.point.dtype).eps ** 0.5
        return self.gradient_norm <= max(STATIONARY * self.push, rounding * self.push * self.count)

    def check(self) -> None:
        """Raise where the parameters have changed."""
        if not torch.equal(point_of(self.objective.parameters), self.point):
            raise RuntimeError("the parameters have changed since Influence was made; make a new one.")

    def batches(self, data: Any, name: str = "test") -> list[Batch]:
        """Data of any kind as batches.

        Raises:
            ValueError: it holds no sample.
        """
        size, device = self.objective.batch_size, self.point.device
        found = list(Batches(data, size, device).walk())
        if not found:
            raise ValueError(f"{name} must hold at least one sample, got none.")
        return found

    def indices(self, chosen: Iterable[int] | int | None, name: str = "train") -> list[int]:
        """Indices of training samples, all for None.

        Raises:
            TypeError: one is not an integer.
            ValueError: one is out of range.
        """
        if chosen is None:
            return list(range(self.count))
        if isinstance(chosen, Tensor):
            chosen = chosen.tolist()
        found = list(chosen) if isinstance(chosen, Iterable) else [chosen]
        for index in found:
            if isinstance(index, bool) or not hasattr(index, "__index__"):
                raise TypeError(f"{name} must hold integer indices, got {index!r}.")
            if not 0 <= index < self.count:
                raise ValueError(f"{name} must hold indices from 0 to {self.count - 1}, got {index}.")
        if not found:
            raise ValueError(f"{name} must hold at least one index, got none.")
        return [int(index) for index in found]

    def groups(self, groups: Sequence[Iterable[int]]) -> list[list[int]]:
        """Groups of indices, each checked."""
        found = [self.indices(group, f"groups[{i}]") for i, group in enumerate(groups)]
        for i, group in enumerate(found):
            if len(set(group)) < len(group):
                raise ValueError(f"groups[{i}] must hold each index once, got {group}.")
        if not found:
            raise ValueError("groups must hold at least one group, got none.")
        return found


def _check(objective: Any, curvature: Any, damping: Any, solver: Any, rtol: Any) -> None:
    if not isinstance(objective, Objective):
        raise TypeError(f"objective must be an Objective, got {type(objective).__name__}.")
    if not isinstance(curvature, LinearOperator) and curvature not in CURVATURES:
        names = ", ".join(map(repr, CURVATURES))
        raise ValueError(f"curvature must be one of {names} or an operator, got {curvature!r}.")
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(map(repr, SOLVERS))}, got {solver!r}.")
    if damping is not None and not damping >= 0:
        raise ValueError(f"damping must be non-negative, got {damping}.")
    if not 0 < rtol < 1:
        raise ValueError(f"rtol must be between 0 and 1, got {rtol}.")


def _check_preconditioner(preconditioner: Any, solver: str, curvature: Any) -> None:
    if preconditioner not in PRECONDITIONERS:
        raise ValueError(f"preconditioner must be 'ekfac' or None, got {preconditioner!r}.")
    if preconditioner is not None and solver != "block_cg":
        raise ValueError(f"preconditioner needs solver='block_cg', got {solver!r}.")
    if solver == "ekfac" and curvature != "ggn":
        raise ValueError(f"solver 'ekfac' approximates curvature='ggn', got {curvature!r}.")
