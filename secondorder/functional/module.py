"""A module as a function of its parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def module_function(
    model: nn.Module, loss_fn: Callable[..., Tensor], *batch: Any
) -> tuple[Callable[[dict[str, Tensor]], Tensor], dict[str, Tensor]]:
    """The loss of a model on a batch, as a function of a dict of its parameters.

    Args:
        model: Called with all of ``batch`` but the last.
        loss_fn: Takes the outputs of ``model`` and the last of ``batch``, returns the loss.
        batch: Inputs, then targets: at least two.

    Returns:
        ``(function, parameters)``: ``function(parameters)`` is the loss; parameters that do not require
        gradients are constants. Buffers are cloned at every call: running statistics do not move.

    Raises:
        ValueError: ``batch`` holds fewer than two; no parameter requires gradients.

    Cost: that of the model; the buffers are copied.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> function, parameters = module_function(
        ...     model, torch.nn.functional.mse_loss, torch.ones(3, 2), torch.zeros(3, 1)
        ... )
        >>> sorted(parameters), function(parameters).shape
        (['bias', 'weight'], torch.Size([]))
    """
    if len(batch) < 2:
        raise ValueError(f"batch must hold inputs and targets, got {len(batch)} of them.")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("model must have a parameter that requires gradients, got none.")

    def function(parameters: dict[str, Tensor]) -> Tensor:
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        outputs = torch.func.functional_call(model, {**parameters, **buffers}, batch[:-1])
        return loss_fn(outputs, batch[-1])

    return function, parameters
