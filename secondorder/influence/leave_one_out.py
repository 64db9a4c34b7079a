"""Losses of training samples by parameters fitted without them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from secondorder.influence.base import Base
from secondorder.influence.edits import removals
from secondorder.influence.orders import Order, measured, move


class LeaveOneOut(NamedTuple):
    """Losses of training samples by parameters fitted without them.

    Attributes:
        losses: Shape (samples,).
        mean: Of the finite ones: leave-one-out cross-validation.
        training: Losses by the parameters as they are, shape (samples,).
        statuses: Of each sample.
    """

    losses: Tensor
    mean: float
    training: Tensor
    statuses: tuple[str, ...]

    def __repr__(self) -> str:
        failed = sum(status != "converged" for status in self.statuses)
        note = f", {failed} not converged" if failed else ""
        return (
            f"LeaveOneOut({len(self.losses)} samples, mean={self.mean:.4g}, training mean="
            f"{float(self.training.mean()):.4g}{note})"
        )


def leave_one_out(base: Base, train: Sequence[int], order: Order, steps: int) -> LeaveOneOut:
    """Of some training samples, each removed alone."""
    losses, training, statuses = [], [], []
    for edit in removals(base, [[i] for i in train]):
        batch, moved = edit[0].batch, move(base, edit, order, steps)
        with torch.no_grad():
            training.append(base.samples.losses(batch))
            losses.append(measured(base, moved, lambda: base.samples.losses(batch)))  # noqa: B023
        statuses.append(moved.status)
    found = torch.cat(losses)
    return LeaveOneOut(found, float(found.nanmean()), torch.cat(training), tuple(statuses))
