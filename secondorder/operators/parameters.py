"""Operators on the flat vector of some parameters: what they share, and the Jacobian."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from secondorder.autodiff import graph, ladder
from secondorder.autodiff.backward import Pass, cotangents
from secondorder.autodiff.convolutions import lighten_rows
from secondorder.autodiff.decompose import current
from secondorder.autodiff.graph import Source, has_graph, like
from secondorder.operators.linear import LinearOperator
from secondorder.operators.widths import Pieces
from secondorder.vectors import arguments
from secondorder.vectors.flat import Layout, flatten, flatten_rows
from secondorder.vectors.tree import Tree

Function = Callable[..., Any]


class ParameterOperator(LinearOperator):
    """An operator on the flat vector of some parameters.

    Args:
        parameters: Tensors of one dtype and device that require gradients.
        batched: How a block of vectors is multiplied: True, all columns in one batched backward pass; False,
            one after another; None, in pieces as wide as is fastest, measured with the first block of at
            least eight columns, and as memory allows.

    Raises:
        TypeError: a parameter is not a tensor.
        ValueError: ``parameters`` is empty, mixed or frozen.
    """

    def __init__(self, parameters: Iterable[Tensor], batched: bool | None = None) -> None:
        self.parameters = check_parameters(parameters)
        self._pieces, self._rung = Pieces(batched), current()
        first = self.parameters[0]
        self._layout = Layout(self.parameters)
        super().__init__((self._layout.size, self._layout.size), first.dtype, first.device)
        self._parts = self.parameters
        self._is_real_linear = first.dtype.is_complex

    @abstractmethod
    def differentiated(self) -> Iterable[Tensor | None]:
        """The tensors through whose graph a product is a backward pass."""

    @abstractmethod
    def _apply(self, parts: Sequence[Tensor], batched: bool) -> list[Tensor]:
        """The product, in parts shaped like the parameters, with a leading dimension where batched."""

    def restrict(self, indices: Iterable[int]) -> ParameterOperator:
        """The diagonal block of the parameters at some positions, exactly: on their flat vector alone.

        Shares its graph with this one; a product costs less, for gradients end at these parameters.

        Raises:
            ValueError: ``indices`` is empty.
        """
        kept = list(indices) if isinstance(indices, Iterable) else [indices]
        count = len(self.parameters)
        if not kept or not all(isinstance(i, int) and -count <= i < count for i in kept):
            raise ValueError(
                f"indices must be positions in parameters, integers below {count}, got {indices!r}."
            )
        block = copy.copy(self)
        block._keep(kept)
        block._pieces = Pieces(self._pieces.batched)
        block.parameters = block._parts = tuple(self.parameters[i] for i in kept)
        block._layout = Layout(block.parameters)
        block.shape = (block._layout.size, block._layout.size)
        return block

    @abstractmethod
    def _keep(self, indices: list[int]) -> None:
        """Drop what belongs to other parameters."""

    def blocks(self) -> list[ParameterOperator]:
        """The diagonal blocks of the parameters, one each, in order."""
        return [self.restrict([i]) for i in range(len(self.parameters))]

    def _matvec(self, v: Tensor) -> Tensor:
        with self._rung():
            return flatten(self._apply(self._layout.unflatten(v), False))

    def _matmat(self, V: Tensor) -> Tensor:
        return self._pieces.multiply(V, self._matvec, self._in_batch, partial(_roots, self))

    def _in_batch(self, V: Tensor) -> Tensor:
        with self._rung():
            return flatten_rows(self._apply(self._layout.unflatten_rows(V.T), True)).T


class Jacobian(LinearOperator):
    """Jacobian of outputs with respect to parameters, flat: shape (outputs, parameters).

    ``J @ v`` repeats the derivative of ``u -> J^T u`` with respect to ``u``, whose graph is kept;
    ``J.T @ u`` is a backward pass. ``J @ J.T`` is the kernel of the outputs (the empirical tangent kernel),
    symmetric and, with fewer outputs than parameters, the smaller Gauss-Newton system.

    Args:
        outputs: Tensors that carry a graph, one or a tuple.
        parameters: Tensors of one dtype and device that require gradients.
        keep_graph: Keep the graph of ``u -> J^T u`` between products; without it, each ``J @ v`` builds it
            anew.
        batched: As in ``ParameterOperator``.

    Raises:
        ValueError: ``outputs`` carry no graph, or are on another device than the parameters; ``parameters``
            is empty, mixed or frozen.

    Cost: construction, one gradient with a graph; ``J @ v`` about 0.4, ``J.T @ u`` 0.7 gradients.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> J = Jacobian(w**2, [w])
        >>> J @ torch.ones(2), (J @ J.T).dense()
        (tensor([2., 4.]), tensor([[ 4.,  0.],
                [ 0., 16.]]))
    """

    is_symmetric = False

    _kept: Pass | None = None

    def __init__(
        self,
        outputs: Tensor | Sequence[Source],
        parameters: Iterable[Tensor],
        *,
        keep_graph: bool = True,
        batched: bool | None = None,
    ) -> None:
        self.parameters = check_parameters(parameters)
        self._sources: tuple[Source, ...] = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
        self.outputs = tuple(map(like, self._sources))
        first = self.parameters[0]
        if not any(map(has_graph, self._sources)):
            raise ValueError("outputs must carry a graph; compute them with gradients on.")
        _check_outputs(self.outputs, first)
        self._pieces, self._transposed_pieces = Pieces(batched), Pieces(batched)
        self._rung = current()
        self._rows, self._columns = Layout(self.outputs), Layout(self.parameters)
        super().__init__((self._rows.size, self._columns.size), first.dtype, first.device)
        self._is_real_linear = first.dtype.is_complex
        self._backward = Pass(self._sources, self.parameters)
        self._kept = self.forward if keep_graph else None
        # Outputs of another dtype, as under autocast; flat vectors are of the parameters' alone.
        self.is_mixed = any(output.dtype != first.dtype for output in self.outputs)

    @classmethod
    def of(
        cls, func: Function, inputs: Any, *, keep_graph: bool = True, batched: bool | None = None
    ) -> Jacobian:
        """The Jacobian of ``func`` at ``inputs``: a tensor, a tuple of arguments, or any pytree.

        Where a derivative is missing, ``func`` is called once more under ``decompose()``.
        """
        tree = Tree.of(inputs, "Jacobian.of")

        def build() -> Jacobian:
            outputs = arguments.as_tuple(tree.call(func), arguments.OUTPUTS, "Jacobian.of")[1]
            jacobian = cls(outputs, tree.leaves, keep_graph=keep_graph, batched=batched)
            return tried(jacobian)

        return ladder.climb(build)

    @property
    def forward(self) -> Pass:
        """``J v`` in parts shaped like the outputs, kept or built anew.

        ``J^T u`` is linear in ``u``: its derivative, applied to ``v``, is ``J v``.
        """
        if self._kept is not None:
            return self._kept
        graph.refuse_wrong_rows(self._sources, self.parameters)
        with torch.enable_grad():
            duals = cotangents(self.outputs)
            pulled = self._backward.rows(duals)
        lighten_rows(pulled, self._sources)
        return Pass(pulled, duals)

    def differentiated(self) -> Iterable[Tensor | None]:
        """``J^T u``: the tensors through whose graph ``J @ v`` is a backward pass."""
        return self.forward.outputs

    def backward(self, parts: Sequence[Tensor], batched: bool) -> list[Tensor]:
        """``J^T u`` in parts, shaped like the parameters."""
        if self.is_mixed:
            parts = [part.to(output.dtype) for part, output in zip(parts, self.outputs, strict=True)]
        return self._backward(parts, batched)

    def restrict(self, indices: Sequence[int]) -> Jacobian:
        """The columns of some parameters."""
        block = copy.copy(self)
        block.parameters = tuple(self.parameters[i] for i in indices)
        block._columns = Layout(block.parameters)
        block._pieces, block._transposed_pieces = Pieces(self._pieces.batched), Pieces(self._pieces.batched)
        block.shape = (self.shape[0], block._columns.size)
        block._backward = Pass(self._sources, block.parameters)
        if self._kept is not None:
            block._kept = Pass([self._kept.outputs[i] for i in indices], self._kept.inputs)
        return block

    def _matvec(self, v: Tensor) -> Tensor:
        with self._rung():
            return flatten(self.forward(self._columns.unflatten(v), False)).to(self.dtype)

    def _matmat(self, V: Tensor) -> Tensor:
        return self._pieces.multiply(V, self._matvec, self._in_batch, partial(_roots, self))

    def _in_batch(self, V: Tensor) -> Tensor:
        with self._rung():
            return flatten_rows(self.forward(self._columns.unflatten_rows(V.T), True)).T.to(self.dtype)

    def _rmatvec(self, u: Tensor) -> Tensor:
        with self._rung():
            return flatten(self.backward(self._rows.unflatten(u), False))

    def _rmatmat(self, U: Tensor) -> Tensor:
        return self._transposed_pieces.multiply(
            U, self._rmatvec, self._transposed_in_batch, lambda: self._sources
        )

    def _transposed_in_batch(self, U: Tensor) -> Tensor:
        with self._rung():
            return flatten_rows(self.backward(self._rows.unflatten_rows(U.T), True)).T


class ThroughOutputs(ParameterOperator):
    """``J^T M J`` for a symmetric ``M`` in the space of outputs.

    Attributes:
        jacobian: ``J``, of shape (outputs, parameters).
    """

    jacobian: Jacobian

    @abstractmethod
    def _middle(self, parts: list[Tensor], batched: bool) -> list[Tensor]:
        """``M u`` in parts, shaped like the outputs."""

    @property
    def kernel(self) -> LinearOperator:
        """``J J^T`` in the space of outputs, shape (m, m): the smaller one with few outputs."""
        return self.jacobian @ self.jacobian.T

    def differentiated(self) -> Iterable[Tensor | None]:
        """Those of the Jacobian."""
        return self.jacobian.differentiated()

    def multiplied(self, parts: Sequence[Tensor], batched: bool = False) -> list[Tensor]:
        """The product in parts; of a network that only hands its inputs on, ``M u``."""
        jacobian = self.jacobian
        is_identity = list(map(id, jacobian.outputs)) == list(map(id, self.parameters))
        return self._middle(list(parts), batched) if is_identity else self._apply(parts, batched)

    def _apply(self, parts: Sequence[Tensor], batched: bool) -> list[Tensor]:
        jacobian = self.jacobian
        return jacobian.backward(self._middle(jacobian.forward(parts, batched), batched), batched)

    def _keep(self, indices: list[int]) -> None:
        self.jacobian = self.jacobian.restrict(indices)


AnyOperator = TypeVar("AnyOperator", bound=ParameterOperator | Jacobian)


def _roots(operator: ParameterOperator | Jacobian) -> Iterable[Source | None]:
    """What a pass starts from."""
    with operator._rung():
        return operator.differentiated()


def tried(operator: AnyOperator) -> AnyOperator:
    """The operator, after a product where only a product finds out that a derivative is missing."""
    if graph.has_missing(operator.differentiated()):
        operator @ torch.zeros(operator.shape[1], dtype=operator.dtype, device=operator.device)
    return operator


def _check_outputs(outputs: Iterable[Tensor], first: Tensor) -> None:
    for output in outputs:
        if output.device != first.device or output.is_complex() != first.is_complex():
            raise ValueError(
                f"outputs and parameters must be on one device, and real or complex together, got"
                f" {output.dtype} on {output.device} and {first.dtype} on {first.device}."
            )


def check_parameters(parameters: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """The parameters as a tuple; raises unless they are different tensors of one dtype and device.

    And unless they require gradients.
    """
    if isinstance(parameters, Tensor):
        raise TypeError("parameters must be an iterable of tensors, got one tensor; pass [parameter].")
    tensors = tuple(parameters)
    for index, parameter in enumerate(tensors):
        if not isinstance(parameter, Tensor):
            raise TypeError(f"parameters[{index}] must be a tensor, got {type(parameter).__name__}.")
    if not tensors:
        raise ValueError("parameters must hold at least one tensor, got none.")
    first, seen = tensors[0], set[int]()
    for index, parameter in enumerate(tensors):
        if id(parameter) in seen:
            raise ValueError(f"parameters must hold each tensor once, got parameters[{index}] twice.")
        if not parameter.requires_grad:
            raise ValueError(f"parameters[{index}] must require gradients; call requires_grad_() on it.")
        if parameter.dtype != first.dtype or parameter.device != first.device:
            raise ValueError(
                f"parameters must share dtype and device, got {first.dtype} on {first.device} and "
                f"{parameter.dtype} on {parameter.device}."
            )
        seen.add(id(parameter))
    return tensors
