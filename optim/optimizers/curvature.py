"""Which curvature a model gets: the Gauss-Newton matrix, or the Hessian where it would miss a term."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from optim.closure.coverage import Coverage
from optim.closure.evaluate import Evaluation
from optim.optimizers.checks import UNSAMPLED, Notices
from optim.optimizers.sampling import Part, Sampler
from secondorder import GaussNewton, Hessian, LinearOperator

# Of a product on the kept graph, in gradients of a deep network.
PRODUCT_COST = {Hessian: 2.0, GaussNewton: 4 / 3}
# Of the kept graph; for a part of the samples the network is run on them too.
SET_UP, SET_UP_OF_PART = 1.0, 4 / 3


class Curvature(NamedTuple):
    """A curvature, and why.

    Attributes:
        operator: Symmetric, on flat vectors.
        description: For the report.
        product: Cost of one, in gradients.
        set_up: Its cost, in gradients.
        complaint: What is missing; empty where nothing is.
        consequence: What is done about it.
    """

    operator: LinearOperator
    description: str
    product: float
    set_up: float = SET_UP
    complaint: str = ""
    consequence: str = ""


def hessian(evaluation: Evaluation, parameters: Sequence[Tensor]) -> Curvature:
    """The exact Hessian."""
    return Curvature(Hessian(evaluation.objective, parameters), "hessian", PRODUCT_COST[Hessian])


def gauss_newton(
    evaluation: Evaluation,
    parameters: Sequence[Tensor],
    name: str,
    strict: bool,
    notices: Notices,
    sampler: Sampler,
) -> Curvature:
    """The Gauss-Newton matrix of the objective, or the Hessian: with an error if strict, else a warning.

    Args:
        evaluation: With what is known of the objective.
        parameters: In the order of the flat vectors.
        name: Of the optimizer, for errors.
        strict: Whether to raise RuntimeError.
        notices: Of the optimizer.
        sampler: Takes the part of the samples that is asked for; warned of where it cannot.
    """
    evaluation, part = sampler.evaluation(evaluation)
    coverage = evaluation.coverage.proved()
    if coverage.blocks and not part.note:
        part = sampler.part(coverage)
    if part.operator is None and part.note and sampler.is_by_number:
        notices.once("curvature_batch", UNSAMPLED.format(name, sampler.wanted, part.note))
    choice = _gauss_newton(evaluation, coverage, parameters, part)
    if choice.complaint:
        text = f"{name} {choice.complaint}"
        if strict:
            raise RuntimeError(text)
        notices.once("coverage", f"{text} {choice.consequence}")
    return choice


def _gauss_newton(
    evaluation: Evaluation, coverage: Coverage, parameters: Sequence[Tensor], part: Part
) -> Curvature:
    blocks, description = coverage.blocks, coverage.description
    operator = part.operator
    if operator is None and blocks:
        whole = GaussNewton.of_blocks(blocks, parameters)
        operator = whole
        if description.startswith("explicit") and not whole.has_curvature():
            operator = None
            description = "the loss is linear in the outputs that were returned (log-probabilities?)"
    if operator is None:
        return Curvature(
            Hessian(evaluation.objective, parameters),
            f"hessian ({description})",
            PRODUCT_COST[Hessian] * part.share,
            SET_UP * part.share,
            f"found no Gauss-Newton matrix for the whole objective: {description}. Use the losses of"
            " torch.nn.functional, or let the closure return (loss, outputs), with outputs the tensor that a"
            " convex loss is computed from.",
            "The exact Hessian is used instead.",
        )
    note = f"; {part.note}" if part.note else ""
    own = " + hessian of a term of the parameters" if coverage.has_own_terms else ""
    found = Curvature(
        operator,
        f"gauss-newton ({description}{note}){own}",
        PRODUCT_COST[GaussNewton] * part.share,
        part.share * (SET_UP_OF_PART if part.share < 1 else SET_UP),
    )
    if coverage.is_whole:
        return found
    return found._replace(
        complaint=f"was given outputs that do not carry the whole loss: {description}.",
        consequence="The curvature of what enters past them is left out.",
    )
