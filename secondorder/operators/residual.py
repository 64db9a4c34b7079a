"""The Jacobian of residuals: ``A`` with ``A^T A`` a Gauss-Newton matrix, not of squares alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from secondorder.operators.curvature import GaussNewton
from secondorder.operators.gram import gram
from secondorder.operators.linear import LinearOperator
from secondorder.operators.output_blocks import Blocks, OutputHessian
from secondorder.operators.rows import rows
from secondorder.vectors.flat import Layout
from secondorder.vectors.host import read, waits

# Of the largest eigenvalue, in units of rounding: what is below is zero, what is below minus the other
# negative.
ZERO, NEGATIVE = 1, 64
# Of a matrix, while it is decomposed.
COPIES = 3


class SquareRoot(NamedTuple):
    """``S`` with ``S S^T`` a block-diagonal matrix in the space of one tensor of outputs.

    Attributes:
        shape: Of the outputs.
        dims: Their dimensions that lie in a block, counted from the last.
        vectors: Eigenvectors of the blocks as columns, shape (number, k, k).
        roots: Square roots of the eigenvalues, zero where these are rounding, shape (number, k).
        is_none: Whether there is no such root, as the blocks are not positive semidefinite, or not finite;
            a condition on the device.
    """

    shape: torch.Size
    dims: tuple[int, ...]
    vectors: Tensor
    roots: Tensor
    is_none: Tensor

    @classmethod
    def of(cls, blocks: Blocks, shape: torch.Size) -> SquareRoot:
        """Of positive semidefinite blocks."""
        matrices, k = blocks.matrices, blocks.matrices.shape[1]
        eps = torch.finfo(matrices.dtype).eps
        if k == 1:
            values, vectors = matrices[:, :, 0], torch.ones_like(matrices)
        else:
            waits(matrices)
            values, vectors = torch.linalg.eigh((matrices + matrices.mT).double() / 2)  # waits: once a step
        # A gradient over a root that is smaller would drown the others.
        bound = eps * k * (values.abs().max() if values.numel() else 0.0)
        is_none = (values < -NEGATIVE * bound).any() | ~values.isfinite().all()
        roots = torch.where(values > ZERO * bound, values, 0.0).sqrt()
        dims = tuple(dim - len(shape) for dim in blocks.dims)
        return cls(shape, dims, vectors.to(matrices), roots.to(matrices), is_none)

    def transposed(self, U: Tensor) -> Tensor:
        """``S^T`` times a batch shaped like the outputs: shape (batch, rows)."""
        parts = self._parted(U)
        if self.roots.shape[1] == 1:
            return (parts * self.roots).flatten(1)
        return torch.einsum("bnk,nkj->bnj", parts, self.vectors * self.roots.unsqueeze(1)).flatten(1)

    def times(self, W: Tensor) -> Tensor:
        """``S`` times a batch of shape (batch, rows): shaped like the outputs."""
        parts = W.unflatten(1, self.roots.shape)
        if self.roots.shape[1] == 1:
            parts = parts * self.roots
        else:
            parts = torch.einsum("bnj,nkj->bnk", parts, self.vectors * self.roots.unsqueeze(1))
        others = [size for i, size in enumerate(self.shape) if i - len(self.shape) not in self.dims]
        moved = parts.reshape(len(W), *others, *(self.shape[dim] for dim in self.dims))
        return moved.movedim(tuple(range(-len(self.dims), 0)), self.dims)

    def solved(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The least ``c`` that minimises ``norm(S c - u)``, shape (rows,), and ``u - S c``."""
        parts = self._parted(u.unsqueeze(0))
        if self.roots.shape[1] > 1:
            parts = torch.einsum("bnk,nkj->bnj", parts, self.vectors)
        kept = self.roots > 0
        inside = torch.where(kept, parts / torch.where(kept, self.roots, 1.0), 0.0).flatten(1)
        outside = torch.where(kept, 0.0, parts)
        return inside[0], self._replace(roots=torch.ones_like(self.roots)).times(outside.flatten(1))[0]

    def _parted(self, U: Tensor) -> Tensor:
        """In parts of shape (batch, number, k)."""
        moved = U.movedim(self.dims, tuple(range(-len(self.dims), 0)))
        return moved.reshape(len(U), *self.roots.shape)


