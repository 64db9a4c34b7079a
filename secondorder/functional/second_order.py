"""How ``hvp`` and ``vhp`` multiply: over reverse mode, by forward mode, by finite differences."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from secondorder.autodiff import graph, switches
from secondorder.autodiff.backward import HessianGraph
from secondorder.autodiff.convolutions import lighten_gradients
from secondorder.autodiff.decompose import forward_mode
from secondorder.autodiff.guard import RandomState, undo_writes
from secondorder.autodiff.lighter import light_grad
from secondorder.vectors import arguments
from secondorder.vectors.arguments import MaybeTensors, Tensors

Function = Callable[..., Any]


def over_reverse(
    func: Function,
    inputs: Any,
    v: Any,
    create_graph: bool,
    strict: bool,
    strategy: str,
    has_aux: bool,
    return_grad: bool,
) -> tuple[Point, Tensors]:
    """``H v`` by one backward pass through the gradient, or by the double-backward trick."""
    point = differentiate(func, inputs, v, create_graph, strict, has_aux, return_grad, "hvp")
    kinds = graph.Kinds.of((point.value, *point.gradient), point.inputs)
    side = kinds.side(point.is_plain and not strict)
    if strategy == "reverse-over-reverse":
        side = "left"
    elif strategy == "double-backward" and not (side.startswith("left") and kinds.is_undefined_at_zero):
        side = "right"
    return point, _multiply(point, side, create_graph, strict)


def left_product(point: Point, create_graph: bool, strict: bool) -> Tensors:
    """``v^T H``; where it is wrong or NaN at this point and the Hessian symmetric, ``H v``."""
    kinds = graph.Kinds.of((point.value, *point.gradient), point.inputs)
    side = kinds.side(point.is_plain and not strict, otherwise="left")
    return _multiply(point, side, create_graph, strict)


def _multiply(point: Point, side: str, create_graph: bool, strict: bool) -> Tensors:
    """The product from one side: see ``Kinds.side``."""
    lighten_gradients(point.gradient, (point.value,))
    if side != "right":
        tries = side == "left unless nan"
        product = back(point, create_graph, strict, retain_graph=tries)
        if not tries or all(bool(part.isfinite().all()) for part in product):
            return product
    return _by_rows(point, create_graph, strict)


def _by_rows(point: Point, create_graph: bool, strict: bool) -> Tensors:
    """``H v``, the derivative of ``u^T H`` with respect to ``u``."""
    rows = HessianGraph.by_rows(point.value, point.gradient, point.inputs)
    with torch.set_grad_enabled(create_graph or torch.is_grad_enabled()):
        grads = arguments.grad(rows.outputs, rows.inputs, point.vector, create_graph=create_graph)
        return arguments.fill_zeros(grads, point.inputs, strict, create_graph, "double_back_trick")


class Point(NamedTuple):
    """A scalar function at a point, with its gradient in the graph.

    Attributes:
        is_plain: Whether tensors are real and dense, and ``func`` registered no hooks: with built-in
            operations the Hessian is then symmetric.
    """

    inputs: Tensors
    is_inputs_tuple: bool
    vector: Tensors | None
    value: Tensor
    gradient: MaybeTensors
    aux: Any
    is_plain: bool = False


def differentiate(
    func: Function,
    inputs: Any,
    v: Any,
    create_graph: bool,
    strict: bool,
    has_aux: bool,
    return_grad: bool,
    name: str,
) -> Point:
    """The gradient of ``func``, in the graph; inputs and ``v`` are checked first.

    Its values may be wrong unless ``return_grad`` or ``create_graph``.
    """
    with torch.enable_grad():
        is_inputs_tuple, inputs = arguments.as_tuple(inputs, "inputs", name)
        inputs = arguments.fresh_inputs(inputs, create_graph)
        vector = arguments.input_vector(v, inputs, is_inputs_tuple, create_graph, name)
        hooks = graph.HookCount()
        value, aux = arguments.call_scalar(func, inputs, name, strict, has_aux)
        graph.refuse_wrong((value,), inputs, create_graph=create_graph)
        if create_graph or value.is_complex():
            gradient = arguments.grad((value,), inputs, create_graph=True)
        else:
            gradient = light_grad((value,), inputs, unread=not return_grad)
        arguments.require_grad_of_jacobian(gradient, strict)
    is_plain = not hooks.has_grown() and _is_real_and_dense((*inputs, *(vector or ())))
    return Point(inputs, is_inputs_tuple, vector, value, gradient, aux, is_plain)


def back(point: Point, create_graph: bool, strict: bool, retain_graph: bool = False) -> Tensors:
    """``v^T H``: one backward pass through the gradient."""
    with torch.set_grad_enabled(create_graph or torch.is_grad_enabled()):
        grads = arguments.grad(
            point.gradient,
            point.inputs,
            point.vector,
            create_graph=create_graph,
            retain_graph=create_graph or retain_graph,
        )
        return arguments.fill_zeros(grads, point.inputs, strict, create_graph, "double_back")


def _is_real_and_dense(tensors: Iterable[Tensor]) -> bool:
    return not any(tensor.is_complex() or tensor.layout is not torch.strided for tensor in tensors)


def forward_over_reverse(func: Function, inputs: Any, v: Any, has_aux: bool) -> tuple[Point, Tensors]:
    """The gradient on dual numbers; its tangent is ``H v``."""
    with torch.enable_grad(), switches.dual_level():
        is_inputs_tuple, inputs = arguments.as_tuple(inputs, "inputs", "hvp")
        inputs = arguments.fresh_inputs(inputs, False)
        vector = arguments.input_vector(v, inputs, is_inputs_tuple, False, "hvp")
        points = duals(inputs, vector)
        with forward_mode():
            value, aux = arguments.call_scalar(func, points, "hvp", False, has_aux)
        # Without a graph the tangent of this gradient would be wrong for solve and det (torch 2.13).
        grads = arguments.grad((value,), points, create_graph=True)
        grads = arguments.fill_zeros(grads, inputs, False, False, "back")
        parts = [forward_ad.unpack_dual(grad) for grad in grads]
        product = tuple(torch.zeros_like(p.primal) if p.tangent is None else p.tangent for p in parts)
        gradient = tuple(part.primal for part in parts)
        value = forward_ad.unpack_dual(value).primal
    return Point(inputs, is_inputs_tuple, vector, value, gradient, aux), product


def finite_differences(
    func: Function, inputs: Any, v: Any, create_graph: bool, has_aux: bool
) -> tuple[Point, Tensors]:
    """``(g(x + h v) - g(x - h v)) / 2 h``: all that is left where there is no second derivative.

    All three gradients see the same random numbers, and only the first moves buffers.
    """
    if create_graph:
        raise RuntimeError("create_graph=True needs a second derivative, which finite differences lack.")
    is_inputs_tuple, inputs = arguments.as_tuple(inputs, "inputs", "hvp")
    inputs = arguments.fresh_inputs(inputs, False)
    if any(tensor.is_complex() for tensor in inputs):
        raise TypeError("strategy='finite-differences' needs real inputs, got complex ones.")
    vector = arguments.input_vector(v, inputs, is_inputs_tuple, False, "hvp")
    direction = tuple(map(torch.ones_like, inputs)) if vector is None else vector

    def gradient(points: Tensors) -> tuple[Tensor, Tensors, Any]:
        with torch.enable_grad():
            value, aux = arguments.call_scalar(func, points, "hvp", False, has_aux)
            grads = arguments.grad((value,), points)
        return value, arguments.fill_zeros(grads, points, False, False, "back"), aux

    random = RandomState()
    random.save()
    value, grads, aux = gradient(inputs)
    h, sides = _step_along(direction, inputs), []
    for sign in (1, -1):
        moved = ((x + sign * h * t).detach() for x, t in zip(inputs, direction, strict=True))
        random.restore()
        with undo_writes():
            sides.append(gradient(tuple(x.requires_grad_() for x in moved))[1])
    product = tuple((plus - minus) / (2 * h) for plus, minus in zip(*sides, strict=True))
    return Point(inputs, is_inputs_tuple, vector, value, grads, aux), product


def _step_along(direction: Tensors, inputs: Tensors) -> float:
    """``h``, for an error of ``h^2`` by the difference and of ``eps / h`` by rounding."""
    # In double precision: the square of a large number overflows in single.
    length, size = (
        float(torch.stack([t.detach().double().norm() for t in tensors]).norm())
        for tensors in (direction, inputs)
    )
    # The sum of the two is least at the cube root of eps.
    return torch.finfo(inputs[0].dtype).eps ** (1 / 3) * max(size, 1.0) / length if length > 0 else 1.0


def duals(inputs: Tensors, vector: Tensors | None) -> Tensors:
    """Dual numbers: ``inputs`` with tangents ``vector``."""
    tangents = map(torch.ones_like, inputs) if vector is None else vector
    points = (x.contiguous() if arguments.is_expanded(x) else x for x in inputs)
    return tuple(forward_ad.make_dual(x, t) for x, t in zip(points, tangents, strict=True))
