"""The Hessian of a loss in the space of outputs: the blocks that it consists of."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from secondorder.autodiff.backward import pull, pull_rows
from secondorder.autodiff.graph import Source, like
from secondorder.vectors.host import is_true, read

# Rows of a block, and entries of all blocks, up to which they are formed: a factorization of a few 1e9
# operations at most.
MAX_ROWS = 512
MAX_ENTRIES = 2**23

# Entries of the products that are computed at once.
CHUNK = 2**20

# Multiples of the rounding of a number. In single precision the blocks of cross entropies, written by hand,
# times a vector were within 3 of the product.
PROBE = 64


class Blocks(NamedTuple):
    """A block-diagonal matrix.

    Attributes:
        matrices: Shape (number, k, k).
        dims: Dimensions of the outputs that lie in a block.
    """

    matrices: Tensor
    dims: tuple[int, ...]

    def rows(self, tensor: Tensor) -> Tensor:
        """A tensor shaped like the outputs, in parts of shape (number, k)."""
        return _last(tensor, self.dims).reshape(-1, self.matrices.shape[1])


class OutputHessian:
    """The Hessian of a loss with respect to outputs.

    Args:
        gradient: With respect to the outputs, in their graph.
        outputs: These, or their place there.

    Attributes:
        gradient: As given.

    Raises:
        MissingDerivativeError: an operation has no second derivative.
    """

    def __init__(self, gradient: Tensor, outputs: Source) -> None:
        self.gradient, self._outputs, self._like = gradient, outputs, like(outputs)
        self._eps = torch.finfo(gradient.dtype).eps
        generator = torch.Generator("cpu").manual_seed(0)
        probe = torch.randn(self._like.shape, generator=generator, device="cpu").to(self._like)
        self._probe = probe, self._times(probe)

    def _times(self, v: Tensor) -> Tensor:
        return pull([self.gradient], [self._outputs], [v])[0] if self.gradient.requires_grad else 0 * v

    def is_zero(self) -> bool:
        """Whether the loss is linear; NaN is not zero."""
        return not is_true(self._probe[1].any())

    def blocks(self) -> Blocks | None:
        """Its blocks, the smallest of which it consists; None where they are too large.

        A product with a random vector, which the blocks must give, says whether there is more than they.
        Rounding hides what is less than 1e-5 of the whole in single precision.
        """
        probe, product = self._probe
        for dims in _dims(self._like.shape):
            blocks = self._formed(dims)
            error = (blocks.matrices @ blocks.rows(probe).unsqueeze(2)).squeeze(2) - blocks.rows(product)
            size, left = read(product.norm(), error.norm())
            # Not so with NaN.
            if left <= PROBE * self._eps * size:
                return blocks
        return None

    def _formed(self, dims: tuple[int, ...]) -> Blocks:
        """The blocks if there is nothing else: one column of all at once."""
        shape = self._like.shape
        k = math.prod(shape[dim] for dim in dims)
        eye = torch.eye(k, dtype=self.gradient.dtype, device=self.gradient.device)
        basis = eye.view(k, *(shape[dim] if dim in dims else 1 for dim in range(len(shape)))).expand(
            k, *shape
        )
        columns = torch.cat([self._rows(V) for V in basis.split(max(1, CHUNK // max(1, shape.numel())))])
        matrices = _last(columns, tuple(dim + 1 for dim in dims)).reshape(k, -1, k).permute(1, 2, 0)
        return Blocks(matrices, dims)

    def _rows(self, V: Tensor) -> Tensor:
        if len(V) > 1:
            try:
                return pull_rows([self.gradient], [self._outputs], [V])[0]
            except RuntimeError:
                # An operation without a batching rule.
                pass
        return torch.stack([self._times(v) for v in V])


def _dims(shape: torch.Size) -> Iterator[tuple[int, ...]]:
    """Sets of dimensions that may be the block's: none, each, all but the first, all; the smallest first."""
    every = tuple(range(len(shape)))
    sets = dict.fromkeys([(), *((dim,) for dim in every), every[1:], every])
    sizes = {dims: math.prod(shape[dim] for dim in dims) for dims in sets}
    for dims in sorted(sizes, key=sizes.__getitem__):
        if sizes[dims] <= MAX_ROWS and sizes[dims] * shape.numel() <= MAX_ENTRIES:
            yield dims


def _last(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    """With these dimensions at the end."""
    return tensor.movedim(dims, tuple(range(tensor.ndim - len(dims), tensor.ndim)))
