"""Whether a sum of terms is convex in a network's outputs, at this point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from secondorder.autodiff.backward import pull
from secondorder.autodiff.graph import Place
from secondorder.operators.curvature import GradientBlock
from secondorder.operators.output_blocks import OutputHessian

from .edges import Edge, kind, shape, size
from .semidefinite import is_semidefinite
from .terms import Terms

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


class UnprovedError(Exception):
    """Why an objective is not proved convex in a network's outputs."""


class Convexity:
    """Looks for the outputs in which terms are convex.

    Args:
        terms: Of the objective.
        weights: What each term that is asked about is multiplied with.
    """

    def __init__(self, terms: Terms, weights: Mapping[Edge, Tensor]) -> None:
        self._terms, self._weights = terms, weights

    def in_outputs(self, outputs: Edge, terms: Sequence[Edge]) -> tuple[Edge, GradientBlock | None]:
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
