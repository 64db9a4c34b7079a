"""What a graph says before it is differentiated: symmetric, without a derivative, wrong, hooked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.utils.hooks import RemovableHandle


class Place(NamedTuple):
    """A tensor that only the graph knows: nobody may hold it any more.

    Attributes:
        edge: Where gradients with respect to it come by.
        like: A tensor of its shape, dtype and device, without memory of its own.
    """

    edge: GradientEdge
    like: Tensor

    @classmethod
    def of(cls, node: Node, output_nr: int) -> Place:
        """That of one of the results of a node."""
        made = node._input_metadata[output_nr]
        like = torch.empty((), dtype=made.dtype, device=made.device).expand(made.shape)
        return cls(GradientEdge(node, output_nr), like)


Source = Tensor | Place


def end(source: Source) -> Any:
    """What ``torch.autograd.grad`` takes for it."""
    return source.edge if isinstance(source, Place) else source


def like(source: Source) -> Tensor:
    """A tensor of its shape, dtype and device."""
    return source.like if isinstance(source, Place) else source


def has_graph(source: Source) -> bool:
    """Whether gradients may pass it."""
    return isinstance(source, Place) or source.requires_grad


class HookCount:
    """Whether a hook was registered since: it may change a gradient unseen by the graph.

    Attributes:
        own: Hooks that this library has registered, which change nothing.
    """

    own = 0

    def __init__(self) -> None:
        self._start = RemovableHandle.next_id - HookCount.own

    def has_grown(self) -> bool:
        """True when any hook, on a tensor, a node or a module, was registered meanwhile."""
        return bool(RemovableHandle.next_id - HookCount.own != self._start)


def is_symmetric(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a value and its gradient were made by built-in operations alone: a symmetric Hessian.

    A custom Function may return anything from its backward: then products from the left and from the
    right differ, and ``hvp`` must not replace one by the other.
    """
    return not any(_is_custom(node) for node in nodes(tensors))


# With them derivatives leave out points where a formula has none, a norm at zero for one: NaN times zero is
# NaN in one order of the two derivatives, and never met in the other.
_MASKS = {"MaskedFillBackward0", "WhereBackward0"}


def has_masks(tensors: Iterable[Tensor | None]) -> bool:
    """Whether ``v^T H`` may be NaN where ``H v`` is not."""
    return any(node.name() in _MASKS for node in nodes(tensors))


# Nodes that raise when a second backward pass reaches them (torch 2.13).
_WITHOUT_DERIVATIVE = {
    "torch::autograd::NotImplemented",
    "PdistBackwardBackward0",
    "CdistBackwardBackward0",
    "EmbeddingBagBackwardBackward0",
}


def has_missing(gradient: Iterable[Tensor | None]) -> bool:
    """Whether a backward pass through a gradient may meet an operation without a derivative."""
    return any(node.name() in _WITHOUT_DERIVATIVE for node in nodes(gradient))


# Nodes whose second derivative is wrong in silence (torch 2.13, against finite differences).
_WRONG = {
    "WeightNormInterfaceBackward0": "weight_norm",
    "SparseCooTensorWithDimsAndTensorsBackward0": "sparse_coo_tensor",
}


class WrongDerivativeError(RuntimeError):
    """The graph holds an operation whose second derivative torch gets wrong in silence."""


def refuse_wrong(value: Tensor) -> None:
    """Raise WrongDerivativeError where the graph of ``value`` holds a node that is known to be wrong."""
    refuse_once_differentiable((value,))
    for node in nodes((value,)):
        name = _WRONG.get(node.name())
        if name is not None:
            raise WrongDerivativeError(
                f"the second derivative of {name} is wrong in torch; compute the loss inside"
                " secondorder.decompose.decompose()."
            )


_ONCE = torch.autograd.function.once_differentiable(lambda _: None).__code__


def refuse_once_differentiable(tensors: Iterable[Source | None]) -> None:
    """Raise WrongDerivativeError where a custom Function hides its second derivative: it would be zero."""
    for node in nodes(tensors):
        function = getattr(type(node), "_forward_cls", None)
        if function is not None and getattr(function.backward, "__code__", None) is _ONCE:
            raise WrongDerivativeError(
                f"{function.__name__} is once_differentiable and has no second derivative; write its backward"
                " with differentiable operations, without once_differentiable."
            )


def _is_custom(node: Node) -> bool:
    """Whether the backward may be that of another function: a custom one, or a gradient that is scaled."""
    # In Python: BackwardCFunction. In C++: torch::autograd::CppNode<...>.
    if issubclass(type(node), torch.autograd.function.BackwardCFunction) or "CppNode" in node.name():
        return True
    return bool(getattr(node, "_saved_scale_grad_by_freq", False))


def leaves(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    """The leaves behind ``tensors``, whose ``.grad`` a backward pass adds to."""
    found = (getattr(node, "variable", None) for node in nodes(tensors) if "AccumulateGrad" in node.name())
    return [leaf for leaf in found if leaf is not None]


def nodes(tensors: Iterable[Source | None]) -> Iterator[Node]:
    """All nodes behind ``tensors``, each once."""
    roots = (t.edge.node if isinstance(t, Place) else t.grad_fn for t in tensors if t is not None)
    seen = {root for root in roots if root is not None}
    stack = list(seen)
    while stack:
        node = stack.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
