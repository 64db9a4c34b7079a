"""Whether a Hessian in the space of outputs is positive semidefinite: its blocks are factored."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from secondorder.operators.output_blocks import PROBE, Blocks

# Multiples of the rounding of a number. In single precision the smallest eigenvalues of the blocks of cross
# entropies, written by hand, were above -1 of the largest entry.
LOCAL, GLOBAL = 10, 4


def is_semidefinite(blocks: Blocks, bend: float = 0.0, slope: Tensor | None = None) -> bool:
    """Whether ``blocks + bend slope slope^T`` is positive semidefinite, up to rounding.

    Where ``bend`` is negative: whether ``-bend slope^T blocks^-1 slope <= 1``.
    """
    matrices, eps = blocks.matrices, torch.finfo(blocks.matrices.dtype).eps
    k = matrices.shape[1]
    sizes = matrices.abs().amax((1, 2), keepdim=True)
    # Not zero where all is.
    rounding = (LOCAL * (k + 10) * sizes + GLOBAL * sizes.max()) * eps + torch.finfo(matrices.dtype).tiny
    is_symmetric = ((matrices - matrices.mT).abs() <= PROBE * eps * sizes.max()).all()
    factors, is_positive = _factored((matrices + matrices.mT) / 2, rounding)
    if not bool(is_symmetric & is_positive):
        return False
    if not bend < 0 or slope is None:
        return bend >= 0
    solved = torch.linalg.solve_triangular(factors, blocks.rows(slope).unsqueeze(2), upper=False)
    return -bend * float(solved.square().sum()) <= 1 + math.sqrt(eps)


def _factored(matrices: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """The lower factors of shifted symmetric matrices, and whether all of these are positive definite."""
    if matrices.shape[1] == 1:
        # A factorization for each number takes long.
        return (matrices + shift).sqrt(), (matrices + shift > 0).all()
    eye = torch.eye(matrices.shape[1], dtype=matrices.dtype, device=matrices.device)
    factors, info = torch.linalg.cholesky_ex(matrices + shift * eye)
    return factors, (info == 0).all()
