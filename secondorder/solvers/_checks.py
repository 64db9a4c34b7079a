"""Checks at the entry of every solver."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def check_system(A: Any, b: Tensor) -> None:
    """Raise unless ``b`` is a floating-point vector whose length fits ``A``."""
    if not isinstance(b, Tensor):
        raise TypeError(f"b must be a tensor, got {type(b).__name__}.")
    if b.ndim != 1:
        raise ValueError(f"b must have shape (n,), got {tuple(b.shape)}.")
    if not b.is_floating_point():
        raise TypeError(f"b must have a floating-point dtype, got {b.dtype}.")
    shape = getattr(A, "shape", None)
    if shape is not None and tuple(shape) != (b.numel(), b.numel()):
        raise ValueError(
            f"A must be square and fit b: got A of shape {tuple(shape)} and b of shape {tuple(b.shape)}."
        )
    dtype = getattr(A, "dtype", b.dtype)
    if dtype != b.dtype:
        raise TypeError(f"A and b must have one dtype, got {dtype} and {b.dtype}; convert one of them.")


def check_limits(rtol: float, atol: float, max_iter: int | None) -> None:
    """Raise unless the tolerances and the iteration limit are non-negative."""
    for name, value in (("rtol", rtol), ("atol", atol), ("max_iter", max_iter)):
        if value is not None and not value >= 0:
            raise ValueError(f"{name} must be non-negative, got {value}.")


def check_radius(radius: float) -> None:
    """Raise unless ``radius`` is a positive number."""
    if not radius > 0:
        raise ValueError(f"radius must be positive, got {radius}.")


def dense(A: Any, like: Tensor) -> Tensor:
    """``A`` as a symmetrised dense matrix, shape (n, n)."""
    if isinstance(A, Tensor):
        matrix = A
    elif hasattr(A, "dense"):
        matrix = A.dense()
    else:
        eye = torch.eye(like.numel(), dtype=like.dtype, device=like.device)
        matrix = torch.stack([A @ row for row in eye], dim=1)
    return (matrix + matrix.T) / 2
