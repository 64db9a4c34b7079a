"""Known losses: which calls of ``torch.nn.functional`` are convex functions of a network's outputs.

While a closure runs in record mode every call passes here. A known loss is kept with its outputs, and
``log_softmax`` followed by ``nll_loss``, or ``sigmoid`` followed by ``binary_cross_entropy``, is seen as
one loss of the logits: as a loss of the log-probabilities it would be linear, and the Gauss-Newton matrix
silently zero. Squares, ``log_softmax`` and ``logsigmoid`` of which a loss is written by hand are losses
too, where the objective is linear in them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Convex in their first argument, for constant targets and weights that are not negative.
_CONVEX: dict[Callable[..., Any], str] = {
    F.cross_entropy: "cross_entropy",
    F.mse_loss: "mse_loss",
    F.binary_cross_entropy_with_logits: "binary_cross_entropy_with_logits",
    F.huber_loss: "huber_loss",
    F.smooth_l1_loss: "smooth_l1_loss",
    F.soft_margin_loss: "soft_margin_loss",
    F.poisson_nll_loss: "poisson_nll_loss",
}
# Those that are convex for targets that are not negative, where the arguments say so.
_NEEDS_SIGN: dict[Callable[..., Any], Callable[[dict[str, Any]], bool]] = {
    F.cross_entropy: lambda arguments: arguments["target"].is_floating_point(),
    F.poisson_nll_loss: lambda arguments: not arguments.get("log_input", True),
    F.kl_div: lambda arguments: not arguments.get("log_target", False),
    F.binary_cross_entropy_with_logits: lambda arguments: arguments.get("pos_weight") is not None,
}
# Convex in what the named function was given, when their first argument comes out of it.
_FUSED: dict[Callable[..., Any], tuple[str, str]] = {
    F.nll_loss: ("log_softmax", "nll_loss"),
    F.kl_div: ("log_softmax", "kl_div"),
    F.binary_cross_entropy: ("sigmoid", "binary_cross_entropy"),
}
_SQUASHING: dict[Callable[..., Any], str] = {
    F.log_softmax: "log_softmax",
    torch.log_softmax: "log_softmax",
    Tensor.log_softmax: "log_softmax",
    F.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
    Tensor.sigmoid: "sigmoid",
}

# Tensors among their arguments that must be constants, and the weights that must not be negative.
_CONSTANTS = ("target", "weight", "pos_weight")
_WEIGHTS = ("weight", "pos_weight")
_NAMES = {func: tuple(inspect.signature(func).parameters) for func in (*_CONVEX, *_FUSED)}

# Elementary functions of which hand-written losses are made, and the sign with which they are convex.
_ELEMENTARY: dict[Callable[..., Any], tuple[str, int]] = {
    torch.square: ("squares", 1),
    Tensor.square: ("squares", 1),
    F.logsigmoid: ("logsigmoid", -1),
    F.log_softmax: ("log_softmax", -1),
    torch.log_softmax: ("log_softmax", -1),
    Tensor.log_softmax: ("log_softmax", -1),
}
# Their squares are sums of squares.
_NORMS = {torch.norm, Tensor.norm, torch.linalg.norm, torch.linalg.vector_norm}
_EUCLIDEAN = (None, 2, "fro")
# Squares where both operands are one tensor, or the second is 2.
_PRODUCTS = {torch.mul, Tensor.mul, Tensor.__mul__, torch.dot, Tensor.dot, torch.inner, Tensor.inner}
_VECTOR_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__}
_POWERS = {torch.pow, Tensor.pow, Tensor.__pow__}

# Sums of squares of what they are of, shifted by a constant.
SQUARES = {"mse_loss", "squares"}

# Each subtracts a logit from what is near the largest: also where the difference is 1e-15, it rounds at their
# size. With each, whether a dimension of its outputs holds classes.
CROSS_ENTROPIES = {
    "cross_entropy": True,
    "log_softmax": True,
    "log_softmax + kl_div": True,
    "log_softmax + nll_loss": True,
    "binary_cross_entropy_with_logits": False,
    "sigmoid + binary_cross_entropy": False,
}

# All that matters here; what else a closure calls costs one look.
_NOTED = {
    *(*_CONVEX, *_FUSED, *_SQUASHING, *_ELEMENTARY),
    *(*_NORMS, *_PRODUCTS, *_VECTOR_PRODUCTS, *_POWERS, torch.einsum),
}


class RecordedLoss(NamedTuple):
    """A call of a known loss: its name, its value, and the outputs it is convex in with their version.

    Attributes:
        sign: -1 for a function that is concave.
        is_elementary: A part of a hand-written loss. It may also be a part of the network, and counts as a
            loss only where the objective is linear in it, with weights of its sign.
        is_sum: Of what the mean is taken otherwise, where it is a number.
        factors: Weights of classes or samples.
        call: Which of the calls that a log looks at it was.
    """

    name: str
    loss: Tensor
    outputs: Tensor
    version: int
    sign: int = 1
    is_elementary: bool = False
    is_sum: bool = False
    factors: tuple[Tensor, ...] = ()
    call: int = 0


class LossLog:
    """Collects the known losses of one run of a closure.

    Args:
        in_graph: Only those that have one.
    """

    def __init__(self, in_graph: bool = True) -> None:
        self.losses: list[RecordedLoss] = []
        self._in_graph, self._calls = in_graph, 0
        # Functions that make one loss with what follows: their names, results and arguments. Keyed by id; the
        # value keeps the result alive, so that its id stays its own.
        self._inner: dict[int, tuple[str, Tensor, Tensor]] = {}

    def see(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> Any:
        """Note a call if it is one that matters; returns what the closure should see as its result."""
        if func not in _NOTED:
            return result
        self._calls += 1
        tensors = args[1:] if func is torch.einsum else args
        argument = tensors[0] if tensors else kwargs.get("input")
        if not (isinstance(result, Tensor) and isinstance(argument, Tensor)):
            return result
        if self._in_graph and not result.requires_grad:
            return result
        inner = "norm" if func in _NORMS and _is_euclidean(args, kwargs) else _SQUASHING.get(func)
        if inner:
            self._inner[id(result)] = (inner, result, argument)
        if elementary := _elementary(func, args, kwargs):
            return self._see_elementary(*elementary, argument, result)
        if func in _NAMES:
            arguments = {**dict(zip(_NAMES[func], args, strict=False)), **kwargs}
            return self._see_loss(func, arguments, argument, result)
        return result

    def outputs(self, calls: Sequence[int]) -> list[Tensor] | None:
        """What the losses that certain calls made are of; None where these made none."""
        found = {recorded.call: recorded.outputs.detach() for recorded in self.losses}
        return [found[call] for call in calls] if found.keys() >= set(calls) else None

    def cross_entropies(self) -> list[RecordedLoss]:
        """Those among them, which round at the size of their logits."""
        return [recorded for recorded in self.losses if recorded.name in CROSS_ENTROPIES]

    def _see_elementary(self, name: str, sign: int, argument: Tensor, result: Tensor) -> Tensor:
        if name == "squares":
            argument = self._argument_of("norm", argument, argument)
        version = argument._version
        self.losses.append(RecordedLoss(name, result, argument, version, sign, True, call=self._calls))
        # A number may be added to in place, which must not change what was noted.
        return result if result.ndim else result.clone()

    def _see_loss(self, func: Any, arguments: dict[str, Any], argument: Tensor, result: Tensor) -> Tensor:
        name, outputs = _CONVEX.get(func, ""), argument
        if not name:
            needed, name = _FUSED[func]
            outputs = self._argument_of(needed, argument, None)
            name = f"{needed} + {name}"
        if outputs is None or not _is_convex(func, arguments):
            return result
        if func is F.poisson_nll_loss and not arguments.get("log_input", True):
            name = "poisson_nll_loss of rates"
        self.losses.append(
            RecordedLoss(
                *(name, result, outputs, outputs._version),
                is_sum=arguments.get("reduction") == "sum",
                factors=tuple(arguments[key] for key in _WEIGHTS if isinstance(arguments.get(key), Tensor)),
                call=self._calls,
            )
        )
        # A copy, so that `loss += penalty` in the closure does not change what was noted.
        return result.clone()

    def _argument_of(self, name: str, result: Tensor, default: Any) -> Any:
        """What the named function was given, if it is that which made a tensor."""
        inner, _, argument = self._inner.get(id(result), ("", None, default))
        return argument if inner == name else default


def _is_euclidean(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    exponent = args[1] if len(args) > 1 else kwargs.get("p", kwargs.get("ord"))
    return exponent in _EUCLIDEAN


def _elementary(
    func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[str, int] | None:
    """Name and sign of an elementary convex or concave function, or None for another call."""
    if func in _ELEMENTARY:
        return _ELEMENTARY[func]
    is_square = func in _PRODUCTS and len(args) == 2 and args[0] is args[1]
    if func in _VECTOR_PRODUCTS:
        is_square = len(args) == 2 and args[0] is args[1] and args[0].ndim == 1
    if func is torch.einsum and len(args) == 3 and args[1] is args[2]:
        first, _, second = args[0].partition("->")[0].replace(" ", "").partition(",")
        is_square = first == second
    exponent = args[1] if len(args) == 2 else kwargs.get("exponent")
    is_power = func in _POWERS and isinstance(exponent, int | float) and exponent == 2
    return ("squares", 1) if is_square or is_power else None


def _is_convex(func: Callable[..., Any], arguments: dict[str, Any]) -> bool:
    """Whether targets and weights are constants, and where it matters not negative."""
    tensors = {name: arguments[name] for name in _CONSTANTS if isinstance(arguments.get(name), Tensor)}
    if any(tensor.requires_grad for tensor in tensors.values()):
        return False
    signed = [tensors[name] for name in _WEIGHTS if name in tensors]
    if func in _NEEDS_SIGN and _NEEDS_SIGN[func](arguments):
        signed.append(arguments["target"])
    return all(bool((tensor >= 0).all()) for tensor in signed)
