"""Solvers: one algorithm a file. Each knows only ``A @ v``.

Those of linear systems return a ``SolveResult``.
"""

from secondorder.solvers._directions import CGState
from secondorder.solvers._result import STATUS_TEXT, SolveResult
from secondorder.solvers.block_cg import block_cg
from secondorder.solvers.cg import RelativeProgress, cg
from secondorder.solvers.cholesky import cholesky, modified_cholesky
from secondorder.solvers.diagonal import DiagonalResult, diagonal
from secondorder.solvers.direct import Spectrum, direct, spectrum
from secondorder.solvers.gltr import gltr
from secondorder.solvers.lanczos import EigenResult, eigsh
from secondorder.solvers.logdet import logdet
from secondorder.solvers.lsmr import lsmr
from secondorder.solvers.minres import minres
from secondorder.solvers.precondition import (
    DiagonalPreconditioner,
    NystromPreconditioner,
    diagonal_preconditioner,
    nystrom,
)
from secondorder.solvers.quadrature import SpectralDensity, spectral_density
from secondorder.solvers.steihaug import steihaug
from secondorder.solvers.trace import TraceResult, trace
from secondorder.solvers.trust_region import trust_region

__all__ = [
    # results
    "STATUS_TEXT",
    "CGState",
    "RelativeProgress",
    "SolveResult",
    "Spectrum",
    # iterative
    "cg",
    "block_cg",
    "minres",
    "lsmr",
    # trust region
    "steihaug",
    "gltr",
    "trust_region",
    # direct
    "cholesky",
    "modified_cholesky",
    "direct",
    "spectrum",
    # eigenvalues, traces, determinants
    "EigenResult",
    "eigsh",
    "SpectralDensity",
    "spectral_density",
    "TraceResult",
    "trace",
    "logdet",
    "DiagonalResult",
    "diagonal",
    # preconditioners
    "DiagonalPreconditioner",
    "diagonal_preconditioner",
    "NystromPreconditioner",
    "nystrom",
]


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
