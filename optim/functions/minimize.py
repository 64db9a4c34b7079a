"""Minimise a function of a tensor by Newton's method in a trust region."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optim.methods import control
from optim.methods.options import check_choice, check_count, check_positive, refuse_arguments
from secondorder import Hessian, LinearOperator, MatrixOperator, steihaug, trust_region
from secondorder.solvers import eigsh

# A value below this, relative to the start, has no minimum near it.
UNBOUNDED = -1e30

METHODS = ("auto", "newton", "newton-cg")

# What to do in place of arguments that scipy.optimize.minimize takes.
_DERIVATIVE = "Derivatives of fun come from torch."
INSTEAD = {
    "args": "Let fun be a function of x alone, lambda x: fun(x, ...).",
    "jac": _DERIVATIVE,
    "hess": _DERIVATIVE,
    "hessp": _DERIVATIVE,
    "bounds": "Write x as a function of free variables: softplus(z), or a + (b - a) * sigmoid(z).",
    "constraints": "Write x as a function of free variables, or add a penalty to fun.",
    "tol": "Give gtol, a bound on the entries of the gradient.",
    "options": "Give gtol, max_iter or radius themselves.",
    "maxiter": "Give max_iter.",
    "disp": "Nothing is printed: print the result, or use a callback.",
}

# Up to here an eigendecomposition (about 9 n^3 operations a step) is cheaper than Steihaug's products.
DIRECT_LIMIT = 500

# Lanczos steps that look for negative curvature where "newton-cg" could stop. Beside 1000 eigenvalues down to
# zero they find one that is negative by a hundredth of the largest, or more.
LANCZOS_STEPS = 60

MESSAGES = {
    "converged": "the gradient is within gtol, and no negative curvature was found: 'newton' looks at all"
    f" eigenvalues of the Hessian, 'newton-cg' at what {LANCZOS_STEPS} Lanczos steps show",
    "noise_floor": "no decrease is left that rounding would not hide; the gradient is above gtol",
    "radius": "the trust radius fell below the spacing of numbers at x; is fun smooth there?",
    "max_iter": "the iteration limit came first; raise max_iter",
    "non_finite": "gradient or Hessian at x are not finite, or span more than the range of numbers",
    "unbounded": "fun fell by 1e30 times max(1, abs(fun(x0))): it seems to have no minimum",
    "running": "an intermediate point, as a callback sees it",
    "stopped": "the callback asked to stop",
}


class MinimizeResult(NamedTuple):
    """Where ``minimize`` stopped, and why.

    Attributes:
        x: Best point found, of the shape of ``x0``.
        fun: Value there.
        grad: Gradient there, of the shape of ``x0``.
        status: "converged", "noise_floor", "radius", "max_iter", "non_finite", "unbounded" or "stopped";
            "running" in what a callback sees.
        nit: Steps taken or rejected.
        nfev: Evaluations of ``fun``.
        njev: Gradients.
        nhev: Dense Hessians ("newton") or products with the Hessian ("newton-cg").
    """

    x: Tensor
    fun: float
    grad: Tensor
    status: str
    nit: int
    nfev: int
    njev: int
    nhev: int

    @property
    def success(self) -> bool:
        """Whether the gradient met the tolerance."""
        return self.status == "converged"

    @property
    def message(self) -> str:
        """One sentence on ``status``."""
        return MESSAGES[self.status]

    def __repr__(self) -> str:
        return (
            f"MinimizeResult(status={self.status!r}, fun={self.fun:.10g}, "
            f"grad_norm={float(self.grad.abs().max()) if self.grad.numel() else 0.0:.3g}, "
            f"nit={self.nit}, nfev={self.nfev}, njev={self.njev}, nhev={self.nhev})\nx = {self.x}"
        )


def minimize(
    fun: Callable[[Tensor], Tensor],
    x0: Tensor,
    *,
    method: str = "auto",
    gtol: float | None = None,
    max_iter: int = 500,
    radius: float | None = None,
    callback: Callable[[MinimizeResult], bool | None] | None = None,
    **unsupported: Any,
) -> MinimizeResult:
    """Find a local minimiser of ``fun`` near ``x0``.

    "newton" solves the trust-region subproblem exactly from the eigenvalues of the Hessian: it leaves
    saddle points, and does not call a point with a negative eigenvalue converged. "newton-cg" needs only
    products: where the gradient is within ``gtol`` it looks for negative curvature by a few Lanczos steps,
    and goes on along it. Where decreases fall below rounding of ``fun``, steps are judged by the gradient.

    Args:
        fun: Takes a tensor of the shape of ``x0``, returns one with a single element; twice differentiable.
        x0: Start, any shape, floating point. Not changed.
        method: "newton", "newton-cg", or "auto": "newton" up to 500 unknowns.
        gtol: Stop when no entry of the gradient exceeds this; the square root of the precision of
            ``x0`` when None (1.5e-8 in float64, 3.5e-4 in float32).
        max_iter: Steps allowed.
        radius: First trust radius; ``max(1, norm(x0))`` when None.
        callback: Called with the present ``MinimizeResult`` after each accepted step; stops by
            returning True or raising StopIteration.
        unsupported: Arguments of other minimisers; an error.

    Returns:
        A ``MinimizeResult``; ``success`` says whether the gradient met ``gtol``.

    Raises:
        TypeError: ``x0`` is not a floating-point tensor; ``fun`` returns no tensor; an argument is unknown.
        ValueError: an option is out of range; ``fun(x0)`` is not one finite number or does not depend on x.

    Cost: a step takes one evaluation and, when accepted, one gradient and one Hessian (``n`` products and
    about ``9 n^3`` operations) or, for "newton-cg", up to ``n`` products; at its end about 60 more.

    Reference: Conn, Gould and Toint (2000), Trust-region methods; Steihaug (1983).

    Example:
        >>> rosenbrock = lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
        >>> result = minimize(rosenbrock, torch.tensor([-1.2, 1.0], dtype=torch.float64))
        >>> result.status, result.x.round(decimals=8)
        ('converged', tensor([1., 1.], dtype=torch.float64))
    """
    refuse_arguments(minimize, unsupported, INSTEAD)
    if not isinstance(x0, Tensor) or x0.dtype not in (torch.float64, torch.float32):
        kind = x0.dtype if isinstance(x0, Tensor) else type(x0).__name__
        raise TypeError(f"x0 must be a tensor of float64 or float32, got {kind}; use torch.tensor(...).")
    options = {"method": method, "max_iter": max_iter, "gtol": gtol, "radius": radius}
    check_choice(options, "method", METHODS)
    check_count(options, "max_iter")
    check_positive(options, *(name for name in ("gtol", "radius") if options[name] is not None))
    direct = method == "newton" or (method == "auto" and x0.numel() <= DIRECT_LIMIT)
    run = _Run(fun, x0.detach().clone(), direct)
    tolerance = math.sqrt(torch.finfo(x0.dtype).eps) if gtol is None else gtol
    first_radius = max(1.0, float(x0.detach().norm())) if radius is None else radius
    status = run.iterate(tolerance, first_radius, max_iter, callback)
    return run.result(status)


class _Point(NamedTuple):
    """A point with its value in the graph."""

    x: Tensor
    loss: Tensor
    value: float


class _Run:
    """The state of one minimisation: the present point, its model, and what was spent."""

    def __init__(self, fun: Callable[[Tensor], Tensor], x0: Tensor, direct: bool) -> None:
        self._fun, self._direct = fun, direct
        self._eps = torch.finfo(x0.dtype).eps
        self._nit = self._nfev = self._njev = self._nhev = 0
        point = self._evaluate(x0)
        if not math.isfinite(point.value):
            raise ValueError(f"fun(x0) must be finite, got {point.value}; choose another x0.")
        if not point.loss.requires_grad:
            raise ValueError("fun(x0) must depend on x, got a value without a graph.")
        self._unbounded = UNBOUNDED * max(1.0, abs(point.value))
        self._move_to(point)
        if not bool(self._gradient.isfinite().all()):
            raise ValueError(
                "the gradient of fun at x0 must be finite, got NaN or infinity; choose another x0."
            )

    def _evaluate(self, x: Tensor) -> _Point:
        self._nfev += 1
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            loss = self._fun(x)
        if not isinstance(loss, Tensor):
            raise TypeError(f"fun must return a tensor, got {type(loss).__name__}.")
        if loss.numel() != 1:
            raise ValueError(f"fun must return a single element, got shape {tuple(loss.shape)}.")
        return _Point(x, loss, float(loss.detach()))

    def _move_to(self, point: _Point) -> None:
        """Take the point and build its quadratic model."""
        self._point = point
        # A direction of negative curvature of length one, and its curvature, where one was looked for.
        self._downward: tuple[Tensor, float] | None = None
        hessian = Hessian(point.loss, [point.x])
        self._gradient, self._curvature = hessian.gradient, self._form(hessian)
        self._njev += 1
        matrix = self._curvature.dense() if self._direct else self._gradient
        self._is_finite = bool(self._gradient.isfinite().all()) and bool(matrix.isfinite().all())

    def _form(self, hessian: Hessian) -> LinearOperator:
        if not self._direct:
            return hessian
        self._nhev += 1
        return MatrixOperator(hessian.dense())

    def _solve(self, radius: float) -> tuple[Tensor, float]:
        """The step, and its product with the curvature."""
        if isinstance(self._curvature, MatrixOperator):
            result = trust_region(self._curvature.spectrum, -self._gradient, radius)
        elif self._downward is not None:
            direction, curvature = self._downward
            sign = -1.0 if float(self._gradient.dot(direction)) > 0 else 1.0
            return sign * radius * direction, radius**2 * curvature
        else:
            # Superlinear convergence (Nocedal and Wright, section 7.1).
            rtol = min(0.5, math.sqrt(float(self._gradient.norm())))
            result = steihaug(self._curvature, -self._gradient, radius, rtol=rtol)
            self._nhev += result.products
        return result.x, result.quadratic

    def iterate(
        self,
        gtol: float,
        radius: float,
        max_iter: int,
        callback: Callable[[MinimizeResult], bool | None] | None,
    ) -> str:
        """Step until something stops it; the status says what."""
        while True:
            if self._is_minimum(gtol):
                return "converged"
            if self._nit >= max_iter:
                return "max_iter"
            if not self._is_finite:
                return "non_finite"
            self._nit += 1
            step, quadratic = self._solve(radius)
            step_norm = float(step.norm())
            predicted = -float(self._gradient.dot(step)) - 0.5 * quadratic
            if not predicted > 0:
                return "noise_floor" if math.isfinite(predicted) else "non_finite"
            trial = self._evaluate(self._point.x.detach() + step.view_as(self._point.x))
            rho, in_noise = self._ratio(trial, step, predicted)
            radius = control.trust_radius(radius, rho, step_norm)
            if rho > control.ACCEPTANCE:
                self._move_to(trial)
                if callback is not None and self._is_asked_to_stop(callback):
                    return "stopped"
                if trial.value < self._unbounded:
                    return "unbounded"
            elif in_noise:
                return "noise_floor"
            elif radius <= self._eps * max(1.0, float(self._point.x.detach().norm())):
                return "radius"

    def _is_asked_to_stop(self, callback: Callable[[MinimizeResult], bool | None]) -> bool:
        try:
            return bool(callback(self.result("running")))
        except StopIteration:
            return True

    def _is_minimum(self, gtol: float) -> bool:
        """Gradient within tolerance, and no negative eigenvalue of the Hessian that is known or found."""
        if not float(self._gradient.abs().max() if self._gradient.numel() else 0.0) <= gtol:
            return False
        if not self._gradient.numel():
            return True
        if self._downward is not None or not self._is_finite:
            return False
        if isinstance(self._curvature, MatrixOperator):
            values = self._curvature.spectrum.values
        else:
            values = self._look_around()
        return float(values[0]) >= -math.sqrt(self._eps) * float(values.abs().max())

    def _look_around(self) -> Tensor:
        """The lowest and the highest eigenvalue, roughly; keeps the direction of the lowest."""
        like = self._gradient
        generator = torch.Generator(like.device).manual_seed(0)
        start = torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
        self._nhev += 1
        self._is_finite = bool((self._curvature @ start).isfinite().all())
        if not self._is_finite:
            return torch.full_like(like, math.nan)
        k = min(2, len(like))
        found = eigsh(self._curvature, k, which="BE", v0=start, max_iter=LANCZOS_STEPS, generator=generator)
        self._nhev += found.products
        values = found.values
        if float(values[0]) < -math.sqrt(self._eps) * float(values.abs().max()):
            self._downward = found.vectors[:, 0], float(values[0])
        return values

    def _ratio(self, trial: _Point, step: Tensor, predicted: float) -> tuple[float, bool]:
        """The reduction ratio, and whether it had to be taken from the gradients."""
        actual = self._point.value - trial.value
        if not trial.loss.requires_grad:
            # A branch on which fun is constant: nothing to go on from.
            return -math.inf, False
        noise = control.noise_of(self._point.value, self._eps)
        in_noise = control.is_noise(actual, predicted, noise)
        if in_noise:
            self._njev += 1
            gradient = torch.autograd.grad(trial.loss, trial.x, retain_graph=True)[0].reshape(-1)
            actual = -0.5 * float((self._gradient + gradient).dot(step))
        return control.reduction_ratio(actual, predicted), in_noise

    def result(self, status: str) -> MinimizeResult:
        """The present point as a result."""
        return MinimizeResult(
            x=self._point.x.detach(),
            fun=self._point.value,
            grad=self._gradient.view(self._point.x.shape),
            status=status,
            nit=self._nit,
            nfev=self._nfev,
            njev=self._njev,
            nhev=self._nhev,
        )
