"""Residuals of a tensor as a ``Problem``: half their sum of squares, or of a robust loss of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from secondorder import FunctionOperator, Jacobian, LinearOperator, MatrixOperator

from ..methods import control
from ..methods.problem import QuadraticModel, Residuals, Trial, norm
from .bounds import Box
from .derivatives import jacobian
from .frame import Frame
from .problem import Counts, Evaluation
from .robust import Robust

# What a user gives for derivatives: x, further arguments -> a matrix (m, n).
UserJacobian = Callable[..., Any]


class ResidualPoint:
    """A point, its residuals and their graph.

    Attributes:
        x: Flat, shape (n,).
        raw: Residuals as the function gives them, flat, shape (m,), without a graph.
        residuals: The same with weights.
        value: Half the sum of their squares, or of their robust loss.
        aux: What came with them.
    """

    def __init__(self, problem: ResidualProblem, x: Tensor) -> None:
        self._problem = problem
        with torch.enable_grad():
            self.variable = x.detach().requires_grad_()
            outputs, self.aux = problem.fun(self.variable)
        self.outputs = _checked(outputs)
        self.x, raw = self.variable.detach(), self.outputs.detach().reshape(-1).to(x.dtype)
        self.raw = raw
        self.weigh()

    def weigh(self) -> None:
        """Take weights and loss of the problem."""
        weights = self._problem.root_weights
        self.residuals = self.raw if weights is None else weights * self.raw
        self.value = self._problem.robust.cost(self.residuals)

    @property
    def is_finite(self) -> bool:
        """Whether there is a value."""
        return math.isfinite(self.value)


class ResidualProblem:
    """What ``least_squares`` minimises.

    Args:
        fun: Evaluates the residuals.
        x0: Where it begins, flat.
        robust: The loss of the residuals.
        box: Bounds, of which ``x0`` keeps; None for none.
        root_weights: Multiply them, shape (m,); None for ones.
        jacobian: The user's own, of flat x; None for torch's.

    Attributes:
        point: The present one.
        frame: The variables of models and steps.
        njev: Jacobians.
        nhev: 0, or the products where the Jacobian is not formed.

    Raises:
        TypeError: ``fun`` returns no real tensor.
        ValueError: residuals at ``x0`` are not finite, or do not depend on it.
    """

    def __init__(
        self,
        fun: Evaluation,
        x0: Tensor,
        robust: Robust,
        box: Box | None = None,
        root_weights: Tensor | None = None,
        jacobian: UserJacobian | None = None,
    ) -> None:
        self.fun, self.robust, self.box, self._jacobian = fun, robust, box, jacobian
        self.root_weights: Tensor | None = None
        self._eps = torch.finfo(x0.dtype).eps
        self.njev = self.nhev = 0
        self.frame = Frame()
        self.rounding_of_residuals = 0.0
        start = ResidualPoint(self, x0)
        if root_weights is not None:
            self.root_weights = _fitting(root_weights, start.raw)
            start.weigh()
        self.point = start
        if not bool(start.residuals.isfinite().all()):
            raise ValueError("residual(x0) must be finite, got NaN or infinity; choose another x0.")
        if not start.outputs.requires_grad and jacobian is None:
            raise ValueError("residual(x0) must depend on x, got a value without a graph.")

    def counts(self) -> Counts:
        """So far."""
        return Counts(self.fun.count, self.njev, self.nhev)

    def jacobian(self, point: ResidualPoint) -> Tensor:
        """Of the weighted residuals in the user's variables, shape (m, n)."""
        self.njev += 1
        if self._jacobian is not None:
            J = torch.as_tensor(self._jacobian(point.x), device=point.x.device).to(point.x)
            if J.shape != (len(point.raw), len(point.x)):
                wanted = (len(point.raw), len(point.x))
                raise ValueError(f"jac must return a matrix of shape {wanted}, got {tuple(J.shape)}.")
        elif not point.outputs.requires_grad:
            J = point.x.new_zeros(len(point.raw), len(point.x))
        else:
            J = jacobian(point.outputs, point.variable).to(point.x)
        return J if self.root_weights is None else self.root_weights.unsqueeze(1) * J

    def evaluate(self, step: Tensor) -> Trial:
        """After the step. No value where residuals are not finite."""
        point = ResidualPoint(self, self._after(step))
        _check_count(self.point.raw, point.raw)
        return Trial(step, point.value if point.is_finite else math.nan, point=point)

    def change(self, step: Tensor) -> Tensor | None:
        """Of the residuals by a step, shape (m,); None where they are not finite after it. One evaluation."""
        with torch.no_grad():
            x = self._after(step)
            raw = _checked(self.fun(x)[0]).reshape(-1).to(x.dtype)
        _check_count(self.point.raw, raw)
        after = raw if self.root_weights is None else self.root_weights * raw
        change = after - self.point.residuals
        return change if math.isfinite(float(change.sum())) else None

    def decrease(self, trial: Trial) -> float:
        """``(r - r+) . (r + r+) / 2``, which sees far below the rounding of the sum."""
        if not math.isfinite(trial.value):
            return math.nan
        return self.robust.decrease(self.point.residuals, trial.point.residuals)

    def noise(self, trial: Trial) -> float:
        """What the rounding of x and of the residuals does to the cost."""
        return control.NOISE_FACTOR * self.rounding_of_residuals * math.sqrt(2 * self.point.value)

    def doubt(self) -> float:
        """Nothing: decreases are those of the residuals."""
        return 0.0

    def rounding(self) -> float:
        """Nothing beyond it."""
        return 0.0

    def gradient(self, trial: Trial) -> Tensor:
        """After the step: one backward pass."""
        point = trial.point
        r = self.robust.slopes(point.residuals) * point.residuals
        if self._jacobian is not None or not point.outputs.requires_grad:
            return self.frame.gradient(self.jacobian(point).T @ r)
        r = r if self.root_weights is None else self.root_weights * r
        pulled = r.view_as(point.outputs).to(point.outputs)
        (g,) = torch.autograd.grad(point.outputs, point.variable, pulled, retain_graph=True)
        return self.frame.gradient(g)

    def move(self, trial: Trial) -> None:
        """To the point of the trial."""
        self.point = trial.point

    def _after(self, step: Tensor) -> Tensor:
        x = self.point.x + self.frame.displacement(step)
        # Rounding may lead out of the bounds.
        return x if self.box is None else self.box.project(x)


