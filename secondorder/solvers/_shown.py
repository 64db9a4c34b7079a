"""Results in a few lines, however large their tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Beyond this many elements a tensor is printed by its shape and range.
MOST = 24


def span(value: Tensor) -> str:
    """What the elements are, in a few words."""
    value = value.detach()
    if value.dtype == torch.bool:
        return f"{int(value.sum())} true"
    numbers = value[~value.isnan()]
    if not len(numbers):
        return "all NaN"
    low, high = (f"{float(bound):.4g}" for bound in torch.aminmax(numbers))
    missing = value.numel() - len(numbers)
    return f"from {low} to {high}" + (f", {missing} NaN" if missing else "")


def shown(value: Any) -> str:
    """A long tensor by its shape and range, a float by its digits that matter, all else as it is."""
    if isinstance(value, Tensor) and value.numel() > MOST:
        return f"{tuple(value.shape)} {value.dtype}, {span(value)}".replace("torch.", "")
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def in_lines(result: Any) -> str:
    """Of a named tuple: a line each field, as results of ``optim.minimize``."""
    width = max(map(len, result._fields))
    lines = [(name, shown(value)) for name, value in zip(result._fields, result, strict=True)]
    inner = "\n" + " " * (width + 2)
    return "\n".join(f"{name:>{width}}: " + text.replace("\n", inner) for name, text in lines)
