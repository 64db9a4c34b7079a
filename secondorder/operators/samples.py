"""The Gauss-Newton matrix of a loss of many samples, by the outputs of some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from secondorder.operators.curvature import GaussNewton
from secondorder.operators.parameters import Jacobian, ThroughOutputs

# ``M u`` for parts shaped like outputs, with a leading dimension more where batched.
Middle = Callable[[Sequence[Tensor], bool], list[Tensor]]


class SampledGaussNewton(ThroughOutputs):
    """``sum_i w_i J_i^T M_i J_i`` over some samples, an estimate of the sum over all with ``w = 1``.

    Args:
        middle: The blocks ``M_i`` of these samples.
        outputs: Theirs, each of shape (m, ...).
        weights: Shape (m,); ``N / m`` where samples were drawn evenly.
        parameters: Of the network.
        batched: As in ``Hessian``.

    Raises:
        ValueError: ``outputs`` carry no graph; ``parameters`` is empty, mixed or frozen.

    Cost: as of ``GaussNewton`` for ``m`` samples.

    Reference: Byrd, Chin, Neveitt and Nocedal (2011), On the use of stochastic Hessian information in
        optimization methods for machine learning.
    """

    def __init__(
        self,
        middle: Middle,
        outputs: Sequence[Tensor],
        weights: Tensor,
        parameters: Iterable[Tensor],
        *,
        batched: bool | None = None,
    ) -> None:
        super().__init__(parameters, batched)
        self.jacobian = Jacobian(outputs, self.parameters, batched=batched)
        self._multiply, self._weights = middle, weights

    def _middle(self, parts: list[Tensor], batched: bool) -> list[Tensor]:
        found, dim = self._multiply(parts, batched), int(batched)
        return [part * self._weights.to(part.dtype).view(-1, *[1] * (part.ndim - dim - 1)) for part in found]


def block_matrices(whole: GaussNewton) -> Tensor:
    """``M_i`` for all samples, shape (N, E, E), where those with another index do not matter.

    Args:
        whole: ``M``; its ``parameters`` are the outputs, each of shape (N, ...), with E entries a sample.

    Cost: E products, in one batched backward pass.
    """
    outputs = whole.parameters
    sizes = [output[0].numel() for output in outputs]
    units = torch.eye(sum(sizes), dtype=outputs[0].dtype, device=outputs[0].device)
    parts = [
        unit.reshape(-1, 1, *output.shape[1:]).expand(-1, *output.shape)
        for unit, output in zip(units.split(sizes, 1), outputs, strict=True)
    ]
    return _rows(whole.multiplied(parts, batched=True), 2).permute(1, 2, 0)


def by_matrices(matrices: Tensor) -> Middle:
    """With the blocks of some samples, shape (m, E, E)."""

    def multiply(parts: Sequence[Tensor], batched: bool) -> list[Tensor]:
        dim = 1 + int(batched)
        found = (matrices @ _rows(parts, dim).unsqueeze(-1)).squeeze(-1)
        sizes = [part[(0,) * dim].numel() for part in parts]
        return [one.reshape(part.shape) for one, part in zip(found.split(sizes, -1), parts, strict=True)]

    return multiply


def _rows(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Side by side, in one row a sample."""
    return torch.cat([part.reshape(*part.shape[:dim], -1) for part in parts], -1)


def by_all(whole: GaussNewton, rows: Tensor) -> Middle:
    """By products in the space of the outputs of all samples, zero for the others.

    Args:
        whole: ``M``; its ``parameters`` are the outputs, each of shape (N, ...).
        rows: Which samples, shape (m,).
    """

    def multiply(parts: Sequence[Tensor], batched: bool) -> list[Tensor]:
        found = whole.multiplied(spread(whole, rows, parts, batched), batched)
        return [part.index_select(int(batched), rows) for part in found]

    return multiply


def spread(whole: GaussNewton, rows: Tensor, parts: Sequence[Tensor], batched: bool = False) -> list[Tensor]:
    """Parts of some samples as those of all, zero for the others."""
    dim = int(batched)
    return [
        part.new_zeros((*part.shape[:dim], *output.shape)).index_copy(dim, rows, part)
        for part, output in zip(parts, whole.parameters, strict=True)
    ]
