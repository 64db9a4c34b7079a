"""Where a graph uses parameters: the nodes that take them, and which of their entries.

On the way from a parameter to the node that uses it lie views: the ``weight.t()`` of a linear layer, a slice
of packed weights. They are repeated on a tensor without memory, whose strides then say which entry is where.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from secondorder.autodiff.graph import Source, nodes


class Use(NamedTuple):
    """One node that takes a parameter, or some of its entries.

    Attributes:
        node: It, behind all views.
        position: Of what it takes among its inputs.
        spot: What it takes, as a view of the parameter, contiguous, on the meta device.
    """

    node: Node
    position: int
    spot: Tensor


# What takes a result of a node: the number of the result, who takes it, and as which input.
_Users = dict[Node, list[tuple[int, Node, int]]]


def uses_of(source: Source, parameters: Sequence[Tensor]) -> list[list[Use]]:
    """For each parameter the nodes behind ``source`` that take it: one walk through the graph."""
    users: _Users = {}
    for node in nodes([source]):
        for position, (taken, number) in enumerate(node.next_functions):
            if taken is not None:
                users.setdefault(taken, []).append((number, node, position))
    found = []
    for parameter in parameters:
        edge = get_gradient_edge(parameter)
        spot = torch.empty(parameter.shape, device="meta")
        found.append(list(_behind_views(users, edge.node, edge.output_nr, spot)))
    return found


def _behind_views(users: _Users, node: Node, number: int, spot: Tensor) -> Iterator[Use]:
    for taken, user, position in users.get(node, ()):
        if taken != number:
            continue
        view = _VIEWS.get(user.name())
        results = sorted({result for result, _, _ in users.get(user, ())}) if view else []
        views = [_seen(view, user, spot, result) for result in results if view]
        if not views or any(seen is None for seen in views):
            yield Use(user, position, spot)
            continue
        for result, seen in zip(results, views, strict=True):
            assert seen is not None
            yield from _behind_views(users, user, result, seen)


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
