"""Eigenvalue-corrected Kronecker factors of the Gauss-Newton matrix, by layer.

Reference: George et al. (2018), Fast approximate natural gradient descent in a Kronecker-factored eigenbasis;
Grosse et al. (2023), Studying large language model generalization with influence functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from secondorder.data.objective import Objective
from secondorder.influence.draws import Draws
from secondorder.operators.pieces import Piece, scatter

# Sides of a factor that is decomposed; longer ones are taken as diagonal.
LARGEST = 4096
# Entries of gradients by sample that are held at once.
ENTRIES = 2**24
# Of the mean eigenvalue: the shift where none is given and there is no L2 term, as in Grosse et al.
SHIFT = 0.1


class Block(NamedTuple):
    """Some entries of a parameter.

    Attributes:
        spot: Which, shape (G, o, i), or (1, 1, i) of what is no matrix.
        left: Eigenvectors of one factor as columns, shape (G, o, o); None where it is diagonal.
        right: Of the other, shape (G, i, i).
        values: Second moments of the gradients along them, shape (G, o, i).
    """

    spot: Tensor
    left: Tensor | None
    right: Tensor | None
    values: Tensor

    def rotate(self, X: Tensor, back: bool = False) -> Tensor:
        """Into the eigenbasis, or back, shape (k, G, o, i)."""
        for basis, dims in ((self.left, "kgoi,goa->kgai"), (self.right, "kgoi,gia->kgoa")):
            if basis is not None:
                X = torch.einsum(dims, X, basis.mT if back else basis)
        return X


class Ekfac:
    """``(EKFAC + shift I)^-1`` at the objective's present parameters.

    Args:
        objective: Of linear layers, convolutions, embeddings, norms: what is no weight matrix, such as a
            bias, has its own block of the matrix.
        share: Weight of a sample's loss in the objective.
        shift: L2 term and damping; None for a tenth of the mean eigenvalue.

    Attributes:
        shift: As used.
        blocks: Of each parameter.

    Raises:
        ValueError: a parameter is in other operations.

    Cost: two passes over the data, each of a forward pass and as many backward passes as a sample has
    residuals, or 8 where these are more than 32; an eigendecomposition of each factor.
    """

    @torch.no_grad()
    def __init__(self, objective: Objective, share: float, shift: float | None) -> None:
        self._sizes = [p.numel() for p in objective.parameters]
        n = sum(self._sizes)
        self.shape = (n, n)
        draws = Draws(objective, share)
        bases = _bases(draws, len(self._sizes))
        self.blocks = _corrected(draws, bases)
        if shift is None:
            total = sum(float(block.values.sum()) for own in self.blocks for block in own)
            shift = SHIFT * total / n
        highest = max((float(block.values.max()) for own in self.blocks for block in own), default=1.0)
        # Nothing is divided by zero.
        self.shift = shift or torch.finfo(objective.parameters[0].dtype).eps ** 0.5 * highest or 1.0

    @torch.no_grad()
    def __matmul__(self, v: Tensor) -> Tensor:
        rows = v.reshape(len(v), -1).T.contiguous()
        # For entries that no block has the matrix is zero.
        found = rows / self.shift
        parts = zip(rows.split(self._sizes, 1), found.split(self._sizes, 1), self.blocks, strict=True)
        for part, result, own in parts:
            for block in own:
                inner = block.rotate(scatter(part, block.spot)) / (block.values + self.shift)
                scatter(result, block.spot).copy_(block.rotate(inner, back=True))
        return found.T.reshape(v.shape)


def _bases(draws: Draws, count: int) -> list[list[Block]]:
    """From a pass over the data: eigenvectors of the factors of each block; no values yet."""
    sums: list[dict[object, _Factors]] = [{} for _ in range(count)]
    for every in draws.walk():
        for own, pieces in zip(sums, every, strict=True):
            for piece in pieces:
                spot = _spot(piece)
                place = (*spot.shape, *spot.stride(), spot.storage_offset())
                own.setdefault(place, _Factors(spot)).add(piece)
    return [_apart([found.block() for found in own.values()]) for own in sums]


def _apart(blocks: list[Block]) -> list[Block]:
    """As they are; where they share entries, as of tied weights, one diagonal block of all."""
    entries = [torch.unique(_entries(block.spot)) for block in blocks]
    if not blocks or len(torch.unique(torch.cat(entries))) == sum(map(len, entries)):
        return blocks
    size = 1 + int(torch.cat(entries).max())
    return [Block(torch.empty(1, 1, size, device="meta"), None, None, blocks[0].values.new_zeros(1, 1, size))]


def _entries(spot: Tensor) -> Tensor:
    steps = zip(spot.shape, spot.stride(), strict=True)
    size = int(1 + spot.storage_offset() + sum((n - 1) * step for n, step in steps))
    return scatter(torch.arange(size, device="cpu"), spot).flatten()


def _spot(piece: Piece) -> Tensor:
    """Of three dimensions; of no matrix, its entries in a row."""
    if piece.left is not None:
        return piece.spot
    sizes = [(n, step) for n, step in zip(piece.spot.shape, piece.spot.stride(), strict=True) if n > 1]
    if len(sizes) > 1:
        dense = torch.empty(piece.spot.shape, device="meta").stride()
        assert tuple(dense) == tuple(piece.spot.stride())
    step = sizes[-1][1] if sizes else 1
    flat = torch.empty(1, device="meta").as_strided((1, 1, piece.spot.numel()), (0, 0, step), 0)
    return flat.as_strided(flat.shape, flat.stride(), piece.spot.storage_offset())


class _Factors:
    """Second moments of what comes to a block from either side."""

    def __init__(self, spot: Tensor) -> None:
        self._spot = spot
        self._left: Tensor | None = None
        self._right: Tensor | None = None
        self._like: Tensor | None = None

    def add(self, piece: Piece) -> None:
        self._like = piece.right
        self._right = _plus(self._right, piece.right)
        if piece.left is not None and piece.left.is_floating_point():
            self._left = _plus(self._left, piece.left)

    def block(self) -> Block:
        assert self._like is not None
        left, right = (_eigenvectors(m, self._like) for m in (self._left, self._right))
        return Block(self._spot, left, right, self._like.new_zeros(self._spot.shape))


def _eigenvectors(moment: Tensor | None, like: Tensor) -> Tensor | None:
    """None where there is no moment, and the factor is diagonal."""
    # waits: eigenvectors, once for each layer.
    return None if moment is None or not len(moment) else torch.linalg.eigh(moment)[1].to(like)


def _plus(total: Tensor | None, factor: Tensor) -> Tensor:
    """With the sum over all positions, in double precision; empty where a side is too long."""
    if factor.shape[-1] > LARGEST:
        return factor.new_zeros(0)
    rows = factor.flatten(0, 2).movedim(1, 0)
    product = (rows.mT @ rows).double()
    return product if total is None else total + product


def _corrected(draws: Draws, bases: Sequence[Sequence[Block]]) -> list[list[Block]]:
    """Values from another pass: mean squares of the gradients by sample, in the bases."""
    for every in draws.walk():
        for blocks, pieces in zip(bases, every, strict=True):
            for block in blocks:
                own = [piece for piece in pieces if _is_of(piece, block, len(blocks))]
                if own:
                    _add_squares(block, own)
    return [list(blocks) for blocks in bases]


def _is_of(piece: Piece, block: Block, count: int) -> bool:
    spot = _spot(piece)
    is_same = (spot.shape, spot.stride(), spot.storage_offset()) == (
        block.spot.shape, block.spot.stride(), block.spot.storage_offset(),
    )  # fmt: skip
    return is_same or count == 1


def _add_squares(block: Block, pieces: Sequence[Piece]) -> None:
    size = block.spot.numel()
    for draw in range(max(piece.shape[0] for piece in pieces)):
        for some in _cuts(pieces[0].shape[1], max(1, ENTRIES // size)):
            total = block.values.new_zeros(some.stop - some.start, *block.spot.shape)
            for piece in pieces:
                gradients = _gradients(piece, draw, some)
                if _spot(piece).shape == block.spot.shape and _spot(piece).stride() == block.spot.stride():
                    total += gradients
                else:
                    scatter(total.flatten(1), _spot(piece)).add_(gradients)
            block.values.add_(block.rotate(total).square().sum(0))


def _cuts(n: int, width: int) -> Iterator[slice]:
    for start in range(0, n, width):
        yield slice(start, min(n, start + width))


def _gradients(piece: Piece, draw: int, some: slice) -> Tensor:
    """Of some samples, shape (samples, G, o, i)."""
    right = piece.right[draw if len(piece.right) > 1 else 0, some]
    if piece.left is None:
        return right.sum(1).reshape(len(right), 1, 1, -1)
    left = piece.left[draw if len(piece.left) > 1 else 0, some]
    if left.is_floating_point():
        return torch.einsum("ntgo,ntgi->ngoi", left, right)
    n, t, _, i = right.shape
    found = right.new_zeros(n, piece.spot.shape[1], i)
    places = left.reshape(n, t, 1).expand(n, t, i).long()
    return found.scatter_add_(1, places, right.reshape(n, t, i)).view(n, 1, -1, i)
