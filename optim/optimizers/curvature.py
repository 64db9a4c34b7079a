"""Which curvature a model gets: the Gauss-Newton matrix, or the Hessian where it would miss a term."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from optim.closure.coverage import Coverage
from optim.closure.evaluate import Evaluation
from optim.optimizers.checks import Notices
from secondorder import GaussNewton, Hessian, LinearOperator
from secondorder.operators.curvature import GradientBlock

# Losses that are negative log-likelihoods of outputs in their natural parameters: the Hessian in the outputs
# does not depend on the target, and is its own expectation over targets of the model's distribution.
LIKELIHOODS = frozenset(
    (
        *("cross_entropy", "log_softmax", "log_softmax + nll_loss", "log_softmax + kl_div"),
        *("binary_cross_entropy_with_logits", "logsigmoid", "sigmoid + binary_cross_entropy"),
        *("mse_loss", "squares", "poisson_nll_loss"),
    )
)

# Of a product on the kept graph, in gradients of a deep network.
PRODUCT_COST = {Hessian: 2.0, GaussNewton: 4 / 3}


class Curvature(NamedTuple):
    """A curvature, and why.

    Attributes:
        operator: ``GaussNewton`` or ``Hessian``.
        description: For the report.
        complaint: What is missing; empty where nothing is.
        consequence: What is done about it.
        extra: As of a ``QuadraticModel``, on steps of the parameters.
    """

    operator: LinearOperator
    description: str
    complaint: str = ""
    consequence: str = ""
    extra: Callable[[Tensor], float] | None = None


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
    return _said(_gauss_newton(evaluation.coverage.proved(), evaluation, parameters), name, strict, notices)


def fisher(
    evaluation: Evaluation, parameters: Sequence[Tensor], name: str, strict: bool, notices: Notices
) -> Curvature:
    """The Fisher matrix: the Gauss-Newton matrix where all losses are likelihoods, which it equals then.

    Its expectation is over targets of the model's own distribution, and exact; a sample has the weight
    that the loss gives it. For other losses it is the Gauss-Newton matrix, with an error if strict, else a
    warning. Arguments are those of ``gauss_newton``.

    Reference: Martens (2020), New insights and perspectives on the natural gradient method.
    """
    coverage = evaluation.coverage.proved()
    choice = _gauss_newton(coverage, evaluation, parameters)
    if not choice.complaint and not LIKELIHOODS.issuperset(coverage.losses or ("",)):
        choice = choice._replace(
            complaint=f"found no log-likelihood of which it knows the Fisher matrix: {coverage.description}."
            " Let the closure return a loss of torch.nn.functional alone: cross_entropy, mse_loss,"
            " binary_cross_entropy_with_logits, or poisson_nll_loss of log-rates.",
            consequence="The Gauss-Newton matrix is used instead.",
        )
    elif not choice.complaint:
        choice = choice._replace(description=choice.description.replace("gauss-newton", "fisher", 1))
    return _said(choice, name, strict, notices)


def with_states(evaluation: Evaluation, states: GradientBlock) -> Evaluation:
    """With hidden states as further outputs, where there is a Gauss-Newton matrix.

    Their products are parts of those of the others: one pass forward and one back, as without them.

    Reference: Martens and Sutskever (2011), Learning recurrent neural networks with Hessian-free
        optimization, section 3.2.
    """
    coverage = evaluation.coverage.proved()
    blocks = (*coverage.blocks, states) if coverage.blocks else ()
    return evaluation._replace(coverage=coverage._replace(blocks=blocks, prove=None))


def structured(curvature: Curvature) -> Curvature:
    """A matrix whose last block is of hidden states: they hold steps back, and are not in the objective."""
    operator = curvature.operator
    if not isinstance(operator, GaussNewton):
        return curvature
    description = f"{curvature.description} + structural damping"
    return curvature._replace(description=description, extra=lambda p: operator.forms(p)[-1])


def _said(choice: Curvature, name: str, strict: bool, notices: Notices) -> Curvature:
    """With its complaint, if there is one, as an error or a warning."""
    if choice.complaint:
        text = f"{name} {choice.complaint}"
        if strict:
            raise RuntimeError(text)
        notices.once("coverage", f"{text} {choice.consequence}")
    return choice


def _gauss_newton(coverage: Coverage, evaluation: Evaluation, parameters: Sequence[Tensor]) -> Curvature:
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
