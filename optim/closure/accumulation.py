"""How many backward passes ``.grad`` holds."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


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
