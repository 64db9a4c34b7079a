"""Proofs that an objective is convex in a network's outputs, where its losses are not known ones.

What the objective is a sum of is read off the graph. The outputs of a term are the last tensor that every way
from it to a parameter passes. There it is convex, at this point, where its Hessian is positive semidefinite,
which is found out by forming it. A term of parameters alone keeps its own Hessian. Where a term is neither,
there is no Gauss-Newton matrix.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from secondorder import Block
from secondorder.autodiff.graph import WrongDerivativeError, refuse_wrong
from secondorder.autodiff.ladder import MissingDerivativeError
from secondorder.operators.curvature import GradientBlock

from . import coverage as known
from .convexity import Convexity, UnprovedError
from .coverage import CHANGED, MAX_ROUNDS, Coverage
from .edges import Edge, edge_of, reached, shape
from .losses import RecordedLoss
from .penalties import is_of_parameters, leaves_of
from .terms import Terms, weights

AnyBlock = Block | GradientBlock


def cover(
    losses: Sequence[RecordedLoss],
    roots: Sequence[Tensor],
    root_gradients: Sequence[Tensor],
    parameters: Sequence[Tensor],
    is_positive: bool = False,
) -> Coverage:
    """The coverage by known losses; where there is none, with a proof that may give another."""
    coverage = known.cover(losses, roots, root_gradients, parameters, is_positive)
    if coverage.blocks or coverage.description == CHANGED:
        return coverage

    def prove() -> Coverage:
        try:
            return Proof(roots, root_gradients, parameters).of_losses(losses)
        except (UnprovedError, MissingDerivativeError, WrongDerivativeError) as error:
            return Coverage((), f"{coverage.description}; {error}")

    return coverage._replace(prove=prove)


def explicit(objective: Tensor, outputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> Coverage:
    """The coverage by outputs that the user named, with a proof that only parameters enter past them."""
    coverage = known.explicit(objective, outputs, parameters)
    if coverage.is_whole:
        return coverage

    def prove() -> Coverage:
        try:
            proof = Proof([objective], [torch.ones_like(objective)], parameters)
            return proof.beside(coverage.blocks, outputs)
        except UnprovedError:
            return coverage

    return coverage._replace(prove=prove)


class Proof:
    """Takes ``sum_i root_gradients_i . roots_i`` for a sum of terms, and looks at each.

    Args:
        roots: Tensors with a graph.
        root_gradients: Their weights.
        parameters: Those that the optimizer moves.
    """

    def __init__(
        self, roots: Sequence[Tensor], root_gradients: Sequence[Tensor], parameters: Sequence[Tensor]
    ) -> None:
        self._roots, self._root_gradients = roots, root_gradients
        self._parameters = parameters
        self._terms = Terms(roots, parameters)
        # Of the terms.
        self._weights: dict[Edge, Tensor] = {}

    def of_losses(self, losses: Sequence[RecordedLoss]) -> Coverage:
        """Blocks of the known losses that are met, of terms that are convex in outputs, of parameters alone.

        Raises:
            UnprovedError: a term is none of these, or the objective has no curvature in outputs.
            MissingDerivativeError: an operation has no second derivative.
            WrongDerivativeError: torch gets it wrong.

        Cost: for a loss of which no formula is known, ``k`` products in the space of outputs and a factoring
        of blocks of ``k`` rows: one row for a sum over entries, a row for each class where over samples.
        """
        refuse_wrong(self._roots, self._parameters)
        used, others = self._known(losses)
        alone = [edge for edge in others if is_of_parameters(self._terms, edge)]
        found = self._in_outputs([edge for edge in others if edge not in alone])
        convex = [block for _, block in found if block is not None]
        if not convex and not any(self._has_outputs(recorded) for recorded in used):
            raise UnprovedError("it has no curvature in outputs")
        curved = [outputs for outputs, block in found if block is not None]
        self._check_flat(
            [outputs for outputs, block in found if block is None],
            [*curved, *(edge_of(recorded.outputs) for recorded in used)],
        )
        blocks: list[AnyBlock] = [Block(r.loss, (r.outputs,), self._weights[edge_of(r.loss)]) for r in used]
        blocks += [*convex, *self._own(alone)]
        names = [recorded.name for recorded in used] + ["convex in the outputs"] * bool(convex)
        unique = tuple(dict.fromkeys(names))
        return Coverage(tuple(blocks), ", ".join(unique), has_own_terms=bool(alone), losses=unique)

    def _in_outputs(self, edges: Sequence[Edge]) -> list[tuple[Edge, GradientBlock | None]]:
        """Outputs of the terms, each with the block of those that have them; none where they are linear."""
        groups: dict[Edge, list[Edge]] = {}
        for edge in edges:
            groups.setdefault(self._terms.outputs(edge), []).append(edge)
        convexity = Convexity(self._terms, self._weights)
        return [convexity.in_outputs(outputs, terms) for outputs, terms in groups.items()]

    def _check_flat(self, flat: Sequence[Edge], curved: Sequence[Edge]) -> None:
        """Raise UnprovedError where it is linear in outputs in which nothing else has curvature."""
        missing = set(self._terms.split(flat)[1])
        for outputs in curved:
            missing.difference_update(self._terms.split([outputs])[1])
        if missing:
            raise UnprovedError(f"it is linear in outputs of shape {shape(missing.pop())}")

    def beside(self, blocks: Sequence[AnyBlock], outputs: Sequence[Tensor]) -> Coverage:
        """The blocks of explicit outputs, and those of terms past them.

        Raises:
            UnprovedError: a term past them is not one of parameters alone.
        """
        stops = {edge_of(output) for output in outputs}
        others = self._split(stops)[1]
        past = [edge for edge in others if leaves_of(self._terms, edge, stops)]
        if not all(is_of_parameters(self._terms, edge, stops) for edge in past):
            raise UnprovedError("more than parameters enters past the outputs")
        return Coverage((*blocks, *self._own(past)), "explicit outputs", has_own_terms=bool(past))

    def _split(self, stops: Collection[Edge] = ()) -> tuple[list[Edge], list[Edge]]:
        """Stops and other terms, of which the weights are noted."""
        met, others = self._terms.split([edge_of(root) for root in self._roots], stops)
        self._weights = weights(self._roots, self._root_gradients, [*met, *others])
        return met, others

    def _known(self, losses: Sequence[RecordedLoss]) -> tuple[list[RecordedLoss], list[Edge]]:
        """Known losses in which the objective is linear, with weights of their sign; and the other terms."""
        stops = {edge_of(recorded.loss): recorded for recorded in losses if recorded.outputs.requires_grad}
        met = self._split(stops)[0]
        if any(stops[edge].outputs._version != stops[edge].version for edge in met):
            raise UnprovedError(CHANGED)
        for edge, recorded in list(stops.items()):
            if reached([recorded.loss], [recorded.outputs], self._parameters):
                del stops[edge]
        for _ in range(MAX_ROUNDS):
            met, others = self._split(stops)
            unfit = [edge for edge in met if not bool((stops[edge].sign * self._weights[edge] >= 0).all())]
            if not unfit:
                return [stops[edge] for edge in met], others
            for edge in unfit:
                del stops[edge]
        return [], self._split()[1]

    def _has_outputs(self, recorded: RecordedLoss) -> bool:
        """Whether a known loss is one of more than parameters as they are: a square of these is a penalty."""
        outputs = edge_of(recorded.outputs)
        is_penalty = is_of_parameters(self._terms, outputs) and not self._terms.split([outputs])[1]
        return not (recorded.is_elementary and is_penalty)

    def _own(self, edges: Sequence[Edge]) -> list[GradientBlock]:
        """The block of terms of parameters alone: these are its outputs, its matrix is the Hessian."""
        if not edges:
            return []
        found = {leaf for edge in edges for leaf in leaves_of(self._terms, edge)}
        leaves = tuple(parameter for parameter in self._parameters if parameter in found)
        ends = [GradientEdge(*edge) for edge in edges]
        gradient = torch.autograd.grad(ends, leaves, [self._weights[e] for e in edges], create_graph=True)
        return [GradientBlock(gradient, leaves)]
