"""Parameter groups: all parameters as one model, and what groups differ in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Groups = Sequence[Mapping[str, Any]]


def moving(groups: Groups) -> list[Tensor]:
    """The parameters that can move, in the order of the flat vectors."""
    return [p for group in groups for p in group["params"] if p.requires_grad]


def joint(groups: Groups, name: str) -> list[Tensor]:
    """The same, checked: there is one model over all groups.

    Args:
        groups: Of an optimizer.
        name: Its name, for errors.

    Raises:
        RuntimeError: there are none.
        TypeError: one is complex.
        ValueError: they differ in dtype or device.
    """
    parameters = moving(groups)
    if not parameters:
        raise RuntimeError(f"{name} has no parameter that requires gradients; unfreeze at least one.")
    first = parameters[0]
    for parameter in parameters:
        if parameter.is_complex():
            raise TypeError(f"{name} needs real parameters, got {parameter.dtype}; use torch.view_as_real.")
        if parameter.dtype != first.dtype or parameter.device != first.device:
            raise ValueError(
                f"{name} needs parameters of one dtype on one device, got {first.dtype} on {first.device}"
                f" and {parameter.dtype} on {parameter.device}."
            )
    return parameters


def of_groups(groups: Groups, name: str, like: Tensor) -> float | Tensor:
    """An option of the groups: a number where all agree, else one for each entry, shape (n,)."""
    values = {float(group[name]) for group in groups}
    if len(values) == 1:
        return values.pop()
    pairs = [(float(g[name]), p) for g in groups for p in g["params"] if p.requires_grad]
    return spread([value for value, _ in pairs], [p for _, p in pairs], like)


def rates(groups: Groups, like: Tensor) -> float | Tensor:
    """``lr``: a number where all groups that move agree, else one for each entry, shape (n,)."""
    values = {float(group["lr"]) for group in groups} - {0.0}
    return values.pop() if len(values) == 1 else of_groups(groups, "lr", like)


def spread(values: Iterable[float], parameters: Iterable[Tensor], like: Tensor) -> Tensor:
    """One number for each parameter as a flat vector, shape (n,)."""
    return torch.cat([like.new_full((p.numel(),), v) for v, p in zip(values, parameters, strict=True)])
