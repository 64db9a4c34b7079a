"""A step without a closure: what the user computed since the last step is computed again."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from optim.closure import gradients
from optim.closure.accumulation import Accumulation
from optim.closure.evaluate import Asked, ClosureEvaluator, Evaluation
from optim.closure.modes import Record
from optim.closure.nodes import Node, Passes, tensors_of
from optim.closure.returned import finite, root_of
from optim.closure.runs import Closure
from optim.closure.setting import evaluating
from optim.closure.tape import Tape
from secondorder.autodiff.guard import RandomState, WriteGuard, is_transformed

# Losses, and gradients, that differ by more than this, relative, are not the same; and gradients where parts
# are computed in half precision: with one kernel of attention and another they differ by 1e-2.
AGREEMENT, ROUGH = 1e-2, 0.1


class Replay:
    """Watches a module, by hooks, and can evaluate again what ``backward`` was called on.

    Args:
        model: Its outputs are watched.
        parameters: Gives the parameters that the optimizer moves.
    """

    def __init__(self, model: nn.Module, parameters: Callable[[], Sequence[Tensor]]) -> None:
        self.model = model
        devices = list(dict.fromkeys(parameter.device for parameter in parameters()))
        self.tape = Tape(devices, parameters)
        self._calls: list[tuple[RandomState, Any, Any]] = []
        # What the hook sees in calls that are made again: hooks after it are recorded on their own.
        self._outputs: list[Any] | None = None
        # The hooks must not keep the optimizer alive.
        handles = [
            model.register_forward_pre_hook(_Hook(self._before), prepend=True, with_kwargs=True),
            model.register_forward_hook(_Hook(self._after), with_kwargs=True, always_call=True),
        ]
        for handle in handles:
            weakref.finalize(self, handle.remove)

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Calls of the module inside are not recorded."""
        before, self.tape.is_suspended = self.tape.is_suspended, True
        try:
            yield
        finally:
            self.tape.is_suspended = before

    def _before(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not self.tape.is_suspended:
            self._calls.append((self.tape.random_state(), args, kwargs))

    def _after(self, model: nn.Module, _: Any, __: dict[str, Any], outputs: Any) -> None:
        if self._outputs is not None:
            self._outputs.append(outputs)
        if self.tape.is_suspended or not self._calls:
            return
        random, args, kwargs = self._calls.pop()
        results = tensors_of(outputs)
        if not torch.is_grad_enabled() or not results or any(map(is_transformed, results)):
            return
        leaves, spec = pytree.tree_flatten((args, kwargs))
        call = _Call(self, [(module, module.training) for module in model.modules()])
        kept = [self.tape.leaf(leaf) for leaf in leaves]
        node = Node(call, kept, spec, self.tape.setting(random), self.tape.epoch)
        node.is_call = True
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.tape.record(node, results, [*given, *model.parameters(), *model.buffers()])

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The module's outputs once more, as hooks that were registered later find them."""
        outputs: list[Any] = []
        self._outputs = outputs
        try:
            with self.suspended():
                self.model(*args, **kwargs)
        finally:
            self._outputs = None
        return outputs[-1]


class _Hook:
    """A method of an object that may be gone; a copy does nothing."""

    def __init__(self, method: Callable[..., None] | None = None) -> None:
        self._method = None if method is None else weakref.WeakMethod(method)

    __name__ = "secondorder_hook"  # torch.jit.script asks for one

    # Compiled code calls it as it is.
    @torch._disable_dynamo
    def __call__(self, *args: Any) -> None:
        method = None if self._method is None else self._method()
        if method is not None:
            method(*args)

    def __reduce__(self) -> Any:
        return (_Hook, ())


class _Call:
    """Calls the module again, its parts in training or evaluation as they were.

    Buffers that a module gives another tensor are afterwards those of before.
    """

    def __init__(self, replay: Replay, training: list[tuple[nn.Module, bool]]) -> None:
        self._replay, self._training = weakref.ref(replay), training

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        replay = self._replay()
        assert replay is not None
        present = [(module, module.training, dict(module._buffers)) for module, _ in self._training]
        try:
            for module, training in self._training:
                module.training = training
            return replay.call(*args, **kwargs)
        finally:
            for module, training, buffers in present:
                module.training = training
                module._buffers.update(buffers)


class ReplayEvaluator(ClosureEvaluator):
    """Runs again what a tape has, in place of a closure.

    Args:
        passes: Those of the tape, with at least one root.
        closure: What ``step`` was given. Where it returns None without calling ``backward``, as Lightning's
            does in manual optimization, they are done again; else the closure is what counts.
        parameters: The parameters that the optimizer moves.
        sign: -1 where the loss is to be maximised.
        accumulation: Counts the backward passes that ``.grad`` holds before the closure runs.
    """

    def __init__(
        self,
        passes: Passes,
        closure: Closure | None,
        parameters: Sequence[Tensor],
        sign: int,
        accumulation: Accumulation,
    ) -> None:
        super().__init__(closure or passes.run, parameters, sign, accumulation)
        self._passes, self._is_given = passes, closure is not None

    def record(self) -> Evaluation:
        """Run, leaving ``.grad`` as it is: the user has filled it.

        Raises:
            RuntimeError: the loss is not finite, or has no path to the parameters.
        """
        with torch.enable_grad(), evaluating():
            if self._is_given:
                returned, mode = self._runs.for_real()
                if returned is not None or mode.roots:
                    return self._evaluated(returned, mode)
                self._runs.closure = self._passes.run
            return self._replayed()

    def _replayed(self) -> Evaluation:
        """Of the passes, done again."""
        gradient, gap = gradients.flat(self._parameters), self._passes.changed()
        with gradients.put_aside(self._parameters), WriteGuard() as guard:
            mode = Record(self._parameters, guard, self._runs.random)
            # Each call has its own random numbers.
            with self._runs.random.replayed(), mode:
                loss = self._passes.run()
            value, root = finite(loss), root_of(loss)
            self._note([root], mode)
            gradients.fill(self._parameters, loss)
            tolerance = ROUGH if self._is_rough() else AGREEMENT
            partial, scale = _compare(gradient, gradients.flat(self._parameters), tolerance)
        before = self._passes.value()
        if abs(value - before) > AGREEMENT * max(abs(value), abs(before)):
            gap = gap or f"the loss was {before:.6g} and is {value:.6g} when it is computed again"
        asked = Asked(loss, value, [root], (), gap or partial, scale)
        return self._evaluation(asked, mode, gradient)

    def repeated(self, objective: Tensor) -> float | None:
        """As of a closure; what is run again instead of one was compared with the first run already."""
        return None if self._runs.closure == self._passes.run else super().repeated(objective)

    def _is_rough(self) -> bool:
        return self._parameters[0].dtype.itemsize < 4 or self._passes.is_rough()


def _compare(gradient: Tensor, again: Tensor, tolerance: float) -> tuple[str, float]:
    """Why the gradient in ``.grad`` is not that of the replayed loss, if so, and how many times it is.

    Clipped to a norm, it is a part of it: what is modelled is then still the loss.
    """
    square = float(again.dot(again))
    if square == 0 and not bool(gradient.any()):
        return "", 1.0
    factor = float(gradient.dot(again)) / square if square > 0 else 0.0
    is_parallel = float((gradient - factor * again).norm()) <= tolerance * float(gradient.norm())
    if not is_parallel or factor <= 0:
        return "what .grad holds is not the gradient of the loss that was computed with model=", 1.0
    if factor > 1 + tolerance:
        times = f"{factor:.3g} times the gradient"
        return f"what .grad holds is {times} of the loss that was computed with model=", factor
    return "", 1.0
