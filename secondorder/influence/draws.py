"""Gradients whose second moments are the Gauss-Newton matrix, sample by sample, in factors by layer.

With ``S S^T`` the Hessian of a sample's loss in its outputs, ``J^T S u`` for ``u`` of independent signs has
the second moment ``J^T S S^T J``; for the unit vectors in place of ``u``, their sum has it exactly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from secondorder.autodiff.backward import pull_rows
from secondorder.autodiff.graph import Place, Source
from secondorder.data.batches import Batch, count_samples
from secondorder.data.objective import Objective
from secondorder.operators.curvature import GaussNewton
from secondorder.operators.layers import factors, is_known
from secondorder.operators.pieces import Piece, scatter
from secondorder.operators.residual import ResidualJacobian
from secondorder.operators.uses import Use, uses_of

# Residuals of a sample up to which all are taken instead of random ones, and how many of these.
EXACT, DRAWS = 32, 8
# Pairs of draws and samples in one backward pass.
TOGETHER = 4096
# By how much the gradient from layers may differ from the real one; a sample in a wrong place makes it wrong
# by a good part.
SAME = 1e-2


class Draws:
    """Pieces of the gradients, of all training samples.

    Args:
        objective: Gives model, loss, and data.
        share: Weight of a sample's loss in the objective.
    """

    def __init__(self, objective: Objective, share: float) -> None:
        self._objective, self._share = objective, share

    def walk(self) -> Iterator[list[list[Piece]]]:
        """For each parameter pieces of some gradients of some samples; their squares sum to the matrix.

        Raises:
            ValueError: a parameter is in no linear layer, convolution, embedding or the like; outputs are
                more than one tensor; the loss is not convex.
        """
        passes = self._objective.passes
        with contextlib.closing(passes.walk("ekfac")) as batches:
            for number, batch in enumerate(batches):
                n = count_samples(batch)
                scale = (passes.weight(n) * self._share) ** 0.5
                yield from self._of_batch(batch, number, scale)

    def _of_batch(self, batch: Batch, number: int, scale: float) -> Iterator[list[list[Piece]]]:
        parameters, n = self._objective.parameters, count_samples(batch)
        with torch.enable_grad():
            operator = GaussNewton(*self._objective.passes.loss(batch), parameters)
            residual = ResidualJacobian.of(operator)
        sources = operator.jacobian._sources
        if residual is None or len(sources) != 1 or operator.jacobian.outputs[0].shape[:1] != (n,):
            raise ValueError(
                "ekfac needs a model of one output tensor, samples first, and a loss that is convex in it;"
                " use solver='block_cg' without it."
            )
        uses = uses_of(sources[0], parameters, is_known)
        for seeds in _seeds(residual, n, number):
            seeds = scale * seeds.view(-1, *operator.jacobian.outputs[0].shape)
            yield _pieces(sources[0], parameters, uses, seeds, n, self._names())

    def _names(self) -> list[str]:
        known = {id(p): name for name, p in self._objective.model.named_parameters()}
        return [known.get(id(p), f"parameters[{i}]") for i, p in enumerate(self._objective.parameters)]


def _seeds(residual: ResidualJacobian, n: int, number: int) -> Iterator[Tensor]:
    """``S u`` as rows: all samples' at once."""
    m, like = residual.shape[0], residual.target
    own = m // n
    width = max(1, TOGETHER // n)
    if own <= EXACT and residual.roots.is_by_sample:
        rows = torch.eye(own, dtype=like.dtype, device=like.device)
        for some in rows.split(width):
            yield residual.roots.times(some.unsqueeze(1).expand(-1, n, -1).reshape(len(some), m))
        return
    generator = torch.Generator("cpu").manual_seed(number)
    signs = torch.randint(0, 2, (DRAWS, m), generator=generator, device="cpu").to(like) * 2 - 1
    for some in signs.split(width):
        yield residual.roots.times(some) / DRAWS**0.5


def _pieces(
    source: Source,
    parameters: Sequence[Tensor],
    uses: Sequence[Sequence[Use]],
    seeds: Tensor,
    n: int,
    names: Sequence[str],
) -> list[list[Piece]]:
    for name, own in zip(names, uses, strict=True):
        unknown = sorted({use.node.name() for use in own if not is_known(use.node) or use.base is not None})
        if unknown:
            raise ValueError(
                f"ekfac needs parameters of linear layers, convolutions, embeddings or norms, got {name!r} in"
                f" {', '.join(unknown)}; use solver='block_cg' without it."
            )
    places = list(dict.fromkeys(use.node for own in uses for use in own))
    at_layers = pull_rows([source], [Place.of(node, 0) for node in places], [seeds])
    gradients = dict(zip(places, at_layers, strict=True))
    # Other weights for other samples: a sample in another's place would show.
    weights = torch.linspace(1, 2, n, dtype=seeds.dtype, device=seeds.device)
    real = pull_rows([source], list(parameters), [seeds * weights.view(n, *[1] * (seeds.ndim - 2))])
    found = []
    for name, own, whole in zip(names, uses, real, strict=True):
        pieces = _right([(use, gradients[use.node]) for use in own], n, weights, whole)
        if pieces is None:
            raise ValueError(
                f"ekfac needs layers that keep samples apart, got {name!r} whose gradients by sample cannot"
                " be read; use solver='block_cg' without it."
            )
        found.append(pieces)
    return found


def _right(pairs: Sequence[tuple[Use, Tensor]], n: int, weights: Tensor, whole: Tensor) -> list[Piece] | None:
    """The pieces whose weighted sum is the real gradient, with samples in one order or the other."""
    for is_minor in (False, True):
        found = [factors(use, gradient) for use, gradient in pairs]
        pieces = [f and Piece.of(f, 0, n, is_minor, whole.dtype) for f in found]
        kept = [piece for piece in pieces if piece]
        if len(kept) < len(pieces):
            continue
        # ``pulled`` wants one weight for each draw and sample: the same for all draws, which it adds up.
        total = torch.zeros(whole[0].numel(), dtype=whole.dtype, device=whole.device)
        for piece in kept:
            v = weights.expand(piece.shape[0], n).reshape(-1)
            scatter(total, piece.spot).add_(piece.pulled(v).view(piece.spot.shape))
        size = torch.stack([piece.size for piece in kept]).norm() if kept else total.norm()
        if bool((total - whole.sum(0).flatten()).norm() <= SAME * whole.sum(0).norm() + 1e-4 * size):
            return kept
    return None
