"""Influence functions of an objective: what training samples do to predictions."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from secondorder.data.objective import Objective
from secondorder.influence.base import Base
from secondorder.influence.edits import Moved, Term, relabelling, removals
from secondorder.influence.first_order import Tests, self_influence
from secondorder.influence.leave_one_out import LeaveOneOut, leave_one_out
from secondorder.influence.orders import (
    Order,
    check_order_of,
    edited,
    move,
    perturbation,
)
from secondorder.influence.result import InfluenceResult, Row
from secondorder.influence.samples import Measure
from secondorder.influence.table import Request, table
from secondorder.influence.trust import Verification, to_verify, verified
from secondorder.operators.linear import LinearOperator


class Influence:
    """Which training samples moved a prediction, and by how much.

    Predicts changes of test losses, or of another measure, when the term of a training sample leaves the
    objective while the others keep their weight, ``1 / n`` for a mean. Positive: removing the sample raises
    the loss, it is helpful. Order 1 is the classical influence function; "newton" a Newton step with the
    curvature that remains, with the measure evaluated there: exact for quadratic objectives, close for
    convex ones, an approximation for networks; "refit" trains again from the present parameters.

    Args:
        objective: At a minimiser. Samples have indices 0 to n - 1 in the order of its data.
        curvature: "ggn", "hessian", "fisher", or an operator of shape (parameters, parameters), L2 included.
            For networks "newton" is closer to a refit with "hessian", where that is positive definite.
        damping: Shift of the curvature, loss over parameter squared. None: zero where it is positive
            definite, else the least that lifts its lowest eigenvalue to ``sqrt(eps)`` of the largest.
        solver: "dense" (a factor), "dual" (a factor in the space of residuals), "block_cg", "minres"
            (indefinite matrices), or "auto": dense up to 3000 parameters, dual where there are fewer rows of
            residuals, else block CG. "ekfac" is an approximation by name, by Kronecker factors of each layer
            with corrected eigenvalues; its damping None is a tenth of the mean eigenvalue where there is no
            L2 term.
        rtol: Of the iterative solvers.
        preconditioner: Of "block_cg": "ekfac", or None.

    Raises:
        TypeError: ``objective`` is not one.
        ValueError: a DataLoader shuffles; the loss is not finite; an option is out of range.

    Cost: the curvature's matrix and a factor, or nothing before the first scores.

    Reference: Koh and Liang (2017), Understanding black-box predictions via influence functions; Pregibon
    (1981), Logistic regression diagnostics.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        curvature: str | LinearOperator = "ggn",
        damping: float | None = None,
        solver: str = "auto",
        rtol: float = 1e-3,
        preconditioner: str | None = None,
    ) -> None:
        self._base = Base(objective, curvature, damping, solver, rtol, preconditioner)

    def scores(
        self,
        test: Any,
        train: Iterable[int] | None = None,
        *,
        order: Order = 1,
        measure: Measure | None = None,
        steps: int = 0,
        top_k: int | None = None,
        out: str | os.PathLike[str] | None = None,
        progress: bool = False,
    ) -> InfluenceResult:
        """Predicted changes when each training sample is removed, shape (tests, training samples).

        Args:
            test: Samples, of any kind that an objective takes.
            train: Indices of training samples; all when None.
            order: 1, "newton" or "refit".
            measure: Takes outputs and targets, returns a value for each test sample, or one number for all;
                the training loss of each when None.
            steps: Chord steps after the Newton step, halved until they reduce the gradient.
            top_k: Keep only so many scores of each test, the largest in magnitude.
            out: Name of a ``.npy`` file that the scores go to, a block of tests after another (at other
                orders than 1 a training sample after another), with a map of what is done beside it,
                ``out + ".done"``. The same call goes on where one was stopped. The scores that are returned
                are read from the file when they are used.
            progress: Show a progress bar.

        Returns:
            An ``InfluenceResult``: units of the measure, positive means helpful where that is a loss.

        Cost: at order 1 one block of systems, and a derivative of the training outputs along the solutions;
        else a Newton step and a gradient over the data for each training sample, or a refit.
        """
        return table(self._base, test, train, Request(order, measure, steps, top_k, out, progress))

    def group(
        self,
        groups: Sequence[Iterable[int]],
        test: Any,
        *,
        order: Order = "newton",
        measure: Measure | None = None,
        steps: int = 0,
    ) -> InfluenceResult:
        """Changes when whole groups are removed, shape (tests, groups), by the curvature without them.

        At order 1 they are sums over the samples.
        """
        edits = removals(self._base, self._base.groups(groups))
        return edited(self._base, edits, torch.arange(len(edits), device="cpu"), test, order, measure, steps)

    def relabel(
        self,
        index: int,
        new_target: Any,
        test: Any,
        *,
        order: Order = "newton",
        measure: Measure | None = None,
    ) -> InfluenceResult:
        """Changes when a training sample gets another target, shape (tests, 1).

        Args:
            index: Of the training sample.
            new_target: Without the dimension of samples.
            test: Samples.
            order: As in ``scores``.
            measure: As in ``scores``.
        """
        (place,) = self._base.indices(index, "index")
        edit = relabelling(self._base, place, new_target)
        return edited(self._base, [edit], torch.tensor([place], device="cpu"), test, order, measure, 0)

    def reweight(
        self, index: int, weight: float, test: Any, *, order: Order = "newton", measure: Measure | None = None
    ) -> InfluenceResult:
        """Changes when a training sample's loss is multiplied by ``weight``, shape (tests, 1); 0 removes."""
        (place,) = self._base.indices(index, "index")
        if not weight >= 0:
            raise ValueError(f"weight must be non-negative, got {weight}.")
        batch = self._base.samples.pick([place])[place]
        edit = (Term(batch, (weight - 1) * self._base.share),)
        return edited(self._base, [edit], torch.tensor([place], device="cpu"), test, order, measure, 0)

    def parameters_without(
        self, indices: Iterable[int] | int, *, order: Order = "newton", steps: int = 0
    ) -> Moved:
        """Parameters, flat, after some samples are removed together, with status, leverage and indicator."""
        check_order_of(self._base, order, steps)
        (edit,) = removals(self._base, self._base.groups([self._base.indices(indices, "indices")]))
        return move(self._base, edit, order, steps)

    def loo_loss(
        self, train: Iterable[int] | None = None, *, order: Order = "newton", steps: int = 0
    ) -> LeaveOneOut:
        """The loss of each training sample by the parameters without it."""
        base = self._base
        check_order_of(base, order, steps, ("newton", "refit"))
        return leave_one_out(base, base.indices(train), order, steps)

    def self_influence(self, *, progress: bool = False) -> Tensor:
        """First order change of each training sample's own loss when it is removed, shape (samples,)."""
        self._base.check()
        return self_influence(self._base, progress)

    def top(self, test: Any, k: int = 10, *, harmful: bool = False, order: Order = 1) -> list[list[Row]]:
        """For each test sample its most helpful training samples, or the most harmful, as rows of a table."""
        result = self.scores(test, order=order)
        return [result.top(i, k, harmful=harmful) for i in range(len(result.scores))]

    def perturbation(self, test: Any, train: int, *, measure: Measure | None = None) -> Any:
        """Derivatives of the tests' values in the inputs of one training sample, after refitting.

        Returns:
            Shape (tests, ...) as one sample's inputs; for several inputs, in their container.
        """
        self._base.check()
        (index,) = self._base.indices(train)
        return perturbation(self._base, Tests(self._base, test, measure), index)

    def verify(
        self,
        test: Any,
        k: int = 20,
        *,
        order: Order = "newton",
        measure: Measure | None = None,
        steps: int = 0,
        seed: int = 0,
    ) -> Verification:
        """Predictions beside refits without ``k`` training samples: half the largest, half random."""
        if not (isinstance(k, int) and 2 <= k <= self._base.count):
            raise ValueError(f"k must be an integer from 2 to {self._base.count}, got {k!r}.")
        check_order_of(self._base, "refit", steps)
        first = self.scores(test, measure=measure).scores
        train = to_verify(first, k, seed)
        predicted = first[:, train]
        if order != 1:
            predicted = self.scores(test, train, order=order, measure=measure, steps=steps).scores
        return verified(self._base, Tests(self._base, test, measure), predicted, train)

    def __repr__(self) -> str:
        base = self._base
        return (
            f"Influence({len(base.point)} parameters, {base.count} samples, curvature={base.curvature!r}, "
            f"damping={base.inverse.damping:.3g}, solver={base.inverse.solver!r}, gradient_norm="
            f"{base.gradient_norm:.2g}, {'stationary' if base.is_stationary else 'not stationary'})"
        )
