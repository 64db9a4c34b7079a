"""Second-order products, operators, solvers and influence functions for PyTorch."""

import importlib
from typing import Any

from secondorder.data.objective import Objective
from secondorder.functional import hessian, hvp, jacobian, jvp, vhp, vjp
from secondorder.functional.gauss_newton import fvp, ggnvp
from secondorder.influence.influence import Influence
from secondorder.influence.result import InfluenceResult
from secondorder.influence.scores import influence
from secondorder.operators.curvature import Block, GaussNewton, Hessian
from secondorder.operators.fisher import EmpiricalFisher, Fisher
from secondorder.operators.linear import LinearOperator
from secondorder.operators.matrix import FunctionOperator, MatrixOperator
from secondorder.operators.parameters import Jacobian
from secondorder.plots import plot
from secondorder.solvers import (
    DiagonalPreconditioner,
    DiagonalResult,
    EigenResult,
    NystromPreconditioner,
    SolveResult,
    SpectralDensity,
    Spectrum,
    TraceResult,
    block_cg,
    cg,
    cholesky,
    diagonal,
    diagonal_preconditioner,
    direct,
    eigsh,
    gltr,
    logdet,
    lsmr,
    minres,
    modified_cholesky,
    nystrom,
    spectral_density,
    spectrum,
    steihaug,
    trace,
    trust_region,
)

__version__ = "0.1.0.dev0"

__all__ = [
    # products and matrices of functions
    "vjp",
    "jvp",
    "vhp",
    "hvp",
    "ggnvp",
    "fvp",
    "jacobian",
    "hessian",
    # operators
    "LinearOperator",
    "FunctionOperator",
    "MatrixOperator",
    "Hessian",
    "GaussNewton",
    "Block",
    "Fisher",
    "EmpiricalFisher",
    "Jacobian",
    # a model over a dataset
    "Objective",
    # influence functions
    "Influence",
    "influence",
    "InfluenceResult",
    # solvers
    "SolveResult",
    "cg",
    "block_cg",
    "minres",
    "lsmr",
    "steihaug",
    "gltr",
    "trust_region",
    "cholesky",
    "modified_cholesky",
    "direct",
    "spectrum",
    "Spectrum",
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
    # pictures of runs
    "plot",
]


def __getattr__(name: str) -> Any:
    """``secondorder.optim``, which imports this package, is loaded when it is asked for."""
    if name == "optim":
        return importlib.import_module("secondorder.optim")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return sorted([*__all__, "__version__", "functional", "optim", "solvers"])
