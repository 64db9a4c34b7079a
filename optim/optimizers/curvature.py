"""Which curvature a model gets: the Gauss-Newton matrix, or the Hessian where it would miss a term."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from optim.closure.evaluate import Evaluation
from optim.optimizers.checks import Notices
from secondorder import GaussNewton, Hessian, LinearOperator

# Of a product on the kept graph, in gradients of a deep network.
PRODUCT_COST = {Hessian: 2.0, GaussNewton: 4 / 3}


class Curvature(NamedTuple):
    """A curvature, and why.

    Attributes:
        operator: ``GaussNewton`` or ``Hessian``.
        description: For the report.
        complaint: What is missing; empty where nothing is.
        consequence: What is done about it.
    """

    operator: LinearOperator
    description: str
    complaint: str = ""
    consequence: str = ""


def hessian(evaluation: Evaluation, parameters: Sequence[Tensor]) -> Curvature:
    """The exact Hessian."""
    return Curvature(Hessian(evaluation.objective, parameters), "hessian")


def gauss_newton(
    evaluation: Evaluation, parameters: Sequence[Tensor], name: str, strict: bool, notices: Notices
) -> Curvature:
    """The Gauss-Newton matrix of the objective, or the Hessian: with an error if strict, else a warning.

    Args:
        evaluation: With what is known of the objective.
        parameters: In the order of the flat vectors.
        name: Of the optimizer, for errors.
        strict: Whether to raise RuntimeError.
        notices: Of the optimizer.
    """
    choice = _gauss_newton(evaluation, parameters)
    if choice.complaint:
        text = f"{name} {choice.complaint}"
        if strict:
            raise RuntimeError(text)
        notices.once("coverage", f"{text} {choice.consequence}")
    return choice


def _gauss_newton(evaluation: Evaluation, parameters: Sequence[Tensor]) -> Curvature:
    coverage = evaluation.coverage.proved()
    blocks, description = coverage.blocks, coverage.description
    operator = GaussNewton.of_blocks(blocks, parameters) if blocks else None
    if operator is not None and description.startswith("explicit") and not operator.has_curvature():
        operator = None
        description = "the loss is linear in the outputs that were returned (log-probabilities?)"
    if operator is None:
        return Curvature(
            Hessian(evaluation.objective, parameters),
            f"hessian ({description})",
            f"found no Gauss-Newton matrix for the whole objective: {description}. Use the losses of"
            " torch.nn.functional, or let the closure return (loss, outputs), with outputs the tensor that a"
            " convex loss is computed from.",
            "The exact Hessian is used instead.",
        )
    own = " + hessian of a term of the parameters" if coverage.has_own_terms else ""
    if coverage.is_whole:
        return Curvature(operator, f"gauss-newton ({description}){own}")
    return Curvature(
        operator,
        f"gauss-newton ({description}){own}",
        f"was given outputs that do not carry the whole loss: {description}.",
        "The curvature of what enters past them is left out.",
    )
