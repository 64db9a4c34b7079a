"""Second-order optimizers for PyTorch: swap in where ``torch.optim.LBFGS`` or ``Adam`` stood."""

from optim.functions.curve_fit import curve_fit
from optim.functions.least_squares import LeastSquaresResult, least_squares
from optim.functions.minimize import minimize
from optim.functions.results import OptimizeResult
from optim.functions.root import root
from optim.optimizers.gauss_newton import GaussNewton
from optim.optimizers.hessian_free import HessianFree
from optim.optimizers.newton import Newton
from optim.optimizers.report import StepReport

__all__ = [
    # optimizers
    "Newton",
    "HessianFree",
    "GaussNewton",
    # functional front ends
    "minimize",
    "least_squares",
    "curve_fit",
    "root",
    "OptimizeResult",
    "LeastSquaresResult",
    # what a step did
    "StepReport",
]
