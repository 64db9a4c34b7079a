"""GELU, LayerNorm and softmax in the graph of a gradient: one node each, with a derivative of its own.

torch 2.13 differentiates their backward passes in pieces, up to 30 kernels each. For a cotangent ``a`` of the
gradient that such a pass returns, and ``g`` that it was given, the nodes here compute

    GELU ``y = f(x)``             for g: a f'(x)                  for x: a g f''(x)
    softmax ``y``, ``s = sum``    for g: y (a - s(a y))           for y: a g - a s(g y) - g s(a y)
    its logarithm ``y``           for g: a - s(a e^y)             for y: -s(g) a e^y
    LayerNorm                     see ``_NormBackward``

Where these are to be differentiated too, they are computed in pieces, as torch's are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secondorder.autodiff import graph

Grads = tuple[Tensor | None, ...]
_aten = torch.ops.aten


def _by_pieces(
    function: Callable[..., Tensor | Grads], tensors: Sequence[Tensor | None], cotangents: Grads
) -> Grads:
    """The derivative of ``function`` in the graph, to be differentiated further."""
    # Aliases: one of the tensors may lie behind another, and what is asked for is the partial derivative.
    own = [x.view_as(x) if x is not None and x.requires_grad else x for x in tensors]
    results = function(*own)
    results = (results,) if isinstance(results, Tensor) else results
    pairs = [(z, a) for z, a in zip(results, cotangents, strict=True) if z is not None and a is not None]
    wanted = [x for x in own if x is not None and x.requires_grad]
    outputs, weights = zip(*pairs, strict=True)
    grads = torch.autograd.grad(outputs, wanted, weights, create_graph=True, allow_unused=True)
    found = iter(grads)
    return tuple(next(found) if x is not None and x.requires_grad else None for x in own)


class _GeluBackward(graph.Fused):
    """``g f'(x)``."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, g: Tensor, x: Tensor, approximate: str) -> Tensor:
        ctx.save_for_backward(g if ctx.needs_input_grad[2] else None, x)
        ctx.approximate, ctx.bend, ctx.is_kept = approximate, None, False
        return value

    @staticmethod
    def backward(ctx: Any, a: Tensor) -> Grads:
        g, x = ctx.saved_tensors
        slope = partial(_aten.gelu_backward, approximate=ctx.approximate)
        if g is None:
            return None, slope(a, x), None, None
        if torch.is_grad_enabled():
            return None, *_by_pieces(slope, (g, x), (a,)), None
        if ctx.is_kept or torch._C._are_functorch_transforms_active():
            bend = _BENDS[ctx.approximate](x)[0].mul_(g) if ctx.bend is None else ctx.bend
            # A graph that is passed again is kept, and what its passes share is worth a tensor.
            ctx.bend = bend if ctx.is_kept else None
            for_g, for_x = slope(a, x), a * bend
        else:
            # Memory that is new to the process costs more than the arithmetic.
            bend, memory = _BENDS[ctx.approximate](x)
            for_x = bend.mul_(g).mul_(a)
            for_g = _aten.gelu_backward.grad_input(a, x, approximate=ctx.approximate, grad_input=memory)
        ctx.is_kept = True
        return None, for_g, for_x, None


def _bend(x: Tensor) -> tuple[Tensor, Tensor]:
    """``f'' = (2 - x^2) phi(x)`` for ``f = x Phi(x)``, with the normal density and distribution.

    And memory of its shape to be written over.
    """
    square = x * x
    density = torch.rsub(square, math.log(1 / math.sqrt(2 * math.pi)), alpha=0.5).exp_()
    return density.mul_(square.neg_().add_(2)), square


def _bend_of_tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    """``f''`` for ``f = x (1 + t) / 2``, ``t = tanh(u)``, ``u = k (x + c x^3)``; and memory."""
    k, c = math.sqrt(2 / math.pi), 0.044715
    square = x * x
    t = (square * (k * c)).add_(k).mul_(x).tanh_()
    slope = (square * (3 * k * c)).add_(k)
    # (1 - t^2) (u' + x u'' / 2 - x t u'^2), where x u'' / 2 = 3 k c x^2.
    bend = slope - slope.square().mul_(x).mul_(t)
    return bend.add_(square, alpha=3 * k * c).mul_(t.square_().neg_().add_(1)), square


