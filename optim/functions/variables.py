"""What a user calls x: a tensor, numbers, an array, or any nesting of tensors, and its one flat vector."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from secondorder.vectors.flat import Layout, flatten

DTYPES = (torch.float64, torch.float32)


class Variables:
    """The structure of ``x0``, and its flat vector.

    Numbers and arrays become float64; a function sees them as a tensor of their shape.

    Args:
        x0: A tensor, a number, a list of numbers, an array, or a tuple, list or dict of tensors.
        name: Of the argument, for errors.

    Attributes:
        start: Flat, shape (n,), a copy without a graph.

    Raises:
        TypeError: a tensor is not of float32 or float64; tensors differ in dtype or device.
    """

    def __init__(self, x0: Any, name: str = "x0") -> None:
        self._name = name
        self._is_array = not _has_tensor(x0)
        if self._is_array:
            x0 = _as_tensor(x0, name)
        leaves, self._spec = pytree.tree_flatten(x0)
        for leaf in leaves:
            _check(leaf, leaves[0], name)
        self._layout = Layout(leaves)
        self._is_tensor = isinstance(x0, Tensor)
        self._shape = leaves[0].shape if self._is_tensor else torch.Size()
        self.start = flatten([leaf.detach() for leaf in leaves])

    def unpack(self, flat: Tensor) -> Any:
        """The structure of ``x0`` with the entries of a flat vector, in its graph."""
        if self._is_tensor:
            return flat.view(self._shape)
        return pytree.tree_unflatten(list(self._layout.unflatten(flat)), self._spec)

    def restore(self, flat: Tensor) -> Any:
        """The same as the user gave it: an array for numbers."""
        x = self.unpack(flat)
        return x.detach().cpu().numpy() if self._is_array else x

    def pack(self, value: Any, name: str) -> Tensor:
        """The flat vector of something with the structure of ``x0``, or of one number for all.

        Raises:
            ValueError: it has another structure or shape.
        """
        start = self.start
        if isinstance(value, int | float) and not isinstance(value, bool):
            return torch.full_like(start, value)
        if not _has_tensor(value) and self._is_tensor:
            value = torch.as_tensor(np.asarray(value, dtype=np.float64), device=start.device)
        leaves, spec = pytree.tree_flatten(value)
        if spec != self._spec:
            raise ValueError(f"{name} must have the structure of {self._name}, {self._spec}, got {spec}.")
        wanted = self._layout.unflatten(start)
        for leaf, like in zip(leaves, wanted, strict=True):
            got = tuple(torch.as_tensor(leaf, device=like.device).shape)
            if got not in (tuple(like.shape), ()):
                raise ValueError(
                    f"{name} must have the shape of {self._name}, {tuple(like.shape)}, got {got}."
                )
        return flatten(
            [
                torch.as_tensor(a, device=b.device).detach().to(b).expand_as(b)
                for a, b in zip(leaves, wanted, strict=True)
            ]
        )


def _has_tensor(x0: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(x0))


def _as_tensor(x0: Any, name: str) -> Tensor:
    try:
        array = np.asarray(x0)
    except ValueError:
        array = np.asarray(None)
    if array.dtype.kind not in "fiu" or (isinstance(x0, np.ndarray) and array.dtype.kind != "f"):
        raise TypeError(
            f"{name} must hold real floating-point numbers, or tensors of float32 or float64, got"
            f" {array.dtype if isinstance(x0, np.ndarray) else type(x0).__name__}."
        )
    return torch.as_tensor(array.astype(np.float64), device="cpu")


def _check(leaf: Any, first: Tensor, name: str) -> None:
    if not isinstance(leaf, Tensor):
        raise TypeError(
            f"{name} must hold tensors alone or numbers alone, got {type(leaf).__name__} among tensors."
        )
    if leaf.dtype not in DTYPES:
        raise TypeError(f"{name} must be of float64 or float32, got {leaf.dtype}; use {name}.float().")
    if leaf.dtype != first.dtype or leaf.device != first.device:
        raise TypeError(
            f"{name} must hold tensors of one dtype and device, got {first.dtype} on {first.device} and"
            f" {leaf.dtype} on {leaf.device}."
        )
