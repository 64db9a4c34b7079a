"""The graph of an objective: its terms, and the tensors that every way from them to a parameter passes."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.utils.hooks import RemovableHandle

from secondorder.autodiff import graph

# A result of a node: the tensor that it made.
Edge = tuple[Any, int]

# Nodes that are linear in all that they differentiate, by the name of their operation (torch 2.6 to 2.14).
_LINEAR = re.compile(
    "Add|Alias|AsStrided|Cat|Clone|ConstantPadNd|Cumsum|Diagonal|Expand|Flip|Gather|Index|IndexAdd|IndexPut"
    "|IndexSelect|Lift|MaskedFill|MaskedScatter|MaskedSelect|Mean|Narrow|Neg|NllLoss|NllLoss2D|Permute|Repeat"
    "|ReshapeAlias|Roll|Rsub|Scatter|ScatterAdd|Select|Slice|Split|SplitWithSizes|Squeeze|Stack|Sub|Sum|T|Take"
    "|ToCopy|Trace|Transpose|Tril|Triu|Unbind|Unfold|UnsafeSplit|UnsafeView|Unsqueeze|View|Where"
    "|torch::autograd::Copy"
)
# Those that are linear in each of the inputs at these positions, but not in two at once. The denominator
# stands twice: a quotient is not linear in it alone either.
_FACTORS = {
    "Addmm": (1, 2),
    "Addmv": (1, 2),
    "Baddbmm": (1, 2),
    "Bmm": (0, 1),
    "Convolution": (0, 1),
    "Div": (0, 1, 1),
    "Dot": (0, 1),
    "Linear": (0, 1),
    "Mm": (0, 1),
    "Mul": (0, 1),
    "Mv": (0, 1),
}
# What layers are made of: a term that holds one is more than a term of the parameters, and so is one where a
# contraction or a broadcast with a constant, its data, is met.
_LAYERS = (
    "Convolution",
    "Cudnn",
    "Embedding",
    "Fused",
    "Grid",
    "Miopen",
    "Mkldnn",
    "Native",
    "Scaled",
    "Thnn",
)
_BROADCAST = ("Add", "Sub", "Mul", "Div", "Rsub")

_SUFFIX = re.compile(r"Backward\w*$")


def kind(node: Node) -> str:
    """The name of its operation: ``Mul`` of ``MulBackward0``."""
    return _SUFFIX.sub("", node.name())


class Terms:
    """The part of the graph of some roots from which parameters are reached.

    Args:
        roots: Tensors with a graph.
        parameters: Leaves; others are constants.
    """

    def __init__(self, roots: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
        self.leaves = {edge_of(parameter)[0]: parameter for parameter in parameters}
        # Position of the nodes, no node before one that was made from it.
        self._order = self._sorted([edge_of(root)[0] for root in roots])

    def _sorted(self, roots: Sequence[Node]) -> dict[Node, int]:
        order: list[Node] = []
        live: dict[Node, bool] = {}
        for root in roots:
            stack: list[tuple[Node, Iterator[Node]]] = [] if root in live else [(root, _following(root))]
            while stack:
                node, rest = stack[-1]
                following = next((other for other in rest if other not in live), None)
                if following is not None:
                    stack.append((following, _following(following)))
                    continue
                stack.pop()
                live[node] = node in self.leaves or any(live[other] for other in _following(node))
                if live[node]:
                    order.append(node)
        return {node: position for position, node in enumerate(reversed(order))}

    def below(self, node: Node) -> list[Edge]:
        """What a node was made from, as far as parameters are reached from it."""
        return [edge for edge in node.next_functions if edge[0] in self._order]

    def split(self, edges: Collection[Edge], stops: Collection[Edge] = ()) -> tuple[list[Edge], list[Edge]]:
        """What a sum of ``edges`` is linear in: the stops that are met, and the results of nonlinear nodes.

        And parameters, which are left out.
        """
        stack = [edge for edge in edges if edge[0] in self._order]
        seen = set(stack)
        met: list[Edge] = []
        nonlinear: list[Edge] = []
        while stack:
            edge = stack.pop()
            if edge in stops:
                met.append(edge)
            elif edge[0] in self.leaves:
                continue
            elif not self._is_linear(edge[0]):
                nonlinear.append(edge)
            else:
                following = [other for other in self.below(edge[0]) if other not in seen]
                seen.update(following)
                stack += following
        return met, nonlinear

    def _is_linear(self, node: Node) -> bool:
        name = kind(node)
        positions = _FACTORS.get(name)
        if positions is None:
            return _LINEAR.fullmatch(name) is not None
        return self._live(node, positions) < 2

    def _live(self, node: Node, positions: Sequence[int]) -> int:
        """How many of the inputs at these positions depend on parameters; numbers are left out at the end."""
        inputs = node.next_functions
        return sum(inputs[i][0] in self._order for i in positions if i < len(inputs))

    def passages(self, edge: Edge) -> list[Edge]:
        """The tensors that every way from ``edge`` to a parameter passes, itself first, parameters left out.

        Its dominators in the graph: where all that is under way is one tensor.
        """
        found: list[Edge] = []
        under_way = {edge}
        while True:
            if len(under_way) == 1:
                found.extend(under_way)
            first = min((node for node, _ in under_way), key=self._order.__getitem__)
            following = self.below(first)
            under_way = {other for other in under_way if other[0] is not first} | set(following)
            if any(node in self.leaves for node, _ in following):
                return found

    def outputs(self, edge: Edge) -> Edge:
        """The tensor to take for the network's outputs: the last passage, or an earlier one linear in it.

        The loss is a simpler function of that one.
        """
        passages = self.passages(edge)
        position = len(passages) - 1
        while position and not self.split([passages[position - 1]], {passages[position]})[1]:
            position -= 1
        return passages[position]

    def is_of_frozen_layer(self, edge: Edge) -> bool:
        """Whether a tensor is what a layer without parameters of its own makes of one that has some."""
        name = kind(edge[0])
        return name in _FACTORS and name not in _BROADCAST and self._is_linear(edge[0])

    def leaves_of(self, edge: Edge, stops: Collection[Edge] = ()) -> list[Tensor]:
        """The parameters that are reached without passing a stop."""
        return [self.leaves[node] for node, _ in self._behind(edge, stops) if node in self.leaves]

    def is_of_parameters(self, edge: Edge, stops: Collection[Edge] = ()) -> bool:
        """Whether a term is one of parameters alone: it passes no layer, no data, no stop."""
        return not any(other in stops or self._is_of_data(other) for other in self._behind(edge, stops))

    def _behind(self, edge: Edge, stops: Collection[Edge]) -> Iterator[Edge]:
        """What it was made from, itself too."""
        stack, seen = [edge], {edge}
        while stack:
            here = stack.pop()
            yield here
            following = [] if here in stops else [e for e in self.below(here[0]) if e not in seen]
            stack += following
            seen.update(following)

    def weights(
        self, roots: Sequence[Tensor], root_gradients: Sequence[Tensor], terms: Sequence[Edge]
    ) -> dict[Edge, Tensor]:
        """What a sum of roots is multiplied with in each of the terms that it was split into.

        Where a term was made from another one, what comes through it does not count.
        """
        if not terms:
            return {}
        before = RemovableHandle.next_id
        nodes = {node for node, _ in terms}
        handles = [node.register_prehook(lambda grads: (None,) * len(grads)) for node in nodes]
        graph.HookCount.own += RemovableHandle.next_id - before
        ends = [GradientEdge(*term) for term in terms]
        try:
            weights = torch.autograd.grad(roots, ends, root_gradients, retain_graph=True)
        finally:
            for handle in handles:
                handle.remove()
        return dict(zip(terms, weights, strict=True))

    def _is_of_data(self, edge: Edge) -> bool:
        node, name = edge[0], kind(edge[0])
        if node in self.leaves:
            return False
        if name.startswith(_LAYERS) or issubclass(type(node), torch.autograd.function.BackwardCFunction):
            return True
        below = self.below(node)
        has_constant = len(below) < len(node.next_functions)
        if name in _BROADCAST and has_constant:
            return size(edge) > max(map(size, below))
        return name in _FACTORS and self._live(node, _FACTORS[name]) < 2


def edge_of(tensor: Tensor) -> Edge:
    """Its place in the graph."""
    edge = torch.autograd.graph.get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def shape(edge: Edge) -> tuple[int, ...]:
    """Of the tensor."""
    return tuple(edge[0]._input_metadata[edge[1]].shape)


def size(edge: Edge) -> int:
    """Number of entries of the tensor."""
    return math.prod(shape(edge))


def _following(node: Node) -> Iterator[Node]:
    return (other for other, _ in node.next_functions if other is not None)
