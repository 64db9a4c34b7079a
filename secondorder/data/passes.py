"""Passes over the batches of a dataset: a model's loss of each, an operator of each, the sum over them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor, nn

from secondorder.autodiff import ladder
from secondorder.autodiff.guard import RandomState
from secondorder.data.batches import Batch, Batches, call, check_deterministic, count_samples
from secondorder.data.reduction import ReductionCheck
from secondorder.operators.parameters import ParameterOperator, tried

Loss = Callable[[Any, Any], Tensor]
Build = Callable[[Batch, int], ParameterOperator]


class Passes:
    """What an objective knows of its data.

    Args:
        model: Takes a batch's inputs.
        loss: Takes outputs and targets of a batch.
        batches: The same in every pass.
        reduction: "mean" or "sum", of ``loss`` and over the data.
        progress: Show a progress bar for each pass.

    Attributes:
        is_checked: Whether a whole pass has found nothing wrong with model and loss.
    """

    def __init__(
        self, model: nn.Module, loss: Loss, batches: Batches, reduction: str, progress: bool
    ) -> None:
        self._model, self._loss, self._batches = model, loss, batches
        self._is_mean, self._progress = reduction == "mean", progress
        self._ladder = ladder.Ladder()
        self._reduction_check = ReductionCheck(loss, functools.partial(call, model), reduction)
        self.is_checked = False

    def loss(self, batch: Batch) -> tuple[Tensor, Any]:
        """Loss and outputs of a batch; in the first pass they are looked at more closely."""
        if self.is_checked:
            outputs = call(self._model, batch[0])
            return self._loss(outputs, batch[1]), outputs
        outputs = _checked_call(self._model, batch[0])
        value = self._loss(outputs, batch[1])
        self._reduction_check.look_at(value, outputs, batch)
        return value, outputs

    def weight(self, samples: int) -> int:
        """That of a batch in a sum over batches, a mean being weighted with the batch's size."""
        return samples if self._is_mean else 1

    def reduced(self, total: Tensor, samples: int) -> Tensor:
        """The end of a pass: the weighted sum over batches, as a mean or a sum over the samples."""
        if not samples:
            raise ValueError("data must hold at least one sample, got none.")
        self.is_checked = True
        return total / samples if self._is_mean else total

    def reduce(self, name: str, on_batch: Callable[[Batch], Tensor]) -> Tensor:
        """The mean or sum over all samples of what ``on_batch`` gives for those of a batch."""
        total: Any = None
        samples = 0
        # Closed at once, also after an exception: it is then that the random state comes back.
        with contextlib.closing(self.walk(name)) as batches:
            for batch in batches:
                n = count_samples(batch)
                part = on_batch(batch) * self.weight(n)
                total = part if total is None else total + part
                samples += n
        return self.reduced(total, samples)

    def operators(self, name: str, build: Build) -> Generator[tuple[ParameterOperator, int], None, None]:
        """The operator of each batch, with the number of its samples; to be closed."""
        with contextlib.closing(self.walk(name)) as batches:
            for index, batch in enumerate(batches):
                with torch.enable_grad():
                    built = [self._ladder.climb(lambda: tried(build(batch, index)))]  # noqa: B023
                # Nothing here holds on to its graph.
                yield built.pop(), count_samples(batch)

    def walk(self, name: str) -> Generator[Batch, None, None]:
        """One pass over the batches, with a model that may have changed its mode since."""
        check_deterministic(self._model)
        with contextlib.closing(self._batches.walk(name if self._progress else None)) as batches:
            for batch in batches:
                if count_samples(batch):
                    yield batch


def _checked_call(model: nn.Module, inputs: Any) -> Any:
    """``model(inputs)``; raises where that draws random numbers or writes to a buffer."""
    random = RandomState()
    random.save()
    versions = {name: buffer._version for name, buffer in model.named_buffers()}
    outputs = call(model, inputs)
    for name, buffer in model.named_buffers():
        if buffer._version != versions.get(name, buffer._version):
            raise ValueError(
                f"model must not write to its buffers, {name!r} has changed; call model.eval() first."
            )
    if random.has_moved():
        raise ValueError("model must not draw random numbers in its forward pass; call model.eval() first.")
    return outputs
