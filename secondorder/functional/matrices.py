"""``jacobian`` and ``hessian``: whole matrices, in the structure of inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from secondorder.autodiff import graph, ladder
from secondorder.autodiff.backward import HessianGraph, try_product
from secondorder.autodiff.decompose import forward_mode
from secondorder.autodiff.guard import RandomState, undo_writes
from secondorder.functional import strategies
from secondorder.functional.strategies import Blocks
from secondorder.vectors import arguments
from secondorder.vectors.arguments import Outputs, Tensors

T = TypeVar("T")
Function = Callable[..., Any]
TensorOrTensors = Tensor | tuple[Tensor, ...]


def jacobian(
    func: Function,
    inputs: TensorOrTensors,
    create_graph: bool = False,
    strict: bool = False,
    vectorize: bool = False,
    strategy: str = "reverse-mode",
    *,
    chunk_size: int | None = None,
    return_output: bool = False,
    has_aux: bool = False,
    holomorphic: bool = False,
) -> Any:
    """Jacobian of ``func``.

    Args:
        func: Takes the inputs, returns a tensor or a tuple of tensors.
        inputs: Point of differentiation.
        create_graph: The result carries a graph. Reverse mode only.
        strict: Raise where an output does not depend on an input, instead of returning zeros. Only
            in reverse mode without ``vectorize``.
        vectorize: One batched backward pass (``torch.vmap``) instead of one for each output element.
        strategy: "reverse-mode", or "forward-mode", which takes one pass for all input elements and
            needs ``vectorize=True``.
        chunk_size: Rows (columns in forward mode) in one batched pass, to bound memory; turns
            ``vectorize`` on. All at once when None. Forward mode calls ``func`` once for each chunk.
        return_output: Return the outputs as well.
        has_aux: ``func`` returns ``(outputs, aux)``; ``aux`` is passed on as the last result.
        holomorphic: ``func`` is a holomorphic function of complex inputs; the result is its complex
            derivative.

    Returns:
        A tensor of shape ``output.shape + input.shape``; with tuples, ``result[i][j]`` is the Jacobian
        of output ``i`` with respect to input ``j``. With ``return_output`` or ``has_aux`` a tuple
        ``(jacobian, outputs, aux)`` of what was asked for.

    Raises:
        TypeError: ``inputs`` or the outputs are neither a tensor nor a tuple of tensors; ``holomorphic``
            with real ones.
        ValueError: ``chunk_size`` is not a positive integer.
        AssertionError: ``strategy`` is unknown.
        RuntimeError: ``strict`` found no dependence, or is not supported by the strategy.
        NotImplementedError: forward mode with ``create_graph`` or without ``vectorize``.

    Cost: one gradient, and one backward pass for each output element (row by row); one batched pass
    (vectorized), with memory for all rows at once, or for ``chunk_size`` of them.

    Example:
        >>> jacobian(lambda x: x**2, torch.tensor([1.0, 2.0]))
        tensor([[2., 0.],
                [0., 4.]])
    """
    options = _Options(create_graph, strict, vectorize, strategy, chunk_size, holomorphic)
    is_inputs_tuple, outputs, blocks = _blocks(func, inputs, options, has_aux)
    results = [_unpack(blocks, outputs.is_tuple, is_inputs_tuple)]
    if return_output:
        results.append(arguments.give_back(outputs.tensors, outputs.is_tuple, create_graph))
    if has_aux:
        results.append(arguments.give_back_aux(outputs.aux, create_graph))
    return tuple(results) if len(results) > 1 else results[0]


def hessian(
    func: Function,
    inputs: TensorOrTensors,
    create_graph: bool = False,
    strict: bool = False,
    vectorize: bool = False,
    outer_jacobian_strategy: str = "reverse-mode",
    *,
    chunk_size: int | None = None,
    return_output: bool = False,
    has_aux: bool = False,
) -> Any:
    """Hessian of a scalar function: the Jacobian of its gradient.

    Args:
        func: Takes the inputs, returns one tensor with one element.
        inputs: Point of differentiation.
        create_graph: The result carries a graph. Reverse mode only.
        strict: Raise where the value or its gradient does not depend on an input. Only in reverse mode
            without ``vectorize``.
        vectorize: One batched backward pass (``torch.vmap``) instead of one for each input element.
        outer_jacobian_strategy: "reverse-mode", or "forward-mode" (forward over reverse), which needs
            ``vectorize=True``.
        chunk_size: Rows (columns in forward mode) in one batched pass, to bound memory; turns
            ``vectorize`` on. All at once when None. Forward mode calls ``func`` once for each chunk.
        return_output: Return the value as well.
        has_aux: ``func`` returns ``(value, aux)``; ``aux`` is passed on as the last result.

    Returns:
        A tensor of shape ``input.shape + input.shape``; with a tuple of inputs, ``result[i][j]`` of
        shape ``input_i.shape + input_j.shape``. With ``return_output`` or ``has_aux`` a tuple
        ``(hessian, value, aux)`` of what was asked for.

    Raises:
        TypeError: ``inputs`` or the output are neither a tensor nor a tuple of tensors.
        ValueError: ``chunk_size`` is not a positive integer.
        AssertionError: ``outer_jacobian_strategy`` is unknown.
        RuntimeError: the output is not one tensor with one element; ``strict`` found no dependence, or
            is not supported by the strategy.
        NotImplementedError: forward mode with ``create_graph`` or without ``vectorize``.

    Cost: one gradient, and one second backward pass (1.3 gradients) for each input element; one batched
    pass (vectorized), with memory for all rows at once, or for ``chunk_size`` of them.

    Example:
        >>> hessian(lambda x: x.pow(3).sum(), torch.tensor([1.0, 2.0]))
        tensor([[ 6.,  0.],
                [ 0., 12.]])
    """
    is_inputs_tuple, inputs = arguments.as_tuple(inputs, "inputs", "hessian")
    if outer_jacobian_strategy not in ("forward-mode", "reverse-mode"):
        raise AssertionError('Expected strategy to be either "forward-mode" or "reverse-mode".')
    options = _Options(create_graph, strict, vectorize, outer_jacobian_strategy, chunk_size).checked()
    if outer_jacobian_strategy == "forward-mode":
        _check_forward(options)

    def compute() -> tuple[Tensor, Any, Blocks]:
        if outer_jacobian_strategy == "reverse-mode":
            return _reverse_hessian(func, inputs, options, has_aux)
        return _or_else(
            lambda: _forward_hessian(func, inputs, options, has_aux),
            lambda: _reverse_hessian(func, inputs, _Options(), has_aux),
        )

    value, aux, blocks = ladder.climb(compute)
    if not create_graph:
        blocks = tuple(tuple(block.detach() for block in row) for row in blocks)
    results = [_unpack(blocks, is_inputs_tuple, is_inputs_tuple)]
    if return_output:
        results.append(arguments.give_back((value,), False, create_graph))
    if has_aux:
        results.append(arguments.give_back_aux(aux, create_graph))
    return tuple(results) if len(results) > 1 else results[0]


def _reverse_hessian(
    func: Function, inputs: Tensors, options: _Options, has_aux: bool
) -> tuple[Tensor, Any, Blocks]:
    """Value, aux, and the rows of the Hessian by backward passes through the gradient."""
    with torch.enable_grad():
        inputs = arguments.fresh_inputs(inputs, options.create_graph)
        hooks = graph.HookCount()
        value, aux = arguments.call_scalar(func, inputs, "hessian", options.strict, has_aux)
        graph.refuse_wrong((value,), inputs, create_graph=options.create_graph)
        grads = arguments.grad((value,), inputs, create_graph=True)
        filled = arguments.fill_zeros(grads, inputs, False, True, "back")
        arguments.require_grad_of_jacobian(filled, options.strict)
        is_plain = not (options.strict or hooks.has_grown() or any(x.is_complex() for x in inputs))
        rows = HessianGraph.of(value, grads, inputs, is_plain, left=True)
        outputs = arguments.fill_zeros(rows.outputs, inputs, False, True, "back")
        return value, aux, _reverse(outputs, rows.inputs, options)


def _forward_hessian(
    func: Function, inputs: Tensors, options: _Options, has_aux: bool
) -> tuple[Tensor, Any, Blocks]:
    """Value, aux, and the columns of the Hessian by forward mode over the gradient."""
    found, blocks = _forward(_gradient_for_forward_mode(func, has_aux), inputs, options)
    return *found.aux, blocks


def _or_else(by_forward_mode: Callable[[], T], row_by_row: Callable[[], T]) -> T:
    """The second where ``torch.func``, under which the first runs, refuses the function or is wrong."""
    random = RandomState()
    random.save()
    try:
        with undo_writes(only_on_error=True):
            return by_forward_mode()
    except RuntimeError as error:
        is_refused = isinstance(error, graph.WrongDerivativeError) and not error.is_decomposed
        if ladder.missing(error) is not None and not is_refused:
            raise
    random.restore()
    return row_by_row()


def _gradient_for_forward_mode(func: Function, has_aux: bool) -> Callable[..., Outputs]:
    """The gradient by ``torch.func``, which composes with its forward mode and ``vmap``."""

    def gradient(*points: Tensor) -> Outputs:
        rebuild: Callable[[Tensors], Any]

        def scalar(*inner: Tensor) -> tuple[Tensor, Tensors]:
            nonlocal rebuild
            with forward_mode():
                value, aux = arguments.call_scalar(func, inner, "hessian", False, has_aux)
            tensors, rebuild = arguments.split_tensors((value, aux))
            if value.is_complex():
                text = "grad can be implicitly created only for real scalar outputs but got"
                raise RuntimeError(f"{text} {value.dtype}")
            # An integer value does not depend on the inputs: its gradient is zero.
            return value if value.is_floating_point() else value.to(inner[0].dtype), tensors

        pulled: Any = torch.func.vjp(scalar, *points, has_aux=True)
        value, pull, tensors = pulled
        return Outputs(pull(torch.ones_like(value)), True, rebuild(tensors))

    return gradient


class _Options(NamedTuple):
    """How to compute a Jacobian."""

    create_graph: bool = False
    strict: bool = False
    vectorize: bool = False
    strategy: str = "reverse-mode"
    chunk_size: int | None = None
    holomorphic: bool = False

    def checked(self) -> _Options:
        """Raise for what does not go together, in torch's order; ``chunk_size`` turns vectorize on."""
        arguments.check_chunk_size(self.chunk_size)
        if self.strategy not in ("forward-mode", "reverse-mode"):
            raise AssertionError(
                'Expected strategy to be either "forward-mode" or "reverse-mode". Hint: If your '
                'function has more outputs than inputs, "forward-mode" tends to be more performant. '
                'Otherwise, prefer to use "reverse-mode".'
            )
        if self.strategy == "forward-mode" and self.create_graph:
            raise NotImplementedError(
                "torch.autograd.functional.jacobian: `create_graph=True` "
                'and `strategy="forward-mode"` are not supported together (yet). '
                "Please either set `create_graph=False` or "
                '`strategy="reverse-mode"`.'
            )
        if self.strategy == "forward-mode" and self.strict:
            raise RuntimeError(
                "torch.autograd.functional.jacobian: `strict=True` "
                'and `strategy="forward-mode"` are not supported together (yet). '
                "Please either set `strict=False` or "
                '`strategy="reverse-mode"`.'
            )
        return self._replace(vectorize=self.vectorize or self.chunk_size is not None)


