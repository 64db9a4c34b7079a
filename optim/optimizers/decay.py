"""Weight decay as a part of the objective: exact in value, gradient and curvature."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secondorder.vectors.flat import flatten

from .groups import spread


class WeightDecay(NamedTuple):
    """``sum_i rate_i w_i^2 / 2`` over the parameters that move.

    Attributes:
        parameters: All of them, in the order of the flat vectors.
        rates: One for each parameter.
    """

    parameters: tuple[Tensor, ...]
    rates: tuple[float, ...]

    @classmethod
    def of(cls, groups: Iterable[Mapping[str, Any]]) -> WeightDecay:
        """That of parameter groups."""
        pairs = [(p, float(g["weight_decay"])) for g in groups for p in g["params"] if p.requires_grad]
        return cls(tuple(p for p, _ in pairs), tuple(rate for _, rate in pairs))

    def __bool__(self) -> bool:
        return any(self.rates)

    def value(self) -> Tensor | None:
        """At the parameters as they are, in double precision, to be read with others; None for none."""
        terms = [
            0.5 * rate * p.detach().double().square().sum()
            for p, rate in zip(self.parameters, self.rates, strict=True)
            if rate
        ]
        return torch.stack(terms).sum() if terms else None

    def gradient(self, like: Tensor) -> Tensor:
        """At the parameters as they are, flat, shape (n,), in the dtype of ``like``."""
        pairs = zip(self.parameters, self.rates, strict=True)
        return flatten([rate * p.detach().to(like.dtype) for p, rate in pairs])

    def diagonal(self, like: Tensor) -> float | Tensor:
        """Its Hessian: a number, where all rates are one, else the diagonal, shape (n,)."""
        if len(set(self.rates)) == 1:
            return self.rates[0]
        return spread(self.rates, self.parameters, like)
