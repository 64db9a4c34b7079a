"""A Jacobian of a network's outputs from the inputs of its layers and their output-gradients.

A backward pass for each output of a sample, in place of one for each output or each parameter.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from secondorder.operators.parameters import Jacobian
from secondorder.operators.per_sample import Layers
from secondorder.operators.pieces import TooLargeError, add_pieces


class Rows(NamedTuple):
    """A Jacobian as a matrix.

    Attributes:
        matrix: Shape (m, n).
        passes: Backward passes that made it.
        why: Why some of its columns took more; empty where none did.
    """

    matrix: Tensor
    passes: int
    why: str


class _Room(NamedTuple):
    """Bytes beside the matrix."""

    budget: float
    itemsize: int

    def fits(self, numbers: float) -> bool:
        return numbers * self.itemsize <= self.budget

    def require(self, numbers: float, what: str) -> None:
        if not self.fits(numbers):
            raise TooLargeError(
                f"memory must be at least {numbers * self.itemsize:.2e} bytes for {what}, got"
                f" {self.budget:.2e}."
            )


@torch.no_grad()
def rows(jacobian: Jacobian, *, memory: float = 2.0**32) -> Rows:
    """The matrix of a Jacobian, layer by layer, as ``gram`` reads them.

    Args:
        jacobian: Of outputs in the graph; their first dimension counts samples.
        memory: Bytes that may be allocated.

    Raises:
        TooLargeError: the matrix, or the gradients at a layer, do not fit ``memory``.

    Cost: as many backward passes as a sample has outputs, two more for the proof, and one host read; for
    parameters that are not read, as many as these have entries, or as there are outputs.

    Example:
        >>> layer = torch.nn.Linear(2, 1)
        >>> found = rows(Jacobian(layer(torch.tensor([[1.0, 2.0], [3.0, 4.0]])), list(layer.parameters())))
        >>> found.matrix, found.passes
        (tensor([[1., 2., 1.],
                [3., 4., 1.]]), 3)
    """
    m, n = jacobian.shape
    parameters, size = jacobian.parameters, jacobian.dtype.itemsize
    if m * n * size > memory:
        raise TooLargeError(
            f"memory must be at least {m * n * size:.2e} bytes for a Jacobian of {m} x {n}, got {memory:.2e}."
        )
    matrix = torch.zeros(m, n, dtype=jacobian.dtype, device=jacobian.device)
    blocks = matrix.split([p.numel() for p in parameters], dim=1)
    layers = Layers(jacobian, [i for i, p in enumerate(parameters) if p.numel()])
    for i, pieces in layers.pieces(_Room(memory - m * n * size, size), jacobian.dtype):
        add_pieces(blocks[i], pieces, parameters[i])
    if any(z.entries > 1 for z in layers.outputs):
        matrix = matrix[layers.order()]
    passes, slow = layers.passes, layers.slow
    if slow and m:
        block = jacobian.restrict(slow)
        columns = block.dense() if m > block.shape[1] else block.T.dense().T
        passes += min(block.shape)
        blocks = matrix.split([p.numel() for p in parameters], dim=1)
        for i, part in zip(slow, columns.split([blocks[i].shape[1] for i in slow], dim=1), strict=True):
            blocks[i].copy_(part)
    return Rows(matrix, passes, "; ".join(layers.unread))