_BENDS = {"none": _bend, "tanh": _bend_of_tanh}


class _SoftmaxBackward(graph.Fused):
    """``y (g - s(g y))``."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, g: Tensor, y: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(g if ctx.needs_input_grad[2] else None, y)
        ctx.dim = dim
        ctx.sum = (g * y).sum(dim, keepdim=True) if ctx.needs_input_grad[2] else None
        return value

    @staticmethod
    def backward(ctx: Any, a: Tensor) -> Grads:
        g, y = ctx.saved_tensors
        if g is not None and torch.is_grad_enabled():
            return None, *_by_pieces(partial(_softmax_backward, dim=ctx.dim), (g, y), (a,)), None
        total = (a * y).sum(ctx.dim, keepdim=True)
        centred = a - total
        # (g - s(g y)) (a - s(a y)) - s(g y) s(a y)
        for_y = None if ctx.sum is None else torch.addcmul(-ctx.sum * total, g - ctx.sum, centred)
        return None, y * centred if ctx.needs_input_grad[1] else None, for_y, None


def _softmax_backward(g: Tensor, y: Tensor, dim: int) -> Tensor:
    return y * (g - (g * y).sum(dim, keepdim=True))


class _LogSoftmaxBackward(graph.Fused):
    """``g - e^y s(g)``."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, g: Tensor, y: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(g if ctx.needs_input_grad[2] else None, y)
        ctx.dim = dim
        ctx.sum = g.sum(dim, keepdim=True) if ctx.needs_input_grad[2] else None
        return value

    @staticmethod
    def backward(ctx: Any, a: Tensor) -> Grads:
        g, y = ctx.saved_tensors
        if g is not None and torch.is_grad_enabled():
            return None, *_by_pieces(partial(_log_softmax_backward, dim=ctx.dim), (g, y), (a,)), None
        weighted = a * y.exp()
        for_g = a - weighted.sum(ctx.dim, keepdim=True) if ctx.needs_input_grad[1] else None
        return None, for_g, None if ctx.sum is None else weighted * -ctx.sum, None


def _log_softmax_backward(g: Tensor, y: Tensor, dim: int) -> Tensor:
    return g - y.exp() * g.sum(dim, keepdim=True)


class _Rows(NamedTuple):
    """LayerNorm of the rows of ``x``: with ``xh = r (x - mean)`` its result is ``w xh + bias``.

    Attributes:
        x: The input, shape (rows, n).
        w: The weight, shape (n,).
        mean: Of each row, shape (rows, 1).
        r: One over its deviation, shape (rows, 1).
    """

    x: Tensor
    w: Tensor
    mean: Tensor
    r: Tensor

    @classmethod
    def of(cls, x: Tensor, w: Tensor | None, mean: Tensor, r: Tensor) -> _Rows:
        """Of a tensor whose last dimensions are normalised, and of its statistics."""
        x = x.reshape(mean.numel(), -1)
        w = x.new_ones(1).expand(x.shape[1]) if w is None else w.reshape(-1)
        return cls(x, w, mean.reshape(-1, 1), r.reshape(-1, 1))

    def standardised(self) -> Tensor:
        """``xh``."""
        return (self.x - self.mean) * self.r

    def pulled(self, k: Tensor) -> Tensor:
        """``P k = r (k - m(k) - xh m(xh k))``, the backward pass for a weight of one."""
        mask = [True, False, False]
        arguments = (k, self.x, [self.x.shape[1]], self.mean, self.r, None, None, mask)
        pulled: Tensor = _aten.native_layer_norm_backward(*arguments)[0]
        return pulled


