"""Second derivatives of losses in the space of outputs: closed forms, and Fisher matrices of likelihoods.

A product function takes and returns tensors shaped like the outputs, or with a leading dimension more
for a batch of vectors. Closed forms: Martens (2020), New insights and perspectives on the natural gradient
method, section 5.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

Product = Callable[[Tensor], Tensor]

LIKELIHOODS = ("categorical", "bernoulli", "normal")


def evaluate(loss: Callable[..., Any], outputs: tuple[Tensor, ...]) -> tuple[Tensor, Product | None]:
    """``loss(*outputs)``, and the closed form of its Hessian where it is a known call on a single output.

    Known are ``mse_loss``, ``cross_entropy`` and ``binary_cross_entropy_with_logits`` without weights, when
    what ``loss`` returns is what the call returned.
    """
    log = _Calls()
    with log:
        value = loss(*outputs)
    # In place, a loss may have become another one since.
    is_known = log.result is value and value._version == log.version
    if len(outputs) == 1 and is_known and log.argument is outputs[0]:
        return value, _closed_form(log.func, log.arguments, outputs[0].detach())
    return value, None


class _Calls(TorchFunctionMode):
    """Notes the last call of a known loss."""

    def __init__(self) -> None:
        super().__init__()
        self.func: Any = None
        self.arguments: dict[str, Any] = {}
        self.argument: Any = None
        self.result: Any = None
        self.version = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _SIGNATURES:
            bound = _SIGNATURES[func].bind(*args, **(kwargs or {}))
            bound.apply_defaults()
            self.func, self.arguments, self.result = func, bound.arguments, result
            self.argument = bound.arguments["input"]
            self.version = result._version if isinstance(result, Tensor) else 0
        return result


def _closed_form(func: Any, arguments: dict[str, Any], outputs: Tensor) -> Product | None:
    target = arguments["target"]
    weights = (arguments.get(name) for name in ("weight", "pos_weight", "size_average", "reduce"))
    is_plain = all(weight is None for weight in weights) and arguments["reduction"] in ("mean", "sum")
    if not is_plain or target.requires_grad:
        return None
    is_mean = arguments["reduction"] == "mean"
    if func is not F.cross_entropy:
        if target.shape != outputs.shape:
            return None
        scale = 1 / outputs.numel() if is_mean else 1.0
        if func is F.mse_loss:
            return of_likelihood("normal", outputs, 2 * scale)
        return of_likelihood("bernoulli", outputs, scale)
    return _cross_entropy(arguments, target, outputs, is_mean)


def _cross_entropy(
    arguments: dict[str, Any], target: Tensor, outputs: Tensor, is_mean: bool
) -> Product | None:
    dim = class_dim(outputs)
    if target.is_floating_point():
        # Probabilities, which need not sum to one; smoothing keeps their sum.
        count: Tensor | float = outputs.numel() / outputs.shape[dim]
        mass = target.sum(dim)
        if arguments["label_smoothing"]:
            return None
    else:
        mass = (target != arguments["ignore_index"]).to(outputs.dtype)
        count = mass.sum()
    mass = mass / count if is_mean else mass
    return of_likelihood("categorical", outputs, mass.unsqueeze(dim))


def of_likelihood(likelihood: str, outputs: Tensor, scale: Tensor | float) -> Product:
    """Fisher matrix of a likelihood with respect to its natural parameters, which is a loss Hessian too.

    "categorical": ``diag(p) - p p^T`` with ``p = softmax(outputs)`` over the class dimension; "bernoulli":
    ``p (1 - p)`` with ``p = sigmoid(outputs)``; "normal" with unit variance: the identity.
    """
    if likelihood == "normal":
        return lambda u: scale * u
    if likelihood == "bernoulli":
        p = outputs.sigmoid()
        variance = scale * p * (1 - p)
        return lambda u: variance * u
    dim = class_dim(outputs) - outputs.ndim
    p = outputs.softmax(dim)
    scaled = scale * p
    return lambda u: scaled * (u - (p * u).sum(dim, keepdim=True))


def of_targets(likelihood: str, outputs: Tensor, targets: Tensor, scale: Tensor | float) -> Product:
    """Outer products of the scores at given targets, one for each sample that the mean is taken over."""
    scores = _score_at(likelihood, outputs, targets)
    dims = (class_dim(outputs),) if likelihood == "categorical" else tuple(range(1, outputs.ndim))

    def product(u: Tensor) -> Tensor:
        dots = (scores * u).sum(dims, keepdim=True) if dims else scores * u
        return scale * scores * dots

    return product


def of_samples(
    likelihood: str, outputs: Tensor, scale: Tensor | float, num_samples: int, seed: int
) -> Product:
    """Unbiased estimate of ``of_likelihood``: mean outer product of scores at sampled targets.

    Targets are drawn for each random variable, so products of different variables, whose mean is zero, are
    left out.
    """
    generator = torch.Generator(outputs.device).manual_seed(seed)
    drawn = torch.stack([_score(likelihood, outputs, generator) for _ in range(num_samples)])
    scale = scale / num_samples
    if likelihood != "categorical":
        variance = scale * drawn.square().sum(0)
        return lambda u: variance * u
    dim = class_dim(outputs) - outputs.ndim

    def product(u: Tensor) -> Tensor:
        # One term after another, for u may have a leading dimension of its own.
        return sum((s * (s * u).sum(dim, keepdim=True) for s in drawn), torch.zeros_like(u)) * scale

    return product


def _score(likelihood: str, outputs: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient of the negative log-likelihood at targets that are drawn from the model."""
    if likelihood == "normal":
        return torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype, device=outputs.device)
    if likelihood == "bernoulli":
        p = outputs.sigmoid()
        return p - torch.bernoulli(p, generator=generator)
    dim = class_dim(outputs)
    p = outputs.softmax(dim).movedim(dim, -1)
    drawn = torch.multinomial(p.reshape(-1, p.shape[-1]), 1, generator=generator).view(p.shape[:-1])
    one_hot = F.one_hot(drawn, p.shape[-1]).to(p.dtype)
    return (p - one_hot).movedim(-1, dim)


