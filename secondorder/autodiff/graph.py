"""What a graph says before it is differentiated: symmetric, without a derivative, wrong, hooked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.utils.hooks import RemovableHandle


class Place(NamedTuple):
    """A tensor that only the graph knows: nobody may hold it any more.

    Attributes:
        edge: Where gradients with respect to it come by.
        like: A tensor of its shape, dtype and device, without memory of its own.
    """

    edge: GradientEdge
    like: Tensor

    @classmethod
    def of(cls, node: Node, output_nr: int) -> Place:
        """That of one of the results of a node."""
        made = node._input_metadata[output_nr]
        like = torch.empty((), dtype=made.dtype, device=made.device).expand(made.shape)
        return cls(GradientEdge(node, output_nr), like)


Source = Tensor | Place


def end(source: Source) -> Any:
    """What ``torch.autograd.grad`` takes for it."""
    return source.edge if isinstance(source, Place) else source


def like(source: Source) -> Tensor:
    """A tensor of its shape, dtype and device."""
    return source.like if isinstance(source, Place) else source


def has_graph(source: Source) -> bool:
    """Whether gradients may pass it."""
    return isinstance(source, Place) or source.requires_grad


class HookCount:
    """Whether a hook was registered since: it may change a gradient unseen by the graph.

    Attributes:
        own: Hooks that this library has registered, which change nothing.
    """

    own = 0

    def __init__(self) -> None:
        self._start = RemovableHandle.next_id - HookCount.own

    def has_grown(self) -> bool:
        """True when any hook, on a tensor, a node or a module, was registered meanwhile."""
        return bool(RemovableHandle.next_id - HookCount.own != self._start)


# With them derivatives leave out points where a formula has none, a norm at zero for one: NaN times zero is
# NaN in one order of the two derivatives, and never met in the other.
_MASKS = {"MaskedFillBackward0", "WhereBackward0"}
# Their formulas divide by an input, or are others in the last backward pass than before: where a matrix is
# singular or a product of some entries overflows, ``v^T H`` is wrong and ``H v`` is right (torch 2.13).
_DIVIDE = {"LinalgDetBackward0", "ProdBackward0", "ProdBackward1", "CumprodBackward0"}
# A backward pass takes the logarithm of what it is given, or divides by it (pdist in torch 2.14).
_UNDEFINED_AT_ZERO = {"LogcumsumexpBackward0", "PdistBackward0"}
# Batched backward passes are wrong in silence for some shapes, such as one position, or as many samples as
# channels in a group (torch 2.13).
_BATCHED_WRONG = {"NativeGroupNormBackward0"}


class Kinds(NamedTuple):
    """What kinds of nodes lie behind some tensors.

    Attributes:
        names: Of the nodes.
        is_symmetric: A value and its gradient with these nodes have a symmetric Hessian. A custom Function
            may return anything from its backward: then products from the left and from the right differ,
            and ``hvp`` must not replace one by the other.
    """

    names: set[str]
    is_symmetric: bool

    @classmethod
    def of(cls, tensors: Iterable[Source | None], inputs: Iterable[Source] = ()) -> Kinds:
        """Walk the graph, once, down to the inputs."""
        names: set[str] = set()
        is_custom = False
        for node in nodes(tensors, inputs):
            name = node.name()
            # Of most kinds one node says it of all.
            if name not in names or name.startswith("Embedding"):
                names.add(name)
                is_custom = is_custom or _is_custom(node, name)
        return cls(names, not is_custom)

    def side(self, is_plain: bool, otherwise: str = "right") -> str:
        """The side from which to multiply by the Hessian: "left", "right" or "left unless nan".

        From the left it is ``v^T H``, one backward pass through the gradient; from the right ``H v``, the
        derivative of ``u^T H`` with respect to ``u``. They are one where the Hessian is symmetric, but for
        formulas of torch that are wrong or NaN from the left.

        Args:
            is_plain: False where it is not symmetric for a reason that the graph does not show.
            otherwise: The side where it is not symmetric.
        """
        if not (self.is_symmetric and is_plain):
            return otherwise
        if self.names & _DIVIDE:
            return "right"
        return "left unless nan" if self.names & _MASKS else "left"

    @property
    def has_convolutions(self) -> bool:
        """Whether a second backward pass meets one: see ``autodiff/convolutions.py``."""
        return "ConvolutionBackwardBackward0" in self.names

    @property
    def is_undefined_at_zero(self) -> bool:
        """Whether ``u^T H`` is NaN at zero, and at the zeros that masks leave of another ``u``."""
        return bool(self.names & _UNDEFINED_AT_ZERO)


def is_wrong_in_batches(tensors: Iterable[Source | None]) -> bool:
    """Whether a batched backward pass may be wrong in silence, and a loop is not."""
    return has_any(tensors, _BATCHED_WRONG)


def has_any(tensors: Iterable[Source | None], names: set[str]) -> bool:
    """Whether a node with one of these names lies behind ``tensors``."""
    return any(node.name() in names for node in nodes(tensors))


_COMPILED = "CompiledFunctionBackward"


def has_compiled(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a graph holds code of ``torch.compile``, which has no second derivative."""
    return has_any(tensors, {_COMPILED})


