"""Backward passes through a kept graph: one vector or a batch of them; and the graph of a Hessian."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from secondorder import graph
from secondorder._arguments import MaybeTensors, Tensors, grad, refuse_inference_mode
from secondorder.convolutions import lighten_gradients, lighten_rows
from secondorder.ladder import explained, missing

# Here the graph is all there is: the function behind it can not be run again.
_REMEDY = (
    "the graph is given; compute it inside `with secondorder.decompose.decompose():`, or use Hessian.of,"
    " GaussNewton.of or Objective, which call the function themselves"
)


def pull(outputs: Sequence[Tensor], inputs: Sequence[Tensor], v: Sequence[Tensor]) -> list[Tensor]:
    """``v^T d outputs / d inputs``; zeros where there is no path. The graph is kept."""
    refuse_inference_mode()
    with explained(_REMEDY):
        grads = torch.autograd.grad(outputs, inputs, v, retain_graph=True, allow_unused=True)
    # Not by materialize_grads, whose zeros require gradients before torch 2.10.
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs, strict=True)]


def pull_rows(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], v: Sequence[Tensor], create_graph: bool = False
) -> list[Tensor]:
    """As ``pull`` for a batch: a leading dimension on every ``v`` and on every result.

    One after another, where torch has no rule for a batch, or a wrong one.
    """
    refuse_inference_mode()
    with explained(_REMEDY):
        if not graph.is_wrong_in_batches(outputs):
            try:
                return _pull_together(outputs, inputs, v, create_graph)
            except RuntimeError as error:
                if missing(error) is not None:
                    raise
        return _pull_one_by_one(outputs, inputs, v, create_graph)


def _pull_together(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], v: Sequence[Tensor], create_graph: bool
) -> list[Tensor]:
    options = dict(retain_graph=True, allow_unused=True, is_grads_batched=True)
    grads = torch.autograd.grad(outputs, inputs, v, create_graph=create_graph, **options)
    k = v[0].shape[0]
    return [x.new_zeros((k, *x.shape)) if g is None else g for g, x in zip(grads, inputs, strict=True)]


def _pull_one_by_one(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], v: Sequence[Tensor], create_graph: bool
) -> list[Tensor]:
    options = dict(retain_graph=True, allow_unused=True, materialize_grads=True)
    rows = [
        torch.autograd.grad(outputs, inputs, one, create_graph=create_graph, **options)
        for one in zip(*v, strict=True)
    ]
    if not rows:
        return [x.new_zeros((0, *x.shape)) for x in inputs]
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]


def gradient_of(
    outputs: Tensors, inputs: Tensors, v: Tensors | None, create_graph: bool, retain_graph: bool | None = None
) -> MaybeTensors:
    """``v^T d outputs / d inputs``; with ``create_graph``, only where all its derivatives are right.

    Raises:
        WrongDerivativeError: they are not; MissingDerivativeError, or torch's own: there are none.
    """
    if create_graph:
        graph.refuse_wrong(outputs, inputs, create_graph=True)
    grads = grad(outputs, inputs, v, create_graph=create_graph, retain_graph=retain_graph)
    if create_graph:
        try_product(grads, inputs)
    return grads


def try_product(outputs: MaybeTensors, inputs: Tensors) -> None:
    """Only a product finds out that a derivative is missing: try one where it may be."""
    if graph.has_missing(outputs):
        live = tuple(output for output in outputs if output is not None and output.requires_grad)
        grad(live, inputs, tuple(map(torch.zeros_like, live)), retain_graph=True)


def cotangents(like: Iterable[Tensor], behind: Iterable[Tensor | None]) -> Tensors:
    """A vector ``u`` that requires gradients, for a map that is linear in it: any value will do.

    Zeros, as torch takes them, where hooks that are not linear have a derivative too; ones where a backward
    pass through the graph of ``behind`` is not defined at zero.
    """
    make = torch.ones_like if graph.is_undefined_at_zero(behind) else torch.zeros_like
    return tuple(make(tensor, requires_grad=True) for tensor in like)


class HessianGraph(NamedTuple):
    """A graph whose backward pass from ``outputs`` to ``inputs`` multiplies by a Hessian.

    Attributes:
        outputs: The gradient, or ``u^T H``; None where there is no path.
        inputs: With respect to which the gradient was taken, or ``u``.
    """

    outputs: MaybeTensors
    inputs: Tensors

    @classmethod
    def of(
        cls,
        value: Tensor,
        gradient: MaybeTensors,
        inputs: Tensors,
        is_plain: bool = True,
        *,
        left: bool = False,
    ) -> HessianGraph:
        """That of a value whose gradient carries a graph.

        Where the Hessian is symmetric a product is ``v^T H``, a backward pass through the gradient. Where it
        is not, or where this is wrong or NaN and ``H v`` is not, it is the derivative of ``u^T H`` with
        respect to ``u``.

        Args:
            value: A scalar.
            gradient: Of ``value`` with respect to ``inputs``.
            inputs: What it was differentiated with respect to.
            is_plain: False where products are not symmetric for a reason that the graph does not show.
            left: Multiply from the left, where products are not symmetric.
        """
        kinds = graph.Kinds.of((value, *gradient), inputs)
        plain = cls(gradient, inputs)
        is_symmetric = is_plain and kinds.is_symmetric
        is_bad = is_symmetric and (kinds.divide or (kinds.may_be_nan and plain.is_nan()))
        if is_bad or not (is_symmetric or left):
            return cls.by_rows(value, gradient, inputs)
        lighten_gradients(gradient, (value,))
        return plain

    @classmethod
    def by_rows(cls, value: Tensor, gradient: MaybeTensors, inputs: Tensors) -> HessianGraph:
        """``u^T H``, to be differentiated with respect to ``u``."""
        with torch.enable_grad():
            u = cotangents(inputs, gradient)
            rows = grad(gradient, inputs, u, create_graph=True)
        lighten_rows(rows, (value, *gradient))
        return cls(rows, u)

    def is_nan(self) -> bool:
        """Whether a product is: one more product, and a host read."""
        live = [output for output in self.outputs if output is not None and output.requires_grad]
        ones = tuple(map(torch.ones_like, live))
        products = grad(live, self.inputs, ones, retain_graph=True)
        return not all(bool(product.isfinite().all()) for product in products if product is not None)
