"""Undo what a function changes besides its result: tensors that existed before, the random state."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_IN_PLACE_OPERATORS = {
    f"__i{name}__"
    for name in (
        "add",
        "sub",
        "mul",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "and",
        "or",
        "xor",
        "lshift",
        "rshift",
    )
} | {"__setitem__"}
# They end in an underscore but write no number.
_NO_WRITE = {"requires_grad_", "retain_grad_", "detach_", "rename_"}
# Running statistics are their second and third argument.
_NORMS = (F.batch_norm, F.instance_norm)


def surely(restore: Callable[[], None]) -> None:
    """Restore, to the end also where an interrupt comes in between; what is done twice is as done once."""
    try:
        restore()
    except BaseException:
        restore()
        raise


class WriteGuard:
    """Undoes writes to tensors that existed before: running statistics, counters, any buffer.

    Before the first write to a storage that was not made inside, a copy of the tensor is taken; on exit it
    is written back, to ``.data``, so that version counters of graphs stay as they are.
    """

    def __init__(self) -> None:
        self._made: set[int] = set()
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}

    def __enter__(self) -> WriteGuard:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def undo(self) -> None:
        """Write back what was there before."""
        # Last first: a view may have been copied after a write to its base.
        surely(lambda: _write_back(reversed(self._copies.values())))

    @contextlib.contextmanager
    def rewound(self, kept: Iterable[Tensor] = ()) -> Iterator[None]:
        """Hold what was there before the first write, except in ``kept``; afterwards what is there now."""
        ids = {id(tensor) for tensor in kept}
        written = [(tensor, copy) for tensor, copy in self._copies.values() if id(tensor) not in ids]
        present = [tensor.detach().clone() for tensor, _ in written]
        try:
            _write_back(reversed(written))
            yield
        finally:
            pairs = [(tensor, copy) for (tensor, _), copy in zip(written, present, strict=True)]
            surely(lambda: _write_back(pairs))

    def adopt(self, tensor: Tensor) -> Tensor:
        """Treat a tensor as made inside: writes to it are not undone."""
        self._made.add(_storage(tensor))
        return tensor

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """``func(*args, **kwargs)``, with what it writes kept."""
        for tensor in written(func, args, kwargs):
            if _storage(tensor) not in self._made:
                self._copies.setdefault(id(tensor), (tensor, tensor.detach().clone()))
        result = func(*args, **kwargs)
        # Views of what was there before are not made here.
        old = {_storage(tensor) for tensor in _tensors(args)}
        self._made.update(_storage(t) for t in _tensors((result,)) if _storage(t) not in old)
        return result


def _write_back(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    for tensor, copy in pairs:
        tensor.data.copy_(copy)


def is_in_place(func: Any) -> bool:
    """Whether a call writes to its first argument, by its name."""
    name = getattr(func, "__name__", "")
    is_method = name.endswith("_") and name not in _NO_WRITE and name[-2:] != "__"
    return is_method or name in _IN_PLACE_OPERATORS


def written(func: Any, args: Any, kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors that a call writes to."""
    if func in _NORMS:
        yield from _tensors((*args[1:3], kwargs.get("running_mean"), kwargs.get("running_var")))
    elif is_in_place(func):
        yield from _tensors(args[:1])
    if "out" in kwargs:
        yield from _tensors((kwargs["out"],))


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors among ``values`` and in the lists and tuples among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (item for item in value if isinstance(item, Tensor))


def _storage(tensor: Tensor) -> int:
    """Identity of the memory that a tensor lives in, where it has memory of its own."""
    if tensor.layout is not torch.strided or is_transformed(tensor):
        return id(tensor)
    return tensor.untyped_storage()._cdata


def is_transformed(value: Any) -> bool:
    """Whether this is a tensor inside a transform of ``torch.func``."""
    return isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value)


class undo_writes(TorchFunctionMode):  # noqa: N801 - used as a function, like torch.no_grad
    """Context after which every tensor that existed before holds what it held."""

    def __enter__(self) -> undo_writes:
        self._guard = WriteGuard()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._guard.__exit__(*exception)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._guard.call(func, args, kwargs or {})


class RandomState:
    """The random state of the CPU and of some devices, to be replayed.

    Args:
        devices: Devices other than the CPU; by default every CUDA device, where one is in use.
    """

    def __init__(self, devices: Iterable[torch.device] | None = None) -> None:
        if devices is None:
            in_use = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
            devices = [torch.device("cuda", index) for index in range(in_use)]
        others = {device for device in devices if device.type not in ("cpu", "meta")}
        self._devices = sorted(others, key=str)
        self._saved: list[Tensor] = []
        self._generators: dict[torch.Generator, Tensor] = {}

    def save(self) -> None:
        """Note the present state."""
        self._saved = self._read()
        self._generators = {}

    def watch(self, generator: torch.Generator | None) -> None:
        """A generator of its own is about to be used: note its state, the first time since ``save``."""
        if generator is not None and generator not in self._generators:
            self._generators[generator] = generator.get_state()

    def restore(self) -> None:
        """Put the saved state back."""
        self._write(self._saved)
        self._set(self._generators)

    def has_moved(self) -> bool:
        """Whether random numbers were drawn since ``save``."""
        return not all(map(torch.equal, self._saved, self._read()))

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """Start from the saved state; afterwards the present one is back."""
        present = self._read()
        generators = {generator: generator.get_state() for generator in self._generators}
        try:
            self.restore()
            yield
        finally:
            surely(lambda: self._write(present))
            # Those that were first used inside as they were before.
            surely(lambda: self._set({**self._generators, **generators}))

    @staticmethod
    def _set(states: dict[torch.Generator, Tensor]) -> None:
        for generator, state in states.items():
            generator.set_state(state)

    def _read(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        for device in self._devices:
            states.append(torch.get_device_module(device).get_rng_state(device))
        return states

    def _write(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(self._devices, states[1:], strict=True):
            torch.get_device_module(device).set_rng_state(state, device)
