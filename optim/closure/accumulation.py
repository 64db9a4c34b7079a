"""How many backward passes ``.grad`` holds."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Marks = list[tuple[Tensor | None, int]]


def marks(parameters: Iterable[Tensor]) -> Marks:
    """Which ``.grad`` there is, and how often it was written to."""
    return [(p.grad, -1 if p.grad is None else p.grad._version) for p in parameters]


def were_written(parameters: Iterable[Tensor], before: Marks) -> bool:
    """Whether any ``.grad`` is another tensor, or was written to, since it was marked."""
    pairs = zip(before, marks(parameters), strict=True)
    return any(a is not b or v != w for (a, v), (b, w) in pairs)


def were_thrown_away(parameters: Iterable[Tensor], before: Marks) -> bool:
    """Whether ``.grad`` holds nothing, but not the zeros of the backward pass after which it was marked."""
    parameters = list(parameters)
    if len(before) == len(parameters) and not were_written(parameters, before):
        return False
    return not any(p.grad is not None and bool(p.grad.any()) for p in parameters)


class Accumulation:
    """Counts backward passes by the version counter of ``.grad``, which each of them raises by one.

    The first makes the tensor, at version 0. Other writes are counted too: the number is an upper bound.
    """

    def __init__(self) -> None:
        # Versions at the end of the last step.
        self._seen = WeakIdKeyDictionary()

    def passes(self, parameters: Iterable[Tensor]) -> int:
        """Since the last ``mark``, in the gradients as they are."""
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        return max((grad._version - self._seen.get(grad, -1) for grad in grads), default=0)

    def mark(self, parameters: Iterable[Tensor]) -> None:
        """What is there now does not count any more."""
        for parameter in parameters:
            if parameter.grad is not None:
                self._seen[parameter.grad] = parameter.grad._version
