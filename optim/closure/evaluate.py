"""Evaluate a user's closure, unchanged, in two modes.

*record*, once a step: the closure runs for real, its backward passes keep their graph, its losses are
noted. *value*, for every trial: gradients are off and backward is swallowed, the random state is the one of
the recording, and ``.grad``, buffers and everything else that existed before is left alone.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from optim.closure.losses import Coverage, cover, explicit, refuse_reentrant_checkpoint
from optim.closure.modes import Record, Value
from secondorder.flat import flatten, unflatten
from secondorder.guard import RandomState, WriteGuard

Closure = Callable[[], Any]


class Evaluation(NamedTuple):
    """What one recorded run of the closure gave; what is minimised is ``sign`` times its loss.

    Attributes:
        loss: What the closure returned as loss, detached.
        value: ``sign`` times it, as a number.
        objective: ``sign`` times the scalar with a graph whose gradient the closure asked for.
        gradient: ``sign`` times the gradient that the closure left in ``.grad``, flat, shape (n,), in single
            precision at least.
        coverage: Blocks of the Gauss-Newton matrix, or why there are none.
    """

    loss: Tensor
    value: float
    objective: Tensor
    gradient: Tensor
    coverage: Coverage


class ClosureEvaluator:
    """Runs one closure for one step.

    Args:
        closure: Returns the loss, or ``(loss, outputs)``; may call ``backward`` itself.
        parameters: The parameters that the optimizer moves.
        sign: -1 where the closure's loss is to be maximised.
    """

    def __init__(self, closure: Closure, parameters: Sequence[Tensor], sign: int = 1) -> None:
        self._closure, self._sign = closure, sign
        self._parameters = tuple(parameters)
        self._random = RandomState(parameter.device for parameter in self._parameters)
        self._differentiates = False

    @contextlib.contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """After an exception ``.grad``, values included, and the random state are what they were."""
        self._random.save()
        grads = [parameter.grad for parameter in self._parameters]
        copies = [None if grad is None else grad.detach().clone() for grad in grads]
        try:
            yield
        except BaseException:
            self._random.restore()
            for parameter, grad, copy in zip(self._parameters, grads, copies, strict=True):
                parameter.grad = grad
                if grad is not None and copy is not None:
                    grad.detach().copy_(copy)
            raise

    def record(self) -> Evaluation:
        """Run for real; ``.grad`` is then the gradient at this point.

        Raises:
            TypeError: the closure returns neither a loss nor ``(loss, outputs)``.
            RuntimeError: the loss is not a finite scalar with a path to the parameters.
        """
        self._random.save()
        mode = Record(self._parameters)
        with torch.enable_grad():
            with sdpa_kernel(SDPBackend.MATH), mode:
                returned = self._closure()
            self._differentiates = mode.differentiates
            loss, outputs = _split(returned)
            value = _finite(loss)
            roots, root_gradients = mode.roots, mode.root_gradients
            if not roots:
                roots, root_gradients = _root_of(loss)
                self._fill_grads(roots[0])
            refuse_reentrant_checkpoint(roots)
            gradient = self._gradient()
            if not bool(gradient.isfinite().all()):
                raise RuntimeError(
                    "the gradient at the current parameters must be finite, got NaN or infinity;"
                    " look for the operation with torch.autograd.set_detect_anomaly(True)."
                )
            root_gradients = [self._sign * weight for weight in root_gradients]
            terms = [(root * weight).sum() for root, weight in zip(roots, root_gradients, strict=True)]
            objective = sum(terms[1:], start=terms[0])
            if outputs:
                coverage = explicit(objective, outputs, self._parameters)
            else:
                coverage = cover(mode.log.losses, roots, root_gradients, self._parameters)
        returned_loss = loss.detach() if isinstance(loss, Tensor) else torch.tensor(loss)
        return Evaluation(returned_loss, self._sign * value, objective, gradient, coverage)

    def value(self) -> float:
        """The loss at the present parameters; NaN and infinity are values here, not errors."""
        gradients = {parameter: parameter.grad for parameter in self._parameters}
        with _grads_put_aside(self._parameters), WriteGuard() as guard:
            mode = Value(guard, gradients, self._differentiates)
            return self._sign * _number(self._replay(mode, gradients=self._differentiates))

    def gradient(self) -> Tensor:
        """The gradient at the present parameters, flat; ``.grad`` is left alone."""
        with _grads_put_aside(self._parameters), WriteGuard() as guard:
            mode = Record(self._parameters, guard)
            loss = self._replay(mode, gradients=True)
            if not mode.roots:
                self._fill_grads(_root_of(loss)[0][0])
            return self._gradient()

    def _replay(self, mode: Record | Value, gradients: bool) -> Any:
        """The loss of another run with the random numbers of the recorded one."""
        with (
            self._random.replayed(),
            torch.set_grad_enabled(gradients),
            sdpa_kernel(SDPBackend.MATH),
            mode,
        ):
            return _split(self._closure())[0]

    def _fill_grads(self, root: Tensor) -> None:
        grads = torch.autograd.grad(root, self._parameters, retain_graph=True, allow_unused=True)
        for parameter, grad in zip(self._parameters, grads, strict=True):
            parameter.grad = grad

    def _gradient(self) -> Tensor:
        grads = [parameter.grad for parameter in self._parameters]
        if all(grad is None for grad in grads):
            raise RuntimeError(
                "the loss must depend on at least one parameter of the optimizer, but no parameter received a"
                " gradient; pass the parameters of the model that the closure evaluates."
            )
        if any(grad is not None and grad.layout is not torch.strided for grad in grads):
            raise RuntimeError(
                "gradients must be dense, got a sparse one; use sparse=False in the embedding."
            )
        gradient = flatten(
            [torch.zeros_like(p) if g is None else g for p, g in zip(self._parameters, grads, strict=True)]
        )
        return self._sign * gradient.to(torch.promote_types(gradient.dtype, torch.float32))


@contextlib.contextmanager
def trial(parameters: Sequence[Tensor], step: Tensor) -> Iterator[None]:
    """Hold the parameters at ``x + step``; afterwards they are ``x`` again, bit for bit.

    The data is swapped, not written: version counters, and so the kept graphs, stay as they are.
    """
    originals = [parameter.data for parameter in parameters]
    try:
        for parameter, part in zip(parameters, unflatten(step, parameters), strict=True):
            parameter.data = parameter.data + part.to(parameter.dtype)
        yield
    finally:
        for parameter, original in zip(parameters, originals, strict=True):
            parameter.data = original


@contextlib.contextmanager
def _grads_put_aside(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Whatever happens to ``.grad`` inside does not reach the user's."""
    grads = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        yield
    finally:
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad


