"""Where torch has no right derivative: again by other kernels or under ``decompose()``, else an error."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import TypeVar

from torch.utils.checkpoint import CheckpointError

from secondorder.autodiff.decompose import Rung, decompose, math_kernels
from secondorder.autodiff.graph import WrongDerivativeError
from secondorder.autodiff.guard import RandomState, undo_writes

T = TypeVar("T")

# What autograd says, in C++ and in derivatives.yaml's words, and forward mode; and of which derivative.
_MISSING = (
    (re.compile(r"derivative for '?(?:aten::)?(\w+).* is not implemented"), "second"),
    (re.compile(r"Trying to use forward AD with (?:aten::)?(\w+) that does not support it"), "forward"),
    (re.compile(r"(torch\.compile) with aot_autograd does not currently support double backward"), "second"),
    (re.compile(r"backward function was (compiled) with non-empty donated buffers"), "second"),
    # Batched forward mode through mse_loss and its like (torch 2.13).
    (re.compile(r"(ZeroTensors) are immutable"), "forward"),
)
# Operations that have a derivative by other kernels, or in eager mode.
_KERNELS = re.compile(
    r"torch\.compile|_scaled_dot_product|_cudnn_rnn|_transformer_encoder|_native_multi_head"
)

_REMEDIES = {
    "second": "there is no decomposition of it here; replace it by differentiable operations, or call hvp"
    " with strategy='finite-differences'",
    "forward": "there is no decomposition of it here; use reverse mode",
}


class MissingDerivativeError(RuntimeError):
    """An operation has no derivative of the kind that was asked for.

    Args:
        operation: Its name.
        remedy: What to do.
        kind: "second" or "forward".
    """

    def __init__(self, operation: str, remedy: str, kind: str = "second") -> None:
        super().__init__(f"{operation} has no {kind} derivative in torch, and {remedy}.")
        self.operation, self.kind = operation, kind


def climb(compute: Callable[[], T]) -> T:
    """``compute()``; where an operation has no right derivative, once more by other means.

    First by the math kernel, where an operation has several kernels; else, and where that does not help,
    under ``decompose()``. A second run sees the random state of the first, and leaves buffers as the first
    did: what it had not written when a missing derivative stopped it inside the function itself is not
    written later.

    Raises:
        MissingDerivativeError: there is no derivative even so; names the operation and the remedy.
        WrongDerivativeError: there is none that is right.
    """
    return Ladder().climb(compute)


class Ladder:
    """``climb`` for many computations with the same operations: remembers what they need."""

    def __init__(self) -> None:
        self._rung: Rung = contextlib.nullcontext

    def climb(self, compute: Callable[[], T]) -> T:
        """``compute()``, on the rung that the last one needed or above it."""
        if self._rung is decompose:
            return _explained_on(decompose, compute)
        random = RandomState()
        random.save()
        try:
            with self._rung():
                return compute()
        except RuntimeError as error:
            self._rung = _next_rung(error)
        random.restore()
        with undo_writes():
            if self._rung is math_kernels:
                try:
                    with math_kernels():
                        return compute()
                except RuntimeError as error:
                    self._rung = _next_rung(error, above=math_kernels)
                random.restore()
            return _explained_on(decompose, compute)


def _next_rung(error: RuntimeError, above: Rung = contextlib.nullcontext) -> Rung:
    """Where to go on after an error; raises it where there is no such place."""
    name = missing(error)
    is_hopeless = isinstance(error, WrongDerivativeError) and not error.is_decomposed
    if name is None or is_hopeless:
        raise error
    return math_kernels if above is not math_kernels and _KERNELS.match(name) else decompose


def _explained_on(rung: Rung, compute: Callable[[], T]) -> T:
    with explained(), rung():
        return compute()


@contextlib.contextmanager
def explained(remedy: str | None = None) -> Iterator[None]:
    """Say of a missing derivative which operation it is and what to do."""
    try:
        yield
    except CheckpointError as error:
        raise RuntimeError(
            "a block under torch.utils.checkpoint was computed again by other operations than before: one in"
            " it has no right derivative of this order in torch (weight_norm, hardsigmoid, a normalisation"
            " layer with create_graph); keep it out of the checkpoint, or do without that."
        ) from error
    except RuntimeError as error:
        name, kind = _missing(error)
        is_explained = isinstance(error, MissingDerivativeError) and remedy is not None
        if name is None or is_explained or isinstance(error, WrongDerivativeError):
            raise
        raise MissingDerivativeError(name, remedy or _REMEDIES[kind], kind) from error


def missing(error: RuntimeError) -> str | None:
    """The operation that an error says has no (right) derivative, or None for another error."""
    return _missing(error)[0]


def _missing(error: RuntimeError) -> tuple[str | None, str]:
    if isinstance(error, MissingDerivativeError):
        return error.operation, error.kind
    if isinstance(error, WrongDerivativeError):
        return str(error), "second"
    for pattern, kind in _MISSING:
        found = pattern.search(str(error))
        if found is not None:
            name = found.group(1)
            return "torch.compile" if name == "compiled" else name, kind
    return None, "second"
