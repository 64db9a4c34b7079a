"""The recurrence of conjugate gradients, for ``cg`` to drive."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secondorder.solvers._scale import check_range, check_size
from secondorder.vectors.host import read


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


class Ahead(NamedTuple):
    """How far CG goes before the host looks, and what it looks at.

    Attributes:
        check_every: Iterations between two reads.
        limit: Iterations allowed.
        is_bounded: Whether ``to_boundary`` is asked for.
        is_watched: Whether ``state`` is.
    """

    check_every: int = 1
    limit: float = math.inf
    is_bounded: bool = False
    is_watched: bool = False


class _Point(NamedTuple):
    """Where the recurrence is: all of it on the device."""

    x: Tensor
    residual: Tensor
    direction: Tensor
    rz: Tensor


class _Front:
    """The recurrence itself, ahead of what the host knows; counts products."""

    def __init__(self, A: Any, b: Tensor, M: Any, ahead: Ahead) -> None:
        self._A, self._b, self._M, self._ahead = A, b, M, ahead
        self.products = 0
        self.made: deque[tuple[Tensor, Tensor, list[float]]] = deque()

    def multiply(self, v: Tensor) -> Tensor:
        self.products += 1
        product: Tensor = self._A @ v
        return product

    def begin(self, x: Tensor, residual: Tensor) -> list[Tensor]:
        """Start a new sequence of directions; norm of the residual, and its square in that of M."""
        z = self._precondition(residual)
        self._point = _Point(x, residual, z, residual.dot(z))
        self.made.clear()
        self.direction = z
        return [residual.norm(), self._point.rz]

    def run(self, first: list[Tensor], iteration: int) -> list[float]:
        """Go ahead, and read the numbers of these iterations together with ``first``."""
        count = int(min(self._ahead.check_every, self._ahead.limit - iteration))
        made = [self._iterated() for _ in range(count)]
        numbers = read(*first, *(number for *_, row in made for number in row))
        rest = numbers[len(first) :]
        for index, (x, direction, row) in enumerate(made):
            self.made.append((x, direction, rest[index * len(row) : (index + 1) * len(row)]))
        return numbers[: len(first)]

    def _iterated(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """An iteration: one product. Where it ends, the next direction, and its numbers."""
        x, residual, direction, rz = self._point
        Ad = self.multiply(direction)
        dAd = direction.dot(Ad)
        numbers = [dAd, direction.dot(direction)]
        if self._ahead.is_bounded and self._M is None:
            # Without a preconditioner the inner products themselves are more accurate than recurrences.
            numbers += [x.dot(direction), x.dot(x)]
        alpha = rz / dAd
        x = x + alpha * direction
        residual = residual - alpha * Ad
        z = self._precondition(residual)
        following = residual.dot(z)
        self._point = _Point(x, residual, z + following / rz * direction, following)
        numbers += [following, residual.norm()]
        if self._ahead.is_watched:
            numbers.append(x.dot(self._b + residual))
        return x, self._point.direction, numbers

    def _precondition(self, r: Tensor) -> Tensor:
        z: Tensor = r if self._M is None else self._M @ r
        return z


class ConjugateDirections:
    """The recurrence of CG, without a decision.

    Between ``curvature()`` and ``advance()`` the caller may look at ``direction`` and stop; ``x`` is then
    unchanged. Counts its products. Lengths are in the norm of ``M^-1``, which is the Euclidean one without
    ``M``; of ``M^-1`` itself nothing is needed (Conn, Gould and Toint 2000, section 7.5.1).

    Iterations are made ahead of the caller, ``check_every`` at a time, and their numbers read at once; then
    the caller goes through them one by one. Its decisions, and the results, do not depend on how many.

    Attributes:
        b_norm: Euclidean norm of ``b``.
        residual_norm: Of the recurrence, before the next iteration.
    """

    def __init__(self, A: Any, b: Tensor, x0: Tensor | None, M: Any, ahead: Ahead | None = None) -> None:
        self.A, self._b, self._M, self._ahead = A, b, M, ahead or Ahead()
        self.iteration = 0
        self._front = _Front(A, b, M, self._ahead)
        self.is_flat = self.was_flat = False
        self._steepest, self._flattest = 0.0, math.inf
        if x0 is None:
            self.x = b.new_zeros(b.shape)
            residual = b
        else:
            self.x = x0.to(b)
            residual = b - self._front.multiply(self.x)
        self._start, self._x0 = self.x, x0
        # Inner products of x and the direction in the metric of M^-1, where there is an M: x is zero then.
        self._x_x = self._x_d = 0.0
        self._aim(residual)

    @property
    def products(self) -> int:
        """Those made so far."""
        return self._front.products

    def _aim(self, residual: Tensor) -> None:
        """Start a new sequence of directions from a residual."""
        first = self._front.begin(self.x, residual)
        self.direction = self._front.direction
        if self.iteration == 0:
            largest = self._b.abs().max() if self._b.numel() else self._b.new_zeros(())
            first += [largest, first[0] if self._x0 is None else self._b.norm()]
        self.residual_norm, self._rz, *sizes = self._front.run(first, self.iteration)
        if sizes:
            self.b_norm = sizes[1]
            check_size(sizes[0], residual.dtype, self.products, self._x0)
        self._d_d = self._rz
        self._check_preconditioner()

    def _check_preconditioner(self) -> None:
        if self._M is None or not self.residual_norm > 0:
            return
        if self.iteration == 0 and self._rz >= 0:
            size = self._rz / self.residual_norm / self.residual_norm
            check_range(self.A, self.products, self._b.dtype, size)
        if self._rz <= 0:
            raise ValueError(
                f"M must be symmetric positive definite, got r^T M r = {self._rz:.3g}"
                f" in iteration {self.iteration}."
            )

    def curvature(self) -> float:
        """``d^T A d`` of the next direction ``d``.

        Afterwards ``is_flat`` says whether ``A`` vanishes along ``d`` to rounding, compared with the
        steepest direction so far: the system is singular, and a step along ``d`` has no bound. ``was_flat``
        says that it vanished along an earlier direction, as is known only now.
        """
        if not self._front.made:
            self._front.run([], self.iteration)
        curvature, squared_norm, *lengths = self._front.made[0][2]
        if self._ahead.is_bounded:
            own = [squared_norm, *lengths[:2]] if self._M is None else [self._d_d, self._x_d, self._x_x]
            self.lengths = [*own, self._rz, curvature]
        quotient = curvature / squared_norm if squared_norm > 0 else 0.0
        self._steepest = max(self._steepest, quotient)
        rounding = torch.finfo(self._b.dtype).eps * self._steepest
        self.is_flat = quotient <= rounding
        self.was_flat = self._flattest <= rounding
        self._quotient = quotient
        self.sizes = squared_norm, abs(quotient)
        return curvature

    def advance(self) -> None:
        """Step to the minimiser along the direction and choose the next one."""
        if self._quotient < self._flattest:
            self._flattest, self._flat_direction = self._quotient, self.direction
        self.x, self.direction, numbers = self._front.made.popleft()
        before = self._rz
        if self._ahead.is_watched:
            *numbers, self._product = numbers
        *_, self._rz, self.residual_norm = numbers
        if self._ahead.is_bounded and self._M is not None:
            alpha, beta = before / numbers[0], self._rz / before
            self._x_x += alpha * (2 * self._x_d + alpha * self._d_d)
            self._x_d = beta * (self._x_d + alpha * self._d_d)
            self._d_d = self._rz + beta * beta * self._d_d
        self.iteration += 1
        self._check_preconditioner()

    def state(self) -> CGState:
        """The current iterate and its model value, from the recursive residual."""
        return CGState(self.iteration, self.x, -0.5 * self._product)

    def retreat(self) -> None:
        """Undo all steps: one of them went along a direction in which there is nothing to hold on to."""
        self.x, self.direction = self._start, self._flat_direction

    def move(self, length: float) -> None:
        """Go ``length`` along the direction and choose no next one."""
        self.x = self.x + length * self.direction
        self.iteration += 1

    def measure(self) -> tuple[float, float]:
        """The true ``norm(b - A x)`` and ``x^T A x``: one product."""
        Ax = self._front.multiply(self.x)
        self._residual_true = self._b - Ax
        norm, quadratic = read(self._residual_true.norm(), self.x.dot(Ax))
        return norm, quadratic

    def restart(self) -> None:
        """Go on from the true residual that ``measure`` found."""
        self._aim(self._residual_true)


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
