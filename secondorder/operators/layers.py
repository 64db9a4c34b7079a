"""The Jacobian of one use of a parameter as factors: what a layer took, and the gradients that come to it.

A layer that multiplies ``x_p W`` at positions ``p`` adds ``sum_p x_p b_p^T`` to the gradient of ``W``, where
``b_p`` is the gradient with respect to its result there. For many gradients ``b`` at once the ``x_p`` are
the same, so that inner products of rows of the Jacobian need no row of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import Node

from secondorder.operators.uses import Use, signed


class Factors(NamedTuple):
    """Rows of a Jacobian: ``sum_p left[c, p, g, :, None] * right[c, p, g, None, :]`` for gradient ``c``.

    Attributes:
        left: Shape (C, *positions, G, o), or (1, ...) where it is one for all gradients. As integers, with
            ``o`` left out, which of the entries is 1. None stands for ones, with ``G = o = 1``.
        right: Shape (C, *positions, G, i) or (1, ...).
        spot: What entries of the parameter these are: shape (G, o, i), or any with ``i`` entries where
            ``left`` is None.
        is_by_sample: Whether the first dimension of positions is known to be that of samples.
    """

    left: Tensor | None
    right: Tensor
    spot: Tensor
    is_by_sample: bool = False

    @property
    def positions(self) -> int:
        """How many there are."""
        return math.prod(self.right.shape[1:-2])


def is_known(node: Node) -> bool:
    """Whether ``factors`` reads nodes of this kind."""
    return node.name() in _READERS


def factors(use: Use, gradients: Tensor) -> Factors | None:
    """The Jacobian of one use.

    Args:
        use: Of a parameter.
        gradients: With respect to the first result of the node, shape (C, *result).

    Returns:
        None where it is no product of such factors.
    """
    return _READERS[use.node.name()](use.node, use.position, gradients, use.spot)


def _direct(gradients: Tensor, spot: Tensor) -> Factors:
    """The gradients themselves, of an operand that was broadcast to the shape of the result."""
    spot = spot.expand(gradients.shape[1:])
    # Along the others it was broadcast: they are positions.
    own = [dim for dim in range(spot.ndim) if spot.stride(dim) or spot.shape[dim] == 1]
    rest = [dim for dim in range(spot.ndim) if dim not in own]
    entries = math.prod(spot.shape[dim] for dim in own)
    right = gradients.permute(0, *[1 + dim for dim in (*rest, *own)])
    for dim in reversed(rest):
        spot = spot.select(dim, 0)
    return Factors(None, right.reshape(len(gradients), -1, 1, entries), spot)


def _product(node: Any, position: int, gradients: Tensor, spot: Tensor) -> Factors | None:
    """Of two matrices, or of batches of them, one of which is the parameter; or what is added to it."""
    name = node.name()
    names, added = _PRODUCTS[name]
    if position < added:
        return _direct(_scaled(gradients, node._saved_beta), spot)
    if added:
        gradients = _scaled(gradients, node._saved_alpha)
    is_second = position - added
    other = getattr(node, f"_saved_{names[1 - is_second]}")
    if other is None:
        return None
    if name == "MvBackward0":
        gradients = gradients[..., None]
        spot, other = (spot[:, None], other) if is_second else (spot, other[:, None])
    if spot.ndim == 2:
        spot, other, gradients = spot[None], other[None], gradients[:, None]
    if is_second:
        return Factors(other.transpose(0, 1)[None], gradients.transpose(1, 2), spot)
    return Factors(gradients.permute(0, 3, 1, 2), other.permute(2, 0, 1)[None], spot)


# The names of the two factors, and how many inputs come before them.
_PRODUCTS = {
    "MmBackward0": (("self", "mat2"), 0),
    "MvBackward0": (("self", "vec"), 0),
    "BmmBackward0": (("self", "mat2"), 0),
    "AddmmBackward0": (("mat1", "mat2"), 1),
    "BaddbmmBackward0": (("batch1", "batch2"), 1),
}


def _scaled(gradients: Tensor, factor: Any) -> Tensor:
    return gradients if factor == 1 else gradients * factor


def _convolution(node: Any, position: int, gradients: Tensor, spot: Tensor) -> Factors | None:
    """A product with windows of the input; the transposed one exchanges input and gradient."""
    if position == 2:
        return _direct(gradients, spot.view(-1, *[1] * (gradients.ndim - 3)))
    x, groups = node._saved_input, node._saved_groups
    if x is None:
        return None
    flat, count = gradients.flatten(0, 1), len(gradients)
    whole, cut = (x, flat) if node._saved_transposed else (flat, x)
    windows = _windows(cut, spot.shape[2:], node)
    # What output_padding adds makes windows where no input is.
    for dim, size in enumerate(whole.shape[2:], 1):
        windows = windows.narrow(dim, 0, size)
    spot = spot.view(groups, -1, windows.shape[-1])
    whole = whole.movedim(1, -1).unflatten(-1, (groups, -1))
    if node._saved_transposed:
        return Factors(whole[None], windows.unflatten(0, (count, -1)), spot, True)
    return Factors(whole.unflatten(0, (count, -1)), windows[None], spot, True)


def _windows(x: Tensor, kernel: Sequence[int], node: Any) -> Tensor:
    """What each entry of a kernel meets, shape (batch, *positions, groups, channels of one * kernel)."""
    dims = len(kernel)
    x = F.pad(x, [side for padding in reversed(node._saved_padding) for side in (padding, padding)])
    for dim, size in enumerate(kernel):
        stride, dilation = node._saved_stride[dim], node._saved_dilation[dim]
        x = x.unfold(2 + dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
    x = x.movedim(1, 1 + dims)
    return x.reshape(*x.shape[: 1 + dims], node._saved_groups, -1)


def _embedding(node: Any, _position: int, gradients: Tensor, spot: Tensor) -> Factors:
    """A product with rows of the identity matrix."""
    indices = node._saved_indices
    right = gradients.reshape(len(gradients), -1, 1, gradients.shape[-1])
    padding = signed(node._saved_padding_idx)
    if padding >= 0:
        right = right * (indices != padding).reshape(1, -1, 1, 1)
    return Factors(indices.reshape(1, -1, 1, 1), right, spot[None])


def _norm(node: Any, position: int, gradients: Tensor, spot: Tensor) -> Factors:
    """What is normalised, times a weight of each channel, plus a bias."""
    name = node.name()
    if position == 1:
        gradients = gradients * _normalised(node, name)
    if "LayerNorm" not in name:
        spot = spot.view(-1, *[1] * (gradients.ndim - 3))
    return _direct(gradients, spot)


def _normalised(node: Any, name: str) -> Tensor:
    """The input in units of its deviation, from what the node has saved of it."""
    x, mean, scale = node._saved_input, node._saved_result1, node._saved_result2
    if "GroupNorm" in name:
        groups = x.reshape(len(x), node._saved_group, -1)
        return ((groups - mean[..., None]) * scale[..., None]).view(x.shape)
    if "BatchNorm" in name:
        if not getattr(node, "_saved_training", True):
            mean, scale = node._saved_running_mean, (node._saved_running_var + node._saved_eps).rsqrt()
        channels = (-1, *[1] * (x.ndim - 2))
        mean, scale = mean.view(channels), scale.view(channels)
    return (x - mean) * scale


def _elementwise(node: Any, position: int, gradients: Tensor, spot: Tensor) -> Factors:
    """A sum or a product of tensors that are broadcast to one shape."""
    return _direct(_SLOPES[node.name()](node, position, gradients), spot)


def _times_alpha(node: Any, position: int, gradients: Tensor, sign: int = 1) -> Tensor:
    return _scaled(gradients, sign * node._saved_alpha) if position else gradients


def _times_other(node: Any, position: int, gradients: Tensor) -> Tensor:
    return gradients * (node._saved_self if position else node._saved_other)


def _over_other(node: Any, position: int, gradients: Tensor) -> Tensor:
    quotient = gradients / node._saved_other
    return -quotient * node._saved_self / node._saved_other if position else quotient


# The gradient with respect to an operand, before it is summed where that was broadcast.
_SLOPES: dict[str, Callable[[Any, int, Tensor], Tensor]] = {
    "AddBackward0": _times_alpha,
    "SubBackward0": lambda node, position, gradients: _times_alpha(node, position, gradients, -1),
    "MulBackward0": _times_other,
    "DivBackward0": _over_other,
    "ExpandBackward0": lambda _node, _position, gradients: gradients,
    "PreluKernelBackward0": lambda node, _position, gradients: gradients * node._saved_self.clamp(max=0),
}


def _repeated(node: Any, _position: int, gradients: Tensor, spot: Tensor) -> Factors | None:
    """Copies of a vector one after another, as instance normalisation makes them of its weight."""
    repeats = node._saved_repeats
    if spot.ndim > 1 or len(repeats) > 1:
        return None
    return _direct(gradients.unflatten(1, (*repeats, -1)), spot)


_READERS: dict[str, Callable[[Any, int, Tensor, Tensor], Factors | None]] = {
    **dict.fromkeys(_PRODUCTS, _product),
    **dict.fromkeys(_SLOPES, _elementwise),
    **{f"Native{name}NormBackward0": _norm for name in ("Layer", "Group", "Batch")},
    **{f"{library}BatchNormBackward0": _norm for library in ("Cudnn", "Miopen")},
    "ConvolutionBackward0": _convolution,
    "EmbeddingBackward0": _embedding,
    "RepeatBackward0": _repeated,
}


def extent(use: Use, gradients: int) -> int:
    """How many numbers its factors hold, for so many gradients."""
    node: Any = use.node
    result = math.prod(node._input_metadata[0].shape)
    if use.spot.ndim < 3 or node.name() != "ConvolutionBackward0":
        return gradients * result
    # Windows repeat each entry of what they are cut from.
    kernel = use.spot.shape[2:].numel()
    if node._saved_transposed:
        return gradients * result * (1 + kernel)
    channels = node._saved_groups * use.spot.shape[1]
    return result * gradients + result // use.spot.shape[0] * channels * kernel
