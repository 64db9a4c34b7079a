"""Rows of a Jacobian in factors, one piece for each use of a parameter, and the sum of their inner products.

With ``J[r] = sum_t left[r, t] right[r, t]^T`` it is ``sum_tt' (L_t L_t'^T) * (R_t R_t'^T)``. Where
that is dearer than the rows themselves, those are formed, for one parameter, and some columns, at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement, product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secondorder.operators.layers import Factors

# Multiply-adds in the time of one entry-wise pass over a matrix, for each entry; measured on one CPU thread.
PASS = 16


class TooLargeError(RuntimeError):
    """The matrix, or what it is computed from, does not fit the memory that was allowed."""


class BySamples:
    """Sorts the positions of factors by samples; what it is given twice it knows again.

    Args:
        samples: Their number.
        is_minor: Whether neighbours among the positions are of different samples, not of one.
        dtype: Of what it returns.
    """

    def __init__(self, samples: int, is_minor: bool, dtype: torch.dtype) -> None:
        self.samples = samples
        self.is_minor = is_minor
        self._dtype = dtype
        self._known: dict[Any, tuple[Tensor, Tensor]] = {}

    def __call__(self, factor: Tensor) -> Tensor:
        """Shape (c, P, ...) to (samples * c, T, ...)."""
        key = identity(factor)
        if key not in self._known:
            shape = (-1, self.samples) if self.is_minor else (self.samples, -1)
            split = factor.unflatten(1, shape).movedim(2 if self.is_minor else 1, 0).flatten(0, 1)
            # Held, that nothing else may come to lie there.
            self._known[key] = factor, split.to(self._dtype) if split.is_floating_point() else split
        return self._known[key][1]


class Piece(NamedTuple):
    """Rows of one output's Jacobian with respect to what one node takes of a parameter.

    Attributes:
        rows: Which, of all outputs: those of a sample are neighbours.
        samples: How many.
        left: Shape (rows or samples, T, G, o), or integers, (samples, T, G): see ``Factors``; or None.
        right: Shape (rows or samples, T, G, i).
        spot: As in ``Factors``; its strides fall where ``left`` is a tensor.
        size: Norm of the rows as if nothing cancelled in sums over ``T``, a scalar.
    """

    rows: slice
    samples: int
    left: Tensor | None
    right: Tensor
    spot: Tensor
    size: Tensor

    @classmethod
    def of(cls, found: Factors, rows: slice, by_samples: BySamples) -> Piece | None:
        """The rows of a use of which ``found`` has all positions; None where they are no multiple of samples."""
        samples = by_samples.samples
        if found.right.shape[1] % samples:
            return None
        right = by_samples(found.right)
        if found.left is None:
            size = torch.linalg.vector_norm(right)
            right = right.sum(1, keepdim=True) if right.shape[1] > 1 else right
            return cls(rows, samples, None, right, found.spot, size)
        left = by_samples(found.left)
        size = _each(left, samples).mul(_each(right, samples)).sum().sqrt().to(right.dtype)
        if left.is_floating_point() and strides(found.spot)[1] < strides(found.spot)[2]:
            return cls(rows, samples, right, left, found.spot.transpose(1, 2), size)
        return cls(rows, samples, left, right, found.spot, size)

    @property
    def count(self) -> int:
        """Of rows."""
        return int(self.rows.stop - self.rows.start)

    @property
    def positions(self) -> int:
        """``T``."""
        return self.right.shape[1]

    @property
    def place(self) -> tuple[Any, ...]:
        """Which entries of the parameter it has, and in what order: equal for pieces that fit each other."""
        dims = [pair for pair in zip(self.spot.shape, self.spot.stride(), strict=True) if pair[0] > 1]
        return self.left is None, self.spot.storage_offset(), *dims

    def pulled(self, v: Tensor) -> Tensor:
        """``J^T v`` for ``v`` of shape (rows,), shaped like ``spot``."""
        left, right = self.left, self.right
        if left is None:
            return (v @ right[:, 0, 0]).view(self.spot.shape)
        if len(right) == len(v):
            right = self._summed(right, v)
        else:
            left = self._summed(left, v)
        if not left.is_floating_point():
            rows = right.new_zeros(self.spot.shape[1:])
            return rows.index_add_(0, left.flatten(), right.flatten(0, 2)).view(self.spot.shape)
        left, right = (z.flatten(0, 1).movedim(1, 0) for z in (left, right))
        return left.mT @ right

    def _summed(self, factor: Tensor, v: Tensor) -> Tensor:
        """Over the rows of each sample, times those of ``v``."""
        products = factor * v.view(-1, 1, 1, 1)
        return products.unflatten(0, (self.samples, -1)).sum(1) if len(v) > self.samples else products

    def dense(self, groups: slice = slice(None), entries: slice = slice(None)) -> Tensor:
        """The rows, of some groups and entries of ``left``: shape (rows, G, o, i), or (rows, *spot)."""
        if self.left is None:
            return self.right.reshape(-1, *self.spot.shape)
        left, right = self.left[:, :, groups], self.right[:, :, groups]
        if left.is_floating_point():
            left = left[..., entries]
        else:
            which = torch.arange(self.spot.shape[1], device=left.device)[entries]
            left = (left[..., None] == which).to(right.dtype)
        left, right = (z.unflatten(0, (self.samples, -1)) for z in (left, right))
        return torch.einsum("nctgo,nctgi->ncgoi", left, right).flatten(0, 1)


def _each(factor: Tensor, samples: int) -> Tensor:
    """Squared norms at each position, shape (samples, c, T, G)."""
    squares = factor.square().sum(-1) if factor.is_floating_point() else torch.ones_like(factor)
    return squares.unflatten(0, (samples, -1))


def strides(x: Tensor) -> list[int]:
    """Zero along dimensions of one entry."""
    return [stride if size > 1 else 0 for size, stride in zip(x.shape, x.stride(), strict=True)]


class Total:
    """The sum so far.

    Args:
        matrix: Shape (m, m), zeros.
        budget: Bytes that may be allocated beside it, and beside two more of its size.
    """

    def __init__(self, matrix: Tensor, budget: float) -> None:
        self.matrix = matrix
        self.budget = budget
        # The last two inner products, with what they are of: a bias takes that of its weight.
        self._known: list[tuple[Any, Tensor, Tensor, Tensor]] = []

    def add(self, pieces: Sequence[Piece], entries: int, weight: float) -> bool:
        """The rows of one parameter of so many entries; whether they were formed."""
        if len({piece.place for piece in pieces}) > 1:
            self._add_scattered(pieces, entries, weight)
            return True
        if pieces[0].left is None:
            pieces = _joined(pieces)
        elif not self._is_ghost_cheaper(pieces):
            self._add_columns(pieces, weight)
            return True
        self._add_products(pieces, weight)
        return False

    def add_rows(self, rows: Tensor, weight: float) -> None:
        """Those of some columns, shape (m, k)."""
        self.matrix.addmm_(rows, rows.T, alpha=weight)

    def fits(self, numbers: float) -> bool:
        """Whether there is room for so many."""
        return numbers * self.matrix.element_size() <= self.budget

    def require(self, numbers: float, what: str) -> None:
        """Raise unless there is."""
        if not self.fits(numbers):
            size = self.matrix.element_size()
            beside = 3 * self.matrix.numel() * size
            raise TooLargeError(
                f"memory must be at least {numbers * size + beside:.2e} bytes for {what} and the matrix, got"
                f" {self.budget + beside:.2e}."
            )

    def _is_ghost_cheaper(self, pieces: Sequence[Piece]) -> bool:
        """By multiply-adds, and passes over the matrix."""
        groups, o, i = pieces[0].spot.shape
        formed = len(self.matrix) ** 2 * o * i + sum(p.count * p.positions for p in pieces) * o * i
        factored = 0
        for first, second in combinations_with_replacement(pieces, 2):
            assert first.left is not None and second.left is not None
            pairs = first.positions * second.positions
            if first is second:
                pairs = (pairs + first.positions) // 2
            products = len(first.left) * len(second.left) * o + len(first.right) * len(second.right) * i
            factored += pairs * (products + PASS * first.count * second.count)
        return factored <= formed

    def _add_products(self, pieces: Sequence[Piece], weight: float) -> None:
        """``(L_t L_t'^T) * (R_t R_t'^T)`` over all pairs of positions, each once, and mirrored."""
        for first, second in combinations_with_replacement(pieces, 2):
            block = self.matrix[first.rows, second.rows]
            mirror = self.matrix[second.rows, first.rows].T
            samples = (first.samples, second.samples)
            for t, s, g in product(*map(range, (first.positions, second.positions, first.right.shape[2]))):
                if first is second and s < t:
                    continue
                factors = [
                    self._inner(x[:, t, g], y[:, s, g])
                    for x, y in ((first.left, second.left), (first.right, second.right))
                    if x is not None and y is not None
                ]
                _accumulate(block, factors, samples, weight)
                if first is not second or s != t:
                    _accumulate(mirror, factors, samples, weight)

    def _inner(self, x: Tensor, y: Tensor) -> Tensor:
        """``x y^T``, where integers stand for rows of the identity matrix."""
        key = (identity(x), identity(y))
        for known in self._known:
            if known[0] == key:
                return known[-1]
        if x.is_floating_point():
            result = x @ y.T if y.is_floating_point() else x[:, y]
        else:
            result = y[:, x].T if y.is_floating_point() else (x[:, None] == y).to(self.matrix.dtype)
        self._known = [*self._known[-1:], (key, x, y, result)]
        return result

    def _add_columns(self, pieces: Sequence[Piece], weight: float) -> None:
        """The rows of pieces with one place, as many columns at a time as fit."""
        groups, o, i = pieces[0].spot.shape
        m, columns = len(self.matrix), i if groups == 1 else o * i
        # They are copied to be multiplied.
        self.require(2 * m * columns, f"{columns} columns of the Jacobian")
        count = max(1, int(self.budget // (2 * m * columns * self.matrix.element_size())))
        for start in range(0, o if groups == 1 else groups, count):
            some, every = slice(start, start + count), slice(None)
            parts = [p.dense(*((every, some) if groups == 1 else (some, every))).flatten(1) for p in pieces]
            rows = self.matrix.new_zeros(m, parts[0].shape[1])
            for piece, part in zip(pieces, parts, strict=True):
                rows[piece.rows] += part
            self.add_rows(rows, weight)

    def _add_scattered(self, pieces: Sequence[Piece], entries: int, weight: float) -> None:
        """The rows of pieces that overlap in the parameter."""
        m = len(self.matrix)
        self.require(2 * m * entries, f"the {m} x {entries} Jacobian of one parameter")
        rows = self.matrix.new_zeros(m, entries)
        for piece in pieces:
            scatter(rows[piece.rows], piece.spot).add_(piece.dense().view(-1, *piece.spot.shape))
        self.add_rows(rows, weight)


def identity(x: Tensor) -> Any:
    """What two tensors that live at the same time have in common where they are one in memory."""
    return x.data_ptr(), x.dtype, x.shape, *strides(x)


def scatter(rows: Tensor, spot: Tensor) -> Tensor:
    """What a spot takes of parameters in the last dimension: a view of shape (..., *spot)."""
    lead = rows.ndim - 1
    return rows.as_strided(
        (*rows.shape[:lead], *spot.shape),
        (*rows.stride()[:lead], *spot.stride()),
        rows.storage_offset() + spot.storage_offset(),
    )


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """One piece an output, with the sum of their rows."""
    joined: dict[int, Piece] = {}
    for piece in pieces:
        other = joined.get(piece.rows.start)
        joined[piece.rows.start] = piece if other is None else piece._replace(right=piece.right + other.right)
    return list(joined.values())


def _accumulate(block: Tensor, factors: Sequence[Tensor], samples: tuple[int, int], weight: float) -> None:
    """Add the entry-wise product of one or two factors, each for every row or every sample of both sides."""
    block, *factors = (x.unflatten(0, (samples[0], -1)).unflatten(2, (samples[1], -1)) for x in (block, *factors))
    if len(factors) == 1:
        block.add_(factors[0], alpha=weight)
    else:
        block.addcmul_(*factors, value=weight)
