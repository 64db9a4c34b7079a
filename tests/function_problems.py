"""Functions as problems of ``optim.methods``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from optim.functions.problem import Evaluation, FunctionProblem
from optim.functions.variables import Variables


def function_problem(fun: Callable[[Tensor], Tensor], x0: Tensor) -> FunctionProblem:
    """``fun`` at ``x0``."""
    return FunctionProblem(Evaluation(fun, Variables(x0)), x0)
