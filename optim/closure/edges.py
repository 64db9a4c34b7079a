"""Places in a graph: what a tensor is there, its operation, its shape."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from secondorder.autodiff import graph

# A result of a node: the tensor that it made.
Edge = tuple[Any, int]

_SUFFIX = re.compile(r"Backward\w*$")


def edge_of(tensor: Tensor) -> Edge:
    """Its place in the graph."""
    edge = torch.autograd.graph.get_gradient_edge(tensor)
    return edge.node, edge.output_nr


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


def reached(roots: Sequence[Tensor], stops: Sequence[Tensor], wanted: Sequence[Tensor]) -> set[int]:
    """Positions of the ``wanted`` tensors that the graph of ``roots`` reaches without passing a stop."""
    positions = {edge_of(tensor): position for position, tensor in enumerate(wanted)}
    seen = {edge_of(tensor) for tensor in stops}
    stack = [edge for edge in map(edge_of, roots) if edge not in seen]
    found: set[int] = set()
    while stack:
        edge = stack.pop()
        if edge in seen:
            continue
        seen.add(edge)
        if edge in positions:
            found.add(positions[edge])
        stack.extend(following for following in edge[0].next_functions if following[0] is not None)
    return found


def refuse_reentrant_checkpoint(roots: Sequence[Tensor]) -> None:
    """Raise RuntimeError where a reentrant checkpoint hides a part of the graph from second derivatives."""
    if any(node.name() == "CheckpointFunctionBackward" for node in graph.nodes(roots)):
        raise RuntimeError(
            "a reentrant checkpoint hides the graph from second derivatives; call"
            " torch.utils.checkpoint.checkpoint with use_reentrant=False."
        )
