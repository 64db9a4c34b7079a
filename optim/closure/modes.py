"""What is different while a closure runs: the two modes, and the guard against writes.

All three sit at ``__torch_function__``: every call that the closure makes of torch passes here, also
``backward`` and ``torch.set_grad_enabled``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from optim.closure.losses import LossLog
from secondorder.decompose import WRONG_IN_SILENCE

_BACKWARD = {func: inspect.signature(func) for func in (Tensor.backward, torch.autograd.backward)}
_IN_PLACE_OPERATORS = {
    f"__i{name}__"
    for name in (
        "add",
        "sub",
        "mul",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "and",
        "or",
        "xor",
        "lshift",
        "rshift",
    )
} | {"__setitem__"}
# They end in an underscore but write no number.
_NO_WRITE = {"requires_grad_", "retain_grad_", "detach_", "rename_"}
# Running statistics are their second and third argument.
_NORMS = (F.batch_norm, F.instance_norm)


class Record(TorchFunctionMode):
    """Keeps the graphs of backward passes, and notes their roots and the known losses.

    Operations whose second derivative torch gets wrong in silence (weight_norm) are decomposed.

    Attributes:
        roots: Tensors on which ``backward`` was called.
        root_gradients: The gradient that each was given, ones by default.
        differentiates: Whether the closure called ``torch.autograd.grad`` itself.
        log: The known losses.
    """

    def __init__(self, parameters: Sequence[Tensor], guard: WriteGuard | None = None) -> None:
        super().__init__()
        self.roots: list[Tensor] = []
        self.root_gradients: list[Tensor] = []
        self.differentiates = False
        self.log = LossLog()
        self._parameters = parameters
        self._guard = guard

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _BACKWARD:
            return self._backward(func, *args, **kwargs)
        if func is torch.autograd.grad or any(_is_transformed(arg) for arg in args):
            self.differentiates = True
        run = WRONG_IN_SILENCE.get(func, func)
        result = run(*args, **kwargs) if self._guard is None else self._guard.call(run, args, kwargs)
        return self.log.see(func, args, kwargs, result)

    def _backward(self, func: Any, *args: Any, **kwargs: Any) -> None:
        if self.roots and not any(p.grad is not None and bool(p.grad.any()) for p in self._parameters):
            # The closure threw away what earlier calls had accumulated.
            self.roots, self.root_gradients = [], []
        call = _BACKWARD[func].bind(*args, **kwargs)
        call.arguments["retain_graph"] = True
        func(*call.args, **call.kwargs)
        given = call.arguments.get("gradient", call.arguments.get("grad_tensors"))
        tensors = args[0]
        roots = (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)
        weights = given if isinstance(given, tuple | list) else (given,) * len(roots)
        self.roots += roots
        self.root_gradients += [
            torch.ones_like(root) if weight is None else weight.detach()
            for root, weight in zip(roots, weights, strict=True)
        ]


class Value(TorchFunctionMode):
    """Swallows backward, and keeps gradients off where the closure turns them on.

    Args:
        guard: Undoes writes.
        gradients: For each parameter what ``.grad`` holds after a backward that was swallowed.
        differentiates: The closure differentiates itself: gradients stay as it wants them.
    """

    def __init__(
        self, guard: WriteGuard, gradients: dict[Tensor, Tensor | None], differentiates: bool
    ) -> None:
        super().__init__()
        self._guard = guard
        self._gradients = gradients
        self._differentiates = differentiates

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _BACKWARD:
            return self._fill_grads()
        if func is torch._C._set_grad_enabled and not self._differentiates:
            return None
        return self._guard.call(func, args, kwargs or {})

    def _fill_grads(self) -> None:
        """The recorded gradient, for a closure that reads or clips it; a copy that it may write to."""
        for parameter, gradient in self._gradients.items():
            if gradient is not None:
                parameter.grad = self._guard.adopt(gradient.clone())


class WriteGuard:
    """Undoes writes to tensors that existed before: running statistics, counters, any buffer.

    Before the first write to a storage that was not made inside, a copy of the tensor is taken; on exit it
    is written back, to ``.data``, so that version counters of graphs stay as they are.
    """

    def __init__(self) -> None:
        self._made: set[int] = set()
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}

    def __enter__(self) -> WriteGuard:
        return self

    def __exit__(self, *_: object) -> None:
        # Last first: a view may have been copied after a write to its base.
        for tensor, copy in reversed(self._copies.values()):
            tensor.data.copy_(copy)

    def adopt(self, tensor: Tensor) -> Tensor:
        """Treat a tensor as made inside: writes to it are not undone."""
        self._made.add(_storage(tensor))
        return tensor

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """``func(*args, **kwargs)``, with what it writes kept."""
        for tensor in _written(func, args, kwargs):
            if _storage(tensor) not in self._made:
                self._copies.setdefault(id(tensor), (tensor, tensor.detach().clone()))
        result = func(*args, **kwargs)
        # Views of what was there before are not made here.
        old = {_storage(tensor) for tensor in _tensors(args)}
        self._made.update(_storage(t) for t in _tensors((result,)) if _storage(t) not in old)
        return result


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors that a call writes to."""
    name = getattr(func, "__name__", "")
    if func in _NORMS:
        yield from _tensors((*args[1:3], kwargs.get("running_mean"), kwargs.get("running_var")))
    elif name in _IN_PLACE_OPERATORS or (name.endswith("_") and name not in _NO_WRITE and name[-2:] != "__"):
        yield from _tensors(args[:1])
    if "out" in kwargs:
        yield from _tensors((kwargs["out"],))


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors among ``values`` and in the lists and tuples among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (item for item in value if isinstance(item, Tensor))


def _is_transformed(value: Any) -> bool:
    """Whether this is a tensor inside a transform of ``torch.func``."""
    return isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value)


def _storage(tensor: Tensor) -> int:
    """Identity of the memory that a tensor lives in, where it has memory of its own."""
    if tensor.layout is not torch.strided or _is_transformed(tensor):
        return id(tensor)
    return tensor.untyped_storage()._cdata
