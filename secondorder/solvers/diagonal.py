"""The diagonal of an operator from few products.

Reference: Bekas, Kokiopoulou and Saad (2007), An estimator for the diagonal of a matrix, Appl. Numer. Math.
57; Epperly, Tropp and Webber (2024), XTrace: making the most of every sample in stochastic trace estimation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from secondorder.solvers._checks import check_count, check_symmetric, domain
from secondorder.solvers._probes import identity_blocks, multiply, rademacher
from secondorder.solvers._shown import in_lines
from secondorder.solvers.trace import left_out_directions

LEAST_PRODUCTS = {"xdiag": 4, "hutchinson": 2}


class DiagonalResult(NamedTuple):
    """An estimate of a diagonal, and how sure it is.

    Attributes:
        estimate: The diagonal, shape (n,).
        standard_error: One standard deviation of each entry, itself estimated, shape (n,); zeros when exact.
        products: Products of ``A`` with one vector.
        status: "exact", up to rounding, or "estimated".
    """

    estimate: Tensor
    standard_error: Tensor
    products: int
    status: str

    def __repr__(self) -> str:
        return in_lines(self)


def diagonal(
    A: Any,
    *,
    num_products: int = 60,
    method: str = "xdiag",
    like: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> DiagonalResult:
    """The diagonal of a symmetric operator.

    "hutchinson" averages ``v * (A v)`` over random signs ``v``; entry ``i`` has the error of row ``i``
    without its diagonal, over ``sqrt(num_products)``: often larger than the entry. "xdiag" takes the diagonal
    on a sketch of the range exactly and estimates the rest; it gains where the eigenvalues decay.

    Args:
        A: Anything with ``A @ v`` for ``v`` of shape (n, k), symmetric.
        num_products: Products with a vector allowed, at least 2 for "hutchinson", 4 for "xdiag". From ``n``
            on, ``n`` are spent, and the diagonal is exact.
        method: "xdiag" or "hutchinson".
        like: A vector of shape (n,), where ``A`` has no ``shape`` and ``dtype``.
        generator: For the random vectors; torch's global one when None.

    Returns:
        ``DiagonalResult``. An estimate may be negative where the diagonal is not.

    Raises:
        TypeError: ``A`` has no products, or is neither float32 nor float64.
        ValueError: ``A`` is not square or not symmetric; ``num_products`` is too small; ``method`` is
            unknown.
        RuntimeError: a product holds NaN or infinity.

    Cost: at most ``num_products`` products, in up to two blocks; for "xdiag" further ``O(n num_products^2)``
    operations.

    Reference: Bekas, Kokiopoulou and Saad (2007); Epperly, Tropp and Webber (2024), section 2.4.

    Example:
        >>> diagonal(torch.tensor([[2.0, 1.0], [1.0, 3.0]])).estimate
        tensor([2., 3.])
    """
    like = domain(A, like)
    check_symmetric(A, "xdiag multiplies with both")
    if method not in LEAST_PRODUCTS:
        raise ValueError(f"method must be one of 'xdiag', 'hutchinson', got {method!r}.")
    check_count("num_products", num_products, LEAST_PRODUCTS[method])
    n = like.shape[0]
    if num_products >= n:
        parts = [multiply(A, block).diagonal(-start) for start, block in identity_blocks(like)]
        estimate = torch.cat(parts) if parts else torch.zeros(0, dtype=like.dtype, device=like.device)
        return DiagonalResult(estimate, torch.zeros_like(estimate), n, "exact")
    if method == "hutchinson":
        V = rademacher(like, num_products, generator)
        return _summarize(V * multiply(A, V), num_products)
    return _xdiag(A, rademacher(like, num_products // 2, generator))


def _summarize(samples: Tensor, products: int) -> DiagonalResult:
    """The mean over columns, with its standard error."""
    error = samples.std(dim=1) / samples.shape[1] ** 0.5
    return DiagonalResult(samples.mean(dim=1), error, products, "estimated")


def _xdiag(A: Any, omega: Tensor) -> DiagonalResult:
    """For each test vector, the diagonal on the sketch by all the others, and the rest from this one.

    With ``A Omega = Q R``, the sketch without vector ``i`` is ``P = Q (I - s s^T) Q^T``, and ``(I - P) A
    omega_i`` is ``Q s (s . r_i)``.
    """
    Q, R = torch.linalg.qr(multiply(A, omega))
    S = left_out_directions(R)
    AQ = multiply(A, Q)
    QS = Q @ S
    rest = omega * QS * (S * R).sum(0) - QS * (AQ @ S)
    return _summarize((Q * AQ).sum(1, keepdim=True) + rest, 2 * omega.shape[1])
