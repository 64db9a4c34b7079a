"""Inputs of the functions beyond torch's six: a tensor, a tuple of arguments, or any pytree of tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from secondorder.vectors.arguments import Tensors


class Tree(NamedTuple):
    """A point of differentiation: its tensors, new objects that require gradients, and its structure.

    A tuple is unpacked into the arguments of the function; everything else (a tensor, a dict of
    parameters, a list) is its only argument.
    """

    leaves: Tensors
    spec: pytree.TreeSpec
    is_tuple: bool

    @classmethod
    def of(cls, inputs: Any, function: str, connected: bool = False) -> Tree:
        """Check and copy ``inputs``; ``connected`` keeps them in the graph that the user gave them.

        Raises:
            TypeError: a leaf is not a floating-point or complex tensor.
        """
        leaves, spec = pytree.tree_flatten(inputs)
        for leaf in leaves:
            is_tensor = isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())
            if not is_tensor:
                kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
                raise TypeError(f"inputs of {function} must be floating-point tensors, got {kind}.")
        if not leaves:
            raise TypeError(f"inputs of {function} must hold at least one tensor, got none.")
        fresh = tuple(
            leaf.view_as(leaf) if connected and leaf.requires_grad else leaf.detach().requires_grad_()
            for leaf in leaves
        )
        return cls(fresh, spec, isinstance(inputs, tuple))

    def call(self, func: Callable[..., Any]) -> Any:
        """``func`` at this point, with gradients on."""
        point = self.rebuild(self.leaves)
        with torch.enable_grad():
            return func(*point) if self.is_tuple else func(point)

    def rebuild(self, leaves: Any) -> Any:
        """Other leaves in the structure of the inputs."""
        return pytree.tree_unflatten(list(leaves), self.spec)

    def vector(self, v: Any, batched: bool = False) -> Tensors:
        """The leaves of a vector with the structure of the inputs, checked.

        Raises:
            ValueError: ``v`` has another structure, shape or dtype.
        """
        parts, spec = pytree.tree_flatten(v)
        if spec != self.spec:
            raise ValueError(f"v must have the structure of the inputs, {self.spec}, got {spec}.")
        for part, leaf in zip(parts, self.leaves, strict=True):
            if not isinstance(part, Tensor):
                raise ValueError(f"v must hold tensors as the inputs do, got {type(part).__name__}.")
            shape = part.shape[1:] if batched else part.shape
            if shape != leaf.shape or part.dtype != leaf.dtype or (batched and part.ndim == 0):
                wanted = ("k", *leaf.shape) if batched else tuple(leaf.shape)
                raise ValueError(
                    f"v must have shape {wanted} and dtype {leaf.dtype},"
                    f" got {tuple(part.shape)} and {part.dtype}."
                )
        if batched and len({part.shape[0] for part in parts}) > 1:
            sizes = [part.shape[0] for part in parts]
            raise ValueError(f"v must hold batches of one size, got leading dimensions {sizes}.")
        return tuple(parts)


def scalar(value: Any, function: str) -> Tensor:
    """``value``, which must be one real element.

    Raises:
        TypeError: it is not a tensor.
        ValueError: it has another number of elements, or is complex.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"func of {function} must return a tensor, got {type(value).__name__}.")
    if value.numel() != 1 or value.is_complex():
        raise ValueError(
            f"func of {function} must return one real element, got shape {tuple(value.shape)}, {value.dtype}."
        )
    return value
