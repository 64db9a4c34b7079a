"""What versions of torch do differently, each with those that it is for; delete it when they are dropped."""

from __future__ import annotations

import functools
import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function, is_tensor_like

# Under this name from torch 2.6, or earlier, to 2.14.
_run_backward = getattr(torch.autograd.graph, "_engine_run_backward", None)
# Missing before torch 2.8.
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def dispatch_backward() -> None:
    """Let function modes and tensor subclasses see ``torch.autograd.backward``.

    Before torch 2.11 they see ``Tensor.backward`` and ``torch.autograd.grad`` only. Then it is replaced by a
    function that does the same where there are none; later versions, and a second call, change nothing.
    """
    backward = torch.autograd.backward
    if "handle_torch_function" in backward.__code__.co_names:
        return

    @functools.wraps(backward)
    def dispatched(tensors: Any, *args: Any, **kwargs: Any) -> None:
        if not (is_tensor_like(tensors) or isinstance(tensors, tuple)):
            # It may be an iterator.
            tensors = tuple(tensors)
        roots = tuple(filter(is_tensor_like, (tensors,) if is_tensor_like(tensors) else tensors))
        if has_torch_function(roots):
            return handle_torch_function(dispatched, roots, tensors, *args, **kwargs)
        return backward(tensors, *args, **kwargs)

    torch.autograd.backward = dispatched
    # TorchScript knows the function by its identity.
    torch.jit._builtins._register_builtin(dispatched, "aten::backward")


def grad_of_fitting(
    outputs: tuple[Any, ...], inputs: tuple[Any, ...], v: tuple[Tensor, ...], create_graph: bool = False
) -> tuple[Tensor | None, ...]:
    """``torch.autograd.grad`` for what is known to fit; keeps the graph, None where there is no path.

    It looks at the shapes, dtypes and kinds of its arguments first: a fifth of the time of a small graph.
    """
    if _run_backward is None or has_torch_function(outputs) or has_torch_function(inputs):
        options = dict(retain_graph=True, create_graph=create_graph, allow_unused=True)
        return torch.autograd.grad(outputs, inputs, v, **options)
    # Keep the graph; it is allowed that inputs are not reached.
    return _run_backward(outputs, v, True, create_graph, inputs, True, accumulate_grad=False)


def is_packed(saved: Any) -> bool:
    """Whether hooks hold what a node has saved, as in a checkpoint; torch does not say so before 2.10."""
    return getattr(saved, "unpack_hook", None) is not None


def in_checkpoint() -> bool:
    """Whether a checkpoint with ``use_reentrant=False`` runs its function for the first time."""
    if _top_hooks is not None:
        hooks = _top_hooks(True)
        return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"
    # Where its hooks cannot be read: it is among the callers. The reentrant one has gradients off.
    frame: FrameType | None = sys._getframe()
    while frame is not None and torch.is_grad_enabled():
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
        frame = frame.f_back
    return False


def sparse_coo(indices: Tensor, values: Tensor, size: tuple[int, ...]) -> Tensor:
    """A sparse tensor whose indices are known to be right.

    In torch 2.11 and 2.12 ``torch.sparse_coo_tensor`` warns that it does not check them, also where it is
    told not to, unless a switch of the whole process is set.
    """
    return torch.ops.aten.sparse_coo_tensor.indices_size(indices, values, size)
