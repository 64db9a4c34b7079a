"""All of the space of parameters: the matrix is formed, and every damping or radius is free."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from secondorder.solvers.direct import Spectrum
from secondorder.vectors.host import fetched, is_true, waits

from .basis import uploaded
from .problem import QuadraticModel
from .subspace import Bound, Diagonal, Solution, least_damping


class Formed:
    """The eigendecomposition of the whole matrix.

    Args:
        model: Its gradient is not zero.
        bound: Damped, or within a radius.

    Attributes:
        values: Eigenvalues, ascending, on the host in double precision, shape (n,); where ``size`` is not 0.
    """

    is_free = True

    def __init__(self, model: QuadraticModel, bound: Bound) -> None:
        self._bound, self._b = bound, -model.gradient
        start = time.perf_counter()
        matrix = model.curvature.dense()
        self.size = self.products = len(self._b)
        self.seconds = time.perf_counter() - start
        if not is_true(matrix.isfinite().all()):
            self.size = 0
            return
        matrix = (matrix + matrix.T) / 2
        waits(matrix)
        values, vectors = torch.linalg.eigh(matrix)  # waits: once a step
        self._spectrum = Spectrum(values, vectors, matrix)
        # The small algebra is on the host, in double precision.
        self.values, self._target = fetched(torch.stack([values, vectors.T @ self._b]).double())

    def solve(self, size: float) -> Solution:
        """Minimise with damping ``size``, or within that radius."""
        solution = self._solution(self._bound.minimise, size)
        if self._bound.reflected is None or not float(self.values[0]) < -self._spectrum.rounding:
            return solution
        return solution._replace(other=self._solution(self._bound.reflected, size))

    def _solution(self, minimise: Diagonal, size: float) -> Solution:
        found = minimise(self.values, self._target, size, self._b.dtype)
        y = found.values
        return Solution(
            self._spectrum.vectors @ uploaded(y, self._b),
            float(self._target @ y),
            float(self.values @ y.square()),
            float(y.norm()),
            found.status,
            found.shift,
        )

    @property
    def lowest(self) -> Tensor:
        """Eigenvector of the lowest eigenvalue, shape (n,)."""
        return self._spectrum.vectors[:, 0]

    @property
    def is_definite(self) -> bool:
        """Whether the lowest eigenvalue is positive beyond rounding."""
        return float(self.values[0]) > self._spectrum.rounding

    def newton(self) -> Solution:
        """The stationary point of the model; along what has no curvature, beyond rounding, nothing."""
        kept = self.values.abs() > self._spectrum.rounding
        y = torch.where(kept, self._target / torch.where(kept, self.values, 1.0), 0.0)
        linear = float(self._target @ y)
        step = self._spectrum.vectors @ uploaded(y, self._b)
        return Solution(step, linear, linear, float(y.norm()), "converged", 0.0)

    def steepest(self) -> float:
        """Curvature along the gradient."""
        target = self._target / self._target.abs().max()
        return float(self.values @ target.square() / target.square().sum())

    def least_damping(self) -> float:
        """Below it damping changes nothing, or is rounding."""
        lowest = float(self.values[0])
        return least_damping(lowest if lowest > self._spectrum.rounding else 0.0, self.steepest())
