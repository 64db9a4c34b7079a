"""Three vectors of CG: a new damping or radius is another solve. For where memory for a space is short."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from secondorder import LinearOperator, SolveResult, cg, gltr, steihaug
from secondorder.solvers import NystromPreconditioner, RelativeProgress, nystrom
from secondorder.vectors.flat import is_finite
from secondorder.vectors.host import read

from .problem import QuadraticModel
from .subspace import Solution

# Curvature, minus the gradient, damping or radius.
Solver = Callable[[LinearOperator, Tensor, float], tuple[SolveResult, tuple[Tensor, ...]]]

# Below this relative residual CG has nothing left to gain (Martens' code).
RTOL = 1e-10


class Truncated:
    """Solves from scratch for each damping or radius.

    Args:
        model: Its gradient is not zero.
        solver: Gives a result, and earlier iterates.
        damps: Whether sizes are dampings.
        is_undamped: Whether the quadratics of the results are without them.

    Attributes:
        last: The last solution; None before it.
        is_finite: Whether its length is.
    """

    last: Tensor | None = None
    is_finite = True

    is_free = False

    def __init__(self, model: QuadraticModel, solver: Solver, damps: bool, is_undamped: bool = False) -> None:
        self._model, self._solver, self._damps = model, solver, damps
        self._has_damping = damps and not is_undamped
        self.size = self.products = 0
        self.seconds = 0.0

    def solve(self, size: float) -> Solution:
        """Minimise with damping ``size``, or within that radius."""
        b = -self._model.gradient
        start = time.perf_counter()
        result, earlier = self._solver(self._model.curvature, b, size)
        self.seconds += time.perf_counter() - start
        self.products += result.products
        self.size += result.iterations
        self.last = x = result.x
        shift = size if self._damps else 0.0
        linear, length, square = read(b.dot(x), x.norm(), x.dot(x))
        self.is_finite = math.isfinite(length)
        # That of the curvature, not of what was solved with.
        quadratic = result.quadratic - shift * square if self._has_damping else result.quadratic
        return Solution(x, linear, quadratic, length, result.status, shift, earlier)

    def steepest(self) -> float:
        """Curvature along the gradient: a product."""
        self.products += 1
        g = self._model.gradient
        g = g / g.abs().max()
        return read(g.dot(self._model.curvature @ g) / g.dot(g))[0]

    def least_damping(self) -> float:
        """Not known."""
        return 0.0


class Sketch:
    """The Nyström preconditioner of damped systems: drawn once, another damping costs no product.

    Args:
        rank: Of one that is drawn.
        last: That of an earlier step; None to draw one with the first solve.
        age: Steps that it served.

    Attributes:
        last: The present one; None before it is drawn.
        age: Steps that it has served before this one.
    """

    def __init__(self, rank: int, last: NystromPreconditioner | None = None, age: int = 0) -> None:
        self._rank, self.last, self.age = rank, last, age

    def precondition(
        self, B: LinearOperator, b: Tensor, damping: float
    ) -> tuple[NystromPreconditioner | None, int]:
        """The preconditioner of ``B + damping``, and products; None where these are not finite."""
        if self.last is not None:
            self.last = self.last.with_damping(damping)
            return self.last, 0
        if not is_finite(B @ b):
            return None, 1
        rank, generator = min(self._rank, b.numel()), torch.Generator("cpu").manual_seed(0)
        self.last = nystrom(B, rank, damping=damping, generator=generator)
        return self.last, 1 + rank


def conjugate_gradients(rtol: float, max_iter: int) -> Solver:
    """CG to a relative residual."""

    def solve(B: LinearOperator, b: Tensor, damping: float) -> tuple[SolveResult, tuple[Tensor, ...]]:
        return cg(B + damping, b, rtol=rtol, max_iter=max_iter), ()

    return solve


def truncated_gradients(
    progress: float, max_iter: int, start: Tensor | None, sketch: Sketch | None = None
) -> Solver:
    """CG from ``start``, until the model makes little progress, with its iterates on the way.

    Reference: Martens (2010), Deep learning via Hessian-free optimization, sections 4.4 and 4.6.
    """
    first = start

    def solve(B: LinearOperator, b: Tensor, damping: float) -> tuple[SolveResult, tuple[Tensor, ...]]:
        nonlocal first
        stop = RelativeProgress(progress)
        M, products = (None, 0) if sketch is None else sketch.precondition(B, b, damping)
        result = cg(B + damping, b, x0=first, M=M, rtol=RTOL, max_iter=max_iter, callback=stop)
        result = result._replace(products=result.products + products)
        first = result.x if math.isfinite(result.residual_norm) else torch.zeros_like(b)
        earlier = tuple(x for x in stop.kept if x is not result.x)
        return result, earlier

    return solve


def in_radius(rtol: float, max_iter: int) -> Solver:
    """Steihaug's CG."""

    def solve(B: LinearOperator, b: Tensor, radius: float) -> tuple[SolveResult, tuple[Tensor, ...]]:
        return steihaug(B, b, radius, rtol=rtol, max_iter=max_iter), ()

    return solve


def on_boundary(rtol: float, max_iter: int) -> Solver:
    """Lanczos steps, on along the boundary."""

    def solve(B: LinearOperator, b: Tensor, radius: float) -> tuple[SolveResult, tuple[Tensor, ...]]:
        return gltr(B, b, radius, rtol=rtol, max_iter=max_iter), ()

    return solve
