"""Newton's method with a sparse Hessian, for the loop over steps: exact where products would be many."""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import csc_matrix, diags
from torch import Tensor

from secondorder import FunctionOperator
from secondorder.functional import sparse_hessian

from ..methods.control import Rule
from ..methods.factored import Factored
from ..methods.problem import QuadraticModel, norm
from ..methods.subspace import Subspace
from .frame import Frame
from .newton import (
    NEAR,
    Newton,
    Report,
    Tolerances,
    free_of,
    is_near,
    is_short,
    scale_by,
)
from .problem import Evaluation, FunctionProblem
from .saddle import Ends, Line, has_negative


class Sparse(Newton):
    """By sparse factors of the Hessian, whose pattern is found once.

    Args:
        problem, rule, tolerances, report: As of ``Newton``.
        evaluation: Of the function, which is called once more for each Hessian.
        scale: "auto", by the diagonal of the Hessian; or fixed, shape (n,); None for ones.
    """

    def __init__(
        self,
        problem: FunctionProblem,
        rule: Rule,
        tolerances: Tolerances,
        report: Report,
        evaluation: Evaluation,
        scale: str | Tensor | None,
    ) -> None:
        super().__init__(problem, rule, tolerances, report)
        self._evaluation, self.follows = evaluation, isinstance(scale, str)
        self._units: Tensor | None = None if isinstance(scale, str) else scale
        self._pattern: Tensor | None = None

    def look(self) -> None:
        """Gradient and Hessian; its pattern anew where a random product shows that it misses an entry."""
        problem, point = self.problem, self.problem.point
        gradient, H = problem.gradient_at(point), self._hessian(point.x)
        if self.follows:
            diagonal = torch.from_numpy(H.diagonal()).to(point.x)
            self._units = scale_by(diagonal, self._units)
        problem.frame = frame = Frame(self._units, free_of(problem))
        if frame.scale is not None:
            inverse = diags(1 / frame.scale.double().cpu().numpy())
            H = (inverse @ H @ inverse).tocsc()
        if frame.free is not None:
            kept = np.flatnonzero(frame.free.cpu().numpy())
            H = H[kept][:, kept]
        g = frame.gradient(gradient)

        def product(v: Tensor) -> Tensor:
            return torch.from_numpy(H @ v.double().cpu().numpy()).to(g)

        self.model = QuadraticModel(point.value, g, FunctionOperator(product, g), norm(g))
        self._space: Subspace | None = Factored(self.model, H) if g.numel() else None
        self.curved = isinstance(self._space, Factored) and self._space.size > 0 and self._space.is_definite

    def _hessian(self, x: Tensor) -> csc_matrix:
        def value(x: Tensor) -> Tensor:
            return self._evaluation.at(x, self._evaluation.args)[0].reshape(())

        try:
            H = sparse_hessian(value, x, pattern=self._pattern)
        except ValueError:
            # Another branch of the function, with entries that the pattern has not.
            H = sparse_hessian(value, x)
        self.problem.nhev += 1
        self._pattern = H.indices()
        rows, columns = self._pattern.cpu().numpy()
        return csc_matrix((H.values().double().cpu().numpy(), (rows, columns)), shape=H.shape)

    def space(self) -> Subspace | None:
        """All of it; a line out of a saddle."""
        return self._space if self._space is not None and self._space.size else None

    def second_order(self) -> str:
        """By the signs of the pivots; where one is negative a few Lanczos steps find the way down."""
        space = self._space
        if not isinstance(space, Factored) or not space.size:
            return "" if isinstance(space, Line) else "non_finite"
        if space.is_definite:
            return "converged" if is_near(self.problem, space.newton(), self._tolerances) else ""
        ends = Ends(self.model)
        if not len(ends.values):
            return "non_finite"
        if not has_negative(ends.values, self._eps):
            return "flat"
        self._space = Line(self.model, ends.lowest, float(ends.values[0]))
        return ""

    def is_certified(self) -> bool:
        """Whether the Hessian is definite, and a step of Newton changes no variable."""
        space = self._space
        if not isinstance(space, Factored) or not space.size or not space.is_definite:
            return False
        return is_short(self.problem, space.newton(), NEAR)
