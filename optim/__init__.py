"""Second-order optimizers for PyTorch: swap in where ``torch.optim.LBFGS`` or ``Adam`` stood."""

from optim._report import StepReport
from optim.gauss_newton import GaussNewton
from optim.hessian_free import HessianFree
from optim.minimize import MinimizeResult, minimize
from optim.newton import Newton

__all__ = [
    # optimizers
    "Newton",
    "HessianFree",
    "GaussNewton",
    # functional front ends
    "minimize",
    "MinimizeResult",
    # what a step did
    "StepReport",
]
