"""Losses of residuals that grow slower than squares, as least squares with other residuals.

``cost = f_scale^2 / 2 sum rho((r / f_scale)^2)``, as SciPy's.

Reference: Triggs, McLauchlan, Hartley and Fitzgibbon (2000), Bundle adjustment: a modern synthesis, section
4.3, for the residuals and the Jacobian whose model has the loss's gradient and curvature.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# The loss's curvature is taken where it is more than this part of its weight: with less, residuals are scaled
# up by so much that steps are ruled by what counts least. On twelve fits with outliers each, evaluations with
# 0.001, 0.1, 0.3 and 1: soft_l1 263, 265, 209, 197; cauchy 212, 211, 222, 221; tukey 358, 346, 337, 337.
CURVED = 0.3

# z -> rho(z), rho'(z), rho''(z), each of the shape of z.
Rho = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def _huber(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    is_inner = z <= 1
    root = torch.where(is_inner, 1.0, z).sqrt()
    zero = torch.zeros_like(z)
    return (
        torch.where(is_inner, z, 2 * root - 1),
        torch.where(is_inner, 1.0, 1 / root),
        torch.where(is_inner, zero, -0.5 / root.pow(3)),
    )


def _soft_l1(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    root = (1 + z).sqrt()
    # 2 (root - 1), without cancellation.
    return 2 * z / (root + 1), 1 / root, -0.5 / root.pow(3)


def _cauchy(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    slope = 1 / (1 + z)
    return torch.log1p(z), slope, -slope.square()


def _tukey(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    inner = (1 - z).clamp(min=0)
    return (1 - inner.pow(3)) / 3, inner.square(), -2 * inner


LOSSES: dict[str, Rho] = {"huber": _huber, "soft_l1": _soft_l1, "cauchy": _cauchy, "tukey": _tukey}


class Robust:
    """A loss of residuals.

    Args:
        rho: None for squares.
        scale: Residual beyond which they count less, in their unit.
    """

    def __init__(self, rho: Rho | None = None, scale: float = 1.0) -> None:
        self._rho, self._scale = rho, scale
        self.is_linear = rho is None

    @classmethod
    def of(cls, loss: Any, scale: float) -> Robust:
        """By name, or SciPy's callable: z of shape (m,) -> (3, m).

        Raises:
            ValueError: the name is not known.
        """
        if loss == "linear":
            return cls()
        if callable(loss):
            return cls(_of_callable(loss), scale)
        if loss not in LOSSES:
            names = ", ".join(map(repr, ("linear", *LOSSES)))
            raise ValueError(f"loss must be a function or one of {names}, got {loss!r}.")
        return cls(LOSSES[loss], scale)

    def value(self, r: Tensor) -> Tensor:
        """Half the sum of the losses, in the graph of the residuals."""
        if self._rho is None:
            return 0.5 * r.dot(r)
        return 0.5 * self._scale**2 * self._rho(self._squares(r))[0].sum()

    def cost(self, r: Tensor) -> float:
        """Half the sum of the losses."""
        return float(self.value(r))

    def decrease(self, before: Tensor, after: Tensor) -> float:
        """Of the cost, summed by residuals, so that it is seen below the rounding of the sum."""
        if self._rho is None:
            return 0.5 * float((before - after).dot(before + after))
        changes = self._rho(self._squares(before))[0] - self._rho(self._squares(after))[0]
        return 0.5 * self._scale**2 * float(changes.sum())

    def slopes(self, r: Tensor) -> Tensor:
        """``rho'``, the weight of each residual, shape (m,)."""
        return torch.ones_like(r) if self._rho is None else self._rho(self._squares(r))[1]

    def curvatures(self, r: Tensor) -> Tensor:
        """Second derivative of each half loss by its residual, shape (m,); negative for some outliers."""
        if self._rho is None:
            return torch.ones_like(r)
        z = self._squares(r)
        _, slope, bend = self._rho(z)
        return slope + 2 * bend * z

    def corrected(self, r: Tensor, J: Tensor) -> tuple[Tensor, Tensor]:
        """Residuals and Jacobian whose squares have the loss's gradient and, where there is enough, its bend.

        Elsewhere the weighted ones: iteratively reweighted least squares.
        """
        if self._rho is None:
            return r, J
        residuals, root = self.factors(r)
        return residuals, root.unsqueeze(1) * J

    def factors(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """Those residuals, and what multiplies the rows of the Jacobian, shape (m,) each."""
        if self._rho is None:
            return r, torch.ones_like(r)
        z = self._squares(r)
        _, slope, bend = self._rho(z)
        curvature = slope + 2 * bend * z
        root = torch.where(curvature > CURVED * slope, curvature, slope).sqrt()
        scaled = torch.where(root > 0, slope / torch.where(root > 0, root, 1.0), 0.0)
        return scaled * r, root

    def _squares(self, r: Tensor) -> Tensor:
        return (r / self._scale).square()


def _of_callable(loss: Callable[[Any], Any]) -> Rho:
    def rho(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values = torch.as_tensor(loss(z), device=z.device).to(z)
        if values.shape != (3, len(z)):
            got = tuple(values.shape)
            raise ValueError(f"loss must return rho and its two derivatives, shape {(3, len(z))}, got {got}.")
        return values[0], values[1], values[2]

    return rho
