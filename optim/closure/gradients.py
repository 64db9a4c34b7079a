"""``.grad`` of the parameters: filled, read as one vector, put aside."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from secondorder.autodiff.guard import surely
from secondorder.vectors.flat import flatten
from secondorder.vectors.host import read

from .returned import finite

# Tensors, each with what its ``.grad`` held.
Grads = Sequence[tuple[Tensor, Tensor | None]]


def fill(parameters: Sequence[Tensor], root: Tensor) -> None:
    """Put the gradient of ``root`` there, its graph kept."""
    grads = torch.autograd.grad(root, parameters, retain_graph=True, allow_unused=True)
    write(list(zip(parameters, grads, strict=True)))


@torch.no_grad()
def flat(parameters: Sequence[Tensor]) -> Tensor:
    """What is there, shape (n,), in single precision at least.

    Raises:
        RuntimeError: there is nothing, or a sparse gradient.
    """
    grads = [parameter.grad for parameter in parameters]
    if all(grad is None for grad in grads):
        raise RuntimeError(
            "the loss must depend on at least one parameter of the optimizer, but no parameter received a"
            " gradient; pass the parameters of the model that the closure evaluates."
        )
    if any(grad is not None and grad.layout is not torch.strided for grad in grads):
        raise RuntimeError("gradients must be dense, got a sparse one; use sparse=False in the embedding.")
    pairs = zip(parameters, grads, strict=True)
    gradient = flatten([torch.zeros_like(p) if grad is None else grad for p, grad in pairs])
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32))


def measured(loss: Tensor | float, gradient: Tensor) -> tuple[float, float]:
    """The loss, and the Euclidean norm of the gradient, not zero where an entry is not: one host read.

    Raises:
        RuntimeError: one of them is not finite.
    """
    orders = [torch.linalg.vector_norm(gradient, order) for order in (math.inf, 2)]
    # A loss on another device, or in a higher precision, is read as it is.
    is_like = isinstance(loss, Tensor) and loss.device == gradient.device and loss.dtype == gradient.dtype
    first = [loss.reshape(())] if isinstance(loss, Tensor) and is_like else []
    largest, size, *value = read(*orders, *first)
    return finite(value[0] if value else loss), _norm(gradient, largest, size)


def _norm(gradient: Tensor, largest: float, size: float) -> float:
    if not math.isfinite(largest):
        raise RuntimeError(
            "the gradient at the current parameters must be finite, got NaN or infinity;"
            " look for the operation with torch.autograd.set_detect_anomaly(True)."
        )
    # The squares may have left the range.
    numbers = torch.finfo(gradient.dtype)
    is_safe = largest * numbers.eps > math.sqrt(numbers.tiny) and math.isfinite(size)
    if largest == 0 or is_safe:
        return float(size)
    return largest * read(torch.linalg.vector_norm(gradient / largest))[0]


def write(grads: Grads) -> None:
    """Put each back."""
    for tensor, grad in grads:
        tensor.grad = grad


@contextlib.contextmanager
def put_aside(tensors: Sequence[Tensor]) -> Iterator[Grads]:
    """Whatever happens to ``.grad`` inside does not reach the user's, which is what this gives."""
    grads = [(tensor, tensor.grad) for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.grad = None
        yield grads
    finally:
        surely(lambda: write(grads))