# Nodes that raise when a second backward pass reaches them (torch 2.13; pdist and cdist do not since 2.14).
_WITHOUT_DERIVATIVE = {
    "torch::autograd::NotImplemented",
    "PdistBackwardBackward0",
    "CdistBackwardBackward0",
    "EmbeddingBagBackwardBackward0",
    # Of code that was compiled.
    f"{_COMPILED}Backward",
}


def has_missing(gradient: Iterable[Tensor | None]) -> bool:
    """Whether a backward pass through a gradient may meet an operation without a derivative."""
    return has_any(gradient, _WITHOUT_DERIVATIVE)


class WrongDerivativeError(RuntimeError):
    """The graph holds an operation whose derivative torch gets wrong in silence.

    Args:
        message: Which, and what to do.
        is_decomposed: Whether it is right under ``decompose()``.
    """

    def __init__(self, message: str, is_decomposed: bool = True) -> None:
        super().__init__(message)
        self.is_decomposed = is_decomposed


# Nodes whose derivatives are wrong in silence (torch 2.13, against finite differences), and of what. In
# ``u -> J^T u``, of which ``J v`` is the derivative (that of logcumsumexp is NaN where ``u`` has zeros):
_WRONG_LINEAR = {
    "SparseCooTensorWithDimsAndTensorsBackward0": "sparse_coo_tensor",
    "LogcumsumexpBackward0": "logcumsumexp",
}
_NORMS = {
    "NativeLayerNorm": "layer_norm",
    "NativeBatchNorm": "batch_norm",
    "CudnnBatchNorm": "batch_norm",
    "MiopenBatchNorm": "batch_norm",
}
# In a gradient, of a function that may hold gradients itself:
_WRONG = {
    "SparseCooTensorWithDimsAndTensorsBackward0": "sparse_coo_tensor",
    "WeightNormInterfaceBackward0": "weight_norm",
    **{f"{node}BackwardBackward0": f"a gradient through {name}" for node, name in _NORMS.items()},
}
# In a product with a Hessian or a Jacobian, as ``create_graph`` asks for:
_WRONG_THIRD = {**_WRONG_LINEAR, **{f"{node}Backward0": name for node, name in _NORMS.items()}}


def refuse_wrong(
    values: Iterable[Source],
    inputs: Iterable[Tensor] | None = None,
    *,
    create_graph: bool = False,
    is_given: bool = False,
) -> None:
    """Raise WrongDerivativeError where the gradient of ``values`` has derivatives that are known to be wrong.

    Args:
        values: To be differentiated twice, and once more with ``create_graph``.
        inputs: With respect to which; with respect to all leaves when None.
        create_graph: The products will be differentiated too.
        is_given: There is no function to compute the values again: what is right by some products passes.
    """
    order, wrong = ("third", _WRONG | _WRONG_THIRD) if create_graph else ("second", _WRONG)
    _refuse(tuple(values), inputs, wrong, order, _is_singular_det if not is_given else None)


def refuse_wrong_rows(
    values: Iterable[Source], inputs: Iterable[Tensor], *, create_graph: bool = False
) -> None:
    """The same for ``J^T u`` of ``values``, to be differentiated with respect to ``u``."""
    order, wrong = ("third", _WRONG | _WRONG_THIRD) if create_graph else ("second", _WRONG_LINEAR)
    _refuse(tuple(values), inputs, wrong, order)


def _refuse(
    values: tuple[Source, ...],
    inputs: Iterable[Tensor] | None,
    wrong: dict[str, str],
    order: str,
    at_this_point: Callable[[Node, str], str | None] | None = None,
) -> None:
    found = {}
    for node in nodes(values):
        name = node.name()
        what = wrong.get(name)
        if what is None and at_this_point is not None:
            what = at_this_point(node, name)
        if what is not None:
            found[node] = _wrong_derivative(order, what)
        elif isinstance(node, _PythonNode) and (text := _hides_derivative(node._forward_cls)):
            found[node] = WrongDerivativeError(text, is_decomposed=False)
    if not found:
        return
    # What is not met on the way to the inputs does no harm.
    for node in found if inputs is None else between(values, inputs):
        if node in found:
            raise found[node]


