"""What is different while a closure runs: the two modes.

Both sit at ``__torch_function__``: every call that the closure makes of torch passes here, also
``backward`` and ``torch.set_grad_enabled``.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from secondorder.autodiff.compat import dispatch_backward, in_checkpoint
from secondorder.autodiff.decompose import CUDNN, DETERMINANTS, WITHOUT_SECOND_DERIVATIVE
from secondorder.autodiff.graph import is_singular
from secondorder.autodiff.guard import RandomState, WriteGuard, is_transformed

from .accumulation import Accumulation, Marks, marks, were_thrown_away, were_written
from .gradients import Grads
from .losses import LossLog

dispatch_backward()
BACKWARD: dict[Callable[..., Any], inspect.Signature] = {
    func: inspect.signature(func) for func in (Tensor.backward, torch.autograd.backward)
}
_GRAD = inspect.signature(torch.autograd.grad)

Weighted = list[tuple[Tensor, Tensor]]


class Pass(NamedTuple):
    """A call of ``backward`` or of ``torch.autograd.grad``, its graph kept.

    Attributes:
        arguments: By name, with ``retain_graph=True``.
        roots: The tensors that are differentiated, each with the weight it was given, one by default.
        is_plain: Whether no weight was given.
    """

    arguments: dict[str, Any]
    roots: Weighted
    is_plain: bool

    @classmethod
    def of(cls, signature: inspect.Signature, args: Sequence[Any], kwargs: dict[str, Any]) -> Pass:
        """Read the arguments of a call."""
        if len(args) == 1 and not kwargs:
            arguments = {next(iter(signature.parameters)): args[0]}
        else:
            arguments = signature.bind(*args, **kwargs).arguments
        names = ("gradient", "grad_tensors", "grad_outputs")
        given = next((arguments[name] for name in names if arguments.get(name) is not None), None)
        first = next(iter(arguments.values()))
        arguments["retain_graph"] = True
        roots = (first,) if isinstance(first, Tensor) else tuple(first)
        weights = given if isinstance(given, tuple | list) else (given,) * len(roots)
        pairs = zip(roots, weights, strict=True)
        weighted = [(r, torch.ones_like(r) if w is None else w.detach()) for r, w in pairs]
        return cls(arguments, weighted, given is None)

    def run(self, func: Callable[..., Any]) -> Any:
        """Carry it out."""
        return func(**self.arguments)


class Record(TorchFunctionMode):
    """Keeps the graphs of backward passes, and notes their roots and the known losses.

    Operations without a right second derivative in torch (weight_norm, cdist) are decomposed.

    Args:
        parameters: Those of the optimizer.
        guard: Keeps what is written to.
        random: Notes the generators that are used.
        accumulation: Counts the backward passes that ``.grad`` holds already.

    Attributes:
        roots: Tensors on which ``backward`` was called, with the gradient that each was given.
        differentiated: The same, on which ``torch.autograd.grad`` was called for the parameters.
        differentiates: Whether the closure called ``torch.autograd.grad`` itself.
        earlier_passes: Backward passes that ``.grad`` held before the closure's own, and still does; 0 for
            what was there at the end of the last step already, None where ``.grad`` held nothing.
        log: The known losses.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        guard: WriteGuard,
        random: RandomState,
        accumulation: Accumulation | None = None,
    ) -> None:
        super().__init__()
        # No weight was given to a root.
        self.is_plain = True
        self.roots: Weighted = []
        self.differentiated: Weighted = []
        self.differentiates = False
        self.earlier_passes: int | None = None
        self.log = LossLog()
        self._parameters = parameters
        self._guard = guard
        self._accumulation = accumulation
        self._random = random
        self._start = marks(parameters)
        # After the last backward pass.
        self._marks: Marks = []

    def filled_from(self) -> Weighted:
        """What the closure filled ``.grad`` from: by ``backward``, or with what ``autograd.grad`` gave."""
        return self.roots or (self.differentiated if were_written(self._parameters, self._start) else [])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_accessor(func):
            return func(*args)
        args, kwargs = without_graph(func, args), kwargs or {}
        if func in BACKWARD:
            return self._backward(func, Pass.of(BACKWARD[func], args, kwargs))
        if func is torch.autograd.grad:
            self.differentiates = True
            return self._grad(args, kwargs)
        if any(map(is_transformed, args)):
            self.differentiates = True
        if is_grad_scaling(func):
            raise RuntimeError(
                "closure must differentiate the loss it returns, but a GradScaler scales it; call backward on"
                " the loss itself (bfloat16 needs no scaler), or give the optimizer model= and call"
                " scaler.step(optimizer) without a closure."
            )
        self._random.watch(kwargs.get("generator"))
        if func in WITHOUT_SECOND_DERIVATIVE:
            _refuse_checkpoint(func, args)
        result = self._guard.call(WITHOUT_SECOND_DERIVATIVE.get(func, func), args, kwargs)
        if is_transformed(result):
            self.differentiates = True
        return self.log.see(func, args, kwargs, result)

    def _backward(self, func: Any, backward: Pass) -> None:
        if were_thrown_away(self._parameters, self._marks):
            # What earlier calls had accumulated.
            self.roots, self.earlier_passes = [], None
        elif not self.roots and self._accumulation is not None:
            self.earlier_passes = self._accumulation.passes(self._parameters)
        backward.run(func)
        self.roots += backward.roots
        self.is_plain &= backward.is_plain
        for parameter in self._parameters:
            # Whoever guards .grad itself has copies.
            if parameter.grad is not None:
                self._guard.adopt(parameter.grad)
        self._marks = marks(self._parameters)

    def _grad(self, args: Any, kwargs: dict[str, Any]) -> Any:
        """Keep the graph of a gradient for the parameters: the closure may fill ``.grad`` with it."""
        grad = Pass.of(_GRAD, args, kwargs)
        options = grad.arguments
        inputs = options["inputs"]
        options["inputs"] = inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        own = {id(parameter) for parameter in self._parameters}
        if not options.get("create_graph") and any(id(tensor) in own for tensor in inputs):
            self.differentiated += grad.roots
            self.is_plain &= grad.is_plain
        return grad.run(torch.autograd.grad)