def _blocks(func: Function, inputs: Any, options: _Options, has_aux: bool) -> tuple[bool, Outputs, Blocks]:
    """Run the strategy; blocks are detached as promised."""
    options = options.checked()
    is_inputs_tuple, inputs = arguments.as_tuple(inputs, "inputs", "jacobian")
    if options.strategy == "forward-mode":
        _check_forward(options)
        outputs, blocks = ladder.climb(lambda: _forward_jacobian(func, inputs, options, has_aux))
    elif options.create_graph:
        outputs, blocks = ladder.climb(lambda: _reverse_jacobian(func, inputs, options, has_aux))
    else:
        outputs, blocks = _reverse_jacobian(func, inputs, options, has_aux)
    if options.holomorphic:
        # Autograd gives the conjugate of the derivative.
        blocks = tuple(tuple(block.conj().resolve_conj() for block in row) for row in blocks)
    if not options.create_graph:
        blocks = tuple(tuple(block.detach() for block in row) for row in blocks)
    return is_inputs_tuple, outputs, blocks


def _reverse_jacobian(
    func: Function, inputs: Tensors, options: _Options, has_aux: bool
) -> tuple[Outputs, Blocks]:
    with torch.enable_grad():
        inputs = arguments.fresh_inputs(inputs, options.create_graph)
        outputs = arguments.call(func, inputs, "jacobian", options.strict, has_aux)
        if options.create_graph:
            graph.refuse_wrong(outputs.tensors, inputs, create_graph=True)
        blocks = _reverse(outputs.tensors, inputs, options)
        if options.create_graph:
            try_product(tuple(block for row in blocks for block in row), inputs)
        return outputs, blocks


