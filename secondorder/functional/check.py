"""Check derivatives against finite differences, and name the operation that is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils import _pytree as pytree

from secondorder.autodiff.guard import undo_writes
from secondorder.vectors.tree import Tree

Function = Callable[..., Any]

# Step of the fourth-order central difference: its error is of order step^4, rounding's eps / step.
STEP = 1e-3
TOLERANCE = 1e-6
# Derivatives below this are compared with it: differences carry an absolute error too.
SMALL = 1e-3
# Outputs below this may be rounding of zero, which has no derivative.
ROUNDING = 1e-13


def check_derivatives(func: Function, inputs: Any, *, order: int = 2, tolerance: float = TOLERANCE) -> None:
    """Raise unless the derivatives of ``func`` agree with finite differences.

    Along random directions the gradient is compared with differences of the function and, for order 2,
    the Hessian product with differences of the gradient. Where they disagree, every operation that
    ``func`` called is checked alone, and the first that fails is named.

    Args:
        func: Takes the inputs (a tuple is unpacked into arguments), returns a tensor or a tuple of tensors;
            deterministic, smooth near ``inputs``.
        inputs: Point of differentiation in float64: a tensor, a tuple, or any pytree.
        order: 1 or 2.
        tolerance: Relative error allowed.

    Returns:
        None: it is an assertion.

    Raises:
        TypeError: ``inputs`` hold something else than floating-point tensors.
        ValueError: ``inputs`` are not in float64; ``order`` is neither 1 nor 2.
        RuntimeError: a derivative is wrong or missing; names order, error and operation.

    Cost: four evaluations (order 1) and four gradients (order 2), and as much for every operation when
    there is something to name.

    Example:
        >>> check_derivatives(lambda x: x.sin().prod(), torch.rand(3, dtype=torch.float64))
    """
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order!r}.")
    tree = Tree.of(inputs, "check_derivatives")
    for leaf in tree.leaves:
        if leaf.dtype != torch.float64:
            raise ValueError(f"inputs must be float64 for finite differences, got {leaf.dtype}.")
    log = _Calls()
    # Buffers of the function, such as running statistics, do not move.
    with undo_writes():
        failure = _first_failure(
            lambda *leaves: tree._replace(leaves=leaves).call(func), tree.leaves, order, tolerance
        )
        if failure is None:
            return
        with log:
            tree.call(func)
    culprit = next((c for c in log.calls if _first_failure(c.function, c.tensors, order, tolerance)), None)
    where = "in the composition of its operations" if culprit is None else f"in {culprit.name}"
    raise RuntimeError(f"the derivative of order {failure.order} is {failure.what} {where}.")


class _Failure(NamedTuple):
    order: int
    what: str


def _first_failure(
    function: Function, point: tuple[Tensor, ...], order: int, tolerance: float
) -> _Failure | None:
    """The lowest order at which the derivative of ``function`` is wrong, or None."""
    generator = torch.Generator().manual_seed(0)
    u, v = (tuple(_draw(x, generator) for x in point) for _ in range(2))
    scalar = _scalar(function, generator)
    functions: dict[int, tuple[Function, Function]] = {
        1: (scalar, scalar),
        2: (lambda *x: _slope(scalar, x, v, True), lambda *x: _slope(scalar, x, v, False)),
    }
    for current in range(1, order + 1):
        differentiable, plain = functions[current]
        try:
            got = float(_slope(differentiable, point, u, False))
        except RuntimeError as error:
            return _Failure(current, f"missing ({str(error).splitlines()[0]})")
        expected = _difference(plain, point, u)
        if not abs(got - expected) <= tolerance * max(abs(got), abs(expected), SMALL):
            return _Failure(current, f"wrong ({got:.6g}, by finite differences {expected:.6g})")
    return None


def _scalar(function: Function, generator: torch.Generator) -> Function:
    """A smooth scalar of the outputs of ``function``, with weights that the first call draws."""
    weights: list[Tensor] = []

    def scalar(*leaves: Tensor) -> Tensor:
        outputs = [t for t in pytree.tree_leaves(function(*leaves)) if isinstance(t, Tensor)]
        outputs = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in outputs]
        outputs = [t for t in outputs if t.is_floating_point()]
        if not weights:
            # Scaled to size one: so that the sine below varies as slowly as the outputs, and small ones show.
            weights.extend(_draw(t, generator) / _scale(t) for t in outputs)
        # Nonlinear, so that the second derivative of a linear operation shows too.
        terms = [(t * w).sin().sum() for t, w in zip(outputs, weights, strict=True)]
        return torch.stack(terms).sum() if terms else torch.zeros((), dtype=torch.float64, device="cpu")

    return scalar


def _slope(scalar: Function, point: tuple[Tensor, ...], u: tuple[Tensor, ...], create_graph: bool) -> Tensor:
    """The directional derivative of a scalar function, by reverse mode."""
    with torch.enable_grad():
        leaves = point if create_graph else tuple(x.detach().requires_grad_() for x in point)
        value = scalar(*leaves)
        if not value.requires_grad:
            return torch.zeros_like(value)
        grads = torch.autograd.grad(value, leaves, create_graph=create_graph, allow_unused=True)
        terms = [(g * d).sum() for g, d in zip(grads, u, strict=True) if g is not None]
    return torch.stack(terms).sum()


def _difference(scalar: Function, point: tuple[Tensor, ...], u: tuple[Tensor, ...]) -> float:
    """The directional derivative by fourth-order central differences."""

    def at(t: float) -> float:
        return float(scalar(*(x.detach() + t * d for x, d in zip(point, u, strict=True))).detach())

    return (8 * (at(STEP) - at(-STEP)) - (at(2 * STEP) - at(-2 * STEP))) / (12 * STEP)


def _scale(t: Tensor) -> float:
    """The largest entry; one for what may be rounding."""
    largest = float(t.detach().abs().max()) if t.numel() else 0.0
    return largest if largest > ROUNDING else 1.0


def _draw(like: Tensor, generator: torch.Generator) -> Tensor:
    numbers = torch.randn(like.shape, generator=generator, dtype=like.dtype, device=generator.device)
    return numbers.to(like.device)


class _Call(NamedTuple):
    """One call of torch: its name, its float64 tensors, and the call as a function of them."""

    name: str
    tensors: tuple[Tensor, ...]
    function: Function


class _Calls(TorchFunctionMode):
    """Notes every call that maps float64 tensors to tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves, spec = pytree.tree_flatten((args, kwargs))
        places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.dtype == torch.float64]
        tensors = tuple(leaves[i].detach().clone() for i in places)

        def again(*values: Tensor) -> Any:
            filled = list(leaves)
            for place, value in zip(places, values, strict=True):
                # In-place calls must not write to a leaf.
                filled[place] = value.clone()
            again_args, again_kwargs = pytree.tree_unflatten(filled, spec)
            return func(*again_args, **again_kwargs)

        result = func(*args, **kwargs)
        if tensors and any(isinstance(t, Tensor) for t in pytree.tree_leaves(result)):
            self.calls.append(_Call(resolve_name(func) or str(func), tensors, again))
        return result
