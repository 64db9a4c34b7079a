"""Systems whose squares would underflow or overflow, solved at size one.

Sizes are powers of two: where nothing leaves the range the numbers are the same, bit for bit.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from secondorder.solvers._probes import gaussian
from secondorder.solvers._result import SolveResult
from secondorder.vectors.host import is_true, read

F = TypeVar("F", bound=Callable[..., Any])


class OutOfRangeError(ArithmeticError):
    """``A``, ``M`` or ``b`` is of a size whose squares leave the range of numbers.

    Attributes:
        products: Of ``A`` spent until that was seen.
        of_b: Whether it is ``b``.
    """

    def __init__(self, products: int, of_b: bool = False) -> None:
        super().__init__(products)
        self.products, self.of_b = products, of_b


class Scaled:
    """``A / 2^exponent``; else like ``A``."""

    def __init__(self, A: Any, exponent: int) -> None:
        self._A, self.exponent = A, exponent

    def __matmul__(self, v: Tensor) -> Tensor:
        # Half before the product: neither the argument nor the result leaves the range.
        half = self.exponent // 2
        product: Tensor = self._A @ shifted(v, -half)
        return shifted(product, half - self.exponent)

    @property
    def T(self) -> Scaled:  # noqa: N802 - as of a tensor
        """The transpose."""
        return Scaled(self._A.T, self.exponent)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_A"], name)


def shifted(x: Tensor, exponent: int) -> Tensor:
    """``2^exponent x``."""
    half = exponent // 2
    return x if exponent == 0 else x * 2.0**half * 2.0 ** (exponent - half)


def shifted_number(value: float, exponent: int) -> float:
    try:
        return math.ldexp(value, exponent)
    except OverflowError:
        return math.copysign(math.inf, value)


def in_range(size: float, dtype: torch.dtype) -> bool:
    """Whether numbers of this size, and those many digits below, have squares."""
    limit = torch.finfo(dtype).tiny ** 0.25
    return limit < size < 1 / limit


def check_range(A: Any, products: int, dtype: torch.dtype, *sizes: float) -> None:
    """Leave a solver for ``rescaled`` where one of the sizes is out of range, unless ``A`` is scaled."""
    if not isinstance(A, Scaled) and not all(in_range(size, dtype) for size in sizes):
        raise OutOfRangeError(products)


def exponent_of(largest: float, dtype: torch.dtype) -> int:
    """Of a power of two near ``largest``; 0 where that is in range, zero or not finite."""
    if largest == 0 or not math.isfinite(largest) or in_range(largest, dtype):
        return 0
    return math.frexp(largest)[1]


def check_size(largest: float, dtype: torch.dtype, products: int, x0: Tensor | None) -> None:
    """Leave a solver that is ``rescaled_late`` where ``b``, with this largest entry, needs another size."""
    if exponent_of(largest, dtype) or (largest == 0 and x0 is not None):
        raise OutOfRangeError(products, of_b=True)


def rescaled(solve: F) -> F:
    """Let a solver work on a system of size one where squares would leave the range; below ``by_columns``.

    ``b`` is looked at first, ``A`` and ``M`` where the solver finds their products out of range. Where ``b``
    is zero a start is dropped: the solution is zero. An ``A`` that is scaled already stays so.
    """

    @wraps(solve)
    def solve_any(A: Any, b: Tensor, *radius: float, **options: Any) -> SolveResult:
        if radius:
            options["radius"] = radius[0]
        return _divided(solve, A, b, options)

    return cast(F, solve_any)


def rescaled_late(solve: F) -> F:
    """The same, for a solver that looks at ``b`` itself, by ``check_size``: no read before its own."""

    @wraps(solve)
    def solve_any(A: Any, b: Tensor, **options: Any) -> SolveResult:
        if isinstance(A, Scaled):
            return _divided(solve, A, b, options)
        try:
            result: SolveResult = solve(A, b, **options)
        except OutOfRangeError as error:
            found = error
        else:
            return result
        if found.of_b:
            result = _divided(solve, A, b, options)
            return result._replace(products=result.products + found.products)
        return _divided_twice(solve, A, b, options, Sizes(0, 0, 0), found.products)

    return cast(F, solve_any)


def _divided(solve: Callable[..., Any], A: Any, b: Tensor, options: dict[str, Any]) -> SolveResult:
    """By the size of ``b``, and by that of ``A`` where the solver finds it out of range."""
    largest = read(b.abs().max())[0] if b.numel() else 0.0
    if largest == 0 and options.get("x0") is not None:
        options["x0"] = None
    sizes = Sizes(A.exponent if isinstance(A, Scaled) else 0, exponent_of(largest, b.dtype), 0)
    try:
        return sizes.solve(solve, A, b, options)
    except OutOfRangeError as error:
        spent = error.products
    return _divided_twice(solve, A, b, options, sizes, spent)


def _divided_twice(
    solve: Callable[..., Any], A: Any, b: Tensor, options: dict[str, Any], sizes: Sizes, spent: int
) -> SolveResult:
    sizes = sizes._replace(A=exponent_of_operator(A, b))
    if options.get("M") is not None:
        sizes = sizes._replace(M=exponent_of_operator(options["M"], b))
        options["M"] = Scaled(options["M"], sizes.M)
    result = sizes.solve(solve, Scaled(A, sizes.A), b, options)
    return result._replace(products=result.products + spent + 1)


def exponent_of_operator(A: Any, b: Tensor) -> int:
    """Of a power of two near the largest entry of a product with random numbers of size one."""
    n = b.shape[0] if getattr(A, "shape", None) is None else A.shape[1]
    product = A @ gaussian(b.new_empty(n), 1, torch.Generator("cpu").manual_seed(0))[:, 0]
    return exponent_of(read(product.abs().max())[0] if product.numel() else 0.0, b.dtype)


class Sizes(NamedTuple):
    """Exponents of what ``A``, ``b`` and ``M`` are divided by."""

    A: int
    b: int
    M: int

    def solve(self, solve: Callable[..., Any], A: Any, b: Tensor, options: dict[str, Any]) -> SolveResult:
        """Solve the system that was divided, ``A`` and ``M`` already."""
        result: SolveResult
        if not any(self):
            result = solve(A, b, **options)
            return result
        # Of x in the system that was divided to that of the given one.
        of_x = self.b - self.A
        exponents = {"atol": -self.b, "radius": self.M // 2 - of_x, "damping": -2 * self.A}
        options = {
            k: shifted_number(v, exponents[k]) if k in exponents and v is not None else v
            for k, v in options.items()
        }
        if options.get("radius") is not None:
            options["radius"] = max(options["radius"] * math.sqrt(1 + self.M % 2), sys.float_info.min)
        if options.get("x0") is not None:
            options["x0"] = shifted(options["x0"].to(b), -of_x)
        if options.get("callback") is not None:
            options["callback"] = self._callback(options["callback"])
        divided = shifted(b, -self.b)
        result = solve(A, divided, **options)
        return self.restored(result, A, divided, options.get("shift", result.shift))

    def _callback(self, callback: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Of ``cg``, given the state in the given units."""

        def call(state: Any) -> Any:
            x, model = shifted(state.x, self.b - self.A), shifted_number(state.model, 2 * self.b - self.A)
            return callback(state._replace(x=x, model=model))

        return call

    def restored(self, result: SolveResult, A: Any, b: Tensor, shift: float = 0.0) -> SolveResult:
        """In the given units, and true of the solution in those: it may leave the range there.

        Args:
            result: Of the system that was divided.
            A: The same.
            b: The same.
            shift: Multiple of the identity that was added to ``A``.
        """
        if not any(self):
            return result
        x = shifted(result.x, self.b - self.A)
        back = shifted(x, self.A - self.b)
        if not is_true(x.isfinite().all()):
            result = result._replace(status="non_finite", residual_norm=math.nan)
        elif not torch.equal(back, result.x):
            (residual_norm,) = read((b - A @ back - shift * back).norm())
            is_as_good = residual_norm <= 1.01 * result.residual_norm
            status = result.status if is_as_good else "stagnated"
            result = result._replace(status=status, residual_norm=residual_norm)
        return result._replace(
            x=x,
            residual_norm=shifted_number(result.residual_norm, self.b),
            quadratic=shifted_number(result.quadratic, 2 * self.b - self.A),
            shift=shifted_number(result.shift, self.A),
        )
