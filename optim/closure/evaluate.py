"""Evaluate a user's closure, unchanged, in two modes.

*record*, once a step: the closure runs for real, its backward passes keep their graph, its losses are
noted. *value*, for every trial: gradients are off and backward is swallowed, the random state is the one of
the recording, and ``.grad``, buffers and everything else that existed before is left alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optim.closure.accumulation import Accumulation, marks, were_written
from optim.closure.coverage import Coverage
from optim.closure.edges import refuse_reentrant_checkpoint
from optim.closure.modes import Again, Record, Value, Weighted
from optim.closure.proof import cover, explicit
from optim.closure.returned import finite, number, root_of, split
from optim.closure.setting import evaluating, grads_put_aside, without_hooks
from secondorder.autodiff import graph
from secondorder.autodiff.guard import RandomState, WriteGuard, surely
from secondorder.autodiff.ladder import MissingDerivativeError
from secondorder.vectors.flat import flatten, is_finite

Closure = Callable[[], Any]


class Evaluation(NamedTuple):
    """What one recorded run of the closure gave; what is minimised is ``sign`` times its loss.

    Attributes:
        loss: What the closure returned as loss, detached.
        value: ``sign`` times it, as a number.
        objective: ``sign`` times the scalar with a graph whose gradient the closure asked for.
        gradient: ``sign`` times the gradient in ``.grad``, flat, shape (n,), in single precision at least.
        coverage: Blocks of the Gauss-Newton matrix, or why there are none.
        partial: Why the gradient is not that of ``objective`` alone, so that ``value`` says nothing about a
            step along it; empty where it is.
    """

    loss: Tensor
    value: float
    objective: Tensor
    gradient: Tensor
    coverage: Coverage
    partial: str = ""


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
        self._closure, self._sign = closure, sign
        self._parameters = tuple(parameters)
        self._accumulation = accumulation or Accumulation()
        self._random = RandomState(parameter.device for parameter in self._parameters)
        # Of the recorded run, whose writes stay unless the step fails.
        self._guard = WriteGuard()
        self._differentiates = False
        # Number of the first node that the recorded run could make.
        self._first_node = 0
        # Leaves that the loss depends on and that the optimizer does not move.
        self._others: list[Tensor] = []

    @contextlib.contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """After an exception ``.grad``, buffers, values included, and the random state are what they were."""
        self._random.save()
        grads = [parameter.grad for parameter in self._parameters]
        copies = [None if grad is None else grad.detach().clone() for grad in grads]
        for grad in grads:
            if grad is not None:
                self._guard.adopt(grad)

        def restore() -> None:
            self._random.restore()
            self._guard.undo()
            for parameter, grad, copy in zip(self._parameters, grads, copies, strict=True):
                parameter.grad = grad
                if grad is not None and copy is not None:
                    grad.detach().copy_(copy)

        try:
            yield
        except BaseException:
            surely(restore)
            raise

    def record(self) -> Evaluation:
        """Run for real; ``.grad`` is then the gradient at this point.

        Raises:
            TypeError: the closure returns neither a loss nor ``(loss, outputs)``.
            RuntimeError: the loss is not a finite scalar with a path to the parameters.
        """
        returned, mode, has_filled = self._run_for_real(self._closure)
        return self._evaluation_of(returned, mode, has_filled)

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

    def _run_for_real(self, closure: Closure) -> tuple[Any, Record, bool]:
        """What it returned, what was recorded, and whether it wrote to a ``.grad``."""
        self._random.save()
        mode = Record(self._parameters, self._guard, self._random, self._accumulation)
        before = marks(self._parameters)
        self._first_node = torch._C._autograd._get_sequence_nr()
        with torch.enable_grad(), evaluating(), mode:
            returned = closure()
        refuse_reentrant_checkpoint([root for root, _ in mode.roots])
        return returned, mode, were_written(self._parameters, before)

    def _evaluation_of(self, returned: Any, mode: Record, has_filled: bool) -> Evaluation:
        """Of a closure that ran."""
        loss, outputs = split(returned)
        value = finite(loss)
        roots = mode.roots or (mode.differentiated if has_filled else [])
        if not roots:
            roots = [root_of(loss)]
            self._fill_grads(roots[0][0])
        gradient = self._gradient()
        partial, scale = "", 1.0
        if mode.earlier_passes is not None:
            what = f"{mode.earlier_passes} backward pass(es)" if mode.earlier_passes else "an earlier step"
            partial = f"the gradient was added to that of {what} before the closure"
            scale += mode.earlier_passes
        return self._evaluation(mode, loss, value, roots, gradient, outputs, partial, scale)

    def _evaluation(
        self,
        mode: Record,
        loss: Any,
        value: float,
        roots: Weighted,
        gradient: Tensor,
        outputs: Sequence[Tensor] = (),
        partial: str = "",
        scale: float = 1.0,
    ) -> Evaluation:
        """Objective and coverage of the roots; with curvature ``scale`` times theirs."""
        self._differentiates = mode.differentiates
        tensors = [root for root, _ in roots]
        own = {id(parameter) for parameter in self._parameters}
        self._others = [leaf for leaf in graph.leaves(tensors) if id(leaf) not in own]
        self.is_suspect = any(node._sequence_nr() < self._first_node for node in graph.nodes(tensors))
        if not is_finite(gradient):
            raise RuntimeError(
                "the gradient at the current parameters must be finite, got NaN or infinity;"
                " look for the operation with torch.autograd.set_detect_anomaly(True)."
            )
        with torch.enable_grad(), evaluating():
            weights = [self._sign * scale * weight for _, weight in roots]
            terms = [(root * weight).sum() for root, weight in zip(tensors, weights, strict=True)]
            objective = sum(terms[1:], start=terms[0])
            if outputs:
                coverage = explicit(objective, outputs, self._parameters)
            else:
                coverage = cover(mode.log.losses, tensors, weights, self._parameters)
        if self._sign < 0:
            gradient = -gradient
        returned = loss.detach() if isinstance(loss, Tensor) else torch.tensor(loss)
        return Evaluation(returned, self._sign * value, objective, gradient, coverage, partial)

    def value(self) -> float:
        """The loss at the present parameters; NaN and infinity are values here, not errors."""
        leaves = (*self._parameters, *self._others)
        gradients = {leaf: leaf.grad for leaf in leaves}
        with self._rewound(), grads_put_aside(leaves), WriteGuard() as guard:
            mode = Value(guard, gradients, self._differentiates, self._random)
            return self._sign * number(self._replay(mode, gradients=self._differentiates))

    def gradient(self) -> Tensor:
        """The gradient at the present parameters, flat; ``.grad`` is left alone."""
        leaves = (*self._parameters, *self._others)
        with self._rewound(), grads_put_aside(leaves), WriteGuard() as guard:
            mode = Record(self._parameters, guard, self._random)
            loss = self._replay(mode, gradients=True)
            if not mode.roots:
                self._fill_grads(root_of(loss)[0])
            return self._sign * self._gradient()

    def repeated(self, objective: Tensor) -> float | None:
        """``sign`` times the loss of another run at the same parameters, without a trace.

        None where there is no closure whose runs could differ.

        Raises:
            RuntimeError: parameters enter through nodes of the recorded ``objective``, which no run makes.
        """
        leaves = (*self._parameters, *self._others)
        gradients = {leaf: leaf.grad for leaf in leaves}
        with self._rewound(), grads_put_aside(leaves), WriteGuard() as guard:
            mode = Again(guard, gradients, self._random)
            with contextlib.nullcontext() if self._differentiates else _saving_nothing():
                loss = self._replay(mode, gradients=True)
        own = {id(parameter) for parameter in self._parameters}
        old = set(graph.nodes([objective]))
        roots = [root for root in (*mode.roots, loss) if isinstance(root, Tensor)]
        shared = [node for node in graph.nodes(roots) if node in old]
        following = [node for each in shared for node, _ in each.next_functions]
        behind = {id(getattr(node, "variable", None)) for node in following}
        if own & behind:
            raise RuntimeError(
                "closure must compute the loss anew each time it is called, but"
                f" {len(own & behind)} of the parameters enter it through a graph that was made before; call"
                " the model inside the closure."
            )
        return self._sign * number(loss)

    def _rewound(self) -> contextlib.AbstractContextManager[None]:
        """Buffers as the recorded run found them: spectral_norm computes with what it writes to."""
        return self._guard.rewound(self._parameters)

    def _replay(self, mode: Record | Value, gradients: bool) -> Any:
        """The loss of another run with the random numbers of the recorded one."""
        with self._random.replayed(), torch.set_grad_enabled(gradients), evaluating(), mode:
            try:
                return split(self._closure())[0]
            except StopIteration as error:
                raise RuntimeError(
                    "closure must be the same function in all its calls of a step, but an iterator that it"
                    " draws from is exhausted; draw the batch outside of the closure."
                ) from error

    def _fill_grads(self, root: Tensor) -> None:
        refuse_reentrant_checkpoint([root])
        with evaluating():
            grads = torch.autograd.grad(root, self._parameters, retain_graph=True, allow_unused=True)
        for parameter, grad in zip(self._parameters, grads, strict=True):
            parameter.grad = grad

    def _gradient(self) -> Tensor:
        """What ``.grad`` holds, flat."""
        grads = [parameter.grad for parameter in self._parameters]
        if all(grad is None for grad in grads):
            raise RuntimeError(
                "the loss must depend on at least one parameter of the optimizer, but no parameter received a"
                " gradient; pass the parameters of the model that the closure evaluates."
            )
        if any(grad is not None and grad.layout is not torch.strided for grad in grads):
            raise RuntimeError(
                "gradients must be dense, got a sparse one; use sparse=False in the embedding."
            )
        gradient = flatten(
            [torch.zeros_like(p) if g is None else g for p, g in zip(self._parameters, grads, strict=True)]
        )
        return gradient.to(torch.promote_types(gradient.dtype, torch.float32))


def _saving_nothing() -> contextlib.AbstractContextManager[None]:
    """Graphs inside are bare: they can be looked at, and hold no memory."""
    return torch.autograd.graph.saved_tensors_hooks(lambda _: None, lambda kept: kept)
