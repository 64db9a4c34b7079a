"""Known losses: which calls of ``torch.nn.functional`` are convex functions of a network's outputs.

While a closure runs in record mode every call passes here. A known loss is kept with its outputs, and
``log_softmax`` followed by ``nll_loss``, or ``sigmoid`` followed by ``binary_cross_entropy``, is seen as
one loss of the logits: as a loss of the log-probabilities it would be linear, and the Gauss-Newton matrix
silently zero.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from secondorder import Block, graph

# Convex in their first argument, for constant targets and weights that are not negative.
_CONVEX: dict[Callable[..., Any], str] = {
    F.cross_entropy: "cross_entropy",
    F.mse_loss: "mse_loss",
    F.binary_cross_entropy_with_logits: "binary_cross_entropy_with_logits",
    F.huber_loss: "huber_loss",
    F.smooth_l1_loss: "smooth_l1_loss",
    F.soft_margin_loss: "soft_margin_loss",
    F.poisson_nll_loss: "poisson_nll_loss",
}
# Convex in what the named function was given, when their first argument comes out of it.
_FUSED: dict[Callable[..., Any], tuple[str, str]] = {
    F.nll_loss: ("log_softmax", "nll_loss"),
    F.kl_div: ("log_softmax", "kl_div"),
    F.binary_cross_entropy: ("sigmoid", "binary_cross_entropy"),
}
_SQUASHING: dict[Callable[..., Any], str] = {
    F.log_softmax: "log_softmax",
    torch.log_softmax: "log_softmax",
    Tensor.log_softmax: "log_softmax",
    F.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
    Tensor.sigmoid: "sigmoid",
}


# Tensors among their arguments that must be constants, and the weights that must not be negative.
_CONSTANTS = ("target", "weight", "pos_weight")
_WEIGHTS = ("weight", "pos_weight")
_SIGNATURES = {func: inspect.signature(func) for func in (*_CONVEX, *_FUSED)}


class RecordedLoss(NamedTuple):
    """A call of a known loss: its name, its value, and the outputs it is convex in with their version."""

    name: str
    loss: Tensor
    outputs: Tensor
    version: int


class LossLog:
    """Collects the known losses of one run of a closure."""

    def __init__(self) -> None:
        self.losses: list[RecordedLoss] = []
        # Keyed by id; the value keeps the tensor alive, so that its id stays its own.
        self._squashed: dict[int, tuple[str, Tensor, Tensor]] = {}

    def see(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> Any:
        """Note a call if it is one that matters; returns what the closure should see as its result."""
        if not (func in _CONVEX or func in _FUSED or func in _SQUASHING):
            return result
        argument = args[0] if args else kwargs.get("input")
        if not (isinstance(result, Tensor) and result.requires_grad and isinstance(argument, Tensor)):
            return result
        if func in _SQUASHING:
            self._squashed[id(result)] = (_SQUASHING[func], result, argument)
            return result
        if func in _CONVEX:
            name, outputs = _CONVEX[func], argument
        else:
            needed, name = _FUSED[func]
            squashing, _, logits = self._squashed.get(id(argument), ("", None, None))
            if squashing != needed or logits is None:
                return result
            name, outputs = f"{needed} + {name}", logits
        if not _is_convex(_SIGNATURES[func].bind(*args, **kwargs).arguments):
            return result
        self.losses.append(RecordedLoss(name, result, outputs, outputs._version))
        # A copy, so that `loss += penalty` in the closure does not change what was noted.
        return result.clone()


def _is_convex(arguments: dict[str, Any]) -> bool:
    """Whether targets and weights are constants, and weights not negative."""
    tensors = {name: arguments[name] for name in _CONSTANTS if isinstance(arguments.get(name), Tensor)}
    if any(tensor.requires_grad for tensor in tensors.values()):
        return False
    return all(bool((tensors[name] >= 0).all()) for name in _WEIGHTS if name in tensors)


class Coverage(NamedTuple):
    """The blocks of a Gauss-Newton matrix, or why there is none.

    Attributes:
        blocks: One for each known loss; empty when the losses do not cover the objective.
        description: Names of the losses, or the reason why they do not cover it.
        is_whole: False when the user named outputs past which parameters enter the loss.
    """

    blocks: tuple[Block, ...]
    description: str
    is_whole: bool = True


def cover(
    losses: Sequence[RecordedLoss],
    roots: Sequence[Tensor],
    root_gradients: Sequence[Tensor],
    parameters: Sequence[Tensor],
) -> Coverage:
    """The Gauss-Newton blocks of ``sum_i root_gradients_i . roots_i``, proved to be all of it.

    The weight of a loss is the derivative of the objective with respect to it. The proof: no parameter is
    reached from the roots without passing a loss, nor from a loss without passing its outputs, and the
    objective is linear in the losses with weights that are not negative.
    """
    live = [recorded for recorded in losses if recorded.outputs.requires_grad]
    if not live:
        return Coverage((), "no known loss was called")
    weights = torch.autograd.grad(
        roots,
        [recorded.loss for recorded in live],
        root_gradients,
        create_graph=True,
        allow_unused=True,
    )
    used = [(r, w) for r, w in zip(live, weights, strict=True) if w is not None]
    if not used:
        return Coverage((), "the objective does not depend on a known loss")
    missed = reached(roots, [recorded.loss for recorded, _ in used], parameters)
    for recorded, _ in used:
        missed |= reached([recorded.loss], [recorded.outputs], parameters)
    if missed:
        return Coverage((), f"{len(missed)} of the parameters also enter the objective outside a known loss")
    if any(weight.requires_grad for _, weight in used):
        return Coverage((), "the objective is not linear in the known losses")
    if any(recorded.outputs._version != recorded.version for recorded, _ in used):
        return Coverage((), "the outputs were changed in place after the loss was computed")
    if not all(bool((weight >= 0).all()) for _, weight in used):
        return Coverage((), "a known loss enters the objective with a negative weight")
    names = dict.fromkeys(recorded.name for recorded, _ in used)
    return Coverage(tuple(Block(r.loss, (r.outputs,), w) for r, w in used), ", ".join(names))


def explicit(objective: Tensor, outputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> Coverage:
    """The single block of the outputs that the user named.

    Raises:
        RuntimeError: an output carries no graph, or depends on another output.
    """
    for index, output in enumerate(outputs):
        if not output.requires_grad:
            raise RuntimeError(
                "outputs must carry a graph from the parameters, got a detached tensor;"
                " return the tensor that the loss was computed from."
            )
        others = [other for other in outputs if other is not output]
        if reached([output], [], others):
            raise RuntimeError(
                f"outputs must not depend on one another, but outputs[{index}] does;"
                " return the last ones only."
            )
    missed = reached([objective], outputs, parameters)
    past = f"; {len(missed)} of the parameters also enter the loss past the outputs" if missed else ""
    block = Block(objective, tuple(outputs), torch.ones_like(objective))
    return Coverage((block,), "explicit outputs" + past, is_whole=not missed)


def reached(roots: Sequence[Tensor], stops: Sequence[Tensor], wanted: Sequence[Tensor]) -> set[int]:
    """Positions of the ``wanted`` tensors that the graph of ``roots`` reaches without passing a stop."""
    positions = {_edge(tensor): position for position, tensor in enumerate(wanted)}
    seen = {_edge(tensor) for tensor in stops}
    stack = [edge for edge in map(_edge, roots) if edge not in seen]
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


def _edge(tensor: Tensor) -> tuple[Any, int]:
    edge = torch.autograd.graph.get_gradient_edge(tensor)
    return (edge.node, edge.output_nr)
