"""Watch a module by hooks, so that its calls can be made again."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secondorder.autodiff.guard import RandomState, is_transformed

from .calls import as_called
from .nodes import Node, tensors_of
from .tape import Tape


class Watcher:
    """Watches a module, by hooks: what it makes is recorded, until ``backward`` is called on it.

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
    """Calls the module again, its parts in training or evaluation as they were."""

    def __init__(self, watcher: Watcher, training: list[tuple[nn.Module, bool]]) -> None:
        self._watcher, self._training = weakref.ref(watcher), training

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        watcher = self._watcher()
        assert watcher is not None
        with as_called(self._training):
            return watcher.call(*args, **kwargs)
