"""A dataset as batches, the same in every pass; and what a model must not do to them."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Generator, Iterable, Iterator, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from secondorder.autodiff.guard import RandomState

Batch = tuple[Any, Any]


class Batches:
    """Pairs ``(inputs, targets)`` on one device, in the same order in every pass.

    A pass starts from the random state at construction (torch's, NumPy's, Python's and the loader's), so that
    shuffling and augmentation repeat themselves, and leaves that of the caller as it was.

    Args:
        data: A pair (inputs, targets) of a tensor, or a tuple or dict of tensors, and a tensor; a Dataset of
            pairs; a DataLoader or another collection of batches, each a pair.
        batch_size: Of the batches that tensors and Datasets are cut into.
        device: Where batches are moved to.
    """

    def __init__(self, data: Any, batch_size: int, device: torch.device) -> None:
        if not (isinstance(batch_size, int) and batch_size >= 1):
            raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}.")
        self._device = device
        self._source = _source(data, batch_size)
        self._random = _Randomness(self._source)

    def walk(self, description: str | None = None) -> Generator[Batch, None, None]:
        """One pass, to be closed; with a description, under a progress bar."""
        bar = tqdm(self._source, desc=description, unit="batch", leave=False, disable=description is None)
        with self._random.replayed(), bar:
            for index, batch in enumerate(bar):
                if not isinstance(batch, list | tuple) or len(batch) != 2:
                    size = f" of {len(batch)}" if isinstance(batch, list | tuple) else ""
                    raise TypeError(
                        f"data must give pairs (inputs, targets), got a {type(batch).__name__}{size} as batch"
                        f" {index}."
                    )
                yield _moved(batch[0], self._device), _moved(batch[1], self._device)


class _Randomness:
    """All that loading may draw from, as it was at construction."""

    def __init__(self, source: Any) -> None:
        samplers = [getattr(source, "sampler", None), getattr(source, "batch_sampler", None)]
        samplers += [getattr(sampler, "sampler", None) for sampler in samplers]
        found = (getattr(owner, "generator", None) for owner in (source, *samplers))
        self._generators = list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())
        self._torch = RandomState()
        self._torch.save()
        self._others = self._read()

    def _read(self) -> tuple[Any, ...]:
        states = [generator.get_state() for generator in self._generators]
        return states, random.getstate(), np.random.get_state()  # noqa: NPY002 - what augmentations draw from

    def _write(self, others: tuple[Any, ...]) -> None:
        for generator, state in zip(self._generators, others[0], strict=True):
            generator.set_state(state)
        random.setstate(others[1])
        np.random.set_state(others[2])  # noqa: NPY002

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """Start from there; afterwards the present states are back."""
        present = self._read()
        try:
            self._write(self._others)
            with self._torch.replayed():
                yield
        finally:
            self._write(present)


def _source(data: Any, batch_size: int) -> Iterable[Any]:
    """Something that gives the batches as often as it is asked."""
    if isinstance(data, DataLoader):
        if data.drop_last or getattr(data.batch_sampler, "drop_last", False):
            raise ValueError("data must not leave samples out, got a DataLoader with drop_last=True.")
        return data
    source: Any = data
    if _is_pair(data):
        source = data = _pieces(data[0], data[1], batch_size)
    elif isinstance(data, Dataset):
        # Its own generator: the one of the caller is not touched.
        source = DataLoader(data, batch_size, generator=torch.Generator())
    elif not isinstance(data, Iterable) or isinstance(data, Iterator):
        raise TypeError(
            "data must be a pair of tensors, a Dataset, a DataLoader or a list of batches, got"
            f" {type(data).__name__}; it is walked once for each product."
        )
    if isinstance(data, Sized) and not len(data):
        raise ValueError("data must hold at least one sample, got none.")
    return source


def _pieces(inputs: Any, targets: Tensor, batch_size: int) -> list[Batch]:
    shapes = [tuple(t.shape) for t in _leaves(inputs)]
    if not targets.ndim or any(not shape or shape[0] != len(targets) for shape in shapes):
        raise ValueError(
            "data must hold as many inputs as targets, got inputs of shape"
            f" {', '.join(map(str, shapes))} and targets of shape {tuple(targets.shape)}."
        )
    cuts = [slice(start, start + batch_size) for start in range(0, len(targets), batch_size)]
    return [(_cut(inputs, cut), targets[cut]) for cut in cuts]


def _is_pair(data: Any) -> bool:
    """Whether this is inputs and targets of all samples, not a list of two batches."""
    if not isinstance(data, list | tuple) or len(data) != 2 or not isinstance(data[1], Tensor):
        return False
    return all(isinstance(leaf, Tensor) for leaf in _leaves(data[0]))


def _cut(inputs: Any, cut: slice) -> Any:
    """Some of the samples."""
    if isinstance(inputs, dict):
        return {key: value[cut] for key, value in inputs.items()}
    return inputs[cut] if isinstance(inputs, Tensor) else tuple(value[cut] for value in inputs)


def _moved(value: Any, device: torch.device) -> Any:
    """``value`` with its tensors on ``device``; tuples, lists and dicts are walked."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_moved(item, device) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def count_samples(batch: Batch) -> int:
    """First dimension of the targets, or of the first tensor among the inputs."""
    for value in (batch[1], *_leaves(batch[0])):
        if isinstance(value, Tensor) and value.ndim:
            return value.shape[0]
    raise TypeError("data must give targets or inputs with samples in their first dimension, got neither.")


def _leaves(value: Any) -> Iterator[Any]:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else None
    if items is None:
        yield value
    else:
        for item in items:
            yield from _leaves(item)


def call(model: nn.Module, inputs: Any) -> Any:
    """``model(inputs)``; a tuple or list is unpacked into arguments, a dict into keywords."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, list | tuple) else model(inputs)


def check_deterministic(model: nn.Module) -> None:
    """Raise where a module's output depends on chance or on the other samples of the batch."""
    for name, module in model.named_modules():
        is_batch = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if is_batch and module.running_mean is None:
            raise ValueError(
                f"model must not depend on the batch, got {type(module).__name__} {name!r} without running"
                " statistics; set track_running_stats=True."
            )
        rate = module.p if isinstance(module, nn.modules.dropout._DropoutNd) else _own_dropout(module)
        if module.training and (rate > 0 or is_batch or isinstance(module, nn.RReLU)):
            raise ValueError(
                f"model must not depend on chance or on the batch, got {type(module).__name__} {name!r} in"
                " training mode; call model.eval() first."
            )


def _own_dropout(module: nn.Module) -> float:
    """The rate of a module that drops out by itself, as LSTM and MultiheadAttention do."""
    rate = getattr(module, "dropout", 0.0)
    return float(rate) if isinstance(rate, int | float) else 0.0
