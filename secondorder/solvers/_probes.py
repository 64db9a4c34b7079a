"""Random vectors, and products with them, for the solvers that draw some.

With a ``generator``, numbers are drawn on its device, and moved: one seed gives one result on every device,
and the global random state stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

NOT_FINITE = "A @ v must be finite, got NaN or infinity; look at what A is computed from."


def gaussian(like: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Independent standard normal numbers, shape (n, count)."""
    device = like.device if generator is None else generator.device
    numbers = torch.randn(like.shape[0], count, generator=generator, dtype=like.dtype, device=device)
    return numbers.to(like.device)


def rademacher(like: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Independent signs, shape (n, count)."""
    device = like.device if generator is None else generator.device
    bits = torch.randint(2, (like.shape[0], count), generator=generator, dtype=like.dtype, device=device)
    return bits.mul_(2).sub_(1).to(like.device)


def multiply(A: Any, V: Tensor) -> Tensor:
    """``A @ V`` for a block of shape (n, k), checked to be finite: one host read."""
    product: Tensor = A @ V
    check_finite(product)
    return product


def check_finite(numbers: Tensor) -> None:
    """Raise unless what came out of products is finite."""
    if not bool(numbers.isfinite().all()):
        raise RuntimeError(NOT_FINITE)


def identity_blocks(like: Tensor, width: int = 128) -> Iterator[tuple[int, Tensor]]:
    """The identity, ``width`` columns at a time, each block with the index of its first column."""
    n = like.shape[0]
    for start in range(0, n, width):
        block = torch.zeros(n, min(width, n - start), dtype=like.dtype, device=like.device)
        block.diagonal(-start).fill_(1)
        yield start, block
