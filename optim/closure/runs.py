"""Run a closure: for real, and again as it ran then."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from secondorder.autodiff.guard import RandomState, WriteGuard, surely

from .accumulation import Accumulation
from .calls import Calls
from .gradients import Grads, put_aside, write
from .modes import Record, Value
from .returned import split
from .setting import evaluating

Closure = Callable[[], Any]


class Runs:
    """Runs of one closure in one step: the first is recorded, the others leave no trace.

    Args:
        closure: Returns the loss, or ``(loss, outputs)``; may call ``backward`` itself.
        parameters: The parameters that the optimizer moves.
        accumulation: Counts the backward passes that ``.grad`` holds before the closure runs.

    Attributes:
        closure: As given.
        random: The random state before the recorded run.
        first_node: Number of the first node that the recorded run could make.
    """

    def __init__(self, closure: Closure, parameters: Sequence[Tensor], accumulation: Accumulation) -> None:
        self.closure = closure
        self.random = RandomState(parameter.device for parameter in parameters)
        self.first_node = 0
        self._parameters, self._accumulation = parameters, accumulation
        # Of the recorded run, whose writes stay unless the step fails.
        self._guard = WriteGuard()

    @contextlib.contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """After an exception ``.grad``, buffers, values included, and the random state are what they were."""
        self.random.save()
        grads = [(parameter, parameter.grad) for parameter in self._parameters]
        copies = [(grad.detach(), grad.detach().clone()) for _, grad in grads if grad is not None]
        for grad, _ in copies:
            self._guard.adopt(grad)

        def restore() -> None:
            self.random.restore()
            self._guard.undo()
            write(grads)
            for grad, copy in copies:
                grad.copy_(copy)

        try:
            yield
        except BaseException:
            surely(restore)
            raise

    def for_real(self, calls: Calls | None) -> tuple[Any, Record]:
        """What the closure returned, and what was recorded; ``calls`` notes the modules that it calls."""
        self.random.save()
        mode = Record(self._parameters, self._guard, self.random, self._accumulation)
        self.first_node = torch._C._autograd._get_sequence_nr()
        with mode, calls or contextlib.nullcontext():
            returned = self.closure()
        return returned, mode

    @contextlib.contextmanager
    def without_trace(self, leaves: Sequence[Tensor]) -> Iterator[tuple[WriteGuard, Grads]]:
        """Around another run: what undoes its writes, and what ``.grad`` of the leaves held.

        It finds buffers as the recorded run found them: spectral_norm computes with what it writes to.
        """
        rewound = self._guard.rewound(self._parameters)
        with rewound, put_aside(leaves) as grads, WriteGuard() as guard:
            yield guard, grads

    def again(self, mode: Record | Value, gradients: bool) -> Any:
        """The loss of another run with the random numbers of the recorded one."""
        with self.random.replayed(), torch.set_grad_enabled(gradients), evaluating():
            try:
                with mode:
                    returned = self.closure()
            except StopIteration as error:
                raise RuntimeError(
                    "closure must be the same function in all its calls of a step, but an iterator that it"
                    " draws from is exhausted; draw the batch outside of the closure."
                ) from error
            return split(returned)[0]
