"""Undo what a function changes besides its result: tensors that existed before, the random state."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch.overrides import TorchFunctionMode

# In these schemas a write is one of properties, not of numbers.
_NO_WRITE = {"requires_grad_", "retain_grad", "detach_", "rename_", "record_stream"}
# Functions that are held in mind; torch has some 1500, a program calls a tenth of them.
_REMEMBERED = 1024


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
        self._copies: dict[int, _Copy] = {}

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
        before = [copy for copy in self._copies.values() if id(copy.tensor) not in ids]
        present = [_Copy.of(copy.tensor) for copy in before]
        try:
            _write_back(reversed(before))
            yield
        finally:
            surely(lambda: _write_back(present))

    def adopt(self, tensor: Tensor) -> Tensor:
        """Treat a tensor as made inside: writes to it are not undone."""
        self._made.add(_storage(tensor))
        return tensor

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """``func(*args, **kwargs)``, with what it writes kept."""
        writes = writes_of(func)
        for tensor in map(_unwrapped, writes.targets(args, kwargs)):
            if _storage(tensor) not in self._made and id(tensor) not in self._copies:
                self._copies[id(tensor)] = _Copy.of(tensor)
        result = func(*args, **kwargs)
        # Views of what was there before are not made here, nor is a ``.grad``.
        if writes.makes:
            given = _tensors((*args, *kwargs.values()) if kwargs else args)
            old = {_storage(_unwrapped(tensor)) for tensor in given}
            made = (_storage(_unwrapped(tensor)) for tensor in _tensors((result,)))
            self._made.update(storage for storage in made if storage not in old)
        return result


def _write_back(copies: Iterable[_Copy]) -> None:
    for copy in copies:
        copy.write_back()


class _Copy(NamedTuple):
    """A tensor, its memory, and what it held."""

    tensor: Tensor
    memory: Tensor
    numbers: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> _Copy:
        return cls(tensor, tensor.data, tensor.detach().clone())

    def write_back(self) -> None:
        # By ``.data``, a function that resizes or a transposition in place.
        if self.tensor.layout is torch.strided and not is_transformed(self.tensor):
            here, there = self.tensor, self.memory
            is_same = _storage(here) == _storage(there) and here.storage_offset() == there.storage_offset()
            if not (is_same and here.shape == there.shape and here.stride() == there.stride()):
                self.tensor.data = self.memory
        data, numbers = self.tensor.data, self.numbers
        if data.layout is torch.strided and 0 in data.stride():
            # Numbers that are one in memory are written once.
            first = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in data.stride())
            data, numbers = data[first], numbers[first]
        data.copy_(numbers)


class Argument(NamedTuple):
    """Where a call has an argument: its position, and the names by which it may be given."""

    position: int
    names: tuple[str, ...]

    def of(self, args: Any, kwargs: dict[str, Any]) -> Any:
        """The argument, or None."""
        if self.position < len(args):
            return args[self.position]
        return next((kwargs[name] for name in self.names if name in kwargs), None)


# Functions that are also methods call it input.
_SELF = Argument(0, ("self", "input"))


class Writes(NamedTuple):
    """What a function writes to.

    Attributes:
        always: Arguments that it may write to whatever the others are.
        options: Pairs of an argument that asks for a write, by being neither None nor False, and the one
            that is written to then.
        keywords: Names of results that may be given.
        makes: Whether what it returns is new, or a view of an argument.
    """

    always: tuple[Argument, ...] = ()
    options: tuple[tuple[Argument, Argument], ...] = ()
    keywords: tuple[str, ...] = ("out",)
    makes: bool = True

    def targets(self, args: Any, kwargs: dict[str, Any]) -> Iterable[Tensor]:
        """The tensors that a call with these arguments may write to."""
        if not (kwargs or self.always or self.options):
            return ()
        found = [argument.of(args, kwargs) for argument in self.always]
        for option, target in self.options:
            asked = option.of(args, kwargs)
            if asked is not None and asked is not False:
                found.append(target.of(args, kwargs))
        if kwargs:
            found += [kwargs[name] for name in self.keywords if name in kwargs]
        return _tensors(found)


def written(func: Any, args: Any, kwargs: dict[str, Any]) -> Iterable[Tensor]:
    """The tensors that a call may write to."""
    return writes_of(func).targets(args, kwargs)


@functools.lru_cache(maxsize=_REMEMBERED)
def writes_of(func: Any) -> Writes:
    """What a function of torch writes to, by its schema, or its signature where it is written in Python."""
    name = getattr(func, "__name__", "")
    if isinstance(func, OpOverload):
        return _by_schemas([func._schema], name=func._schema.name.split("::")[-1])
    if isinstance(func, OpOverloadPacket):
        return _by_schemas(_schemas(func), name)
    owner = getattr(getattr(func, "__self__", None), "__name__", "")
    if name in ("__get__", "__set__"):
        is_write = (name, owner) == ("__set__", "data")
        return Writes((_SELF,) if is_write else (), makes=(name, owner) != ("__get__", "grad"))
    if inspect.isfunction(func):
        return _by_signature(func, name)
    found = _by_schemas(_schemas(getattr(torch.ops.aten, name, None)), name)
    # Results are given as ``out`` in Python.
    return found._replace(keywords=("out",))


def _schemas(packet: Any) -> list[Any]:
    """Of the overloads that have kernels: those for lists and numbers in TorchScript have none."""
    if not isinstance(packet, OpOverloadPacket):
        return []
    overloads = [getattr(packet, name) for name in packet.overloads()]
    kernels = torch._C._dispatch_has_kernel
    return [
        o._schema
        for o in overloads
        if kernels(o._schema.name + "." * bool(o._schema.overload_name) + o._schema.overload_name)
    ]


def _by_schemas(schemas: Sequence[Any], name: str) -> Writes:
    """Arguments that are marked as written, and running statistics, which are not (torch 2.13)."""
    always: dict[Argument, None] = {}
    keywords = {"out": None}
    for schema in schemas:
        for position, argument in enumerate(schema.arguments):
            is_marked = argument.alias_info is not None and argument.alias_info.is_write
            if argument.kwarg_only and is_marked:
                keywords[argument.name] = None
            elif is_marked or argument.name.startswith("running_"):
                names = _SELF.names if argument.name == "self" else (argument.name,)
                always[Argument(position, names)] = None
    if name in _NO_WRITE:
        return Writes()
    if not always and _is_named_in_place(name):
        always[_SELF] = None
    return Writes(tuple(always), (), tuple(keywords))


def _by_signature(func: Any, name: str) -> Writes:
    """Options and running statistics by torch's names for them; the first argument by an underscore."""
    names = list(inspect.signature(func, follow_wrapped=False).parameters)
    place = {name: Argument(position, (name,)) for position, name in enumerate(names)}
    always = [argument for name, argument in place.items() if name.startswith("running_")]
    if names and _is_named_in_place(name):
        always.append(place[names[0]])
    options = []
    if "inplace" in place:
        options.append((place["inplace"], place[names[0]]))
    if "max_norm" in place and "weight" in place:
        # The rows that are looked up are scaled, as by embedding_renorm_.
        options.append((place["max_norm"], place["weight"]))
    return Writes(tuple(always), tuple(options))