class _NormBackward(graph.Fused):
    """``P(w g)``, and for weight and bias the sums over rows of ``g xh`` and of ``g``.

    For cotangents ``a``, ``b`` and ``c`` of these, with ``h = w g`` and ``m`` the mean of a row, the
    derivative is, as ``P`` is symmetric, ``dxh = P dx`` and ``dr = -r^2 m(xh dx)``:

        for g:  w P(a) + b xh + c
        for x:  P(g b) - r (m(xh h) P(a) + m(xh a) P(h) + xh m(h P(a)))
        for w:  the sum over rows of g P(a)
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Grads:
        *values, g, x, w, mean, r = args
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g if ctx.needs_input_grad[4] else None, x, w, mean, r)
        ctx.moment = None
        if ctx.needs_input_grad[4]:
            rows = _Rows.of(x, w, mean, r)
            h = rows.w * g.reshape_as(rows.x)
            ctx.moment = (rows.standardised() * h).mean(1, keepdim=True)
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Grads:
        g, x, w, mean, r = ctx.saved_tensors
        rows = _Rows.of(x, w, mean, r)
        parts = tuple(None if part is None else part.reshape(-1, rows.x.shape[1]) for part in cotangents)
        if g is not None and torch.is_grad_enabled():
            pieces = partial(_norm_backward, r=r)
            return None, None, None, *_by_pieces(pieces, (g, x, w), parts), None, None
        for_g, for_x, for_w = _norm_double_backward(rows, g, ctx.moment, *parts)
        return (
            *(None, None, None),
            None if for_g is None else for_g.expand_as(rows.x).reshape_as(x),
            None if for_x is None else for_x.reshape_as(x),
            None if for_w is None or w is None else for_w.reshape_as(w),
            *(None, None),
        )


def _norm_double_backward(
    rows: _Rows, g: Tensor | None, moment: Tensor | None, a: Tensor | None, b: Tensor | None, c: Tensor | None
) -> Grads:
    """See ``_NormBackward``; ``g`` and ``moment``, ``m(xh h)``, are None where nothing is asked for x."""
    xh, for_g = rows.standardised(), c
    if b is not None:
        for_g = xh * b if c is None else torch.addcmul(c, xh, b)
    Pa = None if a is None else rows.pulled(a)
    if Pa is not None:
        for_g = Pa * rows.w if for_g is None else torch.addcmul(for_g, Pa, rows.w)
    if g is None or moment is None:
        return for_g, None, None
    g = g.reshape_as(rows.x)
    if a is None or Pa is None:
        return for_g, None if b is None else rows.pulled(g * b), None
    product, slope = g * Pa, rows.r * (xh * a).mean(1, keepdim=True)
    k = -slope * rows.w if b is None else torch.addcmul(b, slope, rows.w, value=-1)
    inner = (product * rows.w).mean(1, keepdim=True)
    bent = torch.addcmul(moment * Pa, xh, inner)
    return for_g, torch.addcmul(rows.pulled(g * k), rows.r, bent, value=-1), product.sum(0)


def _norm_backward(g: Tensor, x: Tensor, w: Tensor | None, *, r: Tensor) -> Grads:
    """In pieces, with the statistics as functions of ``x``; in rows."""
    x, r = x.reshape(r.numel(), -1), r.reshape(-1, 1)
    centred = x - x.mean(1, keepdim=True)
    variance = centred.square().mean(1, keepdim=True)
    # Of ``r = (variance + eps)^(-1/2)`` the node keeps the value.
    r = (variance + (r**-2 - variance).detach()).rsqrt()
    xh, g = centred * r, g.reshape_as(x)
    h = g if w is None else g * w.reshape(-1)
    pulled = r * (h - h.mean(1, keepdim=True) - xh * (xh * h).mean(1, keepdim=True))
    return pulled, (g * xh).sum(0, keepdim=True), g.sum(0, keepdim=True)


class _ProductBackward(graph.Fused):
    """``s(g)``, ``g W^T``, ``X^T g``: the backward pass of ``X W + bias``, of matrices or batches of them.

    For cotangents ``c``, ``a`` and ``b`` of these the derivative is

        for g:  c + a W + X b        for X:  g b^T        for W:  a^T g

    without the transposes, and the sums of expanded and transposed tensors, that torch makes.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Grads:
        *values, g, X, W = args
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g if any(ctx.needs_input_grad[-2:]) else None, X, W)
        ctx.shape = g.shape
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Grads:
        g, X, W = ctx.saved_tensors
        if g is not None and torch.is_grad_enabled():
            grads = _by_pieces(partial(_product_backward, bias=len(cotangents) == 3), (g, X, W), cotangents)
            return *(None for _ in cotangents), *grads
        *c, a, b = cotangents
        for_g = for_X = for_W = None
        if ctx.needs_input_grad[-3]:
            for_g = _sum_of_products(c[0] if c else None, (a, W), (X, b))
            # The gradient for the bias alone: a row for all.
            for_g = None if for_g is None else for_g.expand(ctx.shape)
        if b is not None and ctx.needs_input_grad[-2]:
            for_X = g @ b.mT
        if a is not None and ctx.needs_input_grad[-1]:
            # In the layout of the weight.
            for_W = (g.mT @ a).mT if W.stride(-2) == 1 else a.mT @ g
        return *(None for _ in cotangents), for_g, for_X, for_W


