"""Linear operators as SciPy's, on NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor


def to_scipy(A: Any) -> scipy.sparse.linalg.LinearOperator:
    """As ``LinearOperator.to_scipy`` says."""
    if A.dtype == torch.bfloat16:
        raise TypeError("to_scipy needs a dtype that NumPy has, got torch.bfloat16; use A.to(torch.float32).")
    dtype = torch.zeros(0, dtype=A.dtype, device="cpu").numpy().dtype
    forward, backward = _on_arrays(A, A.__matmul__), _on_arrays(A, A.T.__matmul__)
    return scipy.sparse.linalg.LinearOperator(
        A.shape, dtype=dtype, matvec=forward, matmat=forward, rmatvec=backward, rmatmat=backward
    )


def _on_arrays(A: Any, function: Callable[[Tensor], Tensor]) -> Callable[[np.ndarray], np.ndarray]:
    def product(array: np.ndarray) -> np.ndarray:
        v = torch.as_tensor(np.ascontiguousarray(array), device="cpu").to(device=A.device, dtype=A.dtype)
        result: np.ndarray = function(v).detach().cpu().numpy()
        return result

    return product
