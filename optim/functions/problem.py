"""A function of a tensor as a ``Problem``: a trial keeps its graph, so that it is not evaluated again."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secondorder import FunctionOperator, Hessian, LinearOperator, MatrixOperator
from secondorder.autodiff.decompose import Rung, eager
from secondorder.autodiff.graph import has_compiled

from ..methods import control
from ..methods.problem import QuadraticModel, Trial, norm
from .bounds import Box
from .derivatives import Slopes
from .frame import Frame
from .variables import Variables

# Of x as the user gave it, and further arguments.
Function = Callable[..., Any]


# A refused step may be rounding of the value, where decrease and prediction are below this part of it.
DOUBT = 1e-6


class Derivatives(NamedTuple):
    """Derivatives of the user's own, of flat vectors; None for torch's.

    Attributes:
        jac: x -> gradient, shape (n,); True where the function returns it beside its value.
        hess: x -> Hessian, shape (n, n).
        hessp: x, v -> its product with v.
    """

    jac: Any = None
    hess: Callable[[Tensor], Tensor] | None = None
    hessp: Callable[[Tensor, Tensor], Tensor] | None = None

    @property
    def is_complete(self) -> bool:
        """Whether torch is asked for none."""
        return self.jac is not None and (self.hess is not None or self.hessp is not None)


class Evaluation:
    """Calls a user's function at flat vectors, and counts the calls.

    Args:
        fun: Of x, as ``variables`` unpacks it, and ``args``.
        variables: Of ``x0``.
        args: Further arguments.
        has_aux: Whether ``fun`` returns a pair, of which the second part is kept.

    Attributes:
        args: As a tuple.
        variables: As given.
        derivatives: The user's own; none at first.
        count: Of the calls.
    """

    derivatives = Derivatives()
    # Around each call.
    _eager: Rung = contextlib.nullcontext

    def __init__(self, fun: Function, variables: Variables, args: Any = (), has_aux: bool = False) -> None:
        if not callable(fun):
            raise TypeError(f"fun must be a function of x, got {type(fun).__name__}.")
        self._fun, self.variables, self._has_aux = fun, variables, has_aux
        self.args = args if isinstance(args, tuple) else (args,)
        self.count = 0

    def __call__(self, x: Tensor) -> tuple[Tensor, Any]:
        """The value in the graph of ``x``, and what came with it."""
        self.count += 1
        value, aux = self.at(x, self.args)
        if self.count == 1 and has_compiled([value]):
            # It has no second derivative.
            self._eager = eager
            value, aux = self.at(x, self.args)
        return value, aux

    def at(self, x: Tensor, args: tuple[Any, ...]) -> tuple[Tensor, Any]:
        """The same with other arguments, not counted."""
        aux = None
        with self._eager():
            value = self._fun(self.variables.unpack(x), *args)
        if self._has_aux:
            if not (isinstance(value, tuple) and len(value) == 2):
                raise TypeError(f"fun must return (value, aux) with has_aux, got {type(value).__name__}.")
            value, aux = value
        if not isinstance(value, Tensor):
            raise TypeError(f"fun must return a tensor, got {type(value).__name__}.")
        return value, aux


class Point:
    """A point and the graph of the value there.

    Attributes:
        x: Flat, shape (n,).
        value: There.
        aux: What came with the value.
        has_graph: Whether the value has derivatives.
    """

    def __init__(self, fun: Evaluation, x: Tensor) -> None:
        with torch.enable_grad():
            variable = x.detach().requires_grad_()
            loss, self.aux = fun(variable)
        if loss.numel() != 1:
            raise ValueError(f"fun must return a single element, got shape {tuple(loss.shape)}.")
        if loss.is_complex():
            raise TypeError(f"fun must return a real number, got {loss.dtype}.")
        self._variable, self._loss, self._given = variable, loss, fun.derivatives
        self.x, self.value, self.has_graph = variable.detach(), float(loss.detach()), loss.requires_grad
        if fun.derivatives.jac is True:
            self.gradient = fun.variables.pack(self.aux, "the gradient that fun returns")

    @functools.cached_property
    def gradient(self) -> Tensor:
        """Of the value, flat, shape (n,)."""
        return self._given.jac(self.x) if callable(self._given.jac) else self._slopes.gradient

    def dense(self) -> Tensor:
        """The Hessian as a matrix, shape (n, n)."""
        if self._given.hess is not None or self._given.hessp is not None:
            return self.curvature.dense()
        return self._slopes.hessian()

    @functools.cached_property
    def _slopes(self) -> Slopes:
        return Slopes(self._loss, self._variable)

    @functools.cached_property
    def curvature(self) -> LinearOperator:
        """The Hessian: the user's own where there is one."""
        if self._given.hess is not None:
            return MatrixOperator(self._given.hess(self.x), is_symmetric=True)
        if self._given.hessp is not None:
            product = self._given.hessp
            return FunctionOperator(lambda v: product(self.x, v), self.x)
        return Hessian(self._loss, [self._variable])