def _split(returned: Any) -> tuple[Any, tuple[Tensor, ...]]:
    """The loss and the explicit outputs of what the closure returned."""
    loss: Any = returned
    outputs: tuple[Any, ...] = ()
    if isinstance(returned, tuple):
        if len(returned) != 2:
            raise TypeError(
                f"closure must return the loss or (loss, outputs), got a tuple of {len(returned)}."
            )
        loss = returned[0]
        outputs = returned[1] if isinstance(returned[1], tuple) else (returned[1],)
    if not isinstance(loss, Tensor | float | int):
        raise TypeError(
            f"closure must return the loss or (loss, outputs), got {type(loss).__name__};"
            " end it with 'return loss'."
        )
    if isinstance(loss, Tensor) and loss.numel() != 1:
        raise RuntimeError(
            f"the loss that closure returns must be a scalar, got shape {tuple(loss.shape)};"
            " reduce it with mean() or sum()."
        )
    for output in outputs:
        if not isinstance(output, Tensor):
            raise TypeError(f"outputs must be a tensor or a tuple of tensors, got {type(output).__name__}.")
    return loss, outputs


def _number(loss: Tensor | float) -> float:
    return float(loss.detach() if isinstance(loss, Tensor) else loss)


def _finite(loss: Tensor | float) -> float:
    value = _number(loss)
    if not math.isfinite(value):
        raise RuntimeError(
            f"the loss at the current parameters must be finite, got {value}; the step was not taken and"
            " parameters and gradients are unchanged. Check the data and the initialisation."
        )
    return value


def _root_of(loss: Any) -> tuple[list[Tensor], list[Tensor]]:
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        raise RuntimeError(
            "closure must call backward or return a loss that carries a graph, got a detached one;"
            " remove detach(), item() or no_grad() from it."
        )
    return [loss], [torch.ones_like(loss)]
