"""Scores of every test and training sample: in memory, or in a file as large as the disk."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from secondorder.influence.base import Base
from secondorder.influence.edits import Moved, removals
from secondorder.influence.first_order import Tests, chosen, first_order, of_first_order
from secondorder.influence.inverse import Solved
from secondorder.influence.orders import Order, changes, check_order_of, measured, move, result_of
from secondorder.influence.result import TEXTS, InfluenceResult
from secondorder.influence.samples import Measure
from secondorder.influence.storage import Store, digest, digest_of_data

# Entries of the test gradients that are solved for at once, and rows: more share a pass over the data.
ROW_ENTRIES, ROWS = 2**25, 256


class Request(NamedTuple):
    """What is asked for: arguments of ``Influence.scores``."""

    order: Order
    measure: Measure | None
    steps: int
    top_k: int | None
    out: str | os.PathLike[str] | None
    progress: bool


def table(base: Base, test: Any, train: Iterable[int] | None, request: Request) -> InfluenceResult:
    """Changes of each test's measure when each training sample is removed."""
    order, top_k = request.order, request.top_k
    check_order_of(base, order, request.steps)
    if top_k is not None and not (isinstance(top_k, int) and top_k >= 1):
        raise ValueError(f"top_k must be a positive integer, got {top_k!r}.")
    if top_k is not None and request.out is not None:
        raise ValueError(f"top_k must be None with out, which holds all scores, got {top_k!r}.")
    indices = None if train is None else base.indices(train)
    tests = Tests(base, test, request.measure)
    if request.out is not None:
        return _stored(base, tests, base.indices(indices), request)
    if order == 1:
        return first_order(base, tests, indices, top_k, request.progress)
    names = base.indices(indices)
    edits = removals(base, [[i] for i in names])
    scores, found, solved = changes(base, edits, tests, order, steps=request.steps, progress=request.progress)
    result = result_of(base, scores, torch.tensor(names, device="cpu"), order, found, solved)
    if top_k is None:
        return result
    places = scores.abs().nan_to_num(-1).topk(min(top_k, len(names)), dim=1).indices
    return result._replace(scores=scores.gather(1, places), train=result.train[places])


def _stored(base: Base, tests: Tests, names: Sequence[int], request: Request) -> InfluenceResult:
    assert request.out is not None
    inverse, measure = base.inverse, request.measure
    options = (base.curvature, f"{inverse.damping:.6g}", inverse.solver, inverse.rtol, base.objective.l2)
    loss = base.objective.loss
    named = [getattr(each, "__qualname__", type(each).__qualname__) for each in (loss, measure)]
    about = {
        "parameters": digest([base.point]),
        "training data": digest_of_data(batch for _, batch in base.samples.walk()),
        "test data": digest_of_data(tests.batches),
        "training indices": digest([torch.tensor(names, device="cpu")]),
        "options": f"{options}, {base.objective.reduction}, {request.order}, {request.steps}, {named}",
    }
    shape = (len(tests.values), len(names))
    store = Store(request.out, shape, base.point.dtype, about, tests.values)
    by = _rows if request.order == 1 else _columns
    return by(base, tests, names, request, store)


def _rows(base: Base, tests: Tests, names: Sequence[int], request: Request, store: Store) -> InfluenceResult:
    """Blocks of rows, each with a pass over the training data by batches."""
    train, start = np.array(names), 0
    width = max(1, min(ROWS, ROW_ENTRIES // len(base.point)))
    bar = tqdm(
        total=len(tests.values), desc="influence", unit="test", leave=False, disable=not request.progress
    )
    with bar:
        for count, gradients in tests.blocks(width):
            if start not in store.done:
                solved = base.inverse.solve(gradients().T)
                for here, batch in chosen(base, names):
                    scores = (base.share * base.samples.derivatives(batch, solved.x)).T.cpu().numpy()
                    columns = np.flatnonzero(np.isin(train, here))
                    store.array[start : start + count, columns] = scores[
                        :, np.searchsorted(here, train[columns])
                    ]
                store.finish(start, status=solved.status, residual_norm=solved.residual_norm)
            start += count
            bar.update(count)
    notes, rank = store.done.values(), list(TEXTS)
    worst = max((note["status"] for note in notes), key=rank.index)
    residual = max(note["residual_norm"] for note in notes)
    solved = Solved(base.point[:0], worst, residual)
    return of_first_order(base, store.scores(), torch.tensor(names, device="cpu"), solved)


def _columns(
    base: Base, tests: Tests, names: Sequence[int], request: Request, store: Store
) -> InfluenceResult:
    """One training sample after another."""
    bar = tqdm(
        names, desc=f"influence ({request.order})", unit="point", leave=False, disable=not request.progress
    )
    for place, name in enumerate(bar):
        if place not in store.done:
            (edit,) = removals(base, [[name]])
            moved = move(base, edit, request.order, request.steps)
            change: Tensor = measured(base, moved, tests.measured) - tests.values
            store.array[:, place] = change.cpu().numpy()
            store.finish(place, moved=list(moved._replace(point=base.point[:0])[1:]))
    found = [Moved(base.point[:0], *store.done[place]["moved"]) for place in range(len(names))]
    return result_of(base, store.scores(), torch.tensor(names, device="cpu"), request.order, found, None)