class Counts(NamedTuple):
    """Evaluations, gradients or Jacobians, and Hessians or products."""

    nfev: int
    njev: int
    nhev: int


class FunctionProblem:
    """What ``minimize`` minimises.

    Args:
        fun: Evaluates.
        x0: Where it begins, flat.
        box: Bounds, of which ``x0`` keeps; None for none.

    Attributes:
        fun: As given.
        point: The present one.
        frame: The variables of models and steps.
        nhev: Hessians or products, which are counted where they are made.

    Raises:
        TypeError: ``fun`` returns no tensor.
        ValueError: value or gradient at ``x0`` are not finite, or do not depend on it.
    """

    def __init__(self, fun: Evaluation, x0: Tensor, box: Box | None = None) -> None:
        self.fun, self.box, self._eps = fun, box, torch.finfo(x0.dtype).eps
        self._njev = self.nhev = 0
        self.frame = Frame()
        self.point = start = Point(fun, x0)
        if not math.isfinite(start.value):
            raise ValueError(f"fun(x0) must be finite, got {start.value}; choose another x0.")
        if not start.has_graph and not fun.derivatives.is_complete:
            raise ValueError("fun(x0) must depend on x, got a value without a graph.")
        if not bool(self.gradient_at(start).isfinite().all()):
            raise ValueError(
                "the gradient of fun at x0 must be finite, got NaN or infinity; choose another x0."
            )

    def counts(self) -> Counts:
        """So far."""
        return Counts(self.fun.count, self._njev, self.nhev)

    def model(self) -> QuadraticModel:
        """From the graph of the present point."""
        point = self.point
        gradient = self.frame.gradient(self.gradient_at(point))
        return QuadraticModel(point.value, gradient, self.frame.curvature(point.curvature), norm(gradient))

    def evaluate(self, step: Tensor) -> Trial:
        """After the step. No value where the function is constant: there is nothing to go on from."""
        x = self.point.x + self.frame.displacement(step)
        # Rounding may lead out of the bounds.
        point = Point(self.fun, x if self.box is None else self.box.project(x))
        has_slope = point.has_graph or self.fun.derivatives.is_complete
        is_usable = has_slope and math.isfinite(point.value)
        return Trial(step, point.value if is_usable else math.nan, point=point)

    def decrease(self, trial: Trial) -> float:
        """Of the values."""
        return self.point.value - trial.value

    def noise(self, trial: Trial) -> float:
        """Rounding of the value."""
        return control.noise_of(self.point.value, self._eps)

    def doubt(self) -> float:
        """A function may sum terms that are larger than its value: nothing is known of them."""
        return DOUBT * abs(self.point.value)

    def rounding(self) -> float:
        """Of what the function sums nothing is known."""
        return 0.0

    def gradient(self, trial: Trial) -> Tensor:
        """After the step; an accepted one does not take it again."""
        return self.frame.gradient(self.gradient_at(trial.point))

    def move(self, trial: Trial) -> None:
        """To the point of the trial."""
        self.point = trial.point

    def gradient_at(self, point: Point) -> Tensor:
        """Of the function, in the user's variables, shape (n,)."""
        self._njev += "gradient" not in vars(point)
        return point.gradient

    def hessian_at(self, point: Point) -> Tensor:
        """The matrix, shape (n, n), symmetric to rounding."""
        self.nhev += 1
        return point.dense()
