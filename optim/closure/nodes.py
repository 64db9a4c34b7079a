"""Calls that can be made again, and the backward passes that rest on them."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from secondorder.autodiff.guard import RandomState, written

_numbers = itertools.count()


class Ref(NamedTuple):
    """A tensor that a node makes: the ``position``-th among its results.

    Attributes:
        grad: Whether it required a gradient. A ``torch.autograd.Function`` may make it do so later.
    """

    node: Node
    position: int
    grad: bool


class Constant(NamedTuple):
    """A tensor that no node made, as it was at a version.

    Attributes:
        is_target: Written to by its node: each run starts from a copy.
        depends: Computed from parameters, which a run does not see.
    """

    tensor: Tensor
    version: int
    is_target: bool = False
    depends: bool = False


class Setting(NamedTuple):
    """What a call depends on besides its arguments.

    Attributes:
        autocast: For each type of device whether it is on, and to which dtype.
        grad: Whether gradients were on.
        random: The random state, where the call moved it.
    """

    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    grad: bool
    random: RandomState | None

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """As it was at the call."""
        with contextlib.ExitStack() as stack:
            for state in set(self.autocast) - set(autocast_state(s[0] for s in self.autocast)):
                stack.enter_context(torch.autocast(state[0], dtype=state[2], enabled=state[1]))
            if not self.grad:
                stack.enter_context(torch.no_grad())
            if self.random is not None:
                stack.enter_context(self.random.replayed())
            yield


def autocast_state(device_types: Any) -> tuple[tuple[str, bool, torch.dtype], ...]:
    """Of each type of device."""
    return tuple(
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in device_types
    )


class Node:
    """A call that can be made again.

    Args:
        func: What was called.
        leaves: Its arguments, flat: ``Ref``, ``Constant``, or anything that is no tensor.
        spec: How they are arranged.
        setting: What surrounded it.
        epoch: Steps taken before.

    Attributes:
        unscaled: For the scaling of a loss by a ``GradScaler``, the loss.
        is_call: Whether it is a call of the module.
    """

    unscaled: Tensor | None = None
    is_call = False

    def __init__(
        self, func: Callable[..., Any], leaves: list[Any], spec: Any, setting: Setting, epoch: int
    ) -> None:
        self.number = next(_numbers)
        self.func, self.spec, self.setting = func, spec, setting
        self.leaves: list[Any] | None = leaves
        self.epoch = epoch

    def run(self, results: dict[Node, list[Tensor]]) -> None:
        """Call again, on the results of the nodes before."""
        if self.leaves is None:
            raise RuntimeError(
                "the loss depends on what was computed before the last step, which cannot be computed again;"
                " detach() what goes from one step to the next, or give step a closure."
            )
        leaves = [_again(leaf, results) for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        with self.setting.restored():
            result = self.func(*args, **kwargs)
        results[self] = tensors_of(result) if self.is_call else results_of(self.func, args, kwargs, result)


def _again(leaf: Any, results: dict[Node, list[Tensor]]) -> Any:
    if isinstance(leaf, Ref):
        return results[leaf.node][leaf.position]
    if isinstance(leaf, Constant):
        return leaf.tensor.clone() if leaf.is_target else leaf.tensor
    return leaf


class Passes:
    """Backward passes that can be done again.

    Attributes:
        roots: What ``backward`` was called on, with its weight and its value.
    """

    def __init__(self) -> None:
        self.roots: list[tuple[Ref, Tensor, Tensor]] = []

    def run(self) -> Tensor:
        """The sum of the roots, each with its weight, computed again."""
        results: dict[Node, list[Tensor]] = {}
        for node in self._nodes():
            node.run(results)
        terms = [(results[ref.node][ref.position] * weight).sum() for ref, weight, _ in self.roots]
        return sum(terms[1:], start=terms[0])

    def value(self) -> float:
        """Of the roots, as they were."""
        return sum(float((value * weight).sum()) for _, weight, value in self.roots)

    def changed(self) -> str:
        """Why a run would give something else than the recorded one; empty where it would not."""
        constants = [c for node in self._nodes() for c in node.leaves or () if isinstance(c, Constant)]
        if any(constant.depends for constant in constants):
            return (
                "the loss uses a tensor that was computed from parameters outside of model= (for an L2 term"
                " there is weight_decay=)"
            )
        if any(constant.version != version_of(constant.tensor) for constant in constants):
            return "an input was changed in place after it was used"
        return ""

    def is_rough(self) -> bool:
        """Whether a run may differ by the rounding of half precision."""
        return any(on for node in self._nodes() for _, on, _ in node.setting.autocast)

    def forget(self) -> None:
        """After a step: let go of everything, also where the user keeps tensors that the nodes made."""
        for node in self._nodes():
            node.leaves = None
        self.roots = []

    def _nodes(self) -> list[Node]:
        """All that the roots rest on, in the order of their calls."""
        stack = [ref.node for ref, _, _ in self.roots]
        seen = set(stack)
        while stack:
            for leaf in stack.pop().leaves or ():
                if isinstance(leaf, Ref) and leaf.node not in seen:
                    seen.add(leaf.node)
                    stack.append(leaf.node)
        return sorted(seen, key=lambda node: node.number)


def reaches_call(ref: Ref) -> bool:
    """Whether a gradient goes from here to a call of the module."""
    stack, seen = [ref.node], {ref.node}
    while stack:
        node = stack.pop()
        # What is gone was one.
        if node.is_call or node.leaves is None:
            return True
        refs = [leaf for leaf in node.leaves or () if isinstance(leaf, Ref)]
        following = {ref.node for ref in refs if ref.grad} - seen
        seen |= following
        stack += following
    return False


def version_of(tensor: Tensor) -> int:
    """How often it was written to; inference tensors do not count."""
    return -1 if tensor.is_inference() else tensor._version


def results_of(func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> list[Tensor]:
    """The tensors that a call wrote to or made, in an order that another call has too."""
    targets = {id(tensor): tensor for tensor in written(func, args, kwargs)}
    return [*targets.values(), *(tensor for tensor in tensors_of(result) if id(tensor) not in targets)]


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in containers and dataclasses."""
    return list(_tensors(value))


def _tensors(value: Any) -> Iterator[Tensor]:
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            yield from _tensors([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])
