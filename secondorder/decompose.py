"""Operations without a right second derivative, as compositions of primitives.

Measured with torch 2.13 on CPU against finite differences: fused attention, ``embedding_bag``, ``pdist``,
``hardsigmoid`` and others have no second derivative; that of ``weight_norm`` is 53 to 78 percent off; third
derivatives of the norm layers are wrong; ``mse_loss`` and ``huber_loss`` have none in forward mode.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from secondorder import _compositions, switches


class decompose(TorchFunctionMode):  # noqa: N801 - used as a function, like torch.no_grad
    """Context in which fused operations are computed by differentiable primitives.

    Replaced are: scaled-dot-product attention (the math kernel is forced; so are ``MultiheadAttention`` and
    ``TransformerEncoderLayer``), weight_norm (both APIs), batch, layer, group and instance norm,
    embedding_bag, mse_loss, huber_loss, soft_margin_loss, cdist, pdist, hardsigmoid, multi_margin_loss,
    cholesky_inverse, and sparse_coo_tensor of values that are differentiated (by a strided tensor). cuDNN
    is off. Values agree with torch's to rounding.

    Cost: some more kernels and intermediate tensors for the operations above; a microsecond for others.

    Example:
        >>> x = torch.tensor([-1.0, 0.5], requires_grad=True)
        >>> with decompose():
        ...     loss = torch.nn.functional.mse_loss(x, torch.zeros(2))
        >>> loss.grad_fn.name()
        'MeanBackward0'
    """

    def __init__(self) -> None:
        super().__init__()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> decompose:
        turned = (*switches.MATH_ATTENTION, switches.NO_CUDNN, switches.NO_FAST_PATH)
        self._stack.enter_context(switches.held(*turned))
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._stack.close()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        replacement = _REPLACEMENTS.get(func, func)
        return replacement(*args, **(kwargs or {}))


# By cuDNN on a GPU, unless it is switched off.
CUDNN = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)

# Their second derivative is missing or, of the first three, wrong in silence: whoever differentiates twice
# may replace these always.
WITHOUT_SECOND_DERIVATIVE: dict[Callable[..., Any], Callable[..., Any]] = {
    torch._weight_norm: _compositions.weight_norm,
    torch.sparse_coo_tensor: _compositions.sparse_coo_tensor,
    torch.sparse.mm: _compositions.sparse_mm,
    torch._sparse_sum: _compositions.sparse_sum,  # of torch.sparse.sum
    Tensor.coalesce: _compositions.coalesce,
    F.multi_margin_loss: _compositions.multi_margin_loss,
    F.hardsigmoid: _compositions.hardsigmoid,
    F.embedding_bag: _compositions.embedding_bag,
    torch.cdist: _compositions.cdist,
    torch.pdist: _compositions.pdist,
    F.pdist: _compositions.pdist,
    torch.cholesky_inverse: _compositions.cholesky_inverse,
    Tensor.cholesky_inverse: _compositions.cholesky_inverse,
    # Their cuDNN kernels have none.
    **{func: _compositions.without_cudnn(func) for func in CUDNN},
}

_REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {
    **WITHOUT_SECOND_DERIVATIVE,
    F.layer_norm: _compositions.layer_norm,
    torch.layer_norm: _compositions.layer_norm,
    F.group_norm: _compositions.group_norm,
    F.instance_norm: _compositions.instance_norm,
    F.batch_norm: _compositions.batch_norm,
    F.mse_loss: _compositions.mse_loss,
    F.huber_loss: _compositions.huber_loss,
    F.soft_margin_loss: _compositions.soft_margin_loss,
}
