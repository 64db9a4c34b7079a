"""What is known of each problem of a batch, and the solutions of those that are done."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# A problem's status is its place here.
STATUSES = ("max_iter", "converged", "singular", "flat", "noise_floor", "damping", "non_finite", "unbounded")
CODES = {name: code for code, name in enumerate(STATUSES)}

# Problems that are done leave where no more than this part is left.
COMPACTED = 0.8


class Solved(NamedTuple):
    """The batch at its end.

    Attributes:
        x: Shape (B, n).
        value: Objective, shape (B,).
        gradient: Of it, shape (B, n).
        status: Places in ``STATUSES``, shape (B,), int8.
        nit: Steps tried of each, shape (B,).
        nfev: Evaluations of the batch, of those that were left.
        njev: Gradients or Jacobians of it.
        nhev: Hessians of it.
    """

    x: Tensor
    value: Tensor
    gradient: Tensor
    status: Tensor
    nit: Tensor
    nfev: int
    njev: int
    nhev: int


class Ledger:
    """Where results are written, and who is left.

    Args:
        x: Starts, shape (B, n).

    Attributes:
        index: Problems that are left, shape (L,).
        live: Which of them are not done, Boolean, shape (L,).
    """

    def __init__(self, x: Tensor) -> None:
        B = len(x)
        self._x, self._gradient = x.clone(), torch.zeros_like(x)
        self._value = x.new_full((B,), torch.nan)
        self._status = torch.zeros(B, dtype=torch.int8, device=x.device)
        self._nit = torch.zeros(B, dtype=torch.int64, device=x.device)
        self.index = torch.arange(B, device=x.device)
        self.live = torch.ones(B, dtype=torch.bool, device=x.device)

    def count(self) -> None:
        """A step of each that is not done."""
        self._nit.index_add_(0, self.index, self.live.long())

    def write(self, x: Tensor, value: Tensor, gradient: Tensor, status: Tensor, done: Tensor) -> None:
        """The points of all that are left; those that are ``done`` with their status."""
        new = self.live & done
        keep = self.live.unsqueeze(1)
        index = self.index
        self._x[index] = torch.where(keep, x, self._x[index])
        self._gradient[index] = torch.where(keep, gradient, self._gradient[index])
        self._value[index] = torch.where(self.live, value, self._value[index])
        self._status[index] = torch.where(new, status, self._status[index])
        self.live = self.live & ~done

    def left(self, is_separable: bool) -> Tensor | None:
        """Positions to keep, where so many are done that it pays; None else. One host read.

        Args:
            is_separable: Whether others can be left out.
        """
        count = int(self.live.sum())
        if count == 0:
            return self.index[:0]
        if count > COMPACTED * len(self.index) or not is_separable:
            return None
        kept = self.live.nonzero()[:, 0]
        self.index, self.live = self.index[kept], self.live[kept]
        return kept

    def solved(self, nfev: int, njev: int, nhev: int) -> Solved:
        """The end."""
        return Solved(self._x, self._value, self._gradient, self._status, self._nit, nfev, njev, nhev)
