"""What a closure returned: the loss and the outputs, checked."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from secondorder.vectors.host import read


def split(returned: Any) -> tuple[Any, tuple[Tensor, ...]]:
    """The loss and the explicit outputs of what the closure returned."""
    loss: Any = returned
    outputs: tuple[Any, ...] = ()
    if isinstance(returned, tuple):
        if len(returned) != 2:
            raise TypeError(
                f"closure must return the loss or (loss, outputs), got a tuple of {len(returned)}."
            )
        loss = returned[0]
        outputs = returned[1] if isinstance(returned[1], tuple) else (returned[1],)
    if not isinstance(loss, Tensor | float | int):
        raise TypeError(
            f"closure must return the loss or (loss, outputs), got {type(loss).__name__}; end it with 'return"
            " loss'. Where a framework makes the closure and backward is called outside of it (manual"
            " optimization of Lightning), give the optimizer model=."
        )
    if isinstance(loss, Tensor) and loss.numel() != 1:
        is_swapped = any(isinstance(output, Tensor) and output.numel() == 1 for output in outputs)
        remedy = "return (loss, outputs), in this order" if is_swapped else "reduce it with mean() or sum()"
        raise RuntimeError(
            f"the loss that closure returns must be a scalar, got shape {tuple(loss.shape)}; {remedy}."
        )
    for output in outputs:
        if not isinstance(output, Tensor):
            raise TypeError(f"outputs must be a tensor or a tuple of tensors, got {type(output).__name__}.")
    return loss, outputs


def number(loss: Tensor | float, beside: Tensor | None = None) -> float:
    """The loss as a number, and what is ``beside`` it added: one host read."""
    if not isinstance(loss, Tensor):
        return float(loss) + (0.0 if beside is None else read(beside)[0])
    if beside is None:
        return read(loss)[0]
    return sum(read(loss.reshape(()), beside.to(loss.device)))


def finite(loss: Tensor | float) -> float:
    """The loss as a number that is not NaN or infinity."""
    value = number(loss)
    if not math.isfinite(value):
        raise RuntimeError(
            f"the loss at the current parameters must be finite, got {value}; the step was not taken and"
            " parameters and gradients are unchanged. Check the data and the initialisation."
        )
    return value


def root_of(loss: Any) -> tuple[Tensor, Tensor]:
    """The loss as a tensor that carries a graph, with the weight one."""
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        raise RuntimeError(
            "closure must call backward or return a loss that carries a graph, got a detached one;"
            " remove detach(), item() or no_grad() from it."
        )
    return loss, torch.ones_like(loss)
