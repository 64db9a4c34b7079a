"""What surrounds an evaluation: kernels and caches, parameters held elsewhere, hooks."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from secondorder.autodiff import switches
from secondorder.autodiff.guard import surely
from secondorder.vectors.flat import unflatten


class evaluating:  # noqa: N801 - used as a function, like torch.no_grad
    """Context: attention by its math kernel, compiled code eager, no cast of parameters that moved since.

    The other kernels and compiled code have no second derivative. Autocast keeps the casts of leaves until
    its outermost region ends, which may be around the step: they would be those of other values.
    """

    def __enter__(self) -> None:
        torch.clear_autocast_cache()
        self._held = switches.held(*switches.MATH_ATTENTION, switches.NO_COMPILED_CODE)
        self._held.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        try:
            torch.clear_autocast_cache()
        finally:
            self._held.__exit__(None, None, None)
        if isinstance(error, Exception) and _is_of_higher_order(error):
            raise RuntimeError(
                "torch.cond and torch's other higher-order operators cannot run in a step, and have no right"
                " second derivative; write a branch or a loop in Python."
            ) from error


def _is_of_higher_order(error: Exception) -> bool:
    """Whether torch was tracing branches of an operator, by what refuses a function mode."""
    frames = traceback.walk_tb(error.__traceback__)
    return any("torch._higher_order_ops" in frame.f_globals.get("__name__", "") for frame, _ in frames)


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
        surely(lambda: _set_data(parameters, originals))


def _set_data(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data = value


@contextlib.contextmanager
def moved(parameters: Sequence[Tensor], step: Tensor) -> Iterator[None]:
    """Add the step, for good; after an exception in here or inside they are what they were, bit for bit."""
    originals = [parameter.detach().clone() for parameter in parameters]
    try:
        for parameter, part in zip(parameters, unflatten(step, parameters), strict=True):
            parameter.add_(part.to(parameter.dtype))
        yield
    except BaseException:
        surely(lambda: _write(parameters, originals))
        raise


def _write(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data.copy_(value)


@contextlib.contextmanager
def without_hooks(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Hooks that are registered on the parameters are not called inside."""
    hooks = [(parameter, parameter._backward_hooks) for parameter in parameters if parameter._backward_hooks]
    try:
        for parameter, _ in hooks:
            parameter._backward_hooks = None
        yield
    finally:
        for parameter, registered in hooks:
            parameter._backward_hooks = registered
