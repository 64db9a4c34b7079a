"""Curvature operators of a loss that carries a graph: ``Hessian`` and ``GaussNewton``.

Both evaluate nothing again: they keep the graph of the gradient, or of ``u -> J^T u``, and a product
repeats only the linear part of it. They are valid until a parameter is changed
in place, which is when autograd itself would refuse to use the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from secondorder._backward import pull, pull_rows
from secondorder.flat import flatten, flatten_rows, unflatten, unflatten_rows
from secondorder.graph import refuse_wrong
from secondorder.operators import LinearOperator


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


class _ParameterOperator(LinearOperator):
    """An operator on the flat vector of some parameters."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = tuple(parameters)
        for index, parameter in enumerate(self._parameters):
            if not isinstance(parameter, Tensor):
                raise TypeError(f"parameters[{index}] must be a tensor, got {type(parameter).__name__}.")
        if not self._parameters:
            raise ValueError("parameters must hold at least one tensor, got none.")
        first = self._parameters[0]
        for index, parameter in enumerate(self._parameters):
            if not parameter.requires_grad:
                raise ValueError(f"parameters[{index}] must require gradients; call requires_grad_() on it.")
            if parameter.dtype != first.dtype or parameter.device != first.device:
                raise ValueError(
                    f"parameters must share dtype and device, got {first.dtype} on {first.device} and "
                    f"{parameter.dtype} on {parameter.device}."
                )
        n = sum(p.numel() for p in self._parameters)
        super().__init__((n, n), first.dtype, first.device)


class Hessian(_ParameterOperator):
    """Hessian of a scalar loss with respect to parameters, flat.

    Args:
        loss: A scalar that carries a graph.
        parameters: Tensors of one dtype and device that require gradients and of which ``loss`` may be a
            function; the blocks of those it does not depend on are zero.

    Raises:
        ValueError: ``loss`` is not a scalar with a graph; ``parameters`` is empty, mixed or frozen.
        RuntimeError: ``loss`` was computed with an operation whose second derivative torch gets wrong.

    Cost: construction, one gradient with a graph; a product, 1.3 (MLP) to 2.3 gradients (transformer).
    The graph of the gradient is kept as long as the operator.

    Reference: Pearlmutter (1994), Fast exact multiplication by the Hessian.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> Hessian(x.pow(3).sum(), [x]) @ torch.ones(2)
        tensor([ 6., 12.])
    """

    def __init__(self, loss: Tensor, parameters: Iterable[Tensor]) -> None:
        super().__init__(parameters)
        _check_loss(loss)
        refuse_wrong(loss)
        grads = torch.autograd.grad(
            loss, self._parameters, torch.ones_like(loss), create_graph=True, allow_unused=True
        )
        # What is constant or missing contributes nothing to the second derivative.
        self._indices = [i for i, g in enumerate(grads) if g is not None and g.requires_grad]
        self._grads = [grads[i] for i in self._indices]
        self.gradient = flatten(
            [
                torch.zeros_like(p) if g is None else g.detach()
                for g, p in zip(grads, self._parameters, strict=True)
            ]
        )

    def _matvec(self, v: Tensor) -> Tensor:
        if not self._grads:
            return torch.zeros_like(v)
        parts = unflatten(v, self._parameters)
        return flatten(pull(self._grads, self._parameters, [parts[i] for i in self._indices]))

    def _matmat(self, V: Tensor) -> Tensor:
        if not self._grads:
            return torch.zeros_like(V)
        parts = unflatten_rows(V.T, self._parameters)
        rows = pull_rows(self._grads, self._parameters, [parts[i] for i in self._indices])
        return flatten_rows(rows).T


