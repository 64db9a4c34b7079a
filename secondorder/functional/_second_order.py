"""How ``hvp`` and ``vhp`` multiply: over reverse mode, by forward mode, by finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from secondorder import _arguments, graph, switches
from secondorder._arguments import MaybeTensors, Tensors
from secondorder.convolutions import lighten_gradients
from secondorder.guard import RandomState, undo_writes

Function = Callable[..., Any]


def over_reverse(
    func: Function, inputs: Any, v: Any, create_graph: bool, strict: bool, strategy: str, has_aux: bool
) -> tuple[Point, Tensors]:
    """``H v`` by one backward pass through the gradient, or by the double-backward trick."""
    with torch.enable_grad():
        hooks = graph.HookCount()
        point = differentiate(func, inputs, v, create_graph, strict, has_aux, "hvp")
        retries = False
        if strategy == "auto":
            is_plain = not strict and not hooks.has_grown() and _is_real_and_dense(point)
            symmetric = is_plain and graph.is_symmetric((point.value, *point.gradient))
            strategy = "reverse-over-reverse" if symmetric else "double-backward"
            retries = symmetric and graph.has_masks(point.gradient)
        lighten_gradients(point.gradient, (point.value,))
    if strategy == "reverse-over-reverse":
        with torch.set_grad_enabled(create_graph or torch.is_grad_enabled()):
            product = back(point, create_graph, strict, retain_graph=retries)
        if not retries or all(bool(part.isfinite().all()) for part in product):
            return point, product
    with torch.enable_grad():
        u = tuple(torch.zeros_like(tensor, requires_grad=True) for tensor in point.inputs)
        rows = _arguments.grad(point.gradient, point.inputs, u, create_graph=True)
    with torch.set_grad_enabled(create_graph or torch.is_grad_enabled()):
        grads = _arguments.grad(rows, u, point.vector, create_graph=create_graph)
        return point, _arguments.fill_zeros(grads, point.inputs, strict, create_graph, "double_back_trick")


class Point(NamedTuple):
    """A scalar function at a point, with its gradient in the graph."""

    inputs: Tensors
    is_inputs_tuple: bool
    vector: Tensors | None
    value: Tensor
    gradient: MaybeTensors
    aux: Any


def differentiate(
    func: Function, inputs: Any, v: Any, create_graph: bool, strict: bool, has_aux: bool, name: str
) -> Point:
    """The gradient of ``func``, in the graph; inputs and ``v`` are checked first."""
    is_inputs_tuple, inputs = _arguments.as_tuple(inputs, "inputs", name)
    inputs = _arguments.fresh_inputs(inputs, create_graph)
    vector = _arguments.input_vector(v, inputs, is_inputs_tuple, create_graph, name)
    value, aux = _arguments.call_scalar(func, inputs, name, strict, has_aux)
    graph.refuse_wrong(value)
    gradient = _arguments.grad((value,), inputs, create_graph=True)
    _arguments.require_grad_of_jacobian(gradient, strict)
    return Point(inputs, is_inputs_tuple, vector, value, gradient, aux)


def back(point: Point, create_graph: bool, strict: bool, retain_graph: bool = False) -> Tensors:
    """``v^T H``: one backward pass through the gradient."""
    grads = _arguments.grad(
        point.gradient,
        point.inputs,
        point.vector,
        create_graph=create_graph,
        retain_graph=create_graph or retain_graph,
    )
    return _arguments.fill_zeros(grads, point.inputs, strict, create_graph, "double_back")


def _is_real_and_dense(point: Point) -> bool:
    tensors = (*point.inputs, *(point.vector or ()))
    return not any(tensor.is_complex() or tensor.layout is not torch.strided for tensor in tensors)


def forward_over_reverse(
    func: Function, inputs: Any, v: Any, create_graph: bool, has_aux: bool
) -> tuple[Point, Tensors]:
    """The gradient on dual numbers; its tangent is ``H v``."""
    with torch.enable_grad(), switches.dual_level():
        is_inputs_tuple, inputs = _arguments.as_tuple(inputs, "inputs", "hvp")
        inputs = _arguments.fresh_inputs(inputs, create_graph)
        vector = _arguments.input_vector(v, inputs, is_inputs_tuple, create_graph, "hvp")
        points = duals(inputs, vector)
        value, aux = _arguments.call_scalar(func, points, "hvp", False, has_aux)
        # Without a graph the tangent of this gradient would be wrong for solve and det (torch 2.13).
        grads = _arguments.grad((value,), points, create_graph=True)
        grads = _arguments.fill_zeros(grads, inputs, False, False, "back")
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
    is_inputs_tuple, inputs = _arguments.as_tuple(inputs, "inputs", "hvp")
    inputs = _arguments.fresh_inputs(inputs, False)
    if any(tensor.is_complex() for tensor in inputs):
        raise TypeError("strategy='finite-differences' needs real inputs, got complex ones.")
    vector = _arguments.input_vector(v, inputs, is_inputs_tuple, False, "hvp")
    direction = tuple(map(torch.ones_like, inputs)) if vector is None else vector

    def gradient(points: Tensors) -> tuple[Tensor, Tensors, Any]:
        with torch.enable_grad():
            value, aux = _arguments.call_scalar(func, points, "hvp", False, has_aux)
            grads = _arguments.grad((value,), points)
        return value, _arguments.fill_zeros(grads, points, False, False, "back"), aux

    random = RandomState()
    random.save()
    value, grads, aux = gradient(inputs)
    # In double precision: the square of a large number overflows in single.
    length = float(torch.stack([t.double().norm() for t in direction]).norm())
    size = float(torch.stack([t.detach().double().norm() for t in inputs]).norm())
    # Error of the difference h^2, of rounding eps / h: the sum is least at the cube root of eps.
    h = torch.finfo(inputs[0].dtype).eps ** (1 / 3) * max(size, 1.0) / length if length > 0 else 1.0
    sides = []
    for sign in (1, -1):
        moved = ((x + sign * h * t).detach() for x, t in zip(inputs, direction, strict=True))
        random.restore()
        with undo_writes():
            sides.append(gradient(tuple(x.requires_grad_() for x in moved))[1])
    product = tuple((plus - minus) / (2 * h) for plus, minus in zip(*sides, strict=True))
    return Point(inputs, is_inputs_tuple, vector, value, grads, aux), product


def duals(inputs: Tensors, vector: Tensors | None) -> Tensors:
    """Dual numbers: ``inputs`` with tangents ``vector``."""
    # Forward mode refuses tensors whose elements share memory, as expanded ones do.
    tangents = [torch.ones_like(inputs[0])] if vector is None else [t.contiguous() for t in vector]
    return tuple(forward_ad.make_dual(x.contiguous(), t) for x, t in zip(inputs, tangents, strict=True))
