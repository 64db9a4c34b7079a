"""The second backward pass of convolutions, without the parts that torch computes and throws away.

The backward of ``C(I, W) + b`` for ``gO`` returns ``gI``, ``gW`` and ``gb``. By bilinearity of ``C``, the
backward of these, for ``ggI``, ``ggW`` and ``ggb``, is

    for gO:  C(ggI, W) + C(I, ggW) + ggb
    for I and W:  the backward of C at (ggI, ggW), for gO

torch 2.13 computes all of it whether asked for or not, the second line by transposed convolutions in slow
layouts. A product ``J v`` asks for the first line alone, and so does a Hessian at a layer whose input is
data.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

from secondorder.autodiff import graph

Grads = tuple[Tensor | None, ...]


def lighten_rows(rows: Iterable[Tensor | None], outputs: Iterable[graph.Source | None]) -> None:
    """Speed up passes from ``rows``, that is ``J^T u``, to ``u``: the only ones that they may be used for.

    Args:
        rows: Made from ``outputs`` and ``u`` by ``torch.autograd.grad`` with ``create_graph=True``.
        outputs: Their own graph is the user's and stays as it is.
    """
    found, foreign = _own_nodes(rows, outputs)
    for node in found:
        # Custom Functions may put ``u`` where else the input or the weight is.
        if all(edge is None or edge in foreign for edge, _ in node.next_functions[1:]):
            _OnlyForGradOutput(node, with_input=True)


def lighten_gradients(gradients: Iterable[Tensor | None], outputs: Iterable[Tensor | None]) -> None:
    """Speed up all passes through ``gradients``, at convolutions whose input carries no graph.

    Args:
        gradients: Made from ``outputs`` by ``torch.autograd.grad`` with ``create_graph=True``.
        outputs: Their own graph is the user's and stays as it is.
    """
    for node in _own_nodes(gradients, outputs)[0]:
        if node.next_functions[1][0] is None:
            _OnlyForGradOutput(node, with_input=False)


def _own_nodes(
    gradients: Iterable[Tensor | None], outputs: Iterable[graph.Source | None]
) -> tuple[list[Node], set[Node]]:
    """Second backward nodes of convolutions that ``outputs`` do not have, and all nodes that they have."""
    foreign = graph.nodes(outputs)
    # The graph of the gradients is several times as large: most often there is no need to walk it.
    if not any(map(graph.may_convolve, foreign)):
        return [], set()
    own = set(graph.nodes(gradients)).difference(foreign)
    return [node for node in own if node.name() == "ConvolutionBackwardBackward0"], set(foreign)


class _OnlyForGradOutput:
    """Hooks that let a node compute its first result alone.

    Holds tensors that the node has saved, not the node, which would never be freed. What is kept back in a
    pass belongs to its thread: several may run passes through one graph.
    """

    def __init__(self, node: Node, *, with_input: bool) -> None:
        self._input, self._weight = node._saved_input, node._saved_weight  # type: ignore[attr-defined]
        options = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
        self._options = [getattr(node, f"_saved_{name}") for name in options]
        self._with_input = with_input
        self._pass = threading.local()
        before = RemovableHandle.next_id
        node.register_prehook(self._before)
        node.register_hook(self._after)
        graph.HookCount.own += RemovableHandle.next_id - before

    def _before(self, grads: Grads) -> Grads | None:
        """Keep back what makes the node compute too much; it has to get something to return a result."""
        ggI, ggW, ggb = grads
        self._pass.kept_back = None
        if ggI is not None and not self._with_input:
            # Then the gradient with respect to the weight is not zero.
            return None
        if ggb is not None:
            self._pass.kept_back = ggI, ggW
            return None, None, ggb
        if ggI is not None and ggW is not None:
            self._pass.kept_back = ggI, None
            return None, ggW, None
        return None

    def _after(self, results: Grads, _: Grads) -> Grads | None:
        """Add to the first result what was kept back."""
        kept_back, self._pass.kept_back = self._pass.kept_back, None
        gO = results[0]
        if kept_back is None or gO is None:
            return None
        ggI, ggW = kept_back
        if ggI is not None:
            gO = gO + torch.convolution(ggI, self._weight, None, *self._options)
        if ggW is not None:
            gO = gO + torch.convolution(self._input, ggW, None, *self._options)
        return gO, None, None
