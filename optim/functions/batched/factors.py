"""Small dense algebra of a batch, unrolled over its columns: each operation is one on all problems.

LAPACK takes the matrices of a batch one after another; here a column of all of them is one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Rows up to this length are summed by columns: torch sums short ones slowly.
SHORT = 8


def row_sums(a: Tensor) -> Tensor:
    """Sum of each row, shape (B, m) -> (B,)."""
    if not 0 < a.shape[1] <= SHORT:
        return a.sum(1)
    first, *others = a.unbind(1)
    for other in others:
        first = first + other
    return first


def norms(a: Tensor) -> Tensor:
    """Euclidean norm of each row, shape (B, m) -> (B,)."""
    return row_sums(a.square()).sqrt()


def cholesky_solve(A: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """``A^-1 b`` of symmetric matrices, shapes (B, n, n) and (B, n), and the least pivot, shape (B,).

    Where that is not positive the solution is meaningless, and may be NaN.
    """
    n = b.shape[1]
    L: list[list[Tensor]] = []
    inverses: list[Tensor] = []
    y: list[Tensor] = []
    least = torch.full_like(b[:, 0], torch.inf)
    for i in range(n):
        row: list[Tensor] = []
        for j in range(i):
            row.append((A[:, i, j] - _dot(row, L[j][:j])) * inverses[j])
        pivot = A[:, i, i] - _dot(row, row)
        least = torch.minimum(least, pivot)
        root = pivot.sqrt()
        inverses.append(root.reciprocal())
        y.append((b[:, i] - _dot(row, y)) * inverses[i])
        L.append([*row, root])
    x: list[Tensor] = [b[:, 0]] * n
    for i in reversed(range(n)):
        rest = _dot([L[k][i] for k in range(i + 1, n)], x[i + 1 :])
        x[i] = (y[i] - rest) * inverses[i]
    return torch.stack(x, 1), least


def least_squares_solve(columns: Sequence[Tensor], target: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """Minimise ``norm(A x - target)^2 + damping norm(x)^2`` of each problem by modified Gram-Schmidt.

    Args:
        columns: Those of ``A``, n of shape (B, m).
        target: Shape (B, m).
        damping: Not negative, shape (B,).

    Returns:
        The solution, shape (B, n), and the least ratio of a diagonal entry of R to the norm of its column,
        shape (B,): the cosine of what is left of it.

    Reference: Björck (1967), Solving linear least squares problems by Gram-Schmidt orthogonalization: as
        stable as Householder's, where it is applied to the right-hand side too.
    """
    n, root = len(columns), damping.sqrt()
    # Below each column its own row of the damping, which the elimination fills from the left.
    tops = list(columns)
    below = [[root if i == j else torch.zeros_like(root) for j in range(n)] for i in range(n)]
    R: list[list[Tensor]] = [[root] * n for _ in range(n)]
    rest, rest_below = target, [torch.zeros_like(root) for _ in range(n)]
    z: list[Tensor] = []
    least = torch.full_like(root, torch.inf)
    for k in range(n):
        before = (row_sums(columns[k].square()) + damping).sqrt()
        size = (row_sums(tops[k].square()) + _dot(below[k][: k + 1], below[k][: k + 1])).sqrt()
        least = torch.minimum(least, size / before)
        R[k][k] = size
        inverse = torch.where(size > 0, size.reciprocal(), 0.0)
        q, q_below = tops[k] * inverse.unsqueeze(1), [entry * inverse for entry in below[k][: k + 1]]
        for j in range(k + 1, n):
            R[k][j] = r = row_sums(q * tops[j]) + _dot(q_below, below[j][: k + 1])
            tops[j] = torch.addcmul(tops[j], q, r.unsqueeze(1), value=-1)
            for i in range(k + 1):
                below[j][i] = torch.addcmul(below[j][i], q_below[i], r, value=-1)
        part = row_sums(q * rest) + _dot(q_below, rest_below[: k + 1])
        z.append(part)
        rest = torch.addcmul(rest, q, part.unsqueeze(1), value=-1)
        for i in range(k + 1):
            rest_below[i] = torch.addcmul(rest_below[i], q_below[i], part, value=-1)
    x: list[Tensor] = [root] * n
    for i in reversed(range(n)):
        numerator = z[i] - _dot(R[i][i + 1 :], x[i + 1 :])
        x[i] = torch.where(R[i][i] > 0, numerator / R[i][i], 0.0)
    return torch.stack(x, 1), least


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor | float:
    total: Tensor | float = 0.0
    for first, second in zip(a, b, strict=False):
        total = first * second if isinstance(total, float) else torch.addcmul(total, first, second)
    return total