def _wrong_derivative(order: str, what: str) -> WrongDerivativeError:
    return WrongDerivativeError(
        f"the {order} derivative of {what} is wrong in torch; compute the loss inside"
        " secondorder.decompose.decompose()."
    )


def _is_singular_det(node: Any, name: str) -> str | None:
    """Torch's formulas solve with the matrix."""
    if name == "LinalgDetBackward0" and is_singular(node._saved_A, node._saved_result):
        return "the determinant of a singular matrix"
    return None


def is_singular(A: Tensor, determinant: Tensor) -> bool:
    """Whether a matrix in a batch is, to rounding, by Hadamard's bound: one host read."""
    bound = torch.linalg.vector_norm(A.detach(), dim=-1).prod(-1)
    return bool((determinant.detach().abs() <= torch.finfo(bound.dtype).eps ** 0.5 * bound).any())


# Of custom Functions: Python's own class, which type checkers take for no node.
_PythonNode: Any = torch.autograd.function.BackwardCFunction
_ONCE = torch.autograd.function.once_differentiable(lambda _: None).__code__


def _hides_derivative(function: Any) -> str:
    """Why the gradient of a Function is a constant to autograd, with derivative zero; or nothing."""
    if getattr(function.backward, "__code__", None) is _ONCE:
        return (
            f"{function.__name__} is once_differentiable and has no second derivative; write its backward"
            " with differentiable operations, without once_differentiable."
        )
    module, _, operator = function.__module__.rpartition(".")
    # ``torch.cond``, ``scan`` and their kin: map alone keeps a graph in its backward pass (torch 2.13).
    if module == "torch._higher_order_ops" and operator != "map":
        return (
            f"the second derivative of torch's higher-order operator {operator} is zero in torch, in silence;"
            " write it as a branch or a loop in Python."
        )
    return ""


class Fused(torch.autograd.Function):
    """Base of our own Functions, whose derivatives are those of the operations that they stand for."""


def between(outputs: Iterable[Source | None], inputs: Iterable[Tensor]) -> list[Node]:
    """The nodes on the paths from ``outputs`` to ``inputs``."""
    inputs = list(inputs)
    leaves, inner = {id(x) for x in inputs}, {x.grad_fn for x in inputs}
    users: dict[Node, list[Node]] = {}
    stack: list[Node] = []
    for node in nodes(outputs):
        # The node of a leaf has it, that of another tensor is its own.
        if node in inner or id(getattr(node, "variable", None)) in leaves:
            stack.append(node)
        for following, _ in node.next_functions:
            if following is not None:
                users.setdefault(following, []).append(node)
    seen = set(stack)
    while stack:
        for user in users.get(stack.pop(), ()):
            if user not in seen:
                seen.add(user)
                stack.append(user)
    return list(seen)


def may_convolve(node: Node) -> bool:
    """Whether this is a convolution, or a custom Function, which may call one."""
    name = node.name()
    return "Convolution" in name or _is_function(node, name)


def _is_function(node: Node, name: str) -> bool:
    """Whether a node is a custom one: in Python, or in C++ as torch::autograd::CppNode<...>."""
    if isinstance(node, _PythonNode):
        return not issubclass(node._forward_cls, Fused)
    return "CppNode" in name


def _is_custom(node: Node, name: str) -> bool:
    """Whether the backward may be that of another function: a custom one, or a gradient that is scaled."""
    return _is_function(node, name) or (
        name.startswith("Embedding") and bool(getattr(node, "_saved_scale_grad_by_freq", False))
    )


def leaves(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    """The leaves behind ``tensors``, whose ``.grad`` a backward pass adds to."""
    found = (getattr(node, "variable", None) for node in nodes(tensors) if "AccumulateGrad" in node.name())
    return [leaf for leaf in found if leaf is not None]


def nodes(tensors: Iterable[Source | None], stops: Iterable[Source] = ()) -> list[Node]:
    """All nodes behind ``tensors``, each once; those of ``stops``, and what lies behind, are left out."""
    seen = set(_roots(stops))
    found = list(set(_roots(tensors)) - seen)
    seen.update(found)
    # The list grows while it is walked.
    for node in found:
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                found.append(following)
    return found


def pass_bytes(outputs: Iterable[Source | None]) -> int:
    """What the gradients of a backward pass take, all held at once: more than the pass does. In bytes."""
    made = (made for node in nodes(outputs) for made in node._input_metadata)
    return sum(math.prod(m.shape) * m.dtype.itemsize for m in made)


def _roots(tensors: Iterable[Source | None]) -> Iterator[Node]:
    """The nodes that tensors come from; a leaf has none."""
    for tensor in tensors:
        if isinstance(tensor, Place):
            yield tensor.edge.node
        elif tensor is not None and tensor.grad_fn is not None:
            yield tensor.grad_fn
