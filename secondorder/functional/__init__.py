"""The functional derivative API: what ``torch.autograd.functional`` offers, and more.

A function takes tensors and returns a tensor or a tuple of tensors; ``inputs`` and ``v`` are a tensor or
a tuple of tensors, and what comes back has the same structure. Signatures, results, errors and side
effects of ``vjp jvp jacobian hessian vhp hvp`` are those of torch, extras are keyword-only. Costs are in
gradients: one evaluation of the function and one backward pass.
"""

from secondorder.functional.batch import batch_hessian, batch_jacobian, hessian_diag
from secondorder.functional.check import check_derivatives
from secondorder.functional.linear import LinearMap, hvps, linearize, linearize_grad, value_and_grad
from secondorder.functional.matrices import hessian, jacobian
from secondorder.functional.module import module_function
from secondorder.functional.products import hvp, jvp, vhp, vjp
from secondorder.functional.sparse import sparse_hessian, sparse_jacobian

__all__ = [
    # products
    "vjp",
    "jvp",
    "vhp",
    "hvp",
    "hvps",
    # matrices
    "jacobian",
    "hessian",
    "hessian_diag",
    "sparse_jacobian",
    "sparse_hessian",
    "batch_jacobian",
    "batch_hessian",
    # at a point that is kept
    "value_and_grad",
    "linearize",
    "linearize_grad",
    "LinearMap",
    # checks
    "check_derivatives",
    # functions from modules
    "module_function",
]


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
