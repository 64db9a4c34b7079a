"""Least-squares solvers of other packages on the residual of a task: peers."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from functools import partial

import numpy as np
import scipy.optimize
import torch
from frontier import Task
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

# Of relative changes: none stops before the budget does.
NEVER = 1e-15


class OverError(Exception):
    """The budget is spent."""


class Residual(nn.Module):
    """The residual as a module of the network, so that it can be called with other parameters."""

    def __init__(self, net: nn.Module, residual: Callable[[], Tensor]) -> None:
        super().__init__()
        self.net, self._residual = net, residual

    def forward(self) -> Tensor:
        return self._residual()


def jacobian(residual: Tensor, parameters: list[Tensor]) -> Tensor:
    """Of shape (residuals, n), by its columns: of these there are fewer."""
    weights = torch.zeros_like(residual, requires_grad=True)
    gradient = parameters_to_vector(torch.autograd.grad(residual, parameters, weights, create_graph=True))
    columns = torch.eye(len(gradient), dtype=gradient.dtype)
    return torch.autograd.grad(gradient, weights, columns, is_grads_batched=True)[0].T


def scipys(method: str, task: Task, residual: Callable[[], Tensor], is_over: Callable[[], bool]) -> None:
    """MINPACK's Levenberg-Marquardt, or the trust region of SciPy, with exact Jacobians."""
    parameters = list(task.net.parameters())

    def at(x: np.ndarray) -> None:
        vector_to_parameters(torch.from_numpy(np.array(x)), parameters)
        if is_over():
            raise OverError

    def values(x: np.ndarray) -> np.ndarray:
        at(x)
        with torch.no_grad():
            return residual().numpy()

    def derivatives(x: np.ndarray) -> np.ndarray:
        at(x)
        return jacobian(task.residual(), parameters).numpy()

    start = parameters_to_vector(parameters).detach().numpy()
    limits = dict(ftol=NEVER, xtol=NEVER, gtol=NEVER, max_nfev=100_000, x_scale="jac")
    with contextlib.suppress(OverError):
        found = scipy.optimize.least_squares(values, start, derivatives, method=method, **limits)
        vector_to_parameters(torch.from_numpy(found.x), parameters)


def torchmins(task: Task, residual: Callable[[], Tensor], is_over: Callable[[], bool]) -> None:
    """pytorch-minimize's trust region."""
    package, module = importlib.import_module("torchmin"), Residual(task.net, residual)
    named = [(f"net.{name}", p) for name, p in task.net.named_parameters()]
    parameters = [p for _, p in named]

    def values(x: Tensor) -> Tensor:
        if is_over():
            raise OverError
        parts = x.split([p.numel() for p in parameters])
        given = {name: part.view_as(p) for (name, p), part in zip(named, parts, strict=True)}
        vector_to_parameters(x.detach().clone(), parameters)
        return torch.func.functional_call(module, given, ())

    start = parameters_to_vector(parameters).detach().clone()
    limits = dict(ftol=NEVER, xtol=NEVER, gtol=NEVER, max_nfev=100_000)
    with contextlib.suppress(OverError):
        package.least_squares(values, start, tr_solver="exact", **limits)


SOLVERS = {
    "MINPACK": partial(scipys, "lm"),
    "trf": partial(scipys, "trf"),
    "torchmin": torchmins,
}