class SquareRoots:
    """``S`` of all outputs, on flat vectors.

    Args:
        roots: Of each tensor of outputs; an attribute too.
        outputs: These.
    """

    def __init__(self, roots: Sequence[SquareRoot], outputs: Sequence[Tensor]) -> None:
        self.roots, self._outputs = roots, Layout(outputs)
        self._sizes = [root.roots.numel() for root in roots]

    @property
    def is_by_sample(self) -> bool:
        """Whether the first dimension of the only tensor is in no block."""
        return len(self.roots) == 1 and -len(self.roots[0].shape) not in self.roots[0].dims

    def transposed(self, Z: Tensor) -> Tensor:
        """``S^T`` times vectors in the space of outputs, as rows."""
        pairs = zip(self.roots, self._outputs.unflatten_rows(Z), strict=True)
        return torch.cat([root.transposed(part) for root, part in pairs], dim=1)

    def times(self, W: Tensor) -> Tensor:
        """``S`` times vectors in the space of residuals, as rows."""
        pairs = zip(self.roots, W.split(self._sizes, dim=1), strict=True)
        return torch.cat([root.times(part).flatten(1) for root, part in pairs], dim=1)

    def solved(self, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The least ``c`` that minimises ``norm(S c - u)``, and ``u - S c``, for ``u`` in parts."""
        pairs = [root.solved(part) for root, part in zip(self.roots, parts, strict=True)]
        return torch.cat([c for c, _ in pairs]), torch.cat([rest.flatten() for _, rest in pairs])


class ResidualJacobian(LinearOperator):
    """``A = S^T J``, shape (m, n): its Gram matrix ``A^T A`` is a Gauss-Newton matrix ``J^T S S^T J``.

    For a sum of squares ``A`` is the Jacobian of the residuals; for other losses, as cross-entropy, that of
    residuals which have the same curvature here.

    Args:
        operator: The matrix; each of its losses is a function of one tensor of outputs.
        roots: ``S``.
        memory: Bytes that the matrix, or its Gram matrix, may take with what makes it.

    Attributes:
        roots: As given.
        target: ``c``, shape (m,): ``-A^T c`` is the gradient of the losses, as far as their Hessian reaches.
        rest: Minus the gradient with respect to the outputs where it does not, flat; None for none.
        is_none: Whether ``S`` is not what it should be: the losses are not convex.
        passes: Backward passes that make the matrix.
        memory: As given.

    Cost: a product is one with ``J``, of the transpose one with ``J^T``.

    Reference: Martens (2020), New insights and perspectives on the natural gradient method, section 8, for
        square roots of a loss's Hessian.
    """

    is_symmetric = False

    # Of the columns.
    _factor: float | Tensor = 1.0
    # Without it, once it was formed.
    _matrix: Tensor | None = None

    def __init__(self, operator: GaussNewton, roots: SquareRoots, memory: float = 2.0**32) -> None:
        self.jacobian, self.roots, self.memory = operator.jacobian, roots, memory
        super().__init__(self.jacobian.shape, self.jacobian.dtype, self.jacobian.device)
        self.target, rest = roots.solved([-gradient for gradient in operator.output_gradients])
        # One read for all that the numbers say.
        has_rest, *are_none = read(rest.any(), *(root.is_none for root in roots.roots))
        self.rest, self.is_none = (rest if has_rest else None), any(are_none)
        self.passes = min(self.shape)

    @classmethod
    def of(cls, operator: GaussNewton, memory: float = 2.0**32) -> ResidualJacobian | None:
        """That of a Gauss-Newton matrix.

        None where a loss couples more outputs than a block may have, is not convex, or is one of none or of
        several tensors; and where outputs and parameters differ in precision.
        """
        places = operator.output_hessians()
        if not places or operator.jacobian.is_mixed:
            return None
        roots: list[SquareRoot] = []
        for gradient, outputs in places:
            if not gradient.numel():
                return None
            blocks = OutputHessian(gradient, outputs).blocks()
            if blocks is None:
                return None
            roots.append(SquareRoot.of(blocks, gradient.shape))
        found = cls(operator, SquareRoots(roots, operator.jacobian.outputs), memory)
        return None if found.is_none else found

    @property
    def fits(self) -> bool:
        """Whether there is room for the matrix, and for decomposing it."""
        return COPIES * self.shape[0] * self.shape[1] * self.dtype.itemsize <= self.memory

    def scaled(self, factor: float | Tensor) -> ResidualJacobian:
        """``A diag(factor)``, for a number or a vector of shape (n,)."""
        scaled = copy.copy(self)
        scaled._factor = factor * self._factor
        return scaled

    def weighted(self, z: Tensor) -> Tensor:
        """``S^T z``, shape (m,), for a vector in the space of outputs."""
        return self.roots.transposed(z.unsqueeze(0))[0]

    def pulled(self, z: Tensor) -> Tensor:
        """``J^T z``, with scaled columns, shape (n,), for a vector in the space of outputs."""
        return self._factor * (self.jacobian.T @ z)

    def dense(self, chunk_size: int = 128) -> Tensor:
        """The matrix, by ``rows``."""
        if self._matrix is None:
            found = rows(self.jacobian, memory=self.memory)
            self.passes, self._matrix = found.passes, self.roots.transposed(found.matrix.T).T
        return (
            self._matrix
            if isinstance(self._factor, float) and self._factor == 1
            else self._matrix * self._factor
        )

    def gram(self) -> Tensor:
        """``A A^T``, shape (m, m): by ``gram``, without ``A``, where its columns are scaled by parameter."""
        weights = _weights(self._factor, self.jacobian.parameters)
        if weights is None:
            A = self.dense()
            return A @ A.T
        found = gram(self.jacobian, weights, memory=self.memory)
        self.passes = found.passes
        half = self.roots.transposed(found.matrix.to(self.dtype)).T
        return self.roots.transposed(half)

    def _matvec(self, v: Tensor) -> Tensor:
        return self.weighted(self.jacobian @ (self._factor * v))

    def _matmat(self, V: Tensor) -> Tensor:
        return self.roots.transposed((self.jacobian @ (_column(self._factor) * V)).T).T

    def _rmatvec(self, u: Tensor) -> Tensor:
        return self.pulled(self.roots.times(u.unsqueeze(0))[0])

    def _rmatmat(self, U: Tensor) -> Tensor:
        return _column(self._factor) * (self.jacobian.T @ self.roots.times(U.T).T)


def _column(factor: float | Tensor) -> float | Tensor:
    return factor.unsqueeze(1) if isinstance(factor, Tensor) else factor


def _weights(factor: float | Tensor, parameters: Sequence[Tensor]) -> list[float] | None:
    """Squared factors of the parameters; None where entries of one differ."""
    if not isinstance(factor, Tensor):
        return [factor**2] * len(parameters)
    parts = factor.split([p.numel() for p in parameters])
    # Of no entries, one that is not there.
    found = [end for part in parts for end in torch.aminmax(part if len(part) else factor[:1])]
    ends = read(*found)
    return [low**2 for low in ends[::2]] if ends[::2] == ends[1::2] else None
