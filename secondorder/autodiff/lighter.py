"""Backward passes whose results are to be differentiated, in a graph that is lighter than torch's.

Nodes of the graph that they make are replaced by those of ``autodiff/fused.py``, and gradients that nobody
reads are not computed: where a product ``v^T H`` is all that is asked for, the gradient with respect to the
weight of a linear layer is there for its graph alone, and costs a third of the layer's three products.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.utils.checkpoint import CheckpointError
from torch.utils.hooks import RemovableHandle

from secondorder.autodiff import graph
from secondorder.autodiff.compat import grad_of_fitting, is_packed
from secondorder.autodiff.fused import REPLACED, Replaced
from secondorder.vectors.arguments import MaybeTensors, refuse_inference_mode

Grads = tuple[Tensor | None, ...]


def light_grad(
    outputs: Sequence[Any],
    inputs: Sequence[Any],
    v: Sequence[Tensor] | None = None,
    *,
    rows: bool = False,
    unread: bool = False,
) -> MaybeTensors:
    """``v^T d outputs / d inputs`` in its graph; the graph of ``outputs`` is kept, and stays as it is.

    Args:
        outputs: Tensors or gradient edges; those without a graph are left out.
        inputs: Tensors or gradient edges.
        v: Tensors like ``outputs``; ones where None, for tensors of real numbers.
        rows: The result is ``J^T u``, to be differentiated with respect to ``u``, that is ``v``, alone.
        unread: The values of the result are not asked for, and may be wrong; its graph is right.

    Returns:
        None where there is no path.
    """
    refuse_inference_mode()
    given = map(torch.ones_like, outputs) if v is None else v
    pairs = [
        (z, u) for z, u in zip(outputs, given, strict=True) if not isinstance(z, Tensor) or z.requires_grad
    ]
    if not pairs:
        return (None,) * len(inputs)
    outputs, inputs, v = tuple(z for z, _ in pairs), tuple(inputs), tuple(u for _, u in pairs)
    nodes = _nodes(outputs)
    weights = _weights(nodes, outputs, inputs) if unread else {}
    if weights:
        unasked = {weight.position for weight in weights.values()}
        asked = tuple(x for i, x in enumerate(inputs) if i not in unasked)
        made: dict[int, Tensor] = {}
        grads = iter(_run(nodes, rows, weights, made, outputs, asked, v))
        if len(made) == len(weights):
            return tuple(made[i] if i in unasked else next(grads) for i in range(len(inputs)))
        # A node that was not replaced has no place for a gradient that is not computed.
    return _run(nodes, rows, {}, {}, outputs, inputs, v)


def _nodes(outputs: Iterable[Any]) -> list[Node]:
    return graph.nodes(
        graph.Place(x, torch.empty(0, device="cpu")) if isinstance(x, GradientEdge) else x for x in outputs
    )


class _Weight(NamedTuple):
    """An input that a linear layer multiplies by, and nothing else in the graph.

    Attributes:
        position: Among the inputs.
        is_transposed: Whether it is multiplied by as its transpose.
    """

    position: int
    is_transposed: bool


def _weights(nodes: Sequence[Node], outputs: Sequence[Any], inputs: Sequence[Any]) -> dict[Node, _Weight]:
    """Weights of linear layers among the inputs, by the node of the layer."""
    plain = ((i, x) for i, x in enumerate(inputs) if isinstance(x, Tensor) and _is_plain(x))
    leaves = {id(x): i for i, x in plain if not x._backward_hooks}
    if any(isinstance(output, Tensor) and output.is_leaf for output in outputs):
        return {}
    users = Counter(following for node in nodes for following, _ in node.next_functions)
    users.update(x.grad_fn if isinstance(x, Tensor) else x.node for x in outputs)
    found = {}
    for node in nodes:
        if not _is_linear(node, leaves):
            continue
        factor = node.next_functions[-1][0]
        is_transposed = factor is not None and factor.name() == "TBackward0" and users[factor] == 1
        leaf = factor.next_functions[0][0] if is_transposed and factor is not None else factor
        index = leaves.get(id(getattr(leaf, "variable", None)))
        if index is not None and users[leaf] == 1:
            found[node] = _Weight(index, is_transposed)
    return found if len(found) < len(inputs) else {}


def _is_linear(node: Any, leaves: dict[int, int]) -> bool:
    """Whether a node is a product of matrices that a pass to the leaves meets for another reason than one."""
    name = node.name()
    if name == "AddmmBackward0":
        factor, saved = node.next_functions[1][0], node._raw_saved_mat1
        bias = getattr(node.next_functions[0][0], "variable", None)
        is_met = factor is not None or id(bias) in leaves
    elif name == "MmBackward0":
        factor, saved = node.next_functions[0][0], node._raw_saved_self
        is_met = factor is not None
    else:
        return False
    # What a checkpoint computes again is not asked for twice.
    return is_met and not is_packed(saved)


def _run(
    nodes: Iterable[Node],
    rows: bool,
    weights: dict[Node, _Weight],
    made: dict[int, Tensor],
    outputs: tuple[Any, ...],
    inputs: tuple[Any, ...],
    v: tuple[Tensor, ...],
) -> MaybeTensors:
    """The pass; ``made`` is filled with the gradients for ``weights``, by position, that hold no values."""
    before = RemovableHandle.next_id
    handles = [
        node.register_hook(partial(_replace, node, REPLACED[node.name()], rows, weights.get(node), made))
        for node in nodes
        if node.name() in REPLACED
    ]
    graph.HookCount.own += RemovableHandle.next_id - before
    try:
        return grad_of_fitting(outputs, inputs, v, create_graph=True)
    finally:
        for handle in handles:
            handle.remove()


def _replace(
    node: Node,
    how: Replaced,
    rows: bool,
    weight: _Weight | None,
    made: dict[int, Tensor],
    results: Grads,
    grads: Grads,
) -> Grads | None:
    """Hook of a node: its results, in the graph by our node in place of torch's."""
    g, found = grads[0], [result.grad_fn for result in results if result is not None]
    if (
        g is None
        or not _is_plain(g)
        or not found
        or any(x is None or x.name() not in how.made for x in found)
    ):
        return None
    try:
        saved = how.saved(node)
    except CheckpointError:
        # What a checkpoint computes again it gives once in a pass, and the node itself has it.
        return None
    if saved is None or any(part.dtype != g.dtype for part in saved if isinstance(part, Tensor)):
        return None
    if rows:
        saved = tuple(part.detach() if isinstance(part, Tensor) else part for part in saved)
    values = [None if value is None else value.detach() for value in results]
    if weight is not None:
        values[-1] = g.new_zeros(()).expand(saved[0].shape[1], g.shape[1])
    ours = how.node.apply(*values, g, *saved)
    ours = (ours,) if isinstance(ours, Tensor) else ours
    if weight is None:
        return ours
    made[weight.position] = ours[-1].t() if weight.is_transposed else ours[-1]
    return (*ours[:-1], None)


def _is_plain(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and tensor.dtype in (torch.float32, torch.float64)
        and tensor.numel() > 0
    )
