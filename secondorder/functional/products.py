"""``vjp jvp vhp hvp``: products with the Jacobian and the Hessian of a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from secondorder.autodiff import graph, ladder, switches
from secondorder.autodiff.backward import cotangents, gradient_of, try_product
from secondorder.autodiff.convolutions import lighten_rows
from secondorder.autodiff.decompose import forward_mode
from secondorder.autodiff.lighter import light_grad
from secondorder.functional import second_order
from secondorder.functional.second_order import Point
from secondorder.vectors import arguments
from secondorder.vectors.arguments import Tensors

Function = Callable[..., Any]
TensorOrTensors = Tensor | tuple[Tensor, ...]

JVP_STRATEGIES = ("double-backward", "forward-mode")
HVP_STRATEGIES = (
    "auto",
    "double-backward",
    "reverse-over-reverse",
    "forward-over-reverse",
    "finite-differences",
)


def vjp(
    func: Function,
    inputs: TensorOrTensors,
    v: TensorOrTensors | None = None,
    create_graph: bool = False,
    strict: bool = False,
    *,
    has_aux: bool = False,
) -> tuple[Any, ...]:
    """Vector-Jacobian product ``v^T J`` by reverse mode.

    Args:
        func: Takes the inputs, returns a tensor or a tuple of tensors.
        inputs: Point of differentiation.
        v: Vector with the shapes of the outputs of ``func``. None only for a single output with a
            single element, where it stands for 1.
        create_graph: Results carry a graph and can be differentiated further.
        strict: Raise where an output does not depend on an input, instead of returning zeros.
        has_aux: ``func`` returns ``(outputs, aux)``; ``aux`` is passed on as the last result.

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

    def compute() -> tuple[Any, ...]:
        return _vjp(func, inputs, v, create_graph, strict, has_aux)

    return ladder.climb(compute) if create_graph else compute()


def _vjp(
    func: Function, inputs: Any, v: Any, create_graph: bool, strict: bool, has_aux: bool
) -> tuple[Any, ...]:
    with torch.enable_grad():
        is_inputs_tuple, inputs = arguments.as_tuple(inputs, "inputs", "vjp")
        inputs = arguments.fresh_inputs(inputs, create_graph)
        outputs, is_outputs_tuple, aux = arguments.call(func, inputs, "vjp", strict, has_aux)
        vector: Tensors | None = None
        if v is not None:
            vector = arguments.fresh_vector(arguments.as_tuple(v, "v", "vjp")[1], create_graph)
            arguments.check_vector(vector, outputs, is_outputs_tuple)
        elif len(outputs) != 1 or outputs[0].nelement() != 1:
            text = "The vector v can only be None if the user-provided function returns "
            raise RuntimeError(text + "a single Tensor with a single element.")

    with torch.set_grad_enabled(create_graph or torch.is_grad_enabled()):
        grads = gradient_of(outputs, inputs, vector, create_graph)
        product = arguments.fill_zeros(grads, inputs, strict, create_graph, "back")
    results = (
        arguments.give_back(outputs, is_outputs_tuple, create_graph),
        arguments.give_back(product, is_inputs_tuple, create_graph),
    )
    return (*results, arguments.give_back_aux(aux, create_graph)) if has_aux else results


def jvp(
    func: Function,
    inputs: TensorOrTensors,
    v: TensorOrTensors | None = None,
    create_graph: bool = False,
    strict: bool = False,
    *,
    strategy: str = "double-backward",
    has_aux: bool = False,
) -> tuple[Any, ...]:
    """Jacobian-vector product ``J v``.

    By default from two backward passes: the first is linear in its vector ``u``, its derivative with
    respect to ``u`` is ``J``, and a second pass gives ``J v``. It works wherever reverse mode works
    twice.

    Args:
        func: Takes the inputs, returns a tensor or a tuple of tensors.
        inputs: Point of differentiation.
        v: Vector with the shapes of ``inputs``. None only for a single input with a single element,
            where it stands for 1.
        create_graph: Results carry a graph and can be differentiated further.
        strict: Raise where an output does not depend on an input, instead of returning zeros.
        strategy: "double-backward", or "forward-mode", which costs less and fails on operations
            without a forward derivative; with ``create_graph`` it is "double-backward".
        has_aux: ``func`` returns ``(outputs, aux)``; ``aux`` is passed on as the last result.

    Returns:
        ``(outputs, product)``: the value of ``func`` and the product, with the shapes of the outputs.

    Raises:
        TypeError: ``inputs``, ``v`` or the outputs are neither a tensor nor a tuple of tensors.
        ValueError: ``strategy`` is unknown.
        RuntimeError: ``v`` is missing or has the wrong sizes; ``strict`` found no dependence, or was
            asked of forward mode.

    Cost: 1.2 to 1.7 gradients, and up to 2.3 times the peak memory of one; in forward mode less than one.

    Example:
        >>> x = torch.tensor([1.0, 2.0])
        >>> jvp(lambda x: x**2, x, torch.tensor([1.0, 10.0]))
        (tensor([1., 4.]), tensor([ 2., 40.]))
    """
    # Derivatives through forward mode are wrong in torch: through norms, solve, det.
    forward = _choose(strategy, JVP_STRATEGIES, strict) == "forward-mode" and not create_graph

    def compute() -> tuple[Any, ...]:
        if forward:
            found, product = _push(func, inputs, v, has_aux)
        else:
            found, product = _double_backward(func, inputs, v, create_graph, strict, has_aux)
        results = (
            arguments.give_back(found.tensors, found.is_tuple, create_graph),
            arguments.give_back(product, found.is_tuple, create_graph),
        )
        return (*results, arguments.give_back_aux(found.aux, create_graph)) if has_aux else results

    return ladder.climb(compute)


