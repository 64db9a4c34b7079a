"""The functional derivative API: what ``torch.autograd.functional`` offers, and more.

A function takes tensors and returns a tensor or a tuple of tensors; ``inputs`` and ``v`` are a tensor or
a tuple of tensors, and what comes back has the same structure. Signatures, results, errors and side
effects of ``vjp jvp jacobian hessian vhp hvp`` are those of torch, extras are keyword-only. Costs are in
gradients: one evaluation of the function and one backward pass.
"""

from secondorder.functional.matrices import hessian, jacobian
from secondorder.functional.products import hvp, jvp, vhp, vjp

__all__ = [
    # products
    "vjp",
    "jvp",
    "vhp",
    "hvp",
    # matrices
    "jacobian",
    "hessian",
]
