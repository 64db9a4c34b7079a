"""The strategies behind ``jacobian`` and ``hessian``: row by row, batched rows, forward mode.

Each returns the blocks as ``blocks[output][input]``, of shape ``output.shape + input.shape``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from secondorder.autodiff import switches
from secondorder.autodiff.backward import pull_rows
from secondorder.vectors import arguments
from secondorder.vectors.arguments import Tensors

Blocks = tuple[tuple[Tensor, ...], ...]


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
        grads = arguments.grad((element,), inputs, create_graph=create_graph, retain_graph=True)
        if strict:
            _require_dependence(index, grads, create_graph)
        rows.append(
            [torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs, strict=True)],
        )
    return tuple(
        torch.stack(column).view(output.shape + tensor.shape)
        for column, tensor in zip(zip(*rows, strict=True), inputs, strict=True)
    )


def _require_dependence(index: int, grads: arguments.MaybeTensors, create_graph: bool) -> None:
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


def batched_rows(
    outputs: Tensors, inputs: Tensors, create_graph: bool, chunk_size: int | None = None
) -> Blocks:
    """All rows in one batched backward pass (``torch.vmap`` over the graph), or ``chunk_size`` a pass."""
    numels = [output.nelement() for output in outputs]
    total = sum(numels)
    if total == 0:
        return tuple(
            tuple(tensor.new_zeros(output.shape + tensor.shape) for tensor in inputs) for output in outputs
        )
    flat_outputs = [output.reshape(-1) for output in outputs]
    step = total if chunk_size is None else chunk_size
    chunks = []
    for start in range(0, total, step):
        rows = range(start, min(start + step, total))
        basis = _standard_basis(outputs, rows)
        live = [(out, e) for out, e in zip(flat_outputs, basis, strict=True) if out.requires_grad]
        chunks.append(
            pull_rows([out for out, _ in live], inputs, [e for _, e in live], create_graph)
            if live
            else [x.new_zeros((len(rows), *x.shape)) for x in inputs]
        )
    columns = [
        [
            part.reshape(output.shape + tensor.shape)
            for part, output in zip(matrix.split(numels), outputs, strict=True)
        ]
        for matrix, tensor in zip(_joined(chunks), inputs, strict=True)
    ]
    return tuple(zip(*columns, strict=True))


def _joined(chunks: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*chunks, strict=True)]


def _standard_basis(tensors: Tensors, rows: range | None = None) -> Tensors:
    """Rows of the identity of size ``sum(numel)``, its columns split: shapes ``(len(rows), numel_i)``."""
    total = sum(tensor.nelement() for tensor in tensors)
    rows = range(total) if rows is None else rows
    basis, start = [], 0
    for tensor in tensors:
        part = tensor.new_zeros(len(rows), tensor.nelement())
        # Row i of this part has its one in column rows[i] - start.
        first, last = max(rows.start, start), min(rows.stop, start + tensor.nelement())
        if first < last:
            part[first - rows.start : last - rows.start, first - start : last - start].fill_diagonal_(1)
        start += tensor.nelement()
        basis.append(part)
    return tuple(basis)


def forward_mode(
    func: Callable[..., arguments.Outputs], inputs: Tensors, chunk_size: int | None = None
) -> tuple[arguments.Outputs, Blocks]:
    """All columns in one batched forward pass, or ``chunk_size`` a pass; also what ``func`` gave."""
    rebuild: Callable[[Tensors], arguments.Outputs]

    def outputs_of(*points: Tensor) -> tuple[Tensors, Tensors]:
        nonlocal rebuild
        with torch.enable_grad():
            outputs = func(*points)
        # Only tensors pass through the transforms.
        tensors, rebuild = arguments.split_tensors(outputs)
        return outputs.tensors, tensors

    def column(*tangents: Tensor) -> tuple[Tensors, Tensors]:
        shaped = tuple(t.view(tensor.shape) for t, tensor in zip(tangents, inputs, strict=True))
        pushed: Any = torch.func.jvp(outputs_of, inputs, shaped, has_aux=True)
        return pushed[1], pushed[2]

    numels = [tensor.nelement() for tensor in inputs]
    # Not -1: torch 2.13 mistakes the shape of a result that does not depend on the batch.
    out_dims: Any = (0, None)
    total = sum(numels)
    step = total if chunk_size is None else chunk_size
    chunks = []
    # Not vmap's chunk_size: with a result that is not batched torch 2.13 fails.
    for start in range(0, max(total, 1), max(step, 1)):
        basis = _standard_basis(inputs, range(start, min(start + step, total)))
        with switches.forward_mode():
            part, tensors = torch.vmap(column, out_dims=out_dims)(*basis)
        chunks.append(part)
    blocks = tuple(
        tuple(
            part.movedim(0, -1).reshape(part.shape[1:] + tensor.shape)
            for part, tensor in zip(column.split(numels), inputs, strict=True)
        )
        for column in _joined(chunks)
    )
    return rebuild(tensors), blocks
