"""The variables of the model: those of the user in units of their own, and of them the free ones."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from secondorder import LinearOperator

from .variables import Variables


class Frame(NamedTuple):
    """``z = scale * x``, of the free entries alone: a step of ``z`` and what it is for ``x``.

    Attributes:
        scale: Positive, shape (n,); None where every unit is one.
        free: Which entries move, Boolean, shape (n,); None where all do.
    """

    scale: Tensor | None = None
    free: Tensor | None = None

    def gradient(self, g: Tensor) -> Tensor:
        """Of the model, from that of the function, or the rows of a Jacobian: (..., n)."""
        if self.scale is not None:
            g = g / self.scale
        return g if self.free is None else g[..., self.free]

    def displacement(self, step: Tensor) -> Tensor:
        """What a step of the model changes in ``x``, shape (n,)."""
        if self.free is not None:
            step = step.new_zeros(self.free.shape).masked_scatter(self.free, step)
        return step if self.scale is None else step / self.scale

    def step(self, displacement: Tensor) -> Tensor:
        """The step of the model that changes ``x`` by this much, of what is free."""
        if self.scale is not None:
            displacement = displacement * self.scale
        return displacement if self.free is None else displacement[self.free]

    def curvature(self, B: LinearOperator) -> LinearOperator:
        """Of the model, from that of the function."""
        return B if self.scale is None and self.free is None else Framed(B, self)


class Framed(LinearOperator):
    """A symmetric operator in the variables of a frame."""

    def __init__(self, B: LinearOperator, frame: Frame) -> None:
        free = frame.free
        n = B.shape[0] if free is None else int(free.sum())
        super().__init__((n, n), B.dtype, B.device)
        self._B, self._frame = B, frame

    def _matvec(self, v: Tensor) -> Tensor:
        return self._frame.gradient(self._B @ self._frame.displacement(v))

    def _matmat(self, V: Tensor) -> Tensor:
        columns = torch.stack([self._frame.displacement(v) for v in V.T], dim=1)
        return self._frame.gradient((self._B @ columns).T).T

    def dense(self, chunk_size: int = 128) -> Tensor:
        """The matrix: that of the function, its rows and columns in these variables."""
        return self._frame.gradient(self._frame.gradient(self._B.dense(chunk_size)).T).T


def scale_of(x_scale: Any, name: str, variables: Variables) -> str | Tensor | None:
    """The scale that a user asks for: ``name`` for one that follows the problem, a vector, or None for ones.

    Raises:
        ValueError: it is neither that name, "none", nor positive units of x.
    """
    if isinstance(x_scale, str):
        if x_scale not in (name, "none"):
            raise ValueError(f"x_scale must be {name!r}, 'none' or units of x, got {x_scale!r}.")
        return name if x_scale == name else None
    units = variables.pack(x_scale, "x_scale")
    if not bool((units > 0).all()) or not bool(units.isfinite().all()):
        raise ValueError("x_scale must be positive and finite, got others; it is the unit of each variable.")
    return 1 / units
