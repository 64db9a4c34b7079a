"""Arguments of the functional API: tuples in and out, ``v=None``, ``strict``, ``create_graph``.

The rules and the texts of the errors are those of ``torch.autograd.functional``, to the letter, so that
a program that moves from there to here sees no difference, not even in what it catches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.utils import _pytree as pytree

Tensors = tuple[Tensor, ...]
MaybeTensors = tuple["Tensor | None", ...]

OUTPUTS = "outputs of the user-provided function"


def as_tuple(value: Any, argument: str, function: str) -> tuple[bool, Tensors]:
    """Return whether ``value`` was a tuple, and ``value`` as a tuple of tensors.

    Raises:
        TypeError: ``value`` is neither a tensor nor a tuple of tensors (a list is neither).
    """
    is_tuple = isinstance(value, tuple)
    tensors = value if is_tuple else (value,)
    for index, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            where = f"value at index {index}" if is_tuple else f"given {argument}"
            raise TypeError(
                f"The {argument} given to {function} must be either a Tensor or a tuple of Tensors but the"
                f" {where} has type {type(tensor)}."
            )
    return is_tuple, tensors


def fresh_inputs(inputs: Tensors, create_graph: bool) -> Tensors:
    """New tensor objects with the values of ``inputs``, that require gradients.

    New objects, so that the function's arguments differ from the same tensors captured by its closure
    (pytorch issue 32576). With ``create_graph`` they stay connected to the tensors the user gave.
    """
    return tuple(_fresh(tensor, create_graph, requires_grad=True) for tensor in inputs)


def fresh_vector(v: Tensors, create_graph: bool) -> Tensors:
    """New tensor objects with the values of ``v``; they carry a graph only with ``create_graph``."""
    return tuple(_fresh(tensor, create_graph, requires_grad=False) for tensor in v)


def _fresh(tensor: Tensor, create_graph: bool, requires_grad: bool) -> Tensor:
    if create_graph and tensor.requires_grad:
        # A sparse tensor has no view.
        return tensor.clone() if tensor.is_sparse else tensor.view_as(tensor)
    return tensor.detach().requires_grad_(requires_grad)


def check_vector(v: Tensors, like: Tensors, like_is_tuple: bool) -> None:
    """Raise RuntimeError unless ``v`` has the length and the sizes of ``like``."""
    if len(v) != len(like):
        if like_is_tuple:
            raise RuntimeError(f"v is a tuple of invalid length: should be {len(like)} but got {len(v)}.")
        raise RuntimeError("The given v should contain a single Tensor.")
    for index, (given, expected) in enumerate(zip(v, like, strict=True)):
        if given.size() != expected.size():
            entry = f"Entry {index} in " if like_is_tuple else ""
            raise RuntimeError(
                f"{entry}v has invalid size: should be {expected.size()} but got {given.size()}."
            )


def input_vector(
    v: Any, inputs: Tensors, inputs_is_tuple: bool, create_graph: bool, function: str
) -> Tensors | None:
    """The vector of a product with one entry an input; None stands for a single one."""
    if v is not None:
        vector = fresh_vector(as_tuple(v, "v", function)[1], create_graph)
        check_vector(vector, inputs, inputs_is_tuple)
        return vector
    if len(inputs) != 1 or inputs[0].nelement() != 1:
        text = "The vector v can only be None if the input to the user-provided function "
        raise RuntimeError(text + "is a single Tensor with a single element.")
    return None


class Outputs(NamedTuple):
    """What a function returned: its outputs, whether they were a tuple, and what came beside them."""

    tensors: Tensors
    is_tuple: bool
    aux: Any


def call(func: Any, inputs: Tensors, function: str, strict: bool, has_aux: bool = False) -> Outputs:
    """``func(*inputs)``, checked; with ``has_aux`` the function returns ``(outputs, aux)``."""
    returned, aux = func(*inputs), None
    if has_aux:
        if not isinstance(returned, tuple) or len(returned) != 2:
            raise TypeError(
                f"The function given to {function} must return a tuple (outputs, aux) with has_aux=True,"
                f" got {type(returned).__name__}."
            )
        returned, aux = returned
    is_tuple, outputs = as_tuple(returned, OUTPUTS, function)
    require_grad_of_outputs(outputs, strict)
    return Outputs(outputs, is_tuple, aux)


def call_scalar(
    func: Any, inputs: Tensors, function: str, strict: bool, has_aux: bool = False
) -> tuple[Tensor, Any]:
    """``func(*inputs)``, which must be one tensor with one element, and what came beside it."""
    outputs, is_tuple, aux = call(func, inputs, function, strict, has_aux)
    if is_tuple:
        raise RuntimeError(f"The function given to {function} should return a single Tensor")
    if outputs[0].nelement() != 1:
        raise RuntimeError(
            f"The Tensor returned by the function given to {function} should contain a single element"
        )
    return outputs[0], aux


def require_grad_of_outputs(outputs: Tensors, strict: bool) -> None:
    """In strict mode, raise RuntimeError for an output that does not require gradients."""
    for index, tensor in enumerate(outputs):
        if strict and not tensor.requires_grad:
            raise RuntimeError(
                f"Output {index} of the user-provided function does not require gradients."
                " The outputs must be computed in a differentiable manner from the input"
                " when running in strict mode."
            )


def require_grad_of_jacobian(grads: MaybeTensors, strict: bool) -> None:
    """In strict mode, raise RuntimeError for a gradient that is missing or constant (second order)."""
    for index, grad in enumerate(grads):
        _require_present(grad, index, strict)
        if strict and grad is not None and not grad.requires_grad:
            raise RuntimeError(
                "While computing the hessian, found that the jacobian of the user-provided"
                f" function with respect to input {index} is independent of the input. This is not"
                " allowed in strict mode. You should ensure that your function is twice"
                " differentiable and that the jacobian depends on the inputs (this would be"
                " violated by a linear function for example)."
            )


def require_grad_of_grad_inputs(grads: MaybeTensors, strict: bool) -> None:
    """In strict mode, raise RuntimeError for a missing or constant gradient in jvp's double backward."""
    for index, grad in enumerate(grads):
        _require_present(grad, index, strict)
        if strict and grad is not None and not grad.requires_grad:
            raise RuntimeError(
                f"The gradient with respect to input {index} is independent of the inputs of the"
                " user-provided function. This is not allowed in strict mode."
            )