def _refuse_checkpoint(func: Any, args: Any) -> None:
    """Raise RuntimeError for an operation that is decomposed, inside a checkpoint.

    In backward passes a checkpoint computes again without the mode, by torch's own operation.
    """
    # On CPU, and of regular matrices, torch's own is meant.
    same = func in CUDNN and not args[0].is_cuda
    if func in DETERMINANTS:
        same = not is_singular(args[0], torch.linalg.det(args[0].detach()))
    if not same and in_checkpoint():
        raise RuntimeError(
            f"{func.__name__} has no right second derivative in torch, and its decomposition cannot be"
            " computed again by a checkpoint; keep it out of torch.utils.checkpoint."
        )


class Value(TorchFunctionMode):
    """Swallows backward, and keeps gradients off where the closure turns them on.

    Args:
        guard: Undoes writes.
        gradients: What ``.grad`` holds after a backward that was swallowed.
        differentiates: The closure differentiates itself: gradients stay as it wants them.
        random: Notes the generators that are used.
        log: Takes the known losses; None where nobody asks for them.
    """

    def __init__(
        self,
        guard: WriteGuard,
        gradients: Grads,
        differentiates: bool,
        random: RandomState,
        log: LossLog | None = None,
    ) -> None:
        super().__init__()
        self._log = log
        self._guard = guard
        self._gradients = gradients
        self._differentiates = differentiates
        self._random = random

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_accessor(func):
            return func(*args)
        args, kwargs = without_graph(func, args), kwargs or {}
        if func in BACKWARD:
            return self._fill_grads()
        if func is torch._C._set_grad_enabled and not self._differentiates:
            return None
        self._random.watch(kwargs.get("generator"))
        result = self._guard.call(WITHOUT_SECOND_DERIVATIVE.get(func, func), args, kwargs)
        return result if self._log is None else self._log.see(func, args, kwargs, result)

    def _fill_grads(self) -> None:
        """The recorded gradient, for a closure that reads or clips it; a copy that it may write to."""
        for parameter, gradient in self._gradients:
            if gradient is not None:
                parameter.grad = self._guard.adopt(gradient.clone())


class Again(Value):
    """Runs with gradients as they were recorded, but swallows backward; notes what was differentiated.

    Attributes:
        roots: Tensors on which ``backward`` or ``torch.autograd.grad`` was called.
    """

    def __init__(self, guard: WriteGuard, gradients: Grads, random: RandomState) -> None:
        super().__init__(guard, gradients, True, random)
        self.roots: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        signature = _GRAD if func is torch.autograd.grad else BACKWARD.get(func)
        if signature is not None:
            self.roots += [root for root, _ in Pass.of(signature, args, kwargs or {}).roots]
        return super().__torch_function__(func, types, args, kwargs)


# Of the properties of a tensor those that are tensors made from it.
MADE = {"T", "mT", "H", "mH", "real", "imag", "data"}


@functools.lru_cache(maxsize=1024)
def is_accessor(func: Any) -> bool:
    """Whether it reads or sets a property such as ``.grad``: no tensor is made or written to."""
    return getattr(func, "__name__", "") in ("__get__", "__set__") and func.__self__.__name__ not in MADE


_NUMBERS = {Tensor.__float__, Tensor.__complex__}


def without_graph(func: Any, args: Any) -> Any:
    """The arguments; of ``float(loss)`` detached: of what has a graph torch warns, at our line."""
    return (args[0].detach(), *args[1:]) if func in _NUMBERS else args


_SCALER = torch.amp.GradScaler.scale.__code__
_SCALING = {"mul", "__mul__"}


def is_grad_scaling(func: Any) -> bool:
    """Whether this call, seen from ``__torch_function__``, is ``GradScaler.scale`` at its multiplication."""
    if getattr(func, "__name__", "") not in _SCALING:
        return False
    # What called the function is one or two frames above the caller of this one.
    for code in (sys._getframe(2).f_code, sys._getframe(3).f_code):
        if code.co_filename == _SCALER.co_filename and code.co_name in ("scale", "apply_scale"):
            return True
    return False
