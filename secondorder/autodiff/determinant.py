"""The determinant, with right derivatives where the matrix is singular."""

from __future__ import annotations

import torch
from torch import Tensor

from secondorder.autodiff.graph import is_singular
from secondorder.autodiff.guard import is_transformed


def det(A: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Torch's, but for singular matrices, whose derivatives it takes by solving with them."""
    with torch._C.DisableTorchFunction():
        plain = torch.linalg.det(A, out=out)
        # Under torch.func the identity is enough to get NaN: none is taken for regular there.
        if out is not None or not (is_transformed(A) or is_singular(A, plain)):
            return plain
    return _det_without_division(A)


def _det_without_division(A: Tensor) -> Tensor:
    """The algorithm of Samuelson and Berkowitz (1984): a polynomial in the entries, as the determinant is.

    The characteristic polynomial of each leading block is a Toeplitz matrix times that of the one before.
    """
    n, batch = A.shape[-1], A.shape[:-2]
    one = A.new_ones((*batch, 1))
    polynomial = one
    for k in range(n):
        block, row, column = A[..., :k, :k], A[..., k, :k], A[..., :k, k]
        entries = [one.squeeze(-1), -A[..., k, k]]
        for _ in range(k):
            entries.append(-(row * column).sum(-1))
            column = (block @ column.unsqueeze(-1)).squeeze(-1)
        longer = torch.stack(entries, -1)
        parts = [
            (longer[..., : i + 1].flip(-1)[..., : k + 1] * polynomial[..., : i + 1]).sum(-1)
            if i <= k
            else (longer[..., 1:].flip(-1) * polynomial).sum(-1)
            for i in range(k + 2)
        ]
        polynomial = torch.stack(parts, -1)
    return polynomial[..., -1] * (-1) ** n
