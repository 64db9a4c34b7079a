"""Fused operations as compositions of differentiable primitives, each with the signature of torch's."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from secondorder.autodiff import switches

Norm = TypeVar("Norm", bound=Callable[..., Tensor])


def without_cudnn(func: Callable[..., Any]) -> Callable[..., Any]:
    """By torch's own kernels."""

    @functools.wraps(func)
    def result(*args: Any, **kwargs: Any) -> Any:
        with switches.held(switches.NO_CUDNN):
            return func(*args, **kwargs)

    return result


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    # Minus one means all dimensions, to torch too.
    others = [d for d in range(v.ndim) if dim == -1 or d != dim % v.ndim]
    return v * (g / v.square().sum(others, keepdim=True).sqrt())


def _in_single_precision(norm: Norm) -> Norm:
    """As torch's own: statistics of half precision inputs in single precision, the result in theirs."""

    @functools.wraps(norm)
    def result(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        is_half = input.dtype in (torch.float16, torch.bfloat16)
        found: Tensor = norm(input.float() if is_half else input, *args, **kwargs)
        return found.to(input.dtype)

    return cast(Norm, result)


@_in_single_precision
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,  # noqa: ARG001 - of torch.layer_norm
) -> Tensor:
    dims = list(range(-len(normalized_shape), 0))
    return _affine(_standardise(input, dims, eps), weight, bias)


