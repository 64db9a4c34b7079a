"""Some extreme eigenvalues and eigenvectors of a symmetric operator: thick-restart Lanczos.

Reference: Wu and Simon (2000), Thick-restart Lanczos method for large symmetric eigenvalue problems, SIAM
J. Matrix Anal. Appl. 22, with full reorthogonalisation, twice.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secondorder.solvers._checks import check_count, check_limits, check_symmetric, dense, domain
from secondorder.solvers._probes import NOT_FINITE, check_finite, gaussian, multiply
from secondorder.solvers._result import STATUS_TEXT
from secondorder.solvers._scale import OutOfRangeError, Scaled, check_range, exponent_of_operator, shifted
from secondorder.solvers._shown import in_lines
from secondorder.vectors.host import read

WHICH = ("LM", "LA", "SA", "BE")


class EigenResult(NamedTuple):
    """Eigenpairs, and what happened.

    Attributes:
        values: Eigenvalues, ascending, shape (k,).
        vectors: Orthonormal eigenvectors as columns, shape (n, k).
        residual_norms: ``norm(A x - value x)`` of each, from products at the end, shape (k,). An eigenvalue
            of ``A`` lies within that distance of the value.
        status: "converged", "max_iter" or "stagnated", a key of ``STATUS_TEXT``.
        iterations: Lanczos steps, one product each.
        products: Products with one vector, those for the residuals included.
    """

    values: Tensor
    vectors: Tensor
    residual_norms: Tensor
    status: str
    iterations: int
    products: int

    def __repr__(self) -> str:
        return in_lines(self)

    @property
    def message(self) -> str:
        """One sentence on ``status``: the cause, and the remedy where there is one."""
        return STATUS_TEXT[self.status]


def eigsh(
    A: Any,
    k: int = 6,
    *,
    which: str = "LM",
    v0: Tensor | None = None,
    ncv: int | None = None,
    rtol: float | None = None,
    max_iter: int | None = None,
    generator: torch.Generator | None = None,
) -> EigenResult:
    """Some extreme eigenvalues and eigenvectors of a symmetric operator; named as in SciPy.

    A Krylov space of one vector holds one eigenvector of a multiple eigenvalue. So when ``k`` pairs have
    converged, the iteration goes on from a new random vector in their orthogonal complement, until nothing it
    finds there can belong to the wanted ones any more: Ritz values and residuals are compared.

    Args:
        A: Anything with ``A @ v`` for ``v`` of shape (n,) or (n, k), symmetric.
        k: How many, from 1 to ``n``.
        which: "LM", largest in magnitude; "LA", largest; "SA", smallest; "BE", from both ends, the odd one
            from the upper.
        v0: Start, shape (n,); random when None. Needed where ``A`` has no ``shape`` and ``dtype``.
        ncv: Vectors kept, more than ``k``; ``max(2 k + 1, 20)`` when None. From ``n`` on the matrix is formed
            and decomposed.
        rtol: A pair has converged when ``norm(A x - value x) <= rtol * norm(A)``, the norm that of the
            largest Ritz value; ``sqrt(eps)`` when None, since the error of a separated eigenvalue is of
            second order.
        max_iter: Lanczos steps allowed, at least ``ncv``; ``100 * n`` when None.
        generator: For the random vectors; torch's global one when None.

    Returns:
        ``EigenResult``. "converged" means that the true residuals of all pairs are within the tolerance, and
        that the search of the complement ended; "stagnated", that rounding keeps a residual above it.

    Raises:
        TypeError: ``A`` has no products, or is neither float32 nor float64.
        ValueError: ``A`` is not symmetric or square; ``k``, ``which``, ``ncv``, ``max_iter`` or ``rtol`` is
            out of range; ``v0`` is zero or has another shape.
        RuntimeError: a product holds NaN or infinity.

    Cost: a step, one product, ``8 n ncv`` operations and one host read; ``(ncv + 1) n`` numbers of storage,
    at a restart up to twice that; ``k`` products at the end. Of the steps, those in the complement are at
    least ``ncv - k``.

    Reference: Wu and Simon (2000), Thick-restart Lanczos method for large symmetric eigenvalue problems.

    Example:
        >>> eigsh(torch.diag(torch.arange(5.0)), k=2).values
        tensor([3., 4.])
    """
    like = domain(A, v0, "v0")
    check_symmetric(A, "eigsh needs real eigenvalues")
    n, eps = like.shape[0], torch.finfo(like.dtype).eps
    check_count("k", k, 1, n)
    if which not in WHICH:
        raise ValueError(f"which must be one of 'LM', 'LA', 'SA', 'BE', got {which!r}.")
    size = max(2 * k + 1, 20) if ncv is None else ncv
    check_count("ncv", size, min(k + 1, n))
    rtol = eps**0.5 if rtol is None else rtol
    check_limits(rtol, 0.0, max_iter)
    if size >= n:
        return _dense(A, like, k, which, rtol)
    limit = 100 * n if max_iter is None else max_iter
    check_count("max_iter", limit, size)
    start = gaussian(like, 1, generator)[:, 0] if v0 is None else v0
    try:
        return _restarted(_Lanczos(A, start, size, generator), k, which, rtol, limit)
    except OutOfRangeError as error:
        exponent, spent = exponent_of_operator(A, like), error.products + 1
    run = _Lanczos(Scaled(A, exponent), start, size, generator)
    found = _restarted(run, k, which, rtol, limit)
    return found._replace(
        values=shifted(found.values, exponent),
        residual_norms=shifted(found.residual_norms, exponent),
        products=found.products + spent,
    )


def _restarted(run: _Lanczos, k: int, which: str, rtol: float, limit: int) -> EigenResult:
    ritz, status = _iterate(run, k, which, rtol, limit)
    X = torch.linalg.qr(run.combine(ritz.weights[:, :k]))[0]
    return _result(X, multiply(run.A, X), ritz.norm, rtol, status, run.iterations)


def _iterate(run: _Lanczos, k: int, which: str, rtol: float, limit: int) -> tuple[_Ritz, str]:
    """Expand and restart until the wanted pairs are found and searched for in vain; the status says what."""
    found: Tensor | None = None
    while True:
        run.expand(limit)
        ritz = run.ritz(which)
        count, is_settled, is_unchanged = ritz.judge(k, which, rtol, found)
        if count == k and is_settled and is_unchanged:
            return ritz, "converged"
        if run.iterations >= limit:
            return ritz, "max_iter"
        if count == k and not is_unchanged:
            found = ritz.rank(which)[:k]
            # What leads out of these pairs is below the tolerance: it gives way to a random vector.
            run.restart(ritz, k, is_fresh=True)
        else:
            # As many more as converged, at most half of the rest: ARPACK's rule (dsaup2). At least three, for
            # both ends of the rest: with fewer, a copy that the search meets is lost at every restart.
            more = max(min(count, (run.ncv - k) // 2), 3)
            run.restart(ritz, min(k + more, run.ncv - 1), is_fresh=False)


class _Ritz(NamedTuple):
    """Ritz pairs, the most wanted first: values, weights of the basis, estimates of the residual norms."""

    values: Tensor
    weights: Tensor
    estimates: Tensor

    @property
    def norm(self) -> Tensor:
        """The largest magnitude, which stands for the norm of ``A``."""
        return self.values.abs().amax()

    def rank(self, which: str) -> Tensor:
        """By what they are compared: with "LM", two of opposite sign may be equal."""
        return self.values.abs() if which == "LM" else self.values

    def judge(self, k: int, which: str, rtol: float, found: Tensor | None) -> tuple[int, bool, bool]:
        """How many of k converged; whether none of the others may yet rank before them; whether as ``found``.

        One host read.
        """
        # A quarter, as parts of this size are dropped when the iteration starts afresh; not below rounding.
        inner = max(rtol / 4, torch.finfo(self.values.dtype).eps) * self.norm
        count = (self.estimates[:k] <= inner).sum()
        rank = self.rank(which)
        # What is missing would appear at one of the two ends of the rest.
        ends = k + torch.stack([self.values[k:].argmax(), self.values[k:].argmin()])
        margins = (rank[ends, None] - rank[None, :k]).abs().amin(1)
        is_settled = (self.estimates[ends] <= margins.clamp(min=inner)).all()
        if found is None:
            is_unchanged = torch.zeros_like(is_settled)
        else:
            is_unchanged = ((found.sort()[0] - rank[:k].sort()[0]).abs() <= 4 * inner).all()
        numbers = torch.stack([count, is_settled.to(count), is_unchanged.to(count)]).tolist()
        return numbers[0], bool(numbers[1]), bool(numbers[2])


class _Lanczos:
    """An orthonormal basis as rows, and ``T = Q A Q^T``; the row after the last is the next vector.

    After a restart the first rows are Ritz vectors, and ``T`` an arrow there. All of a column of ``T`` is
    taken from inner products, which the reorthogonalisation needs anyway: no structure is assumed.
    """

    def __init__(self, A: Any, start: Tensor, ncv: int, generator: torch.Generator | None) -> None:
        self.A, self._generator = A, generator
        self.ncv, self.size, self.iterations = ncv, 0, 0
        self._coupling = self._largest = 0.0
        length = float(start.norm())
        if not (length > 0 and math.isfinite(length)):
            raise ValueError(f"v0 must be finite and not zero, got a vector of norm {length}.")
        self._rows = start.new_zeros(ncv + 1, start.shape[0])
        self._rows[0] = start / length
        self._T = start.new_zeros(ncv, ncv)

    def expand(self, limit: int) -> None:
        """Fill the basis, or stop at ``limit`` steps."""
        while self.size < self.ncv and self.iterations < limit:
            self._step()

    def _step(self) -> None:
        j = self.size
        Q = self._rows[: j + 1]
        w = self.A @ Q[j]
        length = w.norm()
        along = Q @ w
        w = w - along @ Q
        # Twice is enough: Parlett (1998), The symmetric eigenvalue problem, section 6.9.
        again = Q @ w
        w = w - again @ Q
        self._T[j, : j + 1] = self._T[: j + 1, j] = along + again
        rest, size = read(w.norm(), length)
        if self.iterations == 0:
            check_range(self.A, 1, w.dtype, size)
        if not (math.isfinite(rest) and math.isfinite(size)):
            raise RuntimeError(NOT_FINITE)
        self._largest = max(self._largest, size)
        # Below this, what is left is the rounding of the product: the subspace is invariant.
        is_invariant = rest <= 10 * torch.finfo(w.dtype).eps * self._largest
        self._coupling = 0.0 if is_invariant else rest
        self._rows[j + 1] = self._outside(j + 1) if is_invariant else w / rest
        self.size, self.iterations = j + 1, self.iterations + 1

    def _outside(self, count: int) -> Tensor:
        """A random unit vector orthogonal to the first ``count`` rows."""
        Q = self._rows[:count]
        vector = gaussian(Q[0], 1, self._generator)[:, 0]
        # Three times, as little of it may be left where the rows span nearly everything.
        for _ in range(3):
            vector = vector - (Q @ vector) @ Q
            vector = vector / vector.norm()
        return vector

    def ritz(self, which: str) -> _Ritz:
        """Ritz pairs of the basis, the most wanted first."""
        # waits: once a restart
        values, weights = torch.linalg.eigh(self._T[: self.size, : self.size])
        order = _order(values, which)
        return _Ritz(values[order], weights[:, order], self._coupling * weights[-1, order].abs())

    def combine(self, weights: Tensor) -> Tensor:
        """Combinations of the basis as columns, shape (n, count)."""
        return self._rows[: self.size].T @ weights

    def restart(self, ritz: _Ritz, keep: int, is_fresh: bool) -> None:
        """Keep the first Ritz vectors; go on with the next vector, or with a random one."""
        self._rows[:keep] = self.combine(ritz.weights[:, :keep]).T
        self._rows[keep] = self._outside(keep) if is_fresh else self._rows[self.size]
        self._T.zero_()
        self._T[:keep, :keep] = torch.diag(ritz.values[:keep])
        self.size = keep


def _order(values: Tensor, which: str) -> Tensor:
    """Indices of ascending values, the most wanted first."""
    if which == "LM":
        return values.abs().argsort(descending=True)
    ascending = torch.arange(len(values), device=values.device)
    if which == "SA":
        return ascending
    if which == "LA":
        return ascending.flip(0)
    # From the two ends in turn, the upper one first.
    return torch.stack([ascending.flip(0), ascending], dim=1).flatten()[: len(values)]


def _dense(A: Any, like: Tensor, k: int, which: str, rtol: float) -> EigenResult:
    """All eigenpairs, of which the wanted are taken."""
    matrix = dense(A, like)
    check_finite(matrix)
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)  # waits: once
    X = vectors[:, _order(values, which)[:k]]
    products = 0 if isinstance(A, Tensor) else like.shape[0]
    result = _result(X, matrix @ X, values.abs().amax(), rtol, "converged", 0)
    return result._replace(products=products)


def _result(X: Tensor, AX: Tensor, norm: Tensor, rtol: float, status: str, iterations: int) -> EigenResult:
    """The pairs of the space that orthonormal ``X`` spans, with their true residuals."""
    small = X.T @ AX
    values, rotation = torch.linalg.eigh((small + small.T) / 2)  # waits: once
    X, AX = X @ rotation, AX @ rotation
    residual_norms = (AX - X * values).norm(dim=0)
    if status == "converged" and bool((residual_norms > rtol * norm).any()):
        status = "stagnated"
    return EigenResult(values, X, residual_norms, status, iterations, iterations + X.shape[1])
