"""What is different while a closure runs: the two modes.

Both sit at ``__torch_function__``: every call that the closure makes of torch passes here, also
``backward`` and ``torch.set_grad_enabled``.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from optim.closure.losses import LossLog
from secondorder.decompose import WITHOUT_SECOND_DERIVATIVE
from secondorder.guard import WriteGuard, is_transformed

_BACKWARD = {func: inspect.signature(func) for func in (Tensor.backward, torch.autograd.backward)}


class Record(TorchFunctionMode):
    """Keeps the graphs of backward passes, and notes their roots and the known losses.

    Operations without a right second derivative in torch (weight_norm, cdist) are decomposed.

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
        if func is torch.autograd.grad or any(is_transformed(arg) for arg in args):
            self.differentiates = True
        run = WITHOUT_SECOND_DERIVATIVE.get(func, func)
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
        return self._guard.call(WITHOUT_SECOND_DERIVATIVE.get(func, func), args, kwargs or {})

    def _fill_grads(self) -> None:
        """The recorded gradient, for a closure that reads or clips it; a copy that it may write to."""
        for parameter, gradient in self._gradients.items():
            if gradient is not None:
                parameter.grad = self._guard.adopt(gradient.clone())
