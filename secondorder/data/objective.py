"""A model's loss over a whole dataset: value, gradient and curvature operators, one batch at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from secondorder.data.batches import Batch, Batches, call, check_deterministic
from secondorder.data.passes import Build, Loss, Passes
from secondorder.operators.curvature import Block, GaussNewton, Hessian
from secondorder.operators.fisher import EmpiricalFisher, Fisher
from secondorder.operators.linear import LinearOperator
from secondorder.operators.parameters import ParameterOperator, check_parameters
from secondorder.vectors.flat import flatten

REDUCTIONS = ("mean", "sum")


class Objective:
    """``mean_i loss(model(x_i), y_i) + l2 / 2 norm(w)^2`` over a dataset, as a function of the parameters.

    Batches are weighted by their size, so the objective does not depend on how the data is cut. Memory is
    that of one batch.

    Args:
        model: Its parameters are where value, gradient and operators are taken. Not changed. A batch's
            inputs are its argument; a tuple is unpacked into arguments, a dict into keywords.
        loss: Takes outputs and targets of a batch, returns the mean (or sum) of the samples' losses, such as
            ``torch.nn.functional.cross_entropy`` or a loss module.
        data: A pair (inputs, targets), a Dataset of such pairs, a DataLoader, or a list of batches (inputs,
            targets). Targets are a tensor, inputs one or a tuple or dict of them; in batches and in what the
            model returns, any containers of tensors. Samples lie in their first dimension.
        l2: Weight of the L2 term, loss over parameter squared. It is part of value, gradient and operators.
        reduction: "mean" or "sum": what ``loss`` does with the samples of a batch, and the objective with
            all of them.
        batch_size: Of the batches that tensors and Datasets are cut into.
        parameters: Those of the model to differentiate; all that require gradients when None.
        progress: Show a progress bar for each pass over the data.

    Attributes:
        parameters: In the order of the flat vectors.

    Raises:
        TypeError: ``data`` is an iterator, which can be walked only once, or gives something else than pairs.
        ValueError: a module depends on chance or on the batch (dropout in training mode, BatchNorm on batch
            statistics); ``loss`` is not the reduction over samples (class weights, ignored targets), found
            out in the first pass from the halves of each batch; ``data`` is empty; an option is out of range.

    Cost: ``value``, a forward pass over the data; ``gradient``, one gradient; a product with an operator, two
    to four gradients, less where all data is one batch, whose graph is kept.

    Example:
        >>> x, y = torch.randn(100, 3), torch.randn(100, 1)
        >>> objective = Objective(nn.Linear(3, 1), nn.functional.mse_loss, (x, y), l2=0.1, batch_size=32)
        >>> g, H = objective.gradient(), objective.hessian()
        >>> H.solve(-g).status
        'converged'
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        data: Any,
        *,
        l2: float = 0.0,
        reduction: str = "mean",
        batch_size: int = 1024,
        parameters: Iterable[Tensor] | None = None,
        progress: bool = False,
    ) -> None:
        _check(model, loss, l2, reduction)
        check_deterministic(model)
        chosen = [p for p in model.parameters() if p.requires_grad] if parameters is None else parameters
        if parameters is None and not chosen:
            raise ValueError("model must have a parameter that requires gradients, got none.")
        self.parameters = check_parameters(chosen)
        self.model, self.loss, self.l2, self.reduction = model, loss, l2, reduction
        self.data, self.batch_size = data, batch_size
        batches = Batches(data, batch_size, self.parameters[0].device)
        self.passes = Passes(model, loss, batches, reduction, progress)

    def value(self) -> Tensor:
        """The objective, a detached scalar."""
        with torch.no_grad():
            value = self.passes.reduce("value", lambda batch: self.passes.loss(batch)[0])
            return value + 0.5 * self.l2 * self._flat().square().sum()

    def gradient(self) -> Tensor:
        """Its gradient, flat, shape (n,)."""
        return self.value_and_gradient()[1]

    def value_and_gradient(self) -> tuple[Tensor, Tensor]:
        """Both, in one pass."""

        def on_batch(batch: Batch) -> Tensor:
            value = self.passes.loss(batch)[0]
            grads = torch.autograd.grad(value, self.parameters, allow_unused=True)
            pairs = zip(grads, self.parameters, strict=True)
            gradient = flatten([torch.zeros_like(p) if g is None else g for g, p in pairs])
            return torch.cat([value.detach().reshape(1), gradient])

        with torch.enable_grad():
            both = self.passes.reduce("gradient", on_batch)
        w = self._flat()
        return both[0] + 0.5 * self.l2 * w.square().sum(), both[1:] + self.l2 * w

    def hessian(self, *, keep_graph: bool | None = None) -> LinearOperator:
        """The Hessian at the present parameters, shape (n, n).

        Args:
            keep_graph: Keep the graphs of all batches between products: faster, and the memory of the whole
                data at once. None: only where there is but one batch.
        """
        return OverBatches(
            self, "hessian", lambda b, _: Hessian(self.passes.loss(b)[0], self.parameters), keep_graph
        )

    def gauss_newton(self, *, keep_graph: bool | None = None) -> LinearOperator:
        """The generalised Gauss-Newton matrix, shape (n, n); ``keep_graph`` as in ``hessian``."""
        built: list[bool] = []

        def build(batch: Batch, _: int) -> GaussNewton:
            loss, outputs = self.passes.loss(batch)
            if built:
                # Whether the loss has curvature was looked at, which waits for the device.
                block = Block(loss, (outputs,), torch.ones_like(loss))
                return GaussNewton.of_blocks([block], self.parameters)
            built.append(True)
            return GaussNewton(loss, outputs, self.parameters)

        return OverBatches(self, "gauss_newton", build, keep_graph)

    def fisher(
        self,
        *,
        likelihood: str = "categorical",
        num_samples: int | None = None,
        seed: int = 0,
        keep_graph: bool | None = None,
    ) -> LinearOperator:
        """The Fisher matrix, shape (n, n), of the likelihood; ``loss`` is not asked.

        Args:
            likelihood: "categorical", "bernoulli" or "normal".
            num_samples: Targets drawn for each sample; None for the exact matrix. What is drawn depends on
                how the data is cut into batches.
            seed: Of the draws; the same in every product.
            keep_graph: As in ``hessian``.
        """
        options: dict[str, Any] = dict(
            likelihood=likelihood, reduction=self.reduction, num_samples=num_samples
        )

        def build(batch: Batch, index: int) -> Fisher:
            outputs = call(self.model, batch[0])
            return Fisher(outputs, self.parameters, seed=seed + index, **options)

        return OverBatches(self, "fisher", build, keep_graph)

    def empirical_fisher(self, *, keep_graph: bool | None = None) -> LinearOperator:
        """Mean (or sum) of the outer products of the samples' gradients; ``keep_graph`` as in ``hessian``.

        Outputs and targets must be tensors with samples in their first dimension.
        """

        def of_sample(output: Tensor, target: Tensor) -> Tensor:
            return self.loss(output.unsqueeze(0), target.unsqueeze(0)).squeeze()

        def build(batch: Batch, _: int) -> EmpiricalFisher:
            losses = torch.vmap(of_sample)(call(self.model, batch[0]), batch[1])
            return EmpiricalFisher(losses, self.parameters, reduction=self.reduction)

        return OverBatches(self, "empirical_fisher", build, keep_graph)

    def _flat(self) -> Tensor:
        return flatten([p.detach() for p in self.parameters])

    def __repr__(self) -> str:
        n = sum(p.numel() for p in self.parameters)
        return f"Objective({type(self.model).__name__}, {n} parameters, l2={self.l2}, {self.reduction!r})"


