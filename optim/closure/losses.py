"""Known losses: which calls of ``torch.nn.functional`` are convex functions of a network's outputs.

While a closure runs in record mode every call passes here. A known loss is kept with its outputs, and
``log_softmax`` followed by ``nll_loss``, or ``sigmoid`` followed by ``binary_cross_entropy``, is seen as
one loss of the logits: as a loss of the log-probabilities it would be linear, and the Gauss-Newton matrix
silently zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from secondorder import Block

# Convex in their first argument, whatever the others are.
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


class RecordedLoss(NamedTuple):
    """A call of a known loss: its name, its value and the outputs it is convex in."""

    name: str
    loss: Tensor
    outputs: Tensor


class LossLog:
    """Collects the known losses of one run of a closure."""

    def __init__(self) -> None:
        self.losses: list[RecordedLoss] = []
        # Keyed by id; the value keeps the tensor alive, so that its id stays its own.
        self._squashed: dict[int, tuple[str, Tensor, Tensor]] = {}

    def see(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        """Note a call if it is one that matters."""
        if not (func in _CONVEX or func in _FUSED or func in _SQUASHING):
            return
        argument = args[0] if args else kwargs.get("input")
        if not (isinstance(result, Tensor) and result.requires_grad and isinstance(argument, Tensor)):
            return
        if func in _SQUASHING:
            self._squashed[id(result)] = (_SQUASHING[func], result, argument)
        elif func in _CONVEX:
            self.losses.append(RecordedLoss(_CONVEX[func], result, argument))
        else:
            needed, name = _FUSED[func]
            squashing, _, logits = self._squashed.get(id(argument), ("", None, None))
            if squashing == needed and logits is not None:
                self.losses.append(RecordedLoss(f"{needed} + {name}", result, logits))


class Coverage(NamedTuple):
    """The blocks of a Gauss-Newton matrix, or why there is none.

    Attributes:
        blocks: One for each known loss; empty when the losses do not cover the objective.
        description: Names of the losses, or the reason why they do not cover it.
    """

    blocks: tuple[Block, ...]
    description: str


def cover(
    losses: Sequence[RecordedLoss],
    roots: Sequence[Tensor],
    root_gradients: Sequence[Tensor],
    parameters: Sequence[Tensor],
) -> Coverage:
    """The Gauss-Newton blocks of ``sum_i root_gradients_i . roots_i``, proved to be all of it.

    The weight of a loss is the derivative of the objective with respect to it. The proof has two parts:
    no parameter is reached from the roots without passing the outputs of a loss, and the objective is
    linear in the losses.
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
    uncovered = _parameters_past(roots, [recorded.outputs for recorded, _ in used], parameters)
    if uncovered:
        return Coverage((), f"{uncovered} of the parameters also enter the objective outside a known loss")
    if any(weight.requires_grad for _, weight in used):
        return Coverage((), "the objective is not linear in the known losses")
    if not all(bool((weight >= 0).all()) for _, weight in used):
        return Coverage((), "a known loss enters the objective with a negative weight")
    names = dict.fromkeys(recorded.name for recorded, _ in used)
    return Coverage(tuple(Block(r.loss, (r.outputs,), w) for r, w in used), ", ".join(names))


def _parameters_past(roots: Sequence[Tensor], outputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> int:
    """How many parameters the graph of ``roots`` reaches without passing one of ``outputs``."""
    stops = {_edge(tensor) for tensor in outputs}
    wanted = {id(parameter) for parameter in parameters}
    reached: set[int] = set()
    seen = set(stops)
    stack = [edge for edge in map(_edge, roots) if edge not in seen]
    while stack:
        edge = stack.pop()
        if edge in seen:
            continue
        seen.add(edge)
        node = edge[0]
        variable = getattr(node, "variable", None)
        if id(variable) in wanted:
            reached.add(id(variable))
        stack.extend(following for following in node.next_functions if following[0] is not None)
    return len(reached)


def _edge(tensor: Tensor) -> tuple[Any, int]:
    edge = torch.autograd.graph.get_gradient_edge(tensor)
    return (edge.node, edge.output_nr)
