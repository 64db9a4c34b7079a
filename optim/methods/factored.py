"""All of the space of parameters of a sparse matrix: each radius is a few sparse factorisations.

Reference: Moré and Sorensen (1983), Computing a trust region step, sections 3 and 5.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from scipy.sparse import identity
from scipy.sparse.linalg import splu

from .problem import QuadraticModel
from .subspace import Solution

# A step this near to the radius, relative, is on it.
ON_RADIUS = 0.1
# Factorisations of one radius; each halves what is not known of the shift, or more.
MOST = 40


class Factored:
    """The triangular factors of ``H + shift I``, for the shift that each radius asks for.

    Factors and steps are made on the host, in double precision.

    Args:
        model: Its gradient is not zero.
        matrix: Its curvature, sparse, symmetric, shape (n, n).

    Attributes:
        is_definite: Whether the matrix is positive definite.
        factorisations: So far.
    """

    is_free = True

    def __init__(self, model: QuadraticModel, matrix: Any) -> None:
        self._model, self._matrix = model, matrix
        self._b = -model.gradient.double().cpu().numpy()
        self.size, self.products, self.seconds, self.factorisations = len(self._b), 0, 0.0, 0
        self._bound = float(abs(matrix).sum(axis=0).max()) if matrix.shape[0] else 0.0
        if not math.isfinite(self._bound):
            self.size = 0
            return
        self._plain = self._factored(0.0)
        self.is_definite = self._plain is not None

    def newton(self) -> Solution:
        """The stationary point of the model, where the matrix is definite."""
        assert self._plain is not None
        return self._solution(self._plain.solve(self._b), 0.0, "converged")

    def solve(self, size: float) -> Solution:
        """Within the radius."""
        if self._plain is not None:
            p = self._plain.solve(self._b)
            if np.linalg.norm(p) <= size:
                return self._solution(p, 0.0, "converged")
        low, high = 0.0, self._bound + float(np.linalg.norm(self._b)) / size
        shift, best = (high if self._plain is None else 0.0), None
        if self._plain is None:
            shift = min(high, max(1e-3 * self._bound, 1e-12 * high))
        factors = self._factored(shift)
        for _ in range(MOST):
            if factors is None:
                # Below the least eigenvalue's distance from zero.
                low = shift
            else:
                p = factors.solve(self._b)
                length = float(np.linalg.norm(p))
                if length <= (1 + ON_RADIUS) * size:
                    best, high = (p, shift, length), shift
                    if length >= (1 - ON_RADIUS) * size:
                        break
                else:
                    low = shift
                # Newton on 1/size - 1/norm(p), whose slope is p . (H + shift)^-1 p.
                slope = float(p @ factors.solve(p))
                shift += length**2 / slope * (length - size) / size if slope > 0 else 0.0
            if factors is None or not low < shift < high:
                shift = math.sqrt(low * high) if low > 0 else 0.5 * (low + high)
            if not low < shift < high or high - low <= 1e-12 * high:
                break
            factors = self._factored(shift)
        if best is None:
            best = (self._b / max(high, 1e-300), high, 0.0)
        p, shift, length = best
        p = p * min(1.0, size / max(float(np.linalg.norm(p)), 1e-300))
        return self._solution(p, shift, "boundary")

    def steepest(self) -> float:
        """Curvature along the gradient."""
        unit = self._b / np.abs(self._b).max()
        return float(unit @ (self._matrix @ unit) / (unit @ unit))

    def least_damping(self) -> float:
        """There is none."""
        return 0.0

    def _solution(self, p: Any, shift: float, status: str) -> Solution:
        step = torch.from_numpy(p).to(self._model.gradient)
        linear, quadratic = float(self._b @ p), float(p @ (self._matrix @ p))
        return Solution(step, linear, quadratic, float(np.linalg.norm(p)), status, shift)

    def _factored(self, shift: float) -> Any:
        """Factors with pivots on the diagonal, signed as eigenvalues are; None where one is not positive."""
        start = time.perf_counter()
        self.factorisations += 1
        A = (self._matrix + shift * identity(self._matrix.shape[0], format="csc")).tocsc()
        options = dict(SymmetricMode=True)
        try:
            factors = splu(A, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options=options)
        except RuntimeError:
            # A pivot of zero.
            return None
        finally:
            self.seconds += time.perf_counter() - start
        pivots = factors.U.diagonal()
        is_symmetric = np.array_equal(factors.perm_r, factors.perm_c)
        return factors if is_symmetric and bool((pivots > 0).all()) else None
