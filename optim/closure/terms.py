"""The graph of an objective: its terms, and the tensors that every way from them to a parameter passes."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.utils.hooks import RemovableHandle

from secondorder.autodiff import graph

from .edges import Edge, edge_of, kind, made_from

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
FACTORS = {
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
# Those whose results may be larger than their inputs.
BROADCAST = ("Add", "Sub", "Mul", "Div", "Rsub")


class Terms:
    """The part of the graph of some roots from which parameters are reached.

    Args:
        roots: Tensors with a graph.
        parameters: Leaves; others are constants.

    Attributes:
        leaves: The parameters, by their node.
    """

    def __init__(self, roots: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
        self.leaves = {edge_of(parameter)[0]: parameter for parameter in parameters}
        # No node before one that was made from it.
        self._order = _sorted([edge_of(root)[0] for root in roots], self.leaves)

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
        return self.live_factors(node) < 2 if name in FACTORS else _LINEAR.fullmatch(name) is not None

    def live_factors(self, node: Node) -> int:
        """How many of the factors that a node multiplies depend on parameters."""
        # Numbers are left out at the end.
        inputs = node.next_functions
        return sum(inputs[i][0] in self._order for i in FACTORS[kind(node)] if i < len(inputs))

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
        return name in FACTORS and name not in BROADCAST and self._is_linear(edge[0])


def _sorted(roots: Sequence[Node], leaves: dict[Node, Tensor]) -> dict[Node, int]:
    """Positions of the nodes from which a leaf is reached."""
    order: list[Node] = []
    live: dict[Node, bool] = {}
    for root in roots:
        stack: list[tuple[Node, Iterator[Node]]] = [] if root in live else [(root, made_from(root))]
        while stack:
            node, rest = stack[-1]
            following = next((other for other in rest if other not in live), None)
            if following is not None:
                stack.append((following, made_from(following)))
                continue
            stack.pop()
            live[node] = node in leaves or any(live[other] for other in made_from(node))
            if live[node]:
                order.append(node)
    return {node: position for position, node in enumerate(reversed(order))}


def weights(
    roots: Sequence[Tensor], root_gradients: Sequence[Tensor], terms: Sequence[Edge]
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
        found = torch.autograd.grad(roots, ends, root_gradients, retain_graph=True)
    finally:
        for handle in handles:
            handle.remove()
    return dict(zip(terms, found, strict=True))
