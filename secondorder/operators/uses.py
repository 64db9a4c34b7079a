"""Where a graph uses parameters: the nodes that take them, and which of their entries.

On the way from a parameter to the node that uses it lie views: the ``weight.t()`` of a linear layer, a slice
of packed weights. They are repeated on a tensor without memory, whose strides then say which entry is where.
Other operations on parameters alone, as of a normalised weight, make a tensor that is used in their place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from secondorder.autodiff.graph import Place, Source, nodes


class Use(NamedTuple):
    """One node that takes a parameter, or some of its entries.

    Attributes:
        node: It, behind all views.
        position: Of what it takes among its inputs.
        spot: What it takes, as a view of the parameter, contiguous, on the meta device.
        base: The tensor, computed from parameters alone, of which that is a view instead.
    """

    node: Node
    position: int
    spot: Tensor
    base: Place | None = None

    @property
    def multiplications(self) -> float:
        """Of a product of what it takes with what else the node does, about."""
        result, own = tuple(self.node._input_metadata[0].shape), self.spot.shape
        # The dimension that result and parameter share.
        is_last = bool(result) and bool(own) and result[-1] == own[-1]
        shared = own[-1] if is_last else own[0] if own else 1
        return math.prod(result) * self.spot.numel() / max(1, shared)


def uses_of(
    source: Source, parameters: Sequence[Tensor], is_layer: Callable[[Node], bool]
) -> list[list[Use]]:
    """For each parameter the nodes behind ``source`` that take it: one walk through the graph.

    Args:
        source: An output.
        parameters: Tensors that require gradients.
        is_layer: Of a node, whether what it has saved may tell samples apart.
    """
    walk = _Walk(source, parameters, is_layer)
    return [list(walk.uses(parameter)) for parameter in parameters]


class _Walk:
    """The way from parameters up to what is computed from them."""

    def __init__(
        self, source: Source, parameters: Sequence[Tensor], is_layer: Callable[[Node], bool]
    ) -> None:
        self._is_layer = is_layer
        # Of each node who takes its results: which one, the node, and as which input.
        self._users: dict[Node, list[tuple[int, Node, int]]] = {}
        behind = nodes([source])
        for node in behind:
            for position, (taken, number) in enumerate(node.next_functions):
                if taken is not None:
                    self._users.setdefault(taken, []).append((number, node, position))
        # What is computed from parameters alone; where that is the output, samples are among them.
        parts = {get_gradient_edge(parameter).node for parameter in parameters}
        self._own = set(parts)
        rest = list(self._own)
        while rest:
            for _, user, _ in self._users.get(rest.pop(), ()):
                if user not in self._own and self._is_own(user):
                    self._own.add(user)
                    rest.append(user)
        if behind and behind[0] in self._own:
            self._own = parts

    def _is_own(self, node: Node) -> bool:
        """Whether all that it takes is; indices, masks and inputs of layers may be data outside the graph."""
        taken = [each for each, _ in node.next_functions]
        if not all(each in self._own for each in taken) or (len(taken) == 1 and self._is_layer(node)):
            return False
        saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        tensors = [x for each in saved for x in (each if isinstance(each, tuple) else (each,))]
        return all(x.is_floating_point() for x in tensors if isinstance(x, Tensor))

    def uses(self, parameter: Tensor) -> Iterator[Use]:
        """Of one parameter."""
        edge = get_gradient_edge(parameter)
        spot = torch.empty(parameter.shape, device="meta")
        return self._behind(edge.node, edge.output_nr, Use(edge.node, 0, spot), set())

    def _behind(self, node: Node, number: int, taken: Use, seen: set[tuple[Node, int]]) -> Iterator[Use]:
        """What uses a result of a node, of which ``taken`` says what it is; each other base once."""
        for result, user, position in self._users.get(node, ()):
            if result != number:
                continue
            passed = list(self._passed(user, taken))
            if not passed:
                yield taken._replace(node=user, position=position)
            for following, use in passed:
                if use.base is taken.base or (user, following) not in seen:
                    if use.base is not taken.base:
                        seen.add((user, following))
                    yield from self._behind(user, following, use, seen)

    def _passed(self, user: Node, taken: Use) -> Iterator[tuple[int, Use]]:
        """The results of a node that are views of what it takes, or computed from parameters alone."""
        view = _VIEWS.get(user.name())
        for result in sorted({number for number, _, _ in self._users.get(user, ())}):
            seen = None if view is None else _seen(view, user, taken.spot, result)
            if seen is not None:
                yield result, taken._replace(spot=seen)
            elif user in self._own:
                base = Place.of(user, result)
                yield result, taken._replace(spot=torch.empty(base.like.shape, device="meta"), base=base)


def _seen(view: _View, node: Any, spot: Tensor, result: int) -> Tensor | None:
    """The view of ``spot`` that the node makes; None where that is a copy."""
    try:
        return view(node, spot, result)
    except RuntimeError:
        return None


def signed(number: int) -> int:
    """A saved integer: nodes give negative ones modulo ``2**64``."""
    return number - 2**64 if number >= 2**63 else number


_View = Callable[[Any, Tensor, int], Tensor]


def _same(_node: Any, spot: Tensor, _result: int) -> Tensor:
    return spot


def _reshaped(node: Any, spot: Tensor, result: int) -> Tensor:
    return spot.view(node._input_metadata[result].shape)


def _transposed(node: Any, spot: Tensor, _result: int) -> Tensor:
    return spot.transpose(signed(node._saved_dim0), signed(node._saved_dim1))


def _permuted(node: Any, spot: Tensor, _result: int) -> Tensor:
    return spot.permute([signed(dim) for dim in node._saved_dims])


def _sliced(node: Any, spot: Tensor, _result: int) -> Tensor:
    dim = signed(node._saved_dim)
    start, end, _ = slice(signed(node._saved_start), signed(node._saved_end)).indices(spot.shape[dim])
    index = [slice(None)] * (dim % spot.ndim)
    return spot[(*index, slice(start, end, node._saved_step))]


def _selected(node: Any, spot: Tensor, _result: int) -> Tensor:
    return spot.select(signed(node._saved_dim), signed(node._saved_index))


def _split(node: Any, spot: Tensor, result: int) -> Tensor:
    return spot.split(node._saved_split_size, signed(node._saved_dim))[result]


def _split_unevenly(node: Any, spot: Tensor, result: int) -> Tensor:
    return spot.split(list(node._saved_split_sizes), signed(node._saved_dim))[result]


def _unbound(node: Any, spot: Tensor, result: int) -> Tensor:
    return spot.unbind(signed(node._saved_dim))[result]


_VIEWS: dict[str, _View] = {
    **{f"{name}Backward0": _same for name in ("Alias", "Clone", "ToCopy")},
    **{f"{name}Backward0": _reshaped for name in ("View", "UnsafeView", "ReshapeAlias", "Unsqueeze")},
    # One for each of its signatures.
    **{f"SqueezeBackward{i}": _reshaped for i in range(6)},
    "TBackward0": lambda _node, spot, _result: spot.t(),
    "TransposeBackward0": _transposed,
    "PermuteBackward0": _permuted,
    "SliceBackward0": _sliced,
    "SelectBackward0": _selected,
    "SplitBackward0": _split,
    "UnsafeSplitBackward0": _split,
    "SplitWithSizesBackward0": _split_unevenly,
    "UnbindBackward0": _unbound,
}
