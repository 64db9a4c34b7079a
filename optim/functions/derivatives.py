"""Gradient and Hessian of a value, of few unknowns: what an operator on a kept graph would cost in set-up."""

from __future__ import annotations

import torch
from torch import Tensor

from secondorder import Hessian
from secondorder.autodiff.backward import pull_rows
from secondorder.autodiff.graph import refuse_wrong

# Unknowns up to which a backward pass for each is faster than one batched pass, and up to which that is.
FEW, SMALL = 4, 128


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
                return pull_rows([g], [x], [torch.eye(n, dtype=g.dtype, device=g.device)])[0]
            rows = [
                torch.autograd.grad(part, x, retain_graph=True, allow_unused=True)[0] for part in g.unbind()
            ]
        except RuntimeError:
            return Hessian(self._loss, [x]).dense()
        return torch.stack([torch.zeros_like(x) if row is None else row for row in rows])
