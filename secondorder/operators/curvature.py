"""Curvature matrices with respect to parameters, as operators on a kept graph.

The function is evaluated once; its gradient (or, for the Gauss-Newton and Fisher matrices, the map
``u -> J^T u``) is kept with its graph, and every product repeats only the linear part.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secondorder.autodiff import ladder
from secondorder.autodiff.backward import REMEDY, HessianGraph, Pass
from secondorder.autodiff.convolutions import lighten_gradients
from secondorder.autodiff.graph import Kinds, Source, refuse_wrong
from secondorder.autodiff.lighter import light_grad
from secondorder.functional import output_hessians
from secondorder.operators.parameters import Jacobian, ParameterOperator, ThroughOutputs, tried
from secondorder.vectors import arguments
from secondorder.vectors.arguments import MaybeTensors
from secondorder.vectors.flat import flatten, unflatten
from secondorder.vectors.host import is_true
from secondorder.vectors.tree import Tree, scalar

Function = Callable[..., Any]


class Block(NamedTuple):
    """One convex loss of the network's outputs, as the Gauss-Newton matrix sees it.

    Attributes:
        loss: Scalar or tensor of losses, computed from ``outputs`` in the graph.
        outputs: Outputs of the network in the graph, any shapes; the loss may couple them.
        weight: Derivative of the objective with respect to ``loss``, of its shape.
    """

    loss: Tensor
    outputs: tuple[Tensor, ...]
    weight: Tensor


class GradientBlock(NamedTuple):
    """A ``Block`` by the gradient of its weighted loss.

    Attributes:
        gradients: With respect to each of the outputs, in the graph.
        outputs: Tensors, or their places in the graph.
    """

    gradients: tuple[Tensor, ...]
    outputs: tuple[Source, ...]


class Hessian(ParameterOperator):
    """Hessian of a scalar loss with respect to parameters, flat.

    Args:
        loss: A scalar that carries a graph.
        parameters: Tensors of one dtype and device that require gradients and of which ``loss`` may be a
            function; the blocks of those it does not depend on are zero.
        keep_graph: Keep the graph of the gradient between products; without it only the graph of the loss is
            kept, and each product takes the gradient anew.
        batched: How a block of vectors is multiplied: True, in one batched backward pass; False, one after
            another; None, in pieces as wide as is fastest, measured with the first block of at least eight
            columns, and as memory allows.

    Attributes:
        gradient: Of the loss, flat.
        parameters: As given.

    Raises:
        ValueError: ``loss`` is not a scalar with a graph, or depends on none of the parameters;
            ``parameters`` is empty, mixed or frozen.
        RuntimeError: ``loss`` was computed with an operation whose second derivative torch gets wrong.

    Cost: construction, one gradient with a graph; a product, 1.3 (MLP) to 2.2 gradients (transformer), 1.5 to
    2.9 without ``keep_graph``. Memory, in peaks of a gradient: up to 2.2 are held and a product adds up to
    1.7; where parameters take more than activations 2.5 and 1.9; without ``keep_graph`` 1.2 and 2.7
    (``tests/operators/test_memory.py``).

    Reference: Pearlmutter (1994), Fast exact multiplication by the Hessian.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> Hessian(x.pow(3).sum(), [x]) @ torch.ones(2)
        tensor([ 6., 12.])
    """

    def __init__(
        self,
        loss: Tensor,
        parameters: Iterable[Tensor],
        *,
        keep_graph: bool = True,
        batched: bool | None = None,
    ) -> None:
        super().__init__(parameters, batched)
        _check_loss(loss)
        refuse_wrong((loss,), self.parameters, is_given=True)
        self._loss = loss
        with ladder.explained(REMEDY):
            grads = self._differentiate(unread=False)
        if all(grad is None for grad in grads):
            raise ValueError("loss must depend on at least one of the parameters, but it does on none.")
        self.gradient = flatten(
            [
                torch.zeros_like(p) if g is None else g.detach()
                for g, p in zip(grads, self.parameters, strict=True)
            ]
        )
        kinds = Kinds.of((loss, *grads), self.parameters)
        # Where ``v^T H`` may be NaN the first product finds out.
        side = kinds.side(not self.gradient.is_complex(), otherwise="left")
        self._has_convolutions = kinds.has_convolutions
        self._by_rows, self._may_be_nan = side == "right", side == "left unless nan"
        self._kept = self._pass_of(grads) if keep_graph else None

    @classmethod
    def of(
        cls, func: Function, inputs: Any, *, keep_graph: bool = True, batched: bool | None = None
    ) -> Hessian:
        """The Hessian of ``func`` at ``inputs``: a tensor, a tuple of arguments, or any pytree.

        Where a derivative is missing or known to be wrong, ``func`` is called once more under
        ``decompose()``.

        Example:
            >>> H = Hessian.of(lambda x: x.pow(3).sum(), torch.tensor([1.0, 2.0]))
            >>> H.gradient, H.diagonal()
            (tensor([ 3., 12.]), tensor([ 6., 12.]))
        """
        tree = Tree.of(inputs, "Hessian.of")

        def build() -> Hessian:
            loss = scalar(tree.call(func), "Hessian.of")
            refuse_wrong((loss,), tree.leaves)
            hessian = cls(loss, tree.leaves, keep_graph=keep_graph, batched=batched)
            return tried(hessian)

        return ladder.climb(build)

    def _differentiate(self, unread: bool) -> MaybeTensors:
        return light_grad((self._loss,), self.parameters, unread=unread)

    def _pass_of(self, grads: MaybeTensors) -> Pass:
        if self._by_rows:
            return Pass(*HessianGraph.by_rows(self._loss, grads, self.parameters))
        if self._has_convolutions:
            lighten_gradients(grads, (self._loss,))
        return Pass(grads, self.parameters)

    def _pass(self) -> Pass:
        """The backward pass that multiplies, through a graph that is kept or built anew."""
        return self._pass_of(self._differentiate(unread=True)) if self._kept is None else self._kept

    def differentiated(self) -> Iterable[Tensor | None]:
        """The gradient in the graph, kept or taken anew."""
        return self._pass().outputs

    def _apply(self, parts: Sequence[Tensor], batched: bool) -> list[Tensor]:
        product = self._pass()(parts, batched)
        if self._may_be_nan:
            self._may_be_nan = False
            if not all(bool(part.isfinite().all()) for part in product):
                self._by_rows = True
                if self._kept is not None:
                    self._kept = self._pass_of(self._kept.outputs)
                product = self._pass()(parts, batched)
        return product

    def _keep(self, indices: list[int]) -> None:
        parts = unflatten(self.gradient, self.parameters)
        self.gradient = flatten([parts[i] for i in indices])
        if self._kept is not None:
            outputs, inputs = self._kept.outputs, self._kept.inputs
            self._kept = Pass([outputs[i] for i in indices], [inputs[i] for i in indices])


class GaussNewton(ThroughOutputs):
    """Generalised Gauss-Newton matrix ``sum_k J_k^T (w_k H_k) J_k``, flat.

    ``J_k`` is the Jacobian of block ``k``'s outputs with respect to the parameters, ``H_k`` the Hessian
    of its loss with respect to the outputs, ``w_k`` its weight. Positive semidefinite where the losses
    are convex in the outputs and the weights non-negative.

    Args:
        loss: A scalar computed from ``outputs``, convex in them.
        outputs: The network's outputs in the graph, a tensor or a tuple of tensors.
        parameters: Tensors of one dtype and device that require gradients.
        keep_graph: Keep the graph of ``u -> J^T u`` between products; without it, each product builds it
            anew.
        batched: As in ``Hessian``.

    Attributes:
        jacobian: ``J`` of all outputs, an operator of shape (outputs, parameters).
        kernel: ``J J^T``, shape (outputs, outputs).
        output_gradients: Gradients of the weighted losses with respect to the outputs, one for each tensor.
        parameters: As given.

    Raises:
        ValueError: ``loss`` or ``outputs`` carry no graph, or have nothing to do with one another;
            ``parameters`` is empty, mixed or frozen.

    Cost: construction, one gradient with a graph; a product, 0.9 (CNN) to 1.4 gradients (transformer), 1.2 to
    2.0 without ``keep_graph``. Memory, in peaks of a gradient: up to 1.6 are held and a product adds up to
    1.2; where parameters take more than activations 0.6 and 1.9; without ``keep_graph`` 0.9 and 1.7, or 0.3
    and 1.9 (``tests/operators/test_memory.py``).

    Reference: Schraudolph (2002), Fast curvature matrix-vector products for second-order gradient descent.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> outputs = w.square()
        >>> GaussNewton((outputs - 1).square().sum(), outputs, [w]) @ torch.ones(2)
        tensor([ 8., 32.])
    """

    def __init__(
        self,
        loss: Tensor,
        outputs: Tensor | tuple[Tensor, ...],
        parameters: Iterable[Tensor],
        *,
        keep_graph: bool = True,
        batched: bool | None = None,
    ) -> None:
        _check_loss(loss)
        outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
        block = Block(loss, outputs, torch.ones_like(loss))
        self._set_up([block], parameters, keep_graph, batched)
        if not self.has_curvature():
            warnings.warn(
                "the Gauss-Newton matrix is zero: the loss is linear in the outputs, as nll_loss is in"
                " log-probabilities. Take the logits for outputs, with cross_entropy.",
                stacklevel=2,
            )

    def has_curvature(self) -> bool:
        """Whether the first block's loss is curved in its outputs, found out with one random vector there.

        Cost: a product with the Hessian of the loss in the space of outputs, and one host read.
        """
        multiply, where = self._middles[0]
        outputs = self.jacobian.outputs[where]
        # No number of the host: multiples of an angle that is no part of the circle.
        parts = [torch.arange(1, z.numel() + 1, device=z.device).sin().view(z.shape).to(z) for z in outputs]
        products = multiply(parts, False)
        return bool(products) and is_true(torch.stack([part.any() for part in products]).any())

    def forms(self, v: Tensor) -> list[float]:
        """``v . J_k^T (w_k H_k) J_k v`` for each block ``k``.

        Args:
            v: Shape (n,).

        Cost: a derivative along ``v``, 0.4 (MLP) to 1.5 gradients (recurrent network), and one host read.
        """
        with self._rung():
            parts = self.jacobian.forward(self._layout.unflatten(v.to(self.dtype)), False)
        return self.forms_in_outputs(parts, len(self._middles))

    def forms_in_outputs(self, parts: list[Tensor], count: int) -> list[float]:
        """The same of the first ``count`` blocks, given ``J v`` in parts, shaped like their outputs.

        Cost: a product with the Hessian of each loss in its outputs, and one host read.
        """
        dtype = torch.promote_types(self.dtype, torch.float32)
        forms = torch.zeros(count, dtype=dtype, device=self.device)
        with self._rung():
            for form, (multiply, where) in zip(forms, self._middles, strict=False):
                for u, product in zip(parts[where], multiply(parts[where], False), strict=True):
                    form += (u.to(dtype) * product.to(dtype)).sum()
        values: list[float] = forms.tolist()
        return values

    @classmethod
    def of_blocks(
        cls,
        blocks: Sequence[Block | GradientBlock],
        parameters: Iterable[Tensor],
        *,
        keep_graph: bool = True,
        batched: bool | None = None,
    ) -> GaussNewton:
        """The operator of a sum of weighted losses, each of outputs of its own."""
        operator = cls.__new__(cls)
        operator._set_up(blocks, parameters, keep_graph, batched)
        return operator

    @classmethod
    def of(
        cls,
        func: Function,
        loss: Function,
        inputs: Any,
        *,
        keep_graph: bool = True,
        batched: bool | None = None,
    ) -> GaussNewton:
        """The Gauss-Newton matrix of ``loss(func(inputs))`` at ``inputs``: a tensor, a tuple, or any pytree.

        The loss's Hessian is a closed form where ``ggnvp`` knows one. Where a derivative is missing, ``func``
        is called once more under ``decompose()``.
        """
        tree = Tree.of(inputs, "GaussNewton.of")

        def build() -> GaussNewton:
            outputs = arguments.as_tuple(tree.call(func), arguments.OUTPUTS, "GaussNewton.of")[1]
            with torch.enable_grad():
                value, closed = output_hessians.evaluate(loss, outputs)
            operator = cls(value, outputs, tree.leaves, keep_graph=keep_graph, batched=batched)
            if closed is not None:
                operator._middles = [(_by_closed_form(closed), slice(0, 1))]
            return tried(operator)

        return ladder.climb(build)

    def _set_up(
        self,
        blocks: Sequence[Block | GradientBlock],
        parameters: Iterable[Tensor],
        keep_graph: bool,
        batched: bool | None,
    ) -> None:
        super().__init__(parameters, batched)
        if not blocks:
            raise ValueError("blocks must hold at least one loss of outputs, got none.")
        outputs: list[Source] = []
        # For each block: how it multiplies, and which of all outputs are its own.
        self._middles: list[tuple[_Middle, slice]] = []
        self.output_gradients: list[Tensor] = []
        for block in blocks:
            curved, gradients, own = _curved(block)
            start = len(outputs)
            outputs += own
            self.output_gradients += [gradient.detach() for gradient in gradients]
            self._middles.append((Pass(*curved), slice(start, len(outputs))))
        self._is_zero = not outputs
        every = outputs or [output for block in blocks for output in block.outputs]
        self.jacobian = Jacobian(every, self.parameters, keep_graph=keep_graph, batched=batched)

    def output_hessians(self) -> list[tuple[Tensor, Source]]:
        """Whose derivative with respect to what is the weighted Hessian of each loss.

        Empty where a loss is of several tensors of outputs, or has none with curvature.
        """
        passes = [multiply for multiply, _ in self._middles if isinstance(multiply, Pass)]
        if self._is_zero or not all(len(one.outputs) == 1 for one in passes):
            return []
        return [(one.outputs[0], one.inputs[0]) for one in passes]

    def _middle(self, parts: list[Tensor], batched: bool) -> list[Tensor]:
        if self._is_zero:
            return [torch.zeros_like(part) for part in parts]
        products: list[Tensor] = []
        for multiply, where in self._middles:
            products += multiply(parts[where], batched)
        return products


# ``w_k H_k u_k`` for one block; blocks do not share a second derivative.
_Middle = Callable[[list[Tensor], bool], list[Tensor]]


def _by_closed_form(product: output_hessians.Product) -> _Middle:
    return lambda parts, _: [product(parts[0])]


def _curved(block: Block | GradientBlock) -> tuple[HessianGraph, list[Tensor], list[Source]]:
    """The graph of a loss's Hessian, its gradients and outputs, without those that the loss is linear in."""
    loss, grads = (None, block.gradients) if isinstance(block, GradientBlock) else _differentiated(block)
    pairs = [(g, z) for g, z in zip(grads, block.outputs, strict=True) if g is not None and g.requires_grad]
    gradients, outputs = [g for g, _ in pairs], [z for _, z in pairs]
    return HessianGraph.of(loss, tuple(gradients), tuple(outputs)), gradients, outputs


def _differentiated(block: Block) -> tuple[Tensor, MaybeTensors]:
    if not block.loss.requires_grad or not all(output.requires_grad for output in block.outputs):
        raise ValueError("loss and outputs must carry a graph; compute them with gradients on.")
    grads = light_grad((block.loss,), block.outputs, (block.weight,))
    if all(grad is None for grad in grads):
        raise ValueError("loss must depend on outputs; pass the tensors it was computed from.")
    return block.loss, grads


def _check_loss(loss: Tensor) -> None:
    if loss.numel() != 1:
        raise ValueError(
            f"loss must be a scalar, got shape {tuple(loss.shape)}; reduce it with mean() or sum()."
        )
    if not loss.requires_grad:
        raise ValueError("loss must carry a graph; compute it from the parameters with gradients on.")
