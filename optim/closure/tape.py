"""What a module's outputs went through until ``backward``, kept so that it can be done again.

The outputs of a watched module become ``Watched`` tensors: tensors like any other, but each operation on
them makes a ``Node``. Nodes belong to the tensors that they made, and go with them; a tape keeps those that
``backward`` was called on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from optim.closure.accumulation import Marks, marks, were_thrown_away
from optim.closure.edges import reached
from optim.closure.modes import BACKWARD, Pass, is_grad_scaling, without_graph
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


class Tape:
    """The backward passes through one module's outputs since the last step.

    Args:
        devices: Devices of the parameters.
        parameters: Those of the optimizer.

    Attributes:
        roots: What ``backward`` was called on, with its weight and its value.
        epoch: Steps taken so far.
        is_suspended: Nothing is recorded meanwhile.
    """

    def __init__(self, devices: Sequence[torch.device], parameters: Callable[[], Sequence[Tensor]]) -> None:
        self.devices, self._parameters = devices, parameters
        self.roots: list[tuple[Ref, Tensor, Tensor]] = []
        self.epoch = 0
        self.is_suspended = False
        self._marks: Marks = []

    def random_state(self) -> RandomState:
        """The present one."""
        random = RandomState(self.devices)
        random.save()
        return random

    def setting(self, random: RandomState | None) -> Setting:
        """Of a call that is being recorded; ``random`` is the state before it."""
        kinds = dict.fromkeys(["cpu", *(device.type for device in self.devices)])
        return Setting(autocast_state(kinds), torch.is_grad_enabled(), random)

    def leaf(self, value: Any) -> Any:
        """What to keep of an argument."""
        if not isinstance(value, Tensor):
            return value
        ref = value._refs.get(self) if isinstance(value, Watched) else None
        if ref is not None and ref.grad == value.requires_grad and (ref.grad or ref.node.epoch == self.epoch):
            return ref
        if ref is not None and value.is_leaf:
            self._unwatch(value)
        depends = False
        if value.requires_grad and not value.is_leaf:
            # Inside of a torch.autograd.Function there is no graph to ask.
            depends = value.grad_fn is None or bool(reached([value], [], self._parameters()))
            value = value.detach()
        return Constant(value, _version(value), depends=depends)

    def _unwatch(self, value: Tensor) -> None:
        """Of a step that is over, or a leaf by now: a plain tensor again."""
        refs = value.__dict__["_refs"]
        del refs[self]
        if not refs:
            del value.__dict__["_refs"]
            value.__class__ = Tensor

    def record(self, node: Node, results: Sequence[Tensor], others: Iterable[Tensor]) -> None:
        """Note what a node made; ``others`` were there before, and stay what they are."""
        old = {id(tensor) for tensor in others}
        for position, tensor in enumerate(results):
            # A tensor that was written to is new where it got a graph by that.
            is_new = not tensor.is_leaf if tensor.requires_grad else id(tensor) not in old
            if type(tensor) is Tensor and is_new:
                tensor.__class__ = Watched
                tensor._refs = {}  # type: ignore[attr-defined]
            if isinstance(tensor, Watched):
                tensor._refs[self] = Ref(node, position, tensor.requires_grad)

    def note_backward(self, roots: Sequence[tuple[Tensor, Tensor]]) -> None:
        """``backward`` is about to be called on the roots, each with its weight."""
        if were_thrown_away(self._parameters(), self._marks):
            self.roots = []
        for root, weight in roots:
            leaf = self.leaf(root)
            if isinstance(leaf, Ref) and _reaches_call(leaf):
                value = root if leaf.node.unscaled is None else leaf.node.unscaled
                self.roots.append((leaf, weight, value.detach()))

    def mark(self) -> None:
        """``backward`` is over."""
        self._marks = marks(self._parameters())

    def value(self) -> float:
        """Of the roots, as they were."""
        return sum(float((value * weight).sum()) for _, weight, value in self.roots)

    def is_rough(self) -> bool:
        """Whether a run may differ by the rounding of half precision."""
        return any(on for node in self._nodes() for _, on, _ in node.setting.autocast)

    def run(self) -> Tensor:
        """The sum of the roots, each with its weight, computed again."""
        results: dict[Node, list[Tensor]] = {}
        for node in self._nodes():
            node.run(results)
        terms = [(results[ref.node][ref.position] * weight).sum() for ref, weight, _ in self.roots]
        return sum(terms[1:], start=terms[0])

    def changed(self) -> str:
        """Why a run would give something else than the recorded one; empty where it would not."""
        constants = [c for node in self._nodes() for c in node.leaves or () if isinstance(c, Constant)]
        if any(constant.depends for constant in constants):
            return (
                "the loss uses a tensor that was computed from parameters outside of model= (for an L2 term"
                " there is weight_decay=)"
            )
        if any(constant.version != _version(constant.tensor) for constant in constants):
            return "an input was changed in place after it was used"
        return ""

    def forget(self) -> None:
        """After a step: let go of everything, also where the user keeps tensors that the nodes made."""
        for node in self._nodes():
            node.leaves = None
        self.roots, self._marks = [], []
        self.epoch += 1

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


def _reaches_call(ref: Ref) -> bool:
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


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


# Of the properties of a tensor those that are tensors made from it.
_PROPERTIES = {"T", "mT", "H", "mH", "real", "imag", "data"}


class Watched(Tensor):
    """A tensor whose operations are recorded; it behaves, prints and pickles as a plain one.

    Attributes:
        _refs: For each tape what made it.
    """

    _refs: dict[Tape, Ref]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Inside they are the plain tensors that they are.
        with torch._C.DisableTorchFunctionSubclass():
            return _recorded(func, without_graph(func, args), kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return str(self._as_plain(Tensor.__repr__, tensor_contents=tensor_contents))

    def __format__(self, spec: str) -> str:
        return str(self._as_plain(Tensor.__format__, spec))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self._as_plain(Tensor.__deepcopy__, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._as_plain(Tensor.__reduce_ex__, protocol)

    def _as_plain(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a method of tensors that looks at the type."""
        refs = self.__dict__.pop("_refs")
        self.__class__ = Tensor  # type: ignore[assignment]
        try:
            return method(self, *args, **kwargs)
        finally:
            self.__class__ = Watched
            self._refs = refs