class GaussNewton(_ParameterOperator):
    """Generalised Gauss-Newton matrix ``sum_k J_k^T (w_k H_k) J_k``, flat.

    ``J_k`` is the Jacobian of block ``k``'s outputs with respect to the parameters, ``H_k`` the Hessian
    of its loss with respect to the outputs, ``w_k`` its weight. Positive semidefinite where the losses
    are convex in the outputs and the weights non-negative.

    Args:
        loss: A scalar computed from ``outputs``, convex in them.
        outputs: The network's outputs in the graph, a tensor or a tuple of tensors.
        parameters: Tensors of one dtype and device that require gradients.

    Raises:
        ValueError: ``loss`` or ``outputs`` carry no graph, or have nothing to do with one another;
            ``parameters`` is empty, mixed or frozen.

    Cost: construction, one gradient with a graph; a product, 1.1 (MLP) to 1.7 gradients (transformer).

    Reference: Schraudolph (2002), Fast curvature matrix-vector products for second-order gradient descent.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> outputs = w.square()
        >>> GaussNewton((outputs - 1).square().sum(), outputs, [w]) @ torch.ones(2)
        tensor([ 8., 32.])
    """

    def __init__(
        self, loss: Tensor, outputs: Tensor | tuple[Tensor, ...], parameters: Iterable[Tensor]
    ) -> None:
        _check_loss(loss)
        outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
        self._set_up([Block(loss, outputs, torch.ones_like(loss))], parameters)

    @classmethod
    def of_blocks(cls, blocks: Sequence[Block], parameters: Iterable[Tensor]) -> GaussNewton:
        """The operator of a sum of weighted losses, each of outputs of its own."""
        operator = cls.__new__(cls)
        operator._set_up(blocks, parameters)
        return operator

    def _set_up(self, blocks: Sequence[Block], parameters: Iterable[Tensor]) -> None:
        super().__init__(parameters)
        if not blocks:
            raise ValueError("blocks must hold at least one loss of outputs, got none.")
        self._outputs: list[Tensor] = []
        # For each block: its gradients with respect to outputs, and which of all outputs those are.
        self._loss_gradients: list[tuple[list[Tensor], slice]] = []
        for block in blocks:
            curved = _curved_gradients(block)
            if curved:
                start = len(self._outputs)
                self._outputs += [output for _, output in curved]
                self._loss_gradients.append(([g for g, _ in curved], slice(start, len(self._outputs))))
        # J^T u is linear in u: its derivative with respect to u, applied to v, is J v.
        self._duals = [torch.zeros_like(outputs, requires_grad=True) for outputs in self._outputs]
        pulled = (
            torch.autograd.grad(
                self._outputs, self._parameters, self._duals, create_graph=True, allow_unused=True
            )
            if self._outputs
            else ()
        )
        self._indices = [i for i, g in enumerate(pulled) if g is not None and g.requires_grad]
        self._pulled = [pulled[i] for i in self._indices]

    def _matvec(self, v: Tensor) -> Tensor:
        if not self._pulled:
            return torch.zeros_like(v)
        parts = unflatten(v, self._parameters)
        Jv = pull(self._pulled, self._duals, [parts[i] for i in self._indices])
        HJv = self._multiply_loss_hessians(Jv, pull)
        return flatten(pull(self._outputs, self._parameters, HJv))

    def _matmat(self, V: Tensor) -> Tensor:
        if not self._pulled:
            return torch.zeros_like(V)
        parts = unflatten_rows(V.T, self._parameters)
        JV = pull_rows(self._pulled, self._duals, [parts[i] for i in self._indices])
        HJV = self._multiply_loss_hessians(JV, pull_rows)
        return flatten_rows(pull_rows(self._outputs, self._parameters, HJV)).T

    def _multiply_loss_hessians(
        self, vectors: list[Tensor], grad: Callable[..., list[Tensor]]
    ) -> list[Tensor]:
        """``w_k H_k u_k`` for every block; blocks do not share a second derivative."""
        products: list[Tensor] = []
        for gradients, where in self._loss_gradients:
            products += grad(gradients, self._outputs[where], vectors[where])
        return products


def _curved_gradients(block: Block) -> list[tuple[Tensor, Tensor]]:
    """Gradients of a loss with respect to its outputs, with the outputs; linear ones are left out."""
    if not block.loss.requires_grad or not all(output.requires_grad for output in block.outputs):
        raise ValueError("loss and outputs must carry a graph; compute them with gradients on.")
    grads = torch.autograd.grad(block.loss, block.outputs, block.weight, create_graph=True, allow_unused=True)
    if all(grad is None for grad in grads):
        raise ValueError("loss must depend on outputs; pass the tensors it was computed from.")
    return [
        (grad, output)
        for grad, output in zip(grads, block.outputs, strict=True)
        if grad is not None and grad.requires_grad
    ]


def _check_loss(loss: Tensor) -> None:
    if loss.numel() != 1:
        raise ValueError(
            f"loss must be a scalar, got shape {tuple(loss.shape)}; reduce it with mean() or sum()."
        )
    if not loss.requires_grad:
        raise ValueError("loss must carry a graph; compute it from the parameters with gradients on.")