def _require_present(grad: Tensor | None, index: int, strict: bool) -> None:
    if strict and grad is None:
        raise RuntimeError(
            f"The output of the user-provided function is independent of input {index}."
            " This is not allowed in strict mode."
        )


_MISSING = {
    "back": "The output of the user-provided function is independent of input {0}."
    " This is not allowed in strict mode.",
    "back_trick": "The gradient with respect to the input is independent of entry {0}"
    " in the grad_outputs when using the double backward trick to compute"
    " forward mode gradients. This is not allowed in strict mode.",
    "double_back": "The jacobian of the user-provided function is independent of input {0}."
    " This is not allowed in strict mode.",
    "double_back_trick": "The hessian of the user-provided function is independent of "
    "entry {0} in the grad_jacobian. This is not allowed in strict "
    "mode as it prevents from using the double backward trick to "
    "replace forward mode AD.",
}


def fill_zeros(grads: MaybeTensors, like: Tensors, strict: bool, create_graph: bool, stage: str) -> Tensors:
    """Replace missing gradients by zeros; in strict mode raise RuntimeError for them instead.

    Args:
        grads: Gradients as autograd returns them, None where there is no path.
        like: Tensors with the shapes of the result.
        strict: Raise for a missing gradient and, with ``create_graph``, for a constant one.
        create_graph: Whether the caller promised a result that can be differentiated.
        stage: "back", "back_trick", "double_back" or "double_back_trick"; chooses the text.
    """
    filled = []
    for index, (grad, reference) in enumerate(zip(grads, like, strict=True)):
        if grad is None:
            if strict:
                raise RuntimeError(_MISSING[stage].format(index))
            grad = torch.zeros_like(reference)
        elif strict and create_graph and not grad.requires_grad:
            what = "hessian" if "double" in stage else "jacobian"
            raise RuntimeError(
                f"The {what} of the user-provided function is independent of "
                f"input {index}. This is not allowed in strict mode when create_graph=True."
            )
        filled.append(grad)
    return tuple(filled)


def _has_graph(output: Any) -> bool:
    """Of a tensor, an edge of the graph or None."""
    return isinstance(output, GradientEdge) or (output is not None and output.requires_grad)


def grad(
    outputs: Sequence[Any],
    inputs: Tensors,
    grad_outputs: Tensors | None = None,
    *,
    create_graph: bool = False,
    retain_graph: bool | None = None,
    is_grads_batched: bool = False,
) -> MaybeTensors:
    """``torch.autograd.grad`` that skips outputs without a graph; None where there is no path."""
    refuse_inference_mode()
    given: Sequence[Tensor | None] = (None,) * len(outputs) if grad_outputs is None else grad_outputs
    pairs = [(out, v) for out, v in zip(outputs, given, strict=True) if _has_graph(out)]
    if not pairs:
        return (None,) * len(inputs)
    return torch.autograd.grad(
        [out for out, _ in pairs],
        inputs,
        [v for _, v in pairs],
        allow_unused=True,
        create_graph=create_graph,
        retain_graph=retain_graph,
        is_grads_batched=is_grads_batched,
    )


def split_tensors(tree: Any) -> tuple[Tensors, Callable[[Tensors], Any]]:
    """The tensors in a tree, and a function that puts others in their places."""
    leaves, spec = pytree.tree_flatten(tree)

    def rebuild(tensors: Tensors) -> Any:
        rest = iter(tensors)
        return pytree.tree_unflatten([next(rest) if isinstance(x, Tensor) else x for x in leaves], spec)

    return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor)), rebuild


def give_back_aux(aux: Any, create_graph: bool) -> Any:
    """What came beside the outputs, its tensors detached unless a graph was asked for."""
    return aux if create_graph else pytree.tree_map_only(Tensor, Tensor.detach, aux)


def give_back(tensors: Tensors, is_tuple: bool, create_graph: bool) -> Any:
    """Results in the user's structure; detached unless a graph was asked for."""
    results = tensors if create_graph else tuple(tensor.detach() for tensor in tensors)
    return results if is_tuple else results[0]


def refuse_inference_mode() -> None:
    """Raise RuntimeError inside ``torch.inference_mode``, where all derivatives would be zero."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError("derivatives need gradients, which torch.inference_mode() turns off; leave it.")


def check_chunk_size(chunk_size: Any) -> None:
    """Raise ValueError unless it is None or a positive integer."""
    is_number = isinstance(chunk_size, int) and not isinstance(chunk_size, bool)
    if chunk_size is not None and not (is_number and chunk_size >= 1):
        raise ValueError(f"chunk_size must be a positive integer or None, got {chunk_size!r}.")


def is_expanded(tensor: Tensor) -> bool:
    """Whether elements share memory, which forward mode refuses."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