def by_products(problem: ResidualProblem) -> tuple[Tensor, LinearOperator]:
    """Residuals as the loss corrects them, and their Jacobian by products, in the user's variables."""
    point = problem.point
    problem.njev += 1
    residuals, root = problem.robust.factors(point.residuals)
    rows = root if problem.root_weights is None else root * problem.root_weights
    J = Jacobian(point.outputs, [point.variable])
    by_rows = FunctionOperator(
        lambda v: rows * (J @ v).to(v),
        point.x,
        transpose=lambda u: (J.T @ (rows * u).to(J.dtype)).to(u),
        rows=len(rows),
    )
    return residuals, by_rows


class Formed:
    """A Jacobian that is there, as ``Rows``.

    Args:
        J: Shape (m, n).
    """

    fits = True

    def __init__(self, J: Tensor) -> None:
        self._J, self.passes = J, min(J.shape)
        self.shape = (J.shape[0], J.shape[1])

    def dense(self) -> Tensor:
        """The matrix."""
        return self._J

    def gram(self) -> Tensor:
        """``J J^T``."""
        return self._J @ self._J.T

    def __matmul__(self, v: Tensor) -> Tensor:
        return self._J @ v

    @property
    def T(self) -> Tensor:  # noqa: N802 - as a tensor's
        """The transpose."""
        return self._J.T


def model_of(J: Tensor, residuals: Tensor, value: float) -> tuple[QuadraticModel, Residuals]:
    """Of residuals and their Jacobian, in the variables of the model."""
    gradient = J.T @ residuals
    curvature: LinearOperator = MatrixOperator(J, is_symmetric=False)
    model = QuadraticModel(value, gradient, curvature.T @ curvature, norm(gradient))
    return model, Residuals(Formed(J), -residuals, None, 0.0)


def _check_count(first: Tensor, now: Tensor) -> None:
    if len(now) != len(first):
        text = f"as many numbers in every call, got {len(first)} at first and {len(now)} now"
        raise ValueError(f"residual must return {text}.")


def _fitting(root_weights: Tensor, residuals: Tensor) -> Tensor:
    if root_weights.numel() not in (1, len(residuals)):
        got = tuple(root_weights.shape)
        raise ValueError(f"weights must be one for each of {len(residuals)} residuals, got shape {got}.")
    return root_weights.reshape(-1).to(residuals).expand_as(residuals)


def _checked(outputs: Tensor) -> Tensor:
    if outputs.is_complex():
        raise TypeError(
            f"residual must return real numbers, got {outputs.dtype}; return torch.view_as_real of it."
        )
    if not outputs.is_floating_point():
        raise TypeError(f"residual must return floating-point numbers, got {outputs.dtype}.")
    return outputs
