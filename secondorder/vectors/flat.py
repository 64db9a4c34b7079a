"""The border between a tuple of tensors and one flat vector; nothing else crosses it.

Above this border (operators, solvers, optimizers) a vector has shape ``(n,)`` and a block of ``k``
vectors ``(n, k)``; below it (products, the functional API) it is a tuple of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from secondorder.vectors.host import is_true, read


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate ``tensors`` in order into one vector of shape ``(n,)``; a copy."""
    return torch.cat([tensor if tensor.ndim == 1 else tensor.reshape(-1) for tensor in tensors])


def is_finite(vector: Tensor) -> bool:
    """Whether no entry is NaN or infinite: one host read, no new memory."""
    # The sum of finite numbers may be infinite.
    return math.isfinite(read(vector.sum())[0]) or is_true(vector.isfinite().all())


class Layout:
    """How some tensors lie in their flat vector, read once and used for many.

    Args:
        like: Tensors, of which the shapes count.

    Attributes:
        size: ``n``, of the flat vector.
    """

    def __init__(self, like: Sequence[Tensor]) -> None:
        self._shapes = [tensor.shape for tensor in like]
        self._sizes = [tensor.numel() for tensor in like]
        self.size = sum(self._sizes)

    def unflatten(self, vector: Tensor) -> tuple[Tensor, ...]:
        """Views of ``vector``, shape ``(n,)``, with these shapes, in order; the dtype stays its own."""
        parts = zip(torch.split_with_sizes(vector, self._sizes), self._shapes, strict=True)
        return tuple([part if len(shape) == 1 else part.view(shape) for part, shape in parts])

    def unflatten_rows(self, matrix: Tensor) -> tuple[Tensor, ...]:
        """Views of ``matrix``, shape ``(k, n)``, with shapes ``(k, *shape_i)``, in order."""
        parts = zip(torch.split_with_sizes(matrix, self._sizes, 1), self._shapes, strict=True)
        return tuple([part.reshape(matrix.shape[0], *shape) for part, shape in parts])


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Views of ``vector``, shape ``(n,)``, with the shapes of ``like``, in order.

    The dtype stays that of ``vector``.
    """
    return Layout(like).unflatten(vector)


def flatten_rows(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors of shape ``(k, *shape_i)`` into one matrix of shape ``(k, n)``."""
    return torch.cat([tensor.reshape(tensor.shape[0], -1) for tensor in tensors], dim=1)


def unflatten_rows(matrix: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Views of ``matrix``, shape ``(k, n)``, with shapes ``(k, *shape_i)``, in order."""
    return Layout(like).unflatten_rows(matrix)


_REMEDIES = {
    "ndarray": "; convert it with torch.from_numpy, or use A.to_scipy().",
    "dict": "; pass list(v.values()), in the order of the parameters.",
}


def on_parts(function: Callable[[Tensor], Tensor], parts: Any, like: Sequence[Tensor] | None) -> Any:
    """``function`` of the flat vector of ``parts``, its value in parts again, a list for a list.

    Args:
        function: Takes and returns a vector of shape (n,).
        parts: A list or tuple of tensors with the shapes of ``like``.
        like: None where there is no such structure.

    Raises:
        TypeError: ``parts`` is something else or of several dtypes, or there is no structure.
        ValueError: ``parts`` holds something else than tensors of these shapes.
    """
    kind = type(parts).__name__
    if not isinstance(parts, list | tuple):
        raise TypeError(f"v must be a tensor, got {kind}{_REMEDIES.get(kind, '.')}")
    if like is None:
        raise TypeError(f"v must be a tensor, got {kind}; join its tensors with parameters_to_vector(v).")
    if len(parts) != len(like):
        raise ValueError(
            f"v must hold a tensor for each of {len(like)} parameters, got a {kind} of {len(parts)}."
        )
    for index, (part, tensor) in enumerate(zip(parts, like, strict=True)):
        if not isinstance(part, Tensor) or part.shape != tensor.shape:
            got = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
            raise ValueError(f"v[{index}] must be a tensor of shape {tuple(tensor.shape)}, got {got}.")
        if part.dtype != parts[0].dtype:
            raise TypeError(f"v must hold tensors of one dtype, got {parts[0].dtype} and {part.dtype}.")
    results = unflatten(function(flatten(parts)), like)
    return type(parts)(*results) if hasattr(parts, "_fields") else type(parts)(results)
