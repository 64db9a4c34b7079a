"""Independent answers: dense matrices from ``torch.autograd.functional``, central differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def dense_hessian(func: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Tensor:
    """Hessian over the concatenated inputs, shape (n, n)."""
    inputs = tuple(x.detach() for x in inputs)
    blocks = torch.autograd.functional.hessian(func, inputs)
    rows = [
        torch.cat([b.reshape(x.numel(), y.numel()) for b, y in zip(row, inputs, strict=True)], dim=1)
        for row, x in zip(blocks, inputs, strict=True)
    ]
    return torch.cat(rows)


def dense_jacobian(func: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Tensor:
    """Jacobian of one output over the concatenated inputs, shape (m, n)."""
    inputs = tuple(x.detach() for x in inputs)
    blocks = torch.autograd.functional.jacobian(func, inputs)
    return torch.cat([b.reshape(-1, x.numel()) for b, x in zip(blocks, inputs, strict=True)], dim=1)


def dense_gauss_newton(case) -> Tensor:
    """``J^T H_L J`` of a network case from its dense factors."""
    parameters = tuple(p.detach() for p in case.model.parameters())
    J = dense_jacobian(case.outputs_of, parameters)
    outputs = case.outputs_of(*parameters)
    H = torch.autograd.functional.hessian(lambda z: case.loss(z, case.targets), outputs)
    return J.T @ H.reshape(J.shape[0], J.shape[0]) @ J


def central_gradient(func: Callable[[Tensor], Tensor], x: Tensor, h: float = 1e-4) -> Tensor:
    """Gradient by fourth-order central differences, in float64: relative error about 1e-11."""
    gradient = torch.zeros_like(x)
    for i in range(x.numel()):
        e = torch.zeros_like(x).view(-1)
        e[i] = h
        e = e.view(x.shape)
        gradient.view(-1)[i] = (8 * (func(x + e) - func(x - e)) - (func(x + 2 * e) - func(x - 2 * e))) / (
            12 * h
        )
    return gradient


def dense_empirical_fisher(case) -> Tensor:
    """``sum_n g_n g_n^T / N`` of a network case, from one sample at a time."""
    parameters = tuple(case.model.parameters())
    total = 0
    for i in range(len(case.inputs)):
        loss = case.loss(case.model(case.inputs[i : i + 1]), case.targets[i : i + 1])
        grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        g = torch.cat([grad.reshape(-1) for grad in grads])
        total = total + torch.outer(g, g)
    return total / len(case.inputs)
