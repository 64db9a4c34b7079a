"""The samples that a recorded loss is of, and the network's outputs for some of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from secondorder import Block, GaussNewton, LinearOperator
from secondorder.autodiff.graph import Source
from secondorder.operators.curvature import GradientBlock
from secondorder.operators.samples import SampledGaussNewton, block_matrices, by_all, by_matrices, spread

from .calls import Call, is_of_samples
from .edges import reached
from .evaluate import ClosureEvaluator

# Entries of a sample's outputs up to which its block of the loss's Hessian is formed, and probes of the trace
# of a larger one.
LARGE, PROBES = 16, 8

AnyBlock = Block | GradientBlock

# What a module that was made for other samples may raise.
REFUSALS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class NoSamplesError(Exception):
    """Why a loss is not known to be of samples."""


class Samples:
    """The samples of a loss: one call of a module made the outputs that it is computed from.

    Args:
        call: Of the module.
        outputs: Those of its results that the loss depends on, each of shape (N, ...).
        blocks: Losses of them.
        own: Losses of parameters alone.
        parameters: Those that the optimizer moves.

    Attributes:
        count: ``N``.
    """

    def __init__(
        self,
        call: Call,
        outputs: list[Tensor],
        blocks: list[AnyBlock],
        own: list[AnyBlock],
        parameters: Sequence[Tensor],
    ) -> None:
        self.count = outputs[0].shape[0]
        self._call, self._outputs, self._parameters = call, outputs, parameters
        self._blocks, self._own = blocks, own

    @classmethod
    def of(cls, calls: Sequence[Call], blocks: Sequence[AnyBlock], parameters: Sequence[Tensor]) -> Samples:
        """Those behind the blocks of a Gauss-Newton matrix.

        Raises:
            NoSamplesError: there are none, as far as the graph tells.
        """
        ids = {id(parameter) for parameter in parameters}
        own = [block for block in blocks if all(id(source) in ids for source in block.outputs)]
        others = [block for block in blocks if all(block is not one for one in own)]
        ends = [source for block in others for source in block.outputs]
        # What others make is a part of the loss.
        live = [call for call in calls if any(id(p) in ids for p in call.module.parameters())]
        results = [result for call in live for result in call.results]
        met = [results[i] for i in sorted(reached(ends, [], results))]
        used = [call for call in live if any(result is one for result in call.results for one in met)]
        if len(used) != 1:
            what = f"{len(used)} calls of modules" if used else "no module's outputs"
            raise NoSamplesError(f"the loss was computed from {what}")
        first = [one for one in met if reached(ends, [other for other in met if other is not one], [one])]
        _check(used[0], first, ends, parameters)
        return cls(used[0], first, others, own, parameters)

    @cached_property
    def middle(self) -> GaussNewton:
        """``M``, the Gauss-Newton matrix of the loss with respect to the outputs of all samples."""
        return GaussNewton.of_blocks(self._blocks, self._outputs)

    @cached_property
    def _matrices(self) -> Tensor | None:
        """The blocks of ``M``, shape (N, E, E); None where they are large."""
        entries = sum(one[0].numel() for one in self._outputs)
        return block_matrices(self.middle) if entries <= LARGE else None

    def curvatures(self, generator: torch.Generator) -> Tensor:
        """What the loss of each sample curves in its outputs, shape (N,), on the CPU, up to a factor.

        The trace of its block of ``M``; an estimate where that is large and not diagonal.

        Cost: products in the space of outputs; one transfer.

        Reference: Hutchinson (1990), A stochastic estimator of the trace of the influence matrix.
        """
        if self._matrices is not None:
            return self._matrices.diagonal(dim1=1, dim2=2).sum(1).cpu()
        dtype = torch.promote_types(self._outputs[0].dtype, torch.float32)
        sums: list[Tensor] = []
        for _ in range(PROBES):
            # The same for all samples, which do not know of one another.
            signs = [_signs(one[0], generator).expand_as(one) for one in self._outputs]
            pairs = zip(signs, self.middle.multiplied(signs), strict=True)
            sums += [(u * v).reshape(self.count, -1).sum(1, dtype=dtype) for u, v in pairs]
        return torch.stack(sums).sum(0).cpu()

    def gauss_newton(self, rows: Tensor, weights: Tensor, evaluator: ClosureEvaluator) -> LinearOperator:
        """The estimate of the Gauss-Newton matrix by some samples, and what is of parameters alone.

        Args:
            rows: Which ones, shape (m,).
            weights: Of each, shape (m,).
            evaluator: It recorded the loss.

        Raises:
            NoSamplesError: the module makes of these samples alone something else than of all, or the loss
                of one depends on the outputs of another.

        Cost: the module on these samples, with a graph, that of ``J^T``, and a product in the space of
        outputs; one host read.
        """
        with evaluator.again():
            outputs = self._again(rows)
        rows, weights = (part.to(outputs[0].device) for part in (rows, weights.to(outputs[0].dtype)))
        self._compare(outputs, rows)
        matrices = self._matrices
        middle = by_all(self.middle, rows) if matrices is None else by_matrices(matrices[rows])
        sampled = SampledGaussNewton(middle, outputs, weights, self._parameters)
        return sampled + GaussNewton.of_blocks(self._own, self._parameters) if self._own else sampled

    def _again(self, rows: Tensor) -> list[Tensor]:
        """The outputs for some samples, computed alone."""
        results = self._call.results
        positions = [i for one in self._outputs for i, result in enumerate(results) if result is one]
        try:
            again = self._call.again(self.count, rows, [parameter.device for parameter in self._parameters])
        except REFUSALS as error:
            raise NoSamplesError(f"the module refuses a part of its inputs: {error}") from error
        shapes = [(len(rows), *one.shape[1:]) for one in self._outputs]
        if len(again) != len(results) or [tuple(again[i].shape) for i in positions] != shapes:
            raise NoSamplesError("the module makes outputs of other shapes of a part of its inputs")
        found = [again[i] for i in positions]
        if reached(found, [], self._parameters) != reached(self._outputs, [], self._parameters):
            raise NoSamplesError("the module was called with other parameters than its own")
        return found

    def _compare(self, outputs: Sequence[Tensor], rows: Tensor) -> None:
        """Raise NoSamplesError where samples are mixed, by the module or by the loss: one host read."""
        generator = torch.Generator("cpu").manual_seed(0)
        parts = spread(self.middle, rows, [_signs(one, generator) for one in outputs])
        # What they lead to in the outputs of others.
        led = [part.index_fill(0, rows, 0.0).abs().max() for part in self.middle.multiplied(parts)]
        coupled = torch.stack(led).max()
        pairs = list(zip(outputs, self._outputs, strict=True))
        differences = torch.stack([(one - whole[rows]).detach().abs().max() for one, whole in pairs]).max()
        size = torch.stack([whole.detach().abs().max() for _, whole in pairs]).max()
        difference, size, coupling = torch.stack([differences, size, coupled]).tolist()
        if not difference <= math.sqrt(self._eps()) * size:
            raise NoSamplesError("the module makes another output of a sample among others")
        if coupling:
            raise NoSamplesError("the loss of a sample depends on the outputs of others")

    def _eps(self) -> float:
        """Rounding of the module."""
        cast = [dtype for _, is_on, dtype in self._call.setting.autocast if is_on]
        return max(torch.finfo(dtype).eps for dtype in (self._outputs[0].dtype, *cast))


def _check(
    call: Call, outputs: Sequence[Tensor], ends: Sequence[Source], parameters: Sequence[Tensor]
) -> None:
    """Raise NoSamplesError unless the outputs are of samples, and all that the loss knows of parameters."""
    if reached(ends, outputs, parameters):
        raise NoSamplesError("parameters enter the loss past the module's outputs")
    if any(reached([one], [], [other for other in outputs if other is not one]) for one in outputs):
        raise NoSamplesError("the module's outputs depend on one another")
    if len({(one.shape[:1], one.dtype, one.device) for one in outputs}) > 1 or not outputs[0].ndim:
        raise NoSamplesError("the module's outputs have no row for each sample")
    inputs = [leaf for leaf in call.leaves if isinstance(leaf, Tensor)]
    if not any(is_of_samples(leaf, outputs[0].shape[0]) for leaf in inputs):
        raise NoSamplesError("the module's inputs have no row for each sample")
    if reached([leaf for leaf in inputs if leaf.requires_grad], [], parameters):
        raise NoSamplesError("the module's inputs depend on parameters")


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Entries -1 and 1."""
    return (2 * torch.randint(2, like.shape, generator=generator, device="cpu") - 1).to(like)
