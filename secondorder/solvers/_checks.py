"""Checks at the entry of every solver."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def check_system(A: Any, b: Tensor) -> None:
    """Raise unless ``A`` is symmetric and fits ``b``, floating-point, of shape (n,) or (n, k)."""
    check_fit(A, b)
    check_symmetric(A, "use lsmr")


def check_fit(A: Any, b: Tensor) -> None:
    """Raise unless ``A`` is square and fits ``b``, floating-point, of shape (n,) or (n, k)."""
    check_right_hand_side(b)
    shape, n = getattr(A, "shape", None), b.shape[0]
    if shape is not None and tuple(shape) != (n, n):
        raise ValueError(
            f"A must be square and fit b: got A of shape {tuple(shape)} and b of shape {tuple(b.shape)}."
        )
    check_together(A, b)


def check_symmetric(A: Any, remedy: str) -> None:
    """Raise unless ``A`` is symmetric: looked at for a matrix, declared by an operator."""
    if not (looks_symmetric(A) if isinstance(A, Tensor) else getattr(A, "is_symmetric", True)):
        raise ValueError(f"A must be symmetric, got one that differs from its transpose; {remedy}.")


def check_right_hand_side(b: Tensor, name: str = "b") -> None:
    """Raise unless ``b`` is floating-point, of shape (n,) or (n, k)."""
    if not isinstance(b, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(b).__name__}.")
    if b.ndim not in (1, 2):
        raise ValueError(f"{name} must have shape (n,) or (n, k), got {tuple(b.shape)}.")
    if not b.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {b.dtype}.")


def check_together(A: Any, b: Tensor, name: str = "b") -> None:
    """Raise unless ``A`` and ``b`` share dtype and device."""
    check_operator(A)
    dtype, device = getattr(A, "dtype", b.dtype), getattr(A, "device", b.device)
    if dtype != b.dtype:
        raise TypeError(f"A and {name} must have one dtype, got {dtype} and {b.dtype}; convert one of them.")
    if device != b.device:
        raise ValueError(
            f"A and {name} must be on one device, got {device} and {b.device}; move one of them."
        )


def check_operator(A: Any) -> None:
    """Raise unless ``A`` has products ``A @ v``."""
    if not (callable(getattr(A, "__matmul__", None))):
        raise TypeError(f"A must support A @ v, got {type(A).__name__}; wrap a function in FunctionOperator.")


def check_count(name: str, value: Any, lowest: int, highest: int | None = None) -> None:
    """Raise unless ``value`` is an integer from ``lowest`` to ``highest``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}.")
    if value < lowest or (highest is not None and value > highest):
        bounds = f"at least {lowest}" if highest is None else f"from {lowest} to {highest}"
        raise ValueError(f"{name} must be {bounds}, got {value}.")


def domain(A: Any, like: Tensor | None, name: str = "like") -> Tensor:
    """A vector of the space on which the square ``A`` acts, shape (n,), for its length, dtype and device.

    From ``like`` where it is given, else from ``A.shape``, ``A.dtype`` and ``A.device``; it stores one
    number.
    """
    check_operator(A)
    shape = getattr(A, "shape", None)
    if shape is not None and not (len(shape) == 2 and shape[0] == shape[1]):
        raise ValueError(f"A must be square, got shape {tuple(shape)}.")
    if like is None:
        if shape is None or not isinstance(getattr(A, "dtype", None), torch.dtype):
            raise ValueError(f"{name} must be given for an A without shape and dtype; pass a vector (n,).")
        like = torch.empty((), dtype=A.dtype, device=getattr(A, "device", None)).expand(shape[0])
    check_right_hand_side(like, name)
    if like.ndim != 1 or (shape is not None and like.shape[0] != shape[0]):
        expected = "(n,)" if shape is None else f"({shape[0]},)"
        raise ValueError(f"{name} must have shape {expected}, got {tuple(like.shape)}.")
    check_together(A, like, name)
    if like.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"A must be of dtype float32 or float64, got {like.dtype}; torch factors no matrix of that dtype."
        )
    return like


def looks_symmetric(matrix: Tensor) -> bool:
    """Whether a matrix equals its transpose up to ``sqrt(eps)`` of its largest entry; NaN counts as equal."""
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        return False
    if not matrix.numel():
        return True
    if matrix.layout is not torch.strided:
        matrix = matrix.to_sparse_coo()
        entries = [(matrix - matrix.T).coalesce().values(), matrix.coalesce().values()]
        sizes = [e.abs().max() if e.numel() else matrix.new_zeros((), layout=torch.strided) for e in entries]
        difference, largest = torch.stack(sizes).tolist()
        return not difference > torch.finfo(matrix.dtype).eps ** 0.5 * largest
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
    if max_iter is not None and not isinstance(max_iter, int):
        raise TypeError(f"max_iter must be an integer, got {max_iter!r}.")


def check_iteration(
    A: Any, b: Tensor, x0: Tensor | None, M: Any, limits: tuple[float, float, int | None]
) -> None:
    """Raise unless an iterative solver can take these; ``limits`` are ``rtol, atol, max_iter``."""
    check_system(A, b)
    check_start(x0, b, b.shape[0])
    check_limits(*limits)
    check_preconditioner(M, b)


def check_damping(damping: float) -> None:
    """Raise unless ``damping`` is a number that is not negative."""
    if not damping >= 0:
        raise ValueError(f"damping must be non-negative, got {damping}.")


def check_preconditioner(M: Any, b: Tensor) -> None:
    """Raise unless ``M`` is None or has products with vectors like the columns of ``b``."""
    if M is None:
        return
    n, shape = b.shape[0], getattr(M, "shape", None)
    if not callable(getattr(M, "__matmul__", None)):
        raise TypeError(f"M must support M @ r, got {type(M).__name__}; wrap a function in FunctionOperator.")
    if shape is not None and tuple(shape) != (n, n):
        hint = "; use diagonal_preconditioner" if len(shape) == 1 else ""
        raise ValueError(f"M must have shape ({n}, {n}), got {tuple(shape)}{hint}.")


def check_radius(radius: float) -> None:
    """Raise unless ``radius`` is a positive number."""
    if not radius > 0:
        raise ValueError(f"radius must be positive, got {radius}.")


def dense(A: Any, like: Tensor) -> Tensor:
    """``A`` as a dense matrix, shape (n, n), symmetric but for rounding."""
    if isinstance(A, Tensor):
        matrix = A if A.layout is torch.strided else A.to_dense()
    elif hasattr(A, "dense"):
        matrix = A.dense()
    else:
        eye = torch.eye(like.shape[0], dtype=like.dtype, device=like.device)
        matrix = torch.stack([A @ row for row in eye], dim=1)
        if not looks_symmetric(matrix):
            raise ValueError("A must be symmetric, but its matrix is not; use lsmr.")
    return matrix
