"""Numbers of a device on the host, which waits for them: all reads of an optimizer's step, counted."""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class _Count(threading.local):
    reads = 0


_count = _Count()


def reads() -> int:
    """How often the host has waited so far, in this thread; never for the CPU."""
    return _count.reads


def waits(*tensors: Tensor) -> None:
    """Say that what comes next waits for these, inside of torch."""
    _count.reads += any(tensor.device.type != "cpu" for tensor in tensors)


def read(*numbers: Tensor) -> list[float]:
    """Tensors of one number each, as numbers of the host: one wait for all."""
    waits(*numbers)
    if len(numbers) == 1:
        return [float(numbers[0].detach())]
    return torch.stack([number.detach() for number in numbers]).tolist()


def is_true(condition: Tensor) -> bool:
    """The same of one condition."""
    waits(condition)
    return bool(condition)


def fetched(tensor: Tensor) -> Tensor:
    """A tensor on the host: one wait; the tensor itself where it is there already."""
    waits(tensor)
    return tensor.cpu()


def listed(vector: Tensor) -> list[float]:
    """The numbers of a vector: one wait."""
    waits(vector)
    numbers: list[float] = vector.tolist()
    return numbers
