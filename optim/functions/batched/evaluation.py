"""A user's function on a batch of problems: called, differentiated, and cut down to those that are left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Of a sample of problems that is evaluated alone, to see that problems do not depend on each other.
SAMPLE = 3


class Batch(NamedTuple):
    """A function of a batch, with its data.

    Attributes:
        fun: Called as ``fun(x, *args)`` with x of shape (B, *shape), or for one problem with ``in_dims``.
        args: Data.
        dims: For each of them the dimension of the batch; None for one that all problems share.
        shape: Of the x of one problem.
        is_mapped: Whether ``fun`` is that of one problem, to be mapped by ``torch.vmap``.
    """

    fun: Callable[..., Any]
    args: tuple[Any, ...]
    dims: tuple[int | None, ...]
    shape: tuple[int, ...]
    is_mapped: bool

    def __call__(self, x: Tensor) -> Tensor:
        """The values, shape (B,) or (B, m), at flat x of shape (B, n)."""
        at = x.view(len(x), *self.shape)
        if self.is_mapped:
            value = torch.vmap(self.fun, in_dims=(0, *self.dims))(at, *self.args)
        else:
            value = self.fun(at, *self.args)
        if not isinstance(value, Tensor):
            raise TypeError(f"fun must return a tensor, got {type(value).__name__}.")
        if not value.ndim or len(value) != len(x):
            wanted = f"{len(x)} rows, one for each problem"
            raise ValueError(f"fun must return {wanted}, got shape {tuple(value.shape)}.")
        return value

    def at(self, index: Tensor) -> Batch:
        """Of some of the problems."""
        args = tuple(
            arg if dim is None else arg.index_select(dim, index)
            for arg, dim in zip(self.args, self.dims, strict=True)
        )
        return self._replace(args=args)

    def numel(self, x: Tensor) -> int:
        """How many numbers it is called with."""
        return x.numel() + sum(arg.numel() for arg in self.args if isinstance(arg, Tensor))


def batch_of(fun: Callable[..., Any], x0: Tensor, args: tuple[Any, ...], in_dims: Any) -> Batch:
    """From what a user gives.

    Args:
        fun: Of the batch, or with ``in_dims`` of one problem.
        x0: Starts, shape (B, *shape).
        args: Data.
        in_dims: As of ``torch.vmap``, for ``args`` alone: a dimension for each, or one for all; None where
            ``fun`` takes the batch. Tensors with B rows belong to the problems then.

    Raises:
        ValueError: ``in_dims`` does not fit ``args``.
    """
    B = len(x0)
    is_mapped = in_dims is not None
    if is_mapped:
        dims = tuple(in_dims) if isinstance(in_dims, Sequence) else (in_dims,) * len(args)
        if len(dims) != len(args):
            raise ValueError(f"in_dims must have an entry for each of {len(args)} args, got {len(dims)}.")
    else:
        dims = tuple(0 if isinstance(a, Tensor) and a.ndim and len(a) == B else None for a in args)
    for position, (arg, dim) in enumerate(zip(args, dims, strict=True)):
        if dim is None:
            continue
        if not isinstance(arg, Tensor) or not -arg.ndim <= dim < arg.ndim or arg.shape[dim] != B:
            got = tuple(arg.shape) if isinstance(arg, Tensor) else type(arg).__name__
            raise ValueError(f"args[{position}] must have {B} problems in dimension {dim}, got {got}.")
    return Batch(fun, args, dims, tuple(x0.shape[1:]), is_mapped)


def graph_of(batch: Batch, x: Tensor) -> tuple[Tensor, Tensor]:
    """Values, one for each problem, with a graph to a copy of x.

    Raises:
        ValueError: ``fun`` returns another number of values.
    """
    with torch.enable_grad():
        y = x.detach().requires_grad_()
        value = batch(y)
    if value.ndim != 1:
        raise ValueError(f"fun must return one number for each problem, got shape {tuple(value.shape)}.")
    return value, y


def sample(x: Tensor) -> Tensor:
    """Places of a few problems, the first and the last among them."""
    return torch.linspace(0, len(x) - 1, min(SAMPLE, len(x)), device=x.device).round().long().unique()


def is_separable(batch: Batch, x: Tensor, values: Tensor) -> bool:
    """Whether some problems alone have the values that they have among all: others may be left out."""
    if batch.is_mapped:
        return True
    index = sample(x)
    try:
        alone = batch.at(index)(x[index])
    except (RuntimeError, ValueError, IndexError):
        # Data of all problems, that is held elsewhere than in args.
        return False
    among = values[index]
    return alone.shape == among.shape and torch.allclose(alone, among, rtol=1e-6, equal_nan=True)
