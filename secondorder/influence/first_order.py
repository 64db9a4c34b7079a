"""Scores of first order: ``g_test^T (B + damping I)^-1 g_train``.

Reference: Koh and Liang (2017), Understanding black-box predictions via influence functions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from secondorder.data.batches import Batch, count_samples
from secondorder.influence.base import Base
from secondorder.influence.inverse import Solved
from secondorder.influence.result import InfluenceResult
from secondorder.influence.samples import TOGETHER, Measure, join, take


class Tests:
    """Test samples and what is measured of them.

    Args:
        base: Gives the model and the loss.
        data: Of any kind that an objective takes.
        measure: Takes outputs and targets; the loss of each sample when None.

    Attributes:
        batches: The samples.
        values: At the base point, shape (values,): one a sample, or one in all.
    """

    def __init__(self, base: Base, data: Any, measure: Measure | None) -> None:
        self._samples, self._measure = base.samples, measure
        self.batches = base.batches(data)
        if measure is not None:
            self.batches = join(self.batches)
        self.values = self.measured()
        if not bool(self.values.isfinite().all()):
            raise ValueError("test must give finite values of the measure, got NaN or infinity.")

    def measured(self) -> Tensor:
        """At the present parameters."""
        with torch.no_grad():
            return torch.cat([self._samples.measured(batch, self._measure) for batch in self.batches])

    def gradients(self) -> Tensor:
        """Of the values, shape (values, n)."""
        return torch.cat(list(map(self._gradients, self.batches)))

    def blocks(self, width: int) -> Iterator[tuple[int, Callable[[], Tensor]]]:
        """At most so many values at once: their number, and what gives their gradients."""
        for batch in self.batches:
            for piece in self._cut(batch, width):
                count = count_samples(piece) if self._is_by_sample else 1
                yield count, functools.partial(self._gradients, piece)

    @property
    def _is_by_sample(self) -> bool:
        return self._measure is None or len(self.values) == sum(map(count_samples, self.batches))

    def _gradients(self, batch: Batch) -> Tensor:
        pieces = self._cut(batch, TOGETHER)
        return torch.cat([self._samples.gradients(piece, self._measure) for piece in pieces])

    def _cut(self, batch: Batch, width: int) -> Iterator[Batch]:
        n = count_samples(batch)
        if not self._is_by_sample:
            yield batch
            return
        for start in range(0, n, width):
            yield take(batch, range(start, min(n, start + width)))


def chosen(
    base: Base, train: Sequence[int] | None, progress: bool = False
) -> Iterator[tuple[list[int], Batch]]:
    """Batches of the chosen training samples, with their indices, in ascending order."""
    wanted = None if train is None else set(train)
    bar = tqdm(total=base.count, desc="influence", unit="sample", leave=False, disable=not progress)
    with bar:
        for start, batch in base.samples.walk():
            n = count_samples(batch)
            here = [i for i in range(start, start + n) if wanted is None or i in wanted]
            if len(here) == n:
                yield here, batch
            elif here:
                yield here, take(batch, [i - start for i in here])
            bar.update(n)


def first_order(
    base: Base, tests: Tests, train: Sequence[int] | None, top_k: int | None, progress: bool
) -> InfluenceResult:
    """Scores of all tests; of the ``top_k`` largest in magnitude, without the others in memory."""
    solved = base.inverse.solve(tests.gradients().T)
    found: list[tuple[Tensor, Tensor]] = []
    for here, batch in chosen(base, train, progress):
        scores = (base.share * base.samples.derivatives(batch, solved.x)).T
        names = torch.tensor(here, device=scores.device)
        if top_k is not None:
            found = [_largest([*found, (scores, names.expand_as(scores))], top_k)]
        else:
            found.append((scores, names))
    if top_k is not None:
        scores, names = found[0]
    else:
        scores, names = (torch.cat(parts, dim=-1) for parts in zip(*found, strict=True))
        if train is not None and list(train) != names.tolist():
            places = {index: place for place, index in enumerate(names.tolist())}
            order = [places[index] for index in train]
            scores, names = scores[:, order], names[order]
    return of_first_order(base, scores, names, solved)


def of_first_order(base: Base, scores: Tensor, names: Tensor, solved: Solved) -> InfluenceResult:
    """The result of these scores."""
    return InfluenceResult(
        scores,
        solved.status,
        solved.residual_norm,
        train=names,
        gradient_norm=base.gradient_norm,
        is_stationary=base.is_stationary,
        damping=base.inverse.damping,
    )


def self_influence(base: Base, progress: bool = False) -> Tensor:
    """``share g_i^T (B + damping I)^-1 g_i`` of every training sample, shape (samples,)."""
    found = []
    for _, batch in chosen(base, None, progress):
        for start in range(0, count_samples(batch), 8 * TOGETHER):
            cut = range(start, min(count_samples(batch), start + 8 * TOGETHER))
            gradients = base.samples.gradients(take(batch, cut))
            found.append((gradients.T * base.inverse.solve(gradients.T).x).sum(0))
    return base.share * torch.cat(found)


def _largest(found: Sequence[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    scores, names = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    places = scores.abs().topk(min(k, scores.shape[1]), dim=1).indices
    return scores.gather(1, places), names.gather(1, places)
