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

from optim.closure import coverage as known
from optim.closure.coverage import CHANGED, MAX_ROUNDS, Coverage
from optim.closure.edges import Edge, edge_of, kind, reached, shape, size
from optim.closure.losses import RecordedLoss
from optim.closure.penalties import is_of_parameters, leaves_of
from optim.closure.semidefinite import OutputHessian, is_semidefinite
from optim.closure.terms import Terms, weights
from secondorder import Block
from secondorder.autodiff.backward import pull
from secondorder.autodiff.graph import Place, WrongDerivativeError, refuse_wrong
from secondorder.autodiff.ladder import MissingDerivativeError
from secondorder.operators.curvature import GradientBlock

# Nodes that are convex in their only input, or concave (-1), and couple as many entries as there are classes:
# nothing is formed for them.
_CONVEX = {"LinalgVectorNorm": 1, "LogSoftmax": -1, "Logsumexp": 1}
# What a selection of entries is made of; the logarithm of selected probabilities is that of a softmax.
_SELECTIONS = {
    "Clone",
    "Gather",
    "Index",
    "IndexSelect",
    "Permute",
    "Select",
    "Slice",
    "Squeeze",
    "T",
    "View",
}


AnyBlock = Block | GradientBlock


class UnprovedError(Exception):
    """Why an objective is not proved convex in a network's outputs."""


def cover(
    losses: Sequence[RecordedLoss],
    roots: Sequence[Tensor],
    root_gradients: Sequence[Tensor],
    parameters: Sequence[Tensor],
) -> Coverage:
    """The coverage by known losses; where there is none, with a proof that may give another."""
    coverage = known.cover(losses, roots, root_gradients, parameters)
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
        groups: dict[Edge, list[Edge]] = {}
        for edge in others:
            if edge not in alone:
                groups.setdefault(self._terms.outputs(edge), []).append(edge)
        found = [self._in_outputs(outputs, terms) for outputs, terms in groups.items()]
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
        return Coverage(tuple(blocks), ", ".join(dict.fromkeys(names)), has_own_terms=bool(alone))

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
        ends, weights = [GradientEdge(*edge) for edge in edges], [self._weights[edge] for edge in edges]
        return [GradientBlock(torch.autograd.grad(ends, leaves, weights, create_graph=True), leaves)]

    def _in_outputs(self, outputs: Edge, terms: Sequence[Edge]) -> tuple[Edge, GradientBlock | None]:
        """The block of terms with the same outputs; none where they are linear in these.

        Where their sum is not convex there, it may be in a term that the others are functions of, or in what
        a frozen layer above these outputs makes, as the head of a network that is fine-tuned.

        Raises:
            UnprovedError: their sum is not convex.
        """
        curved = [term for term in terms if term != outputs]
        if not curved:
            return outputs, None
        passages = [self._terms.passages(term) for term in curved]
        passed = [edge for edge in passages[0] if all(edge in others for others in passages)]
        later = [edge for edge in passed if edge in curved and len(curved) > 1]
        later += [edge for edge in passed if self._terms.is_of_frozen_layer(edge)][:1]
        verdicts = []
        for candidate in (outputs, *later):
            inner = [term for term in curved if term != candidate]
            place = Place.of(*candidate)
            hessian = OutputHessian(self._gradient(inner, place), place)
            if hessian.is_zero():
                return candidate, None
            verdicts.append(self._is_convex(inner, candidate, hessian))
            if verdicts[-1]:
                return candidate, GradientBlock((hessian.gradient,), (place,))
        what = "is not" if verdicts[0] is False else "is not proved"
        where = f"with respect to outputs of shape {shape(outputs)}"
        raise UnprovedError(f"its Hessian {where} {what} positive semidefinite")

    def _gradient(self, edges: Sequence[Edge], place: Place) -> Tensor:
        """Of a weighted sum of terms, in its graph."""
        return _differentiated(edges, [self._weights[edge] for edge in edges], place)

    def _is_convex(self, terms: Sequence[Edge], outputs: Edge, hessian: OutputHessian) -> bool | None:
        """Whether a weighted sum of terms is convex in the outputs; None where that is not found out."""
        if all(self._is_convex_node(term, outputs) for term in terms):
            return True
        if hessian.gradient.dtype.itemsize < 4:
            # Rounding hides what is not.
            return None
        blocks = hessian.blocks()
        if blocks is not None:
            return is_semidefinite(blocks)
        if len(terms) == 1:
            return self._is_convex_of_a_number(terms[0], outputs)
        place = Place.of(*outputs)
        alone = (([term], OutputHessian(self._gradient([term], place), place)) for term in terms)
        return all(self._is_convex(term, outputs, own) for term, own in alone) or None

    def _is_convex_node(self, edge: Edge, outputs: Edge) -> bool:
        """Whether a term is known to be convex of what is linear in the outputs."""
        name, argument = kind(edge[0]), self._terms.below(edge[0])
        if name == "Log":
            while len(argument) == 1 and kind(argument[0][0]) in _SELECTIONS:
                argument = self._terms.below(argument[0][0])
            if len(argument) == 1 and kind(argument[0][0]) == "Softmax":
                name, argument = "LogSoftmax", self._terms.below(argument[0][0])
        sign, is_norm = _CONVEX.get(name, 0), getattr(edge[0], "_saved_ord", 1) >= 1
        is_linear = len(argument) == 1 and not self._terms.split(argument, {outputs})[1]
        return bool(sign) and is_norm and is_linear and bool((sign * self._weights[edge] >= 0).all())

    def _is_convex_of_a_number(self, edge: Edge, outputs: Edge) -> bool | None:
        """Whether ``f(s(z))`` is convex, for a number ``s``, as the root of a mean of squares."""
        passages = self._terms.passages(edge)
        numbers = [passage for passage in passages[1 : passages.index(outputs)] if size(passage) == 1]
        if not numbers:
            return None
        number, place = Place.of(*numbers[-1]), Place.of(*outputs)
        slope = self._gradient([edge], number)
        bend = float(pull([slope], [number], [torch.ones_like(slope)])[0]) if slope.requires_grad else 0.0
        inner = _differentiated([numbers[-1]], [torch.ones_like(slope)], place)
        blocks = OutputHessian(inner, place).blocks()
        if blocks is None:
            return None
        matrices = slope.detach().reshape(()) * blocks.matrices
        verdict = is_semidefinite(blocks._replace(matrices=matrices), bend, inner.detach())
        return verdict if verdict or bend <= 0 else None


def _differentiated(edges: Sequence[Edge], weights: Sequence[Tensor], place: Place) -> Tensor:
    """The gradient of a weighted sum of tensors, in its graph."""
    ends = [GradientEdge(*edge) for edge in edges]
    return torch.autograd.grad(ends, [place.edge], weights, create_graph=True)[0]