def vhp(
    func: Function,
    inputs: TensorOrTensors,
    v: TensorOrTensors | None = None,
    create_graph: bool = False,
    strict: bool = False,
    *,
    return_grad: bool = False,
    has_aux: bool = False,
) -> tuple[Any, ...]:
    """Vector-Hessian product ``v^T H`` by a backward pass through the gradient.

    Args:
        func: Takes the inputs, returns one tensor with one element.
        inputs: Point of differentiation.
        v: Vector with the shapes of ``inputs``. None only for a single input with a single element,
            where it stands for 1.
        create_graph: Results carry a graph and can be differentiated further.
        strict: Raise where the value or its gradient does not depend on an input, instead of
            returning zeros.
        return_grad: Return the gradient as well, which is computed anyway.
        has_aux: ``func`` returns ``(value, aux)``; ``aux`` is passed on as the last result.

    Returns:
        ``(value, product)``: the value of ``func`` and the product, with the shapes of ``inputs``;
        ``(value, product, gradient)`` with ``return_grad``.

    Raises:
        TypeError: ``inputs``, ``v`` or the output are neither a tensor nor a tuple of tensors.
        RuntimeError: ``v`` is missing or has the wrong sizes; the output is not one tensor with one
            element; ``strict`` found no dependence.

    Cost: 2.0 (MLP) to 3.2 gradients (transformer), half a gradient more with ``return_grad``, and up to 3.0
    times the peak memory of one. Where a second derivative is missing or known to be wrong ``func`` is called
    once more, under ``decompose()``.

    Example:
        >>> x = torch.tensor([1.0, 2.0])
        >>> vhp(lambda x: x.pow(3).sum(), x, torch.tensor([1.0, 10.0]))
        (tensor(9.), tensor([  6., 120.]))
    """

    def compute() -> tuple[Any, ...]:
        point = second_order.differentiate(func, inputs, v, create_graph, strict, has_aux, return_grad, "vhp")
        product = second_order.left_product(point, create_graph, strict)
        return _second_order_results(point, product, create_graph, return_grad, has_aux)

    return ladder.climb(compute)


def hvp(
    func: Function,
    inputs: TensorOrTensors,
    v: TensorOrTensors | None = None,
    create_graph: bool = False,
    strict: bool = False,
    *,
    strategy: str = "auto",
    return_grad: bool = False,
    has_aux: bool = False,
) -> tuple[Any, ...]:
    """Hessian-vector product ``H v``.

    Where the graph of the gradient holds only built-in operations the Hessian is symmetric, and one
    backward pass through the gradient gives the product; "auto" looks. Otherwise (custom Functions, hooks
    registered by ``func``, complex or sparse tensors, ``strict``) it is torch's double-backward trick.

    Args:
        func: Takes the inputs, returns one tensor with one element.
        inputs: Point of differentiation.
        v: Vector with the shapes of ``inputs``. None only for a single input with a single element,
            where it stands for 1.
        create_graph: Results carry a graph and can be differentiated further.
        strict: Raise where the value or its gradient does not depend on an input, instead of
            returning zeros.
        strategy: "auto"; "reverse-over-reverse", the product of ``vhp``; "double-backward", what
            ``torch.autograd.functional.hvp`` does; "forward-over-reverse", which fails on operations
            without a forward derivative, and with ``create_graph`` is "auto"; "finite-differences" of
            gradients, for functions without a second derivative: two thirds of the digits where ``func``
            varies on the scale of ``norm(inputs)`` or one, the larger; real inputs only, no ``create_graph``.
        return_grad: Return the gradient as well, which is computed anyway.
        has_aux: ``func`` returns ``(value, aux)``; ``aux`` is passed on as the last result.

    Returns:
        ``(value, product)``: the value of ``func`` and the product, with the shapes of ``inputs``;
        ``(value, product, gradient)`` with ``return_grad``.

    Raises:
        TypeError: ``inputs``, ``v`` or the output are neither a tensor nor a tuple of tensors.
        ValueError: ``strategy`` is unknown.
        RuntimeError: ``v`` is missing or has the wrong sizes; the output is not one tensor with one
            element; ``strict`` found no dependence, or was asked of forward mode.

    Cost: 2.0 (MLP) to 3.2 gradients (transformer), half a gradient more with ``return_grad``, and up to 3.0
    times the peak memory of one; 3.5 and 5.9 with the double-backward trick; 3 gradients with finite
    differences. Where a second derivative is missing or known to be wrong ``func`` is called once more, under
    ``decompose()``, with the random state of the first call.

    Example:
        >>> x = torch.tensor([1.0, 2.0])
        >>> hvp(lambda x: x.pow(3).sum(), x, torch.tensor([1.0, 10.0]))
        (tensor(9.), tensor([  6., 120.]))
    """
    _choose(strategy, HVP_STRATEGIES, strict)
    if create_graph and strategy == "forward-over-reverse":
        # Derivatives through forward mode are wrong in torch: through norms, solve, det.
        strategy = "auto"

    def compute() -> tuple[Any, ...]:
        if strategy == "forward-over-reverse":
            point, product = second_order.forward_over_reverse(func, inputs, v, has_aux)
        elif strategy == "finite-differences":
            point, product = second_order.finite_differences(func, inputs, v, create_graph, has_aux)
        else:
            point, product = second_order.over_reverse(
                func, inputs, v, create_graph, strict, strategy, has_aux, return_grad
            )
        return _second_order_results(point, product, create_graph, return_grad, has_aux)

    return ladder.climb(compute)


