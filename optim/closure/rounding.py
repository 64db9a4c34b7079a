"""How coarse a loss is: the size of the numbers of which it is a small difference."""

from __future__ import annotations

import torch
from torch import Tensor

from secondorder.vectors.host import read

from .evaluate import Evaluation
from .losses import CROSS_ENTROPIES, RecordedLoss


def rounding(evaluation: Evaluation) -> float:
    """Times ``eps`` about the largest rounding error of the loss, given the network's outputs.

    The size of the loss, and that of the logits where cross entropies were called: of each sample's largest,
    reduced as the loss reduces. In single precision 1 to 400 times the largest of 20 errors; more where a
    shift is common to the logits of a sample, which most kernels subtract without an error.

    Cost: where there are cross entropies, a backward pass to their results and one host read.
    """
    size, objective = abs(evaluation.value), evaluation.objective
    losses = [recorded for recorded in evaluation.cross_entropies if recorded.outputs.numel()]
    if not losses:
        return size
    results = [recorded.loss for recorded in losses]
    weights = torch.autograd.grad(objective, results, retain_graph=True, allow_unused=True)
    pairs = zip(losses, weights, strict=True)
    sizes = [_size(r, weight).to(objective.device) for r, weight in pairs if weight is not None]
    return size + (read(torch.stack(sizes).sum())[0] if sizes else 0.0)


def _size(recorded: RecordedLoss, weight: Tensor) -> Tensor:
    """Of the logits of a loss, by its weight in the objective."""
    logits, has_classes = recorded.outputs.detach(), CROSS_ENTROPIES[recorded.name]
    rows = logits.shape[0] if logits.ndim > 1 else 1
    sizes = logits.reshape(rows, -1).abs().amax(1)
    sizes = sizes.to(torch.promote_types(sizes.dtype, torch.float32))
    weight = weight.detach().abs().to(sizes)
    if weight.ndim:
        size = weight.reshape(rows, -1).sum(1).dot(sizes)
    elif recorded.is_sum:
        classes = logits.shape[min(1, logits.ndim - 1)] if has_classes else 1
        size = weight * sizes.sum() * (logits.numel() / (rows * classes))
    else:
        size = weight * sizes.mean()
    # The mean over samples is one that class weights are divided out of.
    is_weighted = weight.ndim > 0 or recorded.is_sum or not has_classes
    for factor in recorded.factors if is_weighted else ():
        size = size * factor.max()
    return size
