"""The logarithm of the determinant of a positive definite operator: stochastic Lanczos quadrature.

Reference: Ubaru, Chen and Saad (2017), Fast estimation of tr(f(A)) via stochastic Lanczos quadrature, SIAM J.
Matrix Anal. Appl. 38.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from secondorder.solvers._checks import check_count, check_symmetric, domain
from secondorder.solvers._probes import rademacher
from secondorder.solvers.quadrature import decomposed, gauss, tridiagonalize
from secondorder.solvers.trace import TraceResult, summarize


def logdet(
    A: Any,
    *,
    num_probes: int = 20,
    steps: int = 50,
    like: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> TraceResult:
    """The logarithm of the determinant of a symmetric positive definite operator.

    It is the trace of the logarithm: ``num_probes`` random vectors estimate the trace, ``steps`` of Lanczos
    the logarithm along each. When the products would reach ``n``, the matrix is formed and decomposed
    instead.

    Args:
        A: Anything with ``A @ v`` for ``v`` of shape (n, k), symmetric positive definite.
        num_probes: Random vectors, at least 2.
        steps: Lanczos steps; about the root of the condition number times half the digits wanted.
        like: A vector of shape (n,), where ``A`` has no ``shape`` and ``dtype``.
        generator: For the probes; torch's global one when None.

    Returns:
        ``TraceResult``; the standard error is that of the probes. The error of the quadrature, by which the
        estimate is too high, comes on top: "truncated" says that it matters, as three quarters of the steps
        give another result by more than the standard error.

    Raises:
        TypeError: ``A`` has no products, or is neither float32 nor float64; a number is not an integer.
        ValueError: ``A`` is not symmetric or square, or has an eigenvalue that is not positive;
            ``num_probes`` is below 2 or ``steps`` below 1. An eigenvalue that the probes did not meet goes
            unnoticed.
        RuntimeError: a product holds NaN or infinity.

    Cost: ``steps`` products with a block of ``num_probes`` vectors, three such blocks of storage.

    Reference: Ubaru, Chen and Saad (2017), algorithm 1 and theorem 4.1.

    Example:
        >>> logdet(torch.diag(torch.tensor([1.0, 1.0, 1.0])))
        TraceResult(estimate=0.0, standard_error=0.0, products=0, status='exact')
    """
    like = domain(A, like)
    check_symmetric(A, "logdet needs positive eigenvalues")
    check_count("num_probes", num_probes, 2)
    check_count("steps", steps, 1)
    n = like.shape[0]
    if num_probes * steps >= n:
        exact = decomposed(A, like)
        _check_positive(exact.nodes)
        return TraceResult(float(exact.nodes.log().sum()), 0.0, exact.products, "exact")
    diagonals, offdiagonals = tridiagonalize(A, rademacher(like, num_probes, generator), steps)
    fewer = max(1, 3 * steps // 4)
    samples = n * _mean_logs(diagonals, offdiagonals)
    result = summarize(samples, num_probes * steps)
    # Ritz values of fewer steps lie between those of all: they are positive too.
    change = float((samples - n * _mean_logs(diagonals[:, :fewer], offdiagonals[:, : fewer - 1])).mean())
    is_truncated = steps > 1 and abs(change) > max(result.standard_error, _rounding(samples))
    return result._replace(status="truncated") if is_truncated else result


def _mean_logs(diagonals: Tensor, offdiagonals: Tensor) -> Tensor:
    """The mean logarithm over the spectrum as each probe sees it, shape (p,)."""
    nodes, weights = gauss(diagonals, offdiagonals)
    _check_positive(nodes)
    return (weights * nodes.log()).sum(1)


def _check_positive(values: Tensor) -> None:
    lowest = float(values.min()) if values.numel() else math.inf
    if not lowest > 0:
        raise ValueError(
            f"A must be positive definite, got an eigenvalue of at most {lowest:.3g}; add damping."
        )


def _rounding(samples: Tensor) -> float:
    """The size below which changes of the estimate are rounding."""
    return 100 * torch.finfo(samples.dtype).eps * float(samples.abs().max())
