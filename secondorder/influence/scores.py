"""Influence functions: which training samples moved this prediction.

Reference: Koh and Liang (2017), Understanding black-box predictions via influence functions; Cook and
Weisberg (1982), Residuals and influence in regression.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from secondorder.autodiff import switches
from secondorder.data.objective import Objective
from secondorder.operators.linear import LinearOperator
from secondorder.operators.matrix import MatrixOperator
from secondorder.solvers import STATUS_TEXT, SolveResult, block_cg, direct
from secondorder.vectors.flat import flatten_rows

Loss = Callable[[Tensor, Tensor], Tensor]

CURVATURES = ("hessian", "gauss-newton")
SOLVERS = ("auto", "direct", "cg")
DIRECT_LIMIT = 1000


class InfluenceResult(NamedTuple):
    """Influence scores and how well their systems were solved.

    Attributes:
        scores: Shape (tests, training samples). Entry ``[i, j]`` predicts by how much the loss of test
            sample ``i`` rises when training sample ``j`` is left out: positive means helpful.
        status: "converged" when every system was solved, else the status of the worst one.
        residual_norm: Largest residual among the systems, relative to the gradient of its test sample.
    """

    scores: Tensor
    status: str
    residual_norm: float

    @property
    def message(self) -> str:
        """One sentence on ``status``: the cause, and the remedy where there is one."""
        if self.status == "negative_curvature":
            return "the parameters are not a minimiser; use curvature='gauss-newton', or more damping"
        return STATUS_TEXT[self.status]

    def __repr__(self) -> str:
        return (
            f"InfluenceResult(status={self.status!r}, residual_norm={self.residual_norm:.3g},"
            f"  # {self.message}\n  scores={self.scores})"
        )


def influence(
    model: nn.Module,
    loss: Loss,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    l2: float = 0.0,
    damping: float = 0.0,
    curvature: str = "hessian",
    solver: str = "auto",
) -> InfluenceResult:
    """Scores ``g_test^T (B + damping I)^-1 g_train / n`` of a fitted model.

    ``B`` is the curvature of the objective that was minimised,
    ``mean_j loss(model(x_j), y_j) + l2 / 2 norm(w)^2``, at the parameters as they are: they should be
    a minimiser. To first order, leaving out sample ``j`` (its term of the mean, still divided by
    ``n``) raises the loss of a test sample by the score.

    Args:
        model: Fitted model; parameters that do not require gradients are constants. Not changed.
        loss: Mean loss of a batch, such as ``torch.nn.functional.cross_entropy``.
        train: Inputs and targets of the training samples, first dimension ``n``.
        test: Inputs and targets of the test samples.
        l2: Weight of the L2 term of the objective, loss over parameter squared.
        damping: Further shift, loss over parameter squared. It makes an indefinite curvature
            definite, and biases the scores towards zero.
        curvature: "hessian", or "gauss-newton" (positive semidefinite; equal for linear models).
        solver: "direct" (dense), "cg", or "auto": direct up to 1000 parameters.

    Returns:
        An ``InfluenceResult``; look at its ``status``. "negative_curvature" says that the parameters are
        not a minimiser: use "gauss-newton", or more damping.

    Raises:
        TypeError: ``train`` or ``test`` is not a pair of tensors.
        ValueError: an option is out of range; a pair has unequal lengths; ``loss`` is not a mean over
            samples; ``model`` is in training mode with a layer whose output depends on the batch or on
            chance.

    Cost: ``n`` products (direct) or one block CG solve for all test samples together, over the whole
    training set in one batch; one gradient for each sample.

    Example:
        >>> x, y = torch.randn(50, 3), torch.randn(50, 1)
        >>> model = torch.nn.Linear(3, 1)
        >>> result = influence(model, torch.nn.functional.mse_loss, (x, y), (x[:2], y[:2]), l2=0.1)
        >>> result.scores.shape, result.status
        (torch.Size([2, 50]), 'converged')
    """
    _check_options(l2, damping, curvature, solver)
    _check_data(train, "train")
    _check_data(test, "test")
    objective = Objective(model, loss, train, batch_size=len(train[0]))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not bool(objective.value().isfinite()):
        raise ValueError(
            "the loss over train must be finite; look for NaN or infinity in data and parameters."
        )
    operator = objective.hessian() if curvature == "hessian" else objective.gauss_newton()
    operator = operator + (l2 + damping)
    n = operator.shape[0]
    if solver == "direct" or (solver == "auto" and n <= DIRECT_LIMIT):
        operator = MatrixOperator(operator.dense(), is_symmetric=True)
    test_gradients = torch.cat(list(_sample_gradients(model, loss, test, parameters)))
    solved = _solve(operator, test_gradients.T)
    samples = len(train[0])
    scores = [rows @ solved.x for rows in _sample_gradients(model, loss, train, parameters)]
    return InfluenceResult(torch.cat(scores).T / samples, *_worst(solved, test_gradients))


def _solve(operator: LinearOperator, B: Tensor) -> SolveResult:
    if isinstance(operator, MatrixOperator):
        return direct(operator.spectrum, B)
    # Scores to six digits in double precision; single precision stagnates earlier, and says so.
    return block_cg(operator, B, rtol=1e-8 if B.dtype == torch.float64 else 1e-5)


def _worst(solved: SolveResult, gradients: Tensor) -> tuple[str, float]:
    norms = gradients.norm(dim=1).clamp_min(torch.finfo(gradients.dtype).tiny).tolist()
    residuals = [c.residual_norm / norm for c, norm in zip(solved.columns, norms, strict=True)]
    return solved.status, max(residuals, default=0.0)


def _sample_gradients(
    model: nn.Module,
    loss: Loss,
    data: tuple[Tensor, Tensor],
    parameters: dict[str, nn.Parameter],
    chunk_size: int = 256,
) -> Iterator[Tensor]:
    """Gradients of the losses of samples, flat, in chunks of shape (k, n)."""
    point = {name: p.detach() for name, p in parameters.items()}

    def loss_of_sample(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        output = torch.func.functional_call(model, values, (x.unsqueeze(0),))
        return loss(output, y.unsqueeze(0)).squeeze()

    gradient = torch.vmap(torch.func.grad(loss_of_sample), in_dims=(None, 0, 0))
    for x, y in zip(data[0].split(chunk_size), data[1].split(chunk_size), strict=True):
        with switches.held(*switches.MATH_ATTENTION):
            grads = gradient(point, x, y)
        yield flatten_rows([grads[name] for name in parameters])


def _check_options(l2: float, damping: float, curvature: str, solver: str) -> None:
    for name, value in (("l2", l2), ("damping", damping)):
        if not value >= 0:
            raise ValueError(f"{name} must be non-negative, got {value}.")
    for name, choice, choices in (("curvature", curvature, CURVATURES), ("solver", solver, SOLVERS)):
        if choice not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {choice!r}.")


def _check_data(data: tuple[Tensor, Tensor], name: str) -> None:
    is_pair = isinstance(data, tuple | list) and len(data) == 2
    if not is_pair or not all(isinstance(t, Tensor) for t in data):
        kinds = [type(t).__name__ for t in data] if is_pair else []
        got = f"a pair of {' and '.join(kinds)}" if is_pair else type(data).__name__
        raise TypeError(f"{name} must be a pair of tensors (inputs, targets), got {got}.")
    if not all(t.ndim for t in data):
        raise ValueError(f"{name} must hold samples in its first dimension; add one with x.unsqueeze(0).")
    if len(data[0]) != len(data[1]) or not len(data[0]):
        raise ValueError(
            f"{name} must hold as many inputs as targets, at least one, "
            f"got {len(data[0])} and {len(data[1])}."
        )
