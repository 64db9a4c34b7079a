"""Groups with their own ``damping_scale``: variables in which damping is the same for all.

With ``q = sqrt(scale) p``, entry by entry, ``damping * norm(q)^2`` is the damping of each group times its
scale, and a ball of ``q`` an ellipsoid, in which entries of a large scale move less.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from optim.optimizers.groups import Groups, of_groups
from secondorder import FunctionOperator, LinearOperator


class Scaling(NamedTuple):
    """``p = factor q``: a number, or one for each entry, shape (n,)."""

    factor: float | Tensor

    @classmethod
    def of(cls, groups: Groups, like: Tensor) -> Scaling:
        """That of parameter groups."""
        scale = of_groups(groups, "damping_scale", like)
        return cls(scale.rsqrt() if isinstance(scale, Tensor) else scale**-0.5)

    @property
    def is_plain(self) -> bool:
        """Whether it changes nothing."""
        return not isinstance(self.factor, Tensor) and self.factor == 1.0

    def times(self, v: Tensor) -> Tensor:
        """A step of ``q`` as one of ``p``; a gradient for ``p`` as one for ``q``."""
        return v if self.is_plain else self.factor * v

    def over(self, v: Tensor) -> Tensor:
        """The other way."""
        return v if self.is_plain else v / self.factor

    def conjugated(self, curvature: LinearOperator) -> LinearOperator:
        """Curvature for ``p`` as one for ``q``."""
        factor = self.factor
        if not isinstance(factor, Tensor):
            return curvature if factor == 1.0 else curvature * factor**2
        diagonal = FunctionOperator(lambda v: factor * v, factor)
        return diagonal @ curvature @ diagonal
