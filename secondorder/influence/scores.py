"""Scores of a fitted model in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from secondorder.data.objective import Objective
from secondorder.influence.influence import Influence
from secondorder.influence.result import InfluenceResult

Loss = Callable[[Any, Any], Tensor]

CURVATURES = {"hessian": "hessian", "gauss-newton": "ggn"}
SOLVERS = {"auto": "auto", "direct": "dense", "cg": "block_cg"}


def influence(
    model: nn.Module,
    loss: Loss,
    train: Any,
    test: Any,
    *,
    l2: float = 0.0,
    damping: float | None = 0.0,
    curvature: str = "hessian",
    solver: str = "auto",
    rtol: float = 1e-5,
) -> InfluenceResult:
    """Scores ``g_test^T (B + damping I)^-1 g_train / n`` of a fitted model: ``Influence`` in one call.

    ``B`` is the curvature of the objective that was minimised,
    ``mean_j loss(model(x_j), y_j) + l2 / 2 norm(w)^2``, at the parameters as they are: they should be
    a minimiser. To first order, leaving out sample ``j`` (its term of the mean, still divided by
    ``n``) raises the loss of a test sample by the score.

    Args:
        model: Fitted model; parameters that do not require gradients are constants. Not changed.
        loss: Mean loss of a batch, such as ``torch.nn.functional.cross_entropy``.
        train: Training samples: a pair (inputs, targets), a Dataset, a DataLoader that does not shuffle.
        test: Test samples, as ``train``.
        l2: Weight of the L2 term of the objective, loss over parameter squared.
        damping: Further shift, loss over parameter squared. It makes an indefinite curvature
            definite, and biases the scores towards zero. None: the least that makes it so.
        curvature: "hessian", or "gauss-newton" (positive semidefinite; equal for linear models).
        solver: "direct" (dense), "cg", or "auto": direct up to 3000 parameters.
        rtol: Of "cg".

    Returns:
        An ``InfluenceResult``; look at its ``status``. "negative_curvature" says that the parameters are
        not a minimiser: use "gauss-newton", or more damping.

    Raises:
        TypeError: ``train`` or ``test`` holds no tensors.
        ValueError: an option is out of range; a pair has unequal lengths; ``loss`` is not a mean over
            samples; ``model`` is in training mode with a layer whose output depends on the batch or on
            chance.

    Cost: ``n`` products (direct) or one block CG solve for all test samples together; a derivative of the
    training outputs along each solution.

    Example:
        >>> x, y = torch.randn(50, 3), torch.randn(50, 1)
        >>> model = torch.nn.Linear(3, 1)
        >>> result = influence(model, torch.nn.functional.mse_loss, (x, y), (x[:2], y[:2]), l2=0.1)
        >>> result.scores.shape, result.status
        (torch.Size([2, 50]), 'converged')
    """
    for name, value in (("l2", l2), ("damping", damping)):
        if value is not None and not value >= 0:
            raise ValueError(f"{name} must be non-negative, got {value}.")
    for name, choice, choices in (("curvature", curvature, CURVATURES), ("solver", solver, SOLVERS)):
        if choice not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {choice!r}.")
    _check_data(train, "train")
    _check_data(test, "test")
    objective = Objective(model, loss, train, l2=l2)
    found = Influence(
        objective, curvature=CURVATURES[curvature], damping=damping, solver=SOLVERS[solver], rtol=rtol
    )
    return found.scores(test)


def _check_data(data: Any, name: str) -> None:
    """Of a pair of tensors, which most are: by its own name."""
    if isinstance(data, Tensor):
        raise TypeError(f"{name} must be a pair of tensors (inputs, targets) or a data set, got a Tensor.")
    if not (isinstance(data, tuple | list) and len(data) == 2) or isinstance(data[0], tuple | list | dict):
        return
    if not all(isinstance(t, Tensor) for t in data):
        kinds = " and ".join(type(t).__name__ for t in data)
        raise TypeError(f"{name} must be a pair of tensors (inputs, targets), got a pair of {kinds}.")
    if not all(t.ndim for t in data):
        raise ValueError(f"{name} must hold samples in its first dimension; add one with x.unsqueeze(0).")
    if len(data[0]) != len(data[1]) or not len(data[0]):
        raise ValueError(
            f"{name} must hold as many inputs as targets, at least one, "
            f"got {len(data[0])} and {len(data[1])}."
        )
