"""What a module's outputs went through until ``backward``, kept so that it can be done again.

The outputs of a watched module become ``Watched`` tensors: tensors like any other, but each operation on
them makes a ``Node``. Nodes belong to the tensors that they made, and go with them; a tape keeps those that
``backward`` was called on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from secondorder.autodiff.guard import RandomState, written

from .accumulation import Marks, marks, were_thrown_away
from .edges import reached
from .modes import BACKWARD, MADE, Pass, is_grad_scaling, without_graph
from .nodes import (
    Constant,
    Node,
    Passes,
    Ref,
    Setting,
    autocast_state,
    reaches_call,
    results_of,
    version_of,
)


class Tape:
    """The backward passes through one module's outputs since the last step.

    Args:
        devices: Devices of the parameters.
        parameters: Those of the optimizer.

    Attributes:
        passes: What ``backward`` was called on.
        epoch: Steps taken so far.
        is_suspended: Nothing is recorded meanwhile.
    """

    def __init__(self, devices: Sequence[torch.device], parameters: Callable[[], Sequence[Tensor]]) -> None:
        self.devices, self._parameters = devices, parameters
        self.passes = Passes()
        self.epoch = 0
        self.is_suspended = False
        self._marks: Marks = []

    def random_state(self) -> RandomState:
        """The present one."""
        random = RandomState(self.devices)
        random.save()
        return random

    def setting(self, random: RandomState) -> Setting:
        """Of a call that was just made; ``random`` is the state before it."""
        kinds = dict.fromkeys(["cpu", *(device.type for device in self.devices)])
        return Setting(autocast_state(kinds), torch.is_grad_enabled(), random if random.has_moved() else None)

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
        return Constant(value, version_of(value), depends=depends)

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
            self.passes.roots = []
        for root, weight in roots:
            leaf = self.leaf(root)
            if isinstance(leaf, Ref) and reaches_call(leaf):
                value = root if leaf.node.unscaled is None else leaf.node.unscaled
                self.passes.roots.append((leaf, weight, value.detach()))

    def mark(self) -> None:
        """``backward`` is over."""
        self._marks = marks(self._parameters())

    def forget(self) -> None:
        """After a step: let go of everything."""
        self.passes.forget()
        self._marks = []
        self.epoch += 1


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
        return _backward(func, args, kwargs, tapes)
    is_getter = getattr(func, "__name__", "") == "__get__"
    if not tapes or (is_getter and func.__self__.__name__ not in MADE):
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
        node = Node(repeated, leaves, spec, tape.setting(random), tape.epoch)
        node.unscaled = args[0].detach() if is_scaling else None
        tape.record(node, results, tensors)
    return result


def _backward(func: Any, args: Any, kwargs: dict[str, Any], tapes: Iterable[Tape]) -> None:
    for tape in tapes:
        tape.note_backward(Pass.of(BACKWARD[func], args, kwargs).roots)
    func(*args, **kwargs)
    for tape in tapes:
        tape.mark()


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
