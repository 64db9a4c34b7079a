"""Groups with their own ``damping_scale``: the model in variables in which damping is the same for all.

With ``q = sqrt(scale) p``, entry by entry, ``damping * norm(q)^2`` is the damping of each group times its
scale, and a ball of ``q`` an ellipsoid, in which entries of a large scale move less.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optim.optimizers.judge import Proposal, QuadraticModel
from secondorder import FunctionOperator, LinearOperator, MatrixOperator


def scaled(model: QuadraticModel, scale: float | Tensor) -> QuadraticModel:
    """The model as a function of ``q``; ``scale`` a number, or one for each entry, shape (n,)."""
    if isinstance(scale, float):
        return model if scale == 1.0 else _divided(model, scale)
    factor = scale.rsqrt()
    curvature: LinearOperator
    if isinstance(model.curvature, MatrixOperator):
        dense = factor[:, None] * model.curvature.dense() * factor
        curvature = MatrixOperator(dense, is_symmetric=True)
    else:
        diagonal = FunctionOperator(lambda v: factor * v, factor)
        curvature = diagonal @ model.curvature @ diagonal
    return QuadraticModel(model.value, factor * model.gradient, curvature)


def _divided(model: QuadraticModel, scale: float) -> QuadraticModel:
    curvature = model.curvature
    if isinstance(curvature, MatrixOperator):
        curvature = MatrixOperator(curvature.dense() / scale, is_symmetric=True)
    else:
        curvature = curvature / scale
    return QuadraticModel(model.value, model.gradient / scale**0.5, curvature)


def unscaled(proposal: Proposal, scale: float | Tensor) -> Proposal:
    """The same step as ``p``; its quadratic does not change."""
    if isinstance(scale, float) and scale == 1.0:
        return proposal
    factor = torch.as_tensor(scale).rsqrt()
    result = proposal.result._replace(x=factor * proposal.result.x)
    return proposal._replace(result=result, earlier=tuple(factor * x for x in proposal.earlier))
