"""Fit a curve to data, with the arguments and the meanings of ``scipy.optimize.curve_fit``."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any, Literal, TypedDict, overload

import torch
from scipy.optimize import OptimizeWarning
from torch import Tensor
from typing_extensions import Never, Unpack

from secondorder.functional import jacobian

from ..methods.options import check_choice, refuse_arguments
from .bounds import Box
from .data import Data, as_tensor
from .least_squares import LeastSquaresResult, inverse_normal, least_squares
from .robust import Robust
from .run import Callback
from .variables import Variables

# Of (xdata, *parameters): what ydata is compared with.
Model = Callable[..., Tensor]

NAN_POLICIES = ("raise", "omit")
# Without success, but with nothing better to be had: parameters that the data do not determine.
UNDETERMINED = "singular"

# What torch says where a function of NumPy's is called with a parameter.
NUMPYS = "Can't call numpy() on Tensor that requires grad"

INSTEAD = {
    "maxfev": "Give max_nfev.",
    "diff_step": "Leave it out: derivatives are exact.",
    "epsfcn": "Leave it out: derivatives are exact.",
    "method": "Leave it out: bounds or not, there is one method.",
    "verbose": "Nothing is printed: look at full_output=True, or use a callback.",
}


class Options(TypedDict, total=False):
    """For type checkers, of both forms of ``curve_fit``."""

    jac: Model | None
    nan_policy: str | None
    loss: Any
    f_scale: float
    x_scale: Any
    ftol: float | None
    xtol: float | None
    gtol: float | None
    max_iter: int | None
    max_nfev: int | None
    callback: Callback | None


@overload
def curve_fit(
    f: Model,
    xdata: Any,
    ydata: Any,
    p0: Any = None,
    sigma: Any = None,
    absolute_sigma: bool = False,
    check_finite: bool | None = None,
    bounds: Any = None,
    *,
    full_output: Literal[False] = False,
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor]: ...


@overload
def curve_fit(
    f: Model,
    xdata: Any,
    ydata: Any,
    p0: Any = None,
    sigma: Any = None,
    absolute_sigma: bool = False,
    check_finite: bool | None = None,
    bounds: Any = None,
    *,
    full_output: Literal[True],
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor, LeastSquaresResult]: ...


def curve_fit(
    f: Model,
    xdata: Any,
    ydata: Any,
    p0: Any = None,
    sigma: Any = None,
    absolute_sigma: bool = False,
    check_finite: bool | None = None,
    bounds: Any = None,
    *,
    jac: Model | None = None,
    full_output: bool = False,
    nan_policy: str | None = None,
    loss: Any = "linear",
    f_scale: float = 1.0,
    x_scale: Any = "jac",
    ftol: float | None = None,
    xtol: float | None = None,
    gtol: float | None = None,
    max_iter: int | None = None,
    max_nfev: int | None = None,
    callback: Callback | None = None,
    **unsupported: Never,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, LeastSquaresResult]:
    """Fit ``ydata = f(xdata, *parameters) + noise`` by nonlinear least squares.

    The sum of squares of ``(f(xdata, *parameters) - ydata) / sigma`` is minimised by ``least_squares``.

    Args:
        f: Called as ``f(xdata, p1, p2, ...)`` with a tensor without dimensions for each parameter; made of
            torch's functions; returns a tensor of the shape of ``ydata``, or without dimensions.
        xdata: What ``f`` is called with. Numbers and arrays, and tuples or lists of them, become one tensor
            of the dtype of ``ydata``, of shape (m,), or (k, m) for k predictors; anything else is left as is.
        ydata: Measurements, m of them, usually of shape (m,). A tensor of float32 or float64 sets dtype and
            device of the fit; anything else becomes float64.
        p0: First guess, shape (n,). Where it is None, ones, or inside of bounds: the middle between two, one
            unit from a single one.
        sigma: Standard deviations of ``ydata``, m of them or one for all, or its covariance, shape (m, m).
        absolute_sigma: Whether ``sigma`` has the unit of ``ydata``, so that ``pcov`` is as it says. Otherwise
            only the ratios in it count, and ``pcov`` is scaled by the sum of squares over ``m - n``.
        check_finite: Raise where data are not finite; True where None, unless there is a ``nan_policy``.
        bounds: ``(lower, upper)`` with a number or n of them each, or ``scipy.optimize.Bounds``.
        jac: Called as ``f`` is; returns the derivatives of ``f``, shape (m, n). Taken by torch where None.
        full_output: Return the ``LeastSquaresResult`` too; then a fit that did not converge
            is no error.
        nan_policy: Of data: "raise" an error for NaN, or "omit" what has one; None for ``check_finite``.
        loss: As of ``least_squares``: a robust one for data with outliers.
        f_scale: Where outliers begin, in units of ``sigma``, or of ``ydata`` without one.
        x_scale: As of ``least_squares``.
        ftol: As of ``least_squares``.
        xtol: As of ``least_squares``.
        gtol: As of ``least_squares``.
        max_iter: Steps allowed, taken or rejected; None for the default of ``least_squares``.
        max_nfev: Evaluations of ``f`` allowed; None for any number.
        callback: Called with the present result after each accepted step.
        unsupported: Arguments of other functions; an error.

    Returns:
        ``popt`` of shape (n,) and ``pcov`` of shape (n, n), its covariance; with ``full_output`` also the
        result. The standard errors are ``pcov.diagonal().sqrt()``. Where data do not determine the parameters
        ``pcov`` is infinite, with an ``OptimizeWarning``.

    Raises:
        TypeError: ``f`` is no function or returns no tensor; data are complex; an argument is unknown.
        ValueError: data are empty or not finite; shapes differ; ``sigma`` is not positive (definite); the
            number of parameters cannot be told; bounds exclude each other.
        RuntimeError: the fit did not converge, without ``full_output``; the message says what to try.

    Cost: that of ``least_squares``; a covariance ``sigma`` a triangular solve an evaluation.

    Example:
        >>> x = torch.linspace(0, 4, 50, dtype=torch.float64)
        >>> decay = lambda x, a, b: a * torch.exp(-b * x)
        >>> popt, pcov = curve_fit(decay, x, decay(x, 2.5, 1.3))
        >>> popt.round(decimals=6)
        tensor([2.5000, 1.3000], dtype=torch.float64)
    """
    refuse_arguments(curve_fit, unsupported, INSTEAD)
    if not callable(f):
        raise TypeError(f"f must be a function of xdata and parameters, got {type(f).__name__}.")
    if nan_policy is not None:
        check_choice({"nan_policy": nan_policy}, "nan_policy", NAN_POLICIES)
    data = Data.of(xdata, ydata, sigma)
    if nan_policy == "omit":
        data = data.without_nan()
    elif nan_policy == "raise" or check_finite is not False:
        data.check_finite(or_infinite=check_finite is not False and nan_policy is None)
    start, sides = _start(f, p0, bounds, data.y)
    fit = _Fit(f, jac, data.whitening())
    result = least_squares(
        fit.residual,
        start,
        (data.x, data.y),
        loss=loss,
        f_scale=f_scale,
        bounds=sides,
        x_scale=x_scale,
        ftol=ftol,
        xtol=xtol,
        gtol=gtol,
        jac=None if jac is None else fit.jacobian,
        max_iter=max_iter,
        max_nfev=max_nfev,
        callback=callback,
    )
    if not (result.success or full_output or result.status == UNDETERMINED):
        raise RuntimeError(
            f"the fit did not converge ({result.status}): {result.message}. With full_output=True the point"
            " where it stopped is returned."
        )
    J = result.jac
    if loss != "linear":
        # The Hessian that SciPy takes, in which an outlier of negative curvature has no part.
        curvatures = Robust.of(loss, f_scale).curvatures(result.fun).clamp(min=torch.finfo(J.dtype).eps)
        J = curvatures.sqrt()[:, None] * fit.jacobian(result.x, data.x, data.y)
    pcov = _covariance(J, result.cost, absolute_sigma)
    return (result.x, pcov, result) if full_output else (result.x, pcov)


class _Fit:
    """Residuals, and their derivatives where a user has them."""

    def __init__(self, f: Model, jac: Model | None, whiten: Callable[[Tensor], Tensor]) -> None:
        self._f, self._jac, self._whiten = f, jac, whiten

    def residual(self, p: Tensor, x: Any, y: Tensor) -> Tensor:
        """Model minus data in units of sigma, shape (m,)."""
        try:
            values = self._f(x, *p.unbind())
        except RuntimeError as error:
            if NUMPYS not in str(error):
                raise
            raise TypeError("f must be made of torch's functions: torch.exp for numpy.exp, etc.") from error
        if not isinstance(values, Tensor):
            raise TypeError(
                f"f must return a tensor, got {type(values).__name__}; write it with torch's functions."
            )
        # (m, 1) and (m,) would broadcast to (m, m).
        if values.dim() and values.shape != y.shape:
            raise ValueError(
                f"f must return the shape of ydata, {tuple(y.shape)}, got {tuple(values.shape)}."
            )
        return self._whiten((values - y).flatten())

    def jacobian(self, p: Tensor, x: Any, y: Tensor) -> Tensor:
        """Of the residuals, shape (m, n)."""
        if self._jac is None:
            J: Tensor = jacobian(lambda q: self.residual(q, x, y), p)
            return J
        J = torch.as_tensor(self._jac(x, *p.unbind()), device=p.device).to(p)
        if J.shape != (y.numel(), p.numel()):
            raise ValueError(
                f"jac must return shape ({y.numel()}, {p.numel()}), a row a measurement, got"
                f" {tuple(J.shape)}."
            )
        return self._whiten(J)


def _start(f: Model, p0: Any, bounds: Any, y: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """The first guess, shape (n,), and both sides of its bounds; None where nothing is bounded."""
    guess = None if p0 is None else as_tensor(p0, "p0").to(y).reshape(-1).detach()
    ones = y.new_ones(_parameters(f)) if guess is None else torch.ones_like(guess)
    box = Box.of(bounds, Variables(ones, "p0"), two_by_two="sides")
    if box is None:
        return ones if guess is None else guess, None
    return _inside(box) if guess is None else guess, (box.lower, box.upper)


def _inside(box: Box) -> Tensor:
    """One where there is no bound, the middle of two, a unit inside of a single one: as SciPy starts."""
    lower, upper = box.lower, box.upper
    below, above = lower.isfinite(), upper.isfinite()
    p = torch.where(below, lower + 1, torch.where(above, upper - 1, torch.ones_like(lower)))
    return torch.where(below & above, 0.5 * lower + 0.5 * upper, p)


def _parameters(f: Model) -> int:
    """How many ``f`` takes beside xdata."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = list(inspect.signature(f).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    n = sum(parameter.kind in kinds for parameter in parameters) - 1
    if n < 1:
        raise ValueError(
            "the number of fit parameters must be known, and the signature of f does not tell it; give p0."
        )
    return n


def _covariance(J: Tensor, cost: float, absolute_sigma: bool) -> Tensor:
    """As SciPy's, of all parameters, those at a bound too; infinite where the data leave some open."""
    m, n = J.shape
    rank = _rank(J)
    if rank < n or not (absolute_sigma or m > n):
        warnings.warn(
            "the covariance of the parameters could not be estimated: the data do not determine all of them"
            f" (rank {rank} of {n}, {m} measurements).",
            OptimizeWarning,
            stacklevel=3,
        )
        return J.new_full((n, n), math.inf)
    pcov = inverse_normal(J)
    return pcov if absolute_sigma else pcov * (2 * cost / (m - n))


def _rank(J: Tensor) -> int:
    """In units in which the columns have length one."""
    lengths = J.norm(dim=0)
    scaled = torch.where(lengths > 0, J / lengths, 0.0)
    values = torch.linalg.svdvals(scaled)  # waits: once a fit
    return int((values > torch.finfo(J.dtype).eps * max(J.shape) * values[0]).sum())