def _second_order_results(
    point: Point, product: Tensors, create_graph: bool, return_grad: bool, has_aux: bool
) -> tuple[Any, ...]:
    results = [
        arguments.give_back((point.value,), False, create_graph),
        arguments.give_back(product, point.is_inputs_tuple, create_graph),
    ]
    if return_grad:
        gradient = arguments.fill_zeros(point.gradient, point.inputs, False, create_graph, "back")
        results.append(arguments.give_back(gradient, point.is_inputs_tuple, create_graph))
    if has_aux:
        results.append(arguments.give_back_aux(point.aux, create_graph))
    return tuple(results)


def _choose(strategy: str, choices: tuple[str, ...], strict: bool) -> str:
    if strategy not in choices:
        raise ValueError(f"strategy must be one of {', '.join(map(repr, choices))}, got {strategy!r}.")
    if strict and strategy.startswith(("forward", "finite")):
        raise RuntimeError(
            f"strict=True needs reverse mode, got strategy={strategy!r}; leave one of them out."
        )
    return strategy


def _double_backward(
    func: Function, inputs: Any, v: Any, create_graph: bool, strict: bool, has_aux: bool
) -> tuple[arguments.Outputs, Tensors]:
    """Outputs and ``J v`` by differentiating ``u -> u^T J``."""
    with torch.enable_grad():
        is_inputs_tuple, inputs = arguments.as_tuple(inputs, "inputs", "jvp")
        inputs = arguments.fresh_inputs(inputs, create_graph)
        vector = arguments.input_vector(v, inputs, is_inputs_tuple, create_graph, "jvp")
        found = arguments.call(func, inputs, "jvp", strict, has_aux)
        graph.refuse_wrong_rows(found.tensors, inputs, create_graph=create_graph)
        duals = cotangents(found.tensors)
        if create_graph:
            grads = arguments.grad(found.tensors, inputs, duals, create_graph=True)
        else:
            grads = light_grad(found.tensors, inputs, duals, rows=True, unread=True)
            lighten_rows(grads, found.tensors)
        arguments.require_grad_of_grad_inputs(grads, strict)
    with torch.set_grad_enabled(create_graph or torch.is_grad_enabled()):
        columns = arguments.grad(grads, duals, vector, create_graph=create_graph)
        if create_graph:
            try_product(columns, inputs)
        return found, arguments.fill_zeros(columns, found.tensors, strict, create_graph, "back_trick")


def _push(func: Function, inputs: Any, v: Any, has_aux: bool) -> tuple[arguments.Outputs, Tensors]:
    """Outputs and ``J v`` by forward mode."""
    with torch.enable_grad(), switches.dual_level():
        is_inputs_tuple, inputs = arguments.as_tuple(inputs, "inputs", "jvp")
        inputs = arguments.fresh_inputs(inputs, False)
        vector = arguments.input_vector(v, inputs, is_inputs_tuple, False, "jvp")
        with forward_mode():
            found = arguments.call(func, second_order.duals(inputs, vector), "jvp", False, has_aux)
        parts = [forward_ad.unpack_dual(output) for output in found.tensors]
        product = tuple(torch.zeros_like(p.primal) if p.tangent is None else p.tangent for p in parts)
        return found._replace(tensors=tuple(part.primal for part in parts)), product