def _itself(loss: Tensor) -> Tensor:
    return loss


def _recorded(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Call, and note on each tape what was made."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    watched = [tensor for tensor in tensors if isinstance(tensor, Watched)]
    tapes = dict.fromkeys(tape for tensor in watched for tape in tensor._refs if not tape.is_suspended)
    if func in BACKWARD:
        for tape in tapes:
            tape.note_backward(Pass.of(BACKWARD[func], args, kwargs).roots)
        func(*args, **kwargs)
        for tape in tapes:
            tape.mark()
        return None
    is_getter = getattr(func, "__name__", "") == "__get__"
    if not tapes or (is_getter and func.__self__.__name__ not in _PROPERTIES):
        return func(*args, **kwargs)
    # Where the loss is scaled for its backward pass, the gradients are unscaled before the step.
    is_scaling = is_grad_scaling(func)
    repeated, call = (_itself, (args[:1], {})) if is_scaling else (func, (args, kwargs))
    before = [(tape, *_arguments(tape, func, *call), tape.random_state()) for tape in tapes]
    result = func(*args, **kwargs)
    results = results_of(func, args, kwargs, result)
    has_grad = any(tensor.requires_grad for tensor in results)
    for tape, leaves, spec, random in before if results else ():
        # A value from before the last step is a constant of this one.
        if not has_grad and any(isinstance(x, Ref) and x.node.epoch < tape.epoch for x in leaves):
            continue
        setting = tape.setting(random if random.has_moved() else None)
        node = Node(repeated, leaves, spec, setting, tape.epoch)
        node.unscaled = args[0].detach() if is_scaling else None
        tape.record(node, results, tensors)
    return result


def _arguments(tape: Tape, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """The leaves and their arrangement, before the call writes to one of them."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    kept = [tape.leaf(leaf) for leaf in leaves]
    # Of parameters with a gradient only an embedding with max_norm writes to one: it stays the parameter.
    targets = {id(t) for t in written(func, args, kwargs) if not (_has_grad(t) and t.is_leaf)}
    for index, leaf in enumerate(leaves if targets else ()):
        constant = kept[index]
        if id(leaf) in targets and isinstance(constant, Constant):
            copy = constant.tensor.detach().clone()
            kept[index] = constant._replace(tensor=copy, version=0, is_target=True)
    return kept, spec


def _has_grad(tensor: Tensor) -> bool:
    return tensor.requires_grad and torch.is_grad_enabled()


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
