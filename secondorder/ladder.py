"""Where torch has no right second derivative: once more under ``decompose()``, else a clear error."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import TypeVar

from secondorder.decompose import decompose
from secondorder.graph import WrongDerivativeError
from secondorder.guard import RandomState, undo_writes

T = TypeVar("T")

# What autograd says, in C++ and in derivatives.yaml's words, and forward mode.
_MISSING = (
    re.compile(r"derivative for '?(?:aten::)?(\w+).* is not implemented"),
    re.compile(r"Trying to use forward AD with (\w+) that does not support it"),
    # Batched forward mode through mse_loss and its like (torch 2.13).
    re.compile(r"(ZeroTensors) are immutable"),
)


class MissingDerivativeError(RuntimeError):
    """An operation has no derivative of the order that was asked for.

    Args:
        operation: Its name.
        remedy: What to do.
    """

    def __init__(self, operation: str, remedy: str) -> None:
        super().__init__(f"{operation} has no second derivative in torch, and {remedy}.")
        self.operation = operation


def climb(compute: Callable[[], T]) -> T:
    """``compute()``; where an operation has no right derivative, once more under ``decompose()``.

    The second run sees the random state of the first, and leaves buffers as the first did: what it had not
    written when a missing derivative stopped it inside the function itself is not written later.

    Raises:
        MissingDerivativeError: there is no derivative even so; names the operation and the remedy.
    """
    random = RandomState()
    random.save()
    try:
        return compute()
    except RuntimeError as error:
        if missing(error) is None:
            raise
    random.restore()
    remedy = (
        "there is no decomposition of it here; replace it by differentiable operations, or call hvp with"
        " strategy='finite-differences'"
    )
    with explained(remedy), undo_writes(), decompose():
        return compute()


class Ladder:
    """``climb`` for many computations with the same operations: remembers that they need ``decompose()``."""

    def __init__(self) -> None:
        self._decomposes = False

    def climb(self, compute: Callable[[], T]) -> T:
        """``compute()``, under ``decompose()`` once one needed it."""
        if self._decomposes:
            with decompose():
                return compute()
        runs = 0

        def counted() -> T:
            nonlocal runs
            runs += 1
            return compute()

        result = climb(counted)
        self._decomposes = runs > 1
        return result


@contextlib.contextmanager
def explained(remedy: str) -> Iterator[None]:
    """Say of a missing derivative which operation it is and what to do."""
    try:
        yield
    except RuntimeError as error:
        name = missing(error)
        if name is None or isinstance(error, MissingDerivativeError | WrongDerivativeError):
            raise
        raise MissingDerivativeError(name, remedy) from error


def missing(error: RuntimeError) -> str | None:
    """The operation that an error says has no (right) derivative, or None for another error."""
    if isinstance(error, MissingDerivativeError | WrongDerivativeError):
        return str(error)
    found = next(filter(None, (pattern.search(str(error)) for pattern in _MISSING)), None)
    return None if found is None else found.group(1)
