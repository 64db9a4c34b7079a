"""Places in a graph: what a tensor is there, its operation, its shape."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

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
