"""What a method sees of what it minimises: a quadratic model, and trials of steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from secondorder import LinearOperator
from secondorder.vectors.host import read

# Of a step (n,), and its coordinates in the vectors that were multiplied, if there are some.
Form = Callable[[Tensor, Tensor | None], float]


class QuadraticModel(NamedTuple):
    """``m(p) = value + gradient . p + p . curvature p / 2``.

    Attributes:
        value: Objective at the present point.
        gradient: Its gradient, flat, shape (n,), in single precision at least.
        curvature: Symmetric operator on flat vectors, undamped.
        norm: Euclidean norm of the gradient, which is not zero where an entry is not.
        form: ``p . B p`` of the objective's own ``B``, by which steps are judged, where ``curvature`` holds
            more, to hold them back as damping does: of a step, and its coordinates in the vectors that
            ``curvature`` has multiplied, in their order, shape (k,), or None. None where it holds no more.
    """

    value: float
    gradient: Tensor
    curvature: LinearOperator
    norm: float
    form: Form | None = None


class Rows(Protocol):
    """A Jacobian of residuals, ``A`` of shape (m, n).

    Attributes:
        shape: ``(m, n)``.
        passes: Backward passes that make it, or its Gram matrix.
    """

    shape: tuple[int, int]
    passes: int

    @property
    def fits(self) -> bool:
        """Whether there is room for it."""

    def dense(self) -> Tensor:
        """The matrix."""

    def gram(self) -> Tensor:
        """``A A^T``, shape (m, m)."""

    def __matmul__(self, v: Tensor, /) -> Tensor:
        """``A v``."""

    @property
    def T(self) -> Any:  # noqa: N802 - as a tensor's
        """The transpose, for ``A.T @ u``."""


class Residuals(NamedTuple):
    """A model by residuals: its curvature is ``A^T A + shift I``, its gradient ``-(A^T target + rest)``.

    Attributes:
        rows: ``A``, shape (m, n).
        target: Shape (m,); for a sum of squares minus the residuals.
        rest: Shape (n,); None for none.
        shift: As of weight decay.
    """

    rows: Rows
    target: Tensor
    rest: Tensor | None
    shift: float


class Trial(NamedTuple):
    """A step that was tried.

    Attributes:
        step: Flat, shape (n,), in the variables of the model.
        value: Objective after it; NaN, which no comparison prefers, where that is not finite or not known.
        norm: Euclidean norm of the step; NaN where nobody asked for it.
        point: What the problem keeps of the evaluation, so that an accepted one is not made again.
    """

    step: Tensor
    value: float
    norm: float = math.nan
    point: Any = None


def norm(v: Tensor) -> float:
    """Euclidean norm of a vector whose squares may leave the range."""
    return norms(v)[0][0]


def norms(*vectors: Tensor, beside: Sequence[Tensor] = ()) -> tuple[list[float], list[float]]:
    """The same of several, and the numbers that are ``beside``: one read for all."""
    parts = []
    for v in vectors:
        largest = torch.linalg.vector_norm(v, math.inf) if v.numel() else v.sum()
        parts += [largest, torch.linalg.vector_norm(v / largest)]
    numbers = read(*parts, *beside)
    pairs = zip(numbers[: len(parts) : 2], numbers[1 : len(parts) : 2], strict=True)
    sizes = [size * part if 0 < size < math.inf else size for size, part in pairs]
    return sizes, numbers[len(parts) :]


class Problem(Protocol):
    """A function to be minimised, seen from its present point."""

    def model(self) -> QuadraticModel:
        """Value, gradient and curvature here."""

    def evaluate(self, step: Tensor) -> Trial:
        """The objective after a step, which is not taken."""

    def decrease(self, trial: Trial) -> float:
        """The actual decrease, as exactly as the problem knows it."""

    def noise(self, trial: Trial) -> float:
        """Usual rounding of ``decrease``: a smaller one means nothing."""

    def doubt(self) -> float:
        """What rounding of the value might be at most: below it a small decrease is checked by gradients."""

    def rounding(self) -> float:
        """Of the terms that a value sums, or is a small difference of; asked for where a trial is refused."""

    def gradient(self, trial: Trial) -> Tensor:
        """The gradient after the step, shape (n,); asked for where the decrease is noise."""

    def move(self, trial: Trial) -> None:
        """Take the step."""
