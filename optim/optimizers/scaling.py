"""Groups with their own ``damping_scale``, or that do not move: variables that are the same for all.

With ``q = sqrt(scale) p``, entry by entry, ``damping * norm(q)^2`` is the damping of each group times its
scale, and a ball of ``q`` an ellipsoid, in which entries of a large scale move less. Where ``lr`` is zero the
factor is: a model of the others alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from secondorder import FunctionOperator, LinearOperator

from .groups import Groups, moving, of_groups, spread


class Scaling(NamedTuple):
    """``p = factor q``: a number, or one for each entry, shape (n,)."""

    factor: float | Tensor

    @classmethod
    def of(cls, groups: Groups, like: Tensor) -> Scaling:
        """That of parameter groups."""
        scale = of_groups(groups, "damping_scale", like)
        factor = scale.rsqrt() if isinstance(scale, Tensor) else scale**-0.5
        if all(float(group["lr"]) > 0 for group in groups) or not any(float(g["lr"]) > 0 for g in groups):
            return cls(factor)
        moves = [(1.0 if float(g["lr"]) > 0 else 0.0, p) for g in groups for p in moving([g])]
        return cls(factor * spread([one for one, _ in moves], [p for _, p in moves], like))

    def divided(self, scale: Tensor) -> Scaling:
        """In units of ``scale``, shape (n,)."""
        return Scaling(self.factor / scale)

    def over(self, p: Tensor) -> Tensor:
        """A step of ``p`` as one of ``q``, zero where ``p`` does not move."""
        if not isinstance(self.factor, Tensor):
            return p / self.factor
        return torch.where(self.factor > 0, p / torch.where(self.factor > 0, self.factor, 1.0), 0.0)

    @property
    def uniform(self) -> float | None:
        """The factor of all that moves, where it is one."""
        if not isinstance(self.factor, Tensor):
            return self.factor
        low, high = torch.aminmax(self.factor[self.factor > 0])
        return float(low) if bool(low == high) else None

    @property
    def is_plain(self) -> bool:
        """Whether it changes nothing."""
        return not isinstance(self.factor, Tensor) and self.factor == 1.0

    def times(self, v: Tensor) -> Tensor:
        """A step of ``q`` as one of ``p``; a gradient for ``p`` as one for ``q``."""
        return v if self.is_plain else self.factor * v

    def conjugated(self, curvature: LinearOperator) -> LinearOperator:
        """Curvature for ``p`` as one for ``q``."""
        factor = self.factor
        if not isinstance(factor, Tensor):
            return curvature if factor == 1.0 else curvature * factor**2
        diagonal = FunctionOperator(lambda v: factor * v, factor)
        return diagonal @ curvature @ diagonal
