"""Backward passes through a kept graph: one vector, or a batch of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secondorder._arguments import refuse_inference_mode
from secondorder.graph import Source, end, like
from secondorder.ladder import explained

# Here the graph is all there is: the function behind it can not be run again.
_REMEDY = (
    "the graph is given; compute it inside `with secondorder.decompose.decompose():`, or use Hessian.of,"
    " GaussNewton.of or Objective, which call the function themselves"
)


def pull(outputs: Sequence[Source], inputs: Sequence[Source], v: Sequence[Tensor]) -> list[Tensor]:
    """``v^T d outputs / d inputs``; zeros where there is no path. The graph is kept."""
    grads, likes = _pulled(outputs, inputs, v, False), map(like, inputs)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, likes, strict=True)]


def pull_rows(outputs: Sequence[Source], inputs: Sequence[Source], v: Sequence[Tensor]) -> list[Tensor]:
    """As ``pull`` for a batch: a leading dimension on every ``v`` and on every result."""
    grads, likes = _pulled(outputs, inputs, v, True), map(like, inputs)
    k = v[0].shape[0]
    return [x.new_zeros((k, *x.shape)) if g is None else g for g, x in zip(grads, likes, strict=True)]


def _pulled(
    outputs: Sequence[Source], inputs: Sequence[Source], v: Sequence[Tensor], is_batched: bool
) -> Sequence[Tensor | None]:
    refuse_inference_mode()
    with explained(_REMEDY):
        return torch.autograd.grad(
            [end(z) for z in outputs],
            [end(x) for x in inputs],
            v,
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=is_batched,
        )
