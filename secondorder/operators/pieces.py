"""Rows of a Jacobian in factors, one piece for each use of a parameter, and the sum of their inner products.

With ``J[r] = sum_t left[r, t] right[r, t]^T`` that is ``sum_tt' (L_t L_t'^T) * (R_t R_t'^T)``. Where it is
dearer than the rows themselves, these are formed, for one parameter, and some of its columns, at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations_with_replacement, product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secondorder.autodiff.backward import pull_rows
from secondorder.autodiff.graph import Place
from secondorder.operators.layers import Factors

# Gradients in one batched backward pass.
WIDTH = 128
# Blocks in which half of a symmetric product is left out, and its time then.
BLOCKS, HALF = 8, 0.65
# Multiply-adds in the time of a pass over the matrix, for each entry; measured on one CPU thread.
PASS = 24


class TooLargeError(RuntimeError):
    """The matrix, or what it is computed from, does not fit the memory that was allowed."""


class Piece(NamedTuple):
    """Rows of one output's Jacobian with respect to what one node takes of a parameter.

    For each of C entries of a sample and each of N samples: ``sum_t left[c, n, t, g] right[c, n, t, g]^T``.

    Attributes:
        start: The first of the rows, which are in this order, among those of all outputs.
        left: Shape (C or 1, N, T, G, o), or integers of shape (1, N, T, G, 1), or None: see ``Factors``.
        right: Shape (C or 1, N, T, G, i).
        spot: As in ``Factors``; its strides fall where ``left`` is no integers.
        size: Norm of the rows as if nothing cancelled in sums over T, a scalar.
        base: As in ``Use``.
    """

    start: int
    left: Tensor | None
    right: Tensor
    spot: Tensor
    size: Tensor
    base: Place | None = None

    @classmethod
    def of(cls, found: Factors, start: int, samples: int, is_minor: bool, dtype: torch.dtype) -> Piece | None:
        """The rows that the positions of a use belong to; None where these are not those of samples.

        Args:
            found: Of the use.
            start: As above.
            samples: Their number.
            is_minor: Whether positions that are neighbours belong to different samples, not to one.
            dtype: Of the rows.
        """
        if found.positions % samples or (is_minor and found.is_by_sample):
            return None
        right = _by_samples(found.right.to(dtype), samples, is_minor)
        if found.left is None:
            size = torch.linalg.vector_norm(right)
            right = right.sum(2, keepdim=True) if right.shape[2] > 1 else right
            return cls(start, None, right, found.spot, size)
        left = found.left.to(dtype) if found.left.is_floating_point() else found.left
        left = _by_samples(left, samples, is_minor)
        size = (_squares(left) * _squares(right)).sum().sqrt()
        steps = strides(found.spot)
        if left.is_floating_point() and steps[1] < steps[2]:
            return cls(start, right, left, found.spot.transpose(1, 2), size)
        return cls(start, left, right, found.spot, size)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``C``, ``N`` and ``T``."""
        count, samples, positions = self.right.shape[:3]
        return max(count, 1 if self.left is None else len(self.left)), samples, positions

    @property
    def rows(self) -> slice:
        """Among those of all outputs."""
        return slice(self.start, self.start + self.shape[0] * self.shape[1])

    @property
    def place(self) -> tuple[Any, ...]:
        """Which entries of the parameter it has, in what order: equal for pieces that fit each other."""
        dims = list(zip(self.spot.shape, strides(self.spot), strict=True))
        if self.left is None:
            dims = [pair for pair in dims if pair[0] > 1]
        return self.left is None, self.spot.storage_offset(), *dims

    def pulled(self, v: Tensor) -> Tensor:
        """``J^T v`` for ``v`` of shape (rows,), shaped like ``spot``."""
        left, right = self.left, self.right
        v = v.view(*self.shape[:2], 1, 1, 1)
        if left is None:
            return (v * right).sum((0, 1)).view(self.spot.shape)
        if len(right) == len(v):
            right = (right * v).sum(0)
            left = left[0]
        else:
            left = (left * v).sum(0)
            right = right[0]
        right = right.movedim(2, 0).flatten(1, 2)
        if not left.is_floating_point():
            rows = right.new_zeros(self.spot.shape[1:])
            return rows.index_add_(0, left.flatten(), right[0])[None]
        return left.movedim(2, 0).flatten(1, 2).mT @ right

    def dense(self, groups: slice = slice(None), entries: slice = slice(None)) -> Tensor:
        """The rows, of some groups and entries of ``left``: shape (rows, G, o, i), or (rows, *spot)."""
        if self.left is None:
            return self.right.reshape(-1, *self.spot.shape)
        left, right = self.left[..., groups, :], self.right[..., groups, :]
        if left.is_floating_point():
            left = left[..., entries]
        else:
            left = (left == torch.arange(self.spot.shape[1], device=left.device)[entries]).to(right.dtype)
        return torch.einsum("cntgo,cntgi->cngoi", left, right).flatten(0, 1)


