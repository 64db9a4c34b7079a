"""Evaluate a user's closure, unchanged, in two modes.

*record*, once a step: the closure runs for real, its backward passes keep their graph, its losses are
noted. *value*, for every trial: gradients are off and backward is swallowed, the random state is the one of
the recording, and ``.grad``, buffers and everything else that existed before is left alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secondorder.autodiff.ladder import MissingDerivativeError

from . import gradients
from .accumulation import Accumulation
from .calls import Calls
from .coverage import Coverage
from .edges import Behind, leaves_by_nodes_of
from .losses import LossLog, RecordedLoss
from .modes import Again, Record, Value, Weighted
from .proof import cover, explicit
from .returned import finite, number, root_of, split
from .runs import Closure, Runs
from .setting import evaluating, without_hooks


class Evaluation(NamedTuple):
    """What one recorded run of the closure gave; what is minimised is ``sign`` times its loss.

    Attributes:
        loss: What the closure returned as loss, detached.
        value: ``sign`` times it, as a number.
        objective: ``sign`` times the scalar with a graph whose gradient the closure asked for.
        gradient: ``sign`` times the gradient in ``.grad``, flat, shape (n,), in single precision at least.
        norm: Its Euclidean norm.
        coverage: Blocks of the Gauss-Newton matrix, or why there are none.
        partial: Why the gradient is not that of ``objective`` alone, so that ``value`` says nothing about a
            step along it; empty where it is.
        cross_entropies: Those that were called, whether or not they cover the objective.
        is_loss: Whether the objective is known to be the loss itself, without looking at numbers.
    """

    loss: Tensor
    value: float
    objective: Tensor
    gradient: Tensor
    norm: float
    coverage: Coverage
    partial: str = ""
    cross_entropies: Sequence[RecordedLoss] = ()
    is_loss: bool = False


class Asked(NamedTuple):
    """What a run asked for.

    Attributes:
        loss: What the closure returned as loss.
        value: The same as a number.
        norm: Of the gradient.
        roots: The tensors to differentiate, each with its weight.
        outputs: Those that the user named.
        partial: As in ``Evaluation``.
        scale: How many times the gradient of the roots ``.grad`` holds.
    """

    loss: Tensor | float
    value: float
    norm: float
    roots: Weighted
    outputs: Sequence[Tensor] = ()
    partial: str = ""
    scale: float = 1.0


class ClosureEvaluator:
    """Runs one closure for one step.

    Args:
        closure: Returns the loss, or ``(loss, outputs)``; may call ``backward`` itself.
        parameters: The parameters that the optimizer moves.
        sign: -1 where the closure's loss is to be maximised.
        accumulation: Counts the backward passes that ``.grad`` holds before the closure runs.

    Attributes:
        is_suspect: The recorded graph holds nodes that look older than the run. Those that another thread
            made do too: numbers of nodes are counted in each.
    """

    is_suspect = False

    def __init__(
        self,
        closure: Closure,
        parameters: Sequence[Tensor],
        sign: int = 1,
        accumulation: Accumulation | None = None,
    ) -> None:
        self._parameters, self._sign = tuple(parameters), sign
        self._runs = Runs(closure, self._parameters, accumulation or Accumulation())
        self._differentiates = False
        # The parameters, and leaves that the loss depends on and that the optimizer does not move.
        self._leaves = self._parameters

    def restored_on_error(self) -> contextlib.AbstractContextManager[None]:
        """After an exception ``.grad``, buffers, values included, and the random state are what they were."""
        return self._runs.restored_on_error()

    def record(self, calls: Calls | None = None) -> Evaluation:
        """Run for real; ``.grad`` is then the gradient at this point.

        Args:
            calls: Notes the modules that are called; None where nobody asks.

        Raises:
            TypeError: the closure returns neither a loss nor ``(loss, outputs)``.
            RuntimeError: the loss is not a finite scalar with a path to the parameters.
        """
        with torch.enable_grad(), evaluating():
            returned, mode = self._runs.for_real(calls)
            return self._evaluated(returned, mode)

    def _evaluated(self, returned: Any, mode: Record) -> Evaluation:
        """Of a closure that ran."""
        loss, outputs = split(returned)
        filled = mode.filled_from()
        roots = filled or [root_of(loss)]
        self._note(roots, mode)
        if not filled:
            gradients.fill(self._parameters, loss)
        gradient = gradients.flat(self._parameters)
        value, norm = gradients.measured(loss, gradient)
        asked = Asked(loss, value, norm, roots, outputs, *_earlier(mode.earlier_passes))
        return evaluation_of(asked, mode, gradient, self._parameters, self._sign)

    def _note(self, roots: Weighted, mode: Record) -> None:
        """What other runs and the products need to know of the recorded one."""
        behind = Behind.of([root for root, _ in roots])
        own = {id(parameter) for parameter in self._parameters}
        self._leaves = (*self._parameters, *(leaf for leaf in behind.leaves if id(leaf) not in own))
        self._differentiates = mode.differentiates
        self.is_suspect = behind.first < self._runs.first_node

    @contextlib.contextmanager
    def differentiating(self) -> Iterator[None]:
        """Around products on the recorded graph: a checkpoint computes again what was recorded.

        Hooks on parameters, which clip a gradient for one, do not act: a product is no gradient.

        Raises:
            MissingDerivativeError: the graph holds an operation without a second derivative.
        """
        with evaluating(), without_hooks(self._parameters):
            try:
                yield
            except MissingDerivativeError as error:
                remedy = "no decomposition of it is known here; replace it by differentiable operations"
                raise MissingDerivativeError(error.operation, remedy) from error

    def value(self, beside: Tensor | None = None) -> float:
        """The loss at the present parameters; NaN and infinity are values here, not errors.

        ``beside`` is added to what is minimised, and read with it.
        """
        own = beside if beside is None or self._sign > 0 else -beside
        return self._sign * number(self.run(), own)

    def run(self, log: LossLog | None = None) -> Tensor | float:
        """The loss at the present parameters, which is not read; ``log`` takes the known losses."""
        differentiates = self._differentiates
        with self._runs.without_trace(self._leaves) as (guard, grads):
            mode = Value(guard, grads, differentiates, self._runs.random, log)
            loss: Tensor | float = self._runs.again(mode, gradients=differentiates)
            return loss

    def gradient(self) -> Tensor:
        """The gradient at the present parameters, flat; ``.grad`` is left alone."""
        with self._runs.without_trace(self._leaves) as (guard, _):
            mode = Record(self._parameters, guard, self._runs.random)
            loss = self._runs.again(mode, gradients=True)
            if not mode.roots:
                with evaluating():
                    gradients.fill(self._parameters, root_of(loss)[0])
            return self._sign * gradients.flat(self._parameters)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Around calls that are made again, with gradients and without a trace.

        As the recorded run began, so do they: random numbers, buffers.
        """
        runs = self._runs
        with runs.without_trace(self._leaves) as (guard, grads), runs.random.replayed(), evaluating():
            mode = Again(guard, grads, runs.random)
            with torch.enable_grad(), mode:
                yield

    def elsewhere(self, evaluation: Evaluation, closure: Closure) -> Evaluation:
        """The same with the curvature of another closure's loss, at the same parameters.

        Its run leaves ``.grad`` and buffers alone, not the random state.
        """
        with self._runs.without_trace(self._leaves) as (guard, _), torch.enable_grad(), evaluating():
            mode = Record(self._parameters, guard, self._runs.random)
            with mode:
                loss, outputs = split(closure())
            roots = mode.filled_from() or [root_of(loss)]
            asked = Asked(loss, finite(loss), evaluation.norm, roots, outputs)
            other = evaluation_of(asked, mode, evaluation.gradient, self._parameters, self._sign)
        return evaluation._replace(objective=other.objective, coverage=other.coverage)

    def repeated(self, objective: Tensor) -> float | None:
        """``sign`` times the loss of another run at the same parameters, without a trace.

        None where there is no closure whose runs could differ.

        Raises:
            RuntimeError: parameters enter through nodes of the recorded ``objective``, which no run makes.
        """
        with self._runs.without_trace(self._leaves) as (guard, grads):
            mode = Again(guard, grads, self._runs.random)
            with contextlib.nullcontext() if self._differentiates else _saving_nothing():
                loss = self._runs.again(mode, gradients=True)
        roots = [root for root in (*mode.roots, loss) if isinstance(root, Tensor)]
        own = {id(parameter) for parameter in self._parameters}
        if early := own & leaves_by_nodes_of(objective, roots):
            raise RuntimeError(
                "closure must compute the loss anew each time it is called, but"
                f" {len(early)} of the parameters enter it through a graph that was made before; call"
                " the model inside the closure."
            )
        return self._sign * number(loss)


