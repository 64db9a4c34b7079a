"""Second-order products, operators, solvers and influence functions for PyTorch."""

from secondorder.curvature import Block, GaussNewton, Hessian
from secondorder.functional import hessian, hvp, jacobian, jvp, vhp, vjp
from secondorder.influence import InfluenceResult, influence
from secondorder.operators import FunctionOperator, LinearOperator, MatrixOperator
from secondorder.solvers import SolveResult, Spectrum, cg, direct, spectrum, steihaug, trust_region

__all__ = [
    # products and matrices of functions
    "vjp",
    "jvp",
    "vhp",
    "hvp",
    "jacobian",
    "hessian",
    # operators
    "LinearOperator",
    "FunctionOperator",
    "MatrixOperator",
    "Hessian",
    "GaussNewton",
    "Block",
    # influence functions
    "influence",
    "InfluenceResult",
    # solvers
    "SolveResult",
    "cg",
    "steihaug",
    "direct",
    "trust_region",
    "spectrum",
    "Spectrum",
]