def _by_samples(factor: Tensor, samples: int, is_minor: bool) -> Tensor:
    """Shape (c, *positions, G, o) to (c, N, T, G, o), most often a view."""
    shape = (-1, samples) if is_minor else (samples, -1)
    split = factor.reshape(len(factor), *shape, *factor.shape[-2:])
    return split.transpose(1, 2) if is_minor else split


def _squares(factor: Tensor) -> Tensor:
    """Of the norms at each position."""
    return factor.square().sum(-1) if factor.is_floating_point() else torch.ones_like(factor[..., 0])


def strides(x: Tensor) -> list[int]:
    """Zero along dimensions of one entry."""
    return [stride if size > 1 else 0 for size, stride in zip(x.shape, x.stride(), strict=True)]


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


class Total:
    """The sum so far.

    Args:
        matrix: Shape (m, m), zeros. What it holds above the diagonal is not to be read.
        budget: Bytes that may be allocated beside it, and beside two more of its size.
    """

    def __init__(self, matrix: Tensor, budget: float) -> None:
        self.matrix = matrix
        self.budget = budget
        # The last two inner products, with what they are of: a bias takes that of its weight.
        self._known: list[tuple[Any, Tensor, Tensor, Tensor]] = []

    def add(self, pieces: Sequence[Piece], parameter: Tensor, weight: float) -> bool:
        """The rows of one parameter; whether they were formed."""
        if len({piece.place for piece in pieces}) > 1 or any(piece.base for piece in pieces):
            self._add_scattered(pieces, parameter, weight)
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
        _add_square(self.matrix, rows, weight)

    def whole(self, index: Tensor) -> Tensor:
        """The sum, its row and column ``k`` from those at ``index[k]``; the end of this object."""
        self._known.clear()
        for start, stop in _steps(len(self.matrix)):
            self.matrix[start:stop, stop:] = self.matrix[stop:, start:stop].T
            block = self.matrix[start:stop, start:stop].tril_()
            block += block.tril(-1).T
        return self.matrix[index[:, None], index]

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
        """By multiply-adds, and passes over the matrix; for each group, of which both have as many."""
        _, o, i = pieces[0].spot.shape
        m, formed, factored = len(self.matrix), 0.0, 0.0
        for first, second in combinations_with_replacement(pieces, 2):
            assert first.left is not None
            assert second.left is not None
            (c, n, t), (d, k, s) = first.shape, second.shape
            pairs, passes = float(t * s), t * s
            if first is second:
                formed += c * n * t * o * i
                pairs, passes = HALF * t + t * (t - 1) / 2, t * t
            elif first.start == second.start:
                passes *= 2
            products = len(first.left) * len(second.left) * o + len(first.right) * len(second.right) * i
            factored += n * k * (pairs * products + passes * PASS * c * d)
        formed += HALF * m * m * o * i
        return factored <= formed

    def _add_products(self, pieces: Sequence[Piece], weight: float) -> None:
        """``(L_t L_t'^T) * (R_t R_t'^T)`` over all pairs of positions, each once, and mirrored."""
        # In this order blocks lie below the diagonal, or on it.
        ordered = sorted(pieces, key=lambda piece: -piece.start)
        for first, second in combinations_with_replacement(ordered, 2):
            block = self.matrix[first.rows, second.rows]
            samples = first.shape[1], second.shape[1]
            for t, s, g in product(*map(range, (first.shape[2], second.shape[2], first.right.shape[3]))):
                if first is second and s < t:
                    continue
                is_square = first is second and s == t
                parts = [
                    self._inner(
                        x[:, :, t, g].flatten(0, 1),
                        y[:, :, s, g].flatten(0, 1),
                        is_square and x.shape[:2] == first.shape[:2],
                    )
                    for x, y in ((first.left, second.left), (first.right, second.right))
                    if x is not None and y is not None
                ]
                _accumulate(block, parts, samples, weight)
                if first.start == second.start and not is_square:
                    _accumulate(block.T, parts, samples, weight)
                parts.clear()

    def _inner(self, x: Tensor, y: Tensor, is_square: bool) -> Tensor:
        """``x y^T``, where integers, of shape (k, 1), stand for rows of the identity matrix.

        Args:
            x: Shape (k, d).
            y: Shape (l, d).
            is_square: Whether both are one and what is above the diagonal is not needed.
        """
        key = (identity(x), identity(y), is_square)
        for known in self._known:
            if known[0] == key:
                return known[-1]
        self._known = self._known[-1:]
        if is_square and x.is_floating_point():
            result = x.new_empty(len(x), len(x))
            _add_square(result, x, 1.0, beta=0)
        elif x.is_floating_point():
            result = x @ y.T if y.is_floating_point() else x[:, y[:, 0]]
        else:
            result = y[:, x[:, 0]].T if y.is_floating_point() else (x == y.T).to(self.matrix.dtype)
        self._known.append((key, x, y, result))
        return result

    def _add_columns(self, pieces: Sequence[Piece], weight: float) -> None:
        """The rows of pieces with one place, as many columns at a time as fit."""
        groups, o, i = pieces[0].spot.shape
        m, every = len(self.matrix), slice(None)
        # In units of one entry of ``left``, or of one group.
        units, columns = (o, i) if groups == 1 else (groups, o * i)
        # They are copied to be multiplied.
        self.require(2 * m * columns, f"{columns} columns of the Jacobian")
        count = max(1, int(self.budget // (2 * m * columns * self.matrix.element_size())))
        for start in range(0, units, count):
            some = slice(start, min(start + count, units))
            rows = self.matrix.new_zeros(m, (some.stop - start) * columns)
            for piece in pieces:
                part = piece.dense(every, some) if groups == 1 else piece.dense(some)
                rows[piece.rows] += part.flatten(1)
            self.add_rows(rows, weight)

    def _add_scattered(self, pieces: Sequence[Piece], parameter: Tensor, weight: float) -> None:
        """The rows of pieces that have different entries, an order of their own, or another base."""
        m, entries = len(self.matrix), parameter.numel()
        most = max([0, *[piece.base.like.numel() for piece in pieces if piece.base]])
        self.require(2 * m * (entries + most), f"the {m} x {entries} Jacobian of one parameter")
        rows = self.matrix.new_zeros(m, entries)
        add_pieces(rows, pieces, parameter)
        self.add_rows(rows, weight)


def add_pieces(rows: Tensor, pieces: Sequence[Piece], parameter: Tensor) -> None:
    """Add the pieces of a parameter to its rows, shape (m, entries)."""
    groups: dict[Any, list[Piece]] = {}
    for piece in pieces:
        groups.setdefault(piece.base and piece.base.edge, []).append(piece)
    for some in groups.values():
        base = some[0].base
        target = rows if base is None else rows.new_zeros(len(rows), base.like.numel())
        for piece in some:
            scatter(target[piece.rows], piece.spot).add_(piece.dense())
        if base is not None:
            rows += pulled_back(base, parameter, target)


def pulled_back(base: Place, parameter: Tensor, rows: Tensor) -> Tensor:
    """Derivatives with respect to what is computed from a parameter, shape (k, size), to that of it."""
    parts = [
        pull_rows([base], [parameter], [some.view(-1, *base.like.shape).to(base.like.dtype)])[0]
        for some in rows.split(WIDTH)
    ]
    return torch.cat(parts).reshape(len(rows), -1).to(rows.dtype)


def _add_square(matrix: Tensor, rows: Tensor, weight: float, beta: int = 1) -> None:
    """Add ``rows rows^T``, below the diagonal, to the matrix or, where ``beta`` is 0, to nothing."""
    for start, stop in _steps(len(rows)):
        matrix[start:stop, :stop].addmm_(rows[start:stop], rows[:stop].T, beta=beta, alpha=weight)


def _steps(size: int) -> Iterator[tuple[int, int]]:
    """Where each of some blocks begins and ends."""
    step = max(1, -(-size // BLOCKS))
    return ((start, min(start + step, size)) for start in range(0, size, step))


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """One piece an output, with the sum of their rows."""
    joined: dict[int, Piece] = {}
    for piece in pieces:
        other = joined.get(piece.start)
        joined[piece.start] = piece if other is None else piece._replace(right=piece.right + other.right)
    return list(joined.values())


def _accumulate(block: Tensor, factors: Sequence[Tensor], samples: tuple[int, int], weight: float) -> None:
    """Add the entry-wise product of one or two factors, of all rows or one for each sample, on both sides."""
    target, *parts = (
        x.unflatten(0, (-1, samples[0])).unflatten(2, (-1, samples[1])) for x in (block, *factors)
    )
    if len(parts) == 1:
        target.add_(parts[0], alpha=weight)
    else:
        target.addcmul_(*parts, value=weight)
