"""Where torch has no right second derivative: once more under ``decompose()``, else a clear error."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from secondorder.decompose import decompose
from secondorder.functional import _graph

T = TypeVar("T")

# What autograd says, in C++ and in derivatives.yaml's words.
_MISSING = re.compile(r"derivative for '?(?:aten::)?(\w+).* is not implemented")
# Nodes whose second derivative is wrong in silence (torch 2.13, against finite differences).
_WRONG = {
    "WeightNormInterfaceBackward0": "weight_norm",
    "SparseCooTensorWithDimsAndTensorsBackward0": "sparse_coo_tensor",
}


class WrongDerivativeError(RuntimeError):
    """The graph holds an operation whose second derivative torch gets wrong in silence."""


def refuse_wrong(value: Tensor) -> None:
    """Raise WrongDerivativeError where the graph of ``value`` holds a node that is known to be wrong."""
    for node in _graph.nodes((value,)):
        name = _WRONG.get(node.name())
        if name is not None:
            raise WrongDerivativeError(
                f"the second derivative of {name} is wrong in torch; compute the loss inside"
                " secondorder.decompose.decompose()."
            )


def climb(compute: Callable[[], T]) -> T:
    """``compute()``; where an operation has no right derivative, once more under ``decompose()``.

    The random state of the second run is that of the first.

    Raises:
        RuntimeError: there is no derivative even so; names the operation and the remedy.
    """
    cpu = torch.get_rng_state()
    accelerators = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        return compute()
    except RuntimeError as error:
        if missing(error) is None:
            raise
    torch.set_rng_state(cpu)
    if accelerators:
        torch.cuda.set_rng_state_all(accelerators)
    try:
        with decompose():
            return compute()
    except RuntimeError as error:
        name = missing(error)
        if name is None:
            raise
        raise RuntimeError(
            f"{name} has no second derivative in torch, and no decomposition here; replace it by"
            " differentiable operations, or difference the gradient."
        ) from error


def missing(error: RuntimeError) -> str | None:
    """The operation that an error says has no (right) derivative, or None for another error."""
    if isinstance(error, WrongDerivativeError):
        return str(error)
    found = _MISSING.search(str(error))
    return None if found is None else found.group(1)
