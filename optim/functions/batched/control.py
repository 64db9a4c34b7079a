"""Step control of a batch: the formulas of ``optim.methods.control`` on tensors of shape (B,)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...methods.control import ACCEPTANCE, GOOD, LOW, MAX_DAMPING, MIN_DAMPING, MIN_RADIUS


def nielsen_damping(damping: Tensor, growth: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
    """Damping and its growth factor for the next trial of each problem."""
    most = min(MAX_DAMPING, torch.finfo(damping.dtype).max)
    factor = (1 - (2 * rho.clamp(max=2.0) - 1) ** 3).clamp(min=1 / 3)
    is_accepted = rho > ACCEPTANCE
    looser = (damping * factor).clamp(MIN_DAMPING, most)
    tighter = (damping * growth).clamp(max=most)
    return torch.where(is_accepted, looser, tighter), torch.where(
        is_accepted, 2.0, (2 * growth).clamp(max=1e6)
    )


def trust_radius(radius: Tensor, rho: Tensor, length: Tensor) -> Tensor:
    """Radius for the next trial of each problem."""
    shorter = torch.where(length > 0, torch.minimum(radius, length), radius)
    smaller = (0.25 * shorter).clamp(min=MIN_RADIUS)
    larger = torch.where((rho > GOOD) & (length >= 0.9 * radius), 2.5 * radius, radius)
    return torch.where(rho >= LOW, larger, smaller)