@_in_single_precision
def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,  # noqa: ARG001 - of torch.group_norm
) -> Tensor:
    groups = input.reshape(input.shape[0], num_groups, math.prod(input.shape[1:]) // num_groups)
    return _affine_of_channels(_standardise(groups, [-1], eps).view(input.shape), weight, bias)


@_in_single_precision
def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    dims = list(range(2, input.ndim))
    if use_input_stats:
        if running_mean is not None and running_var is not None:
            variance, mean = torch.var_mean(input.detach(), dims)
            _move(running_mean, mean.mean(0), momentum)
            _move(running_var, variance.mean(0), momentum)
        return _affine_of_channels(_standardise(input, dims, eps), weight, bias)
    return _normalise_by(input, running_mean, running_var, weight, bias, eps)


@_in_single_precision
def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training:
        return _normalise_by(input, running_mean, running_var, weight, bias, eps)
    dims = [d for d in range(input.ndim) if d != 1]
    if running_mean is not None and running_var is not None:
        variance, mean = torch.var_mean(input.detach(), dims)
        _move(running_mean, mean, momentum)
        _move(running_var, variance, momentum)
    return _affine_of_channels(_standardise(input, dims, eps), weight, bias)


def _move(running: Tensor, batch: Tensor, momentum: float) -> None:
    running.mul_(1 - momentum).add_(batch.to(running.dtype), alpha=momentum)


def _standardise(input: Tensor, dims: list[int], eps: float) -> Tensor:
    centred = input - input.mean(dims, keepdim=True)
    return centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt()


def _normalise_by(
    input: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    if mean is None or variance is None:
        raise ValueError(
            "running_mean and running_var must be given when the input's statistics are not used."
        )
    centred = input - _of_channels(mean, input)
    return _affine_of_channels(centred / (_of_channels(variance, input) + eps).sqrt(), weight, bias)


def _affine(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    input = input if weight is None else input * weight
    return input if bias is None else input + bias


def _affine_of_channels(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    weight = None if weight is None else _of_channels(weight, input)
    return _affine(input, weight, None if bias is None else _of_channels(bias, input))


def _of_channels(values: Tensor, input: Tensor) -> Tensor:
    return values.view(1, -1, *([1] * (input.ndim - 2)))


def _modern(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """``reduction``, or what the two arguments that it replaced say."""
    if size_average is None and reduce is None:
        return reduction
    if reduce is False:
        return "none"
    return "sum" if size_average is False else "mean"


def _reduce(losses: Tensor, reduction: str, weight: Tensor | None = None) -> Tensor:
    if weight is not None:
        losses = losses * weight
        if reduction == "mean":
            return losses.sum() / weight.expand(losses.shape).sum()
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{reduction} is not a valid value for reduction")
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    reduction = _modern(size_average, reduce, reduction)
    return _reduce((input - target).square(), reduction, weight)


def huber_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    if not delta > 0:
        raise RuntimeError("huber_loss does not support non-positive values for delta.")
    difference = input - target
    inside = difference.abs() <= delta
    losses = torch.where(inside, 0.5 * difference.square(), delta * (difference.abs() - 0.5 * delta))
    # Unlike mse_loss, torch takes the plain mean of the weighted losses.
    return _reduce(losses if weight is None else losses * weight, reduction)


def soft_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    reduction = _modern(size_average, reduce, reduction)
    return _reduce(-F.logsigmoid(target * input), reduction)


def multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    reduction = _modern(size_average, reduce, reduction)
    rows = input.reshape(-1, input.shape[-1])
    index = target.reshape(-1, 1)
    hinge = (margin - rows.gather(1, index) + rows).relu() ** p
    if weight is not None:
        hinge = hinge * weight[index]
    own = torch.zeros_like(hinge, dtype=torch.bool).scatter(1, index, True)
    losses = hinge.masked_fill(own, 0.0).sum(1) / rows.shape[1]
    return _reduce(losses.reshape(target.shape), reduction)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    result = (input + 3).clamp(0, 6) / 6
    return input.copy_(result) if inplace else result


def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:  # noqa: ARG001
    return _norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p)


def pdist(input: Tensor, p: float = 2.0) -> Tensor:
    first, second = torch.triu_indices(len(input), len(input), 1, device=input.device)
    return _norm(input[first] - input[second], p)


def _norm(difference: Tensor, p: float) -> Tensor:
    """``norm(difference, p)`` over the last dimension, with zero derivative where it vanishes."""
    if not difference.shape[-1]:
        return difference.sum(-1)
    if p != 2:
        return torch.linalg.vector_norm(difference, p, dim=-1)
    squared = difference.square().sum(-1)
    apart = squared > 0
    return torch.where(apart, torch.where(apart, squared, 1.0).sqrt(), 0.0)


def logcumsumexp(input: Tensor, dim: int, *, out: Tensor | None = None) -> Tensor:
    if out is not None or not input.is_floating_point():
        return torch.logcumsumexp(input, dim, out=out)
    if not input.ndim:
        return input.clone()
    # Each entry holds the sum of a window before it, which doubles in each round: n log n numbers.
    rows, step = input.movedim(dim, -1), 1
    while step < rows.shape[-1]:
        sums = torch.logaddexp(rows[..., step:], rows[..., :-step])
        rows, step = torch.cat([rows[..., :step], sums], -1), 2 * step
    return rows.movedim(-1, dim)


def _in_order_of_torch(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``torch.batch_norm`` and its like: weights before statistics, and a switch for cuDNN at the end."""

    def result(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        *others: Any,
        **options: Any,
    ) -> Tensor:
        options.pop("cudnn_enabled", None)
        return norm(input, running_mean, running_var, weight, bias, *others[:3], **options)

    return result


torch_batch_norm, torch_instance_norm = _in_order_of_torch(batch_norm), _in_order_of_torch(instance_norm)


def cholesky_inverse(L: Tensor, upper: bool = False, *, out: Tensor | None = None) -> Tensor:
    if out is not None:
        return torch.cholesky_inverse(L, upper, out=out)
    eye = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device).expand(L.shape)
    half = torch.linalg.solve_triangular(L, eye, upper=upper)
    return half @ half.mH if upper else half.mH @ half


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    if max_norm is not None or scale_grad_by_freq or sparse:
        # There is no second derivative; the ladder says so when one is asked for.
        options = (offsets, max_norm, norm_type, scale_grad_by_freq, mode, sparse)
        return F.embedding_bag(input, weight, *options, per_sample_weights, include_last_offset, padding_idx)
    bags, flat, number = _bags(input, offsets, include_last_offset)
    if padding_idx is None:
        kept = torch.ones_like(flat, dtype=torch.bool)
    else:
        kept = flat != padding_idx % len(weight)
    rows, bags = weight[flat[kept]], bags[kept]
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.reshape(-1)[kept].unsqueeze(1)
    out = rows.new_zeros(number, weight.shape[1])
    if mode == "max":
        index = bags.unsqueeze(1).expand_as(rows)
        return out.scatter_reduce(0, index, rows, "amax", include_self=False)
    total = out.index_add(0, bags, rows)
    if mode == "sum":
        return total
    count = torch.bincount(bags, minlength=number).clamp_min(1)
    return total / count.to(total.dtype).unsqueeze(1)


def _bags(input: Tensor, offsets: Tensor | None, include_last: bool) -> tuple[Tensor, Tensor, int]:
    """The bag of each index, the indices, and the number of bags."""
    if input.ndim == 2:
        bags = torch.arange(input.shape[0], device=input.device).repeat_interleave(input.shape[1])
        return bags, input.reshape(-1), input.shape[0]
    if offsets is None:
        raise ValueError("offsets must be given for indices of shape (n,), got None.")
    starts = offsets[:-1] if include_last else offsets
    positions = torch.arange(len(input), device=input.device)
    return torch.searchsorted(starts.contiguous(), positions, right=True) - 1, input, len(starts)


def sparse_coo_tensor(indices: Any, values: Any, size: Sequence[int] | None = None, **options: Any) -> Tensor:
    """A strided tensor, when values are differentiated: torch drops the second derivative of a sparse one."""
    if not (isinstance(values, Tensor) and values.requires_grad):
        arguments = (indices, values) if size is None else (indices, values, size)
        return torch.sparse_coo_tensor(*arguments, **options)
    indices = torch.as_tensor(indices, device=values.device)
    values = values.to(options.get("dtype") or values.dtype)
    sparse_dims = [int(rows.max()) + 1 for rows in indices] if size is None else list(size[: len(indices)])
    dense = values.new_zeros(*sparse_dims, *values.shape[1:])
    return dense.index_put(tuple(indices), values, accumulate=True)


def sparse_mm(mat1: Tensor, mat2: Tensor, reduce: str | None = None) -> Tensor:
    is_strided = mat1.layout is torch.strided and mat2.layout is torch.strided
    if is_strided and reduce in (None, "sum"):
        return mat1 @ mat2
    return torch.sparse.mm(mat1, mat2) if reduce is None else torch.sparse.mm(mat1, mat2, reduce)


def sparse_sum(input: Tensor, dim: Any = None, dtype: torch.dtype | None = None) -> Tensor:
    if input.layout is torch.strided:
        return input.sum(dtype=dtype) if dim is None else input.sum(dim, dtype=dtype)
    arguments: dict[str, Any] = {k: v for k, v in (("dim", dim), ("dtype", dtype)) if v is not None}
    return torch._sparse_sum(input, **arguments)


def coalesce(input: Tensor) -> Tensor:
    """A strided tensor in place of a sparse one has no entry twice."""
    return input if input.layout is torch.strided else input.coalesce()
