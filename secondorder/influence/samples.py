"""Single samples of an objective: where they lie, their losses, and the derivatives of these."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from secondorder.autodiff import ladder
from secondorder.autodiff.backward import pull, pull_rows
from secondorder.data.batches import Batch, call, count_samples
from secondorder.data.objective import Objective
from secondorder.operators.parameters import Jacobian
from secondorder.vectors.flat import flatten, flatten_rows, unflatten

# Entries of a block of derivatives of outputs that are held at once.
ENTRIES = 2**25
# Samples whose gradients are taken in one batched backward pass: each costs a pass over all of them.
TOGETHER = 32

Measure = Callable[[Any, Any], Tensor]


def check_order(data: Any) -> None:
    """Raise where the index of a sample would not be its index in the data set."""
    if not isinstance(data, DataLoader) or isinstance(data.dataset, IterableDataset):
        return
    batches = data.batch_sampler
    own = batches is not None and not isinstance(batches, BatchSampler | list | tuple)
    sampler = batches if own else getattr(batches, "sampler", data.sampler)
    if isinstance(batches, list | tuple) or isinstance(sampler, SequentialSampler):
        return
    raise ValueError(
        f"data must come in a fixed order, got a DataLoader with a {type(sampler).__name__}; samples are"
        " named by their index, so use shuffle=False or pass the Dataset."
    )


def take(batch: Batch, indices: Sequence[int]) -> Batch:
    """Some samples of a batch, a copy."""
    n = count_samples(batch)

    def chosen(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == n:
            return leaf[list(indices)]
        return [leaf[i] for i in indices] if _is_list(leaf) and len(leaf) == n else leaf

    found: Batch = pytree.tree_map(chosen, tuple(batch), is_leaf=_is_list)
    return found


def join(batches: Sequence[Batch]) -> list[Batch]:
    """As one batch, where they fit together; as they are where not, as sequences of several lengths."""
    flat = [pytree.tree_flatten(batch, is_leaf=_is_list) for batch in batches]
    leaves = list(zip(*(found for found, _ in flat), strict=False))
    fits = all(spec == flat[0][1] for _, spec in flat) and all(map(_can_be_joined, leaves))
    if len(batches) < 2 or not fits:
        return list(batches)
    joined = [
        torch.cat(parts) if isinstance(parts[0], Tensor) else [item for part in parts for item in part]
        for parts in leaves
    ]
    whole: Batch = pytree.tree_unflatten(joined, flat[0][1])
    return [whole]


def _can_be_joined(parts: Sequence[Any]) -> bool:
    if all(isinstance(part, Tensor) and part.ndim for part in parts):
        return len({(part.shape[1:], part.dtype) for part in parts}) == 1
    return all(map(_is_list, parts))


def _is_list(value: Any) -> bool:
    """Whether this is a list that holds no tensor, such as the names of the samples."""
    return isinstance(value, list) and not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


class Linear(NamedTuple):
    """The network near the present parameters, for the samples of a batch.

    Attributes:
        jacobian: Of all outputs, in the order of ``parts``.
        parts: The outputs, each with the samples in its first dimension.
        slopes: Derivatives of the samples' losses with respect to their outputs, shaped like ``parts``.
    """

    jacobian: Jacobian
    parts: list[Tensor]
    slopes: list[Tensor]

    def derivatives(self, X: Tensor) -> Tensor:
        """Of the samples' losses along the columns of ``X``, shape (samples, k)."""
        n, width = len(self.parts[0]), max(1, ENTRIES // self.jacobian.shape[0])
        found = []
        for columns in X.split(width, dim=1):
            blocks = (self.jacobian @ columns).split([part.numel() for part in self.parts])
            pairs = zip(blocks, self.slopes, strict=True)
            found.append(
                torch.stack([torch.einsum("nek,ne->nk", b.view(n, -1, b.shape[1]), s.reshape(n, -1).to(b))
                             for b, s in pairs]).sum(0)
            )  # fmt: skip
        return torch.cat(found, dim=1)


class Samples:
    """Per-sample work on a model and a loss.

    Args:
        objective: Its model, loss, parameters and reduction.

    Attributes:
        ladder: Remembers by what means operations of the model have second derivatives.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective, self._parameters = objective, objective.parameters
        self.ladder = ladder.Ladder()

    def walk(self) -> Generator[tuple[int, Batch], None, None]:
        """The batches of the training data, each with the index of its first sample."""
        start = 0
        with contextlib.closing(self._objective.passes.walk("influence")) as batches:
            for batch in batches:
                yield start, batch
                start += count_samples(batch)

    def count(self) -> int:
        """How many samples the data holds."""
        return sum(count_samples(batch) for _, batch in self.walk())

    def pick(self, indices: Sequence[int]) -> dict[int, Batch]:
        """Samples as batches of one each, in one pass over the data."""
        wanted, found = set(indices), dict[int, Batch]()
        with contextlib.closing(self.walk()) as batches:
            for start, batch in batches:
                here = range(start, start + count_samples(batch))
                found.update({i: take(batch, [i - start]) for i in sorted(wanted.intersection(here))})
                if len(found) == len(wanted):
                    break
        return found

    def loss(self, batch: Batch) -> Tensor:
        """The sum of the samples' losses, in the graph."""
        outputs = call(self._objective.model, batch[0])
        return self._objective.loss(outputs, batch[1]) * self._objective.passes.weight(count_samples(batch))

    def losses(self, batch: Batch) -> Tensor:
        """Each sample's loss, shape (samples,), in the graph."""
        outputs = call(self._objective.model, batch[0])
        n = count_samples(batch)
        parts = pytree.tree_leaves(outputs, is_leaf=_is_list)
        if all(isinstance(part, Tensor) and part.ndim and len(part) == n for part in parts):
            values = [self._objective.loss(*take((outputs, batch[1]), [i])) for i in range(n)]
        else:
            values = [self.loss(take(batch, [i])) for i in range(n)]
        return torch.stack([value.reshape(()) for value in values])

    def linear(self, batch: Batch) -> Linear | None:
        """None where outputs are not tensors with samples in their first dimension, or have no Jacobian."""
        n = count_samples(batch)

        def build() -> Linear | None:
            outputs = call(self._objective.model, batch[0])
            parts = pytree.tree_leaves(outputs)
            if not all(isinstance(part, Tensor) and part.ndim and len(part) == n for part in parts):
                return None
            parts = [part for part in parts if part.requires_grad]
            value = self._objective.loss(outputs, batch[1]) * self._objective.passes.weight(
                count_samples(batch)
            )
            slopes = [slope.detach() for slope in pull([value], parts, [torch.ones_like(value)])]
            jacobian = Jacobian(parts, self._parameters)
            jacobian @ torch.zeros(jacobian.shape[1], dtype=jacobian.dtype, device=jacobian.device)
            return Linear(jacobian, parts, slopes)

        with torch.enable_grad():
            try:
                return self.ladder.climb(build)
            except RuntimeError:
                # A custom Function whose backward pass cannot be differentiated: each gradient by itself
                # needs none of that.
                return None

    def derivatives(self, batch: Batch, X: Tensor) -> Tensor:
        """Of the samples' losses along the columns of ``X``, shape (samples, k)."""
        linear = self.linear(batch)
        return self.gradients(batch) @ X if linear is None else linear.derivatives(X)

    def gradients(self, batch: Batch, measure: Measure | None = None) -> Tensor:
        """Gradients of the samples' losses, or of a measure of outputs and targets: shape (k, n)."""
        n, rows = count_samples(batch), []
        if measure is not None:
            with torch.enable_grad():
                return self.ladder.climb(lambda: self._rows(self.measured(batch, measure)))
        for start in range(0, n, TOGETHER):
            some = take(batch, range(start, min(n, start + TOGETHER)))
            with torch.enable_grad():
                rows.append(self.ladder.climb(lambda: self._rows(self.losses(some))))  # noqa: B023
        return torch.cat(rows)

    def gradient(self, batch: Batch) -> Tensor:
        """Of the sum of the samples' losses, flat."""
        with torch.enable_grad():
            return self.ladder.climb(lambda: self._rows(self.loss(batch).reshape(1)))[0]

    def measured(self, batch: Batch, measure: Measure | None) -> Tensor:
        """What a measure gives for a batch, shape (k,): one value a sample, or one in all."""
        if measure is None:
            return self.losses(batch)
        values = measure(call(self._objective.model, batch[0]), batch[1])
        if (
            not isinstance(values, Tensor)
            or values.ndim > 1
            or values.numel() not in (1, count_samples(batch))
        ):
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"measure must return one number, or one for each of {count_samples(batch)} samples, got"
                f" {got}."
            )
        return values.reshape(-1)

    def _rows(self, values: Tensor) -> Tensor:
        eye = torch.eye(len(values), dtype=values.dtype, device=values.device)
        if not values.requires_grad:
            raise ValueError("measure must be differentiable in the outputs, but its value carries no graph.")
        return flatten_rows(pull_rows([values], self._parameters, [eye])).detach()


@contextlib.contextmanager
def at(parameters: Sequence[Tensor], point: Tensor) -> Iterator[None]:
    """The parameters hold ``point``, a flat vector; afterwards what they held, bit for bit."""
    before = [p.detach().clone() for p in parameters]
    try:
        # By their data: no version changes, and what was computed before stays valid.
        for p, part in zip(parameters, unflatten(point, parameters), strict=True):
            p.data.copy_(part)
        yield
    finally:
        for p, part in zip(parameters, before, strict=True):
            p.data.copy_(part)


def point_of(parameters: Sequence[Tensor]) -> Tensor:
    """What they hold, flat."""
    return flatten([p.detach() for p in parameters]).clone()
