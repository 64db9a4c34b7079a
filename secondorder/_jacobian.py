"""The strategies behind ``jacobian`` and ``hessian``: row by row, batched rows, forward mode.

Each returns the blocks as ``blocks[output][input]``, of shape ``output.shape + input.shape``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from secondorder import _arguments
from secondorder._arguments import Tensors

Blocks = tuple[tuple[Tensor, ...], ...]


def blocks(
    func: Callable[..., Any], inputs: Any, create_graph: bool, strict: bool, vectorize: bool, strategy: str
) -> tuple[bool, bool, Blocks]:
    """Check the options in torch's order and run the strategy; blocks are detached as promised."""
    if strategy not in ("forward-mode", "reverse-mode"):
        raise AssertionError(
            'Expected strategy to be either "forward-mode" or "reverse-mode". Hint: If your '
            'function has more outputs than inputs, "forward-mode" tends to be more performant. '
            'Otherwise, prefer to use "reverse-mode".'
        )
    if strategy == "forward-mode":
        _check_forward_options(create_graph, strict)
        is_inputs_tuple, inputs = _arguments.as_tuple(inputs, "inputs", "jacobian")
        if not vectorize:
            raise NotImplementedError(
                "Computing Jacobian using forward-AD or forward-over-reverse Hessian is"
                "only implemented for `vectorize=True`."
            )
        # Forward mode refuses tensors whose elements share memory, as expanded ones do.
        inputs = tuple(tensor.detach().contiguous() for tensor in inputs)
        is_outputs_tuple, found = forward_mode(func, inputs)
        return is_inputs_tuple, is_outputs_tuple, _detached(found)

    with torch.enable_grad():
        is_inputs_tuple, inputs = _arguments.as_tuple(inputs, "inputs", "jacobian")
        inputs = _arguments.fresh_inputs(inputs, create_graph)
        is_outputs_tuple, outputs = _arguments.call(func, inputs, "jacobian", strict)
        if vectorize and strict:
            raise RuntimeError(
                "torch.autograd.functional.jacobian: `strict=True` "
                "and `vectorized=True` are not supported together. "
                "Please either set `strict=False` or "
                "`vectorize=False`."
            )
        if vectorize:
            found = batched_rows(outputs, inputs, create_graph)
        else:
            found = row_by_row(outputs, inputs, create_graph, strict)
    return is_inputs_tuple, is_outputs_tuple, found if create_graph else _detached(found)


def _check_forward_options(create_graph: bool, strict: bool) -> None:
    if create_graph:
        raise NotImplementedError(
            "torch.autograd.functional.jacobian: `create_graph=True` "
            'and `strategy="forward-mode"` are not supported together (yet). '
            "Please either set `create_graph=False` or "
            '`strategy="reverse-mode"`.'
        )
    if strict:
        raise RuntimeError(
            "torch.autograd.functional.jacobian: `strict=True` "
            'and `strategy="forward-mode"` are not supported together (yet). '
            "Please either set `strict=False` or "
            '`strategy="reverse-mode"`.'
        )


def _detached(blocks: Blocks) -> Blocks:
    return tuple(tuple(block.detach() for block in row) for row in blocks)


def unpack(blocks: Blocks, is_outputs_tuple: bool, is_inputs_tuple: bool) -> Any:
    """Blocks in the structure that the user's tuples ask for."""
    rows = [row if is_inputs_tuple else row[0] for row in blocks]
    return tuple(rows) if is_outputs_tuple else rows[0]


def row_by_row(outputs: Tensors, inputs: Tensors, create_graph: bool, strict: bool) -> Blocks:
    """One backward pass for each element of the outputs; the only strategy that can be strict."""
    return tuple(
        _rows_of_output(index, output, inputs, create_graph, strict) for index, output in enumerate(outputs)
    )


