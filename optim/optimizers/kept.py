"""What one step leaves to the next: tensors in ``state[p]``, numbers in the groups."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optim.methods.grown import Grown, Ritz
from secondorder.vectors.flat import flatten, flatten_rows, is_finite, unflatten, unflatten_rows

State = MutableMapping[Tensor, dict[str, Any]]

# Of state: Ritz vectors of the last space, shape (k, *p.shape); the last solution of CG; the last step, where
# batches differ.
VECTORS, SOLUTION, STEP = "ritz_vectors", "cg_solution", "last_step"
# Of groups: the Ritz values, and the curvature that is assumed across them, as the last.
VALUES = "ritz_values"


def ritz_of(state: State, group: Mapping[str, Any], parameters: Sequence[Tensor]) -> Ritz | None:
    """The last space; None where there is none, or parameters came or went since."""
    *values, rest = group[VALUES] or (0.0,)
    parts = [state[p][VECTORS] for p in parameters if VECTORS in state.get(p, {})]
    if not values or len(parts) < len(parameters) or any(len(part) != len(values) for part in parts):
        return None
    return Ritz(flatten_rows([_single(part) for part in parts]), values, rest)


def vector_of(state: State, parameters: Sequence[Tensor], name: str) -> Tensor | None:
    """A vector that was kept, zero for parameters that came since; None where there is none."""
    # Not state[p], which would make an entry.
    parts = [state.get(p, {}).get(name) for p in parameters]
    if all(part is None for part in parts):
        return None
    pairs = zip(parts, parameters, strict=True)
    return flatten([_single(torch.zeros_like(p) if part is None else part) for part, p in pairs])


def keep_vector(state: State, parameters: Sequence[Tensor], name: str, x: Tensor) -> None:
    """Keep a vector, zero where it is not finite."""
    if not is_finite(x):
        x = torch.zeros_like(x)
    for parameter, part in zip(parameters, unflatten(x, parameters), strict=True):
        state[parameter][name] = part.clone()


def keep_space(state: State, parameters: Sequence[Tensor], space: Grown) -> dict[str, Any]:
    """Keep the space for the next step: tensors in ``state``; returned, what the groups keep."""
    ritz = space.ritz()
    for parameter, part in zip(parameters, unflatten_rows(ritz.vectors, parameters), strict=True):
        state[parameter][VECTORS] = part.clone()
    return {VALUES: (*ritz.values, ritz.rest)}


def make(state: State, parameters: Sequence[Tensor], name: str) -> None:
    """Fill ``state`` as a first step does: distributed checkpoints take one on zero gradients for it."""
    if not any(p.grad is not None for p in parameters) or any(state.get(p) for p in parameters):
        return
    for parameter in parameters:
        shape = (0, *parameter.shape) if name == VECTORS else parameter.shape
        state[parameter][name] = _single(parameter.detach()).new_zeros(shape)


def _single(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