def _score_at(likelihood: str, outputs: Tensor, targets: Tensor) -> Tensor:
    """The gradient of the negative log-likelihood of ``targets`` with respect to the outputs."""
    dim = class_dim(outputs)
    shape = list(outputs.shape)
    if likelihood == "categorical":
        del shape[dim]
    if list(targets.shape) != shape:
        raise ValueError(f"targets must have shape {tuple(shape)}, got {tuple(targets.shape)}.")
    if likelihood == "normal":
        return outputs - targets
    if likelihood == "bernoulli":
        return outputs.sigmoid() - targets
    if targets.dtype != torch.long:
        raise TypeError(f"targets must be classes of dtype torch.int64, got {targets.dtype}.")
    one_hot = F.one_hot(targets, outputs.shape[dim]).movedim(-1, dim).to(outputs.dtype)
    return outputs.softmax(dim) - one_hot


def check(likelihood: str, reduction: str, num_samples: int | None) -> None:
    """Raise ValueError for an unknown likelihood or reduction, or fewer samples than one."""
    for name, value, choices in (
        ("likelihood", likelihood, LIKELIHOODS),
        ("reduction", reduction, ("mean", "sum")),
    ):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")
    if num_samples is not None and not num_samples >= 1:
        raise ValueError(f"num_samples must be a positive integer, got {num_samples}.")


def class_dim(outputs: Tensor) -> int:
    """The dimension of the classes, as in ``cross_entropy``."""
    return 1 if outputs.ndim > 1 else 0


def count_samples(likelihood: str, outputs: Tensor) -> int:
    """What a mean is taken over: samples, for "categorical" every position that has classes.

    Raises:
        ValueError: "categorical" outputs with fewer than two classes.
    """
    if likelihood == "categorical":
        if not outputs.ndim or outputs.shape[class_dim(outputs)] < 2:
            raise ValueError(
                "outputs must have two classes or more in dimension 1 for likelihood='categorical', got shape"
                f" {tuple(outputs.shape)}; 'bernoulli' and 'normal' are for single outputs."
            )
        return outputs.numel() // max(outputs.shape[class_dim(outputs)], 1)
    return outputs.shape[0] if outputs.ndim else 1


_SIGNATURES = {
    func: inspect.signature(func)
    for func in (F.mse_loss, F.cross_entropy, F.binary_cross_entropy_with_logits)
}
