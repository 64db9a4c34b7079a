"""Operations without a right second derivative, as compositions of primitives.

Measured with torch 2.13 on CPU against finite differences: fused attention, ``embedding_bag``, ``pdist``,
``hardsigmoid`` and others have no second derivative; that of ``weight_norm`` is 53 to 78 percent off; third
derivatives of the norm layers are wrong; ``mse_loss`` and ``huber_loss`` have none in forward mode.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from secondorder.autodiff import compositions, switches
from secondorder.autodiff.determinant import det
from secondorder.autodiff.graph import WrongDerivativeError

# A context in which derivatives are taken.
Rung = Callable[[], contextlib.AbstractContextManager[Any]]

_current: contextvars.ContextVar[Rung] = contextvars.ContextVar("current", default=contextlib.nullcontext)


def current() -> Rung:
    """The context that this code runs in: what goes on later with its graph is to run in it too.

    A block under ``torch.utils.checkpoint`` computes again in backward passes, which must be by the same
    kernels and operations.
    """
    return _current.get()


@contextlib.contextmanager
def _noted(rung: Rung) -> Iterator[None]:
    token = _current.set(rung)
    try:
        yield
    finally:
        _current.reset(token)


def eager() -> contextlib.AbstractContextManager[Any]:
    """Context in which what was compiled runs as it was written."""
    return switches.held(switches.NO_COMPILED_CODE)


@contextlib.contextmanager
def math_kernels() -> Iterator[None]:
    """Context in which operations with several kernels use those that can be differentiated twice.

    What was compiled is run by these operations too.
    """
    turned = (*switches.MATH_ATTENTION, switches.NO_CUDNN, switches.NO_FAST_PATH)
    with _noted(math_kernels), switches.held(*turned, switches.NO_COMPILED_CODE):
        yield


class decompose(TorchFunctionMode):  # noqa: N801 - used as a function, like torch.no_grad
    """Context in which fused operations are computed by differentiable primitives.

    Replaced are: scaled-dot-product attention (the math kernel is forced; so are ``MultiheadAttention`` and
    ``TransformerEncoderLayer``), weight_norm (both APIs), batch, layer, group and instance norm,
    embedding_bag, mse_loss, huber_loss, soft_margin_loss, cdist, pdist, hardsigmoid, multi_margin_loss,
    cholesky_inverse, logcumsumexp, det of singular matrices, and sparse_coo_tensor of values that are
    differentiated (by a strided tensor). cuDNN is off, and compiled code eager. Values agree with torch's to
    rounding.

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
        self._stack.enter_context(math_kernels())
        self._stack.enter_context(_noted(decompose))
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

# Replaced at singular matrices alone.
DETERMINANTS = (torch.det, torch.linalg.det, Tensor.det)

# Their second derivative is missing or, of weight_norm, sparse tensors and determinants, wrong in silence:
# whoever differentiates twice may replace these always.
WITHOUT_SECOND_DERIVATIVE: dict[Callable[..., Any], Callable[..., Any]] = {
    torch._weight_norm: compositions.weight_norm,
    torch.sparse_coo_tensor: compositions.sparse_coo_tensor,
    torch.sparse.mm: compositions.sparse_mm,
    torch._sparse_sum: compositions.sparse_sum,  # of torch.sparse.sum
    Tensor.coalesce: compositions.coalesce,
    F.multi_margin_loss: compositions.multi_margin_loss,
    F.hardsigmoid: compositions.hardsigmoid,
    F.embedding_bag: compositions.embedding_bag,
    torch.cdist: compositions.cdist,
    torch.pdist: compositions.pdist,
    F.pdist: compositions.pdist,
    torch.cholesky_inverse: compositions.cholesky_inverse,
    Tensor.cholesky_inverse: compositions.cholesky_inverse,
    **dict.fromkeys(DETERMINANTS, det),
    # Their cuDNN kernels have none.
    **{func: compositions.without_cudnn(func) for func in CUDNN},
}

_REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {
    **WITHOUT_SECOND_DERIVATIVE,
    torch.logcumsumexp: compositions.logcumsumexp,
    Tensor.logcumsumexp: compositions.logcumsumexp,
    F.layer_norm: compositions.layer_norm,
    torch.layer_norm: compositions.layer_norm,
    F.group_norm: compositions.group_norm,
    torch.group_norm: compositions.group_norm,
    F.instance_norm: compositions.instance_norm,
    torch.instance_norm: compositions.torch_instance_norm,
    F.batch_norm: compositions.batch_norm,
    torch.batch_norm: compositions.torch_batch_norm,
    F.mse_loss: compositions.mse_loss,
    F.huber_loss: compositions.huber_loss,
    F.soft_margin_loss: compositions.soft_margin_loss,
}


class forward_mode(TorchFunctionMode):  # noqa: N801 - used as a function, like torch.no_grad
    """Context for functions of dual numbers: operations whose forward derivatives torch gets wrong (2.13).

    Replaced are cholesky_inverse, group_norm (whose batching rule is wrong for some shapes) and determinants
    of singular matrices. Refused are products in scatter_reduce.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Also of torch.ops, with the overload behind a dot.
        name = getattr(func, "__name__", "").split(".")[0]
        options = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, str)]
        if name in _SCATTERS and "prod" in options:
            raise _wrong_forward("scatter_reduce with reduce='prod'")
        return _IN_FORWARD_MODE.get(name, func)(*args, **kwargs)


_IN_FORWARD_MODE: dict[str, Callable[..., Any]] = {
    "cholesky_inverse": compositions.cholesky_inverse,
    "group_norm": compositions.group_norm,
    "det": det,
    "linalg_det": det,
}
_SCATTERS = {"scatter_reduce", "scatter_reduce_"}


def _wrong_forward(what: str) -> WrongDerivativeError:
    return WrongDerivativeError(
        f"the derivative of {what} is wrong in torch's forward mode; use reverse mode.", is_decomposed=False
    )
