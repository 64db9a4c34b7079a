"""What influence functions return, and what can be believed of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from secondorder.solvers import STATUS_TEXT

# Beside those of the solvers.
TEXTS = {
    "converged": STATUS_TEXT["converged"],
    "approximate": "the inverse is an approximation by name; residual_norm says how far it is off",
    **STATUS_TEXT,
    "leverage": "without a sample the curvature is singular or indefinite: its leverage is 1 or more",
}
# A leverage above this makes the first order underestimate a change by more than a tenth.
HIGH_LEVERAGE = 0.1
# An indicator above this: the moved parameters have lost less than nine tenths of what the change pushes.
HIGH_INDICATOR = 0.1


class Row(NamedTuple):
    """One training sample's effect on one test sample.

    Attributes:
        test: Index of the test sample.
        train: Index of the training sample.
        change: Predicted change of the measure when the training sample is removed.
        leverage: Of the training sample; None at order 1.
        indicator: Of the prediction's error; None at order 1.
    """

    test: int
    train: int
    change: float
    leverage: float | None
    indicator: float | None


class InfluenceResult(NamedTuple):
    """Predicted changes of a measure, and how far they can be trusted.

    Attributes:
        scores: Shape (tests, training samples), in units of the measure. Entry ``[i, j]`` is the predicted
            change of the measure of test sample ``i`` when the term of training sample ``j`` leaves the
            objective, the others still weighted with ``1 / n`` (for a mean). Where the measure is a loss,
            positive means helpful. With ``top_k``, shape (tests, k), the largest in magnitude.
        status: "converged" when every system was solved, else the gravest status of one.
        residual_norm: Largest true residual of a system, relative to its right-hand side.
        order: "1", "newton" or "refit".
        train: Indices of the training samples, shape (training samples,); of groups, their numbers; with
            ``top_k``, shape (tests, k).
        gradient_norm: Of the objective at the parameters; zero at a minimiser.
        is_stationary: Whether that is small beside the push of removing one sample.
        damping: Shift of the curvature that was used.
        leverage: Of each training sample, shape (training samples,); None at order 1.
        indicator: ``norm(grad R) / norm(push)`` of each: what is left of the push of removing a sample at
            the parameters predicted without it; zero is exact. None at order 1.
        statuses: Of each training sample; empty at order 1.
    """

    scores: Tensor
    status: str
    residual_norm: float
    order: str = "1"
    train: Tensor = torch.zeros(0, dtype=torch.long, device="cpu")
    gradient_norm: float = 0.0
    is_stationary: bool = True
    damping: float = 0.0
    leverage: Tensor | None = None
    indicator: Tensor | None = None
    statuses: tuple[str, ...] = ()

    @property
    def message(self) -> str:
        """One sentence on ``status``: the cause, and the remedy where there is one."""
        if self.status == "negative_curvature":
            return "the parameters are not a minimiser; use curvature='ggn', or more damping"
        return TEXTS[self.status]

    def summary(self) -> str:
        """A sentence on what can be believed."""
        doubts = [] if self.status == "converged" else [f"{self.status}: {self.message}"]
        if not self.is_stationary:
            doubts.append(f"the parameters are not stationary (gradient norm {self.gradient_norm:.2g})")
        if self.order == "1":
            doubts.append("first order: ranks more than sizes, too small where leverage is high")
        if self.leverage is not None and self.order != "refit":
            high = int((self.leverage > HIGH_LEVERAGE).sum())
            doubts += (
                [f"{high} of {len(self.leverage)} have a leverage above {HIGH_LEVERAGE}"] if high else []
            )
        if self.indicator is not None and len(self.indicator):
            high = int((~(self.indicator <= HIGH_INDICATOR)).sum())
            middle = float(self.indicator.median())
            doubts.append(
                f"indicator {middle:.2g} at the median, above {HIGH_INDICATOR} for {high} of"
                f" {len(self.indicator)}"
            )
        return "; ".join(doubts) + "."

    def top(self, test: int, k: int = 10, *, harmful: bool = False) -> list[Row]:
        """The most helpful training samples of a test sample; or the most harmful, most harmful first.

        Raises:
            ValueError: ``test`` is out of range, or ``k`` negative.
        """
        count = len(self.scores)
        if not (isinstance(test, int) and 0 <= test < count):
            raise ValueError(f"test must be an index below {count}, got {test!r}.")
        if not (isinstance(k, int) and k >= 0):
            raise ValueError(f"k must be a non-negative integer, got {k!r}.")
        scores, names = self.scores[test], self.train if self.train.ndim == 1 else self.train[test]
        order = torch.argsort(scores, descending=not harmful)[:k].tolist()

        def entry(of: Tensor | None, j: int) -> float | None:
            return None if of is None or self.train.ndim > 1 else float(of[j])

        return [
            Row(test, int(names[j]), float(scores[j]), entry(self.leverage, j), entry(self.indicator, j))
            for j in order
        ]

    def lds(self, subsets: Sequence[Sequence[int]], retrained: Tensor) -> Tensor:
        """Linear datamodeling score of each test sample, shape (tests,).

        Spearman's correlation, over subsets, between the measure after training on the subset and minus
        the sum of the changes of what the subset leaves out.

        Args:
            subsets: For each run, indices of the training samples it was trained on.
            retrained: The measure of each test sample after each run, shape (runs, tests).

        Raises:
            ValueError: shapes do not fit, or there are fewer than two subsets.

        Reference: Park et al. (2023), TRAK: attributing model behavior at scale, section 2.
        """
        runs = len(subsets)
        if runs < 2 or retrained.shape != (runs, len(self.scores)) or self.train.ndim != 1:
            raise ValueError(
                f"retrained must have shape (subsets, tests) = {(runs, len(self.scores))}, with two subsets"
                f" or more and scores of all samples, got {tuple(retrained.shape)}."
            )
        kept = torch.stack(
            [torch.isin(self.train, torch.as_tensor(subset, device=self.train.device)) for subset in subsets]
        )
        predicted = (~kept).to(self.scores) @ self.scores.T
        columns = zip(predicted.unbind(1), retrained.unbind(1), strict=True)
        return torch.stack([pearson(ranks(p), ranks(r)) for p, r in columns])

    def __repr__(self) -> str:
        finite = self.scores[self.scores.isfinite()]
        span = f"{float(finite.min()):.3g} to {float(finite.max()):.3g}" if finite.numel() else "none finite"
        return (
            f"InfluenceResult(order={self.order!r}, status={self.status!r}, scores="
            f"{tuple(self.scores.shape)}, {span}: change when a sample is removed, others weighted 1/n;"
            f" positive is helpful for a loss; residual_norm={self.residual_norm:.2g}, gradient_norm="
            f"{self.gradient_norm:.2g}, damping={self.damping:.2g}. {self.summary()})"
        )


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of two vectors; NaN where one is constant."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    return (a * b).sum() / (a.norm() * b.norm())


def ranks(values: Tensor) -> Tensor:
    """Of each entry, the mean over equal ones."""
    _, places, counts = torch.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts.double() - 1) / 2)[places]