def _forward_jacobian(
    func: Function, inputs: Tensors, options: _Options, has_aux: bool
) -> tuple[Outputs, Blocks]:
    """By forward mode; row by row where torch.func, under which it runs, refuses the function."""

    def outputs_of(*points: Tensor) -> Outputs:
        with forward_mode():
            return arguments.call(func, points, "jacobian", False, has_aux)

    return _or_else(
        lambda: _forward(outputs_of, inputs, options),
        lambda: _reverse_jacobian(func, inputs, _Options(), has_aux),
    )


def _forward(func: Callable[..., Outputs], inputs: Tensors, options: _Options) -> tuple[Outputs, Blocks]:
    return strategies.forward_mode(func, tuple(map(_copied, inputs)), options.chunk_size)


def _check_forward(options: _Options) -> None:
    """Raise for what forward mode lacks, after the inputs were looked at, as torch does."""
    if not options.vectorize:
        raise NotImplementedError(
            "Computing Jacobian using forward-AD or forward-over-reverse Hessian is"
            "only implemented for `vectorize=True`."
        )
    if options.holomorphic:
        raise ValueError('holomorphic=True needs strategy="reverse-mode", got "forward-mode".')


def _copied(tensor: Tensor) -> Tensor:
    """A copy with the same strides: what a function does to its argument does not reach the user's tensor."""
    tensor = tensor.detach()
    if arguments.is_expanded(tensor):
        return tensor.contiguous()
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(tensor)


def _reverse(outputs: Tensors, inputs: Tensors, options: _Options) -> Blocks:
    if options.vectorize and options.strict:
        raise RuntimeError(
            "torch.autograd.functional.jacobian: `strict=True` "
            "and `vectorized=True` are not supported together. "
            "Please either set `strict=False` or "
            "`vectorize=False`."
        )
    if options.holomorphic and not all(tensor.is_complex() for tensor in (*inputs, *outputs)):
        kinds = sorted({str(tensor.dtype) for tensor in (*inputs, *outputs) if not tensor.is_complex()})
        raise TypeError(f"holomorphic=True needs complex inputs and outputs, got {', '.join(kinds)}.")
    if options.vectorize or options.holomorphic:
        return strategies.batched_rows(outputs, inputs, options.create_graph, options.chunk_size)
    return strategies.row_by_row(outputs, inputs, options.create_graph, options.strict)


def _unpack(blocks: Blocks, is_outputs_tuple: bool, is_inputs_tuple: bool) -> Any:
    """Blocks in the structure that the user's tuples ask for."""
    rows = [row if is_inputs_tuple else row[0] for row in blocks]
    return tuple(rows) if is_outputs_tuple else rows[0]
