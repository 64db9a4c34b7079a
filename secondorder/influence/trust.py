"""Predicted changes beside those of real refits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from secondorder.influence.base import Base
from secondorder.influence.edits import removals
from secondorder.influence.first_order import Tests
from secondorder.influence.orders import changes
from secondorder.influence.result import pearson, ranks


class Verification(NamedTuple):
    """How predictions for some training samples agree with refits.

    Attributes:
        train: Indices of these samples, shape (k,): the larger half those with the largest predictions of
            first order, the others random.
        predicted: Changes of the tests' values, shape (tests, k).
        actual: After refits, shape (tests, k).
        pearson: Correlation over all entries.
        spearman: Of their ranks.
        slope: Least squares of actual on predicted, through zero; 1 where sizes are right.
        relative_error: ``norm(predicted - actual, 1) / norm(actual, 1)``.
        statuses: Of the refits.
    """

    train: Tensor
    predicted: Tensor
    actual: Tensor
    pearson: float
    spearman: float
    slope: float
    relative_error: float
    statuses: tuple[str, ...]

    def __repr__(self) -> str:
        failed = sum(status not in ("converged", "stagnated") for status in self.statuses)
        note = f", {failed} refits have not converged" if failed else ""
        return (
            f"Verification({len(self.train)} refits, pearson={self.pearson:.3f}, spearman="
            f"{self.spearman:.3f}, slope={self.slope:.3f}, relative_error={self.relative_error:.3f}{note})"
        )


def to_verify(scores: Tensor, k: int, seed: int) -> list[int]:
    """``k`` training samples: half with the largest scores of any test, half random."""
    n = scores.shape[1]
    largest = scores.abs().amax(0).topk(min(n, (k + 1) // 2)).indices.tolist()
    generator = torch.Generator("cpu").manual_seed(seed)
    rest = [i for i in torch.randperm(n, generator=generator, device="cpu").tolist() if i not in set(largest)]
    return [*largest, *rest[: max(0, k - len(largest))]]


def verified(base: Base, tests: Tests, predicted: Tensor, train: Sequence[int]) -> Verification:
    """Refit without each of some training samples, and compare."""
    actual, found, _ = changes(base, removals(base, [[i] for i in train]), tests, "refit")
    p, a = predicted.flatten().double(), actual.flatten().double()
    tiny = torch.finfo(a.dtype).tiny
    return Verification(
        torch.tensor(list(train), device="cpu"),
        predicted,
        actual,
        float(pearson(p, a)),
        float(pearson(ranks(p), ranks(a))),
        float(p @ a / p.square().sum().clamp_min(tiny)),
        float((p - a).abs().sum() / a.abs().sum().clamp_min(tiny)),
        tuple(moved.status for moved in found),
    )
