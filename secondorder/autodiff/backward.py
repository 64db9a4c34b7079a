"""Backward passes through a kept graph: one vector or a batch of them; and the graph of a Hessian."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secondorder.autodiff import graph
from secondorder.autodiff.compat import grad_of_fitting
from secondorder.autodiff.convolutions import lighten_gradients, lighten_rows
from secondorder.autodiff.graph import Source, end, has_graph, like
from secondorder.autodiff.ladder import explained, missing
from secondorder.autodiff.lighter import light_grad
from secondorder.vectors.arguments import MaybeTensors, Tensors, grad, refuse_inference_mode

# Here the graph is all there is: the function behind it can not be run again.
REMEDY = (
    "the graph is given; compute it inside `with secondorder.decompose.decompose():`, or use Hessian.of,"
    " GaussNewton.of or Objective, which call the function themselves"
)


class Pass:
    """A backward pass through a kept graph, ``v -> v^T d outputs / d inputs``, to be repeated.

    Args:
        outputs: What is None or has no graph does not depend on ``inputs``.
        inputs: Tensors, or their places in the graph.

    Attributes:
        outputs: As given.
        inputs: As given.
    """

    def __init__(self, outputs: Sequence[Source | None], inputs: Sequence[Source]) -> None:
        self.outputs: tuple[Any, ...] = tuple(outputs)
        self.inputs: tuple[Any, ...] = tuple(inputs)
        self._live = [i for i, z in enumerate(outputs) if z is not None and has_graph(z)]
        self._roots = tuple([end(self.outputs[i]) for i in self._live])
        self._ends = tuple([end(x) for x in inputs])

    def __call__(self, v: Sequence[Tensor], batched: bool = False) -> list[Tensor]:
        """The product with tensors like ``outputs``, zeros where there is no path.

        Where ``batched``, these and those have a leading dimension more.
        """
        parts = self._live_ones(v)
        if batched:
            return self._rows(parts, v[0].shape[0] if v else 0)
        if not parts:
            return [torch.zeros_like(like(x)) for x in self.inputs]
        refuse_inference_mode()
        try:
            grads = grad_of_fitting(self._roots, self._ends, parts)
        except RuntimeError:
            with explained(REMEDY):
                raise
        return _filled(grads, self.inputs)

    def rows(self, u: Sequence[Tensor]) -> MaybeTensors:
        """The graph of the product, to be differentiated with respect to ``u``; None where there is no path.

        Its values may be wrong.
        """
        return light_grad(self._roots, self._ends, self._live_ones(u), rows=True, unread=True)

    def _live_ones(self, v: Sequence[Tensor]) -> Tensors:
        return tuple(v) if len(self._live) == len(v) else tuple([v[i] for i in self._live])

    def _rows(self, parts: Sequence[Tensor], k: int) -> list[Tensor]:
        if parts and k:
            roots = [self.outputs[i] for i in self._live]
            return _pull_rows(roots, self.inputs, parts, False, self._is_wrong_in_batches)
        return [like(x).new_zeros((k, *like(x).shape)) for x in self.inputs]

    @cached_property
    def _is_wrong_in_batches(self) -> bool:
        return graph.is_wrong_in_batches(self.outputs[i] for i in self._live)


def pull(
    outputs: Sequence[Source], inputs: Sequence[Source], v: Sequence[Tensor], create_graph: bool = False
) -> list[Tensor]:
    """``v^T d outputs / d inputs``; zeros where there is no path. The graph is kept."""
    return _filled(_run(outputs, inputs, v, create_graph), inputs)


def pull_rows(
    outputs: Sequence[Source], inputs: Sequence[Source], v: Sequence[Tensor], create_graph: bool = False
) -> list[Tensor]:
    """As ``pull`` for a batch: a leading dimension on every ``v`` and on every result.

    One after another, where torch has no rule for a batch, or a wrong one.
    """
    if not v[0].shape[0]:
        return [like(x).new_zeros((0, *like(x).shape)) for x in inputs]
    return _pull_rows(outputs, inputs, v, create_graph, graph.is_wrong_in_batches(outputs))


def _pull_rows(
    outputs: Sequence[Source],
    inputs: Sequence[Source],
    v: Sequence[Tensor],
    create_graph: bool,
    one_by_one: bool,
) -> list[Tensor]:
    if not one_by_one:
        try:
            grads = _run(outputs, inputs, v, create_graph, is_batched=True)
            k, likes = v[0].shape[0], map(like, inputs)
            return [x.new_zeros((k, *x.shape)) if g is None else g for g, x in zip(grads, likes, strict=True)]
        except RuntimeError as error:
            if missing(error) is not None:
                raise
    rows = [pull(outputs, inputs, one, create_graph) for one in zip(*v, strict=True)]
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]


def _filled(grads: Sequence[Tensor | None], inputs: Sequence[Source]) -> list[Tensor]:
    # Not by materialize_grads, whose zeros require gradients before torch 2.10.
    return [torch.zeros_like(like(x)) if g is None else g for g, x in zip(grads, inputs, strict=True)]


def _run(
    outputs: Sequence[Source],
    inputs: Sequence[Source],
    v: Sequence[Tensor],
    create_graph: bool = False,
    is_batched: bool = False,
) -> MaybeTensors:
    refuse_inference_mode()
    try:
        return torch.autograd.grad(
            [end(z) for z in outputs],
            [end(x) for x in inputs],
            v,
            create_graph=create_graph,
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=is_batched,
        )
    except RuntimeError:
        with explained(REMEDY):
            raise


def gradient_of(outputs: Tensors, inputs: Tensors, v: Tensors | None, create_graph: bool) -> MaybeTensors:
    """``v^T d outputs / d inputs``; with ``create_graph``, only where all its derivatives are right.

    Raises:
        WrongDerivativeError: they are not; MissingDerivativeError, or torch's own: there are none.
    """
    if create_graph:
        graph.refuse_wrong(outputs, inputs, create_graph=True)
    grads = grad(outputs, inputs, v, create_graph=create_graph)
    if create_graph:
        try_product(grads, inputs)
    return grads


def try_product(outputs: MaybeTensors, inputs: Tensors) -> None:
    """Only a product finds out that a derivative is missing: try one where it may be."""
    if graph.has_missing(outputs):
        live = tuple(output for output in outputs if output is not None and output.requires_grad)
        grad(live, inputs, tuple(map(torch.zeros_like, live)), retain_graph=True)


def cotangents(tensors: Iterable[Tensor]) -> Tensors:
    """A vector ``u`` that requires gradients, for a map that is linear in it: any value will do.

    Zeros, as torch takes them: hooks that are not linear have a derivative there too. What is not defined at
    zero is refused before.
    """
    return tuple(torch.zeros_like(tensor, requires_grad=True) for tensor in tensors)


class HessianGraph(NamedTuple):
    """A graph whose backward pass from ``outputs`` to ``inputs`` multiplies by a Hessian.

    Attributes:
        outputs: The gradient, or ``u^T H``; None where there is no path.
        inputs: With respect to which the gradient was taken, tensors or places; or ``u``.
    """

    outputs: MaybeTensors
    inputs: tuple[Any, ...]

    @classmethod
    def of(
        cls,
        value: Tensor | None,
        gradient: MaybeTensors,
        inputs: tuple[Source, ...],
        is_plain: bool = True,
        *,
        left: bool = False,
    ) -> HessianGraph:
        """That of a value whose gradient carries a graph.

        Where the Hessian is symmetric a product is ``v^T H``, a backward pass through the gradient. Where it
        is not, or where this is wrong or NaN and ``H v`` is not, it is the derivative of ``u^T H`` with
        respect to ``u``.

        Args:
            value: A scalar; None where only its gradient is known.
            gradient: Of ``value`` with respect to ``inputs``.
            inputs: What it was differentiated with respect to.
            is_plain: False where products are not symmetric for a reason that the graph does not show.
            left: Multiply from the left, where products are not symmetric.
        """
        kinds = graph.Kinds.of((value, *gradient), inputs)
        side = kinds.side(is_plain, otherwise="left" if left else "right")
        plain = cls(gradient, inputs)
        if side == "right" or (side == "left unless nan" and plain.is_nan()):
            return cls.by_rows(value, gradient, inputs)
        if value is not None and kinds.has_convolutions:
            lighten_gradients(gradient, (value,))
        return plain

    @classmethod
    def by_rows(
        cls, value: Tensor | None, gradient: MaybeTensors, inputs: tuple[Source, ...]
    ) -> HessianGraph:
        """``u^T H``, to be differentiated with respect to ``u``."""
        with torch.enable_grad():
            u = cotangents(map(like, inputs))
            rows = grad(gradient, tuple(map(end, inputs)), u, create_graph=True)
        lighten_rows(rows, (value, *gradient))
        return cls(rows, u)

    def is_nan(self) -> bool:
        """Whether a product is: one more product, and a host read."""
        live = [output for output in self.outputs if output is not None and output.requires_grad]
        ones = tuple(map(torch.ones_like, live))
        products = grad(live, tuple(map(end, self.inputs)), ones, retain_graph=True)
        return not all(bool(product.isfinite().all()) for product in products if product is not None)
