"""A function of a tensor as a ``Problem``: a trial keeps its graph, so that it is not evaluated again."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from optim.methods import control
from optim.methods.problem import QuadraticModel, Trial, norm
from secondorder import Hessian

# What is minimised: a tensor of the shape of the start -> a single element.
Function = Callable[[Tensor], Tensor]


class Point:
    """A point and the graph of the value there.

    Attributes:
        x: Of the shape of the start.
        value: There.
        has_graph: Whether the value has derivatives.
    """

    def __init__(self, fun: Function, x: Tensor) -> None:
        with torch.enable_grad():
            variable = x.detach().requires_grad_()
            loss = fun(variable)
        if not isinstance(loss, Tensor):
            raise TypeError(f"fun must return a tensor, got {type(loss).__name__}.")
        if loss.numel() != 1:
            raise ValueError(f"fun must return a single element, got shape {tuple(loss.shape)}.")
        self._variable, self._loss = variable, loss
        self.x, self.value, self.has_graph = variable.detach(), float(loss.detach()), loss.requires_grad

    @functools.cached_property
    def hessian(self) -> Hessian:
        """With the gradient, in the kept graph."""
        return Hessian(self._loss, [self._variable])


class FunctionProblem:
    """What ``minimize`` minimises.

    Args:
        fun: Of a tensor.
        x0: Where it begins.

    Attributes:
        point: The present one.
        nfev: Evaluations.
        njev: Gradients.
        nhev: Hessians or products, which are counted where they are made.

    Raises:
        TypeError: ``fun`` returns no tensor.
        ValueError: value or gradient at ``x0`` are not finite, or do not depend on it.
    """

    def __init__(self, fun: Function, x0: Tensor) -> None:
        self._fun, self._eps = fun, torch.finfo(x0.dtype).eps
        self.nfev = self.njev = self.nhev = 0
        self.point = start = self._at(x0)
        if not math.isfinite(start.value):
            raise ValueError(f"fun(x0) must be finite, got {start.value}; choose another x0.")
        if not start.has_graph:
            raise ValueError("fun(x0) must depend on x, got a value without a graph.")
        if not bool(self.model().gradient.isfinite().all()):
            raise ValueError(
                "the gradient of fun at x0 must be finite, got NaN or infinity; choose another x0."
            )

    def model(self) -> QuadraticModel:
        """From the graph of the present point."""
        hessian = self._hessian(self.point)
        return QuadraticModel(self.point.value, hessian.gradient, hessian, norm(hessian.gradient))

    def evaluate(self, step: Tensor) -> Trial:
        """After the step. No value where the function is constant: there is nothing to go on from."""
        point = self._at(self.point.x + step.view_as(self.point.x))
        is_usable = point.has_graph and math.isfinite(point.value)
        return Trial(step, point.value if is_usable else math.nan, point=point)

    def decrease(self, trial: Trial) -> float:
        """Of the values."""
        return self.point.value - trial.value

    def noise(self, trial: Trial) -> float:
        """Rounding of the value."""
        return control.noise_of(self.point.value, self._eps)

    def rounding(self) -> float:
        """Of what the function sums nothing is known."""
        return 0.0

    def gradient(self, trial: Trial) -> Tensor:
        """After the step; an accepted one does not take it again."""
        return self._hessian(trial.point).gradient

    def move(self, trial: Trial) -> None:
        """To the point of the trial."""
        self.point = trial.point

    def _at(self, x: Tensor) -> Point:
        self.nfev += 1
        return Point(self._fun, x)

    def _hessian(self, point: Point) -> Hessian:
        self.njev += "hessian" not in vars(point)
        return point.hessian
