"""Fisher matrices with respect to parameters, as operators on a kept graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from secondorder.autodiff import ladder
from secondorder.functional import output_hessians
from secondorder.operators.parameters import Jacobian, ThroughOutputs, tried
from secondorder.vectors.tree import Tree

Function = Callable[..., Any]


class Fisher(ThroughOutputs):
    """Fisher matrix of the negative log-likelihood of outputs with respect to parameters, flat.

    The expectation is over targets of the model's own distribution: exact, where it equals the Gauss-Newton
    matrix of the negative log-likelihood, or from drawn targets.

    Args:
        outputs: A tensor in the graph: logits for "categorical" (classes in dimension 1) and "bernoulli",
            means for "normal" (unit variance); samples in dimension 0.
        parameters: Tensors of one dtype and device that require gradients.
        likelihood: "categorical", "bernoulli" or "normal".
        reduction: "mean" over samples (over all positions with classes, for "categorical"), or "sum".
        num_samples: Targets drawn for each sample, once for all products; None for the exact matrix.
        seed: Of the generator that draws.
        keep_graph: As in ``GaussNewton``.
        batched: As in ``Hessian``.

    Attributes:
        jacobian: ``J``, an operator of shape (outputs, parameters).
        kernel: ``J J^T``, shape (outputs, outputs).
        parameters: As given.

    Raises:
        ValueError: ``likelihood`` or ``reduction`` is unknown; ``outputs`` carry no graph; ``num_samples``
            is not positive; ``parameters`` is empty, mixed or frozen.

    Cost: that of ``GaussNewton``.

    Reference: Martens (2020), New insights and perspectives on the natural gradient method, section 5.

    Example:
        >>> w = torch.zeros(2, requires_grad=True)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> Fisher(x @ w, [w], likelihood="bernoulli").diagonal()
        tensor([0.1250, 0.5000])
    """

    def __init__(
        self,
        outputs: Tensor,
        parameters: Iterable[Tensor],
        *,
        likelihood: str = "categorical",
        reduction: str = "mean",
        num_samples: int | None = None,
        seed: int = 0,
        keep_graph: bool = True,
        batched: bool | None = None,
    ) -> None:
        super().__init__(parameters, batched)
        output_hessians.check(likelihood, reduction, num_samples)
        self.jacobian = Jacobian(outputs, self.parameters, keep_graph=keep_graph, batched=batched)
        values = outputs.detach()
        count = output_hessians.count_samples(likelihood, values)
        scale = 1 / max(count, 1) if reduction == "mean" else 1.0
        self._multiply = (
            output_hessians.of_likelihood(likelihood, values, scale)
            if num_samples is None
            else output_hessians.of_samples(likelihood, values, scale, num_samples, seed)
        )

    @classmethod
    def of(cls, func: Function, inputs: Any, **options: Any) -> Fisher:
        """The Fisher matrix of ``func``'s outputs at ``inputs``: a tensor, a tuple, or any pytree.

        Takes the options of the constructor. Where a derivative is missing, ``func`` is called once more
        under ``decompose()``.
        """
        tree = Tree.of(inputs, "Fisher.of")

        def build() -> Fisher:
            return tried(cls(tree.call(func), tree.leaves, **options))

        return ladder.climb(build)

    def _middle(self, parts: list[Tensor], batched: bool) -> list[Tensor]:
        return [self._multiply(parts[0])]


class EmpiricalFisher(ThroughOutputs):
    """Mean outer product of the gradients of the samples' losses, flat: ``sum_n g_n g_n^T / N``.

    It is not the Fisher matrix: targets are the data's, not the model's (Kunstner, Balles and Hennig 2019).

    Args:
        losses: One loss for each sample, in the graph, shape (N,).
        parameters: Tensors of one dtype and device that require gradients.
        reduction: "mean" over samples, or "sum".
        keep_graph: As in ``GaussNewton``.
        batched: As in ``Hessian``.

    Attributes:
        jacobian: The samples' gradients, an operator of shape (N, parameters).
        kernel: Their inner products, shape (N, N).
        parameters: As given.

    Raises:
        ValueError: ``losses`` is not a vector with a graph; ``reduction`` is unknown; ``parameters`` is
            empty, mixed or frozen.

    Cost: that of ``GaussNewton``.

    Example:
        >>> w = torch.ones(2, requires_grad=True)
        >>> losses = torch.tensor([[1.0, 0.0], [0.0, 2.0]]) @ w
        >>> EmpiricalFisher(losses, [w]).dense()
        tensor([[0.5000, 0.0000],
                [0.0000, 2.0000]])
    """

    def __init__(
        self,
        losses: Tensor,
        parameters: Iterable[Tensor],
        *,
        reduction: str = "mean",
        keep_graph: bool = True,
        batched: bool | None = None,
    ) -> None:
        super().__init__(parameters, batched)
        output_hessians.check("normal", reduction, None)
        if not isinstance(losses, Tensor):
            raise TypeError(f"losses must be a tensor of shape (N,), got {type(losses).__name__}.")
        if losses.ndim != 1:
            raise ValueError(
                f"losses must have shape (N,), one for each sample, got {tuple(losses.shape)};"
                " compute them with reduction='none'."
            )
        self.jacobian = Jacobian(losses, self.parameters, keep_graph=keep_graph, batched=batched)
        self._scale = 1 / max(losses.numel(), 1) if reduction == "mean" else 1.0

    def _middle(self, parts: list[Tensor], batched: bool) -> list[Tensor]:
        return [self._scale * parts[0]]

    def diagonal(self, chunk_size: int = 128) -> Tensor:
        """Mean (or sum) of squared gradients, shape (n,): one backward pass for each sample.

        To the power 0.75 it is the preconditioner of Martens (2010): see ``diagonal_preconditioner``.
        """
        samples = self.jacobian.T
        blocks = [(samples @ basis).square().sum(1) for basis in samples._basis(chunk_size)]
        return self._scale * sum(blocks, torch.zeros(self.shape[0], dtype=self.dtype, device=self.device))
