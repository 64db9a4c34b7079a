"""Whether the loss of a batch is the mean, or sum, of the losses of its samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from secondorder.data.batches import Batch, count_samples

# Outputs and targets; or inputs and targets.
Samples = tuple[Any, Any]


class ReductionCheck:
    """Compares losses of batches with those of their parts, in one pass over the data.

    Each batch is cut into halves, and joined with the last sample of the batch before: it may hold one
    sample, or one class. Tensors in any containers are cut in their first dimension; where outputs hold
    something else, the model is called on parts of the inputs. What has no such dimension is not looked at.

    Args:
        loss: Takes outputs and targets.
        model: Takes inputs, returns outputs.
        reduction: "mean" or "sum".
    """

    def __init__(
        self, loss: Callable[[Any, Any], Tensor], model: Callable[[Any], Any], reduction: str
    ) -> None:
        self._loss, self._model, self._reduction = loss, model, reduction
        self._before: Samples | None = None

    def look_at(self, value: Tensor, outputs: Any, batch: Batch) -> None:
        """Look at the loss of the next batch.

        Raises:
            ValueError: it is not a scalar, or not the mean (or sum) of the losses of the parts.
        """
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss must return a scalar tensor, got {got}; reduce it over the batch.")
        n, (inputs, targets) = count_samples(batch), batch
        samples, loss = (outputs, targets), self._loss
        if not _can_be_cut(samples, n):
            samples, loss = (inputs, targets), self._loss_of_inputs
        before, self._before = self._before, None
        if not _can_be_cut(samples, n):
            return
        shapes = f"a batch (outputs {_shapes(outputs)}, targets {_shapes(targets)})"
        with torch.no_grad():
            if n > 1:
                halves = _cut(samples, 0, n // 2), _cut(samples, n // 2, n)
                values = [loss(*half) for half in halves]
                self._compare(value, values, (n // 2, n - n // 2), f"{shapes} whose halves give")
            joined = None if before is None else _joined(before, samples)
            if before is not None and joined is not None:
                what = f"{shapes} and the sample before it, which give"
                self._compare(loss(*joined), [loss(*before), value], (1, n), what)
            # A copy, not a view that keeps all of the batch.
            self._before = pytree.tree_map_only(Tensor, torch.clone, _cut(samples, n - 1, n))

    def _loss_of_inputs(self, inputs: Any, targets: Any) -> Tensor:
        return self._loss(self._model(inputs), targets)

    def _compare(self, whole: Tensor, parts: Sequence[Tensor], sizes: tuple[int, int], what: str) -> None:
        is_mean = self._reduction == "mean"
        weights = [size / sum(sizes) if is_mean else 1.0 for size in sizes]
        value, first, second = (float(v.detach()) for v in (whole, *parts))
        apart = weights[0] * first + weights[1] * second
        if not math.isfinite(value):
            return
        # Far above rounding, far below any real difference. A mean over ignored targets alone is NaN.
        if not abs(value - apart) <= torch.finfo(whole.dtype).eps ** 0.5 * (abs(first) + abs(second)):
            raise ValueError(
                f"loss must be the {self._reduction} over the samples of a batch, got {value:.6g} for {what}"
                f" {apart:.6g}; mind the shapes, drop class weights and ignored targets, or use"
                " reduction='sum'."
            )


def _can_be_cut(samples: Samples, n: int) -> bool:
    """Whether there are tensors with ``n`` rows, lists of ``n``, and constants: numbers and counts."""
    leaves = pytree.tree_leaves(samples, is_leaf=_is_list)
    tensors = [
        leaf for leaf in leaves if isinstance(leaf, Tensor) and (leaf.ndim or leaf.is_floating_point())
    ]
    others = [leaf for leaf in leaves if not isinstance(leaf, Tensor | int | float | str | None)]
    are_lists = all(_is_list(other) and len(other) == n for other in others)
    return bool(tensors) and are_lists and all(t.ndim and len(t) == n for t in tensors)


def _is_list(value: Any) -> bool:
    """Whether this is a list that holds no tensor, such as the names of the samples."""
    return isinstance(value, list) and not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def _has_samples(leaf: Any) -> bool:
    return leaf.ndim > 0 if isinstance(leaf, Tensor) else _is_list(leaf)


def _cut(samples: Samples, start: int, end: int) -> Samples:
    def cut(leaf: Any) -> Any:
        return leaf[start:end] if _has_samples(leaf) else leaf

    found: Samples = pytree.tree_map(cut, samples, is_leaf=_is_list)
    return found


def _joined(first: Samples, second: Samples) -> Samples | None:
    """One batch of both; None where they do not fit, as sequences of different lengths."""
    (ours, spec), (theirs, other) = (pytree.tree_flatten(x, is_leaf=_is_list) for x in (first, second))
    if spec != other:
        return None
    leaves: list[Any] = []
    for a, b in zip(ours, theirs, strict=True):
        if not (_has_samples(a) and _has_samples(b)):
            # What is no sample is that of the second: how many there are, for one.
            leaves.append(b)
        elif isinstance(a, list) and isinstance(b, list):
            leaves.append(a + b)
        elif isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape[1:] == b.shape[1:]:
            leaves.append(torch.cat([a, b]))
        else:
            return None
    joined: Samples = pytree.tree_unflatten(leaves, spec)
    return joined


def _shapes(value: Any) -> Any:
    """With shapes in the place of tensors, and the kind of what is neither tensor nor number."""

    def short(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return tuple(leaf.shape)
        return leaf if isinstance(leaf, int | float | str | None) else type(leaf).__name__

    return pytree.tree_map(short, value)
