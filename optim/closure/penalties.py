"""Which terms of an objective are those of parameters alone: a penalty on weights, for one."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from .edges import Edge, kind, size
from .terms import BROADCAST, FACTORS, Terms

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


def is_of_parameters(terms: Terms, edge: Edge, stops: Collection[Edge] = ()) -> bool:
    """Whether a term is one of parameters alone: it passes no layer, no data, no stop."""
    return not any(other in stops or _is_of_data(terms, other) for other in _behind(terms, edge, stops))


def leaves_of(terms: Terms, edge: Edge, stops: Collection[Edge] = ()) -> list[Tensor]:
    """The parameters that are reached without passing a stop."""
    return [terms.leaves[node] for node, _ in _behind(terms, edge, stops) if node in terms.leaves]


def _is_of_data(terms: Terms, edge: Edge) -> bool:
    node, name = edge[0], kind(edge[0])
    if node in terms.leaves:
        return False
    if name.startswith(_LAYERS) or issubclass(type(node), torch.autograd.function.BackwardCFunction):
        return True
    below = terms.below(node)
    has_constant = len(below) < len(node.next_functions)
    if name in BROADCAST and has_constant:
        return size(edge) > max(map(size, below))
    return name in FACTORS and terms.live_factors(node) < 2


def _behind(terms: Terms, edge: Edge, stops: Collection[Edge]) -> Iterator[Edge]:
    """What it was made from, itself too."""
    stack, seen = [edge], {edge}
    while stack:
        here = stack.pop()
        yield here
        following = [] if here in stops else [e for e in terms.below(here[0]) if e not in seen]
        stack += following
        seen.update(following)
