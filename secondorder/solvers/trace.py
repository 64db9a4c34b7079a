"""The trace of an operator from few products.

Reference: Hutchinson (1989), A stochastic estimator of the trace of the influence matrix; Meyer, Musco, Musco
and Woodruff (2021), Hutch++: optimal stochastic trace estimation; Epperly, Tropp and Webber (2024), XTrace:
making the most of every sample in stochastic trace estimation, SIAM J. Matrix Anal. Appl. 45.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from secondorder.solvers._checks import check_count, domain
from secondorder.solvers._probes import gaussian, identity_blocks, multiply, rademacher

# Two samples are needed for a standard error; Hutch++ spends two thirds on its sketch, XTrace half.
LEAST_PRODUCTS = {"xtrace": 4, "hutch++": 4, "hutchinson": 2}


class TraceResult(NamedTuple):
    """An estimate of a number, and how sure it is.

    Attributes:
        estimate: The trace, or for ``logdet`` the logarithm of the determinant.
        standard_error: One standard deviation of the estimate, itself estimated; 0.0 when exact.
        products: Products of ``A`` with one vector.
        status: "exact", up to rounding; "estimated"; "truncated" (``logdet`` only): more Lanczos steps would
            change the estimate by more than its standard error.
    """

    estimate: float
    standard_error: float
    products: int
    status: str


def trace(
    A: Any,
    *,
    num_products: int = 60,
    method: str = "xtrace",
    like: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> TraceResult:
    """The trace of a square operator, symmetric or not.

    "hutchinson" averages ``v^T A v`` over random signs ``v``; its error is ``sqrt(2 / num_products)`` times
    the Frobenius norm of ``A`` without its diagonal. "hutch++" and "xtrace" take the trace on a sketch of the
    range exactly and estimate the rest: far better where the eigenvalues decay, no better where they are
    flat. "xtrace" uses every product for both, in turn.

    Args:
        A: Anything with ``A @ v`` for ``v`` of shape (n, k), square.
        num_products: Products with a vector allowed, at least 2 for "hutchinson", 4 for the others. From
            ``n`` on, ``n`` are spent, and the trace is exact.
        method: "xtrace", "hutch++" or "hutchinson".
        like: A vector of shape (n,), where ``A`` has no ``shape`` and ``dtype``.
        generator: For the random vectors; torch's global one when None.

    Returns:
        ``TraceResult``. The standard error of "hutchinson" and "hutch++" is that of the mean of independent
        samples; that of "xtrace" is its authors', from samples which share their sketch: too small at times,
        by a factor of 2 and more where the sketch ends at a gap of the spectrum.

    Raises:
        TypeError: ``A`` has no products, or is neither float32 nor float64.
        ValueError: ``A`` is not square; ``num_products`` is too small; ``method`` is unknown.
        RuntimeError: a product holds NaN or infinity.

    Cost: at most ``num_products`` products, in up to three blocks; for "xtrace" and "hutch++" further
    ``O(n num_products^2)`` operations.

    Reference: Hutchinson (1989); Meyer et al. (2021), algorithm 1; Epperly, Tropp and Webber (2024), section
    2.

    Example:
        >>> trace(torch.diag(torch.arange(5.0)))
        TraceResult(estimate=10.0, standard_error=0.0, products=5, status='exact')
    """
    like = domain(A, like)
    if method not in LEAST_PRODUCTS:
        raise ValueError(f"method must be one of 'xtrace', 'hutch++', 'hutchinson', got {method!r}.")
    check_count("num_products", num_products, LEAST_PRODUCTS[method])
    n = like.shape[0]
    if num_products >= n:
        parts = [multiply(A, block).diagonal(-start).sum() for start, block in identity_blocks(like)]
        return TraceResult(float(sum(parts)), 0.0, n, "exact")
    if method == "hutchinson":
        V = rademacher(like, num_products, generator)
        return summarize((V * multiply(A, V)).sum(0), num_products)
    if method == "hutch++":
        return _hutch_plus_plus(A, like, num_products, generator)
    return _xtrace(A, like, num_products // 2, generator)


def summarize(samples: Tensor, products: int, offset: Tensor | float = 0.0) -> TraceResult:
    """The mean of samples, with its standard error, plus ``offset``."""
    mean, deviation = torch.stack([samples.mean() + offset, samples.std()]).tolist()
    return TraceResult(mean, deviation / len(samples) ** 0.5, products, "estimated")


def _hutch_plus_plus(
    A: Any, like: Tensor, num_products: int, generator: torch.Generator | None
) -> TraceResult:
    """A third of the products for a sketch, a third for its trace, a third for the rest."""
    rank = num_products // 3
    Q = torch.linalg.qr(multiply(A, rademacher(like, rank, generator)))[0]
    G = rademacher(like, num_products - 2 * rank, generator)
    G = G - Q @ (Q.T @ G)
    sketched = (Q * multiply(A, Q)).sum()
    return summarize((G * multiply(A, G)).sum(0), num_products, sketched)


def _xtrace(A: Any, like: Tensor, count: int, generator: torch.Generator | None) -> TraceResult:
    """For each test vector, the trace on the sketch by all the others, and the rest from this one.

    With ``A Omega = Q R``, the sketch without vector ``i`` is ``Q (I - s s^T) Q^T``: ``s`` is orthogonal to
    the other columns of ``R``.
    """
    n = like.shape[0]
    omega = gaussian(like, count, generator)
    Y = multiply(A, omega)
    Q, R = torch.linalg.qr(Y)
    S = left_out_directions(R)
    AQ = multiply(A, Q)
    H = Q.T @ AQ
    W = Q.T @ omega
    # Test vectors less their parts in the sketches of the others.
    C = W - S * (S * W).sum(0)
    U, AU = omega - Q @ C, Y - AQ @ C
    # Uniform on the sphere in the complement, of dimension n - count + 1, when scaled to the root of that.
    scale = (n - count + 1) / U.square().sum(0)
    samples = H.trace() - (S * (H @ S)).sum(0) + scale * (U * AU).sum(0)
    return summarize(samples, 2 * count)


def left_out_directions(R: Tensor) -> Tensor:
    """Unit vectors, each orthogonal to all columns of ``R`` but one: those of ``R^-T``, shape (k, k).

    Where ``R`` is singular, as for an operator of lower rank, its small singular values are raised to
    rounding: the others then span the range without it, and any direction in the null space is right.
    """
    U, values, Vh = torch.linalg.svd(R)  # waits: once
    floor = values[:1] * len(values) * torch.finfo(R.dtype).eps + torch.finfo(R.dtype).tiny
    # Only their ratios matter; scaled, they cannot overflow.
    inverse = values.clamp(min=floor).reciprocal() * floor
    directions = (U * inverse) @ Vh
    return directions / directions.norm(dim=0)
