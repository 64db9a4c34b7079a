"""Calls of modules that a closure makes, noted so that they can be made again on some of their samples."""

from __future__ import annotations

import contextlib
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from secondorder.autodiff import graph
from secondorder.autodiff.guard import RandomState, is_transformed, surely

from .nodes import Setting, autocast_state, tensors_of

# What they call is the module; another call of them would confuse what they keep of the last.
WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)
# A compiled module warns that hooks are called for it too, which is meant. Put among the filters by hand: a
# change of them that Python knows of has it give again, in each step, what users were warned of once.
_EXPECTED = (
    "ignore",
    re.compile(r"Using .torch\.compile\(module\). when there are global"),
    UserWarning,
    None,
    0,
)


class Call(NamedTuple):
    """A call of a module that no other module made.

    Attributes:
        module: As called.
        leaves: Its arguments, flat.
        spec: How they are arranged.
        results: The tensors that it made.
        setting: What surrounded it.
        training: Each part, and whether it was in training.
    """

    module: nn.Module
    leaves: list[Any]
    spec: Any
    results: list[Tensor]
    setting: Setting
    training: list[tuple[nn.Module, bool]]

    def again(self, count: int, rows: Tensor, devices: Sequence[torch.device]) -> list[Tensor]:
        """What it makes of some of ``count`` samples.

        Tensors with as many rows are taken for theirs.
        """
        leaves = [leaf[rows.to(leaf.device)] if is_of_samples(leaf, count) else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        with self.setting.restored(), as_called(self.training), Calls(devices) as calls:
            self.module(*args, **kwargs)
        return calls.made[-1].results


def is_of_samples(leaf: Any, count: int) -> bool:
    """Whether it has a row for each of ``count`` samples."""
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == count


class Calls:
    """Context in which outermost calls of modules are noted, by torch's hooks for all modules.

    Args:
        devices: Devices of the parameters.

    Attributes:
        made: In their order.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.made: list[Call] = []
        self._devices = devices
        self._thread = threading.get_ident()
        # Modules that run, and the random state before the first of them.
        self._running: list[nn.Module] = []
        self._random = RandomState(devices)
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Calls:
        try:
            self._register()
        except BaseException:
            surely(self._remove)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        surely(self._remove)

    def _register(self) -> None:
        warnings.filters = [_EXPECTED, *warnings.filters]
        before = RemovableHandle.next_id
        self._handles.append(module.register_module_forward_pre_hook(self._before))
        options = {"with_kwargs": True, "always_call": True}
        self._handles.append(module.register_module_forward_hook(self._after, **options))
        graph.HookCount.own += RemovableHandle.next_id - before

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
            # Which torch leaves there (2.6 to 2.14), for compiled modules to see.
            module._global_forward_hooks_with_kwargs.pop(handle.id, None)
        warnings.filters = [one for one in warnings.filters if one is not _EXPECTED]

    def _is_noted(self, called: nn.Module) -> bool:
        return threading.get_ident() == self._thread and not isinstance(called, WRAPPERS)

    def _before(self, called: nn.Module, _: Any) -> None:
        if self._is_noted(called):
            if not self._running:
                self._random.save()
            self._running.append(called)

    def _after(self, called: nn.Module, args: Any, *rest: Any) -> None:
        if not self._is_noted(called) or called not in self._running:
            return
        # Those inside may have ended by an exception.
        while self._running.pop() is not called:
            pass
        # After an exception torch leaves the keywords out (2.6 to 2.14).
        *kwargs, result = rest
        results = [] if self._running else [t for t in tensors_of(result) if t.requires_grad]
        if kwargs and results and torch.is_grad_enabled() and not any(map(is_transformed, results)):
            leaves, spec = pytree.tree_flatten((args, kwargs[0]))
            training = [(part, part.training) for part in called.modules()]
            self.made.append(Call(called, leaves, spec, results, self._setting(), training))

    def _setting(self) -> Setting:
        kinds = dict.fromkeys(["cpu", *(device.type for device in self._devices)])
        random = self._random if self._random.has_moved() else None
        self._random = RandomState(self._devices)
        return Setting(autocast_state(kinds), True, random)


@contextlib.contextmanager
def as_called(training: Sequence[tuple[nn.Module, bool]]) -> Iterator[None]:
    """Parts of a module in training or evaluation as they were.

    Buffers that a module gives another tensor are afterwards those of before.
    """
    present = [(part, part.training, dict(part._buffers)) for part, _ in training]

    def restore() -> None:
        for part, is_training, buffers in present:
            part.training = is_training
            part._buffers.update(buffers)

    try:
        for part, is_training in training:
            part.training = is_training
        yield
    finally:
        surely(restore)
