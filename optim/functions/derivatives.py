"""Gradient, Hessian and Jacobian of few unknowns, without what an operator takes to be set up."""

from __future__ import annotations

import torch
from torch import Tensor

from secondorder import Hessian, Jacobian
from secondorder.autodiff.backward import pull_rows
from secondorder.autodiff.graph import refuse_wrong, refuse_wrong_rows

# Unknowns up to which a backward pass for each is faster than one batched pass, and up to which that is.
FEW, SMALL = 2, 128
# Entries of a Jacobian up to which this is.
LARGE = 2**17


def jacobian(outputs: Tensor, x: Tensor) -> Tensor:
    """Of outputs in their graph, shape (m, n): from ``u -> J^T u``, or by rows where these are few.

    Raises:
        RuntimeError: the graph holds an operation that torch cannot differentiate once more, or gets wrong.
    """
    n, m = len(x), outputs.numel()
    if m * n > LARGE:
        # It measures how wide a block of columns pays.
        return Jacobian(outputs, [x]).dense()
    if m <= n:
        return pull_rows([outputs], [x], [_identity(outputs, m).view(m, *outputs.shape)])[0]
    refuse_wrong_rows((outputs,), (x,))
    u = torch.zeros_like(outputs, requires_grad=True)
    try:
        (g,) = torch.autograd.grad(outputs, x, u, create_graph=True, allow_unused=True)
        if g is None or not g.requires_grad:
            return outputs.new_zeros(m, n)
        return pull_rows([g], [u], [_identity(g, n)])[0].reshape(n, m).T
    except RuntimeError:
        # Its error says what to do.
        return Jacobian(outputs, [x]).dense()


def _identity(like: Tensor, n: int) -> Tensor:
    return torch.eye(n, dtype=like.dtype, device=like.device)


class Slopes:
    """Of a value in its graph.

    Args:
        loss: A scalar with a graph.
        x: What it is differentiated in, shape (n,).

    Attributes:
        gradient: Shape (n,), without a graph.

    Raises:
        RuntimeError: the graph holds an operation whose second derivative torch lacks, or gets wrong.
    """

    def __init__(self, loss: Tensor, x: Tensor) -> None:
        self._loss, self._x = loss, x
        refuse_wrong((loss,), (x,), is_given=True)
        try:
            (g,) = torch.autograd.grad(loss, x, torch.ones_like(loss), create_graph=True, allow_unused=True)
        except RuntimeError:
            # It says which operation is missing, and what to do.
            g = Hessian(loss, [x]).gradient
        self._graph = torch.zeros_like(x) if g is None else g
        self.gradient = self._graph.detach()

    def hessian(self) -> Tensor:
        """The matrix, shape (n, n), from the graph of the gradient."""
        g, x = self._graph, self._x
        n = len(x)
        if not g.requires_grad or not n:
            return torch.zeros_like(x).expand(n, n)
        if n > SMALL:
            return Hessian(self._loss, [x]).dense()
        try:
            if n > FEW:
                return pull_rows([g], [x], [_identity(g, n)])[0]
            rows = [
                torch.autograd.grad(part, x, retain_graph=True, allow_unused=True)[0] for part in g.unbind()
            ]
        except RuntimeError:
            return Hessian(self._loss, [x]).dense()
        return torch.stack([torch.zeros_like(x) if row is None else row for row in rows])
