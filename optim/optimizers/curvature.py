"""Which curvature a model gets: the Gauss-Newton matrix, or the Hessian where it would miss a term."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secondorder import GaussNewton, Hessian, LinearOperator
from secondorder.operators.curvature import GradientBlock

from ..closure.coverage import Coverage
from ..closure.evaluate import Evaluation
from ..methods.basis import uploaded
from ..methods.problem import Form
from .checks import UNSAMPLED, Notices
from .sampling import Part, Sampler

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
HESSIAN_COST, GAUSS_NEWTON_COST = 2.0, 4 / 3
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
        form: As of a ``QuadraticModel``.
    """

    operator: LinearOperator
    description: str
    product: float
    set_up: float = SET_UP
    complaint: str = ""
    consequence: str = ""
    form: Form | None = None


class Structured(GaussNewton):
    """A Gauss-Newton matrix whose last block is of hidden states, and no part of the objective.

    It keeps what its products found in the outputs of the other blocks, so that the form of a combination of
    the vectors that were multiplied costs no pass through the network.

    Attributes:
        keeps: Whether it does.

    Reference: Martens and Sutskever (2011), Learning recurrent neural networks with Hessian-free
        optimization, section 3.2.
    """

    keeps = True

    def form(self, step: Tensor, coordinates: Tensor | None) -> float:
        """``step . B step`` without the last block; by a pass forward where there are no coordinates."""
        if coordinates is None:
            return sum(self.forms(step)[:-1])
        known = zip(*self._tangents[: len(coordinates)], strict=True)
        parts = [_combined(coordinates, torch.stack(us)) for us in known]
        return sum(self.forms_in_outputs(parts, len(self._middles) - 1))

    def _middle(self, parts: list[Tensor], batched: bool) -> list[Tensor]:
        if self.keeps:
            self._tangents.append(parts[: self._middles[-1][1].start])
        return super()._middle(parts, batched)

    def _set_up(self, *arguments: Any) -> None:
        super()._set_up(*arguments)
        self._tangents: list[list[Tensor]] = []


def _combined(coordinates: Tensor, rows: Tensor) -> Tensor:
    """In single precision at least, in the dtype of the rows."""
    single = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return torch.tensordot(uploaded(coordinates, single), single, 1).to(rows.dtype)


def hessian(evaluation: Evaluation, parameters: Sequence[Tensor]) -> Curvature:
    """The exact Hessian."""
    return Curvature(Hessian(evaluation.objective, parameters), "hessian", HESSIAN_COST)


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
    return _said(_found(evaluation, parameters, name, notices, sampler)[1], name, strict, notices)


def fisher(
    evaluation: Evaluation,
    parameters: Sequence[Tensor],
    name: str,
    strict: bool,
    notices: Notices,
    sampler: Sampler,
) -> Curvature:
    """The Fisher matrix: the Gauss-Newton matrix where all losses are likelihoods, which it equals then.

    Its expectation is over targets of the model's own distribution, and exact; a sample has the weight
    that the loss gives it. For other losses it is the Gauss-Newton matrix, with an error if strict, else a
    warning. Arguments are those of ``gauss_newton``.

    Reference: Martens (2020), New insights and perspectives on the natural gradient method.
    """
    coverage, choice = _found(evaluation, parameters, name, notices, sampler)
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
    """
    coverage = evaluation.coverage.proved()
    if not coverage.blocks:
        return evaluation
    blocks = (*coverage.blocks, states)
    return evaluation._replace(coverage=coverage._replace(blocks=blocks, has_states=True, prove=None))


def _found(
    evaluation: Evaluation, parameters: Sequence[Tensor], name: str, notices: Notices, sampler: Sampler
) -> tuple[Coverage, Curvature]:
    """What is known of the objective, or of the part of it that is asked for, and its matrix."""
    evaluation, part = sampler.evaluation(evaluation)
    coverage = evaluation.coverage.proved()
    if coverage.has_states and sampler.is_by_number:
        part = Part(note="all samples: structural damping")
    elif coverage.blocks and not (part.note or coverage.has_states):
        part = sampler.part(coverage)
    if part.operator is None and part.note and sampler.is_by_number:
        notices.once("curvature_batch", UNSAMPLED.format(name, sampler.wanted, part.note))
    return coverage, _gauss_newton(evaluation, coverage, parameters, part)


def _said(choice: Curvature, name: str, strict: bool, notices: Notices) -> Curvature:
    """With its complaint, if there is one, as an error or a warning."""
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
        matrix = Structured if coverage.has_states else GaussNewton
        whole = matrix.of_blocks(blocks, parameters)
        operator = whole
        if description.startswith("explicit") and not whole.has_curvature():
            operator = None
            description = "the loss is linear in the outputs that were returned (log-probabilities?)"
    if operator is None:
        return Curvature(
            Hessian(evaluation.objective, parameters),
            f"hessian ({description})",
            HESSIAN_COST * part.share,
            SET_UP * part.share,
            f"found no Gauss-Newton matrix for the whole objective: {description}. Use the losses of"
            " torch.nn.functional, or let the closure return (loss, outputs), with outputs the tensor that a"
            " convex loss is computed from.",
            "The exact Hessian is used instead.",
        )
    note = f"; {part.note}" if part.note else ""
    own = " + hessian of a term of the parameters" if coverage.has_own_terms else ""
    own += " + structural damping" if coverage.has_states else ""
    found = Curvature(
        operator,
        f"gauss-newton ({description}{note}){own}",
        GAUSS_NEWTON_COST * part.share,
        part.share * (SET_UP_OF_PART if part.share < 1 else SET_UP),
        form=operator.form if isinstance(operator, Structured) else None,
    )
    if coverage.is_whole:
        return found
    return found._replace(
        complaint=f"was given outputs that do not carry the whole loss: {description}.",
        consequence="The curvature of what enters past them is left out.",
    )
