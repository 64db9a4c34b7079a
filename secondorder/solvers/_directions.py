"""The recurrence of conjugate gradients, for ``cg`` to drive."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secondorder.solvers._scale import check_range


class CGState(NamedTuple):
    """What a callback sees after an iteration.

    Attributes:
        iteration: Iterations done, from 1.
        x: Current iterate, shape (n,). A new tensor each time: it may be kept.
        model: ``x^T A x / 2 - b^T x``, the quadratic that CG minimises.
    """

    iteration: int
    x: Tensor
    model: float


class ConjugateDirections:
    """The recurrence of CG, without a decision.

    Between ``curvature()`` and ``advance()`` the caller may look at ``direction`` and stop; ``x`` is then
    unchanged. Counts its products. Lengths are in the norm of ``M^-1``, which is the Euclidean one without
    ``M``; of ``M^-1`` itself nothing is needed (Conn, Gould and Toint 2000, section 7.5.1).
    """

    def __init__(self, A: Any, b: Tensor, x0: Tensor | None, M: Any, is_bounded: bool = False) -> None:
        self.A, self._b, self._M = A, b, M
        self._is_bounded = is_bounded
        self.iteration = 0
        self.products = 0
        self.is_flat = self.was_flat = False
        self._steepest, self._flattest = 0.0, math.inf
        if x0 is None:
            self.x = b.new_zeros(b.shape)
            self._residual = b
        else:
            self.x = x0.to(b)
            self._residual = b - self._multiply(self.x)
        self._start = self.x
        self._x_x = self.x.dot(self.x)
        self._aim()

    def _multiply(self, v: Tensor) -> Tensor:
        self.products += 1
        product: Tensor = self.A @ v
        return product

    def _aim(self) -> None:
        """Start a new sequence of directions from the current residual."""
        self.residual_norm = float(self._residual.norm())
        z = self._residual if self._M is None else self._M @ self._residual
        self.direction = z
        self._rz = self._residual.dot(z)
        # Inner products of x and the direction, in the metric of M^-1.
        self._x_d, self._d_d = self.x.dot(self._residual), self._rz
        self._check_preconditioner()

    def _check_preconditioner(self) -> None:
        if self._M is None or not self.residual_norm > 0:
            return
        rz = float(self._rz)
        if self.iteration == 0 and rz >= 0:
            size = rz / self.residual_norm / self.residual_norm
            check_range(self.A, self.products, self._rz.dtype, size)
        if rz <= 0:
            raise ValueError(
                f"M must be symmetric positive definite, got r^T M r = {rz:.3g}"
                f" in iteration {self.iteration}."
            )

    def curvature(self) -> float:
        """``d^T A d`` of the next direction ``d``: one product.

        Afterwards ``is_flat`` says whether ``A`` vanishes along ``d`` to rounding, compared with the
        steepest direction so far: the system is singular, and a step along ``d`` has no bound. ``was_flat``
        says that it vanished along an earlier direction, as is known only now.
        """
        self._Ad = self._multiply(self.direction)
        self._dAd = self.direction.dot(self._Ad)
        # One read of the host for all.
        squares = [self._dAd, self.direction.dot(self.direction), *self._lengths()]
        curvature, squared_norm, *lengths = torch.stack(squares).tolist()
        self.lengths = [*lengths, curvature]
        quotient = curvature / squared_norm if squared_norm > 0 else 0.0
        self._steepest = max(self._steepest, quotient)
        rounding = torch.finfo(self._Ad.dtype).eps * self._steepest
        self.is_flat = quotient <= rounding
        self.was_flat = self._flattest <= rounding
        self._quotient = quotient
        self.sizes = squared_norm, abs(quotient)
        return float(curvature)

    def _lengths(self) -> list[Tensor]:
        """What ``to_boundary`` needs to know, where there is one."""
        if not self._is_bounded:
            return []
        if self._M is None:
            # Without a preconditioner the inner products themselves are more accurate than recurrences.
            d = self.direction
            return [d.dot(d), self.x.dot(d), self.x.dot(self.x), self._rz]
        return [self._d_d, self._x_d, self._x_x, self._rz]

    def advance(self) -> None:
        """Step to the minimiser along the direction and choose the next one."""
        if self._quotient < self._flattest:
            self._flattest, self._flat_direction = self._quotient, self.direction
        alpha = self._rz / self._dAd
        self._x_x = self._x_x + alpha * (2 * self._x_d + alpha * self._d_d)
        self.x = self.x + alpha * self.direction
        self._residual = self._residual - alpha * self._Ad
        z = self._residual if self._M is None else self._M @ self._residual
        previous, self._rz = self._rz, self._residual.dot(z)
        beta = self._rz / previous
        self.direction = z + beta * self.direction
        self._x_d = beta * (self._x_d + alpha * self._d_d)
        self._d_d = self._rz + beta * beta * self._d_d
        self.residual_norm = float(self._residual.norm())
        self.iteration += 1
        self._check_preconditioner()

    def state(self) -> CGState:
        """The current iterate and its model value, from the recursive residual."""
        return CGState(self.iteration, self.x, -0.5 * float(self.x.dot(self._b + self._residual)))

    def retreat(self) -> None:
        """Undo all steps: one of them went along a direction in which there is nothing to hold on to."""
        self.x, self.direction = self._start, self._flat_direction

    def move(self, length: float) -> None:
        """Go ``length`` along the direction and choose no next one."""
        self.x = self.x + length * self.direction
        self.iteration += 1

    def measure(self) -> tuple[float, float]:
        """The true ``norm(b - A x)`` and ``x^T A x``: one product."""
        Ax = self._multiply(self.x)
        self._residual_true = self._b - Ax
        return float(self._residual_true.norm()), float(self.x.dot(Ax))

    def restart(self) -> None:
        """Go on from the true residual that ``measure`` found."""
        self._residual = self._residual_true
        self._aim()


def to_boundary(lengths: Sequence[float], radius: float) -> float | None:
    """How far along the direction the ball of ``radius`` ends: ``tau`` with ``norm(x + tau d) = radius``.

    None where the step of ``advance`` ends inside. ``lengths`` are those that ``curvature()`` has read.
    """
    squared_length, product, squared, rz, curvature = lengths
    if not squared_length > 0:
        return None
    length = math.sqrt(squared_length)
    # In units of the radius, of which the square may leave the range.
    half_b, c = product / length / radius, squared / radius / radius - 1
    step = rz / curvature * length / radius if curvature > 0 else math.inf
    if c + step * (2 * half_b + step) < 0:
        return None
    root = math.sqrt(max(half_b * half_b - c, 0.0))
    # Without cancellation.
    found = -c / (half_b + root) if half_b > 0 else root - half_b
    return found * radius / length
