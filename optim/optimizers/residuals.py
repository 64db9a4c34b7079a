"""The residuals behind a closure's loss, for steps in their space."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from secondorder import GaussNewton, LinearOperator
from secondorder.operators.parameters import Jacobian
from secondorder.operators.per_sample import Layers
from secondorder.operators.residual import ResidualJacobian
from secondorder.vectors.flat import flatten

from ..closure.evaluate import ClosureEvaluator, Evaluation
from ..closure.losses import LossLog
from ..closure.setting import trial
from ..methods.forms import residual_cost
from ..methods.problem import Residuals
from .decay import WeightDecay
from .meter import Meter
from .scaling import Scaling

# Of the matrix, while it is decomposed; and operations of a product for each multiplication of ``J v``.
COPIES, PRODUCT = 3, 8.0


# Residuals, parameters, the backward passes that make their Jacobian, and the products that they cost.
Known = tuple[int, int, int, float]


def cost_of(jacobian: Jacobian, known: Known | None, memory: float) -> Known:
    """The products that the space of residuals costs; infinite where there is no memory for it.

    Args:
        jacobian: Of all outputs.
        known: What this was, looked at again where the numbers differ.
        memory: Bytes.
    """
    m, n = jacobian.shape
    if known is not None and known[:2] == (m, n):
        return known
    small = min(m, n)
    if COPIES * (small**2 + (m * n if m > n else 0)) * jacobian.dtype.itemsize > memory:
        return m, n, 0, math.inf
    layers = Layers(jacobian, range(len(jacobian.parameters)))
    # Where a layer is not read.
    passes = layers.passes + (small if layers.unread else 0)
    return m, n, passes, residual_cost(m, n, passes, PRODUCT * layers.multiplications())


class ClosureResiduals:
    """What a recorded closure says of residuals, as functions of the variables of a step.

    Args:
        evaluator: It recorded ``evaluation``.
        evaluation: At the present parameters.
        curvature: Of the loss, as it is.
        decay: Of the parameters.
        meter: Counts.
        memory: Bytes that their Jacobian, or its Gram matrix, may take.

    Attributes:
        scaling: From variables of a step to parameters.
    """

    def __init__(
        self,
        evaluator: ClosureEvaluator,
        evaluation: Evaluation,
        curvature: LinearOperator,
        decay: WeightDecay,
        meter: Meter,
        memory: float,
    ) -> None:
        self._evaluator, self._evaluation, self._meter = evaluator, evaluation, meter
        self._curvature = curvature if isinstance(curvature, GaussNewton) else None
        self._decay, self.scaling, self._memory = decay, Scaling(1.0), memory

    @cached_property
    def _rows(self) -> ResidualJacobian | None:
        """As functions of the parameters."""
        if self._curvature is None or self._evaluation.partial:
            return None
        rows = ResidualJacobian.of(self._curvature, self._memory)
        is_single = rows is not None and rows.dtype == torch.promote_types(rows.dtype, torch.float32)
        return rows if is_single else None

    @property
    def missing(self) -> str:
        """Why there are none, if so, before they are looked at."""
        if self._evaluation.partial:
            return self._evaluation.partial
        return (
            ""
            if self._curvature is not None
            else "the curvature is not the Gauss-Newton matrix of all samples"
        )

    @property
    def are_squares(self) -> bool:
        """Whether the loss is a sum of their squares, and nothing else."""
        return bool(self._evaluation.coverage.squares)

    def cost(self, known: Known | None) -> Known:
        """As ``cost_of``; infinite where there is no such form."""
        if self._curvature is None or self.missing:
            return 0, 0, 0, math.inf
        return cost_of(self._curvature.jacobian, known, self._memory)

    def columns(self) -> Tensor | None:
        """Norms of the columns of their Jacobian, as functions of the parameters, shape (n,)."""
        return None if self._rows is None else torch.linalg.vector_norm(self._rows.dense(), dim=0)

    def model(self) -> Residuals | None:
        """None where the loss is no such sum, or weights decay at different rates."""
        if self._rows is None:
            return None
        rows = self._rows.scaled(self.scaling.factor)
        like = rows.target.new_empty(0)
        shift: float | Tensor | None = 0.0
        rest = None if rows.rest is None else rows.pulled(rows.rest)
        if self._decay:
            factor, shift = self.scaling.uniform, self._decay.diagonal(like)
            shift = None if factor is None else shift * factor**2
            decayed = self.scaling.times(self._decay.gradient(like))
            rest = -decayed if rest is None else rest - decayed
        return Residuals(rows, rows.target, rest, shift) if isinstance(shift, float) else None

    def change(self, step: Tensor) -> Tensor | None:
        """Of the residuals by a step, shape (m,); None where the loss is no sum of squares alone.

        Cost: one evaluation.
        """
        calls, rows = self._evaluation.coverage.squares, self._rows
        if not calls or rows is None:
            return None
        log = LossLog(in_graph=False)
        with self._meter.evaluation(), trial(self._decay.parameters, self.scaling.times(step)):
            self._evaluator.run(log)
            # Of parameters themselves only meanwhile.
            outputs = log.outputs(calls)
        if outputs is None:
            return None
        pairs = zip(outputs, rows.jacobian.outputs, strict=True)
        return rows.weighted(flatten([z - before.detach() for z, before in pairs]))
