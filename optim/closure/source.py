"""Where the loss of a step comes from: its closure, or what the model was seen to do since the last one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from .accumulation import Accumulation
from .evaluate import ClosureEvaluator
from .replay import ReplayEvaluator
from .watch import Watcher


class Source:
    """What an optimizer knows between two steps of how its ``.grad`` came about.

    Args:
        name: Of the optimizer, for errors.
        model: Watched from now on; None where each step is given a closure.
        parameters: Gives the parameters that the optimizer moves.
    """

    def __init__(
        self, name: str, model: nn.Module | None, parameters: Callable[[], Sequence[Tensor]]
    ) -> None:
        self._name = name
        self._accumulation = Accumulation()
        self.watcher = None if model is None else Watcher(model, parameters)

    def evaluator(
        self, closure: Callable[[], Any] | None, parameters: Sequence[Tensor], sign: int
    ) -> ClosureEvaluator:
        """What evaluates the loss of this step.

        Raises:
            TypeError: ``closure`` is no function, or None where no model is watched.
            RuntimeError: it is None, and no backward pass through the model was seen.
        """
        if closure is not None and not callable(closure):
            raise TypeError(
                f"closure must be a function that evaluates the model and returns the loss, got"
                f" {type(closure).__name__}; the closure of torch.optim.LBFGS works as it is."
            )
        if self.watcher is not None and self.has_seen():
            return ReplayEvaluator(self.watcher.tape.passes, closure, parameters, sign, self._accumulation)
        if closure is None:
            raise self._nothing_to_evaluate()
        return ClosureEvaluator(closure, parameters, sign, self._accumulation)

    def _nothing_to_evaluate(self) -> TypeError | RuntimeError:
        name = self._name
        if self.watcher is None:
            return TypeError(
                f"{name}.step needs a closure that evaluates the model and returns the loss, got None; the"
                f" closure of torch.optim.LBFGS works as it is. Without one, give {name} model=."
            )
        return RuntimeError(
            f"{name}.step was called without a closure, but no backward pass through the outputs of model="
            " was seen since the last step: the module itself must be called, with gradients on, and its"
            " outputs not pass a torch.autograd.Function (full backward hooks are), torch.func or torch.jit."
            " Otherwise give step a closure."
        )

    def has_seen(self) -> bool:
        """Whether there was a backward pass through the model since the last step."""
        return self.watcher is not None and bool(self.watcher.tape.passes.roots)

    def suspended(self) -> contextlib.AbstractContextManager[None]:
        """What the model does inside is not recorded."""
        return contextlib.nullcontext() if self.watcher is None else self.watcher.suspended()

    def mark(self, parameters: Sequence[Tensor]) -> None:
        """Writes to ``.grad`` up to now were no backward passes."""
        self._accumulation.mark(parameters)

    def close(self, parameters: Sequence[Tensor]) -> None:
        """A step is over."""
        self.mark(parameters)
        if self.watcher is not None:
            self.watcher.tape.forget()