def _rows_of_output(
    index: int, output: Tensor, inputs: Tensors, create_graph: bool, strict: bool
) -> tuple[Tensor, ...]:
    if output.nelement() == 0:
        return tuple(tensor.new_zeros(output.shape + tensor.shape) for tensor in inputs)
    rows = []
    for element in output.reshape(-1).unbind():
        grads = _arguments.grad((element,), inputs, create_graph=create_graph, retain_graph=True)
        if strict:
            _require_dependence(index, grads, create_graph)
        rows.append(
            [torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs, strict=True)],
        )
    return tuple(
        torch.stack(column).view(output.shape + tensor.shape)
        for column, tensor in zip(zip(*rows, strict=True), inputs, strict=True)
    )


def _require_dependence(index: int, grads: _arguments.MaybeTensors, create_graph: bool) -> None:
    for input_index, grad in enumerate(grads):
        if grad is None:
            raise RuntimeError(
                f"Output {index} of the user-provided function is "
                f"independent of input {input_index}. This is not allowed in "
                "strict mode."
            )
        if create_graph and not grad.requires_grad:
            # torch names the output's index here, not the input's; so do we.
            raise RuntimeError(
                "The jacobian of the user-provided function is "
                f"independent of input {index}. This is not allowed in "
                "strict mode when create_graph=True."
            )


def batched_rows(outputs: Tensors, inputs: Tensors, create_graph: bool) -> Blocks:
    """All rows in one batched backward pass (``torch.vmap`` over the graph)."""
    numels = [output.nelement() for output in outputs]
    total = sum(numels)
    if total == 0:
        return tuple(
            tuple(tensor.new_zeros(output.shape + tensor.shape) for tensor in inputs) for output in outputs
        )
    grads = _arguments.grad(
        [output.reshape(-1) for output in outputs],
        inputs,
        _standard_basis(outputs),
        create_graph=create_graph,
        is_grads_batched=True,
    )
    columns = []
    for grad, tensor in zip(grads, inputs, strict=True):
        rows = tensor.new_zeros((total, *tensor.shape)) if grad is None else grad
        columns.append(
            [
                part.reshape(output.shape + tensor.shape)
                for part, output in zip(rows.split(numels), outputs, strict=True)
            ]
        )
    return tuple(zip(*columns, strict=True))


def _standard_basis(tensors: Tensors) -> Tensors:
    """The identity of size ``sum(numel)``, its columns split among ``tensors``."""
    total = sum(tensor.nelement() for tensor in tensors)
    basis, start = [], 0
    for tensor in tensors:
        part = tensor.new_zeros(total, tensor.nelement())
        part.diagonal(-start).fill_(1)
        start += tensor.nelement()
        basis.append(part)
    return tuple(basis)


def forward_mode(func: Callable[..., Any], inputs: Tensors) -> tuple[bool, Blocks]:
    """All columns in one batched forward pass; also returns whether ``func`` gave a tuple."""
    is_tuple = False

    def outputs_of(*points: Tensor) -> Tensors:
        nonlocal is_tuple
        with torch.enable_grad():
            is_tuple, outputs = _arguments.as_tuple(func(*points), "outputs", "jacobian")
        return outputs

    def column(*tangents: Tensor) -> Tensors:
        shaped = tuple(t.view(tensor.shape) for t, tensor in zip(tangents, inputs, strict=True))
        product: Tensors = torch.func.jvp(outputs_of, inputs, shaped)[1]
        return product

    numels = [tensor.nelement() for tensor in inputs]
    # Not out_dims=-1: torch 2.13 mistakes the shape of a result that does not depend on the batch.
    columns: Tensors = torch.vmap(column)(*_standard_basis(inputs))
    blocks = tuple(
        tuple(
            part.movedim(0, -1).reshape(part.shape[1:] + tensor.shape)
            for part, tensor in zip(column.split(numels), inputs, strict=True)
        )
        for column in columns
    )
    return is_tuple, blocks
