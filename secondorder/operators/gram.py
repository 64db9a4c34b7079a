"""``J J^T`` of a network's outputs without ``J``: from the inputs of its layers and their output-gradients.

Where samples do not mix, one backward pass brings a gradient for every sample to every layer, and as many
passes are enough as one sample has outputs. With rows ``a`` of what a linear layer took and ``b`` of what
came to it, its weight adds ``(A A^T) * (B B^T)`` and its bias ``B B^T``. Whether the layers were read right,
and samples do not mix, is found out for each parameter by a product ``J^T v``. For the others rows are
formed, by as many backward passes.

Reference: Novak, Sohl-Dickstein and Schoenholz (2022), Fast finite width neural tangent kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from secondorder.operators.parameters import Jacobian
from secondorder.operators.per_sample import Layers
from secondorder.operators.pieces import WIDTH, TooLargeError, Total
from secondorder.solvers._probes import identity_blocks

__all__ = ["Gram", "TooLargeError", "gram"]

_COMPUTED = "used by way of what is computed from parameters alone"
_CHEAPER = "rows cost less than products of their factors"


class Gram(NamedTuple):
    """``J J^T``, and how it was computed.

    Attributes:
        matrix: Shape (m, m), in the order of all entries of all outputs.
        forms: For each parameter "ghost" (its rows were not formed), "rows" (they were, for it alone) or
            "none" (they are zero, or have weight 0).
        why: Why rows were formed; empty where none were.
        passes: Backward passes that it took.
    """

    matrix: Tensor
    forms: tuple[str, ...]
    why: str
    passes: int


@torch.no_grad()
def gram(jacobian: Jacobian, weights: Sequence[float] | None = None, *, memory: float = 2.0**32) -> Gram:
    """``sum_p w_p J_p J_p^T`` over parameters, of a Jacobian that is not formed.

    The first dimension of an output counts samples. Linear, convolution, embedding and normalisation layers,
    and parameters that are added or multiplied with broadcasting, are read off the graph, wherever and how
    often they are used, without a hook. A parameter that is used by way of what is computed from parameters
    alone, as a normalised weight, has its rows formed, for it alone; one that is used otherwise, or whose
    gradient is not what its layers say, by as many backward passes: slower, as right.

    Args:
        jacobian: Of outputs in the graph, with ``m`` entries in all.
        weights: Of the parameters, non-negative; all 1 when None. Parameters of weight 0 cost nothing.
        memory: Bytes that may be allocated.

    Returns:
        The matrix, of the dtype of outputs and parameters, at least float32.

    Raises:
        TypeError: ``jacobian`` is not a Jacobian, or complex.
        ValueError: ``weights`` are too few, or negative; ``memory`` is not positive.
        TooLargeError: the matrix, the gradients at a layer or the rows of a parameter do not fit ``memory``.

    Cost: as many backward passes as a sample has outputs, to layers and not to parameters, two more for the
    proof, and ``m^2 / 2`` multiply-adds for each output of a layer: 9 products with the Gauss-Newton matrix
    for 1280 rows of an MLP of 670 thousand parameters. Memory: three matrices, and ``m`` gradients at the
    layers, or at some of them at a time, with one host read each. Parameters whose rows are formed by
    backward passes: ``m`` of these, and ``m`` times their size.

    Example:
        >>> layer = torch.nn.Linear(30, 20)
        >>> found = gram(Jacobian(layer(torch.ones(4, 30)), list(layer.parameters())))
        >>> found.matrix.shape, found.forms, found.why
        (torch.Size([80, 80]), ('ghost', 'ghost'), '')
    """
    factor = _checked(jacobian, weights, memory)
    total, parameters = _empty(jacobian, memory), jacobian.parameters
    forms = ["none"] * len(factor)
    layers = Layers(jacobian, [i for i, weight in enumerate(factor) if weight and parameters[i].numel()])
    why: dict[str, list[int]] = {}
    for i, pieces in layers.pieces(total, total.matrix.dtype):
        if pieces and total.add(pieces, parameters[i], factor[i]):
            why.setdefault(_COMPUTED if any(p.base for p in pieces) else _CHEAPER, []).append(i)
            forms[i] = "rows"
        elif pieces:
            forms[i] = "ghost"
    index = layers.order()
    slow = layers.slow if layers.outputs else []
    _add_passes(jacobian, slow, factor, total, index)
    for i in slow:
        forms[i] = "rows"
    passes = layers.passes + (jacobian.shape[0] if slow else 0)
    return Gram(total.whole(index), tuple(forms), _listed(layers.unread | why), passes)


def _checked(jacobian: Jacobian, weights: Sequence[float] | None, memory: float) -> list[float]:
    """The weights, as numbers."""
    if not isinstance(jacobian, Jacobian):
        raise TypeError(f"jacobian must be a Jacobian, got {type(jacobian).__name__}.")
    if jacobian.dtype.is_complex:
        raise TypeError(f"jacobian must be real, got {jacobian.dtype}; use torch.view_as_real.")
    if not memory > 0:
        raise ValueError(f"memory must be positive, in bytes, got {memory}.")
    count = len(jacobian.parameters)
    factor = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(factor) != count:
        raise ValueError(f"weights must hold one number for each of {count} parameters, got {len(factor)}.")
    for index, weight in enumerate(factor):
        if not 0 <= weight < math.inf:
            raise ValueError(f"weights[{index}] must be non-negative and finite, got {weight}.")
    return factor


def _empty(jacobian: Jacobian, memory: float) -> Total:
    """A sum of no rows, with what is left of the memory."""
    dtype = torch.float32
    for each in (jacobian.dtype, *[z.dtype for z in jacobian.outputs]):
        dtype = torch.promote_types(dtype, each)
    m = jacobian.shape[0]
    matrices = 3 * m * m * dtype.itemsize
    if matrices > memory:
        raise TooLargeError(
            f"memory must be at least {matrices:.2e} bytes for a matrix of {m} x {m}, got {memory:.2e}."
        )
    return Total(torch.zeros(m, m, dtype=dtype, device=jacobian.device), memory - matrices)


def _listed(why: dict[str, list[int]]) -> str:
    return "; ".join(f"{reason} (parameters {', '.join(map(str, why[reason]))})" for reason in why)


def _add_passes(
    jacobian: Jacobian, indices: Sequence[int], factor: Sequence[float], total: Total, index: Tensor
) -> None:
    """The rows of some parameters by backward passes, for as many together as fit."""
    place = index.argsort()
    m, rest = jacobian.shape[0], list(indices)
    while rest:
        # Gathered from blocks, and multiplied in another dtype.
        sizes = [2 * m * jacobian.parameters[i].numel() for i in rest]
        total.require(sizes[0], f"the rows of parameters[{rest[0]}]")
        count = max(k for k in range(1, len(rest) + 1) if k == 1 or total.fits(sum(sizes[:k])))
        some, rest = rest[:count], rest[count:]
        block = jacobian.restrict(some)
        like_rows = jacobian.outputs[0].new_empty(m, dtype=jacobian.dtype)
        columns = [block.T @ basis for _, basis in identity_blocks(like_rows, WIDTH)]
        rows = torch.cat(columns, dim=1).T[place].to(total.matrix.dtype)
        for i, part in zip(some, rows.split([jacobian.parameters[i].numel() for i in some], 1), strict=True):
            total.add_rows(part, factor[i])