def _is_named_in_place(name: str) -> bool:
    """By an underscore at the end, or as an operator such as ``__iadd__``."""
    if name.startswith("__"):
        is_operator = name.startswith("__i") and hasattr(Tensor, f"__{name[3:]}")
        return is_operator or name == "__setitem__"
    return name.endswith("_") and name not in _NO_WRITE


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


def _unwrapped(tensor: Tensor) -> Tensor:
    """The tensor that holds the numbers of one inside a transform of ``torch.func``."""
    while is_transformed(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def is_transformed(value: Any) -> bool:
    """Whether this is a tensor inside a transform of ``torch.func``."""
    return isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value)


class undo_writes(TorchFunctionMode):  # noqa: N801 - used as a function, like torch.no_grad
    """Context after which every tensor that existed before holds what it held.

    Args:
        only_on_error: Only where it ends with an exception.
    """

    def __init__(self, *, only_on_error: bool = False) -> None:
        super().__init__()
        self._only_on_error = only_on_error

    def __enter__(self) -> undo_writes:
        self._guard = WriteGuard()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        if not self._only_on_error or exception[0] is not None:
            self._guard.undo()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._guard.call(func, args, kwargs or {})


class RandomState:
    """The random state of the CPU and of some devices, to be replayed.

    Args:
        devices: Devices other than the CPU; by default every accelerator that is in use.
    """

    def __init__(self, devices: Iterable[torch.device] | None = None) -> None:
        devices = _in_use() if devices is None else devices
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
            module = torch.get_device_module(device)
            states.append(module.get_rng_state(*_named(module.get_rng_state, device)))
        return states

    def _write(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(self._devices, states[1:], strict=True):
            module = torch.get_device_module(device)
            module.set_rng_state(state, *_named(module.set_rng_state, device))


def _named(function: Callable[..., Any], device: torch.device) -> tuple[torch.device, ...]:
    """The device, for a function that takes one: where there is only one, as of Apple's, it does not."""
    return (device,) if "device" in inspect.signature(function).parameters else ()


def _in_use() -> list[torch.device]:
    """The accelerators that were started: to ask one that was not would start it."""
    if not torch.accelerator.is_available():
        return []
    kind = torch.accelerator.current_accelerator()
    module = torch.get_device_module(kind)
    if kind is None or not getattr(module, "is_initialized", lambda: True)():
        return []
    return [torch.device(kind.type, index) for index in range(torch.accelerator.device_count())]
