"""Second-order optimizers for PyTorch: swap in where ``torch.optim.LBFGS`` or ``Adam`` stood."""

from .functions.curve_fit import curve_fit
from .functions.least_squares import LeastSquaresResult, least_squares
from .functions.minimize import minimize
from .functions.results import OptimizeResult
from .functions.root import root
from .optimizers.gauss_newton import GaussNewton
from .optimizers.hessian_free import HessianFree
from .optimizers.newton import Newton
from .optimizers.progress import LogTo
from .optimizers.report import StepReport

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
    "LogTo",
]


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
