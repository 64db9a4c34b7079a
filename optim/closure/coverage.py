"""Whether known losses cover an objective: the blocks of its Gauss-Newton matrix, or why there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from secondorder import Block
from secondorder.operators.curvature import GradientBlock

from .edges import Edge, edge_of, reached
from .losses import SQUARES, RecordedLoss

# Each round looks one layer of elementary functions deeper into the network, for a backward pass.
MAX_ROUNDS = 3

CHANGED = "the outputs were changed in place after the loss was computed"


class Coverage(NamedTuple):
    """The blocks of a Gauss-Newton matrix, or why there is none.

    Attributes:
        blocks: One for each known loss; empty when the losses do not cover the objective.
        description: Names of the losses, or the reason why they do not cover it.
        is_whole: False when the user named outputs past which parameters enter the loss.
        has_own_terms: Whether a block is the Hessian of terms of parameters alone.
        losses: Names of the losses that cover it.
        has_states: Whether the last block is of hidden states, and no part of the objective.
        prove: Looks further where the losses do not cover the objective, and for these terms.
        squares: Where all blocks are sums of squares, the calls that made them (``RecordedLoss.call``).
    """

    blocks: tuple[Block | GradientBlock, ...]
    description: str
    is_whole: bool = True
    has_own_terms: bool = False
    losses: tuple[str, ...] = ()
    has_states: bool = False
    prove: Callable[[], Coverage] | None = None
    squares: tuple[int, ...] = ()

    def is_of(self, outputs: Sequence[Tensor]) -> bool:
        """Whether the blocks have these outputs, in this order."""
        own = [output for block in self.blocks for output in block.outputs]
        return len(own) == len(outputs) and all(a is b for a, b in zip(own, outputs, strict=True))

    @property
    def outputs(self) -> int:
        """How many outputs the losses are of; 0 where no known loss was called."""
        return sum(z.numel() for z in self._tensors())

    @property
    def rows(self) -> int:
        """The most rows that any of these outputs has; 0 likewise."""
        return max((z.shape[0] for z in self._tensors() if z.ndim), default=0)

    def _tensors(self) -> Iterator[Tensor]:
        return (z for block in self.blocks for z in block.outputs if isinstance(z, Tensor))

    def proved(self) -> Coverage:
        """What covers the whole objective, if that can be proved on the graph; else this."""
        return self if self.prove is None else self.prove()


def cover(
    losses: Sequence[RecordedLoss],
    roots: Sequence[Tensor],
    root_gradients: Sequence[Tensor],
    parameters: Sequence[Tensor],
    is_positive: bool = False,
) -> Coverage:
    """The Gauss-Newton blocks of ``sum_i root_gradients_i . roots_i``, proved to be all of it.

    The weight of a loss is the derivative of the objective with respect to it. The proof: no parameter is
    reached from the roots without passing a loss, nor from a loss without passing its outputs, and the
    objective is linear in the losses with weights that are not negative. Losses are those that are met first
    on the way from the roots; elementary functions in which the objective is not linear are no losses.
    ``is_positive``: the ``root_gradients`` are known to be, without looking at numbers.
    """
    live = [recorded for recorded in losses if recorded.outputs.requires_grad]
    if not live:
        return Coverage((), "no known loss was called")
    used = _used(roots, root_gradients, live)
    if reason := _gap(roots, used, parameters, is_positive):
        return Coverage((), reason)
    names = tuple(dict.fromkeys(recorded.name for recorded, _ in used))
    squares = tuple(recorded.call for recorded, _ in used) if set(names) <= SQUARES else ()
    blocks = tuple(Block(r.loss, (r.outputs,), w) for r, w in used)
    return Coverage(blocks, ", ".join(names), losses=names, squares=squares)


def _used(
    roots: Sequence[Tensor], root_gradients: Sequence[Tensor], losses: Sequence[RecordedLoss]
) -> list[tuple[RecordedLoss, Tensor]]:
    """The losses to take for those of the objective, each with its weight.

    Without elementary functions in which it is not linear, behind which others may be met.
    """
    for _ in range(MAX_ROUNDS):
        used = _weighted(roots, root_gradients, _met_first(roots, losses))
        inner = [r for r, w in used if r.is_elementary and not _has_fitting_weight(r, w)]
        if not inner:
            return used
        losses = [recorded for recorded in losses if all(recorded is not other for other in inner)]
    return _weighted(roots, root_gradients, [r for r in losses if not r.is_elementary])


def _gap(
    roots: Sequence[Tensor],
    used: Sequence[tuple[RecordedLoss, Tensor]],
    parameters: Sequence[Tensor],
    is_positive: bool,
) -> str:
    """Why the losses are not all that the objective is; empty where they are."""
    if not used:
        return "the objective does not depend on a known loss"
    missed = reached(roots, [recorded.loss for recorded, _ in used], parameters)
    for recorded, _ in used:
        missed |= reached([recorded.loss], [recorded.outputs], parameters)
    if missed:
        return f"{len(missed)} of the parameters also enter the objective outside a known loss"
    if any(weight.requires_grad for _, weight in used):
        return "the objective is not linear in the known losses"
    if any(recorded.outputs._version != recorded.version for recorded, _ in used):
        return CHANGED
    # A root that is a loss has its own weight, which need not be read.
    known = _copied(roots[0]) if is_positive and len(roots) == 1 else set()
    rest = [(r, w) for r, w in used if r.sign < 0 or edge_of(r.loss) not in known]
    if not all(_has_fitting_weight(recorded, weight) for recorded, weight in rest):
        return "a known loss enters the objective with a negative weight"
    return ""


def _copied(root: Tensor) -> set[Edge]:
    """Its edge, and those that it is a clone of: a recorded loss is handed out as one."""
    edge = edge_of(root)
    edges = {edge}
    while edge[0].name() == "CloneBackward0" and edge[0].next_functions[0][0] is not None:
        edge = edge[0].next_functions[0]
        edges.add(edge)
    return edges


def _met_first(roots: Sequence[Tensor], losses: Sequence[RecordedLoss]) -> list[RecordedLoss]:
    """The losses that the graph of the roots reaches without passing another."""
    edges = {edge_of(recorded.loss): index for index, recorded in enumerate(losses)}
    stack = [edge_of(root) for root in roots]
    seen, met = set(stack), set()
    while stack:
        edge = stack.pop()
        if edge in edges:
            met.add(edges[edge])
            continue
        for following in edge[0].next_functions:
            if following[0] is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return [losses[index] for index in sorted(met)]


def _weighted(
    roots: Sequence[Tensor], root_gradients: Sequence[Tensor], losses: Sequence[RecordedLoss]
) -> list[tuple[RecordedLoss, Tensor]]:
    """The losses that the objective depends on, each with the derivative with respect to it."""
    if not losses:
        return []
    weights = torch.autograd.grad(
        roots, [r.loss for r in losses], root_gradients, create_graph=True, allow_unused=True
    )
    return [(r, w) for r, w in zip(losses, weights, strict=True) if w is not None]


def _has_fitting_weight(recorded: RecordedLoss, weight: Tensor) -> bool:
    """Whether the loss enters linearly, and convex."""
    if recorded.is_elementary and weight.requires_grad:
        return False
    if weight.numel() == 1:
        return recorded.sign * float(weight.detach()) >= 0
    return bool((recorded.sign * weight >= 0).all())


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
