"""Solutions as functions of what they were found from: gradients by the implicit function theorem.

Where ``F(x, args) = 0`` defines x, ``dx = -A^-1 dF/dargs dargs`` with ``A = dF/dx``. A step of Newton with
the matrix held fixed, ``x - A^-1 F(x, args)``, leaves the solution where it is and has this derivative; a
second step has the second one too, for each of them makes what is left of the dependence smaller by an
order. So two steps in the graph of the arguments are the solution, twice differentiable.

Reference: Griewank and Walther (2008), Evaluating derivatives, section 15.3, for derivatives of fixed points
by iterations with a matrix that is not differentiated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from secondorder import FunctionOperator, minres
from secondorder.autodiff.backward import pull_rows

# Steps in the graph: derivatives of this order are right.
STEPS = 2
# Unknowns up to which the matrix is formed and factored.
DENSE = 1000
# Of a solve by products.
RTOL = 1e-10

# x of shape (n,) or, of a batch, (B, n), and arguments -> F, of the same shape, in the graph of both.
Equations = Callable[[Tensor, Any], Tensor]
Solve = Callable[[Tensor], Tensor]


class Attached(NamedTuple):
    """A solution in the graph of its arguments.

    Attributes:
        x: The same numbers, in the graph.
        error: Largest change that Newton's step would make, relative to the largest entry: derivatives
            are right to about this.
    """

    x: Tensor
    error: float


def depends(args: Any) -> bool:
    """Whether a tensor in there requires gradients."""
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(args))


def gradient_of(value: Callable[[Tensor, Any], Tensor]) -> Equations:
    """The equations of a minimum: the gradient of a value, or of the sum over a batch, in its own graph."""

    def equations(x: Tensor, args: Any) -> Tensor:
        (g,) = torch.autograd.grad(value(x, args).sum(), x, create_graph=True)
        return g

    return equations


def attach(
    x: Tensor, args: Any, equations: Equations, *, is_symmetric: bool = True, free: Tensor | None = None
) -> Attached:
    """The solution in the graph of the tensors in ``args``.

    Args:
        x: Shape (n,); of a batch, (B, n).
        args: Any nesting of tensors and other things.
        equations: ``F``, of x and ``args``.
        is_symmetric: Whether ``dF/dx`` is, as that of a gradient.
        free: Which entries solve the equations, Boolean, shape (n,); the others are held. None for all.

    Raises:
        RuntimeError: ``dF/dx`` is singular, or does not depend on x: there is no such function.
    """
    start = x.detach()
    with torch.enable_grad():
        point = start.clone().requires_grad_()
        F = equations(point, _detached(args))
        if not F.requires_grad:
            raise RuntimeError("implicit=True needs equations that depend on x through torch's functions.")
        solve = _solver(F, point, is_symmetric, free)
        moved = start
        for _ in range(STEPS):
            # Of the function's own derivative in x, which arguments pass through as well.
            at = moved if moved.requires_grad else moved.clone().requires_grad_()
            moved = moved - solve(equations(at, args))
    error = float(solve(F.detach()).abs().max()) / max(float(start.abs().max()), torch.finfo(x.dtype).tiny)
    return Attached(moved + (start - moved).detach(), error)


def _detached(args: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, args)


def _solver(F: Tensor, x: Tensor, is_symmetric: bool, free: Tensor | None) -> Solve:
    """``F -> A^-1 F``, differentiable in its argument alone; zero for what is held."""
    n = x.shape[-1]
    if x.ndim == 1 and n > DENSE and is_symmetric:
        return _by_products(F, x, free)
    A = _matrix(F, x)
    if free is not None:
        # What is held keeps its place: rows of the identity.
        A = torch.where(free.unsqueeze(1) & free, A, 0.0) + torch.diag((~free).to(A))
    LU, pivots, info = torch.linalg.lu_factor_ex(A)
    largest = A.abs().amax((-2, -1))
    least = LU.diagonal(dim1=-2, dim2=-1).abs().amin(-1)
    if bool((info != 0).any()) or bool((least <= torch.finfo(A.dtype).eps * n * largest).any()):
        raise RuntimeError(
            "the solution is not a differentiable function of args: the curvature there is singular. Add a"
            " penalty, or fix what is not determined."
        )

    def solve(b: Tensor) -> Tensor:
        b = b if free is None else torch.where(free, b, 0.0)
        return torch.linalg.lu_solve(LU, pivots, b.unsqueeze(-1)).squeeze(-1)

    return solve


def _matrix(F: Tensor, x: Tensor) -> Tensor:
    """``dF/dx``, shape (n, n), or (B, n, n)."""
    n = x.shape[-1]
    if x.ndim == 1:
        return pull_rows([F], [x], [torch.eye(n, dtype=x.dtype, device=x.device)])[0].detach()
    rows = [torch.autograd.grad(part, x, retain_graph=True)[0] for part in F.sum(0).unbind()]
    return torch.stack(rows, 1)


def _by_products(F: Tensor, x: Tensor, free: Tensor | None) -> Solve:
    """By MINRES, in the forward pass and in the backward one."""

    def product(v: Tensor) -> Tensor:
        v = v if free is None else torch.where(free, v, 0.0)
        (Av,) = torch.autograd.grad(F, x, v, retain_graph=True)
        return Av if free is None else torch.where(free, Av, 0.0)

    operator = FunctionOperator(product, x.detach())

    def solved(b: Tensor) -> Tensor:
        found = minres(operator, b if free is None else torch.where(free, b, 0.0), rtol=RTOL)
        if found.status not in ("converged", "stagnated"):
            raise RuntimeError(f"the curvature at the solution could not be inverted: {found.message}.")
        return found.x

    def solve(b: Tensor) -> Tensor:
        return _Linear.apply(solved, b)

    return solve


class _Linear(torch.autograd.Function):
    """A symmetric linear map, as often differentiable as one likes."""

    @staticmethod
    def forward(ctx: Any, apply: Solve, b: Tensor) -> Tensor:
        ctx.map = apply
        return apply(b.detach())

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[None, Tensor]:
        return None, _Linear.apply(ctx.map, v)