def _product_backward(g: Tensor, X: Tensor | None, W: Tensor | None, *, bias: bool) -> Grads:
    products = None if W is None else g @ W.mT, None if X is None else X.mT @ g
    return (g.sum(0), *products) if bias else products


def _sum_of_products(c: Tensor | None, *pairs: tuple[Tensor | None, Tensor | None]) -> Tensor | None:
    total = None
    for A, B in pairs:
        if A is None or B is None:
            continue
        if total is None:
            total = A @ B if c is None else torch.addmm(c, A, B)
        else:
            total = total.addmm_(A, B) if A.ndim == 2 else total.baddbmm_(A, B)
    return c if total is None else total


class Replaced(NamedTuple):
    """How the backward pass of an operation is replaced.

    Attributes:
        made: Names of the nodes that torch makes of it: where there are others, somebody's hook was here.
        node: Ours: takes the gradients that torch computed, the one it was given, and what ``saved`` reads.
        saved: Reads what the forward pass has left in its node; None where it is not of the usual kind.
    """

    made: set[str]
    node: type[graph.Fused]
    saved: Callable[[Any], tuple[Any, ...] | None]


def _gelu(node: Any) -> tuple[Any, ...]:
    return node._saved_self, node._saved_approximate


def _softmax(node: Any) -> tuple[Any, ...]:
    # Torch shows a negative number as one without a sign.
    dim = node._saved_dim
    return node._saved_result, dim - 2**64 if dim >= 2**63 else dim


def _layer_norm(node: Any) -> tuple[Any, ...]:
    statistics = node._saved_result1.detach(), node._saved_result2.detach()
    return node._saved_input, node._saved_weight, *statistics


def _addmm(node: Any) -> tuple[Any, ...] | None:
    # A bias that is a row, as that of a linear layer.
    bias, position = node.next_functions[0]
    is_row = bias is None or len(bias._input_metadata[position].shape) == 1
    is_sum = node._saved_alpha == node._saved_beta == 1
    return (node._saved_mat1, node._saved_mat2) if is_row and is_sum else None


def _mm(node: Any) -> tuple[Any, ...]:
    return node._saved_self, node._saved_mat2


_SOFTMAX = Replaced({"SoftmaxBackwardDataBackward0"}, _SoftmaxBackward, _softmax)
_MATRICES = {"MmBackward0", "TBackward0"}
# Of the gradient for a bias, summed over rows.
_ROWS = {"SumBackward1", "ViewBackward0"}
# By the name of the node of the forward pass.
REPLACED = {
    "GeluBackward0": Replaced({"GeluBackwardBackward0"}, _GeluBackward, _gelu),
    "SoftmaxBackward0": _SOFTMAX,
    "SafeSoftmaxBackward0": _SOFTMAX,
    "LogSoftmaxBackward0": Replaced({"LogSoftmaxBackwardDataBackward0"}, _LogSoftmaxBackward, _softmax),
    "NativeLayerNormBackward0": Replaced({"NativeLayerNormBackwardBackward0"}, _NormBackward, _layer_norm),
    "AddmmBackward0": Replaced({*_MATRICES, *_ROWS}, _ProductBackward, _addmm),
    "MmBackward0": Replaced(_MATRICES, _ProductBackward, _mm),
    "BmmBackward0": Replaced({"BmmBackward0"}, _ProductBackward, _mm),
}