def evaluation_of(
    asked: Asked, mode: Record, gradient: Tensor, parameters: Sequence[Tensor], sign: int
) -> Evaluation:
    """With objective and coverage of the roots, at curvature ``scale`` times theirs; ``sign`` times all."""
    tensors = [root for root, _ in asked.roots]
    factor = sign * asked.scale
    is_loss = mode.is_plain and len(tensors) == 1 and tensors[0] is asked.loss
    weights = [weight if factor == 1 else factor * weight for _, weight in asked.roots]
    objective = _weighted_sum(tensors, weights)
    coverage = cover(mode.log.losses, tensors, weights, parameters, is_loss and factor > 0)
    if asked.outputs:
        squares = coverage.squares if coverage.is_of(asked.outputs) else ()
        coverage = explicit(objective, asked.outputs, parameters)._replace(squares=squares)
    if sign < 0:
        gradient = -gradient
    loss = asked.loss.detach() if isinstance(asked.loss, Tensor) else torch.tensor(asked.loss, device="cpu")
    value, entropies = sign * asked.value, mode.log.cross_entropies()
    return Evaluation(
        loss, value, objective, gradient, asked.norm, coverage, asked.partial, entropies, is_loss
    )


def _weighted_sum(tensors: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    products = [tensor * weight for tensor, weight in zip(tensors, weights, strict=True)]
    terms = [product.sum() if product.ndim else product for product in products]
    return sum(terms[1:], start=terms[0])


def _earlier(passes: int | None) -> tuple[str, float]:
    """Why the gradient is not the closure's own, if so, and how many times that it is then."""
    if passes is None:
        return "", 1.0
    what = f"{passes} backward pass(es)" if passes else "an earlier step"
    return f"the gradient was added to that of {what} before the closure", 1.0 + passes


def _saving_nothing() -> contextlib.AbstractContextManager[None]:
    """Graphs inside are bare: they can be looked at, and hold no memory."""
    return torch.autograd.graph.saved_tensors_hooks(lambda _: None, lambda kept: kept)
