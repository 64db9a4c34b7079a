"""What surrounds an evaluation: kernels and caches, parameters held elsewhere, hooks."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from secondorder.autodiff import switches
from secondorder.autodiff.guard import surely
from secondorder.vectors.flat import unflatten


@contextlib.contextmanager
def evaluating() -> Iterator[None]:
    """Attention by its math kernel, compiled code eager, no cast of parameters that moved since.

    The other kernels and compiled code have no second derivative. Autocast keeps the casts of leaves until
    its outermost region ends, which may be around the step: they would be those of other values.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(switches.held(*switches.MATH_ATTENTION, switches.NO_COMPILED_CODE))
        torch.clear_autocast_cache()
        stack.callback(torch.clear_autocast_cache)
        with _naming_higher_order_operators():
            yield


@contextlib.contextmanager
def _naming_higher_order_operators() -> Iterator[None]:
    """Say what it is that cannot run here: torch traces their branches by what refuses a function mode."""
    try:
        yield
    except Exception as error:
        frames = traceback.walk_tb(error.__traceback__)
        if not any("torch._higher_order_ops" in frame.f_globals.get("__name__", "") for frame, _ in frames):
            raise
        raise RuntimeError(
            "torch.cond and torch's other higher-order operators cannot run in a step, and have no right"
            " second derivative; write a branch or a loop in Python."
        ) from error


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