def _check(model: Any, loss: Any, l2: float, reduction: str) -> None:
    if not l2 >= 0:
        raise ValueError(f"l2 must be non-negative, got {l2}.")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}.")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {_kind(model)}.")
    if isinstance(loss, type) or not callable(loss):
        raise TypeError(f"loss must be a function or a loss module, got {_kind(loss)}; make an instance.")
    own = getattr(loss, "reduction", reduction)
    if own != reduction:
        raise ValueError(f"loss must reduce as the objective does, got {own!r} and {reduction!r}.")
    if reduction == "mean" and isinstance(getattr(loss, "weight", None), Tensor):
        raise ValueError(
            f"loss must be the mean over samples, got {type(loss).__name__} with class weights,"
            " whose mean depends on the classes in a batch; use reduction='sum' for both."
        )


def _kind(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


class OverBatches(LinearOperator):
    """The sum of one operator for each batch, weighted, and the L2 term; at the parameters as they were."""

    def __init__(self, objective: Objective, name: str, build: Build, keep_graph: bool | None) -> None:
        first = objective.parameters[0]
        n = sum(p.numel() for p in objective.parameters)
        super().__init__((n, n), first.dtype, first.device)
        self._parts = objective.parameters
        self._objective, self._name, self._build, self._keep_graph = objective, name, build, keep_graph
        self._versions = self._read_versions()
        self._kept: list[tuple[ParameterOperator, int]] | None = None

    def _read_versions(self) -> list[tuple[int, int]]:
        """What changes with the parameters: in place, or by new data."""
        return [(p._version, p.data_ptr()) for p in self._objective.parameters]

    def _matvec(self, v: Tensor) -> Tensor:
        return self._sum(lambda operator: operator @ v) + self._objective.l2 * v

    def _sum(self, of_batch: Callable[[ParameterOperator], Tensor]) -> Tensor:
        """What one operator for each batch gives, reduced over the samples."""
        if self._read_versions() != self._versions:
            raise RuntimeError("the parameters have changed since this operator was made; make a new one.")
        passes = self._objective.passes
        total, samples = torch.zeros((), dtype=self.dtype, device=self.device), 0
        kept: list[tuple[ParameterOperator, int]] = []
        with contextlib.ExitStack() as stack:
            operators: Iterable[tuple[ParameterOperator, int]] = self._kept or stack.enter_context(
                contextlib.closing(passes.operators(self._name, self._build))
            )
            for operator, n in operators:
                total = total + of_batch(operator) * passes.weight(n)
                if self._keep_graph or (self._keep_graph is None and samples == 0):
                    kept.append((operator, n))
                else:
                    kept.clear()
                samples += n
                # Its graph goes before the next batch comes.
                del operator
        self._kept = kept or None
        return passes.reduced(total, samples)

    def _matmat(self, V: Tensor) -> Tensor:
        return self._matvec(V)

    def diagonal(self, chunk_size: int = 128) -> Tensor:
        """The diagonal, shape (n,), in one pass over the data."""
        return self._sum(lambda operator: operator.diagonal(chunk_size)) + self._objective.l2

    def dense(self, chunk_size: int = 128) -> Tensor:
        """The matrix, shape (n, n), in one pass over the data."""
        dense = self._sum(lambda operator: operator.dense(chunk_size))
        dense.diagonal().add_(self._objective.l2)
        return dense

    def __repr__(self) -> str:
        return f"OverBatches({self._name!r} of {self._objective!r}, shape={self.shape}, dtype={self.dtype})"
