"""Checks at the entry of every solver."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def check_system(A: Any, b: Tensor) -> None:
    """Raise unless ``A`` is symmetric and fits ``b``, floating-point, of shape (n,) or (n, k)."""
    check_right_hand_side(b)
    shape, n = getattr(A, "shape", None), b.shape[0]
    if shape is not None and tuple(shape) != (n, n):
        raise ValueError(
            f"A must be square and fit b: got A of shape {tuple(shape)} and b of shape {tuple(b.shape)}."
        )
    check_together(A, b)
    if not (looks_symmetric(A) if isinstance(A, Tensor) else getattr(A, "is_symmetric", True)):
        raise ValueError("A must be symmetric, got one that differs from its transpose; use lsmr.")


def check_right_hand_side(b: Tensor) -> None:
    """Raise unless ``b`` is floating-point, of shape (n,) or (n, k)."""
    if not isinstance(b, Tensor):
        raise TypeError(f"b must be a tensor, got {type(b).__name__}.")
    if b.ndim not in (1, 2):
        raise ValueError(f"b must have shape (n,) or (n, k), got {tuple(b.shape)}.")
    if not b.is_floating_point():
        raise TypeError(f"b must have a floating-point dtype, got {b.dtype}.")


def check_together(A: Any, b: Tensor) -> None:
    """Raise unless ``A`` and ``b`` share dtype and device."""
    if not (callable(getattr(A, "__matmul__", None))):
        raise TypeError(f"A must support A @ v, got {type(A).__name__}; wrap a function in FunctionOperator.")
    dtype, device = getattr(A, "dtype", b.dtype), getattr(A, "device", b.device)
    if dtype != b.dtype:
        raise TypeError(f"A and b must have one dtype, got {dtype} and {b.dtype}; convert one of them.")
    if device != b.device:
        raise ValueError(f"A and b must be on one device, got {device} and {b.device}; move one of them.")


def looks_symmetric(matrix: Tensor) -> bool:
    """Whether a matrix equals its transpose up to ``sqrt(eps)`` of its largest entry; NaN counts as equal."""
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        return False
    if not matrix.numel():
        return True
    difference, largest = torch.stack([(matrix - matrix.T).abs().max(), matrix.abs().max()]).tolist()
    return not difference > torch.finfo(matrix.dtype).eps ** 0.5 * largest


def check_start(x0: Tensor | None, b: Tensor, n: int) -> None:
    """Raise unless ``x0`` has the shape of the solution."""
    shape = (n, *b.shape[1:])
    if x0 is not None and tuple(x0.shape) != shape:
        raise ValueError(f"x0 must have shape {shape}, got {tuple(x0.shape)}.")


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
