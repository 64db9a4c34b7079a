"""The border between a tuple of tensors and one flat vector; nothing else crosses it.

Above this border (operators, solvers, optimizers) a vector has shape ``(n,)`` and a block of ``k``
vectors ``(n, k)``; below it (products, the functional API) it is a tuple of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate ``tensors`` in order into one vector of shape ``(n,)``; a copy."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def is_finite(vector: Tensor) -> bool:
    """Whether no entry is NaN or infinite: one host read, no new memory."""
    # The sum of finite numbers may be infinite.
    return math.isfinite(float(vector.sum())) or bool(vector.isfinite().all())


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Views of ``vector``, shape ``(n,)``, with the shapes of ``like``, in order.

    The dtype stays that of ``vector``.
    """
    parts = vector.split([tensor.numel() for tensor in like])
    return tuple(part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True))


def flatten_rows(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors of shape ``(k, *shape_i)`` into one matrix of shape ``(k, n)``."""
    return torch.cat([tensor.reshape(tensor.shape[0], -1) for tensor in tensors], dim=1)


def unflatten_rows(matrix: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Views of ``matrix``, shape ``(k, n)``, with shapes ``(k, *shape_i)``, in order."""
    parts = matrix.split([tensor.numel() for tensor in like], dim=1)
    return tuple(
        part.reshape(matrix.shape[0], *tensor.shape) for part, tensor in zip(parts, like, strict=True)
    )
