"""Places in a graph: what a tensor is there, its operation, its shape."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

from secondorder.autodiff import graph

# A result of a node: the tensor that it made.
Edge = tuple[Any, int]

_SUFFIX = re.compile(r"Backward\w*$")


def edge_of(source: graph.Source) -> Edge:
    """Its place in the graph."""
    if isinstance(source, Tensor):
        if source.grad_fn is not None:
            return source.grad_fn, source.output_nr
        source = graph.Place(torch.autograd.graph.get_gradient_edge(source), source)
    return source.edge.node, source.edge.output_nr


def kind(node: Node) -> str:
    """The name of its operation: ``Mul`` of ``MulBackward0``."""
    return _SUFFIX.sub("", node.name())


def shape(edge: Edge) -> tuple[int, ...]:
    """Of the tensor."""
    return tuple(edge[0]._input_metadata[edge[1]].shape)


def size(edge: Edge) -> int:
    """Number of entries of the tensor."""
    return math.prod(shape(edge))


def made_from(node: Node) -> Iterator[Node]:
    """What it was made from."""
    return (other for other, _ in node.next_functions if other is not None)


def reached(roots: Sequence[graph.Source], stops: Sequence[Tensor], wanted: Sequence[Tensor]) -> set[int]:
    """Positions of the ``wanted`` tensors that the graph of ``roots`` reaches without passing a stop."""
    passed = set(map(edge_of, stops))
    stack = list(set(map(edge_of, roots)) - passed)
    seen = passed.union(stack)
    while stack:
        following = {edge for edge in stack.pop()[0].next_functions if edge[0] is not None} - seen
        seen |= following
        stack += following
    seen -= passed
    # Of a leaf the node is made anew where nothing holds it, which takes longer than the walk.
    leaves = {id(getattr(node, "variable", None)) for node, _ in seen}
    return {i for i, x in enumerate(wanted) if (id(x) in leaves if x.is_leaf else edge_of(x) in seen)}


class Behind(NamedTuple):
    """What lies behind some tensors.

    Attributes:
        leaves: Those whose ``.grad`` a backward pass adds to.
        first: Number of the node that was made first.
    """

    leaves: list[Tensor]
    first: float

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Behind:
        """Walk the graph, once.

        Raises:
            RuntimeError: a reentrant checkpoint hides a part of it from second derivatives.
        """
        leaves: list[Tensor] = []
        first = math.inf
        node: Any
        for node in graph.nodes(tensors):
            first = min(first, node._sequence_nr())
            name = node.name()
            if "AccumulateGrad" in name:
                leaves.append(node.variable)
            elif name == "CheckpointFunctionBackward":
                raise RuntimeError(
                    "a reentrant checkpoint hides the graph from second derivatives; call"
                    " torch.utils.checkpoint.checkpoint with use_reentrant=False."
                )
        return cls(leaves, first)


def leaves_by_nodes_of(old: Tensor, tensors: Sequence[Tensor]) -> set[int]:
    """Ids of the leaves from which nodes are made that lie behind ``tensors`` and behind ``old``."""
    before = set(graph.nodes([old]))
    shared = [node for node in graph.nodes(tensors) if node in before]
    return {id(getattr(other, "variable", None)) for node in shared for other, _ in node.next_functions}
