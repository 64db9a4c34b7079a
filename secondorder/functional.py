"""Derivative products and matrices of functions of tensors: ``vjp jvp jacobian hessian vhp hvp``.

A function takes tensors and returns a tensor or a tuple of tensors; ``inputs`` and ``v`` are a tensor or
a tuple of tensors, and what comes back has the same structure. Signatures, results, errors and side
effects are those of ``torch.autograd.functional``. Costs are in gradients: one evaluation of the
function and one backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from secondorder import _arguments, _jacobian
from secondorder._arguments import Tensors

__all__ = ["hessian", "hvp", "jacobian", "jvp", "vhp", "vjp"]

Function = Callable[..., Any]
TensorOrTensors = Tensor | tuple[Tensor, ...]


def vjp(
    func: Function,
    inputs: TensorOrTensors,
    v: TensorOrTensors | None = None,
    create_graph: bool = False,
    strict: bool = False,
) -> tuple[Any, Any]:
    """Vector-Jacobian product ``v^T J`` by reverse mode.

    Args:
        func: Takes the inputs, returns a tensor or a tuple of tensors.
        inputs: Point of differentiation.
        v: Vector with the shapes of the outputs of ``func``. None only for a single output with a
            single element, where it stands for 1.
        create_graph: Results carry a graph and can be differentiated further.
        strict: Raise where an output does not depend on an input, instead of returning zeros.

    Returns:
        ``(outputs, product)``: the value of ``func`` and the product, with the shapes of ``inputs``.

    Raises:
        TypeError: ``inputs``, ``v`` or the outputs are neither a tensor nor a tuple of tensors.
        RuntimeError: ``v`` is missing or has the wrong sizes; ``strict`` found no dependence.

    Cost: one gradient.

    Example:
        >>> x = torch.tensor([1.0, 2.0])
        >>> vjp(lambda x: x**2, x, torch.tensor([1.0, 10.0]))
        (tensor([1., 4.]), tensor([ 2., 40.]))
    """
    with torch.enable_grad():
        is_inputs_tuple, inputs = _arguments.as_tuple(inputs, "inputs", "vjp")
        inputs = _arguments.fresh_inputs(inputs, create_graph)
        is_outputs_tuple, outputs = _arguments.call(func, inputs, "vjp", strict)
        vector: Tensors | None = None
        if v is not None:
            vector = _arguments.fresh_vector(_arguments.as_tuple(v, "v", "vjp")[1], create_graph)
            _arguments.check_vector(vector, outputs, is_outputs_tuple)
        elif len(outputs) != 1 or outputs[0].nelement() != 1:
            text = "The vector v can only be None if the user-provided function returns "
            raise RuntimeError(text + "a single Tensor with a single element.")

    with torch.set_grad_enabled(create_graph or torch.is_grad_enabled()):
        grads = _arguments.grad(outputs, inputs, vector, create_graph=create_graph)
        product = _arguments.fill_zeros(grads, inputs, strict, create_graph, "back")
    return (
        _arguments.give_back(outputs, is_outputs_tuple, create_graph),
        _arguments.give_back(product, is_inputs_tuple, create_graph),
    )


def jvp(
    func: Function,
    inputs: TensorOrTensors,
    v: TensorOrTensors | None = None,
    create_graph: bool = False,
    strict: bool = False,
) -> tuple[Any, Any]:
    """Jacobian-vector product ``J v`` by a double backward pass.

    The first backward pass is linear in its vector ``u``; its derivative with respect to ``u`` is
    ``J``, so a second one gives ``J v``. It works wherever reverse mode works twice.

    Args:
        func: Takes the inputs, returns a tensor or a tuple of tensors.
        inputs: Point of differentiation.
        v: Vector with the shapes of ``inputs``. None only for a single input with a single element,
            where it stands for 1.
        create_graph: Results carry a graph and can be differentiated further.
        strict: Raise where an output does not depend on an input, instead of returning zeros.

    Returns:
        ``(outputs, product)``: the value of ``func`` and the product, with the shapes of the outputs.

    Raises:
        TypeError: ``inputs``, ``v`` or the outputs are neither a tensor nor a tuple of tensors.
        RuntimeError: ``v`` is missing or has the wrong sizes; ``strict`` found no dependence.

    Cost: about two gradients.

    Example:
        >>> x = torch.tensor([1.0, 2.0])
        >>> jvp(lambda x: x**2, x, torch.tensor([1.0, 10.0]))
        (tensor([1., 4.]), tensor([ 2., 40.]))
    """
    with torch.enable_grad():
        is_inputs_tuple, inputs = _arguments.as_tuple(inputs, "inputs", "jvp")
        inputs = _arguments.fresh_inputs(inputs, create_graph)
        vector = _arguments.input_vector(v, inputs, is_inputs_tuple, create_graph, "jvp")
        is_outputs_tuple, outputs = _arguments.call(func, inputs, "jvp", strict)
        # The backward pass is linear in these: their value does not matter, as long as it is finite.
        duals = tuple(torch.zeros_like(output, requires_grad=True) for output in outputs)
        grads = _arguments.grad(outputs, inputs, duals, create_graph=True)
        _arguments.require_grad_of_grad_inputs(grads, strict)

    with torch.set_grad_enabled(create_graph or torch.is_grad_enabled()):
        columns = _arguments.grad(grads, duals, vector, create_graph=create_graph)
        product = _arguments.fill_zeros(columns, outputs, strict, create_graph, "back_trick")
    return (
        _arguments.give_back(outputs, is_outputs_tuple, create_graph),
        _arguments.give_back(product, is_outputs_tuple, create_graph),
    )


def vhp(
    func: Function,
    inputs: TensorOrTensors,
    v: TensorOrTensors | None = None,
    create_graph: bool = False,
    strict: bool = False,
) -> tuple[Any, Any]:
    """Vector-Hessian product ``v^T H`` by a backward pass through the gradient.

    Args:
        func: Takes the inputs, returns one tensor with one element.
        inputs: Point of differentiation.
        v: Vector with the shapes of ``inputs``. None only for a single input with a single element,
            where it stands for 1.
        create_graph: Results carry a graph and can be differentiated further.
        strict: Raise where the value or its gradient does not depend on an input, instead of
            returning zeros.

    Returns:
        ``(value, product)``: the value of ``func`` and the product, with the shapes of ``inputs``.

    Raises:
        TypeError: ``inputs``, ``v`` or the output are neither a tensor nor a tuple of tensors.
        RuntimeError: ``v`` is missing or has the wrong sizes; the output is not one tensor with one
            element; ``strict`` found no dependence.

    Cost: about 2.5 gradients, 1.3 of them for the second backward pass.

    Example:
        >>> x = torch.tensor([1.0, 2.0])
        >>> vhp(lambda x: x.pow(3).sum(), x, torch.tensor([1.0, 10.0]))
        (tensor(9.), tensor([  6., 120.]))
    """
    with torch.enable_grad():
        is_inputs_tuple, inputs = _arguments.as_tuple(inputs, "inputs", "vhp")
        inputs = _arguments.fresh_inputs(inputs, create_graph)
        vector = _arguments.input_vector(v, inputs, is_inputs_tuple, create_graph, "vhp")
        value = _arguments.call_scalar(func, inputs, "vhp", strict)
        gradient = _arguments.grad((value,), inputs, create_graph=True)
        _arguments.require_grad_of_jacobian(gradient, strict)

    with torch.set_grad_enabled(create_graph or torch.is_grad_enabled()):
        grads = _arguments.grad(gradient, inputs, vector, create_graph=create_graph)
        product = _arguments.fill_zeros(grads, inputs, strict, create_graph, "double_back")
    return (
        _arguments.give_back((value,), False, create_graph),
        _arguments.give_back(product, is_inputs_tuple, create_graph),
    )


def hvp(
    func: Function,
    inputs: TensorOrTensors,
    v: TensorOrTensors | None = None,
    create_graph: bool = False,
    strict: bool = False,
) -> tuple[Any, Any]:
    """Hessian-vector product ``H v`` by the double-backward trick on the gradient.

    Where the Hessian is symmetric, that is for every twice continuously differentiable function, ``vhp``
    gives the same numbers for less.

    Args:
        func: Takes the inputs, returns one tensor with one element.
        inputs: Point of differentiation.
        v: Vector with the shapes of ``inputs``. None only for a single input with a single element,
            where it stands for 1.
        create_graph: Results carry a graph and can be differentiated further.
        strict: Raise where the value or its gradient does not depend on an input, instead of
            returning zeros.

    Returns:
        ``(value, product)``: the value of ``func`` and the product, with the shapes of ``inputs``.

    Raises:
        TypeError: ``inputs``, ``v`` or the output are neither a tensor nor a tuple of tensors.
        RuntimeError: ``v`` is missing or has the wrong sizes; the output is not one tensor with one
            element; ``strict`` found no dependence.

    Cost: about 3.5 gradients.

    Example:
        >>> x = torch.tensor([1.0, 2.0])
        >>> hvp(lambda x: x.pow(3).sum(), x, torch.tensor([1.0, 10.0]))
        (tensor(9.), tensor([  6., 120.]))
    """
    with torch.enable_grad():
        is_inputs_tuple, inputs = _arguments.as_tuple(inputs, "inputs", "hvp")
        inputs = _arguments.fresh_inputs(inputs, create_graph)
        vector = _arguments.input_vector(v, inputs, is_inputs_tuple, create_graph, "hvp")
        value = _arguments.call_scalar(func, inputs, "hvp", strict)
        gradient = _arguments.grad((value,), inputs, create_graph=True)
        _arguments.require_grad_of_jacobian(gradient, strict)
        duals = tuple(torch.zeros_like(tensor, requires_grad=True) for tensor in inputs)
        rows = _arguments.grad(gradient, inputs, duals, create_graph=True)

    with torch.set_grad_enabled(create_graph or torch.is_grad_enabled()):
        grads = _arguments.grad(rows, duals, vector, create_graph=create_graph)
        product = _arguments.fill_zeros(grads, inputs, strict, create_graph, "double_back_trick")
    return (
        _arguments.give_back((value,), False, create_graph),
        _arguments.give_back(product, is_inputs_tuple, create_graph),
    )


def jacobian(
    func: Function,
    inputs: TensorOrTensors,
    create_graph: bool = False,
    strict: bool = False,
    vectorize: bool = False,
    strategy: str = "reverse-mode",
) -> Any:
    """Jacobian of ``func``.

    Args:
        func: Takes the inputs, returns a tensor or a tuple of tensors.
        inputs: Point of differentiation.
        create_graph: The result carries a graph. Reverse mode only.
        strict: Raise where an output does not depend on an input, instead of returning zeros. Only
            in reverse mode without ``vectorize``.
        vectorize: One batched backward pass (``torch.vmap``) instead of one for each output element.
        strategy: "reverse-mode", or "forward-mode", which takes one pass for all input elements and
            needs ``vectorize=True``.

    Returns:
        A tensor of shape ``output.shape + input.shape``; with tuples, ``result[i][j]`` is the Jacobian
        of output ``i`` with respect to input ``j``.

    Raises:
        TypeError: ``inputs`` or the outputs are neither a tensor nor a tuple of tensors.
        AssertionError: ``strategy`` is unknown.
        RuntimeError: ``strict`` found no dependence, or is not supported by the strategy.
        NotImplementedError: forward mode with ``create_graph`` or without ``vectorize``.

    Cost: one gradient, and one backward pass for each output element (row by row); one batched pass
    (vectorized), with memory for all rows at once.

    Example:
        >>> jacobian(lambda x: x**2, torch.tensor([1.0, 2.0]))
        tensor([[2., 0.],
                [0., 4.]])
    """
    is_inputs_tuple, is_outputs_tuple, blocks = _jacobian.blocks(
        func, inputs, create_graph, strict, vectorize, strategy
    )
    return _jacobian.unpack(blocks, is_outputs_tuple, is_inputs_tuple)


def hessian(
    func: Function,
    inputs: TensorOrTensors,
    create_graph: bool = False,
    strict: bool = False,
    vectorize: bool = False,
    outer_jacobian_strategy: str = "reverse-mode",
) -> Any:
    """Hessian of a scalar function: the Jacobian of its gradient.

    Args:
        func: Takes the inputs, returns one tensor with one element.
        inputs: Point of differentiation.
        create_graph: The result carries a graph. Reverse mode only.
        strict: Raise where the value or its gradient does not depend on an input. Only in reverse mode
            without ``vectorize``.
        vectorize: One batched backward pass (``torch.vmap``) instead of one for each input element.
        outer_jacobian_strategy: "reverse-mode", or "forward-mode" (forward over reverse), which needs
            ``vectorize=True``.

    Returns:
        A tensor of shape ``input.shape + input.shape``; with a tuple of inputs, ``result[i][j]`` of
        shape ``input_i.shape + input_j.shape``.

    Raises:
        TypeError: ``inputs`` or the output are neither a tensor nor a tuple of tensors.
        AssertionError: ``outer_jacobian_strategy`` is unknown.
        RuntimeError: the output is not one tensor with one element; ``strict`` found no dependence, or
            is not supported by the strategy.
        NotImplementedError: forward mode with ``create_graph`` or without ``vectorize``.

    Cost: one gradient, and one second backward pass (1.3 gradients) for each input element; one batched
    pass (vectorized), with memory for all rows at once.

    Example:
        >>> hessian(lambda x: x.pow(3).sum(), torch.tensor([1.0, 2.0]))
        tensor([[ 6.,  0.],
                [ 0., 12.]])
    """
    is_inputs_tuple, inputs = _arguments.as_tuple(inputs, "inputs", "hessian")
    if outer_jacobian_strategy not in ("forward-mode", "reverse-mode"):
        raise AssertionError('Expected strategy to be either "forward-mode" or "reverse-mode".')

    def gradient(*points: Tensor) -> Tensors:
        value = _arguments.call_scalar(func, points, "hessian", strict)
        grads = _arguments.grad((value,), points, create_graph=True)
        grads = _arguments.fill_zeros(grads, points, False, True, "back")
        _arguments.require_grad_of_jacobian(grads, strict)
        return grads

    def gradient_under_forward_mode(*points: Tensor) -> Tensors:
        value_and_pull = torch.func.vjp(lambda *x: _arguments.call_scalar(func, x, "hessian", False), *points)
        grads: Tensors = value_and_pull[1](torch.ones_like(value_and_pull[0]))
        return grads

    forward = outer_jacobian_strategy == "forward-mode"
    _, _, blocks = _jacobian.blocks(
        gradient_under_forward_mode if forward else gradient,
        inputs,
        create_graph,
        strict,
        vectorize,
        outer_jacobian_strategy,
    )
    return _jacobian.unpack(blocks, is_inputs_tuple, is_inputs_tuple)
